"""Hopper backward for head dims above 128: two consumer WGs share 64 keys, each computes one gradient.

dK and dV of 64 keys take the registers of a WG each. WG 0 computes Sᵀ = K·Qᵀ, P from it, and dV += Pᵀ·dO;
WG 1 computes dPᵀ = V·dOᵀ, dS from it and from WG 0's P, and dK += dSᵀ·Q. Both hold the same (keys, queries)
tile in the same registers, so that P goes through shared memory thread by thread.
"""

from typing import NamedTuple

import cutlass
import cutlass.cute as cute
from cutlass import Boolean, Float32, Int32, const_expr
from cutlass.cute.nvgpu import warp, warpgroup
from cutlass.memory import SmemAllocator

from mini_flash_attention.kernels.backward.schedule import Block
from mini_flash_attention.kernels.backward.sm90_parts import (
    CONSUMERS,
    WG,
    Call,
    Gradient,
    Mmas,
    Scores,
    Shared,
    clear_beyond,
    clear_queries,
    factors,
    finish_dS,
    hand_over,
    issue_dP,
    issue_S,
    make_scores,
    probabilities,
    set_head,
    store_rows_of,
    store_tile,
    thread_stats,
)
from mini_flash_attention.kernels.calls import Dropout
from mini_flash_attention.kernels.parts.blocks import unmasked_queries
from mini_flash_attention.kernels.parts.fragments import as_operand_A, convert, transposed
from mini_flash_attention.kernels.parts.seqlen import Sizes
from mini_flash_attention.kernels.parts.sm90 import commit, release, wgmma


def allocate_P(config, smem: SmemAllocator, dtype: type) -> cute.Tensor:
    """(8, tile_m / 16, 128, 2): each thread's values of P in 16-byte chunks, without bank conflicts."""
    chunks = config.tile_m // 16
    shape, stride = (8, chunks, 128, 2), (1, 8 * 128, 8, 8 * 128 * chunks)
    return smem.allocate_tensor(dtype, cute.make_layout(shape, stride=stride), 128)


class Work(NamedTuple):
    """What one consumer warp computes with: in WG 0, and in WG 1."""

    tidx: Int32  # in the WG
    lane: Int32
    mmas: Mmas
    tSrA: cute.Tensor  # of K·Qᵀ, of V·dOᵀ: descriptors (MMA, 1, d / 16)
    tSrB: cute.Tensor  # descriptors (MMA, 1, d / 16, stages)
    tGrB: cute.Tensor  # of Pᵀ·dO, of dSᵀ·Q: descriptors (MMA, 1, tile_m / 16, stages)
    acc_S: cute.Tensor  # S, dP: ((2, 2, tile_m / 8), 1, 1), rows are keys, columns queries
    acc_G: cute.Tensor  # the gradient dV, dK: ((2, 2, d / 8), 1, 1)
    stats: cute.Tensor  # this thread's columns of sStats: ((2, tile_m / 8), 2, stages)
    store_dS: cute.TiledCopy
    tdSsdS: cute.Tensor  # (COPY, 1, tile_m / 16, 2)


def make_work(config, s: Shared, mmas: Mmas, sA: cute.Tensor, sB: cute.Tensor, sG: cute.Tensor) -> Work:
    tidx, lane = cute.arch.thread_idx()[0] % 128, cute.arch.lane_idx()
    sdp, dkv = mmas.sdp.get_slice(0), mmas.dkv.get_slice(0)
    atom = cute.make_copy_atom(warp.StMatrix8x8x16bOp(False, 4), sA.element_type)
    store_dS = cute.make_tiled_copy_C(atom, mmas.sdp).get_slice(tidx)
    acc_S = cute.make_rmem_tensor(sdp.partition_shape_C((config.tile_n, config.tile_m)), Float32)
    acc_G = cute.make_rmem_tensor(dkv.partition_shape_C((config.tile_n, config.head_dim)), Float32)
    acc_G.fill(0.0)
    return Work(
        tidx=tidx,
        lane=lane,
        mmas=mmas,
        tSrA=sdp.make_fragment_A(sdp.partition_A(sA[None, None, 0])),
        tSrB=sdp.make_fragment_B(sdp.partition_B(sB)),
        tGrB=dkv.make_fragment_B(dkv.partition_B(transposed(sG))),
        acc_S=acc_S,
        acc_G=acc_G,
        stats=thread_stats(config, s, lane),
        store_dS=store_dS,
        tdSsdS=store_dS.partition_D(s.sdSt),
    )


@cute.jit
def step_dV(
    config: cutlass.Constexpr,
    sizes: Sizes,
    s: Shared,
    w: Work,
    it: Int32,
    key: Int32,
    query: Int32,
    masked: Boolean,
    scores: Scores,
):
    """One query block of WG 0."""
    slot = s.q_ring.slot(it)
    s.q_ring.wait_full(it)
    stat = w.stats[None, 0, slot]
    issue_S(config, w.mmas.sdp, w.acc_S, w.tSrA, w.tSrB[None, None, None, slot], stat)
    warpgroup.wait_group(0)  # S
    acc_F = cute.make_rmem_tensor(w.acc_S.layout, Float32) if const_expr(config.factored) else None
    probabilities(config, sizes, scores, w.acc_S, stat, key, query, masked, acc_F)
    release(s.q_ring, it, w.lane)  # Q and stats; WG 1 needs them for longer
    P, F = factors(config, scores, w.acc_S, acc_F, key, query)
    s.p_ring.wait_empty(it)  # WG 1 has read P of two blocks ago
    sP = s.sP[None, None, w.tidx, s.p_ring.slot(it)]  # (8, tile_m / 16)
    cute.autovec_copy(cute.make_tensor(F.iterator, cute.make_layout(sP.shape)), sP)
    cute.arch.sync_warp()  # all lanes have done so
    commit(s.p_ring, it, w.lane)
    s.do_ring.wait_full(it)
    do_slot = s.do_ring.slot(it)
    wgmma(w.mmas.dkv, w.acc_G, as_operand_A(P), w.tGrB[None, None, None, do_slot], True)
    warpgroup.wait_group(0)  # dV: this WG is done with dO
    release(s.do_ring, it, w.lane)


@cute.jit
def step_dK(config: cutlass.Constexpr, s: Shared, w: Work, it: Int32, dropout: Dropout | None):
    """One query block of WG 1."""
    slot, do_slot = s.q_ring.slot(it), s.do_ring.slot(it)
    s.q_ring.wait_full(it)
    s.do_ring.wait_full(it)
    stat = w.stats[None, 1, slot]
    issue_dP(config, w.mmas.sdp, w.acc_S, w.tSrA, w.tSrB[None, None, None, do_slot], stat)
    warpgroup.wait_group(0)  # dP: this WG is done with dO
    release(s.do_ring, it, w.lane)
    s.p_ring.wait_full(it)
    sP = s.sP[None, None, w.tidx, s.p_ring.slot(it)]  # (8, tile_m / 16)
    F = cute.make_rmem_tensor(w.acc_S.layout, s.sQ.element_type)
    cute.autovec_copy(sP, cute.make_tensor(F.iterator, cute.make_layout(sP.shape)))
    cute.arch.sync_warp()  # all lanes have read
    release(s.p_ring, it, w.lane)
    finish_dS(config, dropout, w.acc_S, F, stat)
    dS = cute.make_rmem_tensor(w.acc_S.layout, s.sQ.element_type)
    convert(w.acc_S, dS)
    s.ds_ring.wait_empty(it)  # the dQ WG has read dS of two blocks ago
    hand_over(s, w, it, dS)
    wgmma(w.mmas.dkv, w.acc_G, as_operand_A(dS), w.tGrB[None, None, None, slot], True)
    warpgroup.wait_group(0)  # dK: Q and stats may be overwritten
    release(s.q_ring, it, w.lane)


@cute.jit
def consume(config: cutlass.Constexpr, c: Call, block: Block, s: Shared):
    """A consumer warp."""
    sizes, scores = block.sizes(c.sizes), make_scores(c.score, c.dropout)
    if cute.arch.make_warp_uniform(cute.arch.warp_idx()) < 4:
        w = make_work(config, s, c.mmas, s.sK, s.sQ, s.sdO)
        accumulate_dV(config, sizes, block, s, w, scores)
        if const_expr(config.dropout):
            w.acc_G.store(w.acc_G.load() * scores.dropout.rescale)
        store(config, block, w, c.dv, s.sV[None, None, 0], WG)
    else:
        w = make_work(config, s, c.mmas, s.sV, s.sdO, s.sQ)
        accumulate_dK(config, sizes, block, s, w, scores.dropout)
        for i in cutlass.range_constexpr(cute.size(w.acc_G)):
            w.acc_G[i] = w.acc_G[i] * c.scale
        # Through a slot of Q: the dQ WG may still be reading K.
        store(config, block, w, c.dk, cute.make_tensor(s.sQ.iterator, s.sK[None, None, 0].layout), WG + 1)


@cute.jit
def accumulate_dV(config: cutlass.Constexpr, sizes: Sizes, block: Block, s: Shared, w: Work, scores: Scores):
    """The walk of WG 0."""
    lengths = config.tile_m, config.tile_n, sizes.seqlen_q, sizes.seqlen_k
    free_first, free_last = unmasked_queries(block.n_block, *lengths, *sizes.window(config.mask))
    key = block.n_block * config.tile_n + w.tidx // 32 * 16 + w.lane // 4
    s.k_ring.wait_full(Int32(0))
    if const_expr(config.ragged):
        clear_beyond(s.sK[None, None, 0], sizes.seqlen_k, block.n_block * config.tile_n, WG)
    it = Int32(0)
    for g in cutlass.range(sizes.group, unroll=1):
        set_head(config, sizes, scores, block.batch, block.head_kv * sizes.group + g)
        for m_block in cutlass.range(block.first, block.last, unroll=1):
            masked = m_block >= free_last
            if const_expr(config.mask != "full"):
                masked = masked | (m_block < free_first)
            query = m_block * config.tile_m + 2 * (w.lane % 4)
            if const_expr(config.ragged):
                clear_queries(config, sizes, s, it, m_block, WG)
            step_dV(config, sizes, s, w, it, key, query, masked, scores)
            it += 1


@cute.jit
def accumulate_dK(
    config: cutlass.Constexpr, sizes: Sizes, block: Block, s: Shared, w: Work, dropout: Dropout | None
):
    """The walk of WG 1."""
    s.v_ring.wait_full(Int32(0))
    if const_expr(config.ragged):
        clear_beyond(s.sV[None, None, 0], sizes.seqlen_k, block.n_block * config.tile_n, WG + 1)
    it = Int32(0)
    for _ in cutlass.range(sizes.group, unroll=1):
        for m_block in cutlass.range(block.first, block.last, unroll=1):
            if const_expr(config.ragged):
                clear_queries(config, sizes, s, it, m_block, WG + 1)
            step_dK(config, s, w, it, dropout)
            it += 1


@cute.jit
def store(
    config: cutlass.Constexpr,
    block: Block,
    w: Work,
    x: Gradient,
    sX: cute.Tensor,
    barrier_id: cutlass.Constexpr,
):
    """A WG's gradient."""
    if const_expr(not config.ragged):  # noqa: SIM114, only one of the conditions is known to the compiler
        store_bulk(config, block, w, x, sX, barrier_id)
    elif (block.n_block + 1) * config.tile_n <= block.sequence.room:
        store_bulk(config, block, w, x, sX, barrier_id)
    else:  # the next sequence's rows follow
        store_rows_of(config, block, w.acc_G, x, w.tidx)


@cute.jit
def store_bulk(
    config: cutlass.Constexpr,
    block: Block,
    w: Work,
    x: Gradient,
    sX: cute.Tensor,
    barrier_id: cutlass.Constexpr,
):
    """Through a tile (tile_n, d) of shared memory that nobody needs any more."""
    atom = cute.make_copy_atom(warp.StMatrix8x8x16bOp(False, 4), sX.element_type)
    thr_store = cute.make_tiled_copy_C(atom, w.mmas.dkv).get_slice(w.tidx)
    X = cute.make_rmem_tensor(w.acc_G.layout, sX.element_type)
    convert(w.acc_G, X)
    cute.arch.barrier(barrier_id=CONSUMERS, number_of_threads=256)  # both WGs are done with V and Q
    cute.copy(atom, thr_store.retile(X), thr_store.partition_D(sX))
    cute.arch.fence_view_async_shared()  # generic writes, read by TMA
    cute.arch.barrier(barrier_id=barrier_id, number_of_threads=128)  # the tile is complete
    if cute.arch.make_warp_uniform(w.tidx // 32) == 0:
        store_tile(config, block, x, sX)
        cute.arch.cp_async_bulk_commit_group()
        cute.arch.cp_async_bulk_wait_group(0, read=True)  # shared memory must outlive the reads
