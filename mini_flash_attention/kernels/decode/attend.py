"""Decoding: a few queries against many keys, with cp.async, ldmatrix and mma.sync on every architecture.

q and o (b, sq, h, d), k and v (b, sk, hk, d) or pages (num_blocks, page_size, hk, d), lse (b, h, sq) float32;
float16 or bfloat16, any strides with a unit last one; packed sequences have b = 1. The time is that of
reading K and V once, so all that counts is to have enough loads in flight at every moment: the query heads
that share a key head are rows of one tile, and the keys are split over as many thread blocks as the GPU holds
(Dao et al. 2023, "Flash-Decoding"), in a thread block over its warps. combine.py merges the splits.
"""

from typing import NamedTuple

import cutlass
import cutlass.cute as cute
import cutlass.utils.hopper_helpers as hopper
from cutlass import Boolean, Float32, Int32, const_expr
from cutlass.memory import SmemAllocator
from cutlass.tensor_utils import LayoutEnum

from mini_flash_attention.gpu.config import ELEMENTS
from mini_flash_attention.kernels.calls import Decode, Ragged, Score
from mini_flash_attention.kernels.decode import combine
from mini_flash_attention.kernels.decode.splits import split_blocks, visible_blocks
from mini_flash_attention.kernels.parts import arguments
from mini_flash_attention.kernels.parts.fragments import as_operand_A, convert, rows_cols, transposed
from mini_flash_attention.kernels.parts.scores import scale_log2, transform
from mini_flash_attention.kernels.parts.seqlen import Keys, Queries, clamp, keys, queries
from mini_flash_attention.kernels.parts.sm80 import Operand, gemm, make_tiled_load, make_tiled_mma, operand_B
from mini_flash_attention.kernels.parts.softmax import LN_2, OnlineSoftmax


class Call(NamedTuple):
    """One call's tensors and numbers."""

    mQ: cute.Tensor  # (b, sq, h, d)
    mK: cute.Tensor  # (b, sk, hk, d), or pages: (num_blocks, page_size, hk, d)
    mV: cute.Tensor  # like mK
    mO: cute.Tensor  # (b, sq, h, d)
    mLSE: cute.Tensor  # (b, h, sq)
    partial: combine.Partial
    ragged: Ragged
    score: Score
    window: tuple[Int32, Int32]  # (left, right)
    num_splits: Int32
    fused: Int32  # 1: the last of a tile's thread blocks merges its splits; 0: combine.py does
    counters: cute.Tensor  # (tiles), fused: how many of its splits are done
    m_blocks: Int32  # query tiles in the grid, for each split of a key head
    page_size: cute.FastDivmodDivisorV2 | None


class Tile(NamedTuple):
    """The rows and the keys that a thread block works on."""

    q: Queries
    k: Keys
    head_kv: Int32
    group: Int32  # query heads for each key head
    first_row: Int32
    begin: Int32  # key blocks of this split: [begin, end)
    end: Int32
    parts: Int32  # splits that have keys
    alone: Boolean  # no other split has a part in the result
    free_first: Int32  # those of the tile in [free_first, free_end) need no mask
    free_end: Int32

    def query_and_head(self, row: Int32) -> tuple[Int32, Int32]:
        """Of a row of the tile."""
        row = self.first_row + row
        return row // self.group, self.head_kv * self.group + row % self.group


class Ring(NamedTuple):
    """Slots of shared memory, through which K and V of a chunk, K and V of the next one, ... pass in turn."""

    sKV: cute.Tensor  # (chunk, d, slots)
    slots: cutlass.Constexpr

    def chunk(self, slot: Int32) -> cute.Tensor:
        return self.sKV[None, None, slot]  # (chunk, d)

    @cute.jit
    def after(self, slot: Int32) -> Int32:
        return slot + 1 if slot + 1 < self.slots else Int32(0)

    @cute.jit
    def before(self, slot: Int32) -> Int32:
        return slot - 1 if slot > 0 else Int32(self.slots - 1)


class Loader(NamedTuple):
    """How a warp copies its rows of each chunk."""

    copy: cute.TiledCopy
    mK: cute.Tensor
    mV: cute.Tensor
    ring: Ring
    tile: Tile
    share: Int32  # which warp_rows of a chunk are this warp's
    first_key: Int32  # of them, in a block
    lane: Int32
    page_size: cute.FastDivmodDivisorV2 | None
    block_table: cute.Tensor
    places: cute.Tensor  # (page, token in it) of row `lane` in the chunk being copied, then in the next one


class Work(NamedTuple):
    """What a thread computes with."""

    tiled_mma: cute.TiledMma
    q: Operand
    p: Operand
    acc_S: cute.Tensor  # ((2, 2), 1, chunk / 8)
    acc_O: cute.Tensor  # ((2, 2), 1, d / 8)
    softmax: OnlineSoftmax
    rows: cute.Tensor  # (2): in the tile
    diagonal: cute.Tensor  # (2): the key on each row's diagonal
    slopes: cute.Tensor  # (2)
    column: Int32  # of the thread's first element of acc_S, in a block


@cute.jit
def look_up(config: cutlass.Constexpr, x: Loader, block: Int32):
    """Ask the block table for the warp's rows of a block, one a lane; the last answer is there by now."""
    x.places[0], x.places[1] = clamp(x.places[2], Int32(0), x.mK.shape[0] - 1), x.places[3]
    key = block * config.tile_n + x.first_key + x.lane % config.warp_rows
    if key < x.tile.k.seqlen:  # beyond, the table may hold anything, or end
        index, x.places[3] = divmod(x.tile.k.start + key, x.page_size)
        x.places[2] = x.block_table[x.tile.k.batch, index]


@cute.jit
def load(config: cutlass.Constexpr, x: Loader, kind: cutlass.Constexpr, block: Int32, slot: Int32):
    """Start copying the warp's rows of a block of K (kind 0) or V (1), in the order of the ring."""
    mX = x.mV if const_expr(kind) else x.mK
    shape = config.warp_rows, config.head_dim
    if block < x.tile.end:
        if const_expr(config.page and kind == 0):
            look_up(config, x, block + 1)
        sX = cute.local_tile(x.ring.chunk(slot), shape, (x.share, 0))
        thr_copy = x.copy.get_slice(x.lane)
        tXsX = thr_copy.partition_D(sX)  # (8, M, K)
        tXcX = thr_copy.partition_S(cute.make_identity_tensor(shape))
        inside = cute.make_rmem_tensor(1, Boolean)
        for m in cutlass.range_constexpr(cute.size(tXcX, mode=[1])):
            row = tXcX[0, m, 0][0]
            key = block * config.tile_n + x.first_key + row
            page, token = x.tile.k.batch, x.tile.k.start + key
            if const_expr(config.page):
                page = cute.arch.shuffle_sync(x.places[0], row)
                token = cute.arch.shuffle_sync(x.places[1], row)
            gX = mX[page, token, x.tile.head_kv, None]  # (d)
            for k in cutlass.range_constexpr(cute.size(tXcX, mode=[2])):
                col = tXcX[0, m, k][1]
                inside[0] = key < x.tile.k.seqlen and col < mX.shape[3]
                piece = cute.local_tile(gX, (ELEMENTS,), (col // ELEMENTS,))
                target = tXsX[None, m, k]
                cute.copy(x.copy, cute.make_tensor(piece.iterator, target.layout), target, pred=inside)
    cute.arch.cp_async_commit_group()


@cute.jit
def arrive(config: cutlass.Constexpr):
    """The oldest chunk in flight is there, and its readers are done with the one before it."""
    cute.arch.cp_async_wait_group(config.slots - 2)
    if const_expr(config.row_warps == 1):  # each warp has a ring of its own
        cute.arch.sync_warp()
    else:
        cute.arch.barrier()


@cute.jit
def load_Q(call: Call, tile: Tile, w: Work, lane: Int32):
    """Q goes straight to the registers of the product; zeros beyond the sequence and the head dim."""
    words = cute.recast_tensor(w.q.fragment, Int32)  # ((1, 2, 2), 1, d / 16)
    shape = 16, 16 * cute.size(words, mode=[2])
    tScQ = w.tiled_mma.get_slice(lane).partition_A(cute.make_identity_tensor(shape))
    for i in cutlass.range_constexpr(2):
        query, head = tile.query_and_head(w.rows[i])
        gQ = call.mQ[tile.q.batch, tile.q.start + query, head, None]  # (d)
        for j in cutlass.range_constexpr(2):
            for k in cutlass.range_constexpr(cute.size(words, mode=[2])):
                col = tScQ[(0, i, j), 0, k][1]
                word = Int32(0)
                if query < tile.q.seqlen and col < call.mQ.shape[3]:
                    pair = cute.recast_ptr((gQ.iterator + col).align(4), dtype=Int32)
                    word = cute.make_tensor(pair, cute.make_layout(1))[0]
                words[(0, i, j), 0, k] = word


@cute.jit
def mask(tile: Tile, window: tuple[Int32, Int32], w: Work, key: Int32):
    """acc_S <- -inf where a row may not see a key; key: of the thread's first column."""
    S, (left, right) = rows_cols(w.acc_S), window
    for r in cutlass.range_constexpr(cute.size(S, mode=[0])):
        begin = w.diagonal[r] - left - key
        end = cutlass.min(tile.k.seqlen, w.diagonal[r] + right + 1) - key
        for c in cutlass.range_constexpr(cute.size(S, mode=[1])):
            column = (c // 2) * 8 + c % 2
            S[r, c] = S[r, c] if column >= begin and column < end else -Float32.inf


@cute.jit
def step(config: cutlass.Constexpr, call: Call, x: Loader, w: Work, block: Int32, slot: Int32):
    """S = Q·Kᵀ of one block, softmax, O += P·V. K is in `slot`, V in the next one; returns the one after."""
    ahead = config.slots - 1  # chunks
    slot_V = x.ring.after(slot)
    arrive(config)
    load(config, x, ahead % 2, block + ahead // 2, x.ring.before(slot))
    w.acc_S.fill(0.0)
    gemm(w.tiled_mma, w.acc_S, w.q, operand_B(w.tiled_mma, x.ring.chunk(slot), transpose=False), x.lane)
    key = block * config.tile_n + w.column
    distances = cute.make_rmem_tensor(w.diagonal.shape, Int32)
    for r in cutlass.range_constexpr(cute.size(distances)):
        distances[r] = w.diagonal[r] - key
    transform(config, call.score, rows_cols(w.acc_S), w.slopes, distances)
    if block < x.tile.free_first or block >= x.tile.free_end:
        mask(x.tile, call.window, w, key)
    w.softmax.renew(w.acc_S, w.acc_O, w.softmax.row_sum, True)
    convert(as_operand_A(w.acc_S), w.p.fragment)
    arrive(config)
    load(config, x, (ahead + 1) % 2, block + (ahead + 1) // 2, slot)
    sV = x.ring.chunk(slot_V)
    sVt = transposed(sV)  # (d, chunk)
    gemm(w.tiled_mma, w.acc_O, w.p, operand_B(w.tiled_mma, sVt, transpose=True), x.lane)
    return x.ring.after(slot_V)


@cute.jit
def attend(config: cutlass.Constexpr, call: Call, x: Loader, w: Work):
    """O and the softmax's sums over this warp's keys."""
    if const_expr(config.page):
        look_up(config, x, x.tile.begin)
    for i in cutlass.range_constexpr(config.slots - 1):
        load(config, x, i % 2, x.tile.begin + i // 2, Int32(i))
    load_Q(call, x.tile, w, x.lane)
    w.acc_O.fill(0.0)
    w.softmax.offset.fill(-Float32.inf)
    w.softmax.row_sum.fill(0.0)
    block, slot = x.tile.begin, Int32(0)
    while block < x.tile.end:
        slot = step(config, call, x, w, block, slot)
        block += 1


class Exchange(NamedTuple):
    """The results of the warps in shared memory, where the ring was."""

    sO: cute.Tensor  # (tile_m, d, key_warps) float32
    sOffset: cute.Tensor  # (tile_m, key_warps): the softmax's
    sSum: cute.Tensor  # (tile_m, key_warps)


def make_exchange(config, sKV: cute.Tensor) -> Exchange:
    rows, row = config.tile_m, config.head_dim + 8  # 8 words more: the rows of a store lie in different banks
    groups = config.key_warps
    start = cute.make_ptr(Float32, sKV.iterator.toint(), cute.AddressSpace.smem, assumed_align=16)
    O = cute.make_layout((rows, config.head_dim, groups), stride=(row, 1, rows * row))
    numbers = cute.make_layout((rows, groups))
    sums = start + rows * row * groups
    return Exchange(
        cute.make_tensor(start, O),
        cute.make_tensor(sums, numbers),
        cute.make_tensor(sums + rows * groups, numbers),
    )


@cute.jit
def give(w: Work, shared: Exchange, key_warp: Int32, lane: Int32):
    """A warp's results go to shared memory."""
    O = rows_cols(w.acc_O)
    for r in cutlass.range_constexpr(2):
        row, col = w.rows[r], 2 * (lane % 4)
        total = cute.arch.warp_reduction_sum(w.softmax.row_sum[r], threads_in_group=4)
        if lane % 4 == 0:
            shared.sOffset[row, key_warp] = w.softmax.offset[r]
            shared.sSum[row, key_warp] = total
        for c in cutlass.range_constexpr(0, cute.size(O, mode=[1]), 2):
            pair = cute.local_tile(shared.sO[row, None, key_warp], (2,), (col // 2 + 2 * c,))
            values = cute.make_rmem_tensor(2, Float32)
            values[0], values[1] = O[r, c], O[r, c + 1]
            cute.autovec_copy(values, pair)


@cute.jit
def store(config: cutlass.Constexpr, call: Call, tile: Tile, split: Int32, shared: Exchange, tidx: Int32):
    """Merge the warps' results, normalise, and store 8 columns of a row at a time, with the log-sum-exp."""
    pieces, threads = config.head_dim // ELEMENTS, 32 * config.warps
    for i in cutlass.range_constexpr((config.tile_m * pieces + threads - 1) // threads):
        row, piece = (i * threads + tidx) // pieces, (i * threads + tidx) % pieces
        query, head = tile.query_and_head(row)
        inside = row < config.tile_m and query < tile.q.seqlen
        if inside and piece * ELEMENTS < call.mO.shape[3]:
            offset = shared.sOffset[row, 0]
            for g in cutlass.range_constexpr(1, config.key_warps):
                offset = cute.arch.fmax(offset, shared.sOffset[row, g])
            base = Float32(0.0) if offset == -Float32.inf else offset  # no keys: not -inf - -inf
            total = Float32(0.0)
            O = cute.make_rmem_tensor(ELEMENTS, Float32)
            part = cute.make_rmem_tensor(ELEMENTS, Float32)
            O.fill(0.0)
            for g in cutlass.range_constexpr(config.key_warps):
                weight = cute.math.exp2(shared.sOffset[row, g] - base, fastmath=True)
                total += weight * shared.sSum[row, g]
                cute.autovec_copy(cute.local_tile(shared.sO[row, None, g], (ELEMENTS,), (piece,)), part)
                for c in cutlass.range_constexpr(ELEMENTS):
                    O[c] += weight * part[c]
            scale = Float32(0.0) if total == 0.0 else cute.arch.rcp_approx(total)
            for c in cutlass.range_constexpr(ELEMENTS):
                O[c] = O[c] * scale
            lse = (offset + cute.math.log2(total, fastmath=True)) * Float32(LN_2)
            lse = -Float32.inf if total == 0.0 else lse
            store_piece(call, tile, split, query, head, piece, O, lse)


@cute.jit
def store_piece(
    call: Call,
    tile: Tile,
    split: Int32,
    query: Int32,
    head: Int32,
    piece: Int32,
    O: cute.Tensor,
    lse: Float32,
):
    batch, token = tile.q.batch, tile.q.start + query
    if tile.alone:
        out = cute.make_rmem_tensor(ELEMENTS, call.mO.element_type)
        convert(O, out)
        cute.autovec_copy(out, cute.local_tile(call.mO[batch, token, head, None], (ELEMENTS,), (piece,)))
        if piece == 0:
            call.mLSE[batch, head, token] = lse
    else:
        row = combine.row_of(call.mO, batch, token, head)
        cute.autovec_copy(O, cute.local_tile(call.partial.O[split, row, None], (ELEMENTS,), (piece,)))
        if piece == 0:
            call.partial.LSE[split, row] = lse


@cute.jit
def store_nothing(config: cutlass.Constexpr, call: Call, tile: Tile, split: Int32, tidx: Int32):
    """A split without keys: its O is never read."""
    if tidx < config.tile_m:
        query, head = tile.query_and_head(tidx)
        if query < tile.q.seqlen:
            row = combine.row_of(call.mO, tile.q.batch, tile.q.start + query, head)
            call.partial.LSE[split, row] = -Float32.inf


@cute.jit
def merge_splits(
    config: cutlass.Constexpr, call: Call, tile: Tile, unit: Int32, sKV: cute.Tensor, tidx: Int32
):
    """The thread block that is the last to store its part of a tile merges all; unit: the tile's number."""
    shape = config.merged_columns, config.merged_splits, config.merged_rows
    words = combine.shared_words(shape)
    start = cute.make_ptr(Float32, sKV.iterator.toint(), cute.AddressSpace.smem, assumed_align=16)
    sDone = cute.make_tensor(cute.recast_ptr(start + config.warps * words, dtype=Int32), cute.make_layout(1))
    if tidx == 0:
        counter = (call.counters.iterator + unit).llvm_ptr
        sDone[0] = cute.arch.atomic_add(counter, Int32(1), sem="acq_rel", scope="gpu") + 1
    cute.arch.barrier()
    if sDone[0] == tile.parts:
        if tidx == 0:
            call.counters[unit] = Int32(0)
        warp, lane = cute.arch.make_warp_uniform(tidx // 32), tidx % 32
        shared = combine.make_shared(start + cute.assume(warp * words, divby=4), shape)
        acc = cute.make_rmem_tensor((4, shape[0] // 128, shape[2]), Float32)
        rows, lse = cute.make_rmem_tensor(shape[2], Int32), cute.make_rmem_tensor(shape[2], Float32)
        for r in cutlass.range_constexpr(shape[2]):
            query, head = tile.query_and_head(warp + config.warps * r)
            row = combine.row_of(call.mO, tile.q.batch, tile.q.start + query, head)
            rows[r] = row if query < tile.q.seqlen else Int32(-1)
        combine.merge(call.partial, tile.parts, rows, shared, acc, lse, lane)
        for r in cutlass.range_constexpr(shape[2]):
            query, head = tile.query_and_head(warp + config.warps * r)
            if rows[r] >= 0:
                batch, token = tile.q.batch, tile.q.start + query
                gLSE = cute.domain_offset((token,), call.mLSE[batch, head, None])
                combine.store(acc[None, None, r], lse[r], call.mO[batch, token, head, None], gLSE, lane)


def make_work(config, call: Call, tile: Tile, tiled_mma: cute.TiledMma, first_row, column, lane) -> Work:
    """first_row: the warp's in the tile. column: its first one in a block."""
    thr_mma = tiled_mma.get_slice(lane)
    dtype = call.mQ.element_type
    acc_S = cute.make_rmem_tensor(thr_mma.partition_shape_C((16, config.chunk)), Float32)
    acc_O = cute.make_rmem_tensor(thr_mma.partition_shape_C((16, config.head_dim)), Float32)
    Q = cute.make_rmem_tensor(thr_mma.partition_shape_A((16, config.head_dim)), dtype)
    P = cute.make_rmem_tensor(as_operand_A(acc_S).shape, dtype)
    offset, row_sum, slopes = (cute.make_rmem_tensor(2, Float32) for _ in range(3))
    rows, diagonal = (cute.make_rmem_tensor(2, Int32) for _ in range(2))
    for r in range(2):
        rows[r] = first_row + lane // 4 + 8 * r
        query, head = tile.query_and_head(rows[r])
        diagonal[r] = query + tile.k.seqlen - tile.q.seqlen
    softmax = OnlineSoftmax(offset, row_sum, scale_log2(config, call.score))
    column = column + 2 * (lane % 4)
    return Work(tiled_mma, Operand(Q), Operand(P), acc_S, acc_O, softmax, rows, diagonal, slopes, column)


@cute.jit
def load_slopes(call: Call, tile: Tile, b: Int32, w: Work):
    for r in cutlass.range_constexpr(2):
        w.slopes[r] = call.score.slopes[b, tile.query_and_head(w.rows[r])[1]]


@cute.kernel
def kernel(
    config: cutlass.Constexpr,
    call: Call,
    tiled_mma: cute.TiledMma,
    tiled_load: cute.TiledCopy,
    sKV_layout: cute.ComposedLayout,
):
    if const_expr(config.pdl):
        cute.arch.griddepcontrol_launch_dependents()  # the next kernel's blocks may come, and wait
        cute.arch.griddepcontrol_wait()  # all that is read is there
    tidx, _, _ = cute.arch.thread_idx()
    unit, _, _ = cute.arch.block_idx()
    heads_k = call.mK.shape[2]
    m_block, unit = unit % call.m_blocks, unit // call.m_blocks
    head_kv, unit = unit % heads_k, unit // heads_k
    split, b = unit % call.num_splits, unit // call.num_splits
    unit = (b * heads_k + head_kv) * call.m_blocks + m_block
    q = queries(call.ragged, b, call.mQ.shape[1])
    rows, capacity = call.mK.shape[:2]
    if const_expr(config.page):
        rows, pages = call.ragged.block_table.shape
        capacity = capacity * pages
    k = keys(call.ragged, b, capacity)
    k = k._replace(batch=clamp(k.batch, Int32(0), rows - 1))
    group = call.mQ.shape[2] // heads_k

    sKV = SmemAllocator().allocate_tensor(
        call.mK.element_type, sKV_layout.outer, 1024, swizzle=sKV_layout.inner
    )  # (chunk, d, slots * key_warps)
    warp, lane = cute.arch.make_warp_uniform(tidx // 32), tidx % 32
    row_warp, key_warp = warp % config.row_warps, warp // config.row_warps
    ring = Ring(cute.domain_offset((0, 0, key_warp * config.slots), sKV), config.slots)
    first_key = key_warp * config.chunk

    first_row = m_block * config.tile_m
    while first_row < q.seqlen * group:
        first, last, free_first, free_end = visible_blocks(
            first_row, config.tile_m, group, config.tile_n, q.seqlen, k.seqlen, *call.window
        )
        begin, end, parts = split_blocks(split, call.num_splits, first, last)
        others = parts if call.fused else call.num_splits
        tile = Tile(q, k, head_kv, group, first_row, begin, end, parts, others <= 1, free_first, free_end)
        if begin < end or (tile.alone and split == 0):
            places = cute.make_rmem_tensor(4, Int32)
            places.fill(0)
            x = Loader(
                tiled_load,
                call.mK,
                call.mV,
                ring,
                tile,
                row_warp,
                first_key + row_warp * config.warp_rows,
                lane,
                call.page_size,
                call.ragged.block_table,
                places,
            )
            w = make_work(config, call, tile, tiled_mma, 16 * row_warp, first_key, lane)
            if const_expr("alibi" in config.score):
                load_slopes(call, tile, b, w)
            attend(config, call, x, w)
            shared = make_exchange(config, sKV)
            cute.arch.barrier()  # all are done with the ring
            give(w, shared, key_warp, lane)
            cute.arch.barrier()
            store(config, call, tile, split, shared, tidx)
            cute.arch.barrier()  # the next rows' keys may come; what is merged is stored
            if const_expr(config.can_merge):
                if call.fused and not tile.alone:  # such tiles have no more rows
                    merge_splits(config, call, tile, unit, sKV, tidx)
        elif call.fused == 0:
            store_nothing(config, call, tile, split, tidx)
        first_row += call.m_blocks * config.tile_m


kernel.set_name_prefix("mfa_decode", remove_cutlass_symbol=True)


@cute.jit
def launch(call: Decode, config: cutlass.Constexpr, stream):
    """The tensors are as in the module's first lines; workspace as combine.partial has it, if it is split.

    fused: 1 if this kernel is to merge the splits: for tiles of as many rows as the warps merge at once, none
    of them packed. counters has an element for each tile.
    """
    (
        mQ,
        mK,
        mV,
        mO,
        mLSE,
        workspace,
        score,
        window_left,
        window_right,
        ragged,
        num_splits,
        fused,
        counters,
    ) = call
    dtype = mQ.element_type
    heads_k = mK.shape[2]
    rows = cutlass.min(ragged.longest, mQ.shape[1]) * (mQ.shape[2] // heads_k)
    m_blocks = cutlass.max(cute.ceil_div(rows, config.tile_m), 1)
    partial = combine.partial(workspace, num_splits, mO)
    call = Call(
        mQ,
        mK,
        mV,
        mO,
        mLSE,
        partial,
        ragged,
        score,
        (window_left, window_right),
        num_splits,
        fused,
        counters,
        m_blocks,
        cute.fast_divmod_create_divisor_v2(mK.shape[1]) if const_expr(config.page) else None,
    )
    chunks = config.slots * config.key_warps
    tile = config.tile_m, config.chunk, config.head_dim
    kernel(
        config,
        call,
        make_tiled_mma(dtype, 1),
        make_tiled_load(dtype, 32, config.head_dim),
        hopper.make_smem_layout_b(LayoutEnum.ROW_MAJOR, tile, dtype, chunks),
    ).launch(
        grid=(m_blocks * heads_k * num_splits * ragged.batch, 1, 1),
        block=(32 * config.warps, 1, 1),
        stream=stream,
        use_pdl=config.pdl,
    )
    if num_splits > 1 and fused == 0:
        combine.launch(config, partial, num_splits, mO, mLSE, ragged, stream)


def fake_call(config) -> Decode:
    return arguments.decode(config)
