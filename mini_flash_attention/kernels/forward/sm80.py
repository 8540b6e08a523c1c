"""FlashAttention-2 forward (Dao 2023, arXiv 2307.08691) with cp.async, ldmatrix and mma.sync: SM80 on.

q (B, Sq, Hq, D), k and v (B, Sk, Hkv, D), o (B, Sq, Hq, D), lse (B, Hq, Sq) float32; float16 or
bfloat16, any strides with a unit last one. Ragged batches lie in the same shapes: packed sequences
follow each other in a batch of one, and k and v may be pages, (num_pages, page_size, Hkv, D).
A thread block owns one tile: tile_m query rows of one head, 16 rows of each 16 * warps for a warp. It
walks the keys from its last block to its first.
"""

from typing import NamedTuple

import cutlass
import cutlass.cute as cute
import cutlass.utils.hopper_helpers as hopper
from cutlass import Float32, Int32, const_expr
from cutlass.memory import SmemAllocator
from cutlass.tensor_utils import LayoutEnum

from mini_flash_attention.kernels.calls import Dropout, Forward, Ragged, Score
from mini_flash_attention.kernels.parts import arguments
from mini_flash_attention.kernels.parts.dropout import keep, mark, rescale_sums
from mini_flash_attention.kernels.parts.fragments import (
    as_operand_A,
    convert,
    rescale,
    rows_cols,
    store_sequence,
    transposed,
)
from mini_flash_attention.kernels.parts.mask import mask
from mini_flash_attention.kernels.parts.scheduler import (
    Tile,
    is_tile,
    num_tiles,
    seek,
    start_of_walk,
    tile_at,
    uniform,
)
from mini_flash_attention.kernels.parts.scores import scale_log2, transform
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


class Loader(NamedTuple):
    """Where one tile's keys and values come from and go to."""

    copy: cute.TiledCopy
    mK: cute.Tensor  # (b, sk, hk, d)
    mV: cute.Tensor  # (b, sk, hk, d)
    sK: cute.Tensor  # (tile_n, d)
    sV: cute.Tensor  # (tile_n, d)
    batch: Int32
    start: Int32 | None  # the sequence's first row; None: 0
    head: Int32
    table: cute.Tensor | None  # (max_pages): the sequence's pages
    tidx: Int32


class Work(NamedTuple):
    """What one thread computes with."""

    tiled_mma: cute.TiledMma
    q: Operand
    k: Operand
    v: Operand
    p: Operand
    acc_S: cute.Tensor  # ((2, 2), tile_m / (16 * warps), tile_n / 8)
    acc_O: cute.Tensor  # ((2, 2), tile_m / (16 * warps), d / 8)
    coords: cute.Tensor  # (row, column) of each element of acc_S
    softmax: OnlineSoftmax
    score: Score
    slope: Float32 | None  # ALiBi's, of the tile's head
    dropout: Dropout | None
    batch_head: Int32 | None  # batch * heads + head of the tile, of which dropout is a function


@cute.jit
def load_block(
    sizes: Sizes, x: Loader, mX: cute.Tensor, sX: cute.Tensor, n_block: Int32, whole: cutlass.Constexpr
):
    """Start copying one block of keys or values; whole: it does not reach beyond the sequence."""
    tile = cute.size(sX, mode=[0]), cute.size(sX, mode=[1])
    rows = None if const_expr(whole) else sizes.seqlen_k - n_block * tile[0]
    if const_expr(x.table is None):
        gX = mX[opaque(x.batch), None, opaque(x.head), None]  # (sk, d)
        if const_expr(x.start is not None):
            gX = cute.domain_offset((opaque(x.start), 0), gX)
        load_tile(x.copy, cute.local_tile(gX, tile, (n_block, 0)), sX, rows, mX.shape[3], x.tidx)
    else:
        gX = mX[None, None, opaque(x.head), None]  # (num_pages, page_size, d)
        load_pages(x.copy, gX, x.table, opaque(x.start) + n_block * tile[0], sX, rows, x.tidx)
    cute.arch.cp_async_commit_group()


@cute.jit
def arrive():
    """Everybody's copies so far have arrived, and everybody is done with what was read before."""
    cute.arch.cp_async_wait_group(0)
    cute.arch.barrier()


def key_walk(config, sizes: Sizes, m_block: Int32) -> tuple[Int32, Int32, Int32, Int32]:
    """sizes.walk, worked out anew where it is asked for: kept across the products it would spill."""
    return sizes.walk(config, opaque(m_block))


def masked_end(config, sizes: Sizes, m_block: Int32) -> Int32:
    """Where the walk's first part ends: the start, which may reach beyond the keys, and masked blocks."""
    start, free_end, _, _ = key_walk(config, sizes, m_block)
    return cutlass.min(start, free_end)


@cute.jit
def score(config: cutlass.Constexpr, sizes: Sizes, w: Work, m_block: Int32, n_block: Int32):
    """acc_S <- its scores; plain ones differ by a factor only, which the softmax applies."""
    if const_expr(config.score != "plain"):
        S, rc = rows_cols(w.acc_S), rows_cols(w.coords)
        diagonal = m_block * config.tile_m + sizes.seqlen_k - sizes.seqlen_q - n_block * config.tile_n
        slopes = cute.make_rmem_tensor(cute.size(S, mode=[0]), Float32)
        distances = cute.make_rmem_tensor(cute.size(S, mode=[0]), Int32)
        for r in cutlass.range_constexpr(cute.size(distances)):
            distances[r] = diagonal + rc[r, 0][0] - rc[r, 0][1]
            if const_expr(w.slope is not None):
                slopes[r] = w.slope
        transform(config, w.score, S, slopes, distances)


@cute.jit
def drop(config: cutlass.Constexpr, w: Work, m_block: Int32, n_block: Int32):
    """P <- P without what dropout drops; its sums have been taken."""
    rc = rows_cols(w.coords)
    rows = tuple(m_block * config.tile_m + rc[r, 0][0] for r in range(0, cute.size(rc, mode=[0]), 2))
    mark(w.dropout, w.p.fragment, rows, n_block * config.tile_n + rc[0, 0][1], opaque(w.batch_head))
    keep(w.p.fragment, w.p.fragment)


@cute.jit
def step(
    config: cutlass.Constexpr,
    sizes: Sizes,
    x: Loader,
    w: Work,
    m_block: Int32,
    n_block: Int32,
    masked: cutlass.Constexpr,
):
    """S = Q·Kᵀ of one block, softmax, O += P·V."""
    arrive()  # K[n] is here, and nobody reads V[n + 1] any more
    load_block(sizes, x, x.mV, x.sV, n_block, not masked)
    w.acc_S.fill(0.0)
    gemm(w.tiled_mma, w.acc_S, w.q, w.k, x.tidx)
    arrive()  # V[n] is here, and nobody reads K[n] any more
    if n_block > key_walk(config, sizes, m_block)[3]:
        load_block(sizes, x, x.mK, x.sK, n_block - 1, True)
    score(config, sizes, w, opaque(m_block), n_block)
    if const_expr(masked):
        mask(config, sizes, w.acc_S, w.coords, opaque(m_block), n_block)
    w.softmax.renew(w.acc_S, w.acc_O, w.softmax.row_sum, masked)
    convert(as_operand_A(w.acc_S), w.p.fragment)
    if const_expr(config.dropout):
        drop(config, w, opaque(m_block), n_block)
    gemm(w.tiled_mma, w.acc_O, w.p, w.v, x.tidx)


@cute.jit
def store_O(
    config: cutlass.Constexpr,
    sizes: Sizes,
    w: Work,
    mO: cute.Tensor,
    mLSE: cute.Tensor,
    tile: Tile,
    lane: Int32,
):
    """Normalise O, store it and the log-sum-exp. mO (b, sq, h, d), mLSE (b, h, sq)."""
    w.softmax.finish()
    if const_expr(config.dropout):
        rescale_sums(w.dropout, w.softmax.row_sum)
    rescale(w.acc_O, w.softmax.row_sum)
    O = cute.make_rmem_tensor(w.acc_O.shape, mO.element_type)
    convert(w.acc_O, O)
    batch, start = tile.q_rows
    rc = rows_cols(w.coords)
    rows = cute.make_rmem_tensor(cute.size(w.softmax.offset), Int32)
    for r in cutlass.range_constexpr(cute.size(rows)):
        rows[r] = tile.m_block * config.tile_m + rc[r, 0][0]
        if lane % 4 == 0 and rows[r] < sizes.seqlen_q:
            mLSE[batch, tile.head, start + rows[r]] = w.softmax.offset[r]
    store_sequence(O, mO[batch, None, tile.head, None], rows, start, sizes.seqlen_q, lane)


@cute.jit
def attend(
    config: cutlass.Constexpr,
    all_sizes: Sizes,
    swath: Int32,
    number: Int32,
    tile: Tile,
    ragged: Ragged | None,
    dropout: Dropout | None,
    score: Score,
    mQ: cute.Tensor,
    mK: cute.Tensor,
    mV: cute.Tensor,
    mO: cute.Tensor,
    mLSE: cute.Tensor,
    tiled_mma: cute.TiledMma,
    tiled_load: cute.TiledCopy,
    sQ_layout: cute.ComposedLayout,
    sKV_layout: cute.ComposedLayout,
):
    """One tile."""
    tidx, _, _ = cute.arch.thread_idx()
    sizes, m_block = tile.sizes(all_sizes), tile.m_block
    smem = SmemAllocator()
    dtype = mQ.element_type
    sQ = smem.allocate_tensor(dtype, sQ_layout.outer, 1024, swizzle=sQ_layout.inner)[None, None, 0]
    sK = smem.allocate_tensor(dtype, sKV_layout.outer, 1024, swizzle=sKV_layout.inner)[None, None, 0]
    sV = smem.allocate_tensor(dtype, sKV_layout.outer, 1024, swizzle=sKV_layout.inner)[None, None, 0]
    sVt = transposed(sV)  # (d, tile_n)
    tile_q = (config.tile_m, config.head_dim)
    (batch_q, start_q), (batch_k, start_k) = tile.q_rows, tile.k_rows
    gQ = cute.domain_offset((start_q, 0), mQ[batch_q, None, tile.head, None])  # (sq, d)
    gQ = cute.local_tile(gQ, tile_q, (m_block, 0))  # (tile_m, d)
    start_k = None if ragged is None else start_k
    table = ragged.block_table[batch_k, None] if config.page else None
    x = Loader(tiled_load, mK, mV, sK, sV, batch_k, start_k, tile.head // sizes.group, table, tidx)

    thr_mma = tiled_mma.get_slice(tidx)
    acc_S = cute.make_rmem_tensor(thr_mma.partition_shape_C((config.tile_m, config.tile_n)), Float32)
    acc_O = cute.make_rmem_tensor(thr_mma.partition_shape_C(tile_q), Float32)
    coords = thr_mma.partition_C(cute.make_identity_tensor((config.tile_m, config.tile_n)))
    rows = cute.size(rows_cols(acc_S), mode=[0])
    offset, row_sum = (cute.make_rmem_tensor(rows, Float32) for _ in range(2))
    P = cute.make_rmem_tensor(as_operand_A(acc_S).shape, dtype)
    w = Work(
        tiled_mma,
        operand_A(tiled_mma, sQ),
        operand_B(tiled_mma, sK, transpose=False),
        operand_B(tiled_mma, sVt, transpose=True),
        Operand(P),
        acc_S,
        acc_O,
        coords,
        OnlineSoftmax(offset, row_sum, scale_log2(config, score)),
        score,
        score.slopes[tile.batch, tile.head] if "alibi" in config.score else None,
        dropout,
        tile.batch * sizes.heads + tile.head if config.dropout else None,
    )

    n_block = key_walk(config, sizes, m_block)[0]
    load_tile(tiled_load, gQ, sQ, sizes.seqlen_q - m_block * config.tile_m, mQ.shape[3], tidx)
    load_block(sizes, x, mK, sK, n_block, False)
    acc_O.fill(0.0)
    offset.fill(-Float32.inf)
    row_sum.fill(0.0)
    while n_block >= masked_end(config, sizes, m_block):
        step(config, sizes, x, w, m_block, n_block, True)
        n_block -= 1
    while n_block >= key_walk(config, sizes, m_block)[2]:
        step(config, sizes, x, w, m_block, n_block, False)
        n_block -= 1
    if const_expr(config.mask == "window"):
        while n_block >= key_walk(config, sizes, m_block)[3]:
            step(config, sizes, x, w, m_block, n_block, True)
            n_block -= 1
    if const_expr(ragged is None):  # worked out anew: kept, it would spill
        tile = tile_at(config, sizes, swath, ragged, None, opaque(number))
    store_O(config, sizes, w, mO, mLSE, tile, tidx % 32)


@cute.kernel
def kernel(
    config: cutlass.Constexpr,
    sizes: Sizes,
    swath: Int32,
    ragged: Ragged | None,
    dropout: Dropout | None,
    score: Score,
    mQ: cute.Tensor,
    mK: cute.Tensor,
    mV: cute.Tensor,
    mO: cute.Tensor,
    mLSE: cute.Tensor,
    tiled_mma: cute.TiledMma,
    tiled_load: cute.TiledCopy,
    sQ_layout: cute.ComposedLayout,
    sKV_layout: cute.ComposedLayout,
):
    number, _, _ = cute.arch.block_idx()
    given = ragged, dropout, score, mQ, mK, mV, mO, mLSE, tiled_mma, tiled_load, sQ_layout, sKV_layout
    place = seek(config, sizes, ragged, start_of_walk(ragged), number)
    if const_expr(ragged is None):  # noqa: SIM114, only one of the conditions is known to the compiler
        tile = uniform(tile_at(config, sizes, swath, ragged, place, number))
        attend(config, sizes, swath, number, tile, *given)
    elif is_tile(config, sizes, ragged, place, number):
        tile = uniform(tile_at(config, sizes, swath, ragged, place, number))
        attend(config, sizes, swath, number, tile, *given)


kernel.set_name_prefix("mfa_fwd_sm80", remove_cutlass_symbol=True)


@cute.jit
def launch(call: Forward, config: cutlass.Constexpr, stream):
    """The tensors are as in the module's first lines; the numbers as in arguments.py."""
    mQ, mK, mV, mO, mLSE, score, window_left, window_right, ragged, dropout, swath = call[:11]
    dtype = mQ.element_type
    mnk = (config.tile_m, config.tile_n, config.head_dim)
    sQ_layout = hopper.make_smem_layout_a(LayoutEnum.ROW_MAJOR, mnk, dtype, 1)
    sKV_layout = hopper.make_smem_layout_b(LayoutEnum.ROW_MAJOR, mnk, dtype, 1)
    sizes = sizes_of(config, mQ, mK, window_left, window_right, ragged)
    kernel(
        config,
        sizes,
        swath,
        ragged,
        dropout,
        score,
        mQ,
        mK,
        mV,
        mO,
        mLSE,
        make_tiled_mma(dtype, config.warps),
        make_tiled_load(dtype, 32 * config.warps, config.head_dim),
        sQ_layout,
        sKV_layout,
    ).launch(
        grid=(num_tiles(config, sizes, ragged), 1, 1),
        block=(32 * config.warps, 1, 1),
        stream=stream,
    )


def fake_call(config) -> Forward:
    return arguments.forward(config)
