"""SM90 building blocks: TMA copies, rings of shared memory guarded by mbarriers, wgmma."""

from typing import NamedTuple

import cutlass
import cutlass.cute as cute
from cutlass import Int32, Int64
from cutlass.block import block_copy
from cutlass.cute.nvgpu import cpasync, warpgroup
from cutlass.memory import SmemAllocator


class Tma(NamedTuple):
    atom: cute.CopyAtom
    tensor: cute.Tensor  # coordinates (S, D, H, B)


def make_tma(op, mX: cute.Tensor, smem_layout: cute.ComposedLayout, tile: tuple[int, int]) -> Tma:
    """TMA between mX (B, S, H, D) and a tile (rows, d) of shared memory; what lies beyond mX is zero."""
    mX = cute.make_tensor(mX.iterator, cute.select(mX.layout, mode=[1, 3, 2, 0]))  # (S, D, H, B)
    layout = cute.select(smem_layout, mode=[0, 1])
    return Tma(*cpasync.make_tiled_tma_atom(op, mX, layout, tile))


class Ring(NamedTuple):
    """A ring of slots in shared memory, each with two mbarriers.

    The ring's i-th use is slot i % stages in round i // stages. full: what the producer announced has
    arrived. empty: all consumer warps are done with it.
    """

    full: cute.Pointer
    empty: cute.Pointer
    stages: int

    def slot(self, i: Int32) -> Int32:
        return i % self.stages

    def wait_full(self, i: Int32):
        cute.arch.mbarrier_wait(self.full + self.slot(i), (i // self.stages) & 1)

    def wait_empty(self, i: Int32):
        """At once in the first round: all slots start empty."""
        cute.arch.mbarrier_wait(self.empty + self.slot(i), ((i // self.stages) & 1) ^ 1)


def make_ring(smem: SmemAllocator, stages: int) -> Ring:
    return Ring(smem.allocate_array(Int64, stages), smem.allocate_array(Int64, stages), stages)


@cute.jit
def init_rings(rings: tuple[Ring, ...], consumer_warps: cutlass.Constexpr):
    """By one thread, before a barrier of the thread block."""
    for ring in rings:
        for i in range(ring.stages):
            cute.arch.mbarrier_init(ring.full + i, 1)
            cute.arch.mbarrier_init(ring.empty + i, consumer_warps)
    cute.arch.mbarrier_init_fence()


@cute.jit
def release(ring: Ring, i: Int32, lane: Int32):
    """This warp is done with the slot of use i."""
    if lane == 0:
        cute.arch.mbarrier_arrive(ring.empty + ring.slot(i))


@cute.jit
def load(tma: Tma, row_block: Int32, head: Int32, batch: Int32, sX: cute.Tensor, ring: Ring, i: Int32):
    """Copy a tile into the ring's slot for use i, once it is empty; sX (rows, d, stages). By a whole warp."""
    ring.wait_empty(i)
    tile = cute.size(sX, mode=[0]), cute.size(sX, mode=[1])
    full = ring.full + ring.slot(i)
    with cute.arch.elect_one():
        cute.arch.mbarrier_arrive_and_expect_tx(full, 2 * tile[0] * tile[1])
    gX = cute.local_tile(tma.tensor[None, None, head, batch], tile, (row_block, 0))  # (rows, d)
    sX = sX[None, None, ring.slot(i)]  # (rows, d)
    block_copy(tma.atom, cute.group_modes(gX, 0, 2), cute.group_modes(sX, 0, 2), tma_bar_ptr=full)


@cute.jit
def wgmma(
    tiled_mma: cute.TiledMma,
    acc: cute.Tensor,
    tCrA: cute.Tensor,
    tCrB: cute.Tensor,
    accumulate: cutlass.Constexpr,
):
    """Issue acc = A·B or acc += A·B as one group; the caller waits for it."""
    warpgroup.fence()
    # .set() mutates: a fresh atom, so that nothing escapes a loop.
    atom = cute.make_mma_atom(tiled_mma.op)
    atom.set(warpgroup.Field.ACCUMULATE, accumulate)
    for k in cutlass.range_constexpr(cute.size(tCrA, mode=[2])):
        cute.gemm(atom, acc, tCrA[None, None, k], tCrB[None, None, k], acc)
        atom.set(warpgroup.Field.ACCUMULATE, True)
    warpgroup.commit_group()


@cute.jit
def all_true(condition, barrier_id: Int32):
    """Whether the condition holds in all 128 threads of a warpgroup; a barrier for them."""
    ok = cute.arch.inline_ptx(
        "{ .reg .pred p, q; setp.ne.s32 p, {$r0}, 0; "
        "barrier.cta.red.and.pred q, {$r1}, 128, p; selp.s32 {$w0}, 1, 0, q; }",
        write_only_types=[Int32],
        read_only_args=[Int32(condition), barrier_id],
    )
    # The same in all lanes: said for the compiler, which else gives up uniform registers.
    return cute.arch.vote_all_sync(ok != 0)
