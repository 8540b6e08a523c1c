"""Step 9: turns. The warpgroups issue their products in turns, so that their softmaxes alternate too.

Left to themselves both WGs may wait for the tensor cores, and then both compute exponentials. A named
barrier for each WG says whose turn it is: the products of one run under the softmax of the other. q, k, v,
o: (batch, seqlen, heads, 128) bfloat16, lengths multiples of 128.
"""

import cutlass
import cutlass.cute as cute
from cutlass import BFloat16, Float32, Int32
from cutlass.cute.nvgpu import cpasync, warpgroup
from cutlass.memory import SmemAllocator
from helpers import (
    SCALE_LOG2,
    D,
    Tma,
    allocate,
    as_operand_A,
    convert,
    init_rings,
    load,
    make_ring,
    make_tma,
    make_wgmma,
    release,
    rows_cols,
    store,
    tile_layout,
    transposed,
    wgmma,
)

ARCH = "sm_90a"
WGS = 2  # consumer warpgroups; one more WG holds the producer warp
THREADS = 128 * (1 + WGS)
TILE_M = 64 * WGS  # query rows of a thread block: 64 for each WG that computes
TILE_N = 128  # keys of a block
TURN = 1  # named barrier TURN + wg: this WG may issue its products
STAGES = 2  # slots of shared memory for K, and for V
SHARED_MEMORY = 2 * D * (TILE_M + 2 * STAGES * TILE_N)  # bytes; the mbarriers come on top


@cute.jit
def launch(mQ: cute.Tensor, mK: cute.Tensor, mV: cute.Tensor, mO: cute.Tensor, stream):
    """One thread block for each tile of TILE_M queries, each head, each batch."""
    op = cpasync.CopyBulkTensorTileG2SOp()
    q = make_tma(op, mQ, tile_layout(TILE_M), TILE_M)
    k, v = (make_tma(op, mX, tile_layout(TILE_N), TILE_N) for mX in (mK, mV))
    qk, pv = make_wgmma(WGS, TILE_N, False, False), make_wgmma(WGS, D, True, True)
    grid = (cute.ceil_div(mQ.shape[1], TILE_M), mQ.shape[2], mQ.shape[0])
    kernel(q, k, v, mO, qk, pv).launch(grid=grid, block=(THREADS, 1, 1), min_blocks_per_mp=1, stream=stream)


@cute.kernel
def kernel(q: Tma, k: Tma, v: Tma, mO: cute.Tensor, qk: cute.TiledMma, pv: cute.TiledMma):
    tile = cute.arch.block_idx()  # (m_block, head, batch)
    warp_idx = cute.arch.make_warp_uniform(cute.arch.warp_idx())
    smem = SmemAllocator()
    sQ = allocate(smem, tile_layout(TILE_M))  # (tile_m, d, 1)
    sK = allocate(smem, tile_layout(TILE_N, STAGES))  # (tile_n, d, stages)
    sV = allocate(smem, tile_layout(TILE_N, STAGES))  # (tile_n, d, stages)
    rings = tuple(make_ring(smem, stages) for stages in (1, STAGES, STAGES))  # of Q, K, V
    if warp_idx == 0:
        with cute.arch.elect_one():
            init_rings(rings, 4 * WGS)
    cute.arch.barrier()  # the mbarriers are there
    blocks = cute.ceil_div(k.tensor.shape[0], TILE_N)
    if warp_idx < 4:
        cute.arch.setmaxregister_decrease(24)  # registers are handed out by WG: the consumers need them
        if warp_idx == 0:
            produce(q, k, v, sQ, sK, sV, rings, tile, blocks)
    else:
        cute.arch.setmaxregister_increase(240)
        consume(mO, qk, pv, sQ, sK, sV, rings, tile, blocks)


@cute.jit
def produce(q: Tma, k: Tma, v: Tma, sQ, sK, sV, rings, tile, blocks):
    """The producer warp."""
    (m_block, head, batch), (q_ring, k_ring, v_ring) = tile, rings
    load(q, m_block, head, batch, sQ, q_ring, Int32(0))
    for n in cutlass.range(blocks, unroll=1):
        load(k, n, head, batch, sK, k_ring, n)
        load(v, n, head, batch, sV, v_ring, n)


@cute.jit
def consume(mO: cute.Tensor, qk: cute.TiledMma, pv: cute.TiledMma, sQ, sK, sV, rings, tile, blocks):
    """A consumer warp."""
    (m_block, head, batch), (q_ring, k_ring, v_ring) = tile, rings
    tidx = cute.arch.thread_idx()[0] - 128
    wg = cute.arch.make_warp_uniform(tidx // 128)
    wg_qk, wg_pv = qk.get_slice(wg * 128), pv.get_slice(wg * 128)
    tSrQ = wg_qk.make_fragment_A(wg_qk.partition_A(sQ))  # descriptors: where the operands lie
    tSrK = wg_qk.make_fragment_B(wg_qk.partition_B(sK))
    tOrV = wg_pv.make_fragment_B(wg_pv.partition_B(transposed(sV)))
    acc_S = cute.make_rmem_tensor(wg_qk.partition_shape_C((TILE_M, TILE_N)), Float32)
    acc_O = cute.make_rmem_tensor(wg_pv.partition_shape_C((TILE_M, D)), Float32)
    acc_O.fill(0.0)
    row_max, row_sum = cute.make_rmem_tensor(2, Float32), cute.make_rmem_tensor(2, Float32)
    row_max.fill(-Float32.inf)
    row_sum.fill(0.0)
    alpha = cute.make_rmem_tensor(2, Float32)
    P = cute.make_rmem_tensor(as_operand_A(acc_S).shape, BFloat16)
    if wg == 1:
        next_turn(wg)  # WG 0 begins
    Q = tSrQ[None, None, None, 0]
    it = Int32(0)  # counts key blocks: the uses of the rings
    q_ring.wait_full(Int32(0))
    k_ring.wait_full(it)
    wgmma(qk, acc_S, Q, tSrK[None, None, None, k_ring.slot(it)], False)
    warpgroup.wait_group(0)  # S is there
    release(k_ring, it)
    softmax(acc_S, row_max, row_sum, alpha)
    convert(as_operand_A(acc_S), P)
    for _ in cutlass.range(1, blocks, unroll=1):
        k_ring.wait_full(it + 1)
        my_turn(wg)
        wgmma(qk, acc_S, Q, tSrK[None, None, None, k_ring.slot(it + 1)], False)
        v_ring.wait_full(it)
        wgmma(pv, acc_O, P, tOrV[None, None, None, v_ring.slot(it)], True)
        next_turn(wg)
        warpgroup.wait_group(1)  # S is there; P·V runs on
        release(k_ring, it + 1)
        softmax(acc_S, row_max, row_sum, alpha)
        warpgroup.wait_group(0)  # O may be rescaled, P overwritten
        release(v_ring, it)
        rescale(acc_O, alpha)
        convert(as_operand_A(acc_S), P)
        it += 1
    v_ring.wait_full(it)
    my_turn(wg)
    wgmma(pv, acc_O, P, tOrV[None, None, None, v_ring.slot(it)], True)
    next_turn(wg)
    warpgroup.wait_group(0)  # O is complete
    gO = cute.local_tile(mO[batch, None, head, None], (TILE_M, D), (m_block, 0))  # (tile_m, d)
    store(acc_O, row_sum, pv.get_slice(tidx).partition_C(gO))


@cute.jit
def my_turn(wg):
    """Wait until the other WG has issued its products. Protects no data; both take equally many turns."""
    cute.arch.barrier(barrier_id=TURN + wg, number_of_threads=256)  # 128 that wait, 128 that arrive


@cute.jit
def next_turn(wg):
    """Let the other WG issue its products. The arrival of the last turn is left over."""
    cute.arch.barrier_arrive(barrier_id=TURN + 1 - wg, number_of_threads=256)


@cute.jit
def softmax(acc_S: cute.Tensor, row_max: cute.Tensor, row_sum: cute.Tensor, alpha: cute.Tensor):
    """The online softmax: acc_S <- P; maximum and sum follow. O is to be multiplied by alpha."""
    S = rows_cols(acc_S)
    for r in cutlass.range_constexpr(cute.size(row_max)):
        s = S[r, None].load()
        block_max = s.reduce(cute.ReductionOp.MAX, row_max[r], 0)
        new_max = cute.arch.warp_reduction_max(block_max, threads_in_group=4)  # of the quad: the whole row
        alpha[r] = cute.math.exp2((row_max[r] - new_max) * SCALE_LOG2, fastmath=True)
        p = cute.math.exp2(s * SCALE_LOG2 - new_max * SCALE_LOG2, fastmath=True)
        S[r, None].store(p)
        row_max[r] = new_max
        row_sum[r] = row_sum[r] * alpha[r] + p.reduce(cute.ReductionOp.ADD, Float32(0.0), 0)


@cute.jit
def rescale(acc_O: cute.Tensor, alpha: cute.Tensor):
    O = rows_cols(acc_O)
    for r in cutlass.range_constexpr(cute.size(alpha)):
        O[r, None].store(O[r, None].load() * alpha[r])


if __name__ == "__main__":
    import run

    run.main(["--step", "9"])
