"""The consumers of sm90.py if config.wide: two warpgroups (WGs) share 64 keys, each has one gradient.

Above head dim 128, and at 128 with dropout and a user's function or two of ours: there dK and dV of 64 keys
take the registers of a WG each. WG 0 computes Sᵀ = K·Qᵀ, P from it, and dV += Pᵀ·dO; WG 1 computes
dPᵀ = V·dOᵀ, dS from it and from WG 0's P, and dK += dSᵀ·Q. Both hold the same (keys, queries) tile in the
same registers, so that P, or the factor F that dS takes in its place, goes through shared memory thread by
thread.
"""

from typing import NamedTuple

import cutlass
import cutlass.cute as cute
from cutlass import Int32, const_expr
from cutlass.cute.nvgpu import warpgroup

from mini_flash_attention.kernels.backward import sm90_scores as scores
from mini_flash_attention.kernels.backward.common import finish_dS
from mini_flash_attention.kernels.backward.schedule import Block, query_block, visits
from mini_flash_attention.kernels.backward.shared_keys import DK, DV
from mini_flash_attention.kernels.backward.sm90_consume import Gradient, hand_over, make_store, store
from mini_flash_attention.kernels.backward.sm90_records import (
    WG,
    Setup,
    Shared,
    accumulator,
    clear_beyond,
    clear_queries,
)
from mini_flash_attention.kernels.calls import Backward
from mini_flash_attention.kernels.parts.blocks import unmasked_queries
from mini_flash_attention.kernels.parts.fragments import as_operand_A, convert, transposed
from mini_flash_attention.kernels.parts.scores import gradient_scale
from mini_flash_attention.kernels.parts.seqlen import Sizes
from mini_flash_attention.kernels.parts.sm90 import commit, release, wgmma


class Work(NamedTuple):
    """What one warp computes with: in WG 0, and in WG 1."""

    call: Backward
    setup: Setup
    s: Shared
    lane: Int32
    tidx: Int32  # in the WG
    tSrA: cute.Tensor  # of K·Qᵀ, of V·dOᵀ: descriptors (MMA, 1, d / 16)
    tSrB: cute.Tensor  # descriptors (MMA, 1, d / 16, stages)
    tGrB: cute.Tensor  # of Pᵀ·dO, of dSᵀ·Q: descriptors (MMA, 1, tile_m / 16, stages)
    acc_S: cute.Tensor  # S, dP: ((2, 2, tile_m / 8), 1, 1), rows are keys, columns queries
    acc_G: cute.Tensor  # the gradient dV, dK: ((2, 2, d / 8), 1, 1)
    stats: cute.Tensor  # this thread's columns of sStats: ((2, tile_m / 8), 2, stages)
    store_dS: cute.TiledCopy
    tdSsdS: cute.Tensor  # (COPY, 1, tile_m / 16, 2)
    score: scores.HeadScore


@cute.jit
def consume_wide(config: cutlass.Constexpr, call: Backward, setup: Setup, s: Shared, block: Block):
    """A consumer warp. The tile is the thread block's only one: no wide kernel is persistent."""
    if cute.arch.make_warp_uniform(cute.arch.warp_idx()) < 4:
        w = make_work(config, call, setup, s, s.sK, s.sQ, s.sdO)
        accumulate_dV(config, w, block)
        if const_expr(config.dropout):
            w.acc_G.store(w.acc_G.load() * call.dropout.rescale)
        dV = Gradient(DV, w.acc_G, s.sV[None, None, 0], setup.dv, call.mdV)
        store(config, w, block, (dV,), WG)
    else:
        w = make_work(config, call, setup, s, s.sV, s.sdO, s.sQ)
        accumulate_dK(config, w, block)
        for i in cutlass.range_constexpr(cute.size(w.acc_G)):
            w.acc_G[i] = w.acc_G[i] * gradient_scale(config, call.score)
        # Through a slot of Q: the dQ WG may still be reading K.
        sdK = cute.make_tensor(s.sQ.iterator, s.sK[None, None, 0].layout)
        store(config, w, block, (Gradient(DK, w.acc_G, sdK, setup.dk, call.mdK),), WG + 1)


@cute.jit
def accumulate_dV(config: cutlass.Constexpr, w: Work, block: Block):
    """The walk of WG 0. `it` counts the query blocks of all heads: it numbers the uses of rings."""
    sizes, s, it = block.sizes(w.setup.sizes), w.s, Int32(0)
    free = unmasked_queries(block.n_block, *sizes.for_blocks(config))
    key = block.n_block * config.tile_n + w.tidx // 32 * 16 + w.lane // 4
    s.k_ring.wait_full(Int32(0))  # K is there, and stays
    if const_expr(config.ragged):
        clear_beyond(s.sK[None, None, 0], sizes.seqlen_k, block.n_block * config.tile_n, WG)
    for head in cutlass.range(block.head, block.head + block.heads, unroll=1):
        scores.set_head(w.score, block.batch, head)
        x = visits(config, w.call, block, head)
        for position in cutlass.range(x.first, x.last, unroll=1):
            m_block = query_block(config, w.call, block, head, x, position)
            at = scores.corner(config, key, m_block, free, position < x.partial)
            if const_expr(config.ragged):
                clear_queries(config, s, sizes, it, m_block, WG)
            step_dV(config, w, sizes, it, at)
            it += 1


@cute.jit
def step_dV(config: cutlass.Constexpr, w: Work, sizes: Sizes, it: Int32, at: scores.Corner):
    """One query block of WG 0."""
    s, slot, do_slot = w.s, w.s.q_ring.slot(it), w.s.do_ring.slot(it)
    s.q_ring.wait_full(it)  # Q and its stats are there
    stat, tSrB = w.stats[None, 0, slot], w.tSrB[None, None, None, slot]
    scores.issue(w.setup.sdp, w.acc_S, w.tSrA, tSrB, stat, not config.score)
    warpgroup.wait_group(0)  # S is in acc_S
    acc_F = scores.probabilities(config, sizes, w.score, w.acc_S, stat, at)
    # Q is read, and so are the stats: in all lanes once P is committed, for which WG 1's release waits.
    release(s.q_ring, it, w.lane)
    P, F = scores.factors(config, sizes, w.score, w.acc_S, acc_F, at)
    s.p_ring.wait_empty(it)  # WG 1 has read P of two blocks ago
    sP = s.sP[None, None, w.tidx, s.p_ring.slot(it)]  # (8, tile_m / 16)
    cute.autovec_copy(cute.make_tensor(F.iterator, cute.make_layout(sP.shape)), sP)
    cute.arch.sync_warp()  # all lanes have written: lane 0 may say it
    commit(s.p_ring, it, w.lane)
    s.do_ring.wait_full(it)  # dO is there
    wgmma(w.setup.dkv, w.acc_G, as_operand_A(P), w.tGrB[None, None, None, do_slot], True)
    warpgroup.wait_group(0)  # dV is done: this WG needs dO no more
    release(s.do_ring, it, w.lane)


@cute.jit
def accumulate_dK(config: cutlass.Constexpr, w: Work, block: Block):
    """The walk of WG 1. `it` counts as WG 0's does."""
    sizes, s, it = block.sizes(w.setup.sizes), w.s, Int32(0)
    s.v_ring.wait_full(Int32(0))  # V is there, and stays
    if const_expr(config.ragged):
        clear_beyond(s.sV[None, None, 0], sizes.seqlen_k, block.n_block * config.tile_n, WG + 1)
    for head in cutlass.range(block.head, block.head + block.heads, unroll=1):
        x = visits(config, w.call, block, head)
        for position in cutlass.range(x.first, x.last, unroll=1):
            m_block = query_block(config, w.call, block, head, x, position)
            if const_expr(config.ragged):
                clear_queries(config, s, sizes, it, m_block, WG + 1)
            step_dK(config, w, it)
            it += 1


@cute.jit
def step_dK(config: cutlass.Constexpr, w: Work, it: Int32):
    """One query block of WG 1."""
    s, slot, do_slot = w.s, w.s.q_ring.slot(it), w.s.do_ring.slot(it)
    s.q_ring.wait_full(it)  # Q, for dK, and the stats are there
    s.do_ring.wait_full(it)  # dO is there
    stat, tSrB = w.stats[None, 1, slot], w.tSrB[None, None, None, do_slot]
    scores.issue(w.setup.sdp, w.acc_S, w.tSrA, tSrB, stat, not config.dropout)
    warpgroup.wait_group(0)  # dP is in acc_S: this WG needs dO no more
    release(s.do_ring, it, w.lane)
    s.p_ring.wait_full(it)  # WG 0's P is there
    sP = s.sP[None, None, w.tidx, s.p_ring.slot(it)]  # (8, tile_m / 16)
    F = cute.make_rmem_tensor(w.acc_S.layout, s.sP.element_type)
    cute.autovec_copy(sP, cute.make_tensor(F.iterator, cute.make_layout(sP.shape)))
    cute.arch.sync_warp()  # all lanes have read: P may be overwritten
    release(s.p_ring, it, w.lane)
    finish_dS(config, w.call.dropout, w.acc_S, F, stat)
    dS = cute.make_rmem_tensor(w.acc_S.layout, F.element_type)
    convert(w.acc_S, dS)
    s.ds_ring.wait_empty(it)  # the dQ WG has read dS of two blocks ago
    hand_over(w, it, dS)
    wgmma(w.setup.dkv, w.acc_G, as_operand_A(dS), w.tGrB[None, None, None, slot], True)
    warpgroup.wait_group(0)  # dK is done: Q and stats may be overwritten
    release(s.q_ring, it, w.lane)


def make_work(
    config, call: Backward, setup: Setup, s: Shared, sA: cute.Tensor, sB: cute.Tensor, sG: cute.Tensor
) -> Work:
    """sA·sBᵀ makes S or dP; times sG it adds to the gradient."""
    tidx, sdp, dkv = cute.arch.thread_idx()[0] % 128, setup.sdp.get_slice(0), setup.dkv.get_slice(0)
    store_dS, tdSsdS = make_store(setup.sdp, tidx, s.sdSt)
    acc_G = accumulator(dkv, config.tile_n, config.head_dim)
    acc_G.fill(0.0)
    return Work(
        call,
        setup,
        s,
        cute.arch.lane_idx(),
        tidx,
        tSrA=sdp.make_fragment_A(sdp.partition_A(sA[None, None, 0])),
        tSrB=sdp.make_fragment_B(sdp.partition_B(sB)),
        tGrB=dkv.make_fragment_B(dkv.partition_B(transposed(sG))),
        acc_S=accumulator(sdp, config.tile_n, config.tile_m),
        acc_G=acc_G,
        stats=scores.thread_stats(config, s),
        store_dS=store_dS,
        tdSsdS=tdSsdS,
        score=scores.make_score(call, setup),
    )
