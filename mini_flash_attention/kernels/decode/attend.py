"""Decoding: a few queries against many keys, with cp.async, ldmatrix and mma.sync on every architecture.

The time is that of reading K and V once, so all that counts is to have enough loads in flight at every
moment: the query heads that share a key head are rows of one tile, and the keys are split over as many thread
blocks as the GPU holds (Dao et al. 2023, "Flash-Decoding"), in a thread block over its warps. combine.py
merges the splits. README.md beside this file has the pictures.
"""

from typing import NamedTuple

import cutlass
import cutlass.cute as cute
from cutlass import Boolean, Float32, Int32, const_expr
from cutlass.memory import SmemAllocator

from mini_flash_attention.gpu.config import ELEMENTS
from mini_flash_attention.kernels.calls import Decode
from mini_flash_attention.kernels.decode import combine, division, exchange
from mini_flash_attention.kernels.decode.division import Tile, Warp
from mini_flash_attention.kernels.parts import arguments
from mini_flash_attention.kernels.parts.fragments import as_operand_A, convert, rows_cols, transposed
from mini_flash_attention.kernels.parts.numbers import index
from mini_flash_attention.kernels.parts.rest import clear_rest
from mini_flash_attention.kernels.parts.scores import Corner, scale_log2, transform
from mini_flash_attention.kernels.parts.seqlen import clamp
from mini_flash_attention.kernels.parts.sm80 import Operand, gemm, make_tiled_load, make_tiled_mma, operand_B
from mini_flash_attention.kernels.parts.softmax import OnlineSoftmax
from mini_flash_attention.kernels.parts.tiles import allocate, tile_layout


class Setup(NamedTuple):
    """What a launch works out for all thread blocks."""

    partial: combine.Partial
    m_blocks: Int32  # query tiles in the grid, for each split of a key head
    page_size: cute.FastDivmodDivisorV2 | None
    tiled_mma: cute.TiledMma  # of a warp
    tiled_load: cute.TiledCopy  # of a warp
    sKV_layout: cute.ComposedLayout  # (chunk, d, slots * key_warps)


class ChunkRing(NamedTuple):
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


class Pages(NamedTuple):
    """Where row `lane` of a warp's part of a chunk lies: (page, token in it)."""

    now: cute.Tensor  # (2): of the block being copied
    coming: cute.Tensor  # (2): of the next one; the page may still be on its way


class Loader(NamedTuple):
    """How a warp copies its rows of each chunk."""

    setup: Setup
    tile: Tile
    warp: Warp
    ring: ChunkRing
    first_key: Int32  # of the warp's rows, in a block
    pages: Pages | None


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
    heads: cute.Tensor  # (2): the query head of each row
    column: Int32  # of the thread's first element of acc_S, in a block


@cute.jit
def launch(call: Decode, config: cutlass.Constexpr, stream):
    """call.fused: only for tiles of as many rows as the warps merge at once, none of them packed."""
    dtype, heads_k = call.mQ.element_type, call.mK.shape[2]
    rows = cutlass.min(call.ragged.longest, call.mQ.shape[1]) * (call.mQ.shape[2] // heads_k)
    m_blocks = cutlass.max(cute.ceil_div(rows, config.tile_m), 1)
    setup = Setup(
        combine.partial(call),
        m_blocks,
        cute.fast_divmod_create_divisor_v2(call.mK.shape[1]) if const_expr(config.page) else None,
        make_tiled_mma(dtype, 1),
        make_tiled_load(dtype, 32, config.head_dim),
        tile_layout(dtype, config.chunk, config.head_dim, config.slots * config.key_warps),
    )
    kernel(config, call, setup).launch(
        grid=(m_blocks * heads_k * call.num_splits * call.ragged.batch, 1, 1),
        block=(32 * config.warps, 1, 1),
        stream=stream,
        use_pdl=config.pdl,
    )
    if call.num_splits > 1 and call.fused == 0:
        combine.launch(call, config, stream)


def fake_call(config) -> Decode:
    return arguments.decode(config)


@cute.kernel
def kernel(config: cutlass.Constexpr, call: Decode, setup: Setup):
    if const_expr(config.pdl):
        cute.arch.griddepcontrol_launch_dependents()  # the next kernel's thread blocks may come, and wait
        # The launch before is done: all that is read is there, and nobody uses workspace and counters.
        cute.arch.griddepcontrol_wait()
    position = division.find_position(call, setup.m_blocks)
    q, k = division.find_sequence(config, call, position.sequence)
    warp = division.find_warp(config)
    sKV = allocate(SmemAllocator(), call.mK.element_type, setup.sKV_layout)
    first_row = position.m_block * config.tile_m
    while first_row < q.seqlen * position.group:  # once, unless the host was told of fewer queries
        tile = division.find_tile(config, call, position, q, k, first_row)
        # A tile whose rows see no key has a result too: its first split stores it.
        if tile.begin < tile.end or (tile.alone and position.split == 0):
            x = make_loader(config, setup, tile, sKV, warp)
            w = make_work(config, call, setup.tiled_mma, tile, warp)
            attend(config, call, x, w)
            finish(config, call, x, w, sKV)
        elif call.fused == 0:
            exchange.store_nothing(config, call, setup.partial, tile, warp.tidx)
        first_row += setup.m_blocks * config.tile_m
    of_sequence = cute.arch.grid_dim()[0] // call.ragged.batch
    if position.sequence == call.ragged.batch - 1:
        number = cute.arch.block_idx()[0] % of_sequence
        clear_rest(call, number * (32 * config.warps) + warp.tidx, of_sequence * (32 * config.warps))


kernel.set_name_prefix("mfa_decode", remove_cutlass_symbol=True)


@cute.jit
def attend(config: cutlass.Constexpr, call: Decode, x: Loader, w: Work):
    """O and the softmax's sums over this warp's keys."""
    if const_expr(config.page):
        look_up(config, call, x, x.tile.begin)
    for i in cutlass.range_constexpr(config.slots - 1):
        load(config, call, x, x.tile.begin, i, Int32(i))
    load_Q(call, x.tile, w, x.warp.lane)
    w.acc_O.fill(0.0)
    w.softmax.offset.fill(-Float32.inf)
    w.softmax.row_sum.fill(0.0)
    block, slot = x.tile.begin, Int32(0)
    while block < x.tile.end:
        slot = step(config, call, x, w, block, slot)
        block += 1


@cute.jit
def finish(config: cutlass.Constexpr, call: Decode, x: Loader, w: Work, sKV: cute.Tensor):
    """The warps' results become the tile's result, or the split's part in it."""
    shared, tile, partial = exchange.make(config, sKV), x.tile, x.setup.partial
    cute.arch.barrier()  # the last chunks are read, none is on its way: `give` overwrites the ring
    exchange.give(shared, w.acc_O, w.softmax, w.rows, x.warp)
    cute.arch.barrier()  # the results of all warps are there: `store` reads them
    exchange.store(config, call, partial, tile, shared, x.warp.tidx)
    cute.arch.barrier()  # they are read: chunks may come again; the part is stored: `merge_tile` counts it
    if const_expr(config.can_merge):
        if call.fused and not tile.alone:  # such tiles have no more rows
            combine.merge_tile(config, call, partial, tile, sKV, x.warp.tidx)


@cute.jit
def step(config: cutlass.Constexpr, call: Decode, x: Loader, w: Work, block: Int32, slot: Int32):
    """S = Q·Kᵀ of one block, softmax, O += P·V. K is in `slot`, V in the next one; returns the one after."""
    ahead = config.slots - 1  # the chunk to ask for, counted from K[block] on
    slot_V = x.ring.after(slot)
    arrive(config)  # K[block] is there, and nobody reads V[block - 1] any more: its slot is filled
    load(config, call, x, block, ahead, x.ring.before(slot))
    w.acc_S.fill(0.0)
    gemm(w.tiled_mma, w.acc_S, w.q, operand_B(w.tiled_mma, x.ring.chunk(slot), transpose=False), x.warp.lane)
    key = block * config.tile_n + w.column
    if const_expr(config.score):
        seqlen_q, seqlen_k = x.tile.q.seqlen, x.tile.k.seqlen
        rows = tuple(index(w.diagonal[r] + seqlen_q - seqlen_k) for r in range(2))
        heads = tuple(w.heads[r] for r in range(2))
        at = Corner(x.tile.position.sequence, heads, rows, key, seqlen_q, seqlen_k)
        transform(config, call.score, rows_cols(w.acc_S), at)
    if block < x.tile.free_first or block >= x.tile.free_end:
        mask(call, x.tile, w, key)
    w.softmax.renew(w.acc_S, w.acc_O, w.softmax.row_sum, True)
    convert(as_operand_A(w.acc_S), w.p.fragment)
    arrive(config)  # V[block] is there, and nobody reads K[block] any more
    load(config, call, x, block, ahead + 1, slot)
    sVt = transposed(x.ring.chunk(slot_V))  # (d, chunk)
    gemm(w.tiled_mma, w.acc_O, w.p, operand_B(w.tiled_mma, sVt, transpose=True), x.warp.lane)
    return x.ring.after(slot_V)


@cute.jit
def arrive(config: cutlass.Constexpr):
    """The oldest chunk on the way is there, and its readers are done with the one before it."""
    # The thread's own copies: of slots - 1 groups, each a chunk, all but the oldest may be on the way.
    cute.arch.cp_async_wait_group(config.slots - 2)
    # Those of all who fill the ring; and all have read the chunk before, whose slot may be filled.
    if const_expr(config.row_warps == 1):
        cute.arch.sync_warp()  # a warp has a ring of its own
    else:
        cute.arch.barrier()


@cute.jit
def load(config: cutlass.Constexpr, call: Decode, x: Loader, block: Int32, n: cutlass.Constexpr, slot: Int32):
    """Start copying the warp's rows of chunk n from a block on: K[block], V[block], K[block + 1], ..."""
    block, is_V = block + n // 2, n % 2 == 1
    mX = call.mV if const_expr(is_V) else call.mK
    shape = config.warp_rows, config.head_dim
    if block < x.tile.end:
        if const_expr(config.page and not is_V):
            look_up(config, call, x, block + 1)
        sX = cute.local_tile(x.ring.chunk(slot), shape, (x.warp.row_warp, 0))
        copy = x.setup.tiled_load
        thr_copy = copy.get_slice(x.warp.lane)
        tXsX = thr_copy.partition_D(sX)  # (8, M, K)
        tXcX = thr_copy.partition_S(cute.make_identity_tensor(shape))
        inside = cute.make_rmem_tensor(1, Boolean)
        for m in cutlass.range_constexpr(cute.size(tXcX, mode=[1])):
            row = tXcX[0, m, 0][0]
            key = block * config.tile_n + x.first_key + row
            page, token = x.tile.k.batch, x.tile.k.start + key
            if const_expr(config.page):  # lane `row` has looked it up
                page = cute.arch.shuffle_sync(x.pages.now[0], row)
                token = cute.arch.shuffle_sync(x.pages.now[1], row)
            gX = mX[page, token, x.tile.position.head_kv, None]  # (d)
            for k in cutlass.range_constexpr(cute.size(tXcX, mode=[2])):
                col = tXcX[0, m, k][1]
                inside[0] = key < x.tile.k.seqlen and col < mX.shape[3]
                piece = cute.local_tile(gX, (ELEMENTS,), (col // ELEMENTS,))
                target = tXsX[None, m, k]
                cute.copy(copy, cute.make_tensor(piece.iterator, target.layout), target, pred=inside)
    cute.arch.cp_async_commit_group()  # with nothing to copy too: `arrive` counts groups, one for each chunk


@cute.jit
def look_up(config: cutlass.Constexpr, call: Decode, x: Loader, block: Int32):
    """Ask the block table for the warp's rows of a block, one a lane; the last answer is there by now."""
    now, coming = x.pages
    now[0], now[1] = clamp(coming[0], Int32(0), call.mK.shape[0] - 1), coming[1]
    key = block * config.tile_n + x.first_key + x.warp.lane % config.warp_rows
    if key < x.tile.k.seqlen:  # beyond, the table may hold anything, or end
        index, coming[1] = divmod(x.tile.k.start + key, x.setup.page_size)
        coming[0] = call.ragged.block_table[x.tile.k.batch, index]


@cute.jit
def mask(call: Decode, tile: Tile, w: Work, key: Int32):
    """acc_S <- -inf where a row may not see a key; key: of the thread's first column."""
    S = rows_cols(w.acc_S)
    for r in cutlass.range_constexpr(cute.size(S, mode=[0])):
        begin = w.diagonal[r] - call.window_left - key
        end = cutlass.min(tile.k.seqlen, w.diagonal[r] + call.window_right + 1) - key
        for c in cutlass.range_constexpr(cute.size(S, mode=[1])):
            column = (c // 2) * 8 + c % 2
            S[r, c] = S[r, c] if column >= begin and column < end else -Float32.inf


@cute.jit
def load_Q(call: Decode, tile: Tile, w: Work, lane: Int32):
    """Q goes straight to the registers of the product; zeros beyond the sequence and the head dim."""
    words = cute.recast_tensor(w.q.fragment, Int32)  # ((1, 2, 2), 1, d / 16)
    shape = 16, 16 * cute.size(words, mode=[2])
    tScQ = w.tiled_mma.get_slice(lane).partition_A(cute.make_identity_tensor(shape))
    for i in cutlass.range_constexpr(2):
        batch, token, head = tile.coords(w.rows[i])
        gQ = call.mQ[batch, token, head, None]  # (d)
        for j in cutlass.range_constexpr(2):
            for k in cutlass.range_constexpr(cute.size(words, mode=[2])):
                col = tScQ[(0, i, j), 0, k][1]
                word = Int32(0)
                if tile.holds(w.rows[i]) and col < call.mQ.shape[3]:
                    pair = cute.recast_ptr((gQ.iterator + col).align(4), dtype=Int32)
                    word = cute.make_tensor(pair, cute.make_layout(1))[0]
                words[(0, i, j), 0, k] = word


def make_loader(config, setup: Setup, tile: Tile, sKV: cute.Tensor, warp: Warp) -> Loader:
    ring = ChunkRing(cute.domain_offset((0, 0, warp.key_warp * config.slots), sKV), config.slots)
    first_key = warp.key_warp * config.chunk + warp.row_warp * config.warp_rows
    pages = None
    if config.page:
        places = cute.make_rmem_tensor((2, 2), Int32)
        places.fill(0)
        pages = Pages(places[None, 0], places[None, 1])
    return Loader(setup, tile, warp, ring, first_key, pages)


def make_work(config, call: Decode, tiled_mma: cute.TiledMma, tile: Tile, warp: Warp) -> Work:
    thr_mma = tiled_mma.get_slice(warp.lane)
    dtype = call.mQ.element_type
    acc_S = cute.make_rmem_tensor(thr_mma.partition_shape_C((16, config.chunk)), Float32)
    acc_O = cute.make_rmem_tensor(thr_mma.partition_shape_C((16, config.head_dim)), Float32)
    Q = cute.make_rmem_tensor(thr_mma.partition_shape_A((16, config.head_dim)), dtype)
    P = cute.make_rmem_tensor(as_operand_A(acc_S).shape, dtype)
    offset, row_sum = (cute.make_rmem_tensor(2, Float32) for _ in range(2))
    rows, heads, diagonal = (cute.make_rmem_tensor(2, Int32) for _ in range(3))
    for r in range(2):
        rows[r] = 16 * warp.row_warp + warp.lane // 4 + 8 * r
        query, heads[r] = tile.query_and_head(rows[r])
        diagonal[r] = query + tile.k.seqlen - tile.q.seqlen
    softmax = OnlineSoftmax(offset, row_sum, scale_log2(config, call.score))
    column = warp.key_warp * config.chunk + 2 * (warp.lane % 4)
    return Work(tiled_mma, Operand(Q), Operand(P), acc_S, acc_O, softmax, rows, diagonal, heads, column)
