"""Merging the splits of a decode by their log-sum-exp (Dao et al. 2023, "Flash-Decoding"), a warp a row.

Where a tile has few rows, decode.py does it itself, in the thread block that is done last; else this kernel.
"""

from typing import NamedTuple

import cutlass
import cutlass.cute as cute
from cutlass import Boolean, Float32, Int32, Int64, const_expr
from cutlass.cute.nvgpu import LoadCacheMode, cpasync
from cutlass.memory import SmemAllocator

from mini_flash_attention.gpu.config import ELEMENTS
from mini_flash_attention.kernels.calls import CU_SEQLENS_Q, Ragged
from mini_flash_attention.kernels.parts.fragments import convert
from mini_flash_attention.kernels.parts.scores import LOG2_E
from mini_flash_attention.kernels.parts.softmax import LN_2

MAX_SPLITS = 128


class Partial(NamedTuple):
    """The results of the splits; a row is a query of a head, rows are numbered as in a contiguous q."""

    O: cute.Tensor  # (splits, rows, d) float32; not written where LSE is -inf
    LSE: cute.Tensor  # (splits, rows) float32


def partial(workspace: cute.Tensor, splits: Int32, mO: cute.Tensor) -> Partial:
    """Views of the workspace: (splits * rows * (d + 1)) float32."""
    batch, seqlen, heads, head_dim = mO.shape
    rows = batch * seqlen * heads
    of_row = cute.assume(Int64(head_dim), divby=ELEMENTS)
    of_splits = cute.assume(rows * of_row, divby=ELEMENTS)
    O = cute.make_layout((splits, rows, head_dim), stride=(of_splits, of_row, 1))
    LSE = cute.make_layout((splits, rows), stride=(Int64(rows), 1))
    return Partial(
        cute.make_tensor(workspace.iterator, O),
        cute.make_tensor(workspace.iterator + splits * of_splits, LSE),
    )


def row_of(mO: cute.Tensor, batch: Int32, token: Int32, head: Int32) -> Int32:
    return (batch * mO.shape[1] + token) * mO.shape[2] + head


class Shared(NamedTuple):
    """A warp's shared memory: loads to registers would be put off until they are needed, one by one."""

    part: cute.Tensor  # (columns, slots, rows): O of the splits on the way
    share: cute.Tensor  # (MAX_SPLITS, rows): what each split counts in O


def shared_words(shape: tuple[int, int, int]) -> int:
    """Float32 that Shared takes; shape: of its `part`."""
    return shape[2] * (shape[0] * shape[1] + MAX_SPLITS)


def make_shared(start: cute.Pointer, shape: tuple[int, int, int]) -> Shared:
    part = cute.make_tensor(start, cute.make_layout(shape))
    share = cute.make_layout((MAX_SPLITS, shape[2]))
    return Shared(part, cute.make_tensor(start + shape[0] * shape[1] * shape[2], share))


@cute.jit
def start_copies(x: Partial, splits: Int32, rows: cute.Tensor, shared: Shared, first: Int32, lane: Int32):
    """O of the splits from `first` on is on its way to shared.part; each lane copies what it will read."""
    atom = cute.make_copy_atom(
        cpasync.CopyG2SOp(cache_mode=LoadCacheMode.GLOBAL), Float32, num_bits_per_copy=128
    )
    vector, inside = cute.make_layout(((4, 1),)), cute.make_rmem_tensor(1, Boolean)
    columns, slots, _ = shared.part.shape
    for r in cutlass.range_constexpr(cute.size(rows)):
        if rows[r] >= 0:
            for i in cutlass.range_constexpr(slots):
                for v in cutlass.range_constexpr(columns // 128):
                    col = 4 * lane + 128 * v
                    inside[0] = first + i < splits and col < x.O.shape[2]
                    gO = cute.local_tile(x.O[first + i, rows[r], None], (4,), (col // 4,))
                    sO = cute.local_tile(shared.part[None, i, r], (4,), (col // 4,))
                    source, target = (cute.make_tensor(t.iterator, vector) for t in (gO, sO))
                    cute.copy(atom, source, target, pred=inside)
    cute.arch.cp_async_commit_group()


@cute.jit
def weigh(x: Partial, splits: Int32, rows: cute.Tensor, share: cute.Tensor, lse: cute.Tensor, lane: Int32):
    """share <- what each split counts in O, lse (rows) <- the log-sum-exp of all."""
    splits_of_lane = MAX_SPLITS // 32  # lane, lane + 32, ...
    each = cute.make_rmem_tensor((splits_of_lane, cute.size(rows)), Float32)
    each.fill(-Float32.inf)
    for r in cutlass.range_constexpr(cute.size(rows)):
        for i in cutlass.range_constexpr(splits_of_lane):
            if rows[r] >= 0 and lane + 32 * i < splits:
                each[i, r] = x.LSE[lane + 32 * i, rows[r]]
    for r in cutlass.range_constexpr(cute.size(rows)):
        if rows[r] >= 0:
            largest = -Float32.inf
            for i in cutlass.range_constexpr(splits_of_lane):
                largest = cute.arch.fmax(largest, each[i, r])
            largest = cute.arch.warp_reduction_max(largest)
            base = Float32(0.0) if largest == -Float32.inf else largest  # no keys: not -inf - -inf
            total = Float32(0.0)
            for i in cutlass.range_constexpr(splits_of_lane):
                each[i, r] = cute.math.exp2((each[i, r] - base) * Float32(LOG2_E), fastmath=True)
                total += each[i, r]
            total = cute.arch.warp_reduction_sum(total)
            scale = Float32(0.0) if total == 0.0 else cute.arch.rcp_approx(total)
            for i in cutlass.range_constexpr(splits_of_lane):
                share[lane + 32 * i, r] = each[i, r] * scale
            all_keys = largest + cute.math.log2(total, fastmath=True) * Float32(LN_2)
            lse[r] = -Float32.inf if total == 0.0 else all_keys


@cute.jit
def add_splits(
    splits: Int32, first: Int32, part: cute.Tensor, share: cute.Tensor, acc: cute.Tensor, lane: Int32
):
    """acc (4, columns / 128) += the lane's columns of the splits of a row in `part` (columns, slots)."""
    for i in cutlass.range_constexpr(part.shape[1]):
        weight = share[cutlass.min(first + i, MAX_SPLITS - 1)]
        if first + i < splits and weight != 0.0:  # else its O may be anything; a NaN goes on
            for v in cutlass.range_constexpr(cute.size(acc, mode=[1])):
                O = cute.make_rmem_tensor(4, Float32)
                cute.autovec_copy(cute.local_tile(part[None, i], (4,), (lane + 32 * v,)), O)
                for c in cutlass.range_constexpr(4):
                    acc[c, v] += weight * O[c]


@cute.jit
def merge(
    x: Partial,
    splits: Int32,
    rows: cute.Tensor,
    shared: Shared,
    acc: cute.Tensor,
    lse: cute.Tensor,
    lane: Int32,
):
    """acc (4, columns / 128, rows) <- the lane's columns of O; lse (rows). By a warp; rows below 0: none."""
    columns, slots, _ = shared.part.shape
    acc.fill(0.0)
    start_copies(x, splits, rows, shared, Int32(0), lane)
    weigh(x, splits, rows, shared.share, lse, lane)
    cute.arch.sync_warp()
    first = Int32(0)
    while first < splits:
        cute.arch.cp_async_wait_group(0)
        for r in cutlass.range_constexpr(cute.size(rows)):
            if rows[r] >= 0:
                part, share = shared.part[None, None, r], shared.share[None, r]
                add_splits(splits, first, part, share, acc[None, None, r], lane)
        first += slots
        if first < splits:
            start_copies(x, splits, rows, shared, first, lane)


@cute.jit
def store(acc: cute.Tensor, lse: Float32, gO: cute.Tensor, gLSE: cute.Tensor, lane: Int32):
    """gO (d) and gLSE (1) <- a row's result; acc (4, columns / 128)."""
    for v in cutlass.range_constexpr(cute.size(acc, mode=[1])):
        if 4 * lane + 128 * v < gO.shape[0]:
            out = cute.make_rmem_tensor(4, gO.element_type)
            convert(acc[None, v], out)
            cute.autovec_copy(out, cute.local_tile(gO, (4,), (lane + 32 * v,)))
    if lane == 0:
        gLSE[0] = lse


@cute.kernel
def kernel(
    config: cutlass.Constexpr,
    x: Partial,
    num_splits: Int32,
    mO: cute.Tensor,
    mLSE: cute.Tensor,
    ragged: Ragged,
):
    lane, _, _ = cute.arch.thread_idx()
    row, _, _ = cute.arch.block_idx()
    _, seqlen, heads, _ = mO.shape
    head, token = row % heads, row // heads
    batch, token = token // seqlen, token % seqlen
    shape = config.merged_columns, 2 * config.merged_splits, 1
    memory = SmemAllocator().allocate_tensor(Float32, cute.make_layout(shared_words(shape)), 16)
    if const_expr(config.pdl):
        cute.arch.griddepcontrol_wait()  # the splits are there
    if is_mine(ragged, token):
        acc = cute.make_rmem_tensor((4, shape[0] // 128, 1), Float32)
        rows, lse = cute.make_rmem_tensor(1, Int32), cute.make_rmem_tensor(1, Float32)
        rows[0] = row
        merge(x, num_splits, rows, make_shared(memory.iterator, shape), acc, lse, lane)
        gLSE = cute.domain_offset((token,), mLSE[batch, head, None])
        store(acc[None, None, 0], lse[0], mO[batch, token, head, None], gLSE, lane)


@cute.jit
def is_mine(ragged: Ragged, token: Int32):
    """Whether the token is a sequence's: packed q may have more rows than its sequences."""
    mine = Boolean(True)
    if ragged.given & CU_SEQLENS_Q:
        mine = ragged.cu_seqlens_q[0] <= token and token < ragged.cu_seqlens_q[ragged.batch]
    return mine


kernel.set_name_prefix("mfa_combine", remove_cutlass_symbol=True)


@cute.jit
def launch(
    config: cutlass.Constexpr,
    x: Partial,
    num_splits: Int32,
    mO: cute.Tensor,
    mLSE: cute.Tensor,
    ragged: Ragged,
    stream,
):
    kernel(config, x, num_splits, mO, mLSE, ragged).launch(
        grid=(x.LSE.shape[1], 1, 1), block=(32, 1, 1), stream=stream, use_pdl=config.pdl
    )
