"""FlashAttention-2 backward (Dao 2023, arXiv 2307.08691, algorithm 2) with mma.sync: SM80 on.

q, o, do, dq (B, Sq, Hq, D), k, v, dk, dv (B, Sk, Hkv, D), float16 or bfloat16, any strides with a unit last
one; lse, dlse (B, Hq, Sq) float32. Three kernels: delta (statistics of the rows, dq_acc = 0), `kernel`,
`round_all` (dq = scale * dq_acc).

Ragged batches lie in the same shapes: packed sequences follow each other in a batch of one.
A thread block of `kernel` owns tile_n keys of one key head. It walks the query blocks that see them, for
each query head of the group, or for some: shared_keys.py. Two warps, a pair, work on the same 16 or 32 keys,
each with one accumulator:

    side 0    Sᵀ = K·Qᵀ      Pᵀ = exp(scale * Sᵀ - LSE)     dV += Pᵀ·dO
    side 1    dPᵀ = V·dOᵀ    dSᵀ = Pᵀ * (dPᵀ - delta)       dK += dSᵀ·Q

Where dS takes another factor than P, side 0 hands over that (README.md, features). Tiles with keys as rows
make Pᵀ and dSᵀ the A operands of the next product where they lie, in registers. The sides run the same
instructions on other operands; then all warps together add dS·K to dq_acc.
"""

import cutlass
import cutlass.cute as cute
from cutlass import Boolean, Float32, Int32, const_expr
from cutlass.cute.nvgpu import cpasync

from mini_flash_attention.kernels.backward import delta, shared_keys
from mini_flash_attention.kernels.backward.common import finish_dS, store
from mini_flash_attention.kernels.backward.schedule import Block, find_block, find_order, num_blocks
from mini_flash_attention.kernels.backward.sm80_dq import add_dQ, round_all
from mini_flash_attention.kernels.backward.sm80_records import (
    PAIR,
    Place,
    Setup,
    Work,
    following,
    make_smem,
    make_work,
    side_of,
    slot_of,
)
from mini_flash_attention.kernels.backward.sm80_scores import columns, probabilities, seed_or_clear
from mini_flash_attention.kernels.calls import Backward
from mini_flash_attention.kernels.parts import arguments
from mini_flash_attention.kernels.parts.fragments import as_operand_A, convert, slice_of, transposed
from mini_flash_attention.kernels.parts.scores import gradient_scale, scale_log2
from mini_flash_attention.kernels.parts.seqlen import sizes_of
from mini_flash_attention.kernels.parts.sm80 import (
    Operand,
    destination,
    fetch,
    gemm,
    load_tile,
    make_tiled_load,
    make_tiled_mma,
    opaque,
    operand_A,
    operand_B,
    put,
    source,
)
from mini_flash_attention.kernels.parts.tiles import tile_layout


@cute.jit
def launch(call: Backward, config: cutlass.Constexpr, stream):
    """All three kernels. Batch, heads and lengths are not 0."""
    delta.launch(call, config, stream)
    setup = make_setup(config, call)
    threads, grid = 32 * config.warps, num_blocks(config, setup.sizes, call.ragged, setup.order)
    kernel(config, call, setup).launch(
        grid=(grid, 1, 1), block=(threads, 1, 1), stream=stream, use_pdl=config.pdl
    )
    batch, heads, m_blocks, _ = call.mdQacc.shape
    grid = m_blocks * heads * batch + shared_keys.num_blocks(call)
    round_all(config, call, setup.sizes, setup.mma_dQ).launch(
        grid=(grid, 1, 1), block=(threads, 1, 1), stream=stream, use_pdl=config.pdl
    )


def make_setup(config, call: Backward) -> Setup:
    sizes, dtype = sizes_of(config, call), call.mQ.element_type
    m, n, d = config.tile_m, config.tile_n, config.head_dim
    return Setup(
        sizes=sizes,
        order=find_order(config, sizes, call),
        scale_log2=scale_log2(config, call.score),
        mma=make_tiled_mma(dtype, config.warps // 2),
        mma_dQ=make_tiled_mma(dtype, config.warps_m, config.warps // config.warps_m),
        load=make_tiled_load(dtype, 32 * config.warps, d),
        layouts=(tile_layout(dtype, n, d, 2), tile_layout(dtype, m, d, 4), tile_layout(dtype, n, m, 2)),
    )


@cute.kernel
def kernel(config: cutlass.Constexpr, call: Backward, setup: Setup):
    block = find_block(config, call, setup, cute.arch.block_idx()[0])
    there = block.n_block >= 0 if const_expr(config.ragged) else Boolean(True)
    if there:
        w = make_work(config, call, setup, make_smem(config, call, setup, block))
        accumulate(config, w, block)
    elif const_expr(config.pdl):
        cute.arch.griddepcontrol_wait()  # round_all waits for this kernel alone, but needs delta's zeros


kernel.set_name_prefix("mfa_bwd_sm80", remove_cutlass_symbol=True)


@cute.jit
def accumulate(config: cutlass.Constexpr, w: Work, block: Block):
    """All that a thread block does. Two query blocks are in shared memory or on the way to it."""
    load_keys(config, w, block)
    if const_expr(config.pdl):
        cute.arch.griddepcontrol_wait()  # delta is done: stats are there, dq_acc and turns are zero
    x = Place(block.heads if block.first < block.last else Int32(0), block.first)
    at = cute.arch.make_warp_uniform(w.tidx // (16 * config.warps))  # the side; slot 0
    for ahead in cutlass.range_constexpr(2):  # to slot 0, to slot 1
        load_next(config, w, following(w.smem, x, ahead), Int32(ahead))
    w.acc.fill(0.0)
    arrive(1)  # K, V and the first query block are here, and what make_smem wrote
    while x.left > 0:
        step(config, w, x, at)
        arrive(0)  # dS is complete, the next query block here, and nobody reads this one any more
        load_next(config, w, following(w.smem, x, 2), slot_of(at))
        x = following(w.smem, x, 1)
        at = at ^ 2
    block = w.smem.find_block()
    if block.first < block.last:
        add_dQ(config, w, x, 1 - slot_of(at))
    finish(config, w, block, at)


@cute.jit
def load_keys(config: cutlass.Constexpr, w: Work, block: Block):
    """Start copying K and V: they are part of the first query block's group."""
    batch, start = block.k_rows
    for i, mX in enumerate((w.call.mK, w.call.mV)):
        gX = mX[batch, None, block.head_kv, None]  # (sk, d)
        if const_expr(config.ragged):
            gX = cute.domain_offset((start, 0), gX)
        gX = cute.local_tile(gX, (config.tile_n, config.head_dim), (block.n_block, 0))
        rows = block.sizes(w.setup.sizes).seqlen_k - block.n_block * config.tile_n
        load_tile(w.setup.load, gX, w.smem.KV[None, None, i], rows, mX.shape[3], w.tidx)


@cute.jit
def load_next(config: cutlass.Constexpr, w: Work, x: Place, slot: Int32):
    """Start loading a query block, if there is one."""
    if x.left > 0:
        load_queries(config, w, x, slot)
    cute.arch.cp_async_commit_group()  # even if nothing is copied: `arrive` counts groups


@cute.jit
def load_queries(config: cutlass.Constexpr, w: Work, x: Place, slot: Int32):
    """Start copying a block of Q and of dO and their statistics; rows beyond the last are zeros."""
    head, m_block = x.head(w), x.m_block
    block = w.smem.find_block()
    batch, start = block.q_rows
    for i, mX in enumerate((w.call.mQ, w.call.mdO)):
        gX, seqlen_q = mX[batch, None, opaque(head), None], mX.shape[1]
        if const_expr(config.ragged):
            gX, seqlen_q = cute.domain_offset((start, 0), gX), block.sequence.q.seqlen
        gX = cute.local_tile(gX, (config.tile_m, config.head_dim), (m_block, 0))
        rows = seqlen_q - m_block * config.tile_m
        load_tile(w.setup.load, gX, w.smem.QdO[None, None, 2 * slot + i], rows, mX.shape[3], w.tidx)
    batch, number = block.place(m_block)
    tidx = opaque(w.tidx)
    if tidx < 2 * config.tile_m // 4:
        flat = cute.make_layout(2 * config.tile_m)
        gStats = cute.make_tensor(w.call.mStats[batch, head, number, None, None].iterator, flat)
        sStats = cute.make_tensor(w.smem.stats[None, 2 * slot].iterator, flat)
        atom = cute.make_copy_atom(cpasync.CopyG2SOp(), Float32, num_bits_per_copy=128)
        cute.copy(atom, cute.local_tile(gStats, (4,), (tidx,)), cute.local_tile(sStats, (4,), (tidx,)))


@cute.jit
def arrive(groups: cutlass.Constexpr):
    """Everybody's copies but the last `groups` are here, and everybody is done with what was read before."""
    cute.arch.cp_async_wait_group(groups)  # this thread's own copies
    cute.arch.barrier()  # all threads': what they copied and wrote may be read, what they read overwritten


@cute.jit
def step(config: cutlass.Constexpr, w: Work, x: Place, at: Int32):
    """S and P or dP and dS of one query block, then dV or dK; dS is left in shared memory for dQ.

    And dQ of the block before: by side 1 first, by side 0 after P, so that one side's products run under the
    other's arithmetic.
    """
    if side_of(at) == 1:
        add_dQ(config, w, x, 1 - slot_of(at))
    X, Y = w.smem.QdO[None, None, at], w.smem.QdO[None, None, at ^ 1]  # Q and dO, or dO and Q
    mma = w.setup.mma
    p = operand_A(mma, w.smem.dS[None, None, slot_of(at)])
    p = Operand(w.P, p.copy, p.sX, p.chunk_bits)
    in_side, pair = w.in_side(config), PAIR + w.in_side(config) // 32
    seed_or_clear(config, w, at)
    a = operand_A(mma, w.smem.KV[None, None, side_of(at)])
    gemm(mma, w.acc_S, a, operand_B(mma, X, transpose=False), in_side)
    if side_of(at) == 0:
        probabilities(config, w, x, at, p)
        cute.arch.barrier_arrive(barrier_id=pair, number_of_threads=64)  # P is there for side 1
        add_dQ(config, w, x, 1 - slot_of(at))
    else:
        cute.arch.barrier(barrier_id=pair, number_of_threads=64)  # side 0's P is there; dS may overwrite it
        place, lane = source(p, in_side), opaque(w.tidx) % 32
        for k in cutlass.range_constexpr(cute.size(w.P, mode=[2])):
            fetch(p, place, k)
            dS, P = slice_of(as_operand_A(w.acc_S), k), slice_of(w.P, k)
            stat = columns(w.smem.stats[None, at], lane, 16 * k, 16)
            finish_dS(config, w.call.dropout, dS, P, stat)
            convert(dS, P)
        place = destination(mma, p, in_side)
        for k in cutlass.range_constexpr(cute.size(w.P, mode=[2])):
            put(place, slice_of(w.P, k), k)
    gemm(mma, w.acc, Operand(w.P), operand_B(mma, transposed(Y), transpose=True), in_side)


@cute.jit
def finish(config: cutlass.Constexpr, w: Work, block: Block, at: Int32):
    """Scale dV or dK, and store it. No wait: a thread stores its own accumulators."""
    keys = w.keys(config)
    of_dV = w.call.dropout.rescale if const_expr(config.dropout) else Float32(1.0)
    rescale = of_dV if side_of(at) == 0 else gradient_scale(config, w.call.score)
    for i in cutlass.range_constexpr(cute.size(w.acc)):
        w.acc[i] = w.acc[i] * rescale
    if w.call.heads_per_tile < w.setup.sizes.group:
        row_blocks = [(keys[r] - block.n_block * config.tile_n) // 16 for r in range(0, len(keys), 2)]
        which = shared_keys.DV if side_of(at) == 0 else shared_keys.DK
        shared_keys.add(config, w.call, w.setup.sizes, block, [(which, w.acc)], row_blocks, w.tidx % 32)
    elif side_of(at) == 0:
        store(config, block, w.acc, w.call.mdV, keys, w.tidx % 32)
    else:
        store(config, block, w.acc, w.call.mdK, keys, w.tidx % 32)


def fake_call(config) -> Backward:
    return arguments.backward(config)
