"""FlashAttention forward for Hopper: one producer warp, 2 or 3 consumer warpgroups (WGs).

One persistent thread block runs on each SM.

q (B, Sq, Hq, D), k and v (B, Sk, Hkv, D), o (B, Sq, Hq, D), lse (B, Hq, Sq) float32; float16 or
bfloat16, any strides with a unit last one. A tile is tile_m query rows of one head; each WG owns 64 of
them and walks the keys from the tile's last block to its first. The design is FlashAttention-3's (Shah
et al. 2024, arXiv 2407.08608), its softmax is not: blocks without a mask compute no maximum (see step).
"""

from typing import NamedTuple

import cutlass
import cutlass.cute as cute
import cutlass.utils.hopper_helpers as hopper
from cutlass import Boolean, Float32, Int32, const_expr
from cutlass.block import block_copy
from cutlass.cute.nvgpu import OperandMajorMode, cpasync, warp, warpgroup
from cutlass.memory import SmemAllocator
from cutlass.tensor_utils import LayoutEnum

from mini_flash_attention.kernels import arguments
from mini_flash_attention.kernels.fragments import (
    as_operand_A,
    convert,
    rescale,
    rows_cols,
    store_rows,
)
from mini_flash_attention.kernels.mask import mask
from mini_flash_attention.kernels.scheduler import Schedule, num_tiles, tile_coords
from mini_flash_attention.kernels.seqlen import Sizes
from mini_flash_attention.kernels.sm90 import (
    Ring,
    Tma,
    all_true,
    init_rings,
    load,
    make_ring,
    make_tma,
    release,
    wgmma,
)
from mini_flash_attention.kernels.softmax import LOG2_E, OnlineSoftmax


class Shared(NamedTuple):
    """Shared memory and the rings that guard it."""

    sQ: cute.Tensor  # (tile_m, d, q_stages), later O
    sK: cute.Tensor  # (tile_n, d, stages)
    sV: cute.Tensor  # (tile_n, d, stages)
    sTile: cute.Tensor  # (m_block | head | batch, 2); m_block -1: no more tiles
    q_ring: Ring
    k_ring: Ring
    v_ring: Ring
    t_ring: Ring


@cute.jit
def produce(config: cutlass.Constexpr, sizes: Sizes, schedule: Schedule, q: Tma, k: Tma, v: Tma, s: Shared):
    """The producer warp: draw tiles, tell the consumers, load Q, K and V."""
    lane = cute.arch.lane_idx()
    grid, _, _ = cute.arch.grid_dim()
    tile, _, _ = cute.arch.block_idx()
    total = num_tiles(config, sizes)
    it, t = Int32(0), Int32(0)  # key blocks and tiles so far
    has_Q = Boolean(False)  # this tile's Q is on its way
    while tile < total:
        m_block, head, batch = tile_coords(config, sizes, schedule.swath, tile)
        head_kv = head // sizes.group
        drawn = Int32(0)
        s.t_ring.wait_empty(t)  # the consumers have read what this slot said two tiles ago
        if lane == 0:
            announce(s, t, m_block, head, batch)
            if total > grid:  # else each thread block has one tile, and there is no counter
                drawn = draw(schedule.counter)
        start, _, _, first = sizes.walk(config, m_block)
        load(k, start, head_kv, batch, s.sK, s.k_ring, it)
        if not has_Q:
            load(q, m_block, head, batch, s.sQ, s.q_ring, t)
        has_Q = Boolean(False)
        tile = grid + cute.arch.shuffle_sync(drawn, 0)
        for i in cutlass.range(start - first, unroll=1):  # K a block ahead of V, as needed
            load(k, start - 1 - i, head_kv, batch, s.sK, s.k_ring, it + 1)
            load(v, start - i, head_kv, batch, s.sV, s.v_ring, it)
            it += 1
            if const_expr(config.q_stages == 2):
                # K's slots have all been asked for. Not earlier: this load waits until the previous O has
                # left its slot, and K and V would wait behind it.
                if i == config.stages - 2 and tile < total:
                    m_next, head_next, batch_next = tile_coords(config, sizes, schedule.swath, tile)
                    load(q, m_next, head_next, batch_next, s.sQ, s.q_ring, t + 1)
                    has_Q = Boolean(True)
        load(v, cutlass.min(start, first), head_kv, batch, s.sV, s.v_ring, it)
        it += 1
        t += 1
    s.t_ring.wait_empty(t)
    if lane == 0:
        announce(s, t, Int32(-1), Int32(0), Int32(0))
        if total > grid:
            finished = draw(schedule.counter + 1)
            if finished == grid - 1:  # nobody draws any more: zero for the next launch
                schedule.counter[0], schedule.counter[1] = Int32(0), Int32(0)


@cute.jit
def draw(counter: cute.Pointer) -> Int32:
    """The next number of a counter in global memory."""
    return cute.arch.atomic_add(counter.llvm_ptr, Int32(1), sem="relaxed", scope="gpu")


@cute.jit
def announce(s: Shared, t: Int32, m_block: Int32, head: Int32, batch: Int32):
    """Tell the consumers which tile is their t-th."""
    slot = s.t_ring.slot(t)
    s.sTile[0, slot], s.sTile[1, slot], s.sTile[2, slot] = m_block, head, batch
    cute.arch.mbarrier_arrive(s.t_ring.full + slot)


@cute.jit
def read_tile(s: Shared, t: Int32, lane: Int32):
    """(m_block, head, batch) of the consumers' t-th tile."""
    s.t_ring.wait_full(t)
    slot = s.t_ring.slot(t)
    # make_warp_uniform is a shuffle: all lanes have read before lane 0 releases the slot.
    m_block, head, batch = (cute.arch.make_warp_uniform(s.sTile[i, slot]) for i in range(3))
    release(s.t_ring, t, lane)
    return m_block, head, batch


class Work(NamedTuple):
    """What one consumer warp computes with."""

    wg: Int32
    lane: Int32
    tidx: Int32  # among the consumers
    qk: cute.TiledMma
    pv: cute.TiledMma
    tSrQ: cute.Tensor  # A of Q·Kᵀ: registers, or descriptors of shared memory (MMA, 1, d / 16, q_stages)
    tSrK: cute.Tensor  # B of Q·Kᵀ: descriptors (MMA, 1, d / 16, stages)
    tOrV: cute.Tensor  # B of P·V: descriptors (MMA, 1, tile_n / 16, stages)
    P: cute.Tensor  # A of P·V: registers (MMA, 1, tile_n / 16)
    acc_S: cute.Tensor  # ((2, 2, tile_n / 8), 1, 1)
    acc_O: cute.Tensor  # ((2, 2, d / 8), 1, 1)
    sums: cute.Tensor  # of one block's rows
    coords: cute.Tensor  # (row, column) of each element of acc_S
    softmax: OnlineSoftmax


@cute.jit
def my_turn(config: cutlass.Constexpr, wg: Int32):
    """Wait until the WG before this one has issued its products. Named barrier 1 + w is WG w's turn.

    For speed alone: one WG's products run under another's softmax. The 128 threads of a WG wait, the 128 of
    the one before arrive; the last arrival is left over. An S that is computed again takes no turn.
    """
    if const_expr(config.ordered):
        cute.arch.barrier(barrier_id=1 + wg, number_of_threads=256)


@cute.jit
def next_turn(config: cutlass.Constexpr, wg: Int32):
    if const_expr(config.ordered):
        following = 1 - wg if const_expr(config.wgs == 2) else (wg + 1) % config.wgs
        cute.arch.barrier_arrive(barrier_id=1 + following, number_of_threads=256)


@cute.jit
def issue_S(config: cutlass.Constexpr, s: Shared, w: Work, t: Int32, it: Int32):
    """S = Q·Kᵀ, with Q of tile t and the K of ring use it."""
    tSrQ = w.tSrQ if const_expr(config.q_regs) else w.tSrQ[None, None, None, s.q_ring.slot(t)]
    wgmma(w.qk, w.acc_S, tSrQ, w.tSrK[None, None, None, s.k_ring.slot(it)], False)


@cute.jit
def issue_O(s: Shared, w: Work, it: Int32):
    """O += P·V, with the V of ring use it."""
    wgmma(w.pv, w.acc_O, w.P, w.tOrV[None, None, None, s.v_ring.slot(it)], True)


@cute.jit
def step(
    config: cutlass.Constexpr,
    sizes: Sizes,
    s: Shared,
    w: Work,
    t: Int32,
    it: Int32,
    m_block: Int32,
    n_block: Int32,
    masked: cutlass.Constexpr,
):
    """S of the next block (ring use it + 1) under O += P·V of the one before (use it); then S becomes P.

    A block without a mask takes no maximum: the rows keep their offsets, and the block's sums tell
    whether P stayed in range. Where it did not, for any of the WG's 64 rows, S is computed once more,
    the offsets are renewed, and False is returned: the caller then stops trusting this tile's offsets.
    """
    s.k_ring.wait_full(it + 1)
    my_turn(config, w.wg)
    issue_S(config, s, w, t, it + 1)
    s.v_ring.wait_full(it)
    issue_O(s, w, it)
    next_turn(config, w.wg)
    warpgroup.wait_group(1)  # S is there; P·V runs on
    w.sums.fill(0.0)
    ok = Boolean(True)
    if const_expr(masked):
        release(s.k_ring, it + 1, w.lane)
        mask(config, sizes, w.acc_S, w.coords, m_block, n_block)
        warpgroup.wait_group(0)  # P·V is done: P and O may be written, V overwritten
        w.softmax.renew(w.acc_S, w.acc_O, w.sums, True)
    else:
        w.softmax.exponentials(rows_cols(w.acc_S), w.sums, False)
        ok = in_range(config, w)
        warpgroup.wait_group(0)  # as above
        if not ok:
            issue_S(config, s, w, t, it + 1)
            warpgroup.wait_group(0)
            w.sums.fill(0.0)
            w.softmax.renew(w.acc_S, w.acc_O, w.sums, False)
        release(s.k_ring, it + 1, w.lane)
    for r in cutlass.range_constexpr(cute.size(w.sums)):
        w.softmax.row_sum[r] = w.softmax.row_sum[r] + w.sums[r]
    release(s.v_ring, it, w.lane)
    convert(as_operand_A(w.acc_S), w.P)
    return ok


@cute.jit
def later_blocks(
    config: cutlass.Constexpr,
    sizes: Sizes,
    s: Shared,
    w: Work,
    t: Int32,
    it: Int32,
    m_block: Int32,
    ends: tuple[Int32, Int32, Int32, Int32],
) -> Int32:
    """All steps of a tile after its first block, in at most two rounds. Returns the ring use reached.

    ends: sizes.walk of m_block.
    """
    start, free_end, free_first, first = ends
    n_block, masked_end = start - 1, free_end
    while n_block >= first:
        while n_block >= masked_end:
            step(config, sizes, s, w, t, it, m_block, n_block, True)
            it += 1
            n_block -= 1
        steady = Boolean(True)
        while (n_block >= free_first) & steady:
            steady = step(config, sizes, s, w, t, it, m_block, n_block, False)
            it += 1
            n_block -= 1
        masked_end = first  # the left edge, or scores that grow: the rest as if it were masked
    return it


@cute.jit
def in_range(config: cutlass.Constexpr, w: Work):
    """Whether all sums of the WG, so all of its P, are far from overflow in P's dtype; not if one is NaN.

    The WG must agree, since it can only compute S again as a whole. Named barrier 8 + w.
    """
    limit = 2.0**60 if const_expr(config.dtype == "bfloat16") else 2.0**15
    return all_true(cute.arch.fmax(w.sums[0], w.sums[1], nan=True) < limit, 8 + w.wg)


@cute.jit
def load_Q(config: cutlass.Constexpr, s: Shared, w: Work, t: Int32):
    """Q's rows of this warp, from shared memory to registers, if they live there."""
    if const_expr(config.q_regs):
        sQ = s.sQ[None, None, s.q_ring.slot(t)]
        atom = cute.make_copy_atom(warp.LdMatrix8x8x16bOp(False, 4), sQ.element_type)
        thr_load = cute.make_tiled_copy_A(atom, w.qk).get_slice(w.tidx)
        cute.copy(atom, thr_load.partition_S(sQ), thr_load.retile(w.tSrQ))


@cute.jit
def first_S(config: cutlass.Constexpr, s: Shared, w: Work, t: Int32, it: Int32):
    """S of a tile's first block, where no other product can be issued with it."""
    s.q_ring.wait_full(t)
    s.k_ring.wait_full(it)
    load_Q(config, s, w, t)
    issue_S(config, s, w, t, it)
    warpgroup.wait_group(0)
    release(s.k_ring, it, w.lane)


@cute.jit
def consume(
    config: cutlass.Constexpr,
    sizes: Sizes,
    s: Shared,
    w: Work,
    o: Tma,
    mO: cute.Tensor,
    mLSE: cute.Tensor,
):
    """A consumer warp. With two Q buffers, a tile's first S is issued with the previous tile's last P·V."""
    if const_expr(config.ordered):
        if w.wg == config.wgs - 1:  # WG 0 begins
            cute.arch.barrier_arrive(barrier_id=1, number_of_threads=256)
    t, it = Int32(0), Int32(0)  # tiles and key blocks so far
    m_block, head, batch = read_tile(s, t, w.lane)
    if const_expr(config.q_stages == 2):
        first_S(config, s, w, t, it)
    while m_block >= 0:
        if const_expr(config.q_stages == 1):
            first_S(config, s, w, t, it)
        ends = start, free_end, _, _ = sizes.walk(config, m_block)
        if start >= free_end:  # else every row sees it whole
            mask(config, sizes, w.acc_S, w.coords, m_block, start)
        w.softmax.first(w.acc_S)
        convert(as_operand_A(w.acc_S), w.P)
        w.acc_O.fill(0.0)
        if const_expr(config.q_stages == 2):
            if t > 0:  # the previous O has left its slot: the producer may load Q into it
                if w.lane == 0:
                    cute.arch.cp_async_bulk_wait_group(0, read=True)
                release(s.q_ring, t - 1, w.lane)

        it = later_blocks(config, sizes, s, w, t, it, m_block, ends)
        if const_expr(config.q_stages == 1):
            release(s.q_ring, t, w.lane)
        m_next, head_next, batch_next = read_tile(s, t + 1, w.lane)
        # After the last tile there is no Q or K to wait for: S is made of what lies in the slots, nobody
        # reads it, and the release of K below has no load before it, since the producer has finished.
        if const_expr(config.q_stages == 2):
            if m_next >= 0:
                s.q_ring.wait_full(t + 1)
                s.k_ring.wait_full(it + 1)
            load_Q(config, s, w, t + 1)
        s.v_ring.wait_full(it)
        my_turn(config, w.wg)
        if const_expr(config.q_stages == 2):
            issue_S(config, s, w, t + 1, it + 1)
        issue_O(s, w, it)
        next_turn(config, w.wg)
        w.softmax.finish()
        warpgroup.wait_group(0)
        release(s.v_ring, it, w.lane)
        if const_expr(config.q_stages == 2):
            release(s.k_ring, it + 1, w.lane)
        store(config, sizes, s, w, t, o, mO, mLSE, (m_block, head, batch))
        t += 1
        it += 1
        m_block, head, batch = m_next, head_next, batch_next
    if w.lane == 0:  # the last O has left shared memory before the thread block ends
        cute.arch.cp_async_bulk_wait_group(0, read=True)


@cute.jit
def store(
    config: cutlass.Constexpr,
    sizes: Sizes,
    s: Shared,
    w: Work,
    t: Int32,
    o: Tma,
    mO: cute.Tensor,
    mLSE: cute.Tensor,
    tile: tuple[Int32, Int32, Int32],
):
    """Normalise O and store it and the log-sum-exp; softmax.finish() has run."""
    m_block, head, batch = tile
    rescale(w.acc_O, w.softmax.row_sum)
    O = cute.make_rmem_tensor(w.acc_O.shape, mO.element_type)
    convert(w.acc_O, O)
    rows = cute.make_rmem_tensor(2, Int32)
    for r in cutlass.range_constexpr(2):
        rows[r] = m_block * config.tile_m + w.coords[0][0] + 8 * r
        if w.lane % 4 == 0 and rows[r] < sizes.seqlen_q:
            mLSE[batch, head, rows[r]] = w.softmax.offset[r]
    if const_expr(config.q_stages == 1):
        store_rows(O, mO[batch, None, head, None], rows, w.lane)
    else:  # over this warp's 16 rows of Q: its products alone read them, and step or first_S waited for it
        sO = s.sQ[None, None, s.q_ring.slot(t)]
        atom = cute.make_copy_atom(warp.StMatrix8x8x16bOp(False, 4), mO.element_type)
        thr_store = cute.make_tiled_copy_C(atom, w.pv).get_slice(w.tidx)
        cute.copy(atom, thr_store.retile(O), thr_store.partition_D(sO))
        cute.arch.fence_view_async_shared()  # this warp's stores, before the TMA unit reads them
        cute.arch.sync_warp()
        block = (16, config.head_dim)
        warp_idx = cute.arch.make_warp_uniform(w.tidx // 32)
        row_block = m_block * (config.tile_m // 16) + warp_idx
        gO = cute.local_tile(o.tensor[None, None, head, batch], block, (row_block, 0))  # (16, d)
        sO = cute.local_tile(sO, block, (warp_idx, 0))  # (16, d)
        if w.lane == 0:
            block_copy(o.atom, cute.group_modes(sO, 0, 2), cute.group_modes(gO, 0, 2))
            cute.arch.cp_async_bulk_commit_group()


def make_work(
    config, s: Shared, tiled_mma_qk: cute.TiledMma, tiled_mma_pv: cute.TiledMma, scale_log2: Float32
) -> Work:
    tidx = cute.arch.thread_idx()[0] - 128
    wg = cute.arch.make_warp_uniform(tidx // 128)
    # Sliced by the WG, not by the thread: descriptors stay in uniform registers.
    wg_qk, wg_pv = tiled_mma_qk.get_slice(wg * 128), tiled_mma_pv.get_slice(wg * 128)
    thr_qk, thr_pv = tiled_mma_qk.get_slice(tidx), tiled_mma_pv.get_slice(tidx)
    tile_s, tile_o = (config.tile_m, config.tile_n), (config.tile_m, config.head_dim)
    acc_S = cute.make_rmem_tensor(thr_qk.partition_shape_C(tile_s), Float32)
    acc_O = cute.make_rmem_tensor(thr_pv.partition_shape_C(tile_o), Float32)
    if config.q_regs:
        tSrQ = thr_qk.make_fragment_A(thr_qk.partition_shape_A(tile_o))
    else:
        tSrQ = wg_qk.make_fragment_A(wg_qk.partition_A(s.sQ))
    # (d, tile_n, stages)
    sVt = cute.make_tensor(s.sV.iterator, cute.select(s.sV.layout, mode=[1, 0, 2]))
    offset, row_sum, sums = (cute.make_rmem_tensor(2, Float32) for _ in range(3))
    return Work(
        wg=wg,
        lane=cute.arch.lane_idx(),
        tidx=tidx,
        qk=tiled_mma_qk,
        pv=tiled_mma_pv,
        tSrQ=tSrQ,
        tSrK=wg_qk.make_fragment_B(wg_qk.partition_B(s.sK)),
        tOrV=wg_pv.make_fragment_B(wg_pv.partition_B(sVt)),
        P=cute.make_rmem_tensor(as_operand_A(acc_S).shape, s.sQ.element_type),
        acc_S=acc_S,
        acc_O=acc_O,
        sums=sums,
        coords=thr_qk.partition_C(cute.make_identity_tensor(tile_s)),
        softmax=OnlineSoftmax(offset, row_sum, scale_log2),
    )


@cute.kernel
def kernel(
    config: cutlass.Constexpr,
    sizes: Sizes,
    schedule: Schedule,
    q: Tma,
    k: Tma,
    v: Tma,
    o: Tma,
    mO: cute.Tensor,
    mLSE: cute.Tensor,
    scale_log2: Float32,
    tiled_mma_qk: cute.TiledMma,
    tiled_mma_pv: cute.TiledMma,
    sQ_layout: cute.ComposedLayout,
    sKV_layout: cute.ComposedLayout,
):
    warp_idx = cute.arch.make_warp_uniform(cute.arch.warp_idx())
    smem = SmemAllocator()
    dtype = mO.element_type
    sQ = smem.allocate_tensor(dtype, sQ_layout.outer, 1024, swizzle=sQ_layout.inner)
    sK = smem.allocate_tensor(dtype, sKV_layout.outer, 1024, swizzle=sKV_layout.inner)
    sV = smem.allocate_tensor(dtype, sKV_layout.outer, 1024, swizzle=sKV_layout.inner)
    sTile = smem.allocate_tensor(Int32, cute.make_layout((3, 2)), 16)
    rings = tuple(make_ring(smem, n) for n in (config.q_stages, config.stages, config.stages, 2))
    s = Shared(sQ, sK, sV, sTile, *rings)
    if warp_idx == 0:
        with cute.arch.elect_one():
            init_rings(rings, config.tile_m // 16)  # consumer warps: each releases a slot once
        for x in (q, k, v, o):
            cpasync.prefetch_descriptor(x.atom)
    cute.arch.barrier()  # the mbarriers are there
    if warp_idx < 4:
        cute.arch.setmaxregister_decrease(24 if config.wgs == 2 else 32)
        if warp_idx == 0:
            produce(config, sizes, schedule, q, k, v, s)
    else:
        cute.arch.setmaxregister_increase(240 if config.wgs == 2 else 160)
        w = make_work(config, s, tiled_mma_qk, tiled_mma_pv, scale_log2)
        consume(config, sizes, s, w, o, mO, mLSE)


kernel.set_name_prefix("mfa_fwd_sm90", remove_cutlass_symbol=True)


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
    num_sms: Int32,
    counter: cute.Tensor,
    config: cutlass.Constexpr,
    stream,
):
    """Tensors as in the module's first lines, numbers as in dispatch.py, counter as in counters.py."""
    batch, seqlen_q, heads, _ = mQ.shape
    group = heads // mK.shape[2]
    sizes = Sizes(seqlen_q, mK.shape[1], heads, batch, group, window_left, window_right)
    schedule = Schedule(swath, counter.iterator)
    launch_at(config, Call(sizes, schedule, num_sms, mQ, mK, mV, mO, mLSE, scale), stream)


class Call(NamedTuple):
    """What launch was given."""

    sizes: Sizes
    schedule: Schedule
    num_sms: Int32
    mQ: cute.Tensor
    mK: cute.Tensor
    mV: cute.Tensor
    mO: cute.Tensor
    mLSE: cute.Tensor
    scale: Float32


@cute.jit
def launch_at(config: cutlass.Constexpr, call: Call, stream):
    """ForwardSm90.at: the tiles for this many queries."""
    if const_expr(config.short is None):
        launch_tiles(config, call, stream)
    elif call.sizes.seqlen_q <= config.short_seqlen:
        launch_at(config.short, call, stream)
    else:
        launch_tiles(config, call, stream)


@cute.jit
def launch_tiles(config: cutlass.Constexpr, call: Call, stream):
    dtype = call.mQ.element_type
    mnk = (config.tile_m, config.tile_n, config.head_dim)
    sQ_layout = hopper.make_smem_layout_a(LayoutEnum.ROW_MAJOR, mnk, dtype, config.q_stages)
    sO_layout = hopper.make_smem_layout_a(LayoutEnum.ROW_MAJOR, (16, *mnk[1:]), dtype, 1)
    sKV_layout = hopper.make_smem_layout_b(LayoutEnum.ROW_MAJOR, mnk, dtype, config.stages)
    K, MN = OperandMajorMode.K, OperandMajorMode.MN
    RMEM, SMEM = warpgroup.OperandSource.RMEM, warpgroup.OperandSource.SMEM
    wgs = (config.wgs, 1, 1)
    tiled_mma_qk = hopper.make_trivial_tiled_mma(
        dtype, dtype, K, K, Float32, wgs, (64, config.tile_n), RMEM if config.q_regs else SMEM
    )
    tiled_mma_pv = hopper.make_trivial_tiled_mma(
        dtype, dtype, K, MN, Float32, wgs, (64, config.head_dim), RMEM
    )
    g2s, s2g = cpasync.CopyBulkTensorTileG2SOp(), cpasync.CopyBulkTensorTileS2GOp()
    q = make_tma(g2s, call.mQ, sQ_layout, (config.tile_m, config.head_dim))
    k = make_tma(g2s, call.mK, sKV_layout, (config.tile_n, config.head_dim))
    v = make_tma(g2s, call.mV, sKV_layout, (config.tile_n, config.head_dim))
    o = make_tma(s2g, call.mO, sO_layout, (16, config.head_dim))
    kernel(
        config,
        call.sizes,
        call.schedule,
        q,
        k,
        v,
        o,
        call.mO,
        call.mLSE,
        call.scale * Float32(LOG2_E),
        tiled_mma_qk,
        tiled_mma_pv,
        sQ_layout,
        sKV_layout,
    ).launch(
        grid=(cutlass.min(call.num_sms, num_tiles(config, call.sizes)), 1, 1),
        block=(128 + 128 * config.wgs, 1, 1),
        min_blocks_per_mp=1,
        stream=stream,
    )


def fake_arguments(config) -> tuple:
    numbers = Int32(1), Int32(1)
    return (*arguments.forward(config), *numbers, arguments.counter(), config, arguments.stream())
