"""Parts of the Hopper backward: shared memory, the load warp, the dQ warpgroup, what consumers do to S."""

from typing import NamedTuple

import cutlass
import cutlass.cute as cute
from cutlass import Boolean, Float32, Int32, const_expr
from cutlass.block import block_copy
from cutlass.cute.nvgpu import cpasync, warpgroup

from mini_flash_attention.kernels.arguments import element_type
from mini_flash_attention.kernels.bwd_schedule import Block, pass_turn, turn, wait_turn
from mini_flash_attention.kernels.dropout import SIGNS, Dropout, keep, mark_transposed
from mini_flash_attention.kernels.fragments import convert, rows_cols, store_sequence
from mini_flash_attention.kernels.scores import LOG2_E, Score, derivative, transform
from mini_flash_attention.kernels.seqlen import Sizes
from mini_flash_attention.kernels.sm90 import Ring, Tma, commit, load, reduce_add, release, wgmma, zero_rows

CONSUMER_WGS = 2
DQ_WARP, LOAD_WARP = 8, 12  # the first warps of the dQ WG and of the load WG
THREADS = 512
CONSUMERS, DQ_WG, WG = 1, 2, 3  # named barriers; WG + wg: of one consumer WG


class Mmas(NamedTuple):
    sdp: cute.TiledMma  # Sᵀ = K·Qᵀ and dPᵀ = V·dOᵀ    (n, m, d)
    dkv: cute.TiledMma  # dV += Pᵀ·dO and dK += dSᵀ·Q  (n, d, m), A in registers
    dq: cute.TiledMma  # dQ = dS·K                     (m, d, n)


class Gradient(NamedTuple):
    """dK or dV in global memory."""

    tma: Tma
    tensor: cute.Tensor | None  # (B, Sk, Hkv, D), where tiles may have to be stored in part: ragged batches


class Shared(NamedTuple):
    """Shared memory and the rings that guard it."""

    sQ: cute.Tensor  # (tile_m, d, stages), at the end dK
    sdO: cute.Tensor  # (tile_m, d, do_stages)
    sK: cute.Tensor  # (tile_n, d, 1)
    sV: cute.Tensor  # (tile_n, d, 1), at the end dV
    sdSt: cute.Tensor  # (tile_n, tile_m, 2)
    sdQ: cute.Tensor  # (rows * cols, 2) float32: pieces of dQ, in the order of bwd_convert.offset
    sStats: cute.Tensor  # (2 * tile_m, stages) float32: -LSE / scale, then -delta
    q_ring: Ring  # Q and stats
    do_ring: Ring
    k_ring: Ring  # one use
    v_ring: Ring  # one use
    ds_ring: Ring  # filled by the consumers, emptied by the dQ WG
    sP: cute.Tensor | None  # (8, tile_m / 16, 128, 2), if config.wide: the registers of each thread
    p_ring: Ring | None


def transposed(sX: cute.Tensor) -> cute.Tensor:
    """The same memory, with the first two modes exchanged."""
    return cute.make_tensor(sX.iterator, cute.select(sX.layout, mode=[1, 0, *range(2, cute.rank(sX))]))


@cute.jit
def produce(
    config: cutlass.Constexpr,
    sizes: Sizes,
    block: Block,
    q: Tma,
    k: Tma,
    v: Tma,
    do: Tma,
    mStats: cute.Tensor,
    s: Shared,
):
    """The load warp. K and Q come first: the first product needs only them."""
    copy_stats = cute.make_copy_atom(cpasync.CopyBulkG2SOp(), Float32)
    (q_batch, q_start), (k_batch, k_start) = block.q_rows, block.k_rows
    load(k, k_start, block.n_block, block.head_kv, k_batch, s.sK, s.k_ring, Int32(0))
    it = Int32(0)
    for g in cutlass.range(sizes.group, unroll=1):
        head = block.head_kv * sizes.group + g
        for m_block in cutlass.range(block.first, block.last, unroll=1):
            load(q, q_start, m_block, head, q_batch, s.sQ, s.q_ring, it, more=8 * config.tile_m)
            if it == 0:
                load(v, k_start, block.n_block, block.head_kv, k_batch, s.sV, s.v_ring, Int32(0))
                cute.arch.griddepcontrol_wait()  # stats are bwd_delta's
            slot = s.q_ring.slot(it)
            batch, number = block.place(m_block)
            gStats = mStats[batch, head, number, None, None]  # (tile_m, 2)
            gStats = cute.make_tensor(gStats.iterator, cute.make_layout(2 * config.tile_m))
            with cute.arch.elect_one():
                cute.copy(copy_stats, gStats, s.sStats[None, slot], mbar_ptr=s.q_ring.full + slot)
            load(do, q_start, m_block, head, q_batch, s.sdO, s.do_ring, it)
            it += 1
    if it == 0:  # no query sees these keys; the consumers wait for V all the same
        load(v, k_start, block.n_block, block.head_kv, k_batch, s.sV, s.v_ring, Int32(0))


@cute.jit
def compute_dq(
    config: cutlass.Constexpr,
    sizes: Sizes,
    block: Block,
    tiled_mma: cute.TiledMma,
    mdQacc: cute.Tensor,
    mTurns: cute.Tensor,
    s: Shared,
):
    """A warp of the dQ WG: dQ = dS·K piece by piece, each added to dq_acc."""
    tidx = cute.arch.thread_idx()[0] % 128
    lane = cute.arch.lane_idx()
    first_warp = cute.arch.make_warp_uniform(cute.arch.warp_idx()) == DQ_WARP
    rows, cols = config.dq_piece
    pieces = config.tile_m * config.head_dim // (rows * cols)
    tdQrdS, tdQrK = dq_operands(config, tiled_mma, s)
    acc_dQ = cute.make_rmem_tensor(tiled_mma.get_slice(0).partition_shape_C((rows, cols)), Float32)
    cute.arch.griddepcontrol_wait()  # bwd_delta has zeroed dq_acc and turns
    s.k_ring.wait_full(Int32(0))
    it = Int32(0)
    before = mTurns.iterator  # of the tile of dq_acc that was added to last
    for g in cutlass.range(sizes.group, unroll=1):
        head = block.head_kv * sizes.group + g
        for m_block in cutlass.range(block.first, block.last, unroll=1):
            batch, number = block.place(m_block)
            s.ds_ring.wait_full(it)
            slot = s.ds_ring.slot(it)
            for p in cutlass.range_constexpr(pieces):
                wgmma(tiled_mma, acc_dQ, tdQrdS[p][None, None, None, slot], tdQrK[p], False)
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
                store_dq(config, acc_dQ, sPiece, tidx)
                cute.arch.fence_view_async_shared()  # dQ: generic writes, read by the bulk reduction
                cute.arch.barrier(barrier_id=DQ_WG, number_of_threads=128)  # the piece is complete
                if first_warp:
                    if const_expr(config.deterministic and p == 0):
                        turns = cute.local_tile(mTurns[batch, head, None], (1,), (number,))
                        before = turns.iterator
                        wait_turn(before, turn(config, sizes, block.n_block, m_block))
                    gdQ = cute.local_tile(mdQacc[batch, head, number, None], (rows * cols,), (p,))
                    with cute.arch.elect_one():
                        reduce_add(sPiece, gdQ)
                    cute.arch.cp_async_bulk_commit_group()
            it += 1
    if first_warp:
        cute.arch.cp_async_bulk_wait_group(0)  # all has been added; shared memory is no longer read
        if const_expr(config.deterministic):
            if it > 0:
                pass_turn(before)


def dq_operands(config, tiled_mma: cute.TiledMma, s: Shared) -> tuple[list[cute.Tensor], list[cute.Tensor]]:
    """A, of dS (MMA, 1, tile_n / 16, 2), and B, of K (MMA, 1, tile_n / 16), of each piece of dQ."""
    rows, cols = config.dq_piece
    wg_mma = tiled_mma.get_slice(0)
    sdS, sKt = transposed(s.sdSt), transposed(s.sK)[None, None, 0]  # (tile_m, tile_n, 2), (d, tile_n)
    tdQrdS, tdQrK = [], []
    for p in range(config.tile_m * config.head_dim // (rows * cols)):
        row, col = divmod(p, config.head_dim // cols)
        A = cute.local_tile(sdS, (rows, config.tile_n, 2), (row, 0, 0))
        B = cute.local_tile(sKt, (cols, config.tile_n), (col, 0))
        tdQrdS.append(wg_mma.make_fragment_A(wg_mma.partition_A(A)))
        tdQrK.append(wg_mma.make_fragment_B(wg_mma.partition_B(B)))
    return tdQrdS, tdQrK


@cute.jit
def store_dq(config: cutlass.Constexpr, acc_dQ: cute.Tensor, sPiece: cute.Tensor, tidx: Int32):
    """A piece of dQ to shared memory, in the order of bwd_convert.offset: no two banks conflict."""
    _, cols = config.dq_piece
    row = tidx // 32 * 16 + tidx % 32 // 4  # this thread's rows: row, row + 8
    pairs = cute.make_layout((2, 2), stride=(1, 8 * cols))
    for g in cutlass.range_constexpr(cols // 8):
        at = cols * row + 2 * (tidx % 4) + 8 * (g % 4 ^ row % 4) + g // 4 * 32
        src = cute.make_tensor(acc_dQ.iterator + 4 * g, cute.make_layout((2, 2)))
        cute.autovec_copy(src, cute.make_tensor(sPiece.iterator + at, pairs))


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
def seed(acc: cute.Tensor, stat: cute.Tensor):
    """acc[row, col] = stat[col]: the product comes out with the statistic of its query subtracted."""
    X = rows_cols(acc)
    values = cute.make_rmem_tensor(stat.shape, Float32)
    cute.autovec_copy(stat, values)
    for c in cutlass.range_constexpr(cute.size(X, mode=[1])):
        for r in cutlass.range_constexpr(cute.size(X, mode=[0])):
            X[r, c] = values[c]


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
        seed(acc_S, stat)
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
        S, values = rows_cols(acc_S), cute.make_rmem_tensor(stat.shape, Float32)
        cute.autovec_copy(stat, values)
        for c in cutlass.range_constexpr(cute.size(S, mode=[1])):
            for r in cutlass.range_constexpr(cute.size(S, mode=[0])):
                P = cute.math.exp2(S[r, c] + values[c], fastmath=True)
                if const_expr("softcap" in config.score):
                    bias = Float32(0.0)
                    if const_expr("alibi" in config.score):
                        distance = Float32(distances[r]) - Float32((c // 2) * 8 + c % 2)
                        bias = scores.slopes[r] * cute.arch.fmax(distance, -distance)
                    rows_cols(acc_F)[r, c] = P * derivative(config, scores.score, S[r, c], bias)
                S[r, c] = P


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
            copy_marks(P, F)
        kept = cute.make_rmem_tensor(acc_S.layout, element_type(config))
        keep(P, kept)
        P = kept
    return P, F


@cute.jit
def copy_marks(P: cute.Tensor, F: cute.Tensor):
    """F <- -F where P is negative; in pairs."""
    marked, pairs = cute.recast_tensor(P, Int32), cute.recast_tensor(F, Int32)
    for i in cutlass.range_constexpr(cute.size(pairs)):
        pairs[i] = pairs[i] | marked[i] & Int32(SIGNS)


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
        seed(acc_dP, stat)
    wgmma(tiled_mma, acc_dP, tdPrV, tdPrdO, not config.dropout)


@cute.jit
def finish_dS(
    config: cutlass.Constexpr, dropout: Dropout | None, acc_dP: cute.Tensor, F: cute.Tensor, stat: cute.Tensor
):
    """acc_dP <- dS. stat: as in issue_dP."""
    if const_expr(config.dropout):
        dP, f = rows_cols(acc_dP), rows_cols(F)
        values = cute.make_rmem_tensor(stat.shape, Float32)
        cute.autovec_copy(stat, values)
        for c in cutlass.range_constexpr(cute.size(dP, mode=[1])):
            for r in cutlass.range_constexpr(cute.size(dP, mode=[0])):
                factor = f[r, c].to(Float32)
                kept = dP[r, c] * dropout.rescale + values[c]
                dP[r, c] = factor * kept if factor >= 0.0 else -factor * values[c]
    else:
        acc_dP.store(F.load().to(Float32) * acc_dP.load())


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
    """Store a thread's part of a gradient, ((2, 2, d / 8), 1, 1), without the rows of the next sequence."""
    out = cute.make_rmem_tensor(acc.layout, x.tensor.element_type)
    convert(acc, out)
    rows = cute.make_rmem_tensor(2, Int32)
    for r in cutlass.range_constexpr(2):
        rows[r] = block.n_block * config.tile_n + tidx // 32 * 16 + tidx % 32 // 4 + 8 * r
    batch, start = block.k_rows
    gX = x.tensor[batch, None, block.head_kv, None]  # (sk, D)
    store_sequence(out, gX, rows, start, block.sequence.room, tidx % 32)
