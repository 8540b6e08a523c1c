"""What both forward kernels do with a tile: its scores, mask and dropout, and O at the end.

w: the Work of either kernel. m_block, n_block: which tile of the score matrix w.acc_S is.
"""

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, const_expr

from mini_flash_attention.kernels.calls import Forward
from mini_flash_attention.kernels.parts import dropout, sparse
from mini_flash_attention.kernels.parts.fragments import convert, rescale, rows_cols
from mini_flash_attention.kernels.parts.numbers import LOG2_E, index
from mini_flash_attention.kernels.parts.scheduler import Tile
from mini_flash_attention.kernels.parts.scores import Corner, transform
from mini_flash_attention.kernels.parts.seqlen import Sizes


@cute.jit
def to_scores(
    config: cutlass.Constexpr,
    w,
    sizes: Sizes,
    tile: Tile,
    m_block: Int32,
    n_block: Int32,
    masked: cutlass.Constexpr = True,
):
    """acc_S <- its scores; plain ones differ by a factor only, which the softmax applies.

    masked: as in scores.transform.
    """
    if const_expr(config.score):
        S, rc = rows_cols(w.acc_S), rows_cols(w.coords)
        first = m_block * config.tile_m + rc[0, 0][0]
        rows = tuple(index(first, row_offset(config, r)) for r in range(cute.size(S, mode=[0])))
        column = n_block * config.tile_n + rc[0, 0][1]
        at = Corner(tile.batch, (tile.head,) * len(rows), rows, column, sizes.seqlen_q, sizes.seqlen_k)
        transform(config, w.call.score, S, at, masked=masked)


def row_of(config, tile: Tile) -> sparse.Row:
    """A tile's in the lists of a block mask."""
    return sparse.Row.of_tile(tile.batch, tile.head, tile.m_block, config.tile_m)


def key_block(config, call: Forward, tile: Tile, position: Int32) -> Int32:
    """The number of the key block at a position of the walk: with a block mask from its lists."""
    if not config.sparse:
        return position
    return sparse.tile_at(call.blocks, row_of(config, tile), tile.visits.partial, config.tile_n, position)


def row_offset(config, r: int) -> int:
    """How far a thread's row r lies below its first one: 8, then as many as all warps have."""
    return 8 * r if r < 2 else r % 2 * 8 + r // 2 * 16 * config.warps


@cute.jit
def mask(config: cutlass.Constexpr, w, sizes: Sizes, m_block: Int32, n_block: Int32):
    """acc_S <- -inf where row i may not see key j: beyond seqlen_k, or outside i's window.

    The window lies around the diagonal, j = i + seqlen_k - seqlen_q, which ends at the bottom right.
    """
    S, rc = rows_cols(w.acc_S), rows_cols(w.coords)
    left, right = sizes.window(config.mask)
    start = n_block * config.tile_n + rc[0, 0][1]  # key of this thread's first column
    for r in cutlass.range_constexpr(cute.size(S, mode=[0])):
        diagonal = m_block * config.tile_m + rc[r, 0][0] + sizes.seqlen_k - sizes.seqlen_q
        end = sizes.seqlen_k
        if const_expr(right is not None):
            end = cutlass.min(end, diagonal + right + 1)
        end = end - start
        for c in cutlass.range_constexpr(cute.size(S, mode=[1])):
            S[r, c] = S[r, c] if (c // 2) * 8 + c % 2 < end else -Float32.inf
        if const_expr(left is not None):
            begin = diagonal - left - start
            for c in cutlass.range_constexpr(cute.size(S, mode=[1])):
                S[r, c] = S[r, c] if (c // 2) * 8 + c % 2 >= begin else -Float32.inf


@cute.jit
def drop(config: cutlass.Constexpr, w, P: cute.Tensor, batch_head: Int32, m_block: Int32, n_block: Int32):
    """P (16 bits) <- P without what dropout drops; its sums have been taken."""
    rc = rows_cols(w.coords)
    rows = tuple(m_block * config.tile_m + rc[r, 0][0] for r in range(0, cute.size(rc, mode=[0]), 2))
    dropout.mark(w.call.dropout, P, rows, n_block * config.tile_n + rc[0, 0][1], batch_head)
    dropout.keep(P, P)


def sink_of(call: Forward, head: Int32) -> Float32 | None:
    """The sink of a head's rows in log2 units; None: there are none."""
    return None if call.sinks is None else call.sinks[head] * Float32(LOG2_E)


@cute.jit
def normalise(config: cutlass.Constexpr, w) -> cute.Tensor:
    """O in 16 bits, from acc_O; softmax.finish() has run."""
    if const_expr(config.dropout):
        dropout.rescale_sums(w.call.dropout, w.softmax.row_sum)
    rescale(w.acc_O, w.softmax.row_sum)
    O = cute.make_rmem_tensor(w.acc_O.shape, w.call.mO.element_type)
    convert(w.acc_O, O)
    return O
