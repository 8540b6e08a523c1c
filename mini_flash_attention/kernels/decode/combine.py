"""Merging the splits of a decode by their log-sum-exp (Dao et al. 2023, "Flash-Decoding"), a warp a row.

Where a tile has few rows, its last thread block does it (`merge_tile`); else a kernel of its own.
"""

from typing import NamedTuple

import cutlass
import cutlass.cute as cute
from cutlass import Boolean, Float32, Int32, Int64, const_expr
from cutlass.cute.nvgpu import LoadCacheMode, cpasync
from cutlass.memory import SmemAllocator

from mini_flash_attention.gpu.config import ELEMENTS
from mini_flash_attention.kernels.calls import CU_SEQLENS_Q, Decode
from mini_flash_attention.kernels.decode.division import Tile
from mini_flash_attention.kernels.decode.splits import MAX_SPLITS
from mini_flash_attention.kernels.parts.fragments import convert
from mini_flash_attention.kernels.parts.numbers import LOG2_E
from mini_flash_attention.kernels.parts.softmax import with_sink

LOG2, NATURAL = 1.0, LOG2_E  # the unit of a logarithm, in log2


class Partial(NamedTuple):
    """The results of the splits; a row is a query of a head, rows are numbered as in a contiguous q."""

    O: cute.Tensor  # (splits, rows, d) float32; not written where LSE is -inf
    LSE: cute.Tensor  # (splits, rows) float32


class Rows(NamedTuple):
    """Rows of Partial that a warp merges together."""

    number: cute.Tensor  # (rows); below 0: none
    O: cute.Tensor  # (4, columns / 128, rows) float32: the lane's columns
    LSE: cute.Tensor  # (rows) float32


class Shared(NamedTuple):
    """A warp's shared memory: loads to registers would be put off until they are needed, one by one."""

    part: cute.Tensor  # (columns, slots, rows): O of the splits on the way
    share: cute.Tensor  # (MAX_SPLITS, rows): what each split counts in O


@cute.jit
def launch(call: Decode, config: cutlass.Constexpr, stream):
    x = partial(call)
    kernel(config, call, x).launch(
        grid=(x.LSE.shape[1], 1, 1), block=(32, 1, 1), stream=stream, use_pdl=config.pdl
    )


def partial(call: Decode) -> Partial:
    """Views of the workspace: (splits * rows * (d + 1)) float32."""
    batch, seqlen, heads, head_dim = call.mO.shape
    rows, splits = batch * seqlen * heads, call.num_splits
    of_row = cute.assume(Int64(head_dim), divby=ELEMENTS)
    of_splits = cute.assume(rows * of_row, divby=ELEMENTS)
    O = cute.make_layout((splits, rows, head_dim), stride=(of_splits, of_row, 1))
    LSE = cute.make_layout((splits, rows), stride=(Int64(rows), 1))
    start = call.workspace.iterator
    return Partial(cute.make_tensor(start, O), cute.make_tensor(start + splits * of_splits, LSE))


@cute.kernel
def kernel(config: cutlass.Constexpr, call: Decode, x: Partial):
    lane, _, _ = cute.arch.thread_idx()
    number, _, _ = cute.arch.block_idx()
    _, seqlen, heads, _ = call.mO.shape
    head, token = number % heads, number // heads
    batch, token = token // seqlen, token % seqlen
    shape = config.merged_columns, 2 * config.merged_splits, 1
    memory = SmemAllocator().allocate_tensor(Float32, cute.make_layout(shared_words(shape)), 16)
    if const_expr(config.pdl):
        # The decode kernel is done: all splits are in the workspace. The next launch is not let in early:
        # its thread blocks would come where SMs are free, and lie unevenly (docs/worklog.md).
        cute.arch.griddepcontrol_wait()
    mine = Boolean(True)
    if call.ragged.given & CU_SEQLENS_Q:  # packed q may have more rows than its sequences
        cu_seqlens = call.ragged.cu_seqlens_q
        mine = cu_seqlens[0] <= token and token < cu_seqlens[call.ragged.batch]
    if mine:
        rows = make_rows(shape)
        rows.number[0] = number
        merge(call, x, call.num_splits, rows, make_shared(memory.iterator, shape), lane)
        store(call, rows, 0, (batch, token, head), lane)


kernel.set_name_prefix("mfa_combine", remove_cutlass_symbol=True)


@cute.jit
def merge_tile(
    config: cutlass.Constexpr, call: Decode, x: Partial, tile: Tile, sKV: cute.Tensor, tidx: Int32
):
    """The thread block that is the last to store its part of a tile merges all, in the ring's memory."""
    shape = config.merged_columns, config.merged_splits, config.merged_rows
    words = shared_words(shape)
    start = cute.make_ptr(Float32, sKV.iterator.toint(), cute.AddressSpace.smem, assumed_align=16)
    sDone = cute.make_tensor(cute.recast_ptr(start + config.warps * words, dtype=Int32), cute.make_layout(1))
    if tidx == 0:
        # Release: who counts later sees this thread block's part. Acquire: this one sees those before.
        counter = (call.counters.iterator + tile.position.tile).llvm_ptr
        sDone[0] = cute.arch.atomic_add(counter, Int32(1), sem="acq_rel", scope="gpu") + 1
    cute.arch.barrier()  # all threads see the count, and if it is the last the parts
    if sDone[0] == tile.parts:
        if tidx == 0:
            call.counters[tile.position.tile] = Int32(0)  # for the next call: nobody else counts in this one
        warp, lane = cute.arch.make_warp_uniform(tidx // 32), tidx % 32
        shared = make_shared(start + cute.assume(warp * words, divby=4), shape)
        rows = make_rows(shape)
        for r in cutlass.range_constexpr(shape[2]):
            row = warp + config.warps * r
            number = partial_row(call.mO, *tile.coords(row))
            rows.number[r] = number if tile.holds(row) else Int32(-1)
        merge(call, x, tile.parts, rows, shared, lane)
        for r in cutlass.range_constexpr(shape[2]):
            coords = tile.coords(warp + config.warps * r)
            if rows.number[r] >= 0:
                store(call, rows, r, coords, lane)


@cute.jit
def merge(call: Decode, x: Partial, splits: Int32, rows: Rows, shared: Shared, lane: Int32):
    """O and LSE of the rows, by a warp."""
    rows.O.fill(0.0)
    start_copies(x, splits, rows, shared, Int32(0), lane)
    share_out(call, x, splits, rows, shared.share, lane)
    cute.arch.sync_warp()  # the shares of all lanes are there: each reads all
    first = Int32(0)
    while first < splits:
        cute.arch.cp_async_wait_group(0)  # O is there: of each lane what it reads, and overwrites later
        for r in cutlass.range_constexpr(cute.size(rows.number)):
            if rows.number[r] >= 0:
                part, share = shared.part[None, None, r], shared.share[None, r]
                add_splits(splits, first, part, share, rows.O[None, None, r], lane)
        first += cute.size(shared.part, mode=[1])
        if first < splits:
            start_copies(x, splits, rows, shared, first, lane)


@cute.jit
def start_copies(x: Partial, splits: Int32, rows: Rows, shared: Shared, first: Int32, lane: Int32):
    """O of the splits from `first` on is on its way to shared.part; each lane copies what it will read."""
    op = cpasync.CopyG2SOp(cache_mode=LoadCacheMode.GLOBAL)
    atom = cute.make_copy_atom(op, Float32, num_bits_per_copy=128)
    vector, inside = cute.make_layout(((4, 1),)), cute.make_rmem_tensor(1, Boolean)
    columns, slots, _ = shared.part.shape
    for r in cutlass.range_constexpr(cute.size(rows.number)):
        if rows.number[r] >= 0:
            for i in cutlass.range_constexpr(slots):
                for v in cutlass.range_constexpr(columns // 128):
                    col = 4 * lane + 128 * v
                    inside[0] = first + i < splits and col < x.O.shape[2]
                    gO = cute.local_tile(x.O[first + i, rows.number[r], None], (4,), (col // 4,))
                    sO = cute.local_tile(shared.part[None, i, r], (4,), (col // 4,))
                    source, target = (cute.make_tensor(t.iterator, vector) for t in (gO, sO))
                    cute.copy(atom, source, target, pred=inside)
    cute.arch.cp_async_commit_group()  # the group that `merge` waits for


@cute.jit
def share_out(call: Decode, x: Partial, splits: Int32, rows: Rows, share: cute.Tensor, lane: Int32):
    """share (MAX_SPLITS, rows) <- what each split counts in O; rows.LSE <- the log-sum-exp of all.

    Here a row's sink joins, which no split has counted.
    """
    splits_of_lane = MAX_SPLITS // 32  # lane, lane + 32, ...
    each = cute.make_rmem_tensor((splits_of_lane, cute.size(rows.number)), Float32)
    each.fill(-Float32.inf)
    for r in cutlass.range_constexpr(cute.size(rows.number)):
        for i in cutlass.range_constexpr(splits_of_lane):
            if rows.number[r] >= 0 and lane + 32 * i < splits:
                each[i, r] = x.LSE[lane + 32 * i, rows.number[r]]
    for r in cutlass.range_constexpr(cute.size(rows.number)):
        if rows.number[r] >= 0:
            largest = weigh(each[None, r], NATURAL, lanes=32)
            total = Float32(0.0)
            for i in cutlass.range_constexpr(splits_of_lane):
                total += each[i, r]
            sink = None
            if const_expr(call.sinks is not None):
                sink = call.sinks[rows.number[r] % call.mO.shape[2]]
            total = cute.arch.warp_reduction_sum(total)
            scale, rows.LSE[r] = normalise(largest, total, sink, NATURAL)
            for i in cutlass.range_constexpr(splits_of_lane):
                share[lane + 32 * i, r] = each[i, r] * scale


@cute.jit
def weigh(parts: cute.Tensor, unit: cutlass.Constexpr, lanes: cutlass.Constexpr = 1):
    """parts (n): log-sum-exps or offsets; they become weights relative to the largest, which is returned.

    unit: NATURAL or LOG2. lanes: so many have parts of the same whole.
    """
    largest = parts[0]
    for i in cutlass.range_constexpr(1, cute.size(parts)):
        largest = cute.arch.fmax(largest, parts[i])
    if const_expr(lanes > 1):
        largest = cute.arch.warp_reduction_max(largest, threads_in_group=lanes)
    base = Float32(0.0) if largest == -Float32.inf else largest  # no keys: not -inf - -inf
    for i in cutlass.range_constexpr(cute.size(parts)):
        parts[i] = cute.math.exp2((parts[i] - base) * Float32(unit), fastmath=True)
    return largest


@cute.jit
def normalise(largest: Float32, total: Float32, sink: Float32 | None, unit: cutlass.Constexpr):
    """(1 / total, the log-sum-exp of the whole), from what `weigh` returns and the sum of all weights.

    sink: the row's, in the same unit, or None: it is in the whole.
    """
    if const_expr(sink is not None):
        largest, total, share = with_sink(largest, total, sink, unit)
    scale = Float32(0.0) if total == 0.0 else cute.arch.rcp_approx(total)
    if const_expr(sink is not None):
        scale = scale * share
    lse = largest + cute.math.log2(total, fastmath=True) * Float32(1 / unit)
    return scale, Float32(-Float32.inf) if total == 0.0 else lse


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
def store(call: Decode, rows: Rows, r: cutlass.Constexpr, coords: tuple[Int32, Int32, Int32], lane: Int32):
    """Row r to its (batch, token, head) in o."""
    batch, token, head = coords
    gO = call.mO[batch, token, head, None]  # (d)
    for v in cutlass.range_constexpr(cute.size(rows.O, mode=[1])):
        if 4 * lane + 128 * v < gO.shape[0]:
            out = cute.make_rmem_tensor(4, gO.element_type)
            convert(rows.O[None, v, r], out)
            cute.autovec_copy(out, cute.local_tile(gO, (4,), (lane + 32 * v,)))
    gLSE = cute.domain_offset((token,), call.mLSE[batch, head, None])
    if lane == 0:
        gLSE[0] = rows.LSE[r]


def partial_row(mO: cute.Tensor, batch: Int32, token: Int32, head: Int32) -> Int32:
    """The number of a row of Partial."""
    return (batch * mO.shape[1] + token) * mO.shape[2] + head


def make_rows(shape: tuple[int, int, int]) -> Rows:
    """shape: of Shared.part."""
    columns, _, rows = shape
    O = cute.make_rmem_tensor((4, columns // 128, rows), Float32)
    return Rows(cute.make_rmem_tensor(rows, Int32), O, cute.make_rmem_tensor(rows, Float32))


def shared_words(shape: tuple[int, int, int]) -> int:
    """Float32 that Shared takes; shape: of its `part`."""
    return shape[2] * (shape[0] * shape[1] + MAX_SPLITS)


def make_shared(start: cute.Pointer, shape: tuple[int, int, int]) -> Shared:
    part = cute.make_tensor(start, cute.make_layout(shape))
    share = cute.make_layout((MAX_SPLITS, shape[2]))
    return Shared(part, cute.make_tensor(start + shape[0] * shape[1] * shape[2], share))
