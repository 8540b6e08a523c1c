"""The producer warp of sm90.py: it draws tiles, tells the consumers, and loads Q, K and V.

`it` counts key blocks and `t` tiles so far: they number the uses of the rings.
"""

from typing import NamedTuple

import cutlass
import cutlass.cute as cute
from cutlass import Boolean, Int32, const_expr
from cutlass.block import block_copy

from mini_flash_attention.kernels.calls import CU_SEQLENS_Q, Forward, Ragged
from mini_flash_attention.kernels.forward.common import key_block, row_of
from mini_flash_attention.kernels.forward.sm90_records import Setup, Shared
from mini_flash_attention.kernels.parts import sparse
from mini_flash_attention.kernels.parts.blocks import Walk
from mini_flash_attention.kernels.parts.scheduler import Place, Tile, is_tile, num_tiles, seek, tile_at
from mini_flash_attention.kernels.parts.seqlen import Keys, Queries, Sizes
from mini_flash_attention.kernels.parts.sm90 import Ring, Tma, expect, load, release


class Channel(NamedTuple):
    """How tiles of Q, or blocks of K or V, come to shared memory."""

    tma: Tma
    sX: cute.Tensor  # (rows, d, stages)
    ring: Ring


class Pieces(NamedTuple):
    """Where the pieces of one block of keys lie, each in one page: lane p knows that of piece p."""

    page: Int32
    row: Int32  # its first row in the page


@cute.jit
def produce(config: cutlass.Constexpr, call: Forward, setup: Setup, s: Shared):
    """All tiles of this thread block: the first has its number, further ones are drawn from a counter.

    K[start] and Q come first, then K a block ahead of V, which is how the consumers need them.
    """
    sizes, Q = setup.sizes, Channel(setup.q, s.sQ, s.q_ring)
    K, V = Channel(setup.k, s.sK, s.k_ring), Channel(setup.v, s.sV, s.v_ring)
    lane = cute.arch.lane_idx()
    grid, _, _ = cute.arch.grid_dim()
    number, _, _ = cute.arch.block_idx()
    total = num_tiles(config, call, sizes)
    place = seek(config, call, sizes, number)
    it, t = Int32(0), Int32(0)
    has_Q = Boolean(False)  # this tile's Q is on its way
    while is_tile(config, call, sizes, number, place):
        tile = tile_at(config, call, sizes, number, place)
        if const_expr(config.sparse):
            tile = tile._replace(visits=sparse.visits(call.blocks, row_of(config, tile), config.tile_n))
        drawn = Int32(0)
        s.t_ring.wait_empty(t)  # all consumer warps have read what this slot of sTile said two tiles ago
        if lane == 0:
            announce(s, t, tile)
            if total > grid:  # else each thread block has one tile, and there is no counter
                drawn = draw(call.counter.iterator)
        start, _, _, first = walk_of(config, sizes, tile)
        pieces = look_up(config, call, tile, start)
        ahead = look_up(config, call, tile, start - 1)
        load_keys(config, sizes, tile, pieces, K, key_block(config, call, tile, start), it)
        if not has_Q:
            load_Q(Q, tile, t)
        has_Q = Boolean(False)
        number = grid + cute.arch.shuffle_sync(drawn, 0)  # all lanes take the tile that lane 0 has drawn
        place_next = place
        for i in cutlass.range(start - first, unroll=1):
            n_block = key_block(config, call, tile, start - i)
            n_ahead = key_block(config, call, tile, start - 1 - i)
            load_keys(config, sizes, tile, ahead, K, n_ahead, it + 1)
            load_keys(config, sizes, tile, pieces, V, n_block, it)
            pieces, ahead = ahead, look_up(config, call, tile, start - 2 - i)
            it += 1
            # K's slots have all been asked for. Not earlier: the load of Q waits until the previous O has
            # left its slot, and K and V would wait behind it.
            if i == config.stages - 2:
                place_next = seek(config, call, sizes, number, place)
                has_Q = load_next_Q(config, call, sizes, Q, number, place_next, t + 1, has_Q)
        n_block = key_block(config, call, tile, cutlass.min(start, first))
        load_keys(config, sizes, tile, pieces, V, n_block, it)
        place = seek(config, call, sizes, number, place_next)
        it += 1
        t += 1
    s.t_ring.wait_empty(t)  # as above
    if lane == 0:
        announce(s, t, Tile(Int32(-1), Int32(0), Int32(0)))
        if total > grid:
            reset_when_last(call.counter, grid)


@cute.jit
def walk_of(config: cutlass.Constexpr, sizes: Sizes, tile: Tile) -> Walk:
    """blocks.walk of a tile; with a block mask over positions in its lists."""
    if const_expr(config.sparse):
        return sparse.walk(tile.visits)
    return tile.sizes(sizes).walk(config, tile.m_block)


@cute.jit
def load_Q(x: Channel, tile: Tile, t: Int32):
    batch, start = tile.q_rows
    load(x.tma, start, tile.m_block, tile.head, batch, x.sX, x.ring, t)


@cute.jit
def load_next_Q(
    config: cutlass.Constexpr,
    call: Forward,
    sizes: Sizes,
    x: Channel,
    number: Int32,
    place: Place | None,
    t: Int32,
    has_Q: Boolean,
) -> Boolean:
    """With two Q buffers, ask for the next tile's Q, if there is one. Returns whether it is on its way."""
    if const_expr(config.q_stages == 2):
        if is_tile(config, call, sizes, number, place):
            load_Q(x, tile_at(config, call, sizes, number, place), t)
            has_Q = Boolean(True)
    return has_Q


@cute.jit
def look_up(config: cutlass.Constexpr, call: Forward, tile: Tile, n_block: Int32) -> Pieces | None:
    """Where a block of a tile's keys lies, if it lies in pages; ahead of the loads, which would wait.

    Pieces without a key are not looked up: they are rows that no page has, which TMA fills with zeros.
    """
    pieces = None
    if const_expr(config.page > 0):
        table, page_size = call.ragged.block_table[tile.k.batch, None], call.mK.shape[1]
        row = n_block * config.tile_n + cute.arch.lane_idx() * config.piece
        pieces = Pieces(Int32(0), page_size)
        if row >= 0 and row < cutlass.min(tile.k.seqlen, (n_block + 1) * config.tile_n):
            pieces = Pieces(table[row // page_size], row % page_size)
    return pieces


@cute.jit
def load_keys(
    config: cutlass.Constexpr,
    sizes: Sizes,
    tile: Tile,
    pieces: Pieces | None,
    x: Channel,
    n_block: Int32,
    i: Int32,
):
    """Load one block of keys or values into use i of its ring, once the consumers have emptied the slot."""
    head = tile.head // sizes.group
    if const_expr(config.page == 0):
        batch, start = tile.k_rows
        load(x.tma, start, n_block, head, batch, x.sX, x.ring, i)
    else:
        full = expect(x.ring, i, x.sX)
        size = config.piece, config.head_dim
        for p in cutlass.range(config.tile_n // config.piece, unroll=1):
            page, row = (cute.arch.shuffle_sync(y, p) for y in pieces)
            gX = cute.domain_offset((row, 0), x.tma.tensor[None, None, head, page])  # (page_size, D)
            gX = cute.local_tile(gX, size, (0, 0))  # (piece, d)
            sX = cute.local_tile(x.sX[None, None, x.ring.slot(i)], size, (p, 0))  # (piece, d)
            block_copy(x.tma.atom, cute.group_modes(gX, 0, 2), cute.group_modes(sX, 0, 2), tma_bar_ptr=full)


@cute.jit
def draw(counter: cute.Pointer) -> Int32:
    """The next number of a counter in global memory. Relaxed: it hands out numbers and orders no data."""
    return cute.arch.atomic_add(counter.llvm_ptr, Int32(1), sem="relaxed", scope="gpu")


@cute.jit
def reset_when_last(counter: cute.Tensor, grid: Int32):
    """Count the thread blocks that are done; after the last, nobody draws: 0 for the next launch."""
    if draw(counter.iterator + 1) == grid - 1:
        counter[0], counter[1] = Int32(0), Int32(0)


@cute.jit
def announce(s: Shared, t: Int32, tile: Tile):
    """Tell the consumers which tile is their t-th; m_block -1: there are no more."""
    slot = s.t_ring.slot(t)
    s.sTile[0, slot], s.sTile[1, slot], s.sTile[2, slot] = tile.m_block, tile.head, tile.batch
    if const_expr(tile.q is not None):
        s.sTile[3, slot], s.sTile[4, slot], s.sTile[5, slot] = tile.q.start, tile.q.seqlen, tile.k.seqlen
    if const_expr(tile.visits is not None):
        s.sTile[3, slot], s.sTile[4, slot] = tile.visits
    cute.arch.mbarrier_arrive(s.t_ring.full + slot)  # sTile is written: the consumers may read it


@cute.jit
def read_tile(s: Shared, ragged: Ragged | None, t: Int32, lane: Int32) -> Tile:
    """The consumers' end of `announce`: their t-th tile."""
    s.t_ring.wait_full(t)  # sTile is written
    slot = s.t_ring.slot(t)
    # make_warp_uniform is a shuffle: all lanes have read before lane 0 releases the slot.
    numbers = [cute.arch.make_warp_uniform(s.sTile[i, slot]) for i in range(cute.size(s.sTile, mode=[0]))]
    release(s.t_ring, t, lane)  # `announce` may overwrite it
    if const_expr(len(numbers) == 5):
        return Tile(*numbers[:3], visits=sparse.Visits(*numbers[3:]))
    if const_expr(ragged is None):
        return Tile(*numbers)
    m_block, head, batch, start, seqlen_q, seqlen_k = numbers
    row = batch
    if ragged.given & CU_SEQLENS_Q:
        row = Int32(0)
    return Tile(m_block, head, batch, Queries(row, start, seqlen_q), Keys(Int32(0), Int32(0), seqlen_k))
