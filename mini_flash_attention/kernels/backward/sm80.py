"""FlashAttention-2 backward (Dao 2023, arXiv 2307.08691, algorithm 2) with mma.sync: SM80 on.

q, o, do, dq (B, Sq, Hq, D), k, v, dk, dv (B, Sk, Hkv, D), float16 or bfloat16, any strides with a unit last
one; lse, dlse (B, Hq, Sq) float32. Three kernels: bwd_delta (statistics of the rows, dq_acc = 0), `kernel`,
`convert_dQ` (dq = scale * dq_acc).

Ragged batches lie in the same shapes: packed sequences follow each other in a batch of one.
A thread block of `kernel` owns tile_n keys of one key head. It walks the query blocks that see them, for
each query head of the group. Two warps, a pair, work on the same 16 or 32 keys, each with one accumulator:

    side 0    Sᵀ = K·Qᵀ      Pᵀ = exp(scale * Sᵀ - LSE)     dV += Pᵀ·dO
    side 1    dPᵀ = V·dOᵀ    dSᵀ = Pᵀ * (dPᵀ - delta)       dK += dSᵀ·Q

With a softcap or dropout side 0 hands over what dS takes in the place of P. Tiles with keys as rows make Pᵀ
and dSᵀ the A operands of the next product where they lie, in registers. The sides run the same instructions
on other operands; then all warps together add dS·K to dq_acc.
"""

from typing import NamedTuple

import cutlass
import cutlass.cute as cute
import cutlass.utils.hopper_helpers as hopper
from cutlass import Float32, Int32, const_expr
from cutlass.cute.nvgpu import cpasync
from cutlass.memory import SmemAllocator
from cutlass.tensor_utils import LayoutEnum

from mini_flash_attention.kernels.backward import delta
from mini_flash_attention.kernels.backward.schedule import (
    Block,
    Sequence,
    find_block,
    find_swath,
    num_blocks,
    query_block,
    turn,
    uniform,
)
from mini_flash_attention.kernels.backward.scores import copy_marks, exponentials, finish_dS, seed
from mini_flash_attention.kernels.calls import Backward, Dropout, Ragged, Score
from mini_flash_attention.kernels.parts import arguments
from mini_flash_attention.kernels.parts.blocks import unmasked_queries
from mini_flash_attention.kernels.parts.dropout import keep, mark_transposed
from mini_flash_attention.kernels.parts.fragments import (
    as_operand_A,
    convert,
    quad_transpose,
    rows_cols,
    slice_of,
    store_rows,
    store_sequence,
    transposed,
)
from mini_flash_attention.kernels.parts.scores import LOG2_E, in_log2, transform
from mini_flash_attention.kernels.parts.seqlen import Keys, Queries, Sizes, sizes_of
from mini_flash_attention.kernels.parts.sm80 import (
    Operand,
    add_to_global,
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

K, V = Q, DO = 0, 1  # which of two tiles in shared memory; side 0 multiplies K and Q, side 1 V and dO
ZEROS = 4  # where smem.stats has them


class Smem(NamedTuple):
    KV: cute.Tensor  # (tile_n, d, 2)
    QdO: cute.Tensor  # (tile_m, d, 4): Q, dO of the first slot, Q, dO of the second
    dS: cute.Tensor  # (tile_n, tile_m, 2): a slot's Pᵀ (or the factor Fᵀ), which dSᵀ then overwrites
    stats: cute.Tensor  # (tile_m, config.stats) float32: -LSE / scale, -delta of a slot, of the other; zeros
    block: cute.Tensor  # (config.block_numbers) int32

    @cute.jit
    def keep_block(self, block: Block):
        numbers, x = block[:5], block.sequence
        if const_expr(x is not None):
            numbers = *numbers, *x.q, x.first_block, *x.k, x.room
        for i in cutlass.range_constexpr(len(numbers)):
            self.block[i] = numbers[i]

    @cute.jit
    def find_block(self) -> Block:
        """What the thread block works on, asked for anew: the products leave no registers for it."""
        x, sequence = self.block, None
        if const_expr(cute.size(x) > 5):  # a ragged batch
            sequence = Sequence(Queries(x[5], x[6], x[7]), x[8], Keys(x[9], x[10], x[11]), x[12])
        return Block(x[0], x[1], x[2], x[3], x[4], sequence)

    @cute.jit
    def find_sizes(self, sizes: Sizes) -> Sizes:
        """Those of the sequence, asked for anew as well."""
        block = self.find_block()
        if const_expr(block.sequence is None):
            return sizes.of(opaque(sizes.seqlen_q), opaque(sizes.seqlen_k))
        return block.sizes(sizes)


class Call(NamedTuple):
    """What all thread blocks work on and with, but for shared memory."""

    sizes: Sizes
    swath: Int32
    ragged: Ragged | None
    scale: Float32
    score: Score  # in_log2
    dropout: Dropout | None
    mQ: cute.Tensor
    mK: cute.Tensor
    mV: cute.Tensor
    mdO: cute.Tensor
    mStats: cute.Tensor
    mdQacc: cute.Tensor
    mdK: cute.Tensor
    mdV: cute.Tensor
    mTurns: cute.Tensor
    tiled_mma: cute.TiledMma  # of a side
    tiled_mma_dQ: cute.TiledMma
    tiled_load: cute.TiledCopy


class Loader(NamedTuple):
    """Where query blocks come from and go to."""

    copy: cute.TiledCopy
    mQ: cute.Tensor  # (b, sq, h, d)
    mdO: cute.Tensor  # (b, sq, h, d)
    mStats: cute.Tensor  # (b, h, m_blocks, 2, tile_m)
    smem: Smem
    tidx: Int32


class Work(NamedTuple):
    """What one thread computes with."""

    tiled_mma: cute.TiledMma  # the pairs, one below the other: keys as rows
    tiled_mma_dQ: cute.TiledMma  # all warps
    smem: Smem
    acc_S: cute.Tensor  # ((2, 2), tile_n / (8 * warps), tile_m / 8): Sᵀ or dPᵀ
    acc: cute.Tensor  # ((2, 2), tile_n / (8 * warps), d / 8): dV or dK
    acc_dQ: cute.Tensor  # ((2, 2), tile_m / (16 * warps_m), d / (8 * warps / warps_m))
    P: cute.Tensor  # ((2, 2, 2), tile_n / (8 * warps), tile_m / 16): Pᵀ or dSᵀ, 16 bits
    mdQacc: cute.Tensor  # (b, h, m_blocks, tile_m * d)
    mTurns: cute.Tensor  # (b, h, m_blocks)
    score: Score  # in_log2
    dropout: Dropout | None
    tidx: Int32

    def in_side(self, config) -> Int32:
        """The number of the thread in its side."""
        return opaque(self.tidx) % (16 * config.warps)

    def coords(self, config) -> cute.Tensor:
        """(key, query) of each element of acc_S, as rows and columns."""
        tile = cute.make_identity_tensor((config.tile_n, config.tile_m))
        return rows_cols(self.tiled_mma.get_slice(self.in_side(config)).partition_C(tile))


@cute.jit
def load_queries(config: cutlass.Constexpr, x: Loader, head: Int32, m_block: Int32, slot: Int32):
    """Start copying a block of Q and of dO and their statistics; rows beyond the last are zeros."""
    tile, block = (config.tile_m, config.head_dim), x.smem.find_block()
    batch, start = block.q_rows
    for i, mX in ((Q, x.mQ), (DO, x.mdO)):
        gX, seqlen_q = mX[batch, None, opaque(head), None], mX.shape[1]
        if const_expr(config.ragged):
            gX, seqlen_q = cute.domain_offset((start, 0), gX), block.sequence.q.seqlen
        gX = cute.local_tile(gX, tile, (m_block, 0))
        rows = seqlen_q - m_block * config.tile_m
        load_tile(x.copy, gX, x.smem.QdO[None, None, 2 * slot + i], rows, mX.shape[3], x.tidx)
    batch, number = block.place(m_block)
    tidx = opaque(x.tidx)
    if tidx < 2 * config.tile_m // 4:
        flat = cute.make_layout(2 * config.tile_m)
        gStats = cute.make_tensor(x.mStats[batch, head, number, None, None].iterator, flat)
        sStats = cute.make_tensor(x.smem.stats[None, 2 * slot].iterator, flat)
        atom = cute.make_copy_atom(cpasync.CopyG2SOp(), Float32, num_bits_per_copy=128)
        cute.copy(atom, cute.local_tile(gStats, (4,), (tidx,)), cute.local_tile(sStats, (4,), (tidx,)))


@cute.jit
def arrive(groups: cutlass.Constexpr):
    """Everybody's copies but the last `groups` are here, and everybody is done with what was read before."""
    cute.arch.cp_async_wait_group(groups)
    cute.arch.barrier()


def columns(sStat: cute.Tensor, lane: Int32, first: int, count: int) -> cute.Tensor:
    """A statistic of a thread's columns, among `count` of the tile from `first` on: (2, count / 8)."""
    layout = cute.make_layout((2, count // 8), stride=(1, 8))
    return cute.make_tensor(sStat.iterator + first + 2 * (lane % 4), layout)


@cute.jit
def seed_or_clear(config: cutlass.Constexpr, w: Work, at: Int32):
    """acc_S <- the statistic of each query, so that S or dP comes out less it; 0 if that is too early.

    A score function comes before S - LSE, dropout before dP - delta.
    """
    too_early = config.score != "plain", config.dropout  # for S, for dP
    if const_expr(all(too_early)):
        w.acc_S.fill(0.0)
    else:
        if const_expr(any(too_early)):
            at = Int32(ZEROS) if (at & 1) == too_early.index(True) else at
        seed(w.acc_S, columns(w.smem.stats[None, at], opaque(w.tidx) % 32, 0, config.tile_m))


@cute.jit
def mask(config: cutlass.Constexpr, sizes: Sizes, w: Work, m_block: Int32):
    """acc_S <- -inf where a query may not see the key, or where there is no key; cf. mask.py."""
    S, rc = rows_cols(w.acc_S), w.coords(config)
    left, right = sizes.window(config.mask)
    start = m_block * config.tile_m + rc[0, 0][1]  # query of this thread's first column
    for r in cutlass.range_constexpr(cute.size(S, mode=[0])):
        key = w.smem.find_block().n_block * config.tile_n + rc[r, 0][0]
        diagonal = key + opaque(sizes.seqlen_q) - sizes.seqlen_k
        begin = Int32(0) if key < sizes.seqlen_k else (m_block + 1) * config.tile_m
        if const_expr(right is not None):
            begin = cutlass.max(begin, diagonal - right)
        begin = begin - start
        for c in cutlass.range_constexpr(cute.size(S, mode=[1])):
            S[r, c] = S[r, c] if (c // 2) * 8 + c % 2 >= begin else -Float32.inf
        if const_expr(left is not None):
            end = diagonal + left + 1 - start
            for c in cutlass.range_constexpr(cute.size(S, mode=[1])):
                S[r, c] = S[r, c] if (c // 2) * 8 + c % 2 < end else -Float32.inf


@cute.jit
def head_of(sizes: Sizes, smem: Smem, left: Int32) -> Int32:
    """The query head when `left` of the group are left, itself included."""
    return (smem.find_block().head_kv + 1) * sizes.group - left


@cute.jit
def following(smem: Smem, left: Int32, m_block: Int32, steps: cutlass.Constexpr):
    """The query block so many steps later, of the next head after the last one."""
    block = smem.find_block()
    for _ in cutlass.range_constexpr(steps):
        end = m_block + 1 == block.last
        left, m_block = left - 1 if end else left, block.first if end else m_block + 1
    return left, m_block


@cute.jit
def add_dQ(config: cutlass.Constexpr, sizes: Sizes, w: Work, left: Int32, m_block: Int32, slot: Int32):
    """dq_acc += dS·K of the query block before; slot: its dS."""
    block = w.smem.find_block()
    start = opaque(m_block) == block.first
    left = opaque(left) + 1 if start else left
    m_block = block.last - 1 if start else m_block - 1
    if left <= sizes.group:
        add_dS_K(config, sizes, w, head_of(sizes, w.smem, left), m_block, slot)


@cute.jit
def turn_counter(w: Work, head: Int32, m_block: Int32):
    """Where the warps that have added to a tile of dq_acc are counted."""
    batch, number = w.smem.find_block().place(opaque(m_block))
    turns = w.mTurns[batch, opaque(head), None]
    return cute.local_tile(turns, (1,), (number,)).iterator.llvm_ptr


@cute.jit
def add_dS_K(config: cutlass.Constexpr, sizes: Sizes, w: Work, head: Int32, m_block: Int32, slot: Int32):
    a = operand_A(w.tiled_mma_dQ, transposed(w.smem.dS[None, None, slot]), transpose=True)
    b = operand_B(w.tiled_mma_dQ, transposed(w.smem.KV[None, None, K]), transpose=True)
    w.acc_dQ.fill(0.0)
    gemm(w.tiled_mma_dQ, w.acc_dQ, a, b, w.tidx)
    if const_expr(config.deterministic):
        lengths = w.smem.find_sizes(sizes)
        mine = config.warps * turn(config, lengths, w.smem.find_block().n_block, m_block)
        done = Int32(-1)  # warps that have added to this tile
        while done < mine:
            done = cute.arch.load(turn_counter(w, head, m_block), Int32, sem="acquire", scope="gpu")
    size = config.dq_vector
    batch, number = w.smem.find_block().place(m_block)
    acc = w.mdQacc[batch, head, number, None].iterator + size * opaque(w.tidx)
    for i in cutlass.range_constexpr(0, cute.size(w.acc_dQ), size):
        values = [w.acc_dQ[i + j] for j in range(size)]
        add_to_global(acc + i * 32 * config.warps, values)
    if const_expr(config.deterministic):
        cute.arch.fence_acq_rel_gpu()  # each lane's additions come before the warp's turn is over
        cute.arch.sync_warp()
        if opaque(w.tidx) % 32 == 0:
            cute.arch.atomic_add(turn_counter(w, head, m_block), Int32(1), sem="relaxed", scope="gpu")


@cute.jit
def distances_of(config: cutlass.Constexpr, sizes: Sizes, w: Work, query: Int32) -> cute.Tensor:
    """Those of scores.transform, worked out anew; query: the tile's first column."""
    rc, block, lengths = w.coords(config), w.smem.find_block(), w.smem.find_sizes(sizes)
    distances = cute.make_rmem_tensor(cute.size(rc, mode=[0]), Int32)
    diagonal = block.n_block * config.tile_n + lengths.seqlen_q - lengths.seqlen_k
    for r in cutlass.range_constexpr(cute.size(distances)):
        distances[r] = diagonal + rc[r, 0][0] - (query + rc[0, 0][1])
    return distances


@cute.jit
def masked_scores(config: cutlass.Constexpr, sizes: Sizes, w: Work, left: Int32, m_block: Int32):
    """acc_S <- scores, -inf where masked; in log2 units unless plain. Returns ALiBi's slope of each row."""
    S = rows_cols(w.acc_S)
    slopes = cute.make_rmem_tensor(cute.size(S, mode=[0]), Float32)
    if const_expr("alibi" in config.score):
        batch, head = w.smem.find_block().batch, head_of(sizes, w.smem, left)
        slopes.fill(w.score.slopes[batch, head] * Float32(LOG2_E))
    distances = distances_of(config, sizes, w, opaque(m_block) * config.tile_m)
    transform(config, w.score, S, slopes, distances)
    lengths = w.smem.find_sizes(sizes)
    lengths = config.tile_m, config.tile_n, lengths.seqlen_q, lengths.seqlen_k
    free_first, free_last = unmasked_queries(
        w.smem.find_block().n_block, *lengths, *sizes.window(config.mask)
    )
    if m_block < free_first or m_block >= free_last:
        mask(config, w.smem.find_block().sizes(sizes), w, m_block)
    return slopes


@cute.jit
def factor_of_dS(
    config: cutlass.Constexpr,
    sizes: Sizes,
    w: Work,
    left: Int32,
    query: Int32,
    P: cute.Tensor,
    acc_F: cute.Tensor | None,
) -> cute.Tensor:
    """What dS takes in the place of P, in 16 bits; it and P become negative where dropped.

    query: the first column.
    """
    F = P
    if const_expr(config.dropout):
        rc, block = w.coords(config), w.smem.find_block()
        rows = range(0, cute.size(rc, mode=[0]), 2)
        keys = tuple(block.n_block * config.tile_n + rc[r, 0][0] for r in rows)
        batch_head = block.batch * sizes.heads + head_of(sizes, w.smem, left)
        mark_transposed(w.dropout, P, keys, query + rc[0, 0][1], batch_head)
    if const_expr("softcap" in config.score):
        F = cute.make_rmem_tensor(P.shape, P.element_type)
        convert(acc_F, F)
        if const_expr(config.dropout):
            copy_marks(P, F)
    return F


@cute.jit
def probabilities(
    config: cutlass.Constexpr, sizes: Sizes, w: Work, left: Int32, m_block: Int32, at: Int32, p: Operand
):
    """w.P <- P, from S, for dV; for dS, P or its factor goes to shared memory."""
    slopes = masked_scores(config, sizes, w, left, m_block)
    acc_S, lane = as_operand_A(w.acc_S), opaque(w.tidx) % 32
    place = destination(w.tiled_mma, p, w.in_side(config))
    for k in cutlass.range_constexpr(cute.size(w.P, mode=[2])):
        S, P, acc_F = slice_of(acc_S, k), slice_of(w.P, k), None
        query = opaque(m_block) * config.tile_m + 16 * k
        if const_expr("softcap" in config.score):
            acc_F = cute.make_rmem_tensor(P.shape, Float32)
        if const_expr(config.score == "plain"):
            for i in cutlass.range_constexpr(cute.size(S)):
                S[i] = cute.math.exp2(S[i] * w.score.scale, fastmath=True)
        else:
            stat = columns(w.smem.stats[None, at], lane, 16 * k, 16)
            exponentials(config, w.score, S, stat, slopes, distances_of(config, sizes, w, query), acc_F)
        convert(S, P)
        put(place, factor_of_dS(config, sizes, w, left, query, P, acc_F), k)
        if const_expr(config.dropout):
            keep(P, P)


@cute.jit
def step(config: cutlass.Constexpr, sizes: Sizes, w: Work, left: Int32, m_block: Int32, at: Int32):
    """S and P or dP and dS of one query block, then dV or dK; dS is left in shared memory for dQ.

    And dQ of the block before: by side 1 first, by side 0 after P, so that one side's products run under the
    other's arithmetic.
    """
    if (at & 1) == 1:
        add_dQ(config, sizes, w, left, m_block, 1 - (at >> 1))
    X, Y = w.smem.QdO[None, None, at], w.smem.QdO[None, None, at ^ 1]
    p = operand_A(w.tiled_mma, w.smem.dS[None, None, at >> 1])
    p = Operand(w.P, p.copy, p.sX, p.chunk_bits)
    in_side, pair = w.in_side(config), 1 + w.in_side(config) // 32
    seed_or_clear(config, w, at)
    a = operand_A(w.tiled_mma, w.smem.KV[None, None, at & 1])
    gemm(w.tiled_mma, w.acc_S, a, operand_B(w.tiled_mma, X, transpose=False), in_side)
    if (at & 1) == 0:
        probabilities(config, sizes, w, left, m_block, at, p)
        cute.arch.barrier_arrive(barrier_id=pair, number_of_threads=64)  # P is there for side 1
        add_dQ(config, sizes, w, left, m_block, 1 - (at >> 1))
    else:
        cute.arch.barrier(barrier_id=pair, number_of_threads=64)
        place, lane = source(p, in_side), opaque(w.tidx) % 32
        for k in cutlass.range_constexpr(cute.size(w.P, mode=[2])):
            fetch(p, place, k)
            dS, P = slice_of(as_operand_A(w.acc_S), k), slice_of(w.P, k)
            finish_dS(config, w.dropout, dS, P, columns(w.smem.stats[None, at], lane, 16 * k, 16))
            convert(dS, P)
        place = destination(w.tiled_mma, p, in_side)
        for k in cutlass.range_constexpr(cute.size(w.P, mode=[2])):
            put(place, slice_of(w.P, k), k)
    gemm(w.tiled_mma, w.acc, Operand(w.P), operand_B(w.tiled_mma, transposed(Y), transpose=True), in_side)


@cute.jit
def accumulate(config: cutlass.Constexpr, c: Call, block: Block, layouts: tuple):
    """All that a thread block does."""
    tidx, _, _ = cute.arch.thread_idx()
    allocator, dtype = SmemAllocator(), c.mQ.element_type
    tiles = [allocator.allocate_tensor(dtype, x.outer, 1024, swizzle=x.inner) for x in layouts]
    stats = cute.make_layout((config.tile_m, config.stats))
    stats = allocator.allocate_tensor(Float32, stats, 128)
    if const_expr(config.stats > ZEROS):
        if tidx < config.tile_m:
            stats[tidx, ZEROS] = Float32(0.0)
    numbers = cute.make_layout(config.block_numbers)
    smem = Smem(*tiles, stats, allocator.allocate_tensor(Int32, numbers))
    smem.keep_block(block)
    x = Loader(c.tiled_load, c.mQ, c.mdO, c.mStats, smem, tidx)

    side = cute.arch.make_warp_uniform(tidx // (16 * config.warps))
    thr_mma = c.tiled_mma.get_slice(tidx % (16 * config.warps))
    acc_S, acc = (
        cute.make_rmem_tensor(thr_mma.partition_shape_C((config.tile_n, columns)), Float32)
        for columns in (config.tile_m, config.head_dim)
    )
    acc_dQ = c.tiled_mma_dQ.get_slice(0).partition_shape_C((config.tile_m, config.head_dim))
    w = Work(
        c.tiled_mma,
        c.tiled_mma_dQ,
        smem,
        acc_S,
        acc,
        cute.make_rmem_tensor(acc_dQ, Float32),
        cute.make_rmem_tensor(as_operand_A(acc_S).shape, dtype),
        c.mdQacc,
        c.mTurns,
        c.score,
        c.dropout,
        tidx,
    )

    batch_k, start_k = block.k_rows
    for i, mX in ((K, c.mK), (V, c.mV)):
        gX = mX[batch_k, None, block.head_kv, None]  # (sk, d)
        if const_expr(config.ragged):
            gX = cute.domain_offset((start_k, 0), gX)
        gX = cute.local_tile(gX, (config.tile_n, config.head_dim), (block.n_block, 0))
        rows = block.sizes(c.sizes).seqlen_k - block.n_block * config.tile_n
        load_tile(c.tiled_load, gX, smem.KV[None, None, i], rows, mX.shape[3], tidx)
    if const_expr(config.pdl):
        cute.arch.griddepcontrol_wait()  # bwd_delta is done
    left = c.sizes.group if block.first < block.last else Int32(0)
    m_block, at = block.first, side
    for ahead in cutlass.range_constexpr(2):
        next_left, next_block = following(smem, left, m_block, ahead)
        if next_left > 0:
            load_queries(config, x, head_of(c.sizes, smem, next_left), next_block, Int32(ahead))
        cute.arch.cp_async_commit_group()
    acc.fill(0.0)
    arrive(1)  # K, V and the first query block are here
    while left > 0:
        step(config, c.sizes, w, left, m_block, at)
        arrive(0)  # dS is complete, the next query block here, and nobody reads this one any more
        next_left, next_block = following(smem, left, m_block, 2)
        if next_left > 0:
            load_queries(config, x, head_of(c.sizes, smem, next_left), next_block, at >> 1)
        cute.arch.cp_async_commit_group()
        left, m_block = following(smem, left, m_block, 1)
        at = at ^ 2
    block = smem.find_block()
    if block.first < block.last:
        add_dQ(config, c.sizes, w, left, m_block, 1 - (at >> 1))

    rc = w.coords(config)
    rows = cute.make_rmem_tensor(cute.size(rc, mode=[0]), Int32)
    for r in cutlass.range_constexpr(cute.size(rows)):
        rows[r] = block.n_block * config.tile_n + rc[r, 0][0]
    of_dV = c.dropout.rescale if const_expr(config.dropout) else Float32(1.0)
    rescale = of_dV if (at & 1) == 0 else c.scale
    for i in cutlass.range_constexpr(cute.size(acc)):
        acc[i] = acc[i] * rescale
    out = cute.make_rmem_tensor(acc.shape, dtype)
    convert(acc, out)
    if (at & 1) == 0:
        store(config, block, out, c.mdV, rows, tidx % 32)
    else:
        store(config, block, out, c.mdK, rows, tidx % 32)


@cute.jit
def store(
    config: cutlass.Constexpr, block: Block, out: cute.Tensor, mX: cute.Tensor, rows: cute.Tensor, lane: Int32
):
    """Store a thread's part of dV or dK; rows: its keys."""
    batch, start = block.k_rows
    gX = mX[batch, None, block.head_kv, None]  # (sk, d)
    if const_expr(config.ragged):  # the next sequence's rows follow
        store_sequence(out, gX, rows, start, block.sequence.room, lane)
    else:
        store_rows(out, gX, rows, lane)


@cute.kernel
def kernel(config: cutlass.Constexpr, c: Call, layouts: tuple):
    block = uniform(find_block(config, c.sizes, c.ragged, c.swath))
    if const_expr(not config.ragged):  # noqa: SIM114, only one of the conditions is known to the compiler
        accumulate(config, c, block, layouts)
    elif block.n_block >= 0:
        accumulate(config, c, block, layouts)
    elif const_expr(config.pdl):
        cute.arch.griddepcontrol_wait()  # convert_dQ waits for this kernel alone, but needs bwd_delta


kernel.set_name_prefix("mfa_bwd_sm80", remove_cutlass_symbol=True)


@cute.kernel
def convert_dQ(
    config: cutlass.Constexpr,
    mdQacc: cute.Tensor,
    mdQ: cute.Tensor,
    ragged: Ragged | None,
    scale: Float32,
    tiled_mma_dQ: cute.TiledMma,
):
    """dQ = scale * dq_acc; a thread block for each query block, each thread reads what add_dQ's wrote.

    Rows of packed queries that belong to no sequence are blocks as well: nothing was added to their zeros.
    """
    tidx, _, _ = cute.arch.thread_idx()
    block, _, _ = cute.arch.block_idx()
    heads, m_blocks = mdQacc.shape[1], mdQacc.shape[2]
    m_block, head, batch = block % m_blocks, block // m_blocks % heads, block // (m_blocks * heads)
    first, left = query_block(config, ragged, mdQ.shape[1], m_block)
    if const_expr(config.pdl):
        cute.arch.griddepcontrol_wait()  # the main kernel is done: dq_acc is complete
    thr_mma = tiled_mma_dQ.get_slice(tidx)
    tile = config.tile_m, config.head_dim
    acc = cute.make_rmem_tensor(thr_mma.partition_shape_C(tile), Float32)
    size = config.dq_vector
    start = mdQacc[batch, head, m_block, None].iterator + size * tidx
    layout = cute.make_layout((size, cute.size(acc) // size), stride=(1, 32 * config.warps * size))
    flat = cute.make_tensor(acc.iterator, cute.make_layout(layout.shape))
    cute.autovec_copy(cute.make_tensor(start, layout), flat)
    for i in cutlass.range_constexpr(cute.size(acc)):
        acc[i] = acc[i] * scale
    dQ = cute.make_rmem_tensor(acc.shape, mdQ.element_type)
    convert(acc, dQ)
    rc = rows_cols(thr_mma.partition_C(cute.make_identity_tensor(tile)))
    words = rows_cols(cute.recast_tensor(dQ, Int32))  # (rows, columns / 2)
    gdQ = mdQ[batch, None, head, None]
    out, q = cute.make_rmem_tensor(4, Int32), tidx % 4
    # A quad has 2 rows of 2 times 8 columns: after a transpose, each of its threads has 8 of one row.
    for r in cutlass.range_constexpr(0, cute.size(words, mode=[0]), 2):
        for c in cutlass.range_constexpr(0, cute.size(words, mode=[1]), 2):
            for i in cutlass.range_constexpr(4):
                out[i] = words[r + i // 2, c + i % 2]
            quad_transpose(out, q)
            row = first + (rc[r, 0][0] if q < 2 else rc[r + 1, 0][0])
            column = (rc[0, 2 * c][1] if q % 2 == 0 else rc[0, 2 * c + 2][1]) // 8
            if row < first + left and 8 * column < gdQ.shape[1]:
                cute.autovec_copy(
                    cute.recast_tensor(out, dQ.element_type), cute.local_tile(gdQ[row, None], (8,), (column,))
                )


convert_dQ.set_name_prefix("mfa_bwd_convert", remove_cutlass_symbol=True)


@cute.jit
def launch(call: Backward, config: cutlass.Constexpr, stream):
    """The tensors are as in the module's first lines; stats, dq_acc and turns as in bwd_delta.py."""
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
    ) = call[:19]
    dtype, d = mQ.element_type, config.head_dim
    tile_m, tile_n = config.tile_m, config.tile_n
    sizes = sizes_of(config, mQ, mK, window_left, window_right, ragged)
    layouts = (
        hopper.make_smem_layout_a(LayoutEnum.ROW_MAJOR, (tile_n, tile_m, d), dtype, 2),
        hopper.make_smem_layout_a(LayoutEnum.ROW_MAJOR, (tile_m, tile_n, d), dtype, 4),
        hopper.make_smem_layout_a(LayoutEnum.ROW_MAJOR, (tile_n, d, tile_m), dtype, 2),
    )
    tiled_mma_dQ = make_tiled_mma(dtype, config.warps_m, config.warps // config.warps_m)
    delta.launch(config, mO, mdO, mLSE, mdLSE, mStats, mdQacc, mTurns, score, ragged, has_dlse, stream)
    threads = 32 * config.warps
    tensors = mQ, mK, mV, mdO, mStats, mdQacc, mdK, mdV, mTurns
    tiled = make_tiled_mma(dtype, config.warps // 2), tiled_mma_dQ, make_tiled_load(dtype, threads, d)
    scores, swath = (score.scale, in_log2(config, score), dropout), find_swath(config, sizes, ragged)
    call = Call(sizes, swath, ragged, *scores, *tensors, *tiled)
    kernel(config, call, layouts).launch(
        grid=(num_blocks(config, sizes, ragged), 1, 1),
        block=(threads, 1, 1),
        stream=stream,
        use_pdl=config.pdl,
    )
    batch, heads, m_blocks = mdQacc.shape[0], mdQacc.shape[1], mdQacc.shape[2]
    convert_dQ(config, mdQacc, mdQ, ragged, score.scale, tiled_mma_dQ).launch(
        grid=(m_blocks * heads * batch, 1, 1),
        block=(threads, 1, 1),
        stream=stream,
        use_pdl=config.pdl,
    )


def fake_call(config) -> Backward:
    return arguments.backward(config)
