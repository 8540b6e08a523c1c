"""Backward pass: from scores to P, from dP to dS. A tile's rows are keys, its columns queries."""

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, const_expr

from mini_flash_attention.kernels.calls import Dropout, Score
from mini_flash_attention.kernels.parts.dropout import SIGNS
from mini_flash_attention.kernels.parts.fragments import rows_cols
from mini_flash_attention.kernels.parts.scores import derivative


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
def exponentials(
    config: cutlass.Constexpr,
    score: Score,
    acc_S: cute.Tensor,
    stat: cute.Tensor,
    slopes: cute.Tensor,
    distances: cute.Tensor,
    acc_F: cute.Tensor | None,
):
    """acc_S <- P, from scores that are not plain; with a softcap, acc_F <- P times its derivative.

    score: in_log2. stat: -LSE of the thread's columns, in log2 units. slopes, distances: scores.transform's.
    """
    S, values = rows_cols(acc_S), cute.make_rmem_tensor(stat.shape, Float32)
    cute.autovec_copy(stat, values)
    for c in cutlass.range_constexpr(cute.size(S, mode=[1])):
        for r in cutlass.range_constexpr(cute.size(S, mode=[0])):
            P = cute.math.exp2(S[r, c] + values[c], fastmath=True)
            if const_expr("softcap" in config.score):
                bias = Float32(0.0)
                if const_expr("alibi" in config.score):
                    distance = Float32(distances[r]) - Float32((c // 2) * 8 + c % 2)
                    bias = slopes[r] * cute.arch.fmax(distance, -distance)
                rows_cols(acc_F)[r, c] = P * derivative(score, S[r, c], bias)
            S[r, c] = P


@cute.jit
def copy_marks(P: cute.Tensor, F: cute.Tensor):
    """F <- -F where P is negative; in pairs."""
    marked, pairs = cute.recast_tensor(P, Int32), cute.recast_tensor(F, Int32)
    for i in cutlass.range_constexpr(cute.size(pairs)):
        pairs[i] = pairs[i] | marked[i] & Int32(SIGNS)


@cute.jit
def finish_dS(
    config: cutlass.Constexpr, dropout: Dropout | None, acc_dP: cute.Tensor, F: cute.Tensor, stat: cute.Tensor
):
    """acc_dP <- dS. F: P or what takes its place, in 16 bits, negative where dropped; stat: -delta.

    Without dropout delta has been subtracted from dP.
    """
    if const_expr(config.dropout):
        dP, f = rows_cols(acc_dP), rows_cols(F)
        values = cute.make_rmem_tensor(stat.shape, Float32)
        cute.autovec_copy(stat, values)
        for c in cutlass.range_constexpr(cute.size(dP, mode=[1])):
            for r in cutlass.range_constexpr(cute.size(dP, mode=[0])):
                factor = f[r, c].to(Float32)
                kept = dP[r, c] * dropout.rescale + values[c]
                dP[r, c] = factor * kept if factor >= 0.0 else -factor * values[c]
    else:
        acc_dP.store(F.load().to(Float32) * acc_dP.load())
