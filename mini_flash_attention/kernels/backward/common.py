"""What both backward kernels do to a thread's part of a tile, whose rows are keys, whose columns queries."""

import math

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, const_expr

from mini_flash_attention.kernels.backward.schedule import Block
from mini_flash_attention.kernels.calls import Dropout
from mini_flash_attention.kernels.parts.dropout import mark_transposed
from mini_flash_attention.kernels.parts.fragments import convert, rows_cols, store_rows, store_sequence
from mini_flash_attention.kernels.parts.numbers import LOG2_E
from mini_flash_attention.kernels.parts.seqlen import Sizes


@cute.jit
def seed(acc: cute.Tensor, stat: cute.Tensor):
    """acc[row, col] = stat[col]: the product comes out with the statistic of its query subtracted."""
    X = rows_cols(acc)
    values = cute.make_rmem_tensor(stat.shape, Float32)
    cute.autovec_copy(stat, values)
    for c in cutlass.range_constexpr(cute.size(X, mode=[1])):
        for r in cutlass.range_constexpr(cute.size(X, mode=[0])):
            X[r, c] = values[c]


@cute.jit
def distances(sizes: Sizes, keys: list[Int32], query: Int32) -> cute.Tensor:
    """How far left of each row's diagonal the first column lies. keys: of the rows; query: of the column."""
    out = cute.make_rmem_tensor(len(keys), Int32)
    for r in cutlass.range_constexpr(len(keys)):
        out[r] = keys[r] + sizes.seqlen_q - sizes.seqlen_k - query
    return out


@cute.jit
def mask(
    config: cutlass.Constexpr,
    sizes: Sizes,
    acc: cute.Tensor,
    keys: list[Int32],
    query: Int32,
    hidden: cutlass.Constexpr = -math.inf,
):
    """acc <- hidden where a query may not see a key. keys: of the thread's rows; query: of its first column.

    hidden: -inf for scores, 0 for P. Keys from seqlen_k on are zeros, whose P = exp(-LSE) may be infinite.
    """
    X, diagonals = rows_cols(acc), distances(sizes, keys, query)
    left, right = sizes.window(config.mask)
    for r in cutlass.range_constexpr(cute.size(X, mode=[0])):
        diagonal = diagonals[r]  # the column on which it lies
        begin = Int32(0) if const_expr(right is None) else diagonal - right
        begin = begin if keys[r] < sizes.seqlen_k else Int32(config.tile_m)
        for c in cutlass.range_constexpr(cute.size(X, mode=[1])):
            X[r, c] = X[r, c] if (c // 2) * 8 + c % 2 >= begin else Float32(hidden)
        if const_expr(left is not None):
            for c in cutlass.range_constexpr(cute.size(X, mode=[1])):
                X[r, c] = X[r, c] if (c // 2) * 8 + c % 2 <= diagonal + left else Float32(hidden)


@cute.jit
def exponentials(acc_S: cute.Tensor, stat: cute.Tensor, acc_F: cute.Tensor | None):
    """acc_S <- P, from scores in natural units; acc_F, their derivatives or None, <- P times them.

    stat: -LSE of the thread's columns, in log2 units.
    """
    S, values = rows_cols(acc_S), cute.make_rmem_tensor(stat.shape, Float32)
    cute.autovec_copy(stat, values)
    for c in cutlass.range_constexpr(cute.size(S, mode=[1])):
        for r in cutlass.range_constexpr(cute.size(S, mode=[0])):
            S[r, c] = cute.math.exp2(S[r, c] * Float32(LOG2_E) + values[c], fastmath=True)
            if const_expr(acc_F is not None):
                F = rows_cols(acc_F)
                F[r, c] = F[r, c] * S[r, c]


@cute.jit
def factor_of_dS(
    config: cutlass.Constexpr,
    dropout: Dropout | None,
    P: cute.Tensor,
    acc_F: cute.Tensor | None,
    keys: list[Int32] | None,
    query: Int32,
    batch_head: Int32 | None,
) -> cute.Tensor:
    """What dS takes in the place of P, in 16 bits like P, which becomes negative where dropped.

    Other factors may be negative themselves: their last bit says what is dropped.
    acc_F: see exponentials. keys: of the thread's first row of every 16; query: of its first
    column. The rest as in dropout.mark.
    """
    F = P
    if const_expr(config.dropout):
        mark_transposed(dropout, P, keys, query, batch_head)
    if const_expr(acc_F is not None):
        F = cute.make_rmem_tensor(P.shape, P.element_type)
        convert(acc_F, F)
        if const_expr(config.dropout):
            marked, pairs = cute.recast_tensor(P, Int32), cute.recast_tensor(F, Int32)
            for i in cutlass.range_constexpr(cute.size(pairs)):
                pairs[i] = with_last_bits(pairs[i], marked[i] >> 15)
    return F


@cute.jit
def with_last_bits(pair: Int32, bits: Int32) -> Int32:
    """Two 16-bit floats whose last bits are bits 0 and 16 of `bits`; 0 stays 0.

    Where a last bit is another one, the next float takes its place, on the side that the bit before it says:
    so the mean error is 0, and nothing is carried from one half to the other.
    """
    nonzero = (pair & Int32(0x7FFF7FFF)) + Int32(0x7FFF7FFF) >> 15
    off = (pair ^ bits) & nonzero & Int32(0x00010001)
    return pair + off - 2 * (off & pair >> 1)


@cute.jit
def finish_dS(
    config: cutlass.Constexpr, dropout: Dropout | None, acc_dP: cute.Tensor, F: cute.Tensor, stat: cute.Tensor
):
    """acc_dP <- dS. F: P or what takes its place, in 16 bits, marked by factor_of_dS; stat: -delta.

    Without dropout delta has been subtracted from dP.
    """
    if const_expr(config.dropout):
        dP, f, bits = rows_cols(acc_dP), rows_cols(F), rows_cols(cute.recast_tensor(F, cutlass.Int16))
        values = cute.make_rmem_tensor(stat.shape, Float32)
        cute.autovec_copy(stat, values)
        for c in cutlass.range_constexpr(cute.size(dP, mode=[1])):
            for r in cutlass.range_constexpr(cute.size(dP, mode=[0])):
                factor = f[r, c].to(Float32)
                kept = dP[r, c] * dropout.rescale + values[c]
                if const_expr(config.score.factored):
                    dP[r, c] = factor * (kept if bits[r, c] & 1 == 0 else values[c])
                else:
                    dP[r, c] = factor * kept if factor >= 0.0 else -factor * values[c]
    else:
        factor = widen(F)
        for i in cutlass.range_constexpr(cute.size(acc_dP)):
            acc_dP[i] = acc_dP[i] * factor[i]


@cute.jit
def widen(X: cute.Tensor) -> cute.Tensor:
    """X in float32. By hand for bfloat16, whose odd elements take the compiler two instructions."""
    out = cute.make_rmem_tensor(X.layout, Float32)
    if const_expr(X.element_type is cutlass.BFloat16):
        pairs, bits = cute.recast_tensor(X, Int32), cute.recast_tensor(out, Int32)
        for i in cutlass.range_constexpr(cute.size(pairs)):
            bits[2 * i], bits[2 * i + 1] = pairs[i] << 16, pairs[i] & Int32(-65536)
    else:
        out.store(X.load().to(Float32))
    return out


@cute.jit
def store(
    config: cutlass.Constexpr, block: Block, acc: cute.Tensor, mX: cute.Tensor, keys: list[Int32], lane: Int32
):
    """A thread's part of dK or dV to mX (b, sk, hk, d): the rows that are the sequence's. keys: its rows."""
    out, rows = cute.make_rmem_tensor(acc.layout, mX.element_type), cute.make_rmem_tensor(len(keys), Int32)
    convert(acc, out)
    for r in cutlass.range_constexpr(len(keys)):
        rows[r] = keys[r]
    batch, start = block.k_rows
    gX = mX[batch, None, block.head_kv, None]  # (sk, d)
    if const_expr(config.ragged):  # the next sequence's rows follow
        store_sequence(out, gX, rows, start, block.sequence.room, lane)
    else:
        store_rows(out, gX, rows, lane)
