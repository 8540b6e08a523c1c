"""The consumers of sm90.py, unless config.wide: a warpgroup (WG) computes dK and dV of 64 keys. And what
those of sm90_consume_wide.py give away in the same way: dS to the dQ WG, dK and dV to global memory.
"""

from typing import NamedTuple

import cutlass
import cutlass.cute as cute
from cutlass import Boolean, Int32, const_expr
from cutlass.block import block_copy
from cutlass.cute.nvgpu import warp, warpgroup

from mini_flash_attention.kernels.backward import common, shared_keys
from mini_flash_attention.kernels.backward import sm90_scores as scores
from mini_flash_attention.kernels.backward.schedule import Block, Visits, query_block, visits
from mini_flash_attention.kernels.backward.sm90_produce import next_tile
from mini_flash_attention.kernels.backward.sm90_records import (
    CONSUMERS,
    WG,
    Setup,
    Shared,
    accumulator,
    clear_beyond,
    clear_queries,
)
from mini_flash_attention.kernels.calls import Backward
from mini_flash_attention.kernels.parts.blocks import query_blocks, unmasked_queries
from mini_flash_attention.kernels.parts.fragments import as_operand_A, convert, transposed
from mini_flash_attention.kernels.parts.scores import gradient_scale
from mini_flash_attention.kernels.parts.seqlen import Sizes
from mini_flash_attention.kernels.parts.sm90 import Tma, commit, release, wgmma


class Work(NamedTuple):
    """What one warp computes with."""

    call: Backward
    setup: Setup
    s: Shared
    wg: Int32
    lane: Int32
    tidx: Int32  # in both WGs
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
    score: scores.HeadScore


@cute.jit
def consume(config: cutlass.Constexpr, call: Backward, setup: Setup, s: Shared, block: Block):
    """A consumer warp. n, it: as in sm90_produce."""
    w = make_work(config, call, setup, s)
    n, it, more = Int32(0), Int32(0), Boolean(True)
    if const_expr(not config.persistent):  # as a loop that ends after one tile, 1 to 2 % slower
        accumulate(config, w, block, n, it)
        finish(config, w, block, n)
    else:
        while more:
            it = accumulate(config, w, block, n, it)
            finish(config, w, block, n)
            block, more = next_tile(config, w, block, n)
            n += 1


@cute.jit
def accumulate(config: cutlass.Constexpr, w: Work, block: Block, n: Int32, it: Int32) -> Int32:
    """acc_dV and acc_dK of the n-th tile. Returns the next tile's `it`."""
    sizes, s, kv_slot = block.sizes(w.setup.sizes), w.s, w.s.k_ring.slot(n)
    w = w._replace(tSrK=w.tSrK[None, None, None, kv_slot], tdPrV=w.tdPrV[None, None, None, kv_slot])
    w.acc_dV.fill(0.0)
    w.acc_dK.fill(0.0)
    half = 2 * block.n_block + w.wg  # this WG's block of 64 keys
    bounds = config.tile_m, 64, *sizes.for_blocks(config)[2:]
    first, last = block.first, block.last
    if const_expr(config.mask != "full"):
        first, last = query_blocks(half, *bounds)
        if const_expr(config.ragged):  # there may be rows of k without a key in all of the thread block
            last = cutlass.min(last, block.last)
            first = cutlass.min(first, last)
    free = unmasked_queries(half, *bounds)
    key = half * 64 + w.tidx % 128 // 32 * 16 + w.lane // 4
    s.k_ring.wait_full(n)  # K is there, and stays until the end of the tile
    s.v_ring.wait_full(n)  # V
    if const_expr(config.ragged):
        for sX in (s.sK, s.sV):
            sX = cute.local_tile(sX[None, None, 0], (64, config.head_dim), (w.wg, 0))
            clear_beyond(sX, sizes.seqlen_k, 64 * half, WG + w.wg)
    for head in cutlass.range(block.head, block.head + block.heads, unroll=1):
        scores.set_head(w.score, block.batch, head)
        x = visits(config, w.call, block, head)
        begin, end = x.first, x.last
        if const_expr(not config.sparse):
            x = Visits(first, last, x.partial)
        for _ in cutlass.range(x.first - begin, unroll=1):
            skip(w, it)
            it += 1
        for position in cutlass.range(x.first, x.last, unroll=1):
            m_block = query_block(config, w.call, block, head, x, position)
            at = scores.corner(config, key, m_block, free, position < x.partial)
            if const_expr(config.ragged):
                clear_queries(config, s, sizes, it, m_block, WG + w.wg)
            step(config, w, sizes, it, at)
            it += 1
        for _ in cutlass.range(end - x.last, unroll=1):
            skip(w, it)
            it += 1
    return it


@cute.jit
def step(config: cutlass.Constexpr, w: Work, sizes: Sizes, it: Int32, at: scores.Corner):
    """One query block: dV and dK grow, dS goes to the dQ WG. The other WG's products run under all this.

    w: with the tile's tSrK and tdPrV. No wgmma is in flight at the end: the compiler would serialise all.
    """
    s, slot, do_slot = w.s, w.s.q_ring.slot(it), w.s.do_ring.slot(it)
    sdp, dkv = w.setup.sdp, w.setup.dkv
    s.q_ring.wait_full(it)  # Q and its stats are there
    s.ds_ring.wait_empty(it)  # dS of two blocks ago is read; not later: a wait under a wgmma costs registers
    stat = w.stats[None, 0, slot]
    scores.issue(sdp, w.acc_S, w.tSrK, w.tSrQ[None, None, None, slot], stat, not config.score)
    warpgroup.wait_group(0)  # S is in acc_S
    acc_F = scores.probabilities(config, sizes, w.score, w.acc_S, stat, at)
    P, F = scores.factors(config, sizes, w.score, w.acc_S, acc_F, at)
    if const_expr(config.factored):  # there are no registers for F: it waits where dS will be
        put(w, it, F)
    s.do_ring.wait_full(it)  # dO is there
    stat = w.stats[None, 1, slot]
    scores.issue(sdp, w.acc_dP, w.tdPrV, w.tdPrdO[None, None, None, do_slot], stat, not config.dropout)
    wgmma(dkv, w.acc_dV, as_operand_A(P), w.tdVrdO[None, None, None, do_slot], True)
    warpgroup.wait_group(1)  # dP is in acc_dP; dV runs on
    # From the rounded P: the float32 one's registers are gone.
    F = take(w, it) if const_expr(config.factored) else P
    common.finish_dS(config, w.call.dropout, w.acc_dP, F, stat)
    dS = cute.make_rmem_tensor(w.acc_dP.layout, F.element_type)
    convert(w.acc_dP, dS)
    wgmma(dkv, w.acc_dK, as_operand_A(dS), w.tdKrQ[None, None, None, slot], True)
    hand_over(w, it, dS)  # now, under dK's product: the tensor cores have work, dQ is not the slowest
    warpgroup.wait_group(1)  # dV is done: dO may be overwritten
    release(s.do_ring, it, w.lane)
    warpgroup.wait_group(0)  # dK is done: Q and stats may be overwritten
    release(s.q_ring, it, w.lane)


@cute.jit
def skip(w: Work, it: Int32):
    """A query block that sees none of this WG's keys: its dS is zero."""
    dS = cute.make_rmem_tensor(w.acc_dP.layout, w.s.sQ.element_type)
    dS.fill(0.0)
    w.s.q_ring.wait_full(it)  # a slot is not released before it is filled: rounds do not overtake each other
    w.s.do_ring.wait_full(it)  # nor this one
    w.s.ds_ring.wait_empty(it)  # dS of two blocks ago is read
    hand_over(w, it, dS)
    release(w.s.do_ring, it, w.lane)  # unread
    release(w.s.q_ring, it, w.lane)


@cute.jit
def finish(config: cutlass.Constexpr, w: Work, block: Block, n: Int32):
    """Scale dK and dV of the n-th tile, and store them: dV through V's shared memory, dK through Q's.

    The dQ WG may still be reading K.
    """
    for i in cutlass.range_constexpr(cute.size(w.acc_dK)):
        w.acc_dK[i] = w.acc_dK[i] * gradient_scale(config, w.call.score)
        if const_expr(config.dropout):
            w.acc_dV[i] = w.acc_dV[i] * w.call.dropout.rescale
    if const_expr(config.persistent):  # the last wgmma has been waited for: the next tiles may be loaded
        release(w.s.k_ring, n, w.lane)
        release(w.s.v_ring, n, w.lane)
    sdV = w.s.sV[None, None, 0]  # (tile_n, d)
    sdK = cute.make_tensor(w.s.sQ.iterator, sdV.layout)  # (tile_n, d)
    dV = Gradient(shared_keys.DV, w.acc_dV, sdV, w.setup.dv, w.call.mdV)
    dK = Gradient(shared_keys.DK, w.acc_dK, sdK, w.setup.dk, w.call.mdK)
    store(config, w, block, (dV, dK), CONSUMERS)


def make_work(config, call: Backward, setup: Setup, s: Shared) -> Work:
    tidx, _, _ = cute.arch.thread_idx()
    wg = cute.arch.make_warp_uniform(tidx // 128)
    # Sliced by the WG, not by the thread: descriptors stay in uniform registers.
    sdp, dkv = setup.sdp.get_slice(wg * 128), setup.dkv.get_slice(wg * 128)
    store_dS, tdSsdS = make_store(setup.sdp, tidx, s.sdSt)
    return Work(
        call,
        setup,
        s,
        wg,
        cute.arch.lane_idx(),
        tidx,
        tSrK=sdp.make_fragment_A(sdp.partition_A(s.sK)),
        tSrQ=sdp.make_fragment_B(sdp.partition_B(s.sQ)),
        tdPrV=sdp.make_fragment_A(sdp.partition_A(s.sV)),
        tdPrdO=sdp.make_fragment_B(sdp.partition_B(s.sdO)),
        tdVrdO=dkv.make_fragment_B(dkv.partition_B(transposed(s.sdO))),
        tdKrQ=dkv.make_fragment_B(dkv.partition_B(transposed(s.sQ))),
        acc_S=accumulator(sdp, config.tile_n, config.tile_m),
        acc_dP=accumulator(sdp, config.tile_n, config.tile_m),
        acc_dV=accumulator(dkv, config.tile_n, config.head_dim),
        acc_dK=accumulator(dkv, config.tile_n, config.head_dim),
        stats=scores.thread_stats(config, s),
        store_dS=store_dS,
        tdSsdS=tdSsdS,
        score=scores.make_score(call, setup),
    )


def make_store(tiled_mma: cute.TiledMma, tidx: Int32, sX: cute.Tensor):
    """stmatrix of a thread's part of a product, and its place in sX."""
    atom = cute.make_copy_atom(warp.StMatrix8x8x16bOp(False, 4), sX.element_type)
    thr_store = cute.make_tiled_copy_C(atom, tiled_mma).get_slice(tidx)
    return thr_store, thr_store.partition_D(sX)


# From here on w is the Work of either kind of consumers.


@cute.jit
def hand_over(w, it: Int32, dS: cute.Tensor):
    """This warp's 16 keys of dS, to the dQ WG; their slot is empty."""
    put(w, it, dS)
    cute.arch.fence_view_async_shared()  # generic writes of dS, read by wgmma
    cute.arch.sync_warp()  # all lanes have done so: lane 0 may say it
    commit(w.s.ds_ring, it, w.lane)


@cute.jit
def put(w, it: Int32, X: cute.Tensor):
    """A thread's part of a tile to dS's slot."""
    cute.copy(w.store_dS, w.store_dS.retile(X), w.tdSsdS[None, None, None, w.s.ds_ring.slot(it)])


@cute.jit
def take(w, it: Int32) -> cute.Tensor:
    """What was put."""
    X = cute.make_rmem_tensor(w.acc_S.layout, w.s.sdSt.element_type)
    atom = cute.make_copy_atom(warp.LdMatrix8x8x16bOp(False, 4), X.element_type)
    thr_load = cute.make_tiled_copy_C(atom, w.setup.sdp).get_slice(w.tidx)
    cute.arch.sync_warp()  # all lanes have put theirs
    cute.copy(
        atom, thr_load.partition_S(w.s.sdSt)[None, None, None, w.s.ds_ring.slot(it)], thr_load.retile(X)
    )
    cute.arch.sync_warp()  # all lanes have taken theirs: dS may come
    return X


class Gradient(NamedTuple):
    """dK or dV of a tile."""

    which: int  # of shared_keys
    acc: cute.Tensor  # ((2, 2, d / 8), 1, 1)
    sX: cute.Tensor  # (tile_n, d): shared memory that nobody needs after the last product
    tma: Tma
    mX: cute.Tensor  # (b, sk, hk, d)


@cute.jit
def store(config: cutlass.Constexpr, w, block: Block, gradients: tuple[Gradient, ...], barrier_id: int):
    """dK and dV, or one of them, to global memory. By who shares barrier_id: both WGs; config.wide: one."""
    by_tma = Boolean(not config.persistent)  # persistent: shared memory is the next tile's
    if const_expr(config.ragged):  # or the next sequence's rows follow
        by_tma = (block.n_block + 1) * config.tile_n <= block.sequence.room
    if w.call.heads_per_tile < w.setup.sizes.group:
        sums = [(x.which, x.acc) for x in gradients]
        shared_keys.add(config, w.call, w.setup.sizes, block, sums, [w.tidx // 32], w.lane)
    elif by_tma:
        store_by_tma(config, w, block, gradients, barrier_id)
    else:
        key = block.n_block * config.tile_n + w.tidx // 32 * 16 + w.lane // 4
        for x in gradients:
            common.store(config, block, x.acc, x.mX, [key, key + 8], w.lane)


@cute.jit
def store_by_tma(
    config: cutlass.Constexpr, w, block: Block, gradients: tuple[Gradient, ...], barrier_id: int
):
    batch, start = block.k_rows
    threads = 128 if const_expr(config.wide) else 256
    # Both WGs are done with V and Q, and with what TMA wrote there. Not persistent: no load comes any more.
    cute.arch.barrier(barrier_id=CONSUMERS, number_of_threads=256)
    for x in gradients:
        X = cute.make_rmem_tensor(x.acc.layout, x.sX.element_type)
        convert(x.acc, X)
        thr_store, place = make_store(w.setup.dkv, w.tidx, x.sX)
        cute.copy(thr_store, thr_store.retile(X), place)
    cute.arch.fence_view_async_shared()  # generic writes of the gradients, read by TMA
    cute.arch.barrier(barrier_id=barrier_id, number_of_threads=threads)  # the gradients are complete
    if cute.arch.make_warp_uniform(w.tidx // 32) == 0:
        for x in gradients:
            gX = cute.domain_offset((start, 0), x.tma.tensor[None, None, block.head_kv, batch])  # (sk, D)
            gX = cute.local_tile(gX, (config.tile_n, config.head_dim), (block.n_block, 0))
            block_copy(x.tma.atom, cute.group_modes(x.sX, 0, 2), cute.group_modes(gX, 0, 2))
        cute.arch.cp_async_bulk_commit_group()  # both stores (wide: this WG's): the next line waits for them
        cute.arch.cp_async_bulk_wait_group(0, read=True)  # shared memory must outlive the reads
