"""The end of a split: its warps' results, merged, become the tile's result or the split's part in it."""

from typing import NamedTuple

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, const_expr

from mini_flash_attention.gpu.config import ELEMENTS
from mini_flash_attention.kernels.calls import Decode
from mini_flash_attention.kernels.decode.combine import LOG2, Partial, normalise, partial_row, weigh
from mini_flash_attention.kernels.decode.division import Tile, Warp
from mini_flash_attention.kernels.parts.fragments import convert, rows_cols
from mini_flash_attention.kernels.parts.scores import LOG2_E
from mini_flash_attention.kernels.parts.softmax import LN_2, OnlineSoftmax


class Exchange(NamedTuple):
    """The results of the warps in shared memory, where the ring was."""

    sO: cute.Tensor  # (tile_m, d, key_warps) float32
    sOffset: cute.Tensor  # (tile_m, key_warps): the softmax's
    sSum: cute.Tensor  # (tile_m, key_warps)


def make(config, sKV: cute.Tensor) -> Exchange:
    rows, row = config.tile_m, config.head_dim + 8  # 8 words more: the rows of a store lie in different banks
    groups = config.key_warps
    start = cute.make_ptr(Float32, sKV.iterator.toint(), cute.AddressSpace.smem, assumed_align=16)
    O = cute.make_layout((rows, config.head_dim, groups), stride=(row, 1, rows * row))
    numbers = cute.make_layout((rows, groups))
    numbers_start = start + rows * row * groups
    offset_and_sum = (cute.make_tensor(numbers_start + i * rows * groups, numbers) for i in range(2))
    return Exchange(cute.make_tensor(start, O), *offset_and_sum)


@cute.jit
def give(x: Exchange, acc_O: cute.Tensor, softmax: OnlineSoftmax, rows: cute.Tensor, warp: Warp):
    """A warp's results go to shared memory; rows (2): of the thread, in the tile."""
    O = rows_cols(acc_O)
    for r in cutlass.range_constexpr(2):
        row, col = rows[r], 2 * (warp.lane % 4)
        total = cute.arch.warp_reduction_sum(softmax.row_sum[r], threads_in_group=4)
        if warp.lane % 4 == 0:
            x.sOffset[row, warp.key_warp] = softmax.offset[r]
            x.sSum[row, warp.key_warp] = total
        for c in cutlass.range_constexpr(0, cute.size(O, mode=[1]), 2):
            pair = cute.local_tile(x.sO[row, None, warp.key_warp], (2,), (col // 2 + 2 * c,))
            values = cute.make_rmem_tensor(2, Float32)
            values[0], values[1] = O[r, c], O[r, c + 1]
            cute.autovec_copy(values, pair)


@cute.jit
def store(config: cutlass.Constexpr, call: Decode, partial: Partial, tile: Tile, x: Exchange, tidx: Int32):
    """Merge the warps' results, normalise, and store 8 columns of a row at a time, with the log-sum-exp."""
    pieces, threads = config.head_dim // ELEMENTS, 32 * config.warps
    for i in cutlass.range_constexpr((config.tile_m * pieces + threads - 1) // threads):
        row, piece = (i * threads + tidx) // pieces, (i * threads + tidx) % pieces
        coords = tile.coords(row)
        if row < config.tile_m and tile.holds(row) and piece * ELEMENTS < call.mO.shape[3]:
            weights = cute.make_rmem_tensor(config.key_warps, Float32)
            O, part = (cute.make_rmem_tensor(ELEMENTS, Float32) for _ in range(2))
            for g in cutlass.range_constexpr(config.key_warps):
                weights[g] = x.sOffset[row, g]
            offset = weigh(weights, LOG2)
            total = Float32(0.0)
            O.fill(0.0)
            for g in cutlass.range_constexpr(config.key_warps):
                total += weights[g] * x.sSum[row, g]
                cute.autovec_copy(cute.local_tile(x.sO[row, None, g], (ELEMENTS,), (piece,)), part)
                for c in cutlass.range_constexpr(ELEMENTS):
                    O[c] += weights[g] * part[c]
            sink = None
            if const_expr(call.sinks is not None):  # of several parts combine.share_out adds it, once
                sink = call.sinks[coords[2]] * Float32(LOG2_E) if tile.alone else -Float32.inf
            scale, lse = normalise(offset, total, sink, LOG2)
            for c in cutlass.range_constexpr(ELEMENTS):
                O[c] = O[c] * scale
            store_piece(call, partial, tile, coords, piece, O, lse * Float32(LN_2))


@cute.jit
def store_piece(
    call: Decode, partial: Partial, tile: Tile, coords: tuple, piece: Int32, O: cute.Tensor, lse: Float32
):
    """8 columns and the log-sum-exp of the row at (batch, token, head): the result, or the split's part."""
    batch, token, head = coords
    if tile.alone:
        out = cute.make_rmem_tensor(ELEMENTS, call.mO.element_type)
        convert(O, out)
        cute.autovec_copy(out, cute.local_tile(call.mO[batch, token, head, None], (ELEMENTS,), (piece,)))
        if piece == 0:
            call.mLSE[batch, head, token] = lse
    else:
        split, row = tile.position.split, partial_row(call.mO, batch, token, head)
        cute.autovec_copy(O, cute.local_tile(partial.O[split, row, None], (ELEMENTS,), (piece,)))
        if piece == 0:
            partial.LSE[split, row] = lse


@cute.jit
def store_nothing(config: cutlass.Constexpr, call: Decode, partial: Partial, tile: Tile, tidx: Int32):
    """A split without keys says so to the combine kernel, which does not read its O then."""
    if tidx < config.tile_m:
        row = partial_row(call.mO, *tile.coords(tidx))
        if tile.holds(tidx):
            partial.LSE[tile.position.split, row] = -Float32.inf
