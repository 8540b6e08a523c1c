"""Step 3: the same in CuTe. One thread computes one row of O, key by key.

A thread block has 128 threads and 128 query rows of one head. It copies a block of K and one of V to shared
memory, where all its threads read them; a thread keeps its rows of Q and O, its maximum and its sum in
registers. q, k, v, o: (batch, seqlen, heads, 128) bfloat16, lengths multiples of 128.
"""

import cutlass
import cutlass.cute as cute
from cutlass import BFloat16, Float32
from cutlass.memory import SmemAllocator
from helpers import SCALE_LOG2, D, opaque_copy

ARCH = "sm_80"
THREADS = TILE_M = 128  # query rows of a thread block: one for each thread
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
    q = cute.make_rmem_tensor(D, BFloat16)
    cute.autovec_copy(gQ[tidx, None], q)
    O = cute.make_rmem_tensor(D, Float32)
    O.fill(0.0)
    row_max, row_sum = -Float32.inf, Float32(0.0)
    for n in cutlass.range(cute.size(gK, mode=[2]), unroll=1):
        cute.arch.barrier()  # all threads have read the block before: it may be overwritten
        load(gK[None, None, n], sK, tidx)
        load(gV[None, None, n], sV, tidx)
        cute.arch.barrier()  # all threads' parts of the block are there
        for j in cutlass.range(TILE_N, unroll=1):
            row_max, row_sum = attend(q, sK[j, None], sV[j, None], O, row_max, row_sum)
    out = cute.make_rmem_tensor(D, BFloat16)
    out.store((O.load() * (1.0 / row_sum)).to(BFloat16))
    cute.autovec_copy(out, gO[tidx, None])


@cute.jit
def load(gX: cute.Tensor, sX: cute.Tensor, tidx):
    """Copy a block (tile_n, d): 16 bytes for each thread at a time, 16 neighbours to a row."""
    atom = cute.make_copy_atom(cute.nvgpu.CopyUniversalOp(), BFloat16, num_bits_per_copy=128)
    threads = cute.make_layout((THREADS // 16, 16), stride=(16, 1))
    thr_copy = cute.make_tiled_copy_tv(atom, threads, cute.make_layout((1, 8))).get_slice(tidx)
    cute.copy(atom, thr_copy.partition_S(gX), thr_copy.partition_D(sX))


@cute.jit
def attend(q: cute.Tensor, k: cute.Tensor, v: cute.Tensor, O: cute.Tensor, row_max, row_sum):
    """One key: s = q·k, the online softmax, O += p * v. Returns the new maximum and sum."""
    sums = cute.make_rmem_tensor(8, Float32)  # 8 chains: an addition need not wait for the one before
    sums.fill(0.0)
    for i in cutlass.range_constexpr(D // 8):
        q8 = opaque_copy(chunk(q, i))  # else Q would be kept as float32: 128 registers, not 64
        sums.store(sums.load() + q8.load().to(Float32) * chunk(k, i).load().to(Float32))
    s = sums.load().reduce(cute.ReductionOp.ADD, Float32(0.0), 0) * SCALE_LOG2
    new_max = cute.arch.fmax(row_max, s)
    alpha = cute.math.exp2(row_max - new_max, fastmath=True)
    p = cute.math.exp2(s - new_max, fastmath=True)
    for i in cutlass.range_constexpr(D // 8):
        o = chunk(O, i)
        o.store(o.load() * alpha + chunk(v, i).load().to(Float32) * p)
    return new_max, row_sum * alpha + p


def chunk(x: cute.Tensor, i: int) -> cute.Tensor:
    """Elements 8 * i to 8 * i + 7 of a row: 16 bytes of bfloat16."""
    return cute.local_tile(x, (8,), (i,))


if __name__ == "__main__":
    import run

    run.main(["--step", "3"])
