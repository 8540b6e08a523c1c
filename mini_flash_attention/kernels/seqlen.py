"""The numbers of one call, as the kernels take them."""

from dataclasses import dataclass

from cutlass import Int32

from mini_flash_attention.kernels.blocks import walk


@dataclass(frozen=True)
class Sizes:
    seqlen_q: Int32
    seqlen_k: Int32
    heads: Int32
    batch: Int32
    group: Int32  # query heads for each key and value head
    window_left: Int32  # read only where the mask kind limits that side
    window_right: Int32

    def window(self, mask: str) -> tuple[Int32 | None, Int32 | None]:
        """(left, right) for blocks.py and mask.py; None where the mask kind has no limit."""
        left = self.window_left if mask == "window" else None
        right = self.window_right if mask != "full" else None
        return left, right

    def walk(self, config, m_block: Int32) -> tuple[Int32, Int32, Int32, Int32]:
        """blocks.walk of query block m_block: (start, free_end, free_first, first)."""
        tile, window = (config.tile_m, config.tile_n), self.window(config.mask)
        return walk(m_block, *tile, self.seqlen_q, self.seqlen_k, *window)
