"""FlashAttention-2 forward (Dao 2023, arXiv 2307.08691) with cp.async, ldmatrix and mma.sync: every GPU since SM80.

q (B, Sq, Hq, D), k and v (B, Sk, Hkv, D), o (B, Sq, Hq, D), lse (B, Hq, Sq) float32; float16 or bfloat16, any strides
with a unit last one. A thread block owns one tile: tile_m query rows of one head, 16 rows of each 16 * warps for a warp.
It walks the keys from its last block to its first.
"""

from typing import NamedTuple

import cutlass
import cutlass.cute as cute
import cutlass.utils.hopper_helpers as sm90
from cutlass import Float32, Int32, const_expr
from cutlass.memory import SmemAllocator
from cutlass.tensor_utils import LayoutEnum

from mini_flash_attention.kernels import arguments
from mini_flash_attention.kernels.blocks import key_blocks, unmasked_blocks
from mini_flash_attention.kernels.fragments import as_operand_A, convert, rescale, rows_cols, store_rows
from mini_flash_attention.kernels.mask import mask
from mini_flash_attention.kernels.scheduler import num_tiles, tile_coords
from mini_flash_attention.kernels.seqlen import Sizes
from mini_flash_attention.kernels.sm80 import (
    Operand,
    gemm,
    load_tile,
    make_tiled_load,
    make_tiled_mma,
    opaque,
    operand_A,
    operand_B,
)
from mini_flash_attention.kernels.softmax import LOG2_E, OnlineSoftmax


class Loader(NamedTuple):
    """Where one tile's keys and values come from and go to."""

    copy: cute.TiledCopy
    gK: cute.Tensor  # (tile_n, d, n_blocks)
    gV: cute.Tensor  # (tile_n, d, n_blocks)
    sK: cute.Tensor  # (tile_n, d)
    sV: cute.Tensor  # (tile_n, d)
    seqlen_k: Int32
    head_dim: Int32
    tidx: Int32


class Work(NamedTuple):
    """What one thread computes with."""

    tiled_mma: cute.TiledMma
    q: Operand
    k: Operand
    v: Operand
    p: Operand
    acc_S: cute.Tensor
    acc_O: cute.Tensor
    sums: cute.Tensor  # of one block's rows
    coords: cute.Tensor  # (row, column) of each element of acc_S
    softmax: OnlineSoftmax


@cute.jit
def load_block(
    x: Loader, gX: cute.Tensor, sX: cute.Tensor, n_block: Int32, whole: cutlass.Constexpr = True
):
    """Start copying one block of keys or values; only the tile's first block can reach beyond the sequence."""
    rows = None if const_expr(whole) else x.seqlen_k - n_block * cute.size(sX, mode=[0])
    load_tile(x.copy, gX[None, None, n_block], sX, rows, x.head_dim, x.tidx)
    cute.arch.cp_async_commit_group()


@cute.jit
def arrive():
    """Everybody's copies so far have arrived, and everybody is done with what was read before."""
    cute.arch.cp_async_wait_group(0)
    cute.arch.barrier()


@cute.jit
def step(
    config: cutlass.Constexpr,
    sizes: Sizes,
    x: Loader,
    w: Work,
    m_block: Int32,
    n_block: Int32,
    first_block: Int32,
    kind: cutlass.Constexpr,
):
    """S = Q·Kᵀ of one block, softmax, O += P·V. kind: "first" (of the tile, masked), "masked" or "free"."""
    arrive()  # K[n] is here, and nobody reads V[n + 1] any more
    load_block(x, x.gV, x.sV, n_block, kind != "first")
    w.acc_S.fill(0.0)
    gemm(w.tiled_mma, w.acc_S, w.q, w.k)
    arrive()  # V[n] is here, and nobody reads K[n] any more
    if n_block > first_block:
        load_block(x, x.gK, x.sK, n_block - 1)
    if const_expr(kind != "free"):
        mask(config, sizes, w.acc_S, w.coords, m_block, n_block)
    if const_expr(kind == "first"):
        w.softmax.first(w.acc_S)
    else:
        w.softmax.renew(w.acc_S, w.acc_O, w.sums, kind == "masked")
        w.softmax.add(w.sums)
    convert(as_operand_A(w.acc_S), w.p.fragment)
    gemm(w.tiled_mma, w.acc_O, w.p, w.v)


@cute.jit
def store_O(
    config: cutlass.Constexpr, w: Work, mO: cute.Tensor, mLSE: cute.Tensor, m_block: Int32, lane: Int32
):
    """Normalise O, store it and the log-sum-exp. mO (seqlen_q, d), mLSE (seqlen_q)."""
    w.softmax.finish()
    rescale(w.acc_O, w.softmax.row_sum)
    O = cute.make_rmem_tensor(w.acc_O.shape, mO.element_type)
    convert(w.acc_O, O)
    rc = rows_cols(w.coords)
    rows = cute.make_rmem_tensor(cute.size(w.sums), Int32)
    for r in cutlass.range_constexpr(cute.size(rows)):
        rows[r] = m_block * config.tile_m + rc[r, 0][0]
        if lane % 4 == 0 and rows[r] < mLSE.shape[0]:
            mLSE[rows[r]] = w.softmax.offset[r]
    store_rows(O, mO, rows, lane)


@cute.kernel
def kernel(
    config: cutlass.Constexpr,
    sizes: Sizes,
    swath: Int32,
    mQ: cute.Tensor,
    mK: cute.Tensor,
    mV: cute.Tensor,
    mO: cute.Tensor,
    mLSE: cute.Tensor,
    scale_log2: Float32,
    tiled_mma: cute.TiledMma,
    tiled_load: cute.TiledCopy,
    sQ_layout: cute.ComposedLayout,
    sKV_layout: cute.ComposedLayout,
):
    tidx, _, _ = cute.arch.thread_idx()
    tile, _, _ = cute.arch.block_idx()
    m_block, head, batch = tile_coords(config, sizes, swath, tile)
    head_kv = head // sizes.group

    smem = SmemAllocator()
    dtype = mQ.element_type
    sQ = smem.allocate_tensor(dtype, sQ_layout.outer, 1024, swizzle=sQ_layout.inner)[None, None, 0]
    sK = smem.allocate_tensor(dtype, sKV_layout.outer, 1024, swizzle=sKV_layout.inner)[None, None, 0]
    sV = smem.allocate_tensor(dtype, sKV_layout.outer, 1024, swizzle=sKV_layout.inner)[None, None, 0]
    sVt = cute.make_tensor(sV.iterator, cute.select(sV.layout, mode=[1, 0]))  # (d, tile_n)
    tile_q, tile_kv = (config.tile_m, config.head_dim), (config.tile_n, config.head_dim)
    gQ = cute.local_tile(mQ[batch, None, head, None], tile_q, (m_block, 0))  # (tile_m, d)
    gK = cute.local_tile(mK[batch, None, head_kv, None], tile_kv, (None, 0))  # (tile_n, d, n_blocks)
    gV = cute.local_tile(mV[batch, None, head_kv, None], tile_kv, (None, 0))  # (tile_n, d, n_blocks)
    x = Loader(tiled_load, gK, gV, sK, sV, sizes.seqlen_k, mQ.shape[3], tidx)

    thr_mma = tiled_mma.get_slice(tidx)
    acc_S = cute.make_rmem_tensor(thr_mma.partition_shape_C((config.tile_m, config.tile_n)), Float32)
    acc_O = cute.make_rmem_tensor(thr_mma.partition_shape_C(tile_q), Float32)
    coords = thr_mma.partition_C(cute.make_identity_tensor((config.tile_m, config.tile_n)))
    rows = cute.size(rows_cols(acc_S), mode=[0])
    offset, row_sum, sums = (cute.make_rmem_tensor(rows, Float32) for _ in range(3))
    P = cute.make_rmem_tensor(as_operand_A(acc_S).shape, dtype)
    w = Work(
        tiled_mma,
        operand_A(tiled_mma, sQ, tidx),
        operand_B(tiled_mma, sK, tidx, transpose=False),
        operand_B(tiled_mma, sVt, tidx, transpose=True),
        Operand(P),
        acc_S,
        acc_O,
        sums,
        coords,
        OnlineSoftmax(offset, row_sum, scale_log2),
    )

    # A tile without visible keys still masks one block, so that nothing below is conditional.
    left, right = sizes.window(config.mask)
    window = (config.tile_m, config.tile_n, sizes.seqlen_q, sizes.seqlen_k, left, right)
    first, last = key_blocks(m_block, *window)
    free_first, free_last = unmasked_blocks(m_block, *window)
    n_block = cutlass.max(last - 1, 0)
    load_tile(tiled_load, gQ, sQ, sizes.seqlen_q - m_block * config.tile_m, x.head_dim, tidx)
    load_block(x, gK, sK, n_block, False)
    acc_O.fill(0.0)
    step(config, sizes, x, w, m_block, n_block, first, "first")
    n_block -= 1
    for n in cutlass.range(n_block - free_last + 1, unroll=1):
        step(config, sizes, x, w, m_block, n_block - n, first, "masked")
    n_block = cutlass.min(n_block, free_last - 1)
    for n in cutlass.range(n_block - free_first + 1, unroll=1):
        step(config, sizes, x, w, m_block, n_block - n, first, "free")
    if const_expr(left is not None):
        n_block = cutlass.min(n_block, free_first - 1)
        for n in cutlass.range(n_block - first + 1, unroll=1):
            step(config, sizes, x, w, m_block, n_block - n, first, "masked")
    m_block, head, batch = tile_coords(config, sizes, swath, opaque(tile))
    store_O(config, w, mO[batch, None, head, None], mLSE[batch, head, None], m_block, tidx % 32)


kernel.set_name_prefix("mfa_fwd_sm80", remove_cutlass_symbol=True)


@cute.jit
def launch(
    mQ: cute.Tensor,
    mK: cute.Tensor,
    mV: cute.Tensor,
    mO: cute.Tensor,
    mLSE: cute.Tensor,
    scale: Float32,
    window_left: Int32,
    window_right: Int32,
    swath: Int32,
    config: cutlass.Constexpr,
    stream,
):
    """The tensors are as in the module's first lines; the numbers as in arguments.py."""
    dtype = mQ.element_type
    mnk = (config.tile_m, config.tile_n, config.head_dim)
    sQ_layout = sm90.make_smem_layout_a(LayoutEnum.ROW_MAJOR, mnk, dtype, 1)
    sKV_layout = sm90.make_smem_layout_b(LayoutEnum.ROW_MAJOR, mnk, dtype, 1)
    batch, seqlen_q, heads, _ = mQ.shape
    group = heads // mK.shape[2]
    sizes = Sizes(seqlen_q, mK.shape[1], heads, batch, group, window_left, window_right)
    kernel(
        config,
        sizes,
        swath,
        mQ,
        mK,
        mV,
        mO,
        mLSE,
        scale * Float32(LOG2_E),
        make_tiled_mma(dtype, config.warps),
        make_tiled_load(dtype, 32 * config.warps, config.head_dim),
        sQ_layout,
        sKV_layout,
    ).launch(
        grid=(num_tiles(config, sizes), 1, 1),
        block=(32 * config.warps, 1, 1),
        stream=stream,
    )


def fake_arguments(config) -> tuple:
    return (*arguments.forward(config), Int32(1), config, arguments.stream())
