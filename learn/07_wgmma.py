"""Step 7: Hopper. The TMA unit copies whole tiles, wgmma reads them from shared memory: one warpgroup (WG).

Four warps issue a product together; it runs by itself, reads K and V where TMA has put them, and is waited
for like a copy. One thread asks for a copy. Each buffer has two mbarriers: `full` completes when its bytes
have arrived, `empty` when every warp has released it. q, k, v, o: (batch, seqlen, heads, 128) bfloat16,
lengths multiples of 128.
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
WGS = 1
THREADS = 128 * WGS
TILE_M = 64 * WGS  # query rows of a thread block: 64 for each WG that computes
TILE_N = 128  # keys of a block
STAGES = 1  # slots of shared memory for K, and for V
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
    m_block, head, batch = cute.arch.block_idx()
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
    q_ring, k_ring, v_ring = rings
    if warp_idx == 0:
        load(q, m_block, head, batch, sQ, q_ring, Int32(0))
        load(k, 0, head, batch, sK, k_ring, Int32(0))
        load(v, 0, head, batch, sV, v_ring, Int32(0))
    wg_qk, wg_pv = qk.get_slice(0), pv.get_slice(0)
    tSrQ = wg_qk.make_fragment_A(wg_qk.partition_A(sQ))  # descriptors: where the operands lie
    tSrK = wg_qk.make_fragment_B(wg_qk.partition_B(sK))
    tOrV = wg_pv.make_fragment_B(wg_pv.partition_B(transposed(sV)))
    acc_S = cute.make_rmem_tensor(wg_qk.partition_shape_C((TILE_M, TILE_N)), Float32)
    acc_O = cute.make_rmem_tensor(wg_pv.partition_shape_C((TILE_M, D)), Float32)
    acc_O.fill(0.0)
    row_max, row_sum = cute.make_rmem_tensor(2, Float32), cute.make_rmem_tensor(2, Float32)
    row_max.fill(-Float32.inf)
    row_sum.fill(0.0)
    P = cute.make_rmem_tensor(as_operand_A(acc_S).shape, BFloat16)
    Q = tSrQ[None, None, None, 0]
    q_ring.wait_full(Int32(0))
    for n in cutlass.range(blocks, unroll=1):
        k_ring.wait_full(n)
        wgmma(qk, acc_S, Q, tSrK[None, None, None, n % STAGES], False)
        warpgroup.wait_group(0)  # S is there
        release(k_ring, n)
        if warp_idx == 0 and n + 1 < blocks:
            load(k, n + 1, head, batch, sK, k_ring, n + 1)
        softmax(acc_S, acc_O, row_max, row_sum)
        convert(as_operand_A(acc_S), P)
        v_ring.wait_full(n)
        wgmma(pv, acc_O, P, tOrV[None, None, None, n % STAGES], True)
        warpgroup.wait_group(0)  # O may be rescaled, P overwritten
        release(v_ring, n)
        if warp_idx == 0 and n + 1 < blocks:
            load(v, n + 1, head, batch, sV, v_ring, n + 1)
    gO = cute.local_tile(mO[batch, None, head, None], (TILE_M, D), (m_block, 0))  # (tile_m, d)
    store(acc_O, row_sum, pv.get_slice(cute.arch.thread_idx()[0]).partition_C(gO))


@cute.jit
def softmax(acc_S: cute.Tensor, acc_O: cute.Tensor, row_max: cute.Tensor, row_sum: cute.Tensor):
    """The online softmax: acc_S <- P; the maximum, O and the sum (of this thread's columns) follow."""
    S, O = rows_cols(acc_S), rows_cols(acc_O)
    for r in cutlass.range_constexpr(cute.size(row_max)):
        s = S[r, None].load()
        block_max = s.reduce(cute.ReductionOp.MAX, row_max[r], 0)
        new_max = cute.arch.warp_reduction_max(block_max, threads_in_group=4)  # of the quad: the whole row
        alpha = cute.math.exp2((row_max[r] - new_max) * SCALE_LOG2, fastmath=True)
        p = cute.math.exp2(s * SCALE_LOG2 - new_max * SCALE_LOG2, fastmath=True)
        S[r, None].store(p)
        O[r, None].store(O[r, None].load() * alpha)
        row_max[r] = new_max
        row_sum[r] = row_sum[r] * alpha + p.reduce(cute.ReductionOp.ADD, Float32(0.0), 0)


if __name__ == "__main__":
    import run

    run.main(["--step", "7"])
