"""Parts of the Hopper backward: shared memory, the load warp, the dQ warpgroup, what consumers do to S."""

from typing import NamedTuple

import cutlass
import cutlass.cute as cute
from cutlass import Boolean, Float32, Int32, const_expr
from cutlass.block import block_copy
from cutlass.cute.nvgpu import cpasync, warp, warpgroup

from mini_flash_attention.kernels.backward import scores
from mini_flash_attention.kernels.backward.schedule import (
    Block,
    Order,
    find_dense_block,
    pass_turn,
    turn,
    wait_turn,
)
from mini_flash_attention.kernels.calls import Dropout, Score
from mini_flash_attention.kernels.parts.arguments import element_type
from mini_flash_attention.kernels.parts.dropout import keep, mark_transposed
from mini_flash_attention.kernels.parts.fragments import (
    convert,
    rows_cols,
    store_rows,
    store_sequence,
    transposed,
)
from mini_flash_attention.kernels.parts.scores import LOG2_E, transform
from mini_flash_attention.kernels.parts.seqlen import Sizes
from mini_flash_attention.kernels.parts.sm90 import (
    Ring,
    Tma,
    commit,
    load,
    reduce_add,
    release,
    wgmma,
    zero_rows,
)

CONSUMER_WGS = 2
DQ_WARP, LOAD_WARP = 8, 12  # the first warps of the dQ WG and of the load WG
THREADS = 512
START, CONSUMERS, DQ_WG, WG = 0, 1, 2, 3  # named barriers; WG + wg: of one consumer WG


class Mmas(NamedTuple):
    sdp: cute.TiledMma  # Sᵀ = K·Qᵀ and dPᵀ = V·dOᵀ    (n, m, d)
    dkv: cute.TiledMma  # dV += Pᵀ·dO and dK += dSᵀ·Q  (n, d, m), A in registers
    dq: cute.TiledMma  # dQ = dS·K (m, d, n); if config.dq_transposed dQᵀ = Kᵀ·dSᵀ (d, m, n), A in registers


class Gradient(NamedTuple):
    """dK or dV in global memory."""

    tma: Tma
    tensor: cute.Tensor | None  # (B, Sk, Hkv, D), where it is stored from registers: not only by TMA


class Shared(NamedTuple):
    """Shared memory and the rings that guard it."""

    sQ: cute.Tensor  # (tile_m, d, stages), at the end dK
    sdO: cute.Tensor  # (tile_m, d, do_stages)
    sK: cute.Tensor  # (tile_n, d, kv_stages)
    sV: cute.Tensor  # (tile_n, d, kv_stages), at the end dV
    sdSt: cute.Tensor  # (tile_n, tile_m, 2)
    sdQ: cute.Tensor  # (rows * cols, 2) float32: pieces of dQ, in the order of convert.offset
    sStats: cute.Tensor  # (2 * tile_m, stages) float32: -LSE / scale, then -delta
    q_ring: Ring  # Q and stats
    do_ring: Ring
    k_ring: Ring  # one use for each tile that the thread block works on
    v_ring: Ring
    ds_ring: Ring  # filled by the consumers, emptied by the dQ WG
    sP: cute.Tensor | None  # (8, tile_m / 16, 128, 2), if config.wide: the registers of each thread
    p_ring: Ring | None
    sTile: cute.Tensor | None  # (2), if config.persistent: the number of the next tile
    tile_ring: Ring | None  # filled by the load warp, emptied by the warps of the other three WGs


class Call(NamedTuple):
    """What all thread blocks work on and with, but for shared memory."""

    sizes: Sizes
    order: Order | None  # of a dense batch
    num_tiles: Int32
    scale: Float32
    score: Score  # in_log2
    dropout: Dropout | None
    q: Tma
    k: Tma
    v: Tma
    do: Tma
    dk: Gradient
    dv: Gradient
    mStats: cute.Tensor
    mdQacc: cute.Tensor
    mTurns: cute.Tensor
    mmas: Mmas

    def block(self, config, tile: Int32) -> Block:
        """The tile of this number, of a dense batch."""
        return find_dense_block(config, self.sizes, self.order, tile)


@cute.jit
def draw_tile(c: Call, s: Shared, n: Int32) -> Int32:
    """The tile after the n-th of a persistent thread block, told to its other warps. By the load warp."""
    cute.arch.griddepcontrol_wait()  # bwd_delta has zeroed the counter
    s.tile_ring.wait_empty(n)
    drawn = Int32(0)
    if cute.arch.lane_idx() == 0:
        drawn = cute.arch.atomic_add(c.mTurns.iterator.llvm_ptr, Int32(1), sem="relaxed", scope="gpu")
    tile = cute.arch.grid_dim()[0] + cute.arch.shuffle_sync(drawn, 0)  # each has had its first
    if cute.arch.lane_idx() == 0:
        s.sTile[s.tile_ring.slot(n)] = tile
    commit(s.tile_ring, n, cute.arch.lane_idx())
    return cute.arch.make_warp_uniform(tile)


@cute.jit
def next_tile(s: Shared, n: Int32) -> Int32:
    """The tile after the n-th. By a warp of the other WGs."""
    s.tile_ring.wait_full(n)
    tile = s.sTile[s.tile_ring.slot(n)]
    cute.arch.sync_warp()  # all lanes have read it
    release(s.tile_ring, n, cute.arch.lane_idx())
    return cute.arch.make_warp_uniform(tile)


@cute.jit
def produce_tiles(config: cutlass.Constexpr, c: Call, s: Shared):
    """The load warp of a persistent thread block: the next tile is loaded while this one is worked on."""
    tile, n, it = cute.arch.block_idx()[0], Int32(0), Int32(0)
    while tile < c.num_tiles:
        it = produce(config, c, c.block(config, tile), s, n, it)
        tile = draw_tile(c, s, n)
        n += 1


@cute.jit
def produce(config: cutlass.Constexpr, c: Call, block: Block, s: Shared, n: Int32, it: Int32) -> Int32:
    """The load warp, for the n-th tile. K and Q come first: the first product needs only them.

    it, and what is returned: the number of query blocks before this tile, and with it.
    """
    copy_stats = cute.make_copy_atom(cpasync.CopyBulkG2SOp(), Float32)
    (q_batch, q_start), (k_batch, k_start) = block.q_rows, block.k_rows
    load(c.k, k_start, block.n_block, block.head_kv, k_batch, s.sK, s.k_ring, n)
    start = it
    for g in cutlass.range(c.sizes.group, unroll=1):
        head = block.head_kv * c.sizes.group + g
        for m_block in cutlass.range(block.first, block.last, unroll=1):
            load(c.q, q_start, m_block, head, q_batch, s.sQ, s.q_ring, it, more=8 * config.tile_m)
            if it == start:
                load(c.v, k_start, block.n_block, block.head_kv, k_batch, s.sV, s.v_ring, n)
                cute.arch.griddepcontrol_wait()  # stats are bwd_delta's
            slot = s.q_ring.slot(it)
            batch, number = block.place(m_block)
            gStats = c.mStats[batch, head, number, None, None]  # (tile_m, 2)
            gStats = cute.make_tensor(gStats.iterator, cute.make_layout(2 * config.tile_m))
            with cute.arch.elect_one():
                cute.copy(copy_stats, gStats, s.sStats[None, slot], mbar_ptr=s.q_ring.full + slot)
            load(c.do, q_start, m_block, head, q_batch, s.sdO, s.do_ring, it)
            it += 1
    if it == start:  # no query sees these keys; the consumers wait for V all the same
        load(c.v, k_start, block.n_block, block.head_kv, k_batch, s.sV, s.v_ring, n)
    return it


@cute.jit
def compute_dq_tiles(config: cutlass.Constexpr, c: Call, s: Shared):
    """A warp of the dQ WG of a persistent thread block."""
    tile, n, it = cute.arch.block_idx()[0], Int32(0), Int32(0)
    while tile < c.num_tiles:
        it = compute_dq(config, c, c.block(config, tile), s, n, it)
        release(s.k_ring, n, cute.arch.lane_idx())
        tile = next_tile(s, n)
        n += 1


@cute.jit
def compute_dq(config: cutlass.Constexpr, c: Call, block: Block, s: Shared, n: Int32, it: Int32) -> Int32:
    """A warp of the dQ WG: dQ = dS·K piece by piece, each added to dq_acc. n, it: as in produce."""
    tidx = cute.arch.thread_idx()[0] % 128
    lane = cute.arch.lane_idx()
    first_warp = cute.arch.make_warp_uniform(cute.arch.warp_idx()) == DQ_WARP
    rows, cols = config.dq_piece
    pieces = config.tile_m * config.head_dim // (rows * cols)
    tdQrdS, tdQrK = dq_operands(config, c.mmas.dq, s)
    shape = (cols, rows) if const_expr(config.dq_transposed) else (rows, cols)
    acc_dQ = cute.make_rmem_tensor(c.mmas.dq.get_slice(0).partition_shape_C(shape), Float32)
    cute.arch.griddepcontrol_wait()  # bwd_delta has zeroed dq_acc and turns
    s.k_ring.wait_full(n)
    k_slot = s.k_ring.slot(n)
    if const_expr(config.dq_transposed):
        if const_expr(config.ragged):
            clear_beyond(
                s.sK[None, None, 0], block.sizes(c.sizes).seqlen_k, block.n_block * config.tile_n, DQ_WG
            )
        load_Kt(c.mmas.dq, s, tdQrK, tidx, k_slot)
    before = c.mTurns.iterator  # of the tile of dq_acc that was added to last
    for g in cutlass.range(c.sizes.group, unroll=1):
        head = block.head_kv * c.sizes.group + g
        for m_block in cutlass.range(block.first, block.last, unroll=1):
            batch, number = block.place(m_block)
            s.ds_ring.wait_full(it)
            slot = s.ds_ring.slot(it)
            for p in cutlass.range_constexpr(pieces):
                dS = tdQrdS[p][None, None, None, slot]
                if const_expr(config.dq_transposed):
                    wgmma(c.mmas.dq, acc_dQ, tdQrK, dS, False)
                else:
                    wgmma(c.mmas.dq, acc_dQ, dS, tdQrK[p][None, None, None, k_slot], False)
                buffer = p % 2 if const_expr(pieces % 2 == 0) else (it + p) % 2
                if first_warp:
                    if const_expr(config.deterministic and p == 0):
                        cute.arch.cp_async_bulk_wait_group(0)  # the tile before has been added
                        if it > 0:
                            pass_turn(before)
                    else:
                        cute.arch.cp_async_bulk_wait_group(1, read=True)  # the piece before the last was read
                cute.arch.barrier(barrier_id=DQ_WG, number_of_threads=128)  # its buffer may be overwritten
                warpgroup.wait_group(0)  # dQ
                if const_expr(p == pieces - 1):
                    release(s.ds_ring, it, lane)
                sPiece = s.sdQ[None, buffer]
                if const_expr(config.dq_transposed):
                    store_dq_transposed(config, acc_dQ, sPiece, tidx)
                else:
                    store_dq(config, acc_dQ, sPiece, tidx)
                cute.arch.fence_view_async_shared()  # dQ: generic writes, read by the bulk reduction
                cute.arch.barrier(barrier_id=DQ_WG, number_of_threads=128)  # the piece is complete
                if first_warp:
                    if const_expr(config.deterministic and p == 0):
                        turns = cute.local_tile(c.mTurns[batch, head, None], (1,), (number,))
                        before = turns.iterator
                        wait_turn(before, turn(config, block.sizes(c.sizes), block.n_block, m_block))
                    gdQ = cute.local_tile(c.mdQacc[batch, head, number, None], (rows * cols,), (p,))
                    with cute.arch.elect_one():
                        reduce_add(sPiece, gdQ)
                    cute.arch.cp_async_bulk_commit_group()
            it += 1
    if const_expr(config.deterministic):
        if first_warp:
            cute.arch.cp_async_bulk_wait_group(0)  # the last tile has been added
            if it > 0:
                pass_turn(before)
    return it


def dq_operands(config, tiled_mma: cute.TiledMma, s: Shared) -> tuple:
    """Of each piece of dQ: A, of dS (MMA, 1, tile_n / 16, 2), and B, of K (MMA, 1, tile_n / 16, kv_stages).

    Transposed: B, of dS; and one A for all, as they are whole rows: Kᵀ (MMA, 1, tile_n / 16) in registers,
    which load_Kt fills.
    """
    rows, cols = config.dq_piece
    wg_mma = tiled_mma.get_slice(0)
    sdS, sKt = transposed(s.sdSt), transposed(s.sK)  # (tile_m, tile_n, 2), (d, tile_n, kv_stages)
    pieces = [
        divmod(p, config.head_dim // cols) for p in range(config.tile_m * config.head_dim // (rows * cols))
    ]
    dS = [cute.local_tile(sdS, (rows, config.tile_n, 2), (row, 0, 0)) for row, _ in pieces]
    if config.dq_transposed:
        tdQrK = tiled_mma.make_fragment_A(wg_mma.partition_shape_A((cols, config.tile_n)))
        return [wg_mma.make_fragment_B(wg_mma.partition_B(x)) for x in dS], tdQrK
    K = [cute.local_tile(sKt, (cols, config.tile_n, config.kv_stages), (col, 0, 0)) for _, col in pieces]
    tdQrdS = [wg_mma.make_fragment_A(wg_mma.partition_A(x)) for x in dS]
    return tdQrdS, [wg_mma.make_fragment_B(wg_mma.partition_B(x)) for x in K]


@cute.jit
def load_Kt(tiled_mma: cute.TiledMma, s: Shared, tdQrKt: cute.Tensor, tidx: Int32, slot: Int32):
    """Kᵀ (d, tile_n) to registers."""
    atom = cute.make_copy_atom(warp.LdMatrix8x8x16bOp(True, 4), s.sK.element_type)
    thr_load = cute.make_tiled_copy_A(atom, tiled_mma).get_slice(tidx)
    sKt = transposed(s.sK)[None, None, slot]  # (d, tile_n)
    cute.copy(atom, thr_load.partition_S(sKt), thr_load.retile(tdQrKt))


@cute.jit
def store_dq(config: cutlass.Constexpr, acc_dQ: cute.Tensor, sPiece: cute.Tensor, tidx: Int32):
    """A piece of dQ to shared memory, in the order of convert.offset: no two banks conflict."""
    _, cols = config.dq_piece
    row = tidx // 32 * 16 + tidx % 32 // 4  # this thread's rows: row, row + 8
    pairs = cute.make_layout((2, 2), stride=(1, 8 * cols))
    for g in cutlass.range_constexpr(cols // 8):
        at = cols * row + 2 * (tidx % 4) + 8 * (g % 4 ^ row % 4) + g // 4 * 32
        src = cute.make_tensor(acc_dQ.iterator + 4 * g, cute.make_layout((2, 2)))
        cute.autovec_copy(src, cute.make_tensor(sPiece.iterator + at, pairs))


@cute.jit
def store_dq_transposed(config: cutlass.Constexpr, acc_dQ: cute.Tensor, sPiece: cute.Tensor, tidx: Int32):
    """The same of dQᵀ: a thread has one column of each of two chunks, and of eight rows a pair."""
    rows, cols = config.dq_piece
    pair = tidx % 4
    for h in cutlass.range_constexpr(2):
        chunk = (tidx // 32 * 2 + h) ^ pair
        at = sPiece.iterator + (2 * cols * pair + 8 * chunk + tidx % 32 // 4)
        src = cute.make_tensor(acc_dQ.iterator + 2 * h, cute.make_layout((2, rows // 8), stride=(1, 4)))
        dst = cute.make_tensor(at, cute.make_layout((2, rows // 8), stride=(cols, 8 * cols)))
        cute.autovec_copy(src, dst)


def thread_stats(config, s: Shared, lane: Int32) -> cute.Tensor:
    """This thread's columns of sStats: ((2, tile_m / 8), 2, stages)."""
    shape, m = ((2, config.tile_m // 8), 2, config.stages), config.tile_m
    return cute.make_tensor(
        s.sStats.iterator + 2 * (lane % 4), cute.make_layout(shape, stride=((1, 8), m, 2 * m))
    )


@cute.jit
def clear_beyond(sX: cute.Tensor, rows: Int32, first: Int32, barrier_id):
    """Zero the rows of a tile (rows, d) that lie beyond the end of the sequence; first: the tile's own first.

    They are other sequences' or nobody's, perhaps NaN, and 0 · NaN is NaN. Each WG that reads a tile does
    this for itself: all write the same zeros.
    """
    left = cutlass.max(rows - first, 0)
    if left < cute.size(sX, mode=[0]):
        zero_rows(sX, left, cute.arch.thread_idx()[0] % 128, barrier_id)


@cute.jit
def clear_queries(config: cutlass.Constexpr, sizes: Sizes, s: Shared, it: Int32, m_block: Int32, barrier_id):
    """The same for the last block of Q and dO of a sequence."""
    if (m_block + 1) * config.tile_m > sizes.seqlen_q:
        first = m_block * config.tile_m
        s.q_ring.wait_full(it)
        clear_beyond(s.sQ[None, None, s.q_ring.slot(it)], sizes.seqlen_q, first, barrier_id)
        s.do_ring.wait_full(it)
        clear_beyond(s.sdO[None, None, s.do_ring.slot(it)], sizes.seqlen_q, first, barrier_id)


@cute.jit
def mask(config: cutlass.Constexpr, sizes: Sizes, acc_S: cute.Tensor, key: Int32, query: Int32):
    """acc_S <- -inf where a query may not see a key; key, query: this thread's first row and column.

    Keys from seqlen_k on are zeros, whose P = exp(-LSE) may be infinite.
    """
    S = rows_cols(acc_S)
    left, right = sizes.window(config.mask)
    for r in cutlass.range_constexpr(cute.size(S, mode=[0])):
        key_r = key + 8 * r
        # The column on whose diagonal the key lies.
        diagonal = key_r + sizes.seqlen_q - sizes.seqlen_k - query
        begin = Int32(0) if const_expr(right is None) else diagonal - right
        begin = begin if key_r < sizes.seqlen_k else Int32(config.tile_m)
        for c in cutlass.range_constexpr(cute.size(S, mode=[1])):
            S[r, c] = S[r, c] if (c // 2) * 8 + c % 2 >= begin else -Float32.inf
        if const_expr(left is not None):
            for c in cutlass.range_constexpr(cute.size(S, mode=[1])):
                S[r, c] = S[r, c] if (c // 2) * 8 + c % 2 <= diagonal + left else -Float32.inf


class Scores(NamedTuple):
    """What becomes of K·Qᵀ in a thread's two rows (keys), in log2 units; see scores.py, dropout.py."""

    score: Score  # in_log2
    dropout: Dropout | None
    slopes: cute.Tensor  # (2): the head's
    batch_head: cute.Tensor  # (1): the head's number in the batch


def make_scores(score: Score, dropout: Dropout | None) -> Scores:
    of_head = cute.make_rmem_tensor(2, Float32), cute.make_rmem_tensor(1, Int32)
    return Scores(score, dropout, *of_head)


@cute.jit
def set_head(config: cutlass.Constexpr, sizes: Sizes, scores: Scores, batch: Int32, head: Int32):
    """The rows are of this head from now on."""
    if const_expr("alibi" in config.score):
        scores.slopes.fill(scores.score.slopes[batch, head] * Float32(LOG2_E))
    if const_expr(config.dropout):
        scores.batch_head[0] = batch * sizes.heads + head


@cute.jit
def issue_S(
    config: cutlass.Constexpr,
    tiled_mma: cute.TiledMma,
    acc_S: cute.Tensor,
    tSrK: cute.Tensor,
    tSrQ: cute.Tensor,
    stat: cute.Tensor,
):
    """acc_S = K·Qᵀ; plain scores come out with the LSE subtracted."""
    if const_expr(config.score == "plain"):
        scores.seed(acc_S, stat)
    wgmma(tiled_mma, acc_S, tSrK, tSrQ, config.score == "plain")


@cute.jit
def probabilities(
    config: cutlass.Constexpr,
    sizes: Sizes,
    scores: Scores,
    acc_S: cute.Tensor,
    stat: cute.Tensor,
    key: Int32,
    query: Int32,
    masked: Boolean,
    acc_F: cute.Tensor | None,
):
    """acc_S <- P; with a softcap, acc_F <- P times its derivative.

    stat: as in issue_S. key, query: this thread's first row and column.
    """
    distances = cute.make_rmem_tensor(2, Int32)
    for r in cutlass.range_constexpr(2):
        distances[r] = key + 8 * r + sizes.seqlen_q - sizes.seqlen_k - query
    transform(config, scores.score, rows_cols(acc_S), scores.slopes, distances)
    if masked:
        mask(config, sizes, acc_S, key, query)
    if const_expr(config.score == "plain"):
        for i in cutlass.range_constexpr(cute.size(acc_S)):
            acc_S[i] = cute.math.exp2(acc_S[i] * scores.score.scale, fastmath=True)
    else:
        scores.exponentials(config, scores.score, acc_S, stat, scores.slopes, distances, acc_F)


@cute.jit
def factors(
    config: cutlass.Constexpr,
    scores: Scores,
    acc_S: cute.Tensor,
    acc_F: cute.Tensor | None,
    key: Int32,
    query: Int32,
):
    """In 16 bits: P, without what is dropped, and what dS takes in its place, negative where dropped."""
    P = cute.make_rmem_tensor(acc_S.layout, element_type(config))
    convert(acc_S, P)
    F = P
    if const_expr("softcap" in config.score):
        F = cute.make_rmem_tensor(acc_F.layout, element_type(config))
        convert(acc_F, F)
    if const_expr(config.dropout):
        mark_transposed(scores.dropout, P, (key,), query, scores.batch_head[0])
        if const_expr("softcap" in config.score):
            scores.copy_marks(P, F)
        kept = cute.make_rmem_tensor(acc_S.layout, element_type(config))
        keep(P, kept)
        P = kept
    return P, F


@cute.jit
def issue_dP(
    config: cutlass.Constexpr,
    tiled_mma: cute.TiledMma,
    acc_dP: cute.Tensor,
    tdPrV: cute.Tensor,
    tdPrdO: cute.Tensor,
    stat: cute.Tensor,
):
    """acc_dP = V·dOᵀ, with delta subtracted where nothing is dropped before."""
    if const_expr(not config.dropout):
        scores.seed(acc_dP, stat)
    wgmma(tiled_mma, acc_dP, tdPrV, tdPrdO, not config.dropout)


@cute.jit
def finish_dS(
    config: cutlass.Constexpr, dropout: Dropout | None, acc_dP: cute.Tensor, F: cute.Tensor, stat: cute.Tensor
):
    """acc_dP <- dS. stat: as in issue_dP."""
    if const_expr(config.dropout):
        scores.finish_dS(config, dropout, acc_dP, F, stat)
    else:
        factor = widen(F)
        for i in cutlass.range_constexpr(cute.size(acc_dP)):
            acc_dP[i] = acc_dP[i] * factor[i]


@cute.jit
def widen(X: cute.Tensor) -> cute.Tensor:
    """X in float32. By hand for bfloat16, whose odd elements take the compiler two instructions."""
    out = cute.make_rmem_tensor(X.layout, Float32)
    if const_expr(X.element_type is cutlass.BFloat16):
        pairs, bits = cute.recast_tensor(X, Int32), cute.recast_tensor(out, Int32)
        for i in cutlass.range_constexpr(cute.size(pairs)):
            bits[2 * i], bits[2 * i + 1] = pairs[i] << 16, pairs[i] & Int32(-65536)
    else:
        out.store(X.load().to(Float32))
    return out


@cute.jit
def hand_over(s: Shared, w, it: Int32, dS: cute.Tensor):
    """This warp's 16 keys of dS, to the dQ WG; w.store_dS and w.tdSsdS say where."""
    cute.copy(w.store_dS, w.store_dS.retile(dS), w.tdSsdS[None, None, None, s.ds_ring.slot(it)])
    cute.arch.fence_view_async_shared()  # generic writes, read by wgmma
    cute.arch.sync_warp()  # all lanes have done so
    commit(s.ds_ring, it, w.lane)


def store_tile(config, block: Block, x: Gradient, sX: cute.Tensor):
    """Start copying a tile (tile_n, d) of a gradient from shared memory. By a warp."""
    batch, start = block.k_rows
    gX = cute.domain_offset((start, 0), x.tma.tensor[None, None, block.head_kv, batch])  # (sk, D)
    gX = cute.local_tile(gX, (config.tile_n, config.head_dim), (block.n_block, 0))
    block_copy(x.tma.atom, cute.group_modes(sX, 0, 2), cute.group_modes(gX, 0, 2))


@cute.jit
def store_rows_of(config: cutlass.Constexpr, block: Block, acc: cute.Tensor, x: Gradient, tidx: Int32):
    """Store a thread's part of a gradient, ((2, 2, d / 8), 1, 1): the rows that are its sequence's."""
    out = cute.make_rmem_tensor(acc.layout, x.tensor.element_type)
    convert(acc, out)
    rows = cute.make_rmem_tensor(2, Int32)
    for r in cutlass.range_constexpr(2):
        rows[r] = block.n_block * config.tile_n + tidx // 32 * 16 + tidx % 32 // 4 + 8 * r
    batch, start = block.k_rows
    gX = x.tensor[batch, None, block.head_kv, None]  # (sk, D)
    if const_expr(config.ragged):
        store_sequence(out, gX, rows, start, block.sequence.room, tidx % 32)
    else:
        store_rows(out, gX, rows, tidx % 32)
