"""What sm80.py does to S: from scores to P, and to what dS takes in its place.

Registers are full: what is cheap is worked out anew where it is used, behind `opaque`, and P is made 16
queries at a time.
"""

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, const_expr

from mini_flash_attention.kernels.backward.common import exponentials, factor_of_dS, mask, seed
from mini_flash_attention.kernels.backward.sm80_records import ZEROS, Place, Work, side_of
from mini_flash_attention.kernels.parts.blocks import unmasked_queries
from mini_flash_attention.kernels.parts.dropout import keep
from mini_flash_attention.kernels.parts.fragments import as_operand_A, convert, rows_cols, slice_of
from mini_flash_attention.kernels.parts.numbers import index
from mini_flash_attention.kernels.parts.scores import Corner, transform
from mini_flash_attention.kernels.parts.sm80 import Operand, destination, opaque, put


@cute.jit
def seed_or_clear(config: cutlass.Constexpr, w: Work, at: Int32):
    """acc_S <- the statistic of each query, so that S or dP comes out less it; 0 if that is too early.

    A score function comes before S - LSE, dropout before dP - delta.
    """
    too_early = bool(config.score), config.dropout  # for S, for dP
    if const_expr(all(too_early)):
        w.acc_S.fill(0.0)
    else:
        if const_expr(any(too_early)):
            at = Int32(ZEROS) if side_of(at) == too_early.index(True) else at
        seed(w.acc_S, columns(w.smem.stats[None, at], opaque(w.tidx) % 32, 0, config.tile_m))


def columns(sStat: cute.Tensor, lane: Int32, first: int, count: int) -> cute.Tensor:
    """A statistic of a thread's columns, among `count` of the tile from `first` on: (2, count / 8)."""
    layout = cute.make_layout((2, count // 8), stride=(1, 8))
    return cute.make_tensor(sStat.iterator + first + 2 * (lane % 4), layout)


@cute.jit
def probabilities(config: cutlass.Constexpr, w: Work, x: Place, at: Int32, p: Operand):
    """w.P <- P, from S, for dV; for dS, P or its factor goes to shared memory."""
    bounds = w.sizes().for_blocks(config)
    free_first, free_last = unmasked_queries(w.smem.find_block().n_block, *bounds)
    masked = x.m_block < free_first or x.m_block >= free_last
    if const_expr(not config.score):
        if masked:
            query = x.m_block * config.tile_m + w.coords(config)[0, 0][1]
            mask(config, w.sizes(), w.acc_S, w.keys(config), query)
    acc_S, lane = as_operand_A(w.acc_S), opaque(w.tidx) % 32
    place = destination(w.setup.mma, p, w.in_side(config))
    for k in cutlass.range_constexpr(cute.size(w.P, mode=[2])):
        S, P, acc_F = slice_of(acc_S, k), slice_of(w.P, k), None
        query = opaque(x.m_block) * config.tile_m + 16 * k
        query += w.coords(config)[0, 0][1]  # the thread's first column
        if const_expr(config.score.factored):
            acc_F = cute.make_rmem_tensor(P.shape, Float32)
        if const_expr(not config.score):
            for i in cutlass.range_constexpr(cute.size(S)):
                S[i] = cute.math.exp2(S[i] * w.setup.scale_log2, fastmath=True)
        else:
            scores_of(config, w, x, S, acc_F, query)
            exponentials(S, columns(w.smem.stats[None, at], lane, 16 * k, 16), acc_F)
            if masked:
                mask(config, w.sizes(), S, w.keys(config), query, 0.0)
                if const_expr(acc_F is not None):
                    mask(config, w.sizes(), acc_F, w.keys(config), query, 0.0)
        convert(S, P)
        keys, batch_head = None, None
        if const_expr(config.dropout):
            keys = w.keys(config)[::2]
            batch_head = w.smem.find_block().batch * w.setup.sizes.heads + x.head(w)
        put(place, factor_of_dS(config, w.call.dropout, P, acc_F, keys, query, batch_head), k)
        if const_expr(config.dropout):
            keep(P, P)


@cute.jit
def scores_of(
    config: cutlass.Constexpr, w: Work, x: Place, S: cute.Tensor, acc_F: cute.Tensor | None, query: Int32
):
    """S <- scores, of 16 queries; acc_F <- their derivatives. query: of the first column."""
    key = w.keys(config)[0]
    rows = tuple(index(key, row_offset(config, r)) for r in range(cute.size(rows_cols(S), mode=[0])))
    batch, head, sizes = w.smem.find_block().batch, x.head(w), w.sizes()
    lengths = sizes.seqlen_q, sizes.seqlen_k
    at = Corner(batch, (head,) * len(rows), rows, query, *lengths, transposed=True)
    transform(config, w.call.score, rows_cols(S), at, None if acc_F is None else rows_cols(acc_F))


def row_offset(config, r: int) -> int:
    """How far a thread's row r lies below its first one: 8, then as many as the warps of a side have."""
    return r % 2 * 8 + r // 2 * 8 * config.warps
