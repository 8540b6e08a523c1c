"""Step 12: no gap between tiles. The next tile's first Q·Kᵀ is issued together with this tile's last P·V.

O leaves by TMA, through the slot of its own Q, under the next tile's first softmax. Q goes to registers,
which spares wgmma reading it again from shared memory for every block. q, k, v, o: (batch, seqlen, heads,
128) bfloat16, lengths multiples of 128.
"""

import cutlass
import cutlass.cute as cute
from cutlass import BFloat16, Float32, Int32
from cutlass.cute.nvgpu import cpasync, warp, warpgroup
from cutlass.memory import SmemAllocator
from helpers import (
    SCALE_LOG2,
    D,
    Tma,
    all_true,
    allocate,
    announce,
    as_operand_A,
    convert,
    draw,
    finish_drawing,
    init_rings,
    load,
    make_ring,
    make_tma,
    make_wgmma,
    normalise,
    read_tile,
    release,
    rows_cols,
    store_tma,
    tile_layout,
    transposed,
    wait_for_store,
    wgmma,
)

ARCH = "sm_90a"
WGS = 2  # consumer warpgroups; one more WG holds the producer warp
THREADS = 128 * (1 + WGS)
TILE_M = 64 * WGS  # query rows of a thread block: 64 for each WG that computes
TILE_N = 128  # keys of a block
TURN, VOTE = 1, 3  # named barriers of each WG: it may issue its products; its threads agree
LIMIT = 2.0**60  # sums of P up to this are in range: far below bfloat16's and float32's largest value
STAGES = 2  # slots of shared memory for K, and for V
Q_STAGES = 2  # and for Q
SHARED_MEMORY = 2 * D * (Q_STAGES * TILE_M + 2 * STAGES * TILE_N)  # bytes; the mbarriers come on top


@cute.jit
def launch(mQ, mK, mV, mO, counter: cute.Tensor, num_sms: Int32, stream):
    """counter: two int32 zeros, left zero."""
    op = cpasync.CopyBulkTensorTileG2SOp()
    q = make_tma(op, mQ, tile_layout(TILE_M), TILE_M)
    k, v = (make_tma(op, mX, tile_layout(TILE_N), TILE_N) for mX in (mK, mV))
    qk, pv = make_wgmma(WGS, TILE_N, True, False), make_wgmma(WGS, D, True, True)
    o = make_tma(cpasync.CopyBulkTensorTileS2GOp(), mO, tile_layout(16), 16)
    grid = (cutlass.min(num_sms, mO.shape[1] // TILE_M * mO.shape[2] * mO.shape[0]), 1, 1)
    kernel(q, k, v, o, counter, qk, pv).launch(
        grid=grid, block=(THREADS, 1, 1), min_blocks_per_mp=1, stream=stream
    )


@cute.kernel
def kernel(q: Tma, k: Tma, v: Tma, o: Tma, counter, qk: cute.TiledMma, pv: cute.TiledMma):
    warp_idx = cute.arch.make_warp_uniform(cute.arch.warp_idx())
    smem = SmemAllocator()
    sQ = allocate(smem, tile_layout(TILE_M, Q_STAGES))  # (tile_m, d, q_stages), later O
    sK = allocate(smem, tile_layout(TILE_N, STAGES))  # (tile_n, d, stages)
    sV = allocate(smem, tile_layout(TILE_N, STAGES))  # (tile_n, d, stages)
    sTile = smem.allocate_tensor(Int32, cute.make_layout(Q_STAGES), 16)  # whose Q is in the slot; -1: the end
    rings = tuple(make_ring(smem, stages) for stages in (Q_STAGES, STAGES, STAGES))  # of Q, K, V
    if warp_idx == 0:
        with cute.arch.elect_one():
            init_rings(rings, 4 * WGS)
    cute.arch.barrier()  # the mbarriers are there
    blocks = cute.ceil_div(k.tensor.shape[0], TILE_N)
    if warp_idx < 4:
        cute.arch.setmaxregister_decrease(24)  # registers are handed out by WG: the consumers need them
        if warp_idx == 0:
            produce(q, k, v, counter, sQ, sK, sV, sTile, rings, blocks)
    else:
        cute.arch.setmaxregister_increase(240)
        consume(o, qk, pv, sQ, sK, sV, sTile, rings, blocks)


@cute.jit
def coords(number: Int32, m_blocks: Int32, heads: Int32):
    """The number of a tile -> (m_block, head, batch)."""
    return number % m_blocks, number // m_blocks % heads, number // m_blocks // heads


@cute.jit
def produce(q: Tma, k: Tma, v: Tma, counter: cute.Tensor, sQ, sK, sV, sTile, rings, blocks):
    """The producer warp. t counts tiles, it key blocks: they number the uses of the rings."""
    q_ring, k_ring, v_ring = rings
    t, it, number = Int32(0), Int32(0), cute.arch.block_idx()[0]
    m_blocks, heads = q.tensor.shape[0] // TILE_M, q.tensor.shape[2]
    while number < m_blocks * heads * q.tensor.shape[3]:
        m_block, head, batch = coords(number, m_blocks, heads)
        announce(sTile, q_ring, t, number)
        load(q, m_block, head, batch, sQ, q_ring, t)
        drawn = draw(counter)
        for n in cutlass.range(blocks, unroll=1):
            load(k, n, head, batch, sK, k_ring, it)
            load(v, n, head, batch, sV, v_ring, it)
            it += 1
        number = cute.arch.grid_dim()[0] + cute.arch.shuffle_sync(drawn, 0)
        t += 1
    announce(sTile, q_ring, t, Int32(-1))
    finish_drawing(counter)


@cute.jit
def consume(o: Tma, qk: cute.TiledMma, pv: cute.TiledMma, sQ, sK, sV, sTile, rings, blocks):
    """A consumer warp."""
    q_ring, k_ring, v_ring = rings
    tidx = cute.arch.thread_idx()[0] - 128
    wg = cute.arch.make_warp_uniform(tidx // 128)
    wg_qk, wg_pv = qk.get_slice(wg * 128), pv.get_slice(wg * 128)
    Q = wg_qk.make_fragment_A(wg_qk.partition_shape_A((TILE_M, D)))  # registers
    tSrK = wg_qk.make_fragment_B(wg_qk.partition_B(sK))  # descriptors: where the operands lie
    tOrV = wg_pv.make_fragment_B(wg_pv.partition_B(transposed(sV)))
    acc_S = cute.make_rmem_tensor(wg_qk.partition_shape_C((TILE_M, TILE_N)), Float32)
    acc_O = cute.make_rmem_tensor(wg_pv.partition_shape_C((TILE_M, D)), Float32)
    offset, row_sum, sums = (cute.make_rmem_tensor(2, Float32) for _ in range(3))
    P = cute.make_rmem_tensor(as_operand_A(acc_S).shape, BFloat16)
    if wg == 1:
        next_turn(wg)  # WG 0 begins
    t, it = Int32(0), Int32(0)  # tiles and key blocks so far: they number the uses of the rings
    number = read_tile(sTile, q_ring, t)
    load_Q(sQ[None, None, 0], Q, qk, tidx)
    k_ring.wait_full(it)
    wgmma(qk, acc_S, Q, tSrK[None, None, None, 0], False)
    warpgroup.wait_group(0)  # the first tile's first S is there
    release(k_ring, it)
    while number >= 0:
        acc_O.fill(0.0)
        offset.fill(-Float32.inf)
        row_sum.fill(0.0)
        renew(acc_S, acc_O, offset, row_sum)
        exponentials(acc_S, offset, row_sum)
        convert(as_operand_A(acc_S), P)
        if t > 0:
            wait_for_store()
            release(q_ring, t - 1)  # O has left the slot: the next Q may come
        for _ in cutlass.range(1, blocks, unroll=1):
            k_ring.wait_full(it + 1)
            my_turn(wg)
            wgmma(qk, acc_S, Q, tSrK[None, None, None, k_ring.slot(it + 1)], False)
            v_ring.wait_full(it)
            wgmma(pv, acc_O, P, tOrV[None, None, None, v_ring.slot(it)], True)
            next_turn(wg)
            warpgroup.wait_group(1)  # S is there; P·V runs on
            sums.fill(0.0)
            exponentials(acc_S, offset, sums)
            # The WG must agree: it can only compute S again as a whole.
            steady = all_true(cute.arch.fmax(sums[0], sums[1], nan=True) < LIMIT, VOTE + wg)
            warpgroup.wait_group(0)  # O may be rescaled, P overwritten
            if not steady:
                wgmma(qk, acc_S, Q, tSrK[None, None, None, k_ring.slot(it + 1)], False)
                warpgroup.wait_group(0)  # S is there once more
                sums.fill(0.0)
                renew(acc_S, acc_O, offset, row_sum)
                exponentials(acc_S, offset, sums)
            release(k_ring, it + 1)  # not earlier: S may be needed once more
            release(v_ring, it)
            for r in cutlass.range_constexpr(2):
                row_sum[r] = row_sum[r] + sums[r]
            convert(as_operand_A(acc_S), P)
            it += 1
        number_next = read_tile(sTile, q_ring, t + 1)
        load_Q(sQ[None, None, q_ring.slot(t + 1)], Q, qk, tidx)
        if number_next >= 0:
            k_ring.wait_full(it + 1)
        v_ring.wait_full(it)
        my_turn(wg)
        wgmma(qk, acc_S, Q, tSrK[None, None, None, k_ring.slot(it + 1)], False)  # after the last tile: unused
        wgmma(pv, acc_O, P, tOrV[None, None, None, v_ring.slot(it)], True)
        next_turn(wg)
        warpgroup.wait_group(0)  # O is complete, and the next tile's first S there
        release(k_ring, it + 1)
        release(v_ring, it)
        place = coords(number, o.tensor.shape[0] // TILE_M, o.tensor.shape[2])
        store_tma(normalise(acc_O, row_sum), sQ[None, None, q_ring.slot(t)], o, pv, tidx, *place)
        t, it, number = t + 1, it + 1, number_next
    wait_for_store()  # else shared memory would be gone before O has left it


@cute.jit
def load_Q(sQ: cute.Tensor, Q: cute.Tensor, qk: cute.TiledMma, tidx):
    """This warp's rows of Q, from shared memory to registers."""
    atom = cute.make_copy_atom(warp.LdMatrix8x8x16bOp(False, 4), BFloat16)
    thr_load = cute.make_tiled_copy_A(atom, qk).get_slice(tidx)
    cute.copy(atom, thr_load.partition_S(sQ), thr_load.retile(Q))


@cute.jit
def my_turn(wg):
    """Wait until the other WG has issued its products. Protects no data; both take equally many turns."""
    cute.arch.barrier(barrier_id=TURN + wg, number_of_threads=256)  # 128 that wait, 128 that arrive


@cute.jit
def next_turn(wg):
    """Let the other WG issue its products. The arrival of the last turn is left over."""
    cute.arch.barrier_arrive(barrier_id=TURN + 1 - wg, number_of_threads=256)


@cute.jit
def exponentials(acc_S: cute.Tensor, offset: cute.Tensor, sums: cute.Tensor):
    """acc_S <- P, with the offsets as they are; sums (of this thread's columns) grow by P."""
    S = rows_cols(acc_S)
    for r in cutlass.range_constexpr(cute.size(offset)):
        for c in cutlass.range_constexpr(cute.size(S, mode=[1])):
            S[r, c] = cute.math.exp2(S[r, c] * SCALE_LOG2 - offset[r], fastmath=True)
        even, odd = sums[r] + S[r, 0], S[r, 1]
        for c in cutlass.range_constexpr(2, cute.size(S, mode=[1]), 2):
            even, odd = even + S[r, c], odd + S[r, c + 1]
        sums[r] = even + odd


@cute.jit
def renew(acc_S: cute.Tensor, acc_O: cute.Tensor, offset: cute.Tensor, row_sum: cute.Tensor):
    """The offset becomes the maximum so far; O and the sum are rescaled."""
    S, O = rows_cols(acc_S), rows_cols(acc_O)
    for r in cutlass.range_constexpr(cute.size(offset)):
        block_max = S[r, None].load().reduce(cute.ReductionOp.MAX, -Float32.inf, 0)
        block_max = cute.arch.warp_reduction_max(block_max, threads_in_group=4)  # of the quad: the whole row
        new = cute.arch.fmax(offset[r], block_max * SCALE_LOG2)
        alpha = cute.math.exp2(offset[r] - new, fastmath=True)
        O[r, None].store(O[r, None].load() * alpha)
        row_sum[r] = row_sum[r] * alpha
        offset[r] = new


if __name__ == "__main__":
    import run

    run.main(["--step", "12"])
