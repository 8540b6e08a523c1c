"""FlashAttention backward for Hopper: a thread block for a block of 128 keys, four warpgroups (WGs).

q, o, do, dq (B, Sq, Hq, D); k, v, dk, dv (B, Sk, Hkv, D); lse (B, Hq, Sq) float32; float16 or bfloat16, any
strides with a unit last one. Three kernels: bwd_delta prepares the rows' statistics, this one does the work,
bwd_convert rounds dQ.

A thread block keeps its keys' dK and dV in registers and walks the query blocks that see them, for all query
heads of the group. Two consumer WGs own 64 keys each: Sᵀ = K·Qᵀ and dPᵀ = V·dOᵀ are (keys, queries) tiles, so
that Pᵀ and dSᵀ are born in registers as the A operands of dV += Pᵀ·dO and dK += dSᵀ·Q. dS goes through shared
memory to the third WG, which computes dQ = dS·K and adds it to dq_acc in global memory. The fourth loads. The
consumers never wait for each other: they drift apart until the exponentials of one run under the products of
the other.
"""

from typing import NamedTuple

import cutlass
import cutlass.cute as cute
import cutlass.utils.hopper_helpers as hopper
from cutlass import Boolean, Float32, Int32, const_expr
from cutlass.cute.nvgpu import OperandMajorMode, cpasync, warp, warpgroup
from cutlass.memory import SmemAllocator
from cutlass.tensor_utils import LayoutEnum

from mini_flash_attention.kernels.backward import convert as convert_dq
from mini_flash_attention.kernels.backward import delta, sm90_wide
from mini_flash_attention.kernels.backward.schedule import (
    Block,
    Order,
    find_block,
    find_dense_block,
    find_order,
    find_swath,
    num_blocks,
)
from mini_flash_attention.kernels.backward.sm90_parts import (
    CONSUMER_WGS,
    CONSUMERS,
    DQ_WARP,
    LOAD_WARP,
    START,
    THREADS,
    WG,
    Call,
    Gradient,
    Mmas,
    Scores,
    Shared,
    clear_beyond,
    clear_queries,
    compute_dq,
    compute_dq_tiles,
    factors,
    finish_dS,
    hand_over,
    issue_dP,
    issue_S,
    make_scores,
    next_tile,
    probabilities,
    produce,
    produce_tiles,
    set_head,
    store_rows_of,
    store_tile,
    thread_stats,
)
from mini_flash_attention.kernels.calls import Backward, Dropout, Ragged, Score
from mini_flash_attention.kernels.parts import arguments
from mini_flash_attention.kernels.parts.blocks import query_blocks, unmasked_queries
from mini_flash_attention.kernels.parts.fragments import as_operand_A, convert, transposed
from mini_flash_attention.kernels.parts.scores import in_log2
from mini_flash_attention.kernels.parts.seqlen import Sizes, sizes_of
from mini_flash_attention.kernels.parts.sm90 import Tma, init_rings, make_ring, make_tma, release, wgmma


class Work(NamedTuple):
    """What one consumer warp computes with."""

    wg: Int32
    lane: Int32
    tidx: Int32
    mmas: Mmas
    tSrK: cute.Tensor  # A of K·Qᵀ: descriptors (MMA, 1, d / 16, kv_stages)
    tSrQ: cute.Tensor  # B: descriptors (MMA, 1, d / 16, stages)
    tdPrV: cute.Tensor  # A of V·dOᵀ: descriptors (MMA, 1, d / 16, kv_stages)
    tdPrdO: cute.Tensor  # B: descriptors (MMA, 1, d / 16, do_stages)
    tdVrdO: cute.Tensor  # B of Pᵀ·dO: descriptors (MMA, 1, tile_m / 16, do_stages)
    tdKrQ: cute.Tensor  # B of dSᵀ·Q: descriptors (MMA, 1, tile_m / 16, stages)
    acc_S: cute.Tensor  # ((2, 2, tile_m / 8), 1, 1): rows are keys, columns queries
    acc_dP: cute.Tensor
    acc_dV: cute.Tensor  # ((2, 2, d / 8), 1, 1)
    acc_dK: cute.Tensor
    stats: cute.Tensor  # this thread's columns of sStats: ((2, tile_m / 8), 2, stages)
    store_dS: cute.TiledCopy
    tdSsdS: cute.Tensor  # (COPY, 1, tile_m / 16, 2)
    scores: Scores


@cute.jit
def step(
    config: cutlass.Constexpr,
    sizes: Sizes,
    s: Shared,
    w: Work,
    it: Int32,
    key: Int32,
    query: Int32,
    masked: Boolean,
):
    """One query block: dV and dK grow, dS goes to the dQ WG. The other WG's products run under all this.

    w: with the keys' tSrK and tdPrV.
    """
    slot, do_slot = s.q_ring.slot(it), s.do_ring.slot(it)
    s.q_ring.wait_full(it)
    s.ds_ring.wait_empty(it)  # dS of two blocks ago is read; not later: a wait under a wgmma costs registers
    stat = w.stats[None, 0, slot]
    issue_S(config, w.mmas.sdp, w.acc_S, w.tSrK, w.tSrQ[None, None, None, slot], stat)
    warpgroup.wait_group(0)  # S
    acc_F = cute.make_rmem_tensor(w.acc_S.layout, Float32) if const_expr(config.factored) else None
    probabilities(config, sizes, w.scores, w.acc_S, stat, key, query, masked, acc_F)
    P, F = factors(config, w.scores, w.acc_S, acc_F, key, query)
    if const_expr(config.factored):
        put_factor(s, w, it, F)
    s.do_ring.wait_full(it)
    stat = w.stats[None, 1, slot]
    issue_dP(config, w.mmas.sdp, w.acc_dP, w.tdPrV, w.tdPrdO[None, None, None, do_slot], stat)
    wgmma(w.mmas.dkv, w.acc_dV, as_operand_A(P), w.tdVrdO[None, None, None, do_slot], True)
    warpgroup.wait_group(1)  # dP; dV runs on
    # From the rounded P: the float32 one's registers are gone.
    F = take_factor(s, w, it) if const_expr(config.factored) else P
    finish_dS(config, w.scores.dropout, w.acc_dP, F, stat)
    dS = cute.make_rmem_tensor(w.acc_dP.layout, s.sQ.element_type)
    convert(w.acc_dP, dS)
    wgmma(w.mmas.dkv, w.acc_dK, as_operand_A(dS), w.tdKrQ[None, None, None, slot], True)
    hand_over(s, w, it, dS)  # under dK's product
    warpgroup.wait_group(1)  # dV: dO may be overwritten
    release(s.do_ring, it, w.lane)
    warpgroup.wait_group(0)  # dK: Q and stats may be overwritten
    release(s.q_ring, it, w.lane)


@cute.jit
def put_factor(s: Shared, w: Work, it: Int32, F: cute.Tensor):
    """What dS takes in P's place waits in dS's slot: there are no registers for it."""
    cute.copy(w.store_dS, w.store_dS.retile(F), w.tdSsdS[None, None, None, s.ds_ring.slot(it)])


@cute.jit
def take_factor(s: Shared, w: Work, it: Int32) -> cute.Tensor:
    F = cute.make_rmem_tensor(w.acc_dP.layout, s.sQ.element_type)
    atom = cute.make_copy_atom(warp.LdMatrix8x8x16bOp(False, 4), s.sQ.element_type)
    load_F = cute.make_tiled_copy_C(atom, w.mmas.sdp).get_slice(w.tidx)
    cute.arch.sync_warp()  # all lanes have put theirs
    cute.copy(atom, load_F.partition_S(s.sdSt)[None, None, None, s.ds_ring.slot(it)], load_F.retile(F))
    cute.arch.sync_warp()  # all lanes have taken theirs: dS may come
    return F


@cute.jit
def skip(s: Shared, w: Work, it: Int32):
    """A query block that sees none of this WG's keys: its dS is zero."""
    dS = cute.make_rmem_tensor(w.acc_dP.layout, s.sQ.element_type)
    dS.fill(0.0)
    s.q_ring.wait_full(it)  # a slot is not released before it was filled: rounds do not overtake each other
    s.do_ring.wait_full(it)
    s.ds_ring.wait_empty(it)
    hand_over(s, w, it, dS)
    release(s.do_ring, it, w.lane)
    release(s.q_ring, it, w.lane)


@cute.jit
def consume_tiles(config: cutlass.Constexpr, c: Call, s: Shared, w: Work):
    """A consumer warp of a persistent thread block."""
    tile, n, it = cute.arch.block_idx()[0], Int32(0), Int32(0)
    while tile < c.num_tiles:
        it = consume(config, c, c.block(config, tile), s, w, n, it)
        tile = next_tile(s, n)
        n += 1


@cute.jit
def consume(
    config: cutlass.Constexpr, c: Call, block: Block, s: Shared, w: Work, n: Int32, it: Int32
) -> Int32:
    """A consumer warp, for the n-th tile. it, and what is returned: as in produce."""
    sizes = block.sizes(c.sizes)
    kv_slot = s.k_ring.slot(n)
    w = w._replace(tSrK=w.tSrK[None, None, None, kv_slot], tdPrV=w.tdPrV[None, None, None, kv_slot])
    w.acc_dV.fill(0.0)
    w.acc_dK.fill(0.0)
    lengths = config.tile_m, 64, sizes.seqlen_q, sizes.seqlen_k
    half = CONSUMER_WGS * block.n_block + w.wg  # this WG's block of 64 keys
    first, last = block.first, block.last
    if const_expr(config.mask != "full"):
        first, last = query_blocks(half, *lengths, *sizes.window(config.mask))
        if const_expr(config.ragged):  # there may be rows of k without a key in all of the thread block
            last = cutlass.min(last, block.last)
            first = cutlass.min(first, last)
    free_first, free_last = unmasked_queries(half, *lengths, *sizes.window(config.mask))
    key = half * 64 + w.tidx % 128 // 32 * 16 + w.lane // 4
    s.k_ring.wait_full(n)
    s.v_ring.wait_full(n)
    if const_expr(config.ragged):
        for sX in (s.sK, s.sV):
            sX = cute.local_tile(sX[None, None, 0], (64, config.head_dim), (w.wg, 0))
            clear_beyond(sX, sizes.seqlen_k, 64 * half, WG + w.wg)
    for g in cutlass.range(sizes.group, unroll=1):
        set_head(config, sizes, w.scores, block.batch, block.head_kv * sizes.group + g)
        for _ in cutlass.range(first - block.first, unroll=1):
            skip(s, w, it)
            it += 1
        for m_block in cutlass.range(first, last, unroll=1):
            masked = m_block >= free_last
            if const_expr(config.mask != "full"):
                masked = masked | (m_block < free_first)
            query = m_block * config.tile_m + 2 * (w.lane % 4)
            if const_expr(config.ragged):
                clear_queries(config, sizes, s, it, m_block, WG + w.wg)
            step(config, sizes, s, w, it, key, query, masked)
            it += 1
        for _ in cutlass.range(block.last - last, unroll=1):
            skip(s, w, it)
            it += 1
    for i in cutlass.range_constexpr(cute.size(w.acc_dK)):
        w.acc_dK[i] = w.acc_dK[i] * c.scale
        if const_expr(config.dropout):
            w.acc_dV[i] = w.acc_dV[i] * w.scores.dropout.rescale
    if const_expr(config.persistent):  # the next tile's keys and queries take no notice of this one's end
        release(s.k_ring, n, w.lane)
        release(s.v_ring, n, w.lane)
        store_rows_of(config, block, w.acc_dV, c.dv, w.tidx)
        store_rows_of(config, block, w.acc_dK, c.dk, w.tidx)
    else:
        store(config, block, s, w, c.dk, c.dv)
    return it


@cute.jit
def store(config: cutlass.Constexpr, block: Block, s: Shared, w: Work, dk: Gradient, dv: Gradient):
    """dV through V's shared memory, dK through Q's: the dQ WG may still be reading K."""
    if const_expr(not config.ragged):  # noqa: SIM114, only one of the conditions is known to the compiler
        store_bulk(config, block, s, w, dk, dv)
    elif (block.n_block + 1) * config.tile_n <= block.sequence.room:
        store_bulk(config, block, s, w, dk, dv)
    else:  # the next sequence's rows follow
        store_rows_of(config, block, w.acc_dV, dv, w.tidx)
        store_rows_of(config, block, w.acc_dK, dk, w.tidx)


@cute.jit
def store_bulk(config: cutlass.Constexpr, block: Block, s: Shared, w: Work, dk: Gradient, dv: Gradient):
    dtype = s.sQ.element_type
    sdV = s.sV[None, None, 0]  # (tile_n, d)
    sdK = cute.make_tensor(s.sQ.iterator, sdV.layout)  # (tile_n, d)
    atom = cute.make_copy_atom(warp.StMatrix8x8x16bOp(False, 4), dtype)
    thr_store = cute.make_tiled_copy_C(atom, w.mmas.dkv).get_slice(w.tidx)
    cute.arch.barrier(barrier_id=CONSUMERS, number_of_threads=256)  # both WGs are done with V and Q
    for acc, sX in ((w.acc_dV, sdV), (w.acc_dK, sdK)):
        X = cute.make_rmem_tensor(acc.layout, dtype)
        convert(acc, X)
        cute.copy(atom, thr_store.retile(X), thr_store.partition_D(sX))
    cute.arch.fence_view_async_shared()  # dV, dK: generic writes, read by TMA
    cute.arch.barrier(barrier_id=CONSUMERS, number_of_threads=256)  # both tiles are complete
    if cute.arch.make_warp_uniform(cute.arch.warp_idx()) == 0:
        for x, sX in ((dv, sdV), (dk, sdK)):
            store_tile(config, block, x, sX)
        cute.arch.cp_async_bulk_commit_group()
        cute.arch.cp_async_bulk_wait_group(0, read=True)  # shared memory must outlive the reads


def make_work(config, s: Shared, mmas: Mmas, score: Score, dropout: Dropout | None) -> Work:
    tidx, _, _ = cute.arch.thread_idx()
    wg = cute.arch.make_warp_uniform(tidx // 128)
    lane = cute.arch.lane_idx()
    # Sliced by the WG, not by the thread: descriptors stay in uniform registers.
    sdp, dkv = mmas.sdp.get_slice(wg * 128), mmas.dkv.get_slice(wg * 128)
    acc_S, acc_dP = (
        cute.make_rmem_tensor(sdp.partition_shape_C((config.tile_n, config.tile_m)), Float32)
        for _ in range(2)
    )
    acc_dV, acc_dK = (
        cute.make_rmem_tensor(dkv.partition_shape_C((config.tile_n, config.head_dim)), Float32)
        for _ in range(2)
    )
    atom = cute.make_copy_atom(warp.StMatrix8x8x16bOp(False, 4), s.sQ.element_type)
    store_dS = cute.make_tiled_copy_C(atom, mmas.sdp).get_slice(tidx)
    return Work(
        wg=wg,
        lane=lane,
        tidx=tidx,
        mmas=mmas,
        tSrK=sdp.make_fragment_A(sdp.partition_A(s.sK)),
        tSrQ=sdp.make_fragment_B(sdp.partition_B(s.sQ)),
        tdPrV=sdp.make_fragment_A(sdp.partition_A(s.sV)),
        tdPrdO=sdp.make_fragment_B(sdp.partition_B(s.sdO)),
        tdVrdO=dkv.make_fragment_B(dkv.partition_B(transposed(s.sdO))),
        tdKrQ=dkv.make_fragment_B(dkv.partition_B(transposed(s.sQ))),
        acc_S=acc_S,
        acc_dP=acc_dP,
        acc_dV=acc_dV,
        acc_dK=acc_dK,
        stats=thread_stats(config, s, lane),
        store_dS=store_dS,
        tdSsdS=store_dS.partition_D(s.sdSt),
        scores=make_scores(score, dropout),
    )


@cute.jit
def run_role(config: cutlass.Constexpr, c: Call, block: Block | None, s: Shared):
    """What this warp does. block: None if config.persistent."""
    warp_idx = cute.arch.make_warp_uniform(cute.arch.warp_idx())
    consumer, dq, loader = config.registers
    start = Int32(0), Int32(0)  # no tile and no query block before
    if warp_idx >= LOAD_WARP:
        cute.arch.setmaxregister_decrease(loader)
        if warp_idx == LOAD_WARP:
            if const_expr(config.persistent):
                produce_tiles(config, c, s)
            else:
                produce(config, c, block, s, *start)
    elif warp_idx >= DQ_WARP:
        cute.arch.setmaxregister_decrease(dq)
        if const_expr(config.persistent):
            compute_dq_tiles(config, c, s)
        else:
            compute_dq(config, c, block, s, *start)
        if warp_idx == DQ_WARP:
            cute.arch.cp_async_bulk_wait_group(0, read=True)  # shared memory must outlive the reads
    else:
        cute.arch.setmaxregister_increase(consumer)
        if const_expr(config.wide):
            sm90_wide.consume(config, c, block, s)
        else:
            w = make_work(config, s, c.mmas, c.score, c.dropout)
            if const_expr(config.persistent):
                consume_tiles(config, c, s, w)
            else:
                consume(config, c, block, s, w, *start)


class Layouts(NamedTuple):
    """Of tiles in shared memory."""

    sQ: cute.ComposedLayout
    sdO: cute.ComposedLayout
    sK: cute.ComposedLayout  # and V
    sdSt: cute.ComposedLayout


@cute.kernel
def kernel(
    config: cutlass.Constexpr,
    sizes: Sizes,
    swath: Int32,
    order: Order | None,
    ragged: Ragged | None,
    scale: Float32,
    score: Score,
    dropout: Dropout | None,
    q: Tma,
    k: Tma,
    v: Tma,
    do: Tma,
    dk: Gradient,
    dv: Gradient,
    mStats: cute.Tensor,
    mdQacc: cute.Tensor,
    mTurns: cute.Tensor,
    mmas: Mmas,
    layouts: Layouts,
):
    warp_idx = cute.arch.make_warp_uniform(cute.arch.warp_idx())
    smem = SmemAllocator()
    dtype = arguments.element_type(config)
    sQ, sdO, sK, sV, sdSt = (
        smem.allocate_tensor(dtype, layout.outer, 1024, swizzle=layout.inner)
        for layout in (layouts.sQ, layouts.sdO, layouts.sK, layouts.sK, layouts.sdSt)
    )
    rows, cols = config.dq_piece
    sdQ = smem.allocate_tensor(Float32, cute.make_layout((rows * cols, 2)), 1024)
    sStats = smem.allocate_tensor(Float32, cute.make_layout((2 * config.tile_m, config.stages)), 128)
    stages = config.stages, config.do_stages, config.kv_stages, config.kv_stages
    q_ring, do_ring, k_ring, v_ring = (make_ring(smem, n) for n in stages)
    sP, p_ring, ds_ring = None, None, make_ring(smem, 2)
    if const_expr(config.wide):
        sP, p_ring = sm90_wide.allocate_P(config, smem, dtype), make_ring(smem, 2)
    sTile, tile_ring = None, None
    if const_expr(config.persistent):
        sTile, tile_ring = smem.allocate_tensor(Int32, cute.make_layout(2), 8), make_ring(smem, 2)
    rings = q_ring, do_ring, k_ring, v_ring, ds_ring
    s = Shared(sQ, sdO, sK, sV, sdSt, sdQ, sStats, *rings, sP, p_ring, sTile, tile_ring)
    if warp_idx == LOAD_WARP:  # it goes on at once, to load K and Q
        for x in (k, q):
            cpasync.prefetch_descriptor(x.atom)
        with cute.arch.elect_one():  # each warp that reads a slot releases it once
            init_rings((q_ring, do_ring, v_ring), 4 * CONSUMER_WGS)
            init_rings((k_ring,), 4 * CONSUMER_WGS + 4)  # the dQ WG's as well
            if const_expr(config.persistent):
                init_rings((tile_ring,), 4 * CONSUMER_WGS + 4)
            if const_expr(config.wide):  # WG 1 makes dS, from WG 0's P
                init_rings((ds_ring, p_ring), 4, 4)
            else:
                init_rings((ds_ring,), 4, 4 * CONSUMER_WGS)
        cute.arch.sync_warp()  # all lanes come after them
        cute.arch.barrier_arrive(barrier_id=START, number_of_threads=THREADS)
    if warp_idx == 0:
        for x in (v, do, dk.tma, dv.tma):
            cpasync.prefetch_descriptor(x.atom)
    block, tiles = None, num_blocks(config, sizes, ragged)
    if const_expr(config.ragged):
        block = find_block(config, sizes, ragged, swath)
    elif const_expr(not config.persistent):
        block = find_dense_block(config, sizes, order, cute.arch.block_idx()[0])
    if warp_idx != LOAD_WARP:
        cute.arch.barrier(barrier_id=START, number_of_threads=THREADS)  # the mbarriers are there
    cute.arch.griddepcontrol_launch_dependents()  # bwd_convert may start: it waits for this kernel
    loads, gradients = (q, k, v, do), (dk, dv)
    call = Call(sizes, order, tiles, scale, score, dropout, *loads, *gradients, mStats, mdQacc, mTurns, mmas)
    if const_expr(not config.ragged):  # noqa: SIM114, only one of the conditions is known to the compiler
        run_role(config, call, block, s)
    elif block.n_block >= 0:
        run_role(config, call, block, s)
    else:
        cute.arch.griddepcontrol_wait()  # bwd_convert waits for this kernel alone, but needs bwd_delta


kernel.set_name_prefix("mfa_bwd_sm90", remove_cutlass_symbol=True)


def make_dq_mma(config, dtype: type) -> cute.TiledMma:
    K, MN, make_mma = OperandMajorMode.K, OperandMajorMode.MN, hopper.make_trivial_tiled_mma
    rows, cols = config.dq_piece
    if config.dq_transposed:
        return make_mma(dtype, dtype, K, MN, Float32, (1, 1, 1), (64, rows), warpgroup.OperandSource.RMEM)
    return make_mma(dtype, dtype, MN, MN, Float32, (1, 1, 1), (64, cols))


@cute.jit
def launch(call: Backward, config: cutlass.Constexpr, stream):
    """Tensors as in the module's first lines and bwd_delta's, numbers as in dispatch.py.

    mdLSE is read if has_dlse; num_sms, thread blocks that run at once, counts if config.persistent; batch,
    heads and lengths are not 0.
    """
    (
        mQ,
        mK,
        mV,
        mO,
        mdO,
        mLSE,
        mdLSE,
        mStats,
        mdQacc,
        mdQ,
        mdK,
        mdV,
        score,
        has_dlse,
        window_left,
        window_right,
        ragged,
        dropout,
        mTurns,
        num_sms,
    ) = call
    sizes = sizes_of(config, mQ, mK, window_left, window_right, ragged)
    dtype = mQ.element_type
    m, n, d = config.tile_m, config.tile_n, config.head_dim
    sQ, sdO = (
        hopper.make_smem_layout_b(LayoutEnum.ROW_MAJOR, (n, m, d), dtype, stages)
        for stages in (config.stages, config.do_stages)
    )
    sK = hopper.make_smem_layout_a(LayoutEnum.ROW_MAJOR, (n, m, d), dtype, config.kv_stages)
    sdSt = hopper.make_smem_layout_a(LayoutEnum.ROW_MAJOR, (n, d, m), dtype, 2)
    K, MN, make_mma = OperandMajorMode.K, OperandMajorMode.MN, hopper.make_trivial_tiled_mma
    wgs, RMEM = (n // 64, 1, 1), warpgroup.OperandSource.RMEM
    mmas = Mmas(
        sdp=make_mma(dtype, dtype, K, K, Float32, wgs, (64, m)),
        # 256 columns in one instruction take more registers than 512 threads start with.
        dkv=make_mma(dtype, dtype, K, MN, Float32, wgs, (64, d if d < 256 else 128), RMEM),
        dq=make_dq_mma(config, dtype),
    )
    g2s, s2g = cpasync.CopyBulkTensorTileG2SOp(), cpasync.CopyBulkTensorTileS2GOp()
    q, do = (make_tma(g2s, x, layout, (m, d)) for x, layout in ((mQ, sQ), (mdO, sdO)))
    k, v = (make_tma(g2s, x, sK, (n, d)) for x in (mK, mV))
    by_rows = config.ragged or config.persistent
    dk, dv = (Gradient(make_tma(s2g, x, sK, (n, d)), x if by_rows else None) for x in (mdK, mdV))
    delta.launch(config, mO, mdO, mLSE, mdLSE, mStats, mdQacc, mTurns, score, ragged, has_dlse, stream)
    swath = find_swath(config, sizes, ragged)
    order = None if const_expr(config.ragged) else find_order(config, sizes, swath)
    grid = num_blocks(config, sizes, ragged)
    if const_expr(config.persistent):
        grid = cutlass.min(grid, num_sms)
    layouts = Layouts(sQ, sdO, sK, sdSt)
    scores = score.scale, in_log2(config, score), dropout
    tensors = q, k, v, do, dk, dv, mStats, mdQacc, mTurns
    kernel(config, sizes, swath, order, ragged, *scores, *tensors, mmas, layouts).launch(
        grid=(grid, 1, 1),
        block=(THREADS, 1, 1),
        min_blocks_per_mp=1,
        stream=stream,
        use_pdl=config.pdl,
    )
    convert_dq.launch(config, mdQacc, mdQ, ragged, score.scale, stream)


def fake_call(config) -> Backward:
    return arguments.backward(config)
