"""Parts of the Hopper forward: what warps share and own, the producer, how a tile comes and how O leaves."""

from typing import NamedTuple

import cutlass
import cutlass.cute as cute
from cutlass import Boolean, Float32, Int32, const_expr
from cutlass.block import block_copy
from cutlass.cute.nvgpu import warp

from mini_flash_attention.kernels.calls import CU_SEQLENS_Q, Dropout, Ragged, Score
from mini_flash_attention.kernels.parts.dropout import rescale_sums
from mini_flash_attention.kernels.parts.fragments import (
    as_operand_A,
    convert,
    rescale,
    store_sequence,
    transposed,
)
from mini_flash_attention.kernels.parts.scheduler import (
    Schedule,
    Tile,
    is_tile,
    num_tiles,
    seek,
    start_of_walk,
    tile_at,
)
from mini_flash_attention.kernels.parts.scores import scale_log2
from mini_flash_attention.kernels.parts.seqlen import Keys, Queries, Sizes
from mini_flash_attention.kernels.parts.sm90 import (
    Pieces,
    Ring,
    Tma,
    load,
    load_pages,
    look_up,
    release,
    zero_rows,
)
from mini_flash_attention.kernels.parts.softmax import OnlineSoftmax


class Shared(NamedTuple):
    """Shared memory and the rings that guard it."""

    sQ: cute.Tensor  # (tile_m, d, q_stages), later O
    sK: cute.Tensor  # (tile_n, d, stages)
    sV: cute.Tensor  # (tile_n, d, stages)
    sTile: cute.Tensor  # (what announce writes, 2)
    q_ring: Ring
    k_ring: Ring
    v_ring: Ring
    t_ring: Ring


class Work(NamedTuple):
    """What one consumer warp computes with."""

    wg: Int32
    lane: Int32
    tidx: Int32  # among the consumers
    qk: cute.TiledMma
    pv: cute.TiledMma
    tSrQ: cute.Tensor  # A of Q·Kᵀ: registers, or descriptors of shared memory (MMA, 1, d / 16, q_stages)
    tSrK: cute.Tensor  # B of Q·Kᵀ: descriptors (MMA, 1, d / 16, stages)
    tOrV: cute.Tensor  # B of P·V: descriptors (MMA, 1, tile_n / 16, stages)
    P: cute.Tensor  # A of P·V: registers (MMA, 1, tile_n / 16)
    acc_S: cute.Tensor  # ((2, 2, tile_n / 8), 1, 1)
    acc_O: cute.Tensor  # ((2, 2, d / 8), 1, 1)
    sums: cute.Tensor  # of one block's rows
    coords: cute.Tensor  # (row, column) of each element of acc_S
    softmax: OnlineSoftmax
    score: Score
    slopes: cute.Tensor  # ALiBi's, of the thread's rows
    dropout: Dropout | None
    batch_head: cute.Tensor  # (1) int32: batch * heads + head of the tile, of which dropout is a function


def make_work(
    config,
    s: Shared,
    tiled_mma_qk: cute.TiledMma,
    tiled_mma_pv: cute.TiledMma,
    score: Score,
    dropout: Dropout | None,
) -> Work:
    tidx = cute.arch.thread_idx()[0] - 128
    wg = cute.arch.make_warp_uniform(tidx // 128)
    # Sliced by the WG, not by the thread: descriptors stay in uniform registers.
    wg_qk, wg_pv = tiled_mma_qk.get_slice(wg * 128), tiled_mma_pv.get_slice(wg * 128)
    thr_qk, thr_pv = tiled_mma_qk.get_slice(tidx), tiled_mma_pv.get_slice(tidx)
    tile_s, tile_o = (config.tile_m, config.tile_n), (config.tile_m, config.head_dim)
    acc_S = cute.make_rmem_tensor(thr_qk.partition_shape_C(tile_s), Float32)
    acc_O = cute.make_rmem_tensor(thr_pv.partition_shape_C(tile_o), Float32)
    if config.q_regs:
        tSrQ = thr_qk.make_fragment_A(thr_qk.partition_shape_A(tile_o))
    else:
        tSrQ = wg_qk.make_fragment_A(wg_qk.partition_A(s.sQ))
    # (d, tile_n, stages)
    sVt = transposed(s.sV)
    offset, row_sum, sums, slopes = (cute.make_rmem_tensor(2, Float32) for _ in range(4))
    return Work(
        wg=wg,
        lane=cute.arch.lane_idx(),
        tidx=tidx,
        qk=tiled_mma_qk,
        pv=tiled_mma_pv,
        tSrQ=tSrQ,
        tSrK=wg_qk.make_fragment_B(wg_qk.partition_B(s.sK)),
        tOrV=wg_pv.make_fragment_B(wg_pv.partition_B(sVt)),
        P=cute.make_rmem_tensor(as_operand_A(acc_S).shape, s.sQ.element_type),
        acc_S=acc_S,
        acc_O=acc_O,
        sums=sums,
        coords=thr_qk.partition_C(cute.make_identity_tensor(tile_s)),
        softmax=OnlineSoftmax(offset, row_sum, scale_log2(config, score)),
        score=score,
        slopes=slopes,
        dropout=dropout,
        batch_head=cute.make_rmem_tensor(1, Int32),
    )


@cute.jit
def produce(
    config: cutlass.Constexpr,
    sizes: Sizes,
    schedule: Schedule,
    ragged: Ragged | None,
    q: Tma,
    k: Tma,
    v: Tma,
    s: Shared,
):
    """The producer warp: draw tiles, tell the consumers, load Q, K and V."""
    lane = cute.arch.lane_idx()
    grid, _, _ = cute.arch.grid_dim()
    number, _, _ = cute.arch.block_idx()
    total = num_tiles(config, sizes, ragged)
    place = seek(config, sizes, ragged, start_of_walk(ragged), number)
    it, t = Int32(0), Int32(0)  # key blocks and tiles so far
    has_Q = Boolean(False)  # this tile's Q is on its way
    while is_tile(config, sizes, ragged, place, number):
        tile = tile_at(config, sizes, schedule.swath, ragged, place, number)
        drawn = Int32(0)
        s.t_ring.wait_empty(t)  # the consumers have read what this slot said two tiles ago
        if lane == 0:
            announce(s, t, tile)
            if total > grid:  # else each thread block has one tile, and there is no counter
                drawn = draw(schedule.counter)
        start, _, _, first = tile.sizes(sizes).walk(config, tile.m_block)
        pieces = look_up_keys(config, ragged, tile, k, start)
        ahead = look_up_keys(config, ragged, tile, k, start - 1)
        load_keys(config, sizes, tile, pieces, k, start, s.sK, s.k_ring, it)
        if not has_Q:
            load_Q_tile(tile, q, s, t)
        has_Q = Boolean(False)
        number = grid + cute.arch.shuffle_sync(drawn, 0)
        place_next = place
        for i in cutlass.range(start - first, unroll=1):  # K a block ahead of V, as needed
            load_keys(config, sizes, tile, ahead, k, start - 1 - i, s.sK, s.k_ring, it + 1)
            load_keys(config, sizes, tile, pieces, v, start - i, s.sV, s.v_ring, it)
            pieces, ahead = ahead, look_up_keys(config, ragged, tile, k, start - 2 - i)
            it += 1
            # K's slots have all been asked for. Not earlier: the load of Q waits until the previous O has
            # left its slot, and K and V would wait behind it.
            if i == config.stages - 2:
                place_next = seek(config, sizes, ragged, place, number)
                if const_expr(config.q_stages == 2):
                    if is_tile(config, sizes, ragged, place_next, number):
                        tile_next = tile_at(config, sizes, schedule.swath, ragged, place_next, number)
                        load_Q_tile(tile_next, q, s, t + 1)
                        has_Q = Boolean(True)
        load_keys(config, sizes, tile, pieces, v, cutlass.min(start, first), s.sV, s.v_ring, it)
        place = seek(config, sizes, ragged, place_next, number)
        it += 1
        t += 1
    s.t_ring.wait_empty(t)
    if lane == 0:
        announce(s, t, Tile(Int32(-1), Int32(0), Int32(0)))
        if total > grid:
            finished = draw(schedule.counter + 1)
            if finished == grid - 1:  # nobody draws any more: zero for the next launch
                schedule.counter[0], schedule.counter[1] = Int32(0), Int32(0)


@cute.jit
def load_Q_tile(tile: Tile, q: Tma, s: Shared, t: Int32):
    batch, start = tile.q_rows
    load(q, start, tile.m_block, tile.head, batch, s.sQ, s.q_ring, t)


@cute.jit
def look_up_keys(config: cutlass.Constexpr, ragged: Ragged | None, tile: Tile, k: Tma, n_block: Int32):
    """Where a block of a tile's keys lies, if it lies in pages; ahead of the loads, which would wait."""
    pieces = None
    if const_expr(config.page > 0):
        table, page_size = ragged.block_table[tile.k.batch, None], k.tensor.shape[0]
        pieces = look_up(config.piece, config.tile_n, table, page_size, tile.k.seqlen, n_block)
    return pieces


@cute.jit
def load_keys(
    config: cutlass.Constexpr,
    sizes: Sizes,
    tile: Tile,
    pieces: Pieces | None,
    x: Tma,
    n_block: Int32,
    sX: cute.Tensor,
    ring: Ring,
    i: Int32,
):
    """Load one block of keys or values into use i of its ring."""
    head = tile.head // sizes.group
    if const_expr(config.page > 0):
        load_pages(x, config.piece, pieces, head, sX, ring, i)
    else:
        batch, start = tile.k_rows
        load(x, start, n_block, head, batch, sX, ring, i)


@cute.jit
def draw(counter: cute.Pointer) -> Int32:
    """The next number of a counter in global memory."""
    return cute.arch.atomic_add(counter.llvm_ptr, Int32(1), sem="relaxed", scope="gpu")


@cute.jit
def announce(s: Shared, t: Int32, tile: Tile):
    """Tell the consumers which tile is their t-th; m_block -1: there are no more."""
    slot = s.t_ring.slot(t)
    s.sTile[0, slot], s.sTile[1, slot], s.sTile[2, slot] = tile.m_block, tile.head, tile.batch
    if const_expr(tile.q is not None):
        s.sTile[3, slot], s.sTile[4, slot], s.sTile[5, slot] = tile.q.start, tile.q.seqlen, tile.k.seqlen
    cute.arch.mbarrier_arrive(s.t_ring.full + slot)


@cute.jit
def read_tile(s: Shared, ragged: Ragged | None, t: Int32, lane: Int32) -> Tile:
    """The consumers' t-th tile."""
    s.t_ring.wait_full(t)
    slot = s.t_ring.slot(t)
    # make_warp_uniform is a shuffle: all lanes have read before lane 0 releases the slot.
    numbers = [cute.arch.make_warp_uniform(s.sTile[i, slot]) for i in range(cute.size(s.sTile, mode=[0]))]
    release(s.t_ring, t, lane)
    if const_expr(ragged is None):
        return Tile(*numbers)
    m_block, head, batch, start, seqlen_q, seqlen_k = numbers
    row = batch
    if ragged.given & CU_SEQLENS_Q:
        row = Int32(0)
    return Tile(m_block, head, batch, Queries(row, start, seqlen_q), Keys(Int32(0), Int32(0), seqlen_k))


@cute.jit
def clear_beyond(config: cutlass.Constexpr, sizes: Sizes, s: Shared, w: Work, it: Int32, n_block: Int32):
    """Zero the values beyond the sequence: other sequences' or nobody's, perhaps NaN, and 0 · NaN is NaN.

    Each WG for itself, though all write the same zeros: named barrier 8 + w.
    """
    valid = sizes.seqlen_k - n_block * config.tile_n
    if valid < config.tile_n:
        s.v_ring.wait_full(it)
        zero_rows(s.sV[None, None, s.v_ring.slot(it)], valid, w.tidx % 128, 8 + w.wg)


@cute.jit
def store(
    config: cutlass.Constexpr,
    sizes: Sizes,
    s: Shared,
    w: Work,
    t: Int32,
    o: Tma,
    mO: cute.Tensor,
    mLSE: cute.Tensor,
    tile: Tile,
):
    """Normalise O and store it and the log-sum-exp; softmax.finish() has run."""
    batch, start = tile.q_rows
    if const_expr(config.dropout):
        rescale_sums(w.dropout, w.softmax.row_sum)
    rescale(w.acc_O, w.softmax.row_sum)
    O = cute.make_rmem_tensor(w.acc_O.shape, mO.element_type)
    convert(w.acc_O, O)
    rows = cute.make_rmem_tensor(2, Int32)
    for r in cutlass.range_constexpr(2):
        rows[r] = tile.m_block * config.tile_m + w.coords[0][0] + 8 * r
        if w.lane % 4 == 0 and rows[r] < sizes.seqlen_q:
            mLSE[batch, tile.head, start + rows[r]] = w.softmax.offset[r]
    warp_idx = cute.arch.make_warp_uniform(w.tidx // 32)
    row_block = tile.m_block * (config.tile_m // 16) + warp_idx
    if const_expr(config.q_stages == 1):
        store_sequence(O, mO[batch, None, tile.head, None], rows, start, sizes.seqlen_q, w.lane)
    elif const_expr(tile.q is None):  # noqa: SIM114, only one of the conditions is known to the compiler
        store_bulk(config, s, w, t, o, O, warp_idx, row_block, tile)
    elif 16 * row_block + 16 <= sizes.seqlen_q:
        store_bulk(config, s, w, t, o, O, warp_idx, row_block, tile)
    else:  # the next sequence's rows follow
        store_sequence(O, mO[batch, None, tile.head, None], rows, start, sizes.seqlen_q, w.lane)


@cute.jit
def store_bulk(
    config: cutlass.Constexpr,
    s: Shared,
    w: Work,
    t: Int32,
    o: Tma,
    O: cute.Tensor,
    warp_idx: Int32,
    row_block: Int32,
    tile: Tile,
):
    """Store this warp's 16 rows of O by TMA, through shared memory.

    They go over its rows of Q: its products alone read those, and step or first_S waited for them.
    """
    batch, start = tile.q_rows
    sO = s.sQ[None, None, s.q_ring.slot(t)]
    atom = cute.make_copy_atom(warp.StMatrix8x8x16bOp(False, 4), O.element_type)
    thr_store = cute.make_tiled_copy_C(atom, w.pv).get_slice(w.tidx)
    cute.copy(atom, thr_store.retile(O), thr_store.partition_D(sO))
    cute.arch.fence_view_async_shared()  # this warp's stores, before the TMA unit reads them
    cute.arch.sync_warp()
    block = (16, config.head_dim)
    gO = cute.domain_offset((start, 0), o.tensor[None, None, tile.head, batch])  # (S, D)
    gO = cute.local_tile(gO, block, (row_block, 0))  # (16, d)
    sO = cute.local_tile(sO, block, (warp_idx, 0))  # (16, d)
    if w.lane == 0:
        block_copy(o.atom, cute.group_modes(sO, 0, 2), cute.group_modes(gO, 0, 2))
        cute.arch.cp_async_bulk_commit_group()
