"""FlashAttention forward for Hopper: one producer warp, 2 or 3 consumer warpgroups (WGs).

One persistent thread block runs on each SM.

q (B, Sq, Hq, D), k and v (B, Sk, Hkv, D), o (B, Sq, Hq, D), lse (B, Hq, Sq) float32; float16 or
bfloat16, any strides with a unit last one. Ragged batches lie in the same shapes: packed sequences
follow each other in a batch of one, and k and v may be pages, (num_pages, page_size, Hkv, D).
A tile is tile_m query rows of one head; each WG owns 64 of them and walks the keys from the tile's last
block to its first. The design is FlashAttention-3's (Shah et al. 2024, arXiv 2407.08608), its softmax
is not: blocks without a mask compute no maximum (see step).
"""

from typing import NamedTuple

import cutlass
import cutlass.cute as cute
import cutlass.utils.hopper_helpers as hopper
from cutlass import Boolean, Float32, Int32, const_expr
from cutlass.block import block_copy
from cutlass.cute.nvgpu import OperandMajorMode, cpasync, warp, warpgroup
from cutlass.memory import SmemAllocator
from cutlass.tensor_utils import LayoutEnum

from mini_flash_attention.kernels import arguments
from mini_flash_attention.kernels.dropout import Dropout, keep, mark, rescale_sums
from mini_flash_attention.kernels.fragments import (
    as_operand_A,
    convert,
    rescale,
    rows_cols,
    store_sequence,
)
from mini_flash_attention.kernels.mask import mask
from mini_flash_attention.kernels.scheduler import (
    Schedule,
    Tile,
    is_tile,
    num_tiles,
    seek,
    start_of_walk,
    tile_at,
)
from mini_flash_attention.kernels.scores import Score, scale_log2, transform
from mini_flash_attention.kernels.seqlen import CU_SEQLENS_Q, Keys, Queries, Ragged, Sizes, sizes_of
from mini_flash_attention.kernels.sm90 import (
    Pieces,
    Ring,
    Tma,
    all_true,
    init_rings,
    load,
    load_pages,
    look_up,
    make_ring,
    make_tma,
    release,
    wgmma,
    zero_rows,
)
from mini_flash_attention.kernels.softmax import OnlineSoftmax


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


@cute.jit
def my_turn(config: cutlass.Constexpr, wg: Int32):
    """Wait until the WG before this one has issued its products. Named barrier 1 + w is WG w's turn.

    For speed alone: one WG's products run under another's softmax. The 128 threads of a WG wait, the 128 of
    the one before arrive; the last arrival is left over. An S that is computed again takes no turn.
    """
    if const_expr(config.ordered):
        cute.arch.barrier(barrier_id=1 + wg, number_of_threads=256)


@cute.jit
def next_turn(config: cutlass.Constexpr, wg: Int32):
    if const_expr(config.ordered):
        following = 1 - wg if const_expr(config.wgs == 2) else (wg + 1) % config.wgs
        cute.arch.barrier_arrive(barrier_id=1 + following, number_of_threads=256)


@cute.jit
def issue_S(config: cutlass.Constexpr, s: Shared, w: Work, t: Int32, it: Int32):
    """S = Q·Kᵀ, with Q of tile t and the K of ring use it."""
    tSrQ = w.tSrQ if const_expr(config.q_regs) else w.tSrQ[None, None, None, s.q_ring.slot(t)]
    wgmma(w.qk, w.acc_S, tSrQ, w.tSrK[None, None, None, s.k_ring.slot(it)], False)


@cute.jit
def issue_O(s: Shared, w: Work, it: Int32):
    """O += P·V, with the V of ring use it."""
    wgmma(w.pv, w.acc_O, w.P, w.tOrV[None, None, None, s.v_ring.slot(it)], True)


@cute.jit
def score(config: cutlass.Constexpr, sizes: Sizes, w: Work, m_block: Int32, n_block: Int32):
    """acc_S <- its scores; plain ones differ by a factor only, which the softmax applies."""
    if const_expr(config.score != "plain"):
        diagonal = m_block * config.tile_m + sizes.seqlen_k - sizes.seqlen_q - n_block * config.tile_n
        distances = cute.make_rmem_tensor(2, Int32)
        for r in cutlass.range_constexpr(2):
            distances[r] = diagonal + w.coords[0][0] + 8 * r - w.coords[0][1]
        transform(config, w.score, rows_cols(w.acc_S), w.slopes, distances)


@cute.jit
def to_operand(config: cutlass.Constexpr, w: Work, m_block: Int32, n_block: Int32):
    """P, from float32 to 16 bits, without what dropout drops; its sums have been taken."""
    convert(as_operand_A(w.acc_S), w.P)
    if const_expr(config.dropout):
        row, key = m_block * config.tile_m + w.coords[0][0], n_block * config.tile_n + w.coords[0][1]
        mark(w.dropout, w.P, (row,), key, w.batch_head[0])
        keep(w.P, w.P)


@cute.jit
def step(
    config: cutlass.Constexpr,
    sizes: Sizes,
    s: Shared,
    w: Work,
    t: Int32,
    it: Int32,
    m_block: Int32,
    n_block: Int32,
    masked: cutlass.Constexpr,
):
    """S of the next block (ring use it + 1) under O += P·V of the one before (use it); then S becomes P.

    A block without a mask takes no maximum: the rows keep their offsets, and the block's sums tell
    whether P stayed in range. Where it did not, for any of the WG's 64 rows, S is computed once more,
    the offsets are renewed, and False is returned: the caller then stops trusting this tile's offsets.
    """
    s.k_ring.wait_full(it + 1)
    my_turn(config, w.wg)
    issue_S(config, s, w, t, it + 1)
    s.v_ring.wait_full(it)
    issue_O(s, w, it)
    next_turn(config, w.wg)
    warpgroup.wait_group(1)  # S is there; P·V runs on
    score(config, sizes, w, m_block, n_block)
    w.sums.fill(0.0)
    ok = Boolean(True)
    if const_expr(masked):
        release(s.k_ring, it + 1, w.lane)
        mask(config, sizes, w.acc_S, w.coords, m_block, n_block)
        warpgroup.wait_group(0)  # P·V is done: P and O may be written, V overwritten
        w.softmax.renew(w.acc_S, w.acc_O, w.sums, True)
    else:
        w.softmax.exponentials(rows_cols(w.acc_S), w.sums, False)
        ok = in_range(config, w)
        warpgroup.wait_group(0)  # as above
        if not ok:
            issue_S(config, s, w, t, it + 1)
            warpgroup.wait_group(0)
            score(config, sizes, w, m_block, n_block)
            w.sums.fill(0.0)
            w.softmax.renew(w.acc_S, w.acc_O, w.sums, False)
        release(s.k_ring, it + 1, w.lane)
    for r in cutlass.range_constexpr(cute.size(w.sums)):
        w.softmax.row_sum[r] = w.softmax.row_sum[r] + w.sums[r]
    release(s.v_ring, it, w.lane)
    to_operand(config, w, m_block, n_block)
    return ok


@cute.jit
def later_blocks(
    config: cutlass.Constexpr,
    sizes: Sizes,
    s: Shared,
    w: Work,
    t: Int32,
    it: Int32,
    m_block: Int32,
    ends: tuple[Int32, Int32, Int32, Int32],
) -> Int32:
    """All steps of a tile after its first block, in at most two rounds. Returns the ring use reached.

    ends: sizes.walk of m_block.
    """
    start, free_end, free_first, first = ends
    n_block, masked_end = start - 1, free_end
    while n_block >= first:
        while n_block >= masked_end:
            step(config, sizes, s, w, t, it, m_block, n_block, True)
            it += 1
            n_block -= 1
        steady = Boolean(True)
        while (n_block >= free_first) & steady:
            steady = step(config, sizes, s, w, t, it, m_block, n_block, False)
            it += 1
            n_block -= 1
        masked_end = first  # the left edge, or scores that grow: the rest as if it were masked
    return it


@cute.jit
def in_range(config: cutlass.Constexpr, w: Work):
    """Whether all sums of the WG, so all of its P, are far from overflow in P's dtype; not if one is NaN.

    The WG must agree, since it can only compute S again as a whole. Named barrier 8 + w.
    """
    limit = 2.0**60 if const_expr(config.dtype == "bfloat16") else 2.0**15
    return all_true(cute.arch.fmax(w.sums[0], w.sums[1], nan=True) < limit, 8 + w.wg)


@cute.jit
def load_Q(config: cutlass.Constexpr, s: Shared, w: Work, t: Int32):
    """Q's rows of this warp, from shared memory to registers, if they live there."""
    if const_expr(config.q_regs):
        sQ = s.sQ[None, None, s.q_ring.slot(t)]
        atom = cute.make_copy_atom(warp.LdMatrix8x8x16bOp(False, 4), sQ.element_type)
        thr_load = cute.make_tiled_copy_A(atom, w.qk).get_slice(w.tidx)
        cute.copy(atom, thr_load.partition_S(sQ), thr_load.retile(w.tSrQ))


@cute.jit
def wait_for_S(s: Shared, t: Int32, it: Int32):
    """The Q of tile t and the K of ring use it are there."""
    s.q_ring.wait_full(t)
    s.k_ring.wait_full(it)


@cute.jit
def first_S(config: cutlass.Constexpr, s: Shared, w: Work, tile: Tile, t: Int32, it: Int32):
    """S of a tile's first block, where no other product can be issued with it."""
    if const_expr(tile.q is None):  # noqa: SIM114, only one of the conditions is known to the compiler
        wait_for_S(s, t, it)
    elif tile.m_block >= 0:  # a ragged batch may have fewer tiles than there are thread blocks
        wait_for_S(s, t, it)
    load_Q(config, s, w, t)
    issue_S(config, s, w, t, it)
    warpgroup.wait_group(0)
    release(s.k_ring, it, w.lane)


@cute.jit
def consume(
    config: cutlass.Constexpr,
    all_sizes: Sizes,
    ragged: Ragged | None,
    s: Shared,
    w: Work,
    o: Tma,
    mO: cute.Tensor,
    mLSE: cute.Tensor,
):
    """A consumer warp. With two Q buffers, a tile's first S is issued with the previous tile's last P·V."""
    if const_expr(config.ordered):
        if w.wg == config.wgs - 1:  # WG 0 begins
            cute.arch.barrier_arrive(barrier_id=1, number_of_threads=256)
    t, it = Int32(0), Int32(0)  # tiles and key blocks so far
    tile = read_tile(s, ragged, t, w.lane)
    if const_expr(config.q_stages == 2):
        first_S(config, s, w, tile, t, it)
    while tile.m_block >= 0:
        if const_expr(config.q_stages == 1):
            first_S(config, s, w, tile, t, it)
        sizes, m_block = tile.sizes(all_sizes), tile.m_block
        ends = start, free_end, _, _ = sizes.walk(config, m_block)
        if const_expr("alibi" in config.score):
            w.slopes.fill(w.score.slopes[tile.batch, tile.head])
        if const_expr(config.dropout):
            w.batch_head[0] = tile.batch * sizes.heads + tile.head
        score(config, sizes, w, m_block, start)
        if start >= free_end:  # else every row sees it whole
            mask(config, sizes, w.acc_S, w.coords, m_block, start)
        w.softmax.first(w.acc_S)
        to_operand(config, w, m_block, start)
        w.acc_O.fill(0.0)
        if const_expr(ragged is not None):
            clear_beyond(config, sizes, s, w, it, start)
        if const_expr(config.q_stages == 2):
            if t > 0:  # the previous O has left its slot: the producer may load Q into it
                if w.lane == 0:
                    cute.arch.cp_async_bulk_wait_group(0, read=True)
                release(s.q_ring, t - 1, w.lane)

        it = later_blocks(config, sizes, s, w, t, it, m_block, ends)
        if const_expr(config.q_stages == 1):
            release(s.q_ring, t, w.lane)
        tile_next = read_tile(s, ragged, t + 1, w.lane)
        # After the last tile there is no Q or K to wait for (nor before the first, if there is none): S is
        # made of what lies in the slots, nobody reads it, and the release of K has no load before it, since
        # the producer has finished.
        if const_expr(config.q_stages == 2):
            if tile_next.m_block >= 0:
                wait_for_S(s, t + 1, it + 1)
            load_Q(config, s, w, t + 1)
        s.v_ring.wait_full(it)
        my_turn(config, w.wg)
        if const_expr(config.q_stages == 2):
            issue_S(config, s, w, t + 1, it + 1)
        issue_O(s, w, it)
        next_turn(config, w.wg)
        w.softmax.finish()
        warpgroup.wait_group(0)
        release(s.v_ring, it, w.lane)
        if const_expr(config.q_stages == 2):
            release(s.k_ring, it + 1, w.lane)
        store(config, sizes, s, w, t, o, mO, mLSE, tile)
        t += 1
        it += 1
        tile = tile_next
    if w.lane == 0:  # the last O has left shared memory before the thread block ends
        cute.arch.cp_async_bulk_wait_group(0, read=True)


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
    sVt = cute.make_tensor(s.sV.iterator, cute.select(s.sV.layout, mode=[1, 0, 2]))
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


@cute.kernel
def kernel(
    config: cutlass.Constexpr,
    sizes: Sizes,
    schedule: Schedule,
    ragged: Ragged | None,
    dropout: Dropout | None,
    score: Score,
    q: Tma,
    k: Tma,
    v: Tma,
    o: Tma,
    mO: cute.Tensor,
    mLSE: cute.Tensor,
    tiled_mma_qk: cute.TiledMma,
    tiled_mma_pv: cute.TiledMma,
    sQ_layout: cute.ComposedLayout,
    sKV_layout: cute.ComposedLayout,
):
    warp_idx = cute.arch.make_warp_uniform(cute.arch.warp_idx())
    smem = SmemAllocator()
    dtype = mO.element_type
    sQ = smem.allocate_tensor(dtype, sQ_layout.outer, 1024, swizzle=sQ_layout.inner)
    sK = smem.allocate_tensor(dtype, sKV_layout.outer, 1024, swizzle=sKV_layout.inner)
    sV = smem.allocate_tensor(dtype, sKV_layout.outer, 1024, swizzle=sKV_layout.inner)
    sTile = smem.allocate_tensor(Int32, cute.make_layout((3 if ragged is None else 6, 2)), 16)
    rings = tuple(make_ring(smem, n) for n in (config.q_stages, config.stages, config.stages, 2))
    s = Shared(sQ, sK, sV, sTile, *rings)
    if warp_idx == 0:
        with cute.arch.elect_one():
            init_rings(rings, config.tile_m // 16)  # consumer warps: each releases a slot once
        for x in (q, k, v, o):
            cpasync.prefetch_descriptor(x.atom)
    cute.arch.barrier()  # the mbarriers are there
    if warp_idx < 4:
        cute.arch.setmaxregister_decrease(config.registers[0])
        if warp_idx == 0:
            produce(config, sizes, schedule, ragged, q, k, v, s)
    else:
        cute.arch.setmaxregister_increase(config.registers[1])
        w = make_work(config, s, tiled_mma_qk, tiled_mma_pv, score, dropout)
        consume(config, sizes, ragged, s, w, o, mO, mLSE)


kernel.set_name_prefix("mfa_fwd_sm90", remove_cutlass_symbol=True)


@cute.jit
def launch(
    mQ: cute.Tensor,
    mK: cute.Tensor,
    mV: cute.Tensor,
    mO: cute.Tensor,
    mLSE: cute.Tensor,
    score: Score,
    window_left: Int32,
    window_right: Int32,
    ragged: Ragged | None,
    dropout: Dropout | None,
    swath: Int32,
    num_sms: Int32,
    counter: cute.Tensor,
    config: cutlass.Constexpr,
    stream,
):
    """Tensors as in the module's first lines, numbers as in dispatch.py, counter as in counters.py."""
    sizes = sizes_of(config, mQ, mK, window_left, window_right, ragged)
    schedule = Schedule(swath, counter.iterator)
    call = Call(sizes, schedule, ragged, dropout, score, num_sms, mQ, mK, mV, mO, mLSE)
    launch_at(config, call, stream)


class Call(NamedTuple):
    """What launch was given."""

    sizes: Sizes
    schedule: Schedule
    ragged: Ragged | None
    dropout: Dropout | None
    score: Score
    num_sms: Int32
    mQ: cute.Tensor
    mK: cute.Tensor
    mV: cute.Tensor
    mO: cute.Tensor
    mLSE: cute.Tensor


@cute.jit
def launch_at(config: cutlass.Constexpr, call: Call, stream):
    """ForwardSm90.at: the tiles for this many queries."""
    longest = call.sizes.seqlen_q if const_expr(call.ragged is None) else call.ragged.longest
    if const_expr(config.short is None):
        launch_tiles(config, call, stream)
    elif longest <= config.short_seqlen:
        launch_at(config.short, call, stream)
    else:
        launch_tiles(config, call, stream)


@cute.jit
def launch_tiles(config: cutlass.Constexpr, call: Call, stream):
    dtype = call.mQ.element_type
    mnk = (config.tile_m, config.tile_n, config.head_dim)
    sQ_layout = hopper.make_smem_layout_a(LayoutEnum.ROW_MAJOR, mnk, dtype, config.q_stages)
    sO_layout = hopper.make_smem_layout_a(LayoutEnum.ROW_MAJOR, (16, *mnk[1:]), dtype, 1)
    sKV_layout = hopper.make_smem_layout_b(LayoutEnum.ROW_MAJOR, mnk, dtype, config.stages)
    K, MN = OperandMajorMode.K, OperandMajorMode.MN
    RMEM, SMEM = warpgroup.OperandSource.RMEM, warpgroup.OperandSource.SMEM
    wgs = (config.wgs, 1, 1)
    tiled_mma_qk = hopper.make_trivial_tiled_mma(
        dtype, dtype, K, K, Float32, wgs, (64, config.tile_n), RMEM if config.q_regs else SMEM
    )
    tiled_mma_pv = hopper.make_trivial_tiled_mma(
        dtype, dtype, K, MN, Float32, wgs, (64, config.head_dim), RMEM
    )
    g2s, s2g = cpasync.CopyBulkTensorTileG2SOp(), cpasync.CopyBulkTensorTileS2GOp()
    q = make_tma(g2s, call.mQ, sQ_layout, (config.tile_m, config.head_dim))
    sPiece_layout = hopper.make_smem_layout_b(
        LayoutEnum.ROW_MAJOR, (config.tile_m, config.piece, config.head_dim), dtype, 1
    )
    k, v = (make_tma(g2s, x, sPiece_layout, (config.piece, config.head_dim)) for x in (call.mK, call.mV))
    o = make_tma(s2g, call.mO, sO_layout, (16, config.head_dim))
    kernel(
        config,
        call.sizes,
        call.schedule,
        call.ragged,
        call.dropout,
        call.score,
        q,
        k,
        v,
        o,
        call.mO,
        call.mLSE,
        tiled_mma_qk,
        tiled_mma_pv,
        sQ_layout,
        sKV_layout,
    ).launch(
        grid=(cutlass.min(call.num_sms, num_tiles(config, call.sizes, call.ragged)), 1, 1),
        block=(128 + 128 * config.wgs, 1, 1),
        min_blocks_per_mp=1,
        stream=stream,
    )


def fake_arguments(config) -> tuple:
    numbers = arguments.dropout(config), Int32(1), Int32(1)
    return (*arguments.forward(config), *numbers, arguments.counter(), config, arguments.stream())
