"""What the consumers of sm90.py do to S and dP. A tile's rows are keys, its columns queries.

A thread has two rows, 8 apart, and in each of them pairs of columns, 8 apart.
"""

from typing import NamedTuple

import cutlass
import cutlass.cute as cute
from cutlass import Boolean, Float32, Int32, const_expr

from mini_flash_attention.kernels.backward.common import exponentials, factor_of_dS, mask, seed
from mini_flash_attention.kernels.backward.sm90_records import Setup, Shared
from mini_flash_attention.kernels.calls import Backward, Dropout, Score
from mini_flash_attention.kernels.parts import scores
from mini_flash_attention.kernels.parts.arguments import element_type
from mini_flash_attention.kernels.parts.dropout import keep
from mini_flash_attention.kernels.parts.fragments import convert, rows_cols
from mini_flash_attention.kernels.parts.numbers import index
from mini_flash_attention.kernels.parts.seqlen import Sizes
from mini_flash_attention.kernels.parts.sm90 import wgmma


class Corner(NamedTuple):
    """Where a thread's part of a tile lies in its sequence."""

    key: Int32  # of its first row
    query: Int32  # of its first column
    masked: Boolean  # some of the tile may not be seen


def corner(config, key: Int32, m_block: Int32, free: tuple[Int32, Int32], partial: Boolean) -> Corner:
    """free: the query blocks that see all of the tile's keys (blocks.unmasked_queries).

    partial: with a block mask, whether that may hide some of the tile.
    """
    masked = partial if config.sparse else m_block >= free[1]
    if config.mask != "full":
        masked = masked | (m_block < free[0])
    return Corner(key, m_block * config.tile_m + 2 * (cute.arch.lane_idx() % 4), masked)


class HeadScore(NamedTuple):
    """What becomes of one head's K·Qᵀ in a thread's two rows; see parts/scores.py, parts/dropout.py."""

    scale_log2: Float32  # of plain scores
    score: Score
    dropout: Dropout | None
    place: cute.Tensor  # (2) int32: of the sequence in the batch, of the head


def make_score(call: Backward, setup: Setup) -> HeadScore:
    return HeadScore(setup.scale_log2, call.score, call.dropout, cute.make_rmem_tensor(2, Int32))


@cute.jit
def set_head(x: HeadScore, batch: Int32, head: Int32):
    """The rows are of this head from now on."""
    x.place[0], x.place[1] = batch, head


def thread_stats(config, s: Shared) -> cute.Tensor:
    """This thread's columns of sStats: ((2, tile_m / 8), 2, stages)."""
    shape, m = ((2, config.tile_m // 8), 2, config.stages), config.tile_m
    first = s.sStats.iterator + 2 * (cute.arch.lane_idx() % 4)
    return cute.make_tensor(first, cute.make_layout(shape, stride=((1, 8), m, 2 * m)))


@cute.jit
def issue(mma: cute.TiledMma, acc: cute.Tensor, a: cute.Tensor, b: cute.Tensor, stat: cute.Tensor, seeded):
    """acc = A·B, S or dP; seeded: less what stat says, for each column, of LSE or delta."""
    if const_expr(seeded):
        seed(acc, stat)
    wgmma(mma, acc, a, b, seeded)


@cute.jit
def probabilities(
    config: cutlass.Constexpr, sizes: Sizes, x: HeadScore, acc_S: cute.Tensor, stat: cute.Tensor, at: Corner
):
    """acc_S <- P, from S. Returns P times the derivative, if scores differ in that. stat: -LSE of columns."""
    acc_F = cute.make_rmem_tensor(acc_S.layout, Float32) if const_expr(config.score.factored) else None
    keys = [at.key, at.key + 8]
    if const_expr(not config.score):
        if at.masked:
            mask(config, sizes, acc_S, keys, at.query)
        for i in cutlass.range_constexpr(cute.size(acc_S)):
            acc_S[i] = cute.math.exp2(acc_S[i] * x.scale_log2, fastmath=True)
    elif const_expr(not (config.sparse and config.score.masked)) or at.masked:
        transformed(config, sizes, x, acc_S, acc_F, stat, at, True)
    else:
        transformed(config, sizes, x, acc_S, acc_F, stat, at, False)
    if const_expr(config.score):
        if at.masked:
            mask(config, sizes, acc_S, keys, at.query, 0.0)
            if const_expr(acc_F is not None):
                mask(config, sizes, acc_F, keys, at.query, 0.0)
    return acc_F


@cute.jit
def transformed(
    config: cutlass.Constexpr,
    sizes: Sizes,
    x: HeadScore,
    acc_S: cute.Tensor,
    acc_F: cute.Tensor | None,
    stat: cute.Tensor,
    at: Corner,
    masked: cutlass.Constexpr,
):
    """acc_S <- P, acc_F <- P times the score's derivative, by the functions; before the window."""
    rows, lengths = (index(at.key), index(at.key, 8)), (sizes.seqlen_q, sizes.seqlen_k)
    batch, head = x.place[0], x.place[1]
    F = rows_cols(acc_F) if const_expr(acc_F is not None) else None
    place = scores.Corner(batch, (head, head), rows, at.query, *lengths, transposed=True)
    scores.transform(config, x.score, rows_cols(acc_S), place, F, masked)
    exponentials(acc_S, stat, acc_F)


@cute.jit
def factors(config: cutlass.Constexpr, sizes: Sizes, x: HeadScore, acc_P: cute.Tensor, acc_F, at: Corner):
    """In 16 bits: P, without what is dropped, and what dS takes in its place, marked by factor_of_dS."""
    P = cute.make_rmem_tensor(acc_P.layout, element_type(config))
    convert(acc_P, P)
    batch_head = x.place[0] * sizes.heads + x.place[1]
    F = factor_of_dS(config, x.dropout, P, acc_F, [at.key], at.query, batch_head)
    if const_expr(config.dropout):
        kept = cute.make_rmem_tensor(acc_P.layout, P.element_type)
        keep(P, kept)
        P = kept
    return P, F
