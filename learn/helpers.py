"""What the CuTe steps share and none of them is about: layouts, views of registers, and the end of a tile.

Each step says what it uses of this file when it first does. Everything here is for head dim 128 and bfloat16.
"""

import math
from typing import NamedTuple

import cutlass
import cutlass.cute as cute
import cutlass.utils.hopper_helpers as hopper
from cutlass import BFloat16, Float32, Int32, Int64
from cutlass.block import block_copy
from cutlass.cute.nvgpu import OperandMajorMode, cpasync, warp, warpgroup
from cutlass.memory import SmemAllocator
from cutlass.tensor_utils import LayoutEnum

D = 128  # head dim
SCALE_LOG2 = D**-0.5 * math.log2(math.e)  # softmax scale; exp(x) is computed as exp2(log2(e) * x)


# Registers (step 4): a tensor core's accumulator, as one thread holds it, is ((2, 2), M, N) for mma.sync and
# ((2, 2, V), M, N) for wgmma: pairs of adjacent columns, two rows that lie 8 apart, and repetitions. In both,
# the 4 threads of a quad share a row.


def rows_cols(acc: cute.Tensor) -> cute.Tensor:
    """View an accumulator as this thread's (rows, columns); column c lies 8 * (c // 2) + c % 2 right of 0."""
    shape, stride = acc.layout.shape, acc.layout.stride
    rows = (shape[0][1], shape[1]), (stride[0][1], stride[1])
    cols = (shape[0][0], *shape[0][2:], shape[2]), (stride[0][0], *stride[0][2:], stride[2])
    return cute.make_tensor(acc.iterator, cute.make_layout((rows[0], cols[0]), stride=(rows[1], cols[1])))


def as_operand_A(acc: cute.Tensor) -> cute.Tensor:
    """View an accumulator as the A operand, ((2, 2, 2), M, K), of the next product: P of P·V."""
    if cute.rank(acc.layout.shape[0]) == 3:  # wgmma: V = 2 * K
        layout = cute.logical_divide(acc.layout, ((None, None, 2), None, None))
        s, d = layout.shape, layout.stride
        inner, outer = (s[0][2][0], d[0][2][0]), ((s[0][2][1], s[2]), (d[0][2][1], d[2]))
    else:  # mma.sync: N = 2 * K
        layout = cute.logical_divide(acc.layout, (None, None, 2))
        s, d = layout.shape, layout.stride
        inner, outer = (s[2][0], d[2][0]), (s[2][1], d[2][1])
    shape = (s[0][0], s[0][1], inner[0]), s[1], outer[0]
    stride = (d[0][0], d[0][1], inner[1]), d[1], outer[1]
    return cute.make_tensor(acc.iterator, cute.make_layout(shape, stride=stride))


@cute.jit
def convert(src: cute.Tensor, dst: cute.Tensor):
    """dst <- src, float32 to bfloat16, two at a time."""
    pairs = cute.recast_tensor(dst, Int32)
    for i in cutlass.range_constexpr(cute.size(pairs)):
        pairs[i] = cute.arch.inline_ptx(
            "cvt.rn.bf16x2.f32 {$w0}, {$r1}, {$r0};",
            write_only_types=[Int32],
            read_only_args=[src[2 * i], src[2 * i + 1]],
        )


@cute.jit
def normalise(acc_O: cute.Tensor, row_sum: cute.Tensor) -> cute.Tensor:
    """O / row_sum in bfloat16; row_sum: of this thread's columns so far."""
    rows = rows_cols(acc_O)
    for r in cutlass.range_constexpr(cute.size(row_sum)):
        factor = cute.arch.rcp_approx(cute.arch.warp_reduction_sum(row_sum[r], threads_in_group=4))
        for c in cutlass.range_constexpr(cute.size(rows, mode=[1])):
            rows[r, c] = rows[r, c] * factor
    O = cute.make_rmem_tensor(acc_O.shape, BFloat16)
    convert(acc_O, O)
    return O


@cute.jit
def store(acc_O: cute.Tensor, row_sum: cute.Tensor, gO: cute.Tensor):
    """gO <- O / row_sum, the end of a tile; gO: this thread's part of it."""
    cute.autovec_copy(normalise(acc_O, row_sum), gO)


def transposed(x: cute.Tensor) -> cute.Tensor:
    """The same memory, with the first two modes exchanged."""
    return cute.make_tensor(x.iterator, cute.select(x.layout, mode=[1, 0, *range(2, cute.rank(x))]))


# Shared memory (step 5): rows of 128 elements, swizzled.


def tile_layout(rows: int, stages: int = 1) -> cute.ComposedLayout:
    """(rows, 128, stages), swizzled as ldmatrix, wgmma and TMA read it without bank conflicts."""
    return hopper.make_smem_layout_a(LayoutEnum.ROW_MAJOR, (rows, 1, D), BFloat16, stages)


def allocate(smem: SmemAllocator, layout: cute.ComposedLayout) -> cute.Tensor:
    return smem.allocate_tensor(BFloat16, layout.outer, 1024, swizzle=layout.inner)


# ldmatrix (step 6): where one lane reads an operand, worked out once.


@cute.jit
def opaque(x: Int32) -> Int32:
    """x, unknown to the compiler: what follows from it is worked out here, not kept in registers."""
    return cute.arch.inline_ptx("mov.b32 {$w0}, {$r0};", write_only_types=[Int32], read_only_args=[x])


@cute.jit
def opaque_copy(x: cute.Tensor) -> cute.Tensor:
    """The same for a few registers of 16-bit values."""
    copy = cute.make_rmem_tensor(x.shape, x.element_type)
    words, copied = cute.recast_tensor(x, Int32), cute.recast_tensor(copy, Int32)
    for i in cutlass.range_constexpr(cute.size(words)):
        copied[i] = opaque(words[i])
    return copy


class Source(NamedTuple):
    """An operand in shared memory, as one lane's ldmatrix reads it."""

    copy: cute.TiledCopy
    address: Int32  # of the lane's first element, swizzled
    layout: cute.Layout  # (COPY, M or N, K) -> offset from it, before the swizzle
    target: cute.Tensor  # (COPY, M or N, K) in registers


@cute.jit
def source(copy: cute.TiledCopy, sX: cute.Tensor, fragment: cute.Tensor, tidx: Int32) -> Source:
    thr_copy = copy.get_slice(opaque(tidx))
    tXsX = thr_copy.partition_S(sX)
    start = tXsX.iterator.toint()
    address = start ^ ((start >> 3) & 0x70)  # the swizzle: address bits 7 to 9 go into bits 4 to 6
    return Source(copy, address, tXsX.layout, thr_copy.retile(fragment))


@cute.jit
def fetch(x: Source, k: cutlass.Constexpr):
    """Move slice k from shared memory to registers.

    A lane's first address has zeros where the offsets of slices have the swizzle's bits: their low bits can
    be XORed to the swizzled address and the rest added, so that one register serves all slices.
    """
    for i in cutlass.range_constexpr(cute.size(x.layout, mode=[1])):
        offset = 2 * cute.crd2idx((0, i, k), x.layout)  # bytes
        low = offset % 1024
        address = (x.address ^ low) + (offset - low)
        pointer = cute.make_ptr(BFloat16, address, cute.AddressSpace.smem, assumed_align=16)
        rows = cute.make_tensor(pointer, cute.slice_(x.layout, (None, 0, 0)))
        cute.copy(x.copy, rows, x.target[None, i, k])


# TMA and wgmma (step 7)


class Tma(NamedTuple):
    """A tensor in global memory as the TMA unit copies tiles of it."""

    atom: cute.CopyAtom
    tensor: cute.Tensor  # (S, D, H, B)


def make_tma(op, mX: cute.Tensor, layout: cute.ComposedLayout, rows: int) -> Tma:
    """mX: (B, S, H, D); layout: of a tile of so many rows in shared memory."""
    mX = cute.make_tensor(mX.iterator, cute.select(mX.layout, mode=[1, 3, 2, 0]))
    return Tma(*cpasync.make_tiled_tma_atom(op, mX, cute.select(layout, mode=[0, 1]), (rows, D)))


class Ring(NamedTuple):
    """Slots of shared memory; the i-th use of the ring is slot i % stages, in round i // stages.

    An mbarrier flips a phase bit each time it completes: a wait names the parity of its round.
    """

    full: cute.Pointer  # (stages) mbarriers: the bytes that were announced have arrived
    empty: cute.Pointer  # (stages) mbarriers: all warps that read it have released it
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
def init_rings(rings: tuple[Ring, ...], warps: cutlass.Constexpr):
    """By one thread, before a barrier of the thread block; warps: how many release each slot."""
    for ring in rings:
        for i in range(ring.stages):
            cute.arch.mbarrier_init(ring.full + i, 1)  # the thread that asks for a copy announces its bytes
            cute.arch.mbarrier_init(ring.empty + i, warps)  # one lane of each warp
    cute.arch.mbarrier_init_fence()  # the TMA unit, too, sees them initialised


@cute.jit
def load(tma: Tma, block, head, batch, sX: cute.Tensor, ring: Ring, i: Int32):
    """Copy a block of a head to the slot of use i, once it is empty. By a warp; sX: (rows, d, stages)."""
    ring.wait_empty(i)  # nobody reads what TMA will overwrite
    sX, full = sX[None, None, ring.slot(i)], ring.full + ring.slot(i)
    with cute.arch.elect_one():
        cute.arch.mbarrier_arrive_and_expect_tx(full, 2 * cute.size(sX))  # announces the tile's bytes
    gX = cute.local_tile(tma.tensor[None, None, head, batch], (cute.size(sX, mode=[0]), D), (block, 0))
    block_copy(tma.atom, cute.group_modes(gX, 0, 2), cute.group_modes(sX, 0, 2), tma_bar_ptr=full)


@cute.jit
def release(ring: Ring, i: Int32):
    """All lanes of this warp are done with the slot of use i."""
    if cute.arch.lane_idx() == 0:
        cute.arch.mbarrier_arrive(ring.empty + ring.slot(i))


def make_wgmma(warpgroups: int, n: int, a_in_registers: bool, b_transposed: bool) -> cute.TiledMma:
    """wgmma of 64 rows for each warpgroup, n columns, slices of 16."""
    a = warpgroup.OperandSource.RMEM if a_in_registers else warpgroup.OperandSource.SMEM
    b_major = OperandMajorMode.MN if b_transposed else OperandMajorMode.K
    dtypes, majors = (BFloat16, BFloat16), (OperandMajorMode.K, b_major)
    return hopper.make_trivial_tiled_mma(*dtypes, *majors, Float32, (warpgroups, 1, 1), (64, n), a)


@cute.jit
def wgmma(tiled_mma: cute.TiledMma, acc: cute.Tensor, tCrA, tCrB, accumulate: cutlass.Constexpr):
    """Issue acc = A·B or acc += A·B as one group; the caller waits for it."""
    warpgroup.fence()  # what the registers of acc and A were given comes before the product uses them
    atom = cute.make_mma_atom(tiled_mma.op)
    atom.set(warpgroup.Field.ACCUMULATE, accumulate)
    for k in cutlass.range_constexpr(cute.size(tCrA, mode=[2])):
        cute.gemm(atom, acc, tCrA[None, None, k], tCrB[None, None, k], acc)
        atom.set(warpgroup.Field.ACCUMULATE, True)
    warpgroup.commit_group()


@cute.jit
def all_true(condition, barrier_id):
    """Step 10: whether the condition holds in all 128 threads of a warpgroup, all of which must call it."""
    ok = cute.arch.inline_ptx(
        "{ .reg .pred p, q; setp.ne.s32 p, {$r0}, 0; "
        "barrier.cta.red.and.pred q, {$r1}, 128, p; selp.s32 {$w0}, 1, 0, q; }",
        write_only_types=[Int32],
        read_only_args=[Int32(condition), barrier_id],
    )
    # The same in all lanes: said for the compiler, which else gives up uniform registers.
    return cute.arch.vote_all_sync(ok != 0)


@cute.jit
def store_tma(
    O: cute.Tensor, sO: cute.Tensor, tma: Tma, tiled_mma: cute.TiledMma, tidx, m_block, head, batch
):
    """Step 12: a warp stores its 16 rows of O by TMA, through its rows of sO (tile_m, d)."""
    atom = cute.make_copy_atom(warp.StMatrix8x8x16bOp(False, 4), BFloat16)
    thr_store = cute.make_tiled_copy_C(atom, tiled_mma).get_slice(tidx)
    cute.copy(atom, thr_store.retile(O), thr_store.partition_D(sO))
    cute.arch.fence_view_async_shared()  # this lane's stores come before what the TMA unit does next
    cute.arch.sync_warp()  # all lanes have stored and fenced: lane 0 may start the copy of their rows
    warp_idx = cute.arch.make_warp_uniform(tidx // 32)
    row_block = m_block * (cute.size(sO, mode=[0]) // 16) + warp_idx
    gO = cute.local_tile(tma.tensor[None, None, head, batch], (16, D), (row_block, 0))  # (16, d)
    sO = cute.local_tile(sO, (16, D), (warp_idx, 0))  # (16, d)
    if cute.arch.lane_idx() == 0:
        block_copy(tma.atom, cute.group_modes(sO, 0, 2), cute.group_modes(gO, 0, 2))
        cute.arch.cp_async_bulk_commit_group()


@cute.jit
def wait_for_store():
    """Until the TMA unit has read this warp's rows of the O that was stored last: they may be overwritten."""
    if cute.arch.lane_idx() == 0:  # which has asked for the store
        cute.arch.cp_async_bulk_wait_group(0, read=True)


@cute.jit
def announce(sTile: cute.Tensor, q_ring: Ring, t: Int32, number: Int32):
    """Tell the consumers, who see it when the slot of use t is full, which tile it is for. By a warp."""
    q_ring.wait_empty(t)  # they have read what the slot said before
    if cute.arch.lane_idx() == 0:
        sTile[q_ring.slot(t)] = number
        if number < 0:  # the end: no bytes will follow
            cute.arch.mbarrier_arrive(q_ring.full + q_ring.slot(t))
    cute.arch.sync_warp()  # written before any lane announces bytes


@cute.jit
def read_tile(sTile: cute.Tensor, q_ring: Ring, t: Int32):
    """What `announce` wrote for use t, whose Q is there as well."""
    q_ring.wait_full(t)
    return cute.arch.make_warp_uniform(sTile[q_ring.slot(t)])


@cute.jit
def draw(counter: cute.Tensor):
    """The next number, in lane 0, who need not wait for it yet: counter[0] is how many have been drawn."""
    number = Int32(0)
    if cute.arch.lane_idx() == 0:
        number = cute.arch.atomic_add(counter.iterator.llvm_ptr, Int32(1), sem="relaxed", scope="gpu")
    return number


@cute.jit
def finish_drawing(counter: cute.Tensor):
    """The last thread block to call it leaves both counters zero, for the next launch."""
    if cute.arch.lane_idx() == 0:
        done = (counter.iterator + 1).llvm_ptr
        if cute.arch.atomic_add(done, Int32(1), sem="relaxed", scope="gpu") == cute.arch.grid_dim()[0] - 1:
            counter[0], counter[1] = Int32(0), Int32(0)
