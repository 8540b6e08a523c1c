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
    arrived, or all warps that write the slot have committed. empty: all consumer warps are done with it.
    """

    full: cute.Pointer
    empty: cute.Pointer
    stages: int

    def slot(self, i: Int32) -> Int32:
        return i % self.stages

    def wait_full(self, i: Int32):
        """What was announced or committed for use i is there, for all to read."""
        cute.arch.mbarrier_wait(self.full + self.slot(i), (i // self.stages) & 1)

    def wait_empty(self, i: Int32):
        """All consumer warps are done with the slot; at once in the first round: all slots start empty."""
        cute.arch.mbarrier_wait(self.empty + self.slot(i), ((i // self.stages) & 1) ^ 1)


def make_ring(smem: SmemAllocator, stages: int) -> Ring:
    return Ring(smem.allocate_array(Int64, stages), smem.allocate_array(Int64, stages), stages)


@cute.jit
def init_rings(
    rings: tuple[Ring, ...], consumer_warps: cutlass.Constexpr, producer_warps: cutlass.Constexpr = 1
):
    """By one thread, before a barrier of the thread block.

    consumer_warps: each releases a slot once, which makes it empty. producer_warps: so many arrivals make it
    full, each `commit` being one; where TMA fills it, the one of `expect`, and its bytes.
    """
    for ring in rings:
        for i in range(ring.stages):
            cute.arch.mbarrier_init(ring.full + i, producer_warps)
            cute.arch.mbarrier_init(ring.empty + i, consumer_warps)
    cute.arch.mbarrier_init_fence()  # the TMA unit, too, sees them initialised


@cute.jit
def release(ring: Ring, i: Int32, lane: Int32):
    """All lanes of this warp are done with the slot of use i.

    A wgmma's end, a shuffle or sync_warp has shown it; or no lane reads it, as the warp skips the block.
    """
    if lane == 0:
        cute.arch.mbarrier_arrive(ring.empty + ring.slot(i))  # after the last warp's, wait_empty returns


@cute.jit
def commit(ring: Ring, i: Int32, lane: Int32):
    """This warp has written its part of the slot of use i, and shown it to all who read it."""
    if lane == 0:
        cute.arch.mbarrier_arrive(ring.full + ring.slot(i))  # after the last warp's, wait_full returns


@cute.jit
def expect(ring: Ring, i: Int32, sX: cute.Tensor, more: cutlass.Constexpr = 0) -> cute.Pointer:
    """Wait until the slot of use i is empty, announce a tile's bytes; returns the mbarrier they arrive at.

    more: bytes that the caller copies there beside the tile.
    """
    ring.wait_empty(i)  # nobody reads what TMA will overwrite
    full = ring.full + ring.slot(i)
    size = 2 * cute.size(sX, mode=[0]) * cute.size(sX, mode=[1]) + more
    with cute.arch.elect_one():
        cute.arch.mbarrier_arrive_and_expect_tx(full, size)  # wait_full returns when they have arrived
    return full


@cute.jit
def load(
    tma: Tma,
    start: Int32,
    row_block: Int32,
    head: Int32,
    batch: Int32,
    sX: cute.Tensor,
    ring: Ring,
    i: Int32,
    more: cutlass.Constexpr = 0,
):
    """Copy a tile, the row_block-th from row start, into the ring's slot for use i, once it is empty.

    sX: (rows, d, stages). more: as in expect. By a whole warp.
    """
    full = expect(ring, i, sX, more)
    tile = cute.size(sX, mode=[0]), cute.size(sX, mode=[1])
    gX = cute.domain_offset((start, 0), tma.tensor[None, None, head, batch])  # (S, D)
    gX = cute.local_tile(gX, tile, (row_block, 0))  # (rows, d)
    sX = sX[None, None, ring.slot(i)]  # (rows, d)
    block_copy(tma.atom, cute.group_modes(gX, 0, 2), cute.group_modes(sX, 0, 2), tma_bar_ptr=full)


@cute.jit
def zero_rows(sX: cute.Tensor, first: Int32, thread: Int32, barrier_id):
    """Zero the rows of a tile (rows, d) from `first` on, for wgmma to read. By a warpgroup.

    The caller has waited until TMA has filled the tile. The fence also puts the zeros before TMA's next load.
    """
    chunks = cute.size(sX, mode=[1]) // 8  # of 16 bytes, in a row
    zeros = cute.make_rmem_tensor(8, sX.element_type)
    zeros.fill(0.0)
    i = first * chunks + thread
    while i < cute.size(sX, mode=[0]) * chunks:
        row = cute.local_tile(sX, (1, 8), (i // chunks, i % chunks))  # (1, 8)
        cute.autovec_copy(zeros, cute.group_modes(row, 0, 2))
        i += 128
    cute.arch.fence_view_async_shared()  # this thread's zeros come before what wgmma (async proxy) reads
    cute.arch.barrier(barrier_id=barrier_id, number_of_threads=128)  # and so do those of all the warpgroup


@cute.jit
def wgmma(
    tiled_mma: cute.TiledMma,
    acc: cute.Tensor,
    tCrA: cute.Tensor,
    tCrB: cute.Tensor,
    accumulate: cutlass.Constexpr,
):
    """Issue acc = A·B or acc += A·B as one group; the caller waits for it."""
    warpgroup.fence()  # what the registers of acc and A were given comes before the product uses them
    # .set() mutates: a fresh atom, so that nothing escapes a loop.
    atom = cute.make_mma_atom(tiled_mma.op)
    atom.set(warpgroup.Field.ACCUMULATE, accumulate)
    for k in cutlass.range_constexpr(cute.size(tCrA, mode=[2])):
        cute.gemm(atom, acc, tCrA[None, None, k], tCrB[None, None, k], acc)
        atom.set(warpgroup.Field.ACCUMULATE, True)
    warpgroup.commit_group()  # the group that the caller waits for, before it touches those registers


@cute.jit
def all_true(condition, barrier_id: Int32):
    """Whether the condition holds in all 128 threads of a warpgroup, all of which must call it: a barrier."""
    ok = cute.arch.inline_ptx(
        "{ .reg .pred p, q; setp.ne.s32 p, {$r0}, 0; "
        "barrier.cta.red.and.pred q, {$r1}, 128, p; selp.s32 {$w0}, 1, 0, q; }",
        write_only_types=[Int32],
        read_only_args=[Int32(condition), barrier_id],
    )
    # The same in all lanes: said for the compiler, which else gives up uniform registers.
    return cute.arch.vote_all_sync(ok != 0)


@cute.jit
def reduce_add(sX: cute.Tensor, gX: cute.Tensor):
    """gX += sX (float32, contiguous), by one thread; part of its next bulk group, for which it waits."""
    cute.arch.inline_ptx(
        "cp.reduce.async.bulk.global.shared::cta.bulk_group.add.f32 [{$r0}], [{$r1}], {$r2};",
        read_only_args=[gX.iterator, sX.iterator, Int32(4 * cute.size(sX))],
    )
