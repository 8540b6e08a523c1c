"""The order in which tiles (query blocks of one head) are worked on."""

from dataclasses import dataclass

import cutlass
import cutlass.cute as cute
from cutlass import Int32, const_expr

from mini_flash_attention.kernels.seqlen import Sizes


@dataclass(frozen=True)
class Schedule:
    """How a persistent kernel hands out its tiles."""

    swath: Int32  # heads walked together: see tile_coords
    # [0]: tiles drawn beyond each thread block's first; [1]: thread blocks that are done
    counter: cute.Pointer


def num_tiles(config, sizes: Sizes) -> Int32:
    return cute.ceil_div(sizes.seqlen_q, config.tile_m) * sizes.heads * sizes.batch


@cute.jit
def tile_coords(config: cutlass.Constexpr, sizes: Sizes, swath: Int32, tile: Int32):
    """tile -> (m_block, head, batch).

    Without a mask all tiles are equally long: the tiles of a head follow each other. With one, `swath`
    heads are walked together, their last (causal: longest) query blocks first, so that the work ends
    on short tiles; a swath is narrow enough for its keys and values to stay in the L2 cache.
    """
    m_blocks = cute.ceil_div(sizes.seqlen_q, config.tile_m)
    m_block, head_batch = tile % m_blocks, tile // m_blocks
    if const_expr(config.mask != "full"):
        s = tile // (swath * m_blocks)
        width = cutlass.min(swath, sizes.heads * sizes.batch - s * swath)
        rest = tile - s * swath * m_blocks
        m_block, head_batch = m_blocks - 1 - rest // width, s * swath + rest % width
    return m_block, head_batch % sizes.heads, head_batch // sizes.heads
