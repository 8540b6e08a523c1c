"""The mask: a window around the diagonal, and the end of the keys."""

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, const_expr

from mini_flash_attention.kernels.parts.fragments import rows_cols
from mini_flash_attention.kernels.parts.seqlen import Sizes


@cute.jit
def mask(
    config: cutlass.Constexpr,
    sizes: Sizes,
    acc_S: cute.Tensor,
    coords: cute.Tensor,
    m_block: Int32,
    n_block: Int32,
):
    """acc_S <- -inf where row i may not see key j: beyond seqlen_k, or outside i's window.

    coords: acc_S's (row, column) in the tile. The window lies around the diagonal, j = i + seqlen_k -
    seqlen_q, which ends at the bottom right.
    """
    S, rc = rows_cols(acc_S), rows_cols(coords)
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
