"""The load warp of sm90.py; and how a persistent thread block comes to its tiles, which the load warp draws.

n counts the tiles of a thread block, `it` the query blocks of all their heads: they number the uses of rings.
"""

import cutlass
import cutlass.cute as cute
from cutlass import Boolean, Float32, Int32, const_expr
from cutlass.cute.nvgpu import cpasync

from mini_flash_attention.kernels.backward.schedule import Block, find_block, query_block, visits
from mini_flash_attention.kernels.backward.sm90_records import Setup, Shared
from mini_flash_attention.kernels.calls import Backward
from mini_flash_attention.kernels.parts.sm90 import Ring, Tma, commit, load, release


@cute.jit
def produce(config: cutlass.Constexpr, call: Backward, setup: Setup, s: Shared, block: Block):
    """The load warp: K and V of each tile; Q with its statistics and dO of each query block."""
    n, it, more = Int32(0), Int32(0), Boolean(True)
    while more:
        it = load_tile(config, call, setup, s, block, n, it)
        block, more = draw_tile(config, call, setup, s, block, n)
        n += 1


@cute.jit
def load_tile(
    config: cutlass.Constexpr, call: Backward, setup: Setup, s: Shared, block: Block, n: Int32, it: Int32
) -> Int32:
    """The n-th tile. K and Q come first: the first product needs only them. Returns the next tile's `it`.

    Each `load` waits until its slot is released.
    """
    copy_stats = cute.make_copy_atom(cpasync.CopyBulkG2SOp(), Float32)
    q_batch, q_start = block.q_rows
    load_keys(setup.k, block, s.sK, s.k_ring, n)
    start = it
    for head in cutlass.range(block.head, block.head + block.heads, unroll=1):
        x = visits(config, call, block, head)
        for position in cutlass.range(x.first, x.last, unroll=1):
            m_block = query_block(config, call, block, head, x, position)
            stats_size = 8 * config.tile_m  # bytes that arrive at Q's full barrier, too
            load(setup.q, q_start, m_block, head, q_batch, s.sQ, s.q_ring, it, more=stats_size)
            if it == start:
                load_keys(setup.v, block, s.sV, s.v_ring, n)
                cute.arch.griddepcontrol_wait()  # delta is done: the stats are there
            slot = s.q_ring.slot(it)
            batch, number = block.place(m_block)
            gStats = call.mStats[batch, head, number, None, None]  # (2, tile_m)
            gStats = cute.make_tensor(gStats.iterator, cute.make_layout(2 * config.tile_m))
            with cute.arch.elect_one():
                cute.copy(copy_stats, gStats, s.sStats[None, slot], mbar_ptr=s.q_ring.full + slot)
            load(setup.do, q_start, m_block, head, q_batch, s.sdO, s.do_ring, it)
            it += 1
    if it == start:  # no query sees these keys; the consumers wait for V all the same
        load_keys(setup.v, block, s.sV, s.v_ring, n)
    return it


@cute.jit
def load_keys(tma: Tma, block: Block, sX: cute.Tensor, ring: Ring, n: Int32):
    """K or V of a tile."""
    batch, start = block.k_rows
    load(tma, start, block.n_block, block.head_kv, batch, sX, ring, n)


@cute.jit
def draw_tile(
    config: cutlass.Constexpr, call: Backward, setup: Setup, s: Shared, block: Block, n: Int32
) -> tuple[Block, Boolean]:
    """(the tile after the n-th, whether there is one). By the load warp, which tells the others.

    Each thread block has had its first tile: the one of its own number.
    """
    more = Boolean(False)
    if const_expr(config.persistent):
        cute.arch.griddepcontrol_wait()  # delta is done: the counter is zero
        s.tile_ring.wait_empty(n)  # all warps have read the number of two tiles ago
        drawn = Int32(0)
        if cute.arch.lane_idx() == 0:  # relaxed: it hands out numbers, and orders no data
            counter = call.mTurns.iterator.llvm_ptr
            drawn = cute.arch.atomic_add(counter, Int32(1), sem="relaxed", scope="gpu")
        # All lanes take the tile that lane 0 has drawn.
        tile = cute.arch.grid_dim()[0] + cute.arch.shuffle_sync(drawn, 0)
        if cute.arch.lane_idx() == 0:
            s.sTile[s.tile_ring.slot(n)] = tile
        commit(s.tile_ring, n, cute.arch.lane_idx())  # by lane 0, who wrote it: next_tile may read it
        block, more = tile_of(config, call, setup, tile)
    return block, more


@cute.jit
def next_tile(config: cutlass.Constexpr, w, block: Block, n: Int32) -> tuple[Block, Boolean]:
    """(the tile after the n-th, whether there is one). By a warp of the other WGs, with its Work."""
    more, s = Boolean(False), w.s
    if const_expr(config.persistent):
        s.tile_ring.wait_full(n)  # the load warp has drawn it
        tile = s.sTile[s.tile_ring.slot(n)]
        cute.arch.sync_warp()  # all lanes have read it: it may be overwritten
        release(s.tile_ring, n, cute.arch.lane_idx())
        block, more = tile_of(config, w.call, w.setup, tile)
    return block, more


@cute.jit
def tile_of(config: cutlass.Constexpr, call: Backward, setup: Setup, tile: Int32) -> tuple[Block, Boolean]:
    """(the tile of this number, whether there is one)."""
    tile = cute.arch.make_warp_uniform(tile)
    return find_block(config, call, setup, tile), tile < setup.num_tiles
