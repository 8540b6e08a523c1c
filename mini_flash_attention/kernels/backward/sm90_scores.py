"""What the consumers of sm90.py do to S and dP. A tile's rows are keys, its columns queries.

A thread has two rows, 8 apart, and in each of them pairs of columns, 8 apart.
"""

from typing import NamedTuple

import cutlass
import cutlass.cute as cute
from cutlass import Boolean, Float32, Int32, const_expr

from mini_flash_attention.kernels.backward.common import distances, exponentials, factor_of_dS, mask, seed
from mini_flash_attention.kernels.backward.sm90_records import Setup, Shared
from mini_flash_attention.kernels.calls import Backward, Dropout, Score
from mini_flash_attention.kernels.parts.arguments import element_type
from mini_flash_attention.kernels.parts.dropout import keep
from mini_flash_attention.kernels.parts.fragments import convert, rows_cols
from mini_flash_attention.kernels.parts.scores import LOG2_E, transform
from mini_flash_attention.kernels.parts.seqlen import Sizes
from mini_flash_attention.kernels.parts.sm90 import wgmma


class Corner(NamedTuple):
    """Where a thread's part of a tile lies in its sequence."""

    key: Int32  # of its first row
    query: Int32  # of its first column
    masked: Boolean  # some of the tile may not be seen


def corner(config, key: Int32, m_block: Int32, free: tuple[Int32, Int32]) -> Corner:
    """free: the query blocks that see all of the tile's keys (blocks.unmasked_queries)."""
    masked = m_block >= free[1]
    if config.mask != "full":
        masked = masked | (m_block < free[0])
    return Corner(key, m_block * config.tile_m + 2 * (cute.arch.lane_idx() % 4), masked)


class HeadScore(NamedTuple):
    """What becomes of one head's K·Qᵀ in a thread's two rows; see parts/scores.py, parts/dropout.py."""

    score: Score  # in_log2
    dropout: Dropout | None
    slopes: cute.Tensor  # (2): the head's
    batch_head: cute.Tensor  # (1): the head's number in the batch


def make_score(call: Backward, setup: Setup) -> HeadScore:
    of_head = cute.make_rmem_tensor(2, Float32), cute.make_rmem_tensor(1, Int32)
    return HeadScore(setup.score, call.dropout, *of_head)


@cute.jit
def set_head(config: cutlass.Constexpr, sizes: Sizes, x: HeadScore, batch: Int32, head: Int32):
    """The rows are of this head from now on."""
    if const_expr("alibi" in config.score):
        x.slopes.fill(x.score.slopes[batch, head] * Float32(LOG2_E))
    if const_expr(config.dropout):
        x.batch_head[0] = batch * sizes.heads + head


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
    """acc_S <- P, from S. Returns, with a softcap, P times its derivative. stat: -LSE of the columns."""
    acc_F = cute.make_rmem_tensor(acc_S.layout, Float32) if const_expr("softcap" in config.score) else None
    keys = [at.key, at.key + 8]
    distance = distances(sizes, keys, at.query)
    transform(config, x.score, rows_cols(acc_S), x.slopes, distance)
    if at.masked:
        mask(config, sizes, acc_S, keys, at.query)
    if const_expr(config.score == "plain"):
        for i in cutlass.range_constexpr(cute.size(acc_S)):
            acc_S[i] = cute.math.exp2(acc_S[i] * x.score.scale, fastmath=True)
    else:
        exponentials(config, x.score, acc_S, stat, x.slopes, distance, acc_F)
    return acc_F


@cute.jit
def factors(config: cutlass.Constexpr, x: HeadScore, acc_P: cute.Tensor, acc_F, at: Corner):
    """In 16 bits: P, without what is dropped, and what dS takes in its place, negative where dropped."""
    P = cute.make_rmem_tensor(acc_P.layout, element_type(config))
    convert(acc_P, P)
    F = factor_of_dS(config, x.dropout, P, acc_F, [at.key], at.query, x.batch_head[0])
    if const_expr(config.dropout):
        kept = cute.make_rmem_tensor(acc_P.layout, P.element_type)
        keep(P, kept)
        P = kept
    return P, F
