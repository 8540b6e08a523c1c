"""What the roles of sm90.py share and own: set-up, shared memory with its rings, a consumer's work."""

from typing import NamedTuple

import cutlass.cute as cute
from cutlass import Float32, Int32
from cutlass.memory import SmemAllocator

from mini_flash_attention.kernels.calls import Forward
from mini_flash_attention.kernels.parts.blocks import Walk
from mini_flash_attention.kernels.parts.fragments import as_operand_A, transposed
from mini_flash_attention.kernels.parts.scheduler import Tile
from mini_flash_attention.kernels.parts.scores import scale_log2
from mini_flash_attention.kernels.parts.seqlen import Sizes
from mini_flash_attention.kernels.parts.sm90 import Ring, Tma, make_ring
from mini_flash_attention.kernels.parts.softmax import OnlineSoftmax
from mini_flash_attention.kernels.parts.tiles import allocate

# Named barriers, of 16. 0 is the whole thread block's; TURN and WG take one for each of up to 3 WGs.
TURN = 1  # + wg: it is the turn of WG wg, which waits there. The WG before it arrives
WG = 8  # + wg: the 128 threads of WG wg. Its uses may share it: all threads go through them in the same order


class Setup(NamedTuple):
    """What `launch` makes for the kernel."""

    sizes: Sizes
    q: Tma
    k: Tma
    v: Tma
    o: Tma
    qk: cute.TiledMma
    pv: cute.TiledMma
    sQ_layout: cute.ComposedLayout
    sKV_layout: cute.ComposedLayout


class Shared(NamedTuple):
    """Shared memory and the rings that guard it."""

    sQ: cute.Tensor  # (tile_m, d, q_stages), later O
    sK: cute.Tensor  # (tile_n, d, stages)
    sV: cute.Tensor  # (tile_n, d, stages)
    sTile: cute.Tensor  # (what announce writes, 2): 3 numbers, 5 with a block mask, 6 in a ragged batch
    q_ring: Ring
    k_ring: Ring
    v_ring: Ring
    t_ring: Ring

    @property
    def rings(self) -> tuple[Ring, ...]:
        return self[4:]


class Work(NamedTuple):
    """What one consumer warp computes with."""

    call: Forward
    setup: Setup
    s: Shared
    wg: Int32
    lane: Int32
    tidx: Int32  # among the consumers
    tSrQ: cute.Tensor  # A of Q·Kᵀ: registers, or descriptors of shared memory (MMA, 1, d / 16, q_stages)
    tSrK: cute.Tensor  # B of Q·Kᵀ: descriptors (MMA, 1, d / 16, stages)
    tOrV: cute.Tensor  # B of P·V: descriptors (MMA, 1, tile_n / 16, stages)
    P: cute.Tensor  # A of P·V: registers (MMA, 1, tile_n / 16)
    acc_S: cute.Tensor  # ((2, 2, tile_n / 8), 1, 1)
    acc_O: cute.Tensor  # ((2, 2, d / 8), 1, 1)
    sums: cute.Tensor  # of one block's rows
    coords: cute.Tensor  # (row, column) of each element of acc_S
    softmax: OnlineSoftmax
    batch_head: cute.Tensor  # (1) int32: batch * heads + head of the tile, of which dropout is a function


class Job(NamedTuple):
    """The tile that a WG works on."""

    t: Int32  # the thread block's t-th
    tile: Tile
    sizes: Sizes  # of its sequence
    walk: Walk  # of this WG


def make_shared(config, call: Forward, setup: Setup) -> Shared:
    smem, dtype = SmemAllocator(), call.mO.element_type
    layouts = setup.sQ_layout, setup.sKV_layout, setup.sKV_layout
    sQ, sK, sV = (allocate(smem, dtype, layout) for layout in layouts)
    sTile = smem.allocate_tensor(
        Int32, cute.make_layout((5 if config.sparse else 3 if call.ragged is None else 6, 2)), 16
    )
    rings = (make_ring(smem, n) for n in (config.q_stages, config.stages, config.stages, 2))
    return Shared(sQ, sK, sV, sTile, *rings)


def make_work(config, call: Forward, setup: Setup, s: Shared) -> Work:
    tidx = cute.arch.thread_idx()[0] - 128
    wg = cute.arch.make_warp_uniform(tidx // 128)
    # Sliced by the WG, not by the thread: descriptors stay in uniform registers.
    wg_qk, wg_pv = setup.qk.get_slice(wg * 128), setup.pv.get_slice(wg * 128)
    thr_qk, thr_pv = setup.qk.get_slice(tidx), setup.pv.get_slice(tidx)
    tile_s, tile_o = (config.tile_m, config.tile_n), (config.tile_m, config.head_dim)
    acc_S = cute.make_rmem_tensor(thr_qk.partition_shape_C(tile_s), Float32)
    acc_O = cute.make_rmem_tensor(thr_pv.partition_shape_C(tile_o), Float32)
    if config.q_regs:
        tSrQ = thr_qk.make_fragment_A(thr_qk.partition_shape_A(tile_o))
    else:
        tSrQ = wg_qk.make_fragment_A(wg_qk.partition_A(s.sQ))
    sVt = transposed(s.sV)  # (d, tile_n, stages)
    offset, row_sum, sums = (cute.make_rmem_tensor(2, Float32) for _ in range(3))
    return Work(
        call,
        setup,
        s,
        wg,
        cute.arch.lane_idx(),
        tidx,
        tSrQ=tSrQ,
        tSrK=wg_qk.make_fragment_B(wg_qk.partition_B(s.sK)),
        tOrV=wg_pv.make_fragment_B(wg_pv.partition_B(sVt)),
        P=cute.make_rmem_tensor(as_operand_A(acc_S).shape, s.sQ.element_type),
        acc_S=acc_S,
        acc_O=acc_O,
        sums=sums,
        coords=thr_qk.partition_C(cute.make_identity_tensor(tile_s)),
        softmax=OnlineSoftmax(offset, row_sum, scale_log2(config, call.score)),
        batch_head=cute.make_rmem_tensor(1, Int32),
    )
