"""What the roles of sm90.py share: set-up, named barriers, shared memory with its rings, zeros in it."""

from typing import NamedTuple

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, const_expr
from cutlass.memory import SmemAllocator

from mini_flash_attention.kernels.backward.schedule import Order
from mini_flash_attention.kernels.parts.arguments import element_type
from mini_flash_attention.kernels.parts.seqlen import Sizes
from mini_flash_attention.kernels.parts.sm90 import Ring, Tma, init_rings, make_ring, zero_rows
from mini_flash_attention.kernels.parts.tiles import allocate

# Warps 0 to 7 are the two consumer WGs, then come the dQ WG and one of which the first warp alone works.
DQ_WARP, LOAD_WARP, THREADS = 8, 12, 512
CONSUMER_WARPS, READER_WARPS = 8, 12  # readers: consumers and the dQ WG

# Named barriers. All threads of one go through its uses in the same order, so that they may share it.
START = 0  # the thread block: the mbarriers are there
CONSUMERS = 1  # both consumer WGs: V and Q may be overwritten, dV and dK are complete
DQ_WG = 2  # the dQ WG: a buffer of sdQ may be overwritten, or is complete; dq_transposed: zeros in K
WG = 3  # + wg: the 128 threads of a consumer WG: zeros in its tiles; wide: its gradient is complete


class Setup(NamedTuple):
    """What `launch` makes for the kernel. m, n, d: tile_m, tile_n, head_dim."""

    sizes: Sizes
    order: Order
    num_tiles: Int32
    scale_log2: Float32  # of plain scores
    q: Tma
    k: Tma
    v: Tma
    do: Tma
    dk: Tma
    dv: Tma
    sdp: cute.TiledMma  # Sᵀ = K·Qᵀ and dPᵀ = V·dOᵀ    (n, m, d)
    dkv: cute.TiledMma  # dV += Pᵀ·dO and dK += dSᵀ·Q  (n, d, m), A in registers
    dq: cute.TiledMma  # dQ = dS·K (m, d, n); if config.dq_transposed dQᵀ = Kᵀ·dSᵀ (d, m, n), A in registers
    layouts: tuple[cute.ComposedLayout, ...]  # of Shared's first five


class Shared(NamedTuple):
    """Shared memory and the rings that guard it."""

    sQ: cute.Tensor  # (tile_m, d, stages), at the end dK
    sdO: cute.Tensor  # (tile_m, d, do_stages)
    sK: cute.Tensor  # (tile_n, d, kv_stages)
    sV: cute.Tensor  # (tile_n, d, kv_stages), at the end dV
    sdSt: cute.Tensor  # (tile_n, tile_m, 2)
    sdQ: cute.Tensor  # (rows * cols, 2) float32: pieces of dQ, in the order of convert.offset
    sStats: cute.Tensor  # (2 * tile_m, stages) float32: -LSE / scale, then -delta
    q_ring: Ring  # Q and stats; like do_ring, ds_ring, p_ring: one use for each query block
    do_ring: Ring
    k_ring: Ring  # like v_ring and tile_ring: one use for each tile that the thread block works on
    v_ring: Ring
    ds_ring: Ring
    sP: cute.Tensor | None  # (8, tile_m / 16, 128, 2), if config.wide: the registers of each thread
    p_ring: Ring | None
    sTile: cute.Tensor | None  # (2), if config.persistent: the number of the next tile
    tile_ring: Ring | None


def make_shared(config, setup: Setup) -> Shared:
    smem, dtype = SmemAllocator(), element_type(config)
    tiles = [allocate(smem, dtype, layout) for layout in setup.layouts]
    rows, cols = config.dq_piece
    sdQ = smem.allocate_tensor(Float32, cute.make_layout((rows * cols, 2)), 1024)
    sStats = smem.allocate_tensor(Float32, cute.make_layout((2 * config.tile_m, config.stages)), 128)
    stages = config.stages, config.do_stages, config.kv_stages, config.kv_stages, 2
    rings = [make_ring(smem, n) for n in stages]
    sP, p_ring, sTile, tile_ring = None, None, None, None
    if config.wide:  # each thread's values of P in 16-byte chunks, without bank conflicts
        chunks = config.tile_m // 16
        layout = cute.make_layout((8, chunks, 128, 2), stride=(1, 8 * 128, 8, 8 * 128 * chunks))
        sP, p_ring = smem.allocate_tensor(dtype, layout, 128), make_ring(smem, 2)
    if config.persistent:
        sTile, tile_ring = smem.allocate_tensor(Int32, cute.make_layout(2), 8), make_ring(smem, 2)
    return Shared(*tiles, sdQ, sStats, *rings, sP, p_ring, sTile, tile_ring)


@cute.jit
def init_mbarriers(config: cutlass.Constexpr, s: Shared):
    """By one thread. Each warp that reads a slot releases it once, each that fills a part commits it once."""
    init_rings((s.q_ring, s.do_ring, s.v_ring), CONSUMER_WARPS)  # filled by TMA
    init_rings((s.k_ring,), READER_WARPS)  # the dQ WG reads K, too. K and V: released if persistent alone
    if const_expr(config.persistent):
        init_rings((s.tile_ring,), READER_WARPS)  # committed by the load warp
    if const_expr(config.wide):  # WG 1's 4 warps make dS, for the dQ WG's 4, from the P of WG 0's 4
        init_rings((s.ds_ring, s.p_ring), 4, 4)
    else:  # both WGs' warps make dS
        init_rings((s.ds_ring,), 4, CONSUMER_WARPS)


def accumulator(thr_mma, rows: int, cols: int) -> cute.Tensor:
    """A thread's part of a product (rows, cols): ((2, 2, cols / 8), 1, 1)."""
    return cute.make_rmem_tensor(thr_mma.partition_shape_C((rows, cols)), Float32)


@cute.jit
def clear_beyond(sX: cute.Tensor, rows: Int32, first: Int32, barrier_id):
    """Zero the rows of a tile (rows, d) that lie beyond the end of the sequence; first: the tile's own first.

    They are other sequences' or nobody's, perhaps NaN, and 0 · NaN is NaN. Each WG that reads a tile does
    this for itself: all write the same zeros. Not the dQ WG that reads K by wgmma: dS comes behind the zeros.
    """
    left = cutlass.max(rows - first, 0)
    if left < cute.size(sX, mode=[0]):  # zero_rows: its fence and barrier let the WG's wgmma read the zeros
        zero_rows(sX, left, cute.arch.thread_idx()[0] % 128, barrier_id)


@cute.jit
def clear_queries(config: cutlass.Constexpr, s: Shared, sizes: Sizes, it: Int32, m_block: Int32, barrier_id):
    """clear_beyond for Q and dO, where use `it` is the last query block of a sequence."""
    first = m_block * config.tile_m
    if first + config.tile_m > sizes.seqlen_q:
        s.q_ring.wait_full(it)  # TMA has written Q: not after the zeros
        clear_beyond(s.sQ[None, None, s.q_ring.slot(it)], sizes.seqlen_q, first, barrier_id)
        s.do_ring.wait_full(it)  # TMA has written dO
        clear_beyond(s.sdO[None, None, s.do_ring.slot(it)], sizes.seqlen_q, first, barrier_id)
