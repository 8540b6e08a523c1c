"""The order in which tiles (query blocks of one head) are worked on."""

from dataclasses import dataclass
from typing import NamedTuple

import cutlass
import cutlass.cute as cute
from cutlass import Boolean, Int32, const_expr

from mini_flash_attention.kernels.calls import CU_SEQLENS_Q, Ragged
from mini_flash_attention.kernels.parts.seqlen import Keys, Queries, Sizes, keys, queries


@dataclass(frozen=True)
class Schedule:
    """How a persistent kernel hands out its tiles."""

    swath: Int32  # heads walked together: see tile_coords
    # [0]: tiles drawn beyond each thread block's first; [1]: thread blocks that are done
    counter: cute.Pointer


class Place(NamedTuple):
    """How far a walk over a ragged batch has come: one of its sequences."""

    batch: Int32  # sizes.batch after the last one
    first: Int32  # the number of its first tile
    end: Int32  # and of the next sequence's


class Tile(NamedTuple):
    m_block: Int32
    head: Int32
    batch: Int32  # the sequence
    q: Queries | None = None  # ragged batches only
    k: Keys | None = None

    def sizes(self, sizes: Sizes) -> Sizes:
        """The sizes of the tile's sequence."""
        return sizes if self.q is None else sizes.of(self.q.seqlen, self.k.seqlen)

    @property
    def q_rows(self) -> tuple[Int32, Int32]:
        """(index into q's first mode, first row) of the tile's sequence."""
        return (self.batch, Int32(0)) if self.q is None else (self.q.batch, self.q.start)

    @property
    def k_rows(self) -> tuple[Int32, Int32]:
        return (self.batch, Int32(0)) if self.k is None else (self.k.batch, self.k.start)


def uniform(tile: Tile) -> Tile:
    """The same: said for the compiler, which keeps what follows in uniform registers."""
    same = cute.arch.make_warp_uniform
    numbers = (same(x) for x in tile[:3])
    q, k = (x and type(x)(*map(same, x)) for x in tile[3:])
    return Tile(*numbers, q, k)


@cute.jit
def num_tiles(config: cutlass.Constexpr, sizes: Sizes, ragged: Ragged | None) -> Int32:
    """At least as many tiles as there are; exact unless q is packed."""
    m_blocks = cute.ceil_div(sizes.seqlen_q, config.tile_m) * sizes.batch
    if const_expr(ragged is not None):
        if ragged.given & CU_SEQLENS_Q:  # each sequence may end on a short tile
            m_blocks = sizes.seqlen_q // config.tile_m + cutlass.min(sizes.batch, sizes.seqlen_q)
    return m_blocks * sizes.heads


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


def start_of_walk(ragged: Ragged | None) -> Place | None:
    return None if ragged is None else Place(Int32(0), Int32(0), Int32(0))


@cute.jit
def seek(
    config: cutlass.Constexpr, sizes: Sizes, ragged: Ragged | None, place: Place | None, tile: Int32
) -> Place | None:
    """From `place`, on to the sequence that holds a tile, looking at 32 sequences at a time. By a warp."""
    if const_expr(ragged is not None):
        batch, first, end = place
        lane = cute.arch.lane_idx()
        while (tile >= end) & (batch < sizes.batch):
            tiles = Int32(0)
            if batch + lane < sizes.batch:
                tiles = tiles_of(config, sizes, queries(ragged, batch + lane, sizes.seqlen_q).seqlen)
            ends = first + prefix_sum(tiles, lane)
            passed = cute.arch.popc(cute.arch.vote_ballot_sync(ends <= tile))
            batch += passed
            if passed > 0:
                first = cute.arch.shuffle_sync(ends, passed - 1)
            end = cute.arch.shuffle_sync(ends, cutlass.min(passed, 31))
        place = Place(batch, first, end)
    return place


def tiles_of(config, sizes: Sizes, seqlen_q: Int32) -> Int32:
    return cute.ceil_div(seqlen_q, config.tile_m) * sizes.heads


@cute.jit
def prefix_sum(x: Int32, lane: Int32) -> Int32:
    """The sum of x over the lanes up to this one."""
    for shift in (1, 2, 4, 8, 16):
        below = cute.arch.shuffle_sync_up(x, shift, mask_and_clamp=0)
        x = x + below if lane >= shift else x
    return x


@cute.jit
def is_tile(
    config: cutlass.Constexpr, sizes: Sizes, ragged: Ragged | None, place: Place | None, tile: Int32
) -> Boolean:
    """Whether there is a tile of this number; place: its sequence."""
    return tile < num_tiles(config, sizes, ragged) if const_expr(place is None) else place.batch < sizes.batch


@cute.jit
def tile_at(
    config: cutlass.Constexpr,
    sizes: Sizes,
    swath: Int32,
    ragged: Ragged | None,
    place: Place | None,
    tile: Int32,
) -> Tile:
    """The tile of this number; place: its sequence."""
    if const_expr(ragged is None):
        return Tile(*tile_coords(config, sizes, swath, tile))
    q = queries(ragged, place.batch, sizes.seqlen_q)
    k = keys(ragged, place.batch, sizes.seqlen_k)
    m_block, head, _ = tile_coords(config, sizes.of(q.seqlen, k.seqlen), swath, tile - place.first)
    return Tile(m_block, head, place.batch, q, k)
