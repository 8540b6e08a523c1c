"""FlashAttention-2 forward (Dao 2023, arXiv 2307.08691) with cp.async, ldmatrix and mma.sync: SM80 on.

A thread block owns one tile: tile_m query rows of one head, 16 rows of each 16 * warps for a warp. It walks
the keys from its last block to its first. README.md beside this file has the picture.
"""

from typing import NamedTuple

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, const_expr
from cutlass.memory import SmemAllocator

from mini_flash_attention.kernels.calls import Forward
from mini_flash_attention.kernels.forward.common import (
    drop,
    key_block,
    mask,
    normalise,
    row_of,
    sink_of,
    to_scores,
)
from mini_flash_attention.kernels.parts import arguments, sparse
from mini_flash_attention.kernels.parts.blocks import Walk
from mini_flash_attention.kernels.parts.fragments import (
    as_operand_A,
    convert,
    rows_cols,
    store_sequence,
    transposed,
)
from mini_flash_attention.kernels.parts.rest import clear_rest
from mini_flash_attention.kernels.parts.scheduler import (
    Place,
    Tile,
    is_tile,
    num_tiles,
    seek,
    tile_at,
    uniform,
)
from mini_flash_attention.kernels.parts.scores import scale_log2
from mini_flash_attention.kernels.parts.seqlen import Sizes, sizes_of
from mini_flash_attention.kernels.parts.sm80 import (
    Operand,
    gemm,
    load_pages,
    load_tile,
    make_tiled_load,
    make_tiled_mma,
    opaque,
    operand_A,
    operand_B,
)
from mini_flash_attention.kernels.parts.softmax import OnlineSoftmax
from mini_flash_attention.kernels.parts.tiles import allocate, tile_layout


class Setup(NamedTuple):
    """What `launch` makes for the kernel."""

    sizes: Sizes
    tiled_mma: cute.TiledMma
    tiled_load: cute.TiledCopy
    sQ_layout: cute.ComposedLayout  # (tile_m, d, 1)
    sKV_layout: cute.ComposedLayout  # (tile_n, d, 1)


class Work(NamedTuple):
    """What one thread works with; it has one tile."""

    call: Forward
    setup: Setup
    tile: Tile
    sizes: Sizes  # of the tile's sequence
    tidx: Int32
    head_kv: Int32
    table: cute.Tensor | None  # (max_pages): the sequence's pages
    sK: cute.Tensor  # (tile_n, d)
    sV: cute.Tensor  # (tile_n, d)
    q: Operand
    k: Operand
    v: Operand
    p: Operand
    acc_S: cute.Tensor  # ((2, 2), tile_m / (16 * warps), tile_n / 8)
    acc_O: cute.Tensor  # ((2, 2), tile_m / (16 * warps), d / 8)
    coords: cute.Tensor  # (row, column) of each element of acc_S
    softmax: OnlineSoftmax
    batch_head: Int32 | None  # batch * heads + head of the tile, of which dropout is a function


@cute.jit
def launch(call: Forward, config: cutlass.Constexpr, stream):
    """One thread block for each tile. calls.Forward has the shapes."""
    dtype = call.mQ.element_type
    setup = Setup(
        sizes_of(config, call),
        make_tiled_mma(dtype, config.warps),
        make_tiled_load(dtype, 32 * config.warps, config.head_dim),
        tile_layout(dtype, config.tile_m, config.head_dim),
        tile_layout(dtype, config.tile_n, config.head_dim),
    )
    kernel(config, call, setup).launch(
        grid=(num_tiles(config, call, setup.sizes) + int(config.ragged), 1, 1),
        block=(32 * config.warps, 1, 1),
        stream=stream,
    )


@cute.kernel
def kernel(config: cutlass.Constexpr, call: Forward, setup: Setup):
    """A thread block, whose number is that of its tile; those of a ragged batch without one clear_rest."""
    number, _, _ = cute.arch.block_idx()
    place = seek(config, call, setup.sizes, number)
    if const_expr(call.ragged is None):  # noqa: SIM114, only one of the conditions is known to the compiler
        attend(config, call, setup, place, number)
    elif is_tile(config, call, setup.sizes, number, place):
        attend(config, call, setup, place, number)
    else:
        threads, idle = 32 * config.warps, cute.arch.grid_dim()[0] - place.first
        clear_rest(call, (number - place.first) * threads + cute.arch.thread_idx()[0], idle * threads)


kernel.set_name_prefix("mfa_fwd_sm80", remove_cutlass_symbol=True)


@cute.jit
def attend(config: cutlass.Constexpr, call: Forward, setup: Setup, place: Place | None, number: Int32):
    """One tile: up to three loops over its key blocks, then O."""
    tile = uniform(tile_at(config, call, setup.sizes, number, place))
    if const_expr(config.sparse):
        tile = tile._replace(visits=sparse.visits(call.blocks, row_of(config, tile), config.tile_n))
    gQ = tile_of_Q(config, call, tile)  # (tile_m, d)
    w = make_work(config, call, setup, tile)
    n_block = walk(config, w).start
    rows = w.sizes.seqlen_q - tile.m_block * config.tile_m
    load_tile(setup.tiled_load, gQ, w.q.sX, rows, call.mQ.shape[3], w.tidx)
    load_block(config, w, call.mK, w.sK, n_block, False)  # closes the commit group, with Q in it
    w.acc_O.fill(0.0)
    w.softmax.offset.fill(-Float32.inf)
    w.softmax.row_sum.fill(0.0)
    while n_block >= masked_end(config, w):
        step(config, w, n_block, True)
        n_block -= 1
    while n_block >= walk(config, w).free_first:
        step(config, w, n_block, False)
        n_block -= 1
    if const_expr(config.mask == "window" or config.sparse):
        while n_block >= walk(config, w).first:
            step(config, w, n_block, True)
            n_block -= 1
    if const_expr(call.ragged is None):  # worked out anew: kept, it would spill
        tile = tile_at(config, call, setup.sizes, opaque(number), place)
    store_O(config, w, tile)


@cute.jit
def step(config: cutlass.Constexpr, w: Work, n_block: Int32, masked: cutlass.Constexpr):
    """S = Q·Kᵀ of one block, mask, softmax, O += P·V."""
    arrive()  # K[n] (at first Q too) has arrived: S reads it. V[n + 1] has been read: V[n] overwrites it
    load_block(config, w, w.call.mV, w.sV, n_block, not masked)
    w.acc_S.fill(0.0)
    gemm(w.setup.tiled_mma, w.acc_S, w.q, w.k, w.tidx)
    arrive()  # V[n] has arrived: P·V reads it. K[n] has been read: K[n - 1] overwrites it
    if n_block > walk(config, w).first:
        load_block(config, w, w.call.mK, w.sK, n_block - 1, not config.sparse)
    n_block = key_block(config, w.call, w.tile, n_block)
    with_masks = const_expr(masked or not config.sparse)
    to_scores(config, w, w.sizes, w.tile, opaque(w.tile.m_block), n_block, with_masks)
    if const_expr(masked):
        mask(config, w, w.sizes, opaque(w.tile.m_block), n_block)
    w.softmax.renew(w.acc_S, w.acc_O, w.softmax.row_sum, masked or config.score.hides)
    convert(as_operand_A(w.acc_S), w.p.fragment)
    if const_expr(config.dropout):
        drop(config, w, w.p.fragment, opaque(w.batch_head), opaque(w.tile.m_block), n_block)
    gemm(w.setup.tiled_mma, w.acc_O, w.p, w.v, w.tidx)


@cute.jit
def arrive():
    """The block that was asked for last is there, and all warps are done with what they read before.

    At most one commit group is in flight: each step waits for K before it asks for V, and for V before K.
    """
    cute.arch.cp_async_wait_group(0)  # this thread's copies have arrived
    cute.arch.barrier()  # so have all threads'; and their ldmatrix of the block before are done


@cute.jit
def load_block(
    config: cutlass.Constexpr,
    w: Work,
    mX: cute.Tensor,
    sX: cute.Tensor,
    n_block: Int32,
    whole: cutlass.Constexpr,
):
    """Start copying one block of keys or values, by its position; whole: it ends within the sequence."""
    n_block = key_block(config, w.call, w.tile, n_block)
    tile, tiled_load = (cute.size(sX, mode=[0]), cute.size(sX, mode=[1])), w.setup.tiled_load
    rows = None if const_expr(whole) else w.sizes.seqlen_k - n_block * tile[0]
    batch, start = w.tile.k_rows
    if const_expr(w.table is not None):
        gX = mX[None, None, opaque(w.head_kv), None]  # (num_pages, page_size, d)
        load_pages(tiled_load, gX, w.table, opaque(start) + n_block * tile[0], sX, rows, w.tidx)
    else:
        gX = mX[opaque(batch), None, opaque(w.head_kv), None]  # (sk, d)
        if const_expr(w.call.ragged is not None):
            gX = cute.domain_offset((opaque(start), 0), gX)
        load_tile(tiled_load, cute.local_tile(gX, tile, (n_block, 0)), sX, rows, mX.shape[3], w.tidx)
    cute.arch.cp_async_commit_group()  # the group that `arrive` waits for


def walk(config, w: Work) -> Walk:
    """sizes.walk, worked out anew where it is asked for: kept across the products it would spill."""
    if config.sparse:
        return sparse.walk(w.tile.visits)
    return w.sizes.walk(config, opaque(w.tile.m_block))


def masked_end(config, w: Work) -> Int32:
    """Where the walk's first part ends: the start, which may reach beyond the keys, and masked blocks."""
    start, free_end, _, _ = walk(config, w)
    return cutlass.min(start, free_end)


@cute.jit
def store_O(config: cutlass.Constexpr, w: Work, tile: Tile):
    """Normalise O, store it and the log-sum-exp."""
    w.softmax.finish(sink_of(w.call, tile.head))
    O = normalise(config, w)
    (batch, start), rc, lane = tile.q_rows, rows_cols(w.coords), w.tidx % 32
    rows = cute.make_rmem_tensor(cute.size(w.softmax.offset), Int32)
    for r in cutlass.range_constexpr(cute.size(rows)):
        rows[r] = tile.m_block * config.tile_m + rc[r, 0][0]
        if lane % 4 == 0 and rows[r] < w.sizes.seqlen_q:
            w.call.mLSE[batch, tile.head, start + rows[r]] = w.softmax.offset[r]
    mO = w.call.mO[batch, None, tile.head, None]  # (sq, d)
    store_sequence(O, mO, rows, start, w.sizes.seqlen_q, lane)


def tile_of_Q(config, call: Forward, tile: Tile) -> cute.Tensor:
    batch, start = tile.q_rows
    gQ = cute.domain_offset((start, 0), call.mQ[batch, None, tile.head, None])  # (sq, d)
    return cute.local_tile(gQ, (config.tile_m, config.head_dim), (tile.m_block, 0))  # (tile_m, d)


def make_work(config, call: Forward, setup: Setup, tile: Tile) -> Work:
    tidx, _, _ = cute.arch.thread_idx()
    smem, dtype, sizes = SmemAllocator(), call.mQ.element_type, tile.sizes(setup.sizes)
    if config.sparse:  # without blocks one is visited all the same: none of its keys counts
        sizes = sizes.of(sizes.seqlen_q, sparse.keys_of(tile.visits, sizes.seqlen_k))
    layouts = setup.sQ_layout, setup.sKV_layout, setup.sKV_layout
    sQ, sK, sV = (allocate(smem, dtype, layout)[None, None, 0] for layout in layouts)
    head_kv = tile.head // sizes.group
    table = call.ragged.block_table[tile.k_rows[0], None] if config.page else None
    thr_mma = setup.tiled_mma.get_slice(tidx)
    tile_s, tile_o = (config.tile_m, config.tile_n), (config.tile_m, config.head_dim)
    shapes = (thr_mma.partition_shape_C(shape) for shape in (tile_s, tile_o))
    acc_S, acc_O = (cute.make_rmem_tensor(shape, Float32) for shape in shapes)
    rows = cute.size(rows_cols(acc_S), mode=[0])
    offset, row_sum = (cute.make_rmem_tensor(rows, Float32) for _ in range(2))
    return Work(
        call,
        setup,
        tile,
        sizes,
        tidx,
        head_kv,
        table,
        sK,
        sV,
        q=operand_A(setup.tiled_mma, sQ),
        k=operand_B(setup.tiled_mma, sK, transpose=False),
        v=operand_B(setup.tiled_mma, transposed(sV), transpose=True),  # (d, tile_n)
        p=Operand(cute.make_rmem_tensor(as_operand_A(acc_S).shape, dtype)),
        acc_S=acc_S,
        acc_O=acc_O,
        coords=thr_mma.partition_C(cute.make_identity_tensor(tile_s)),
        softmax=OnlineSoftmax(offset, row_sum, scale_log2(config, call.score)),
        batch_head=tile.batch * sizes.heads + tile.head if config.dropout else None,
    )


def fake_call(config) -> Forward:
    return arguments.forward(config)
