"""Step 4: tensor cores. Four warps compute S = Q·Kᵀ and O += P·V with mma.sync, 16 rows of O each.

A thread holds a piece of S (acc_S), of P, and of O (acc_O), in the layout that the tensor core dictates: 4
threads share a row, so its maximum takes two shuffles. P goes from the first product's result straight into
the second's operand, in registers. q, k, v, o: (batch, seqlen, heads, 128) bfloat16, lengths multiples of
128.
"""

import cutlass
import cutlass.cute as cute
from cutlass import BFloat16, Float32
from cutlass.cute.nvgpu import warp
from cutlass.memory import SmemAllocator
from helpers import SCALE_LOG2, D, as_operand_A, convert, rows_cols, store, transposed

ARCH = "sm_80"
WARPS, THREADS = 4, 128
TILE_M = 64  # query rows of a thread block: 16 for each warp
TILE_N = 64  # keys of a block
SHARED_MEMORY = 2 * D * 2 * TILE_N  # bytes: a block of K and one of V


@cute.jit
def launch(mQ: cute.Tensor, mK: cute.Tensor, mV: cute.Tensor, mO: cute.Tensor, stream):
    """One thread block for each tile of TILE_M queries, each head, each batch."""
    grid = (cute.ceil_div(mQ.shape[1], TILE_M), mQ.shape[2], mQ.shape[0])
    kernel(mQ, mK, mV, mO).launch(grid=grid, block=(THREADS, 1, 1), stream=stream)


@cute.kernel
def kernel(mQ: cute.Tensor, mK: cute.Tensor, mV: cute.Tensor, mO: cute.Tensor):
    m_block, head, batch = cute.arch.block_idx()
    tidx, _, _ = cute.arch.thread_idx()
    gQ = cute.local_tile(mQ[batch, None, head, None], (TILE_M, D), (m_block, 0))  # (tile_m, d)
    gK = cute.local_tile(mK[batch, None, head, None], (TILE_N, D), (None, 0))  # (tile_n, d, blocks)
    gV = cute.local_tile(mV[batch, None, head, None], (TILE_N, D), (None, 0))  # (tile_n, d, blocks)
    gO = cute.local_tile(mO[batch, None, head, None], (TILE_M, D), (m_block, 0))  # (tile_m, d)
    smem = SmemAllocator()
    tile = cute.make_layout((TILE_N, D), stride=(D, 1))
    sK = smem.allocate_tensor(BFloat16, tile, 16)
    sV = smem.allocate_tensor(BFloat16, tile, 16)
    op = warp.MmaF16BF16Op(BFloat16, Float32, (16, 8, 16))  # one instruction: 16 rows, 8 columns, 16 deep
    tiled_mma = cute.make_tiled_mma(op, (WARPS, 1, 1), permutation_mnk=(TILE_M, 16, 16))
    thr_mma = tiled_mma.get_slice(tidx)
    q = thr_mma.make_fragment_A(thr_mma.partition_A(gQ))  # (MMA, M, K)
    cute.autovec_copy(thr_mma.partition_A(gQ), q)
    acc_S = cute.make_rmem_tensor(thr_mma.partition_shape_C((TILE_M, TILE_N)), Float32)
    acc_O = cute.make_rmem_tensor(thr_mma.partition_shape_C((TILE_M, D)), Float32)
    acc_O.fill(0.0)
    row_max, row_sum = cute.make_rmem_tensor(2, Float32), cute.make_rmem_tensor(2, Float32)
    row_max.fill(-Float32.inf)
    row_sum.fill(0.0)
    P = cute.make_rmem_tensor(as_operand_A(acc_S).shape, BFloat16)
    for n in cutlass.range(cute.size(gK, mode=[2]), unroll=1):
        cute.arch.barrier()  # all threads have read the block before: it may be overwritten
        load(gK[None, None, n], sK, tidx)
        load(gV[None, None, n], sV, tidx)
        cute.arch.barrier()  # all threads' parts of the block are there
        acc_S.fill(0.0)
        gemm(tiled_mma, acc_S, q, thr_mma.partition_B(sK))
        softmax(acc_S, acc_O, row_max, row_sum)
        convert(as_operand_A(acc_S), P)
        gemm(tiled_mma, acc_O, P, thr_mma.partition_B(transposed(sV)))
    store(acc_O, row_sum, thr_mma.partition_C(gO))


@cute.jit
def load(gX: cute.Tensor, sX: cute.Tensor, tidx):
    """Copy a block (tile_n, d): 16 bytes for each thread at a time, 16 neighbours to a row."""
    atom = cute.make_copy_atom(cute.nvgpu.CopyUniversalOp(), BFloat16, num_bits_per_copy=128)
    threads = cute.make_layout((THREADS // 16, 16), stride=(16, 1))
    thr_copy = cute.make_tiled_copy_tv(atom, threads, cute.make_layout((1, 8))).get_slice(tidx)
    cute.copy(atom, thr_copy.partition_S(gX), thr_copy.partition_D(sX))


@cute.jit
def gemm(tiled_mma: cute.TiledMma, acc: cute.Tensor, a: cute.Tensor, sB: cute.Tensor):
    """acc += A·B in slices of 16; sB: this thread's part of B in shared memory, (MMA, N, K)."""
    b = tiled_mma.make_fragment_B(sB[None, None, 0])
    for k in cutlass.range_constexpr(cute.size(a, mode=[2])):
        b.store(sB[None, None, k].load())
        cute.gemm(tiled_mma, acc, a[None, None, k], b, acc)


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

    run.main(["--step", "4"])
