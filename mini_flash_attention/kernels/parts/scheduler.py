"""The order in which tiles (query blocks of one head) are worked on."""

from typing import NamedTuple

import cutlass
import cutlass.cute as cute
from cutlass import Boolean, Int32, const_expr

from mini_flash_attention.kernels.calls import CU_SEQLENS_Q, Forward
from mini_flash_attention.kernels.parts.blocks import in_swaths
from mini_flash_attention.kernels.parts.seqlen import Keys, Queries, Sizes, keys, queries
from mini_flash_attention.kernels.parts.sparse import Visits


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
    visits: Visits | None = None  # with a block mask, once the producer has looked it up

    def sizes(self, sizes: Sizes) -> Sizes:
        """The sizes of the tile's sequence."""
        return sizes if self.q is None else sizes.of(self.q.seqlen, self.k.seqlen)

    @property
    def q_rows(self) -> tuple[Int32, Int32]:
        """Where the sequence's queries begin: (index into q's first mode, first row)."""
        return (self.batch, Int32(0)) if self.q is None else (self.q.batch, self.q.start)

    @property
    def k_rows(self) -> tuple[Int32, Int32]:
        """Where its keys begin: (index into k's first mode or row of the block table, first row)."""
        return (self.batch, Int32(0)) if self.k is None else (self.k.batch, self.k.start)


def uniform(tile: Tile) -> Tile:
    """`tile`, equal in all lanes: said for the compiler, which keeps what follows in uniform registers."""
    same = cute.arch.make_warp_uniform
    numbers = (same(x) for x in tile[:3])
    q, k = (x and type(x)(*map(same, x)) for x in tile[3:5])
    return Tile(*numbers, q, k)


@cute.jit
def num_tiles(config: cutlass.Constexpr, call: Forward, sizes: Sizes) -> Int32:
    """At least as many tiles as there are; exact unless q is packed."""
    m_blocks = cute.ceil_div(sizes.seqlen_q, config.tile_m) * sizes.batch
    if const_expr(call.ragged is not None):
        if call.ragged.given & CU_SEQLENS_Q:  # each sequence may end on a short tile
            m_blocks = sizes.seqlen_q // config.tile_m + cutlass.min(sizes.batch, sizes.seqlen_q)
    return m_blocks * sizes.heads


@cute.jit
def tile_coords(config: cutlass.Constexpr, sizes: Sizes, swath: Int32, number: Int32):
    """The number of a tile -> (m_block, head, batch).

    Without a mask all tiles are equally long: the tiles of a head follow each other. With one, `swath`
    heads are walked together, their last (causal: longest) query blocks first, so that the work ends
    on short tiles; a swath is narrow enough for its keys and values to stay in the L2 cache.
    """
    m_blocks = cute.ceil_div(sizes.seqlen_q, config.tile_m)
    m_block, head_batch = number % m_blocks, number // m_blocks
    if const_expr(config.mask != "full"):
        from_last, head_batch = in_swaths(number, m_blocks, sizes.heads * sizes.batch, swath)
        m_block = m_blocks - 1 - from_last
    return m_block, head_batch % sizes.heads, head_batch // sizes.heads


@cute.jit
def seek(
    config: cutlass.Constexpr, call: Forward, sizes: Sizes, number: Int32, place: Place | None = None
) -> Place | None:
    """From `place` (None: the start), on to the sequence that holds a tile. By a warp.

    It looks at 32 sequences at a time. None if the batch is dense.
    """
    if const_expr(call.ragged is not None):
        batch, first, end = place if const_expr(place is not None) else (Int32(0), Int32(0), Int32(0))
        lane = cute.arch.lane_idx()
        while (number >= end) & (batch < sizes.batch):
            tiles = Int32(0)
            if batch + lane < sizes.batch:
                seqlen_q = queries(call.ragged, batch + lane, sizes.seqlen_q).seqlen
                tiles = cute.ceil_div(seqlen_q, config.tile_m) * sizes.heads
            ends = first + prefix_sum(tiles, lane)
            passed = cute.arch.popc(cute.arch.vote_ballot_sync(ends <= number))
            batch += passed
            if passed > 0:
                first = cute.arch.shuffle_sync(ends, passed - 1)
            end = cute.arch.shuffle_sync(ends, cutlass.min(passed, 31))
        place = Place(batch, first, end)
    return place


@cute.jit
def prefix_sum(x: Int32, lane: Int32) -> Int32:
    """The sum of x over the lanes up to this one."""
    for shift in (1, 2, 4, 8, 16):
        below = cute.arch.shuffle_sync_up(x, shift, mask_and_clamp=0)
        x = x + below if lane >= shift else x
    return x


@cute.jit
def is_tile(
    config: cutlass.Constexpr, call: Forward, sizes: Sizes, number: Int32, place: Place | None
) -> Boolean:
    """Whether there is a tile of this number; place: as `seek` found it."""
    return number < num_tiles(config, call, sizes) if const_expr(place is None) else place.batch < sizes.batch


@cute.jit
def tile_at(
    config: cutlass.Constexpr, call: Forward, sizes: Sizes, number: Int32, place: Place | None
) -> Tile:
    """The tile of this number; place: as `seek` found it."""
    if const_expr(call.ragged is None):
        return Tile(*tile_coords(config, sizes, call.swath, number))
    q = queries(call.ragged, place.batch, sizes.seqlen_q)
    k = keys(call.ragged, place.batch, sizes.seqlen_k)
    m_block, head, _ = tile_coords(config, sizes.of(q.seqlen, k.seqlen), call.swath, number - place.first)
    return Tile(m_block, head, place.batch, q, k)
