"""Walks over the blocks of a block mask (../../block_mask.py), in the place of the ranges in blocks.py.

A tile of queries (in the backward pass: of keys) visits tiles of keys (of queries) by position: first come
those of its partial blocks, then those of full ones. A block has 128 rows, or as many tiles as fit.
"""

from typing import NamedTuple

import cutlass
import cutlass.cute as cute
from cutlass import Int32

from mini_flash_attention.kernels.calls import Blocks
from mini_flash_attention.kernels.parts.blocks import Walk

BLOCK = 128


class Visits(NamedTuple):
    """What one tile visits: positions [0, partial) need the mask, [partial, end) do not."""

    partial: Int32
    end: Int32


class Row(NamedTuple):
    """A tile's row of the lists."""

    batch: Int32
    head: Int32
    block: Int32

    @staticmethod
    def of_tile(batch: Int32, head: Int32, number: Int32, tile: int) -> "Row":
        return Row(batch, head, number * tile // BLOCK)


@cute.jit
def visits(blocks: Blocks, row: Row, tile: cutlass.Constexpr) -> Visits:
    """tile: rows of the tiles that are visited."""
    partial, full = blocks.partial[row], blocks.full[row]
    tiles = BLOCK // tile
    return Visits(partial * tiles, (partial + full) * tiles)


@cute.jit
def keys_of(x: Visits, seqlen_k: Int32) -> Int32:
    """How many keys count: where nothing is to be visited, one tile is all the same, and shows none."""
    return seqlen_k if x.end > 0 else Int32(0)


@cute.jit
def walk(x: Visits) -> Walk:
    """That of the forward pass, from the last position to the first; where there are none, of one."""
    free_end = x.end if x.end > x.partial else Int32(0)
    return Walk(cutlass.max(x.end - 1, 0), free_end, x.partial, Int32(0))


@cute.jit
def tile_at(blocks: Blocks, row: Row, partial: Int32, tile: cutlass.Constexpr, position: Int32) -> Int32:
    """The number of the tile at a position. partial: as in Visits."""
    tiles = BLOCK // tile
    i, first = position // tiles, partial // tiles
    block = Int32(0)
    if i < first:  # noqa: SIM108, the address of either is read only where it is meant
        block = blocks.partial_indices[(*row, i)]
    else:
        block = blocks.full_indices[(*row, i - first)]
    return block * tiles + position % tiles
