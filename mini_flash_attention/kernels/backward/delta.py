"""Backward pass, first kernel: what the main kernel must know of each row, and zeros for it to add to.

  stats (B, Hq, m_blocks, 2, tile_m) float32    -LSE in the units of P's exponent (seed_factor), then -delta
  dq_acc (B, Hq, m_blocks, tile_m * d) float32  zeros
  turns (B, Hq, m_blocks) int32                 zeros; (1, 1, 1) unless config.deterministic
  dkv_acc, key_turns                            zeros: shared_keys.py

delta = rowsum(dO * O) - dLSE: dS = P * (dP - delta) is the softmax's gradient, with that of its LSE, whose
derivative is P too. A row without keys, and one beyond the last, gets (-inf, 0), so that its P is 0.
Ragged batches: B is 1, and the query blocks are numbered as in blocks.first_block.
"""

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, const_expr

from mini_flash_attention.kernels.backward import shared_keys
from mini_flash_attention.kernels.backward.schedule import find_query_block
from mini_flash_attention.kernels.calls import Backward
from mini_flash_attention.kernels.parts.numbers import LOG2_E

THREADS = 256


@cute.jit
def launch(call: Backward, config: cutlass.Constexpr, stream):
    batch, heads, m_blocks, _ = call.mdQacc.shape
    seed_factor = Float32(LOG2_E)
    if const_expr(not config.score):  # a seed of Q·Kᵀ, before the softmax scale
        seed_factor = Float32(1.0) / call.score.scale  # here: a division in a kernel is a call
    grid = m_blocks * heads * batch + shared_keys.num_blocks(call)
    kernel(config, call, seed_factor).launch(grid=(grid, 1, 1), block=(THREADS, 1, 1), stream=stream)


@cute.kernel
def kernel(config: cutlass.Constexpr, call: Backward, seed_factor: Float32):
    """A thread block for each query block, then for each of shared_keys."""
    if const_expr(config.pdl):
        cute.arch.griddepcontrol_launch_dependents()  # the main kernel may start: it waits for this one
    batch, heads, m_blocks, _ = call.mdQacc.shape
    i = cute.arch.block_idx()[0] - m_blocks * heads * batch
    if i < 0:
        prepare_rows(config, call, seed_factor)
    else:
        shared_keys.clear(config, call, i, THREADS)


kernel.set_name_prefix("mfa_bwd_delta", remove_cutlass_symbol=True)


@cute.jit
def prepare_rows(config: cutlass.Constexpr, call: Backward, seed_factor: Float32):
    """A query block; a row is read by `lanes` neighbouring threads, 16 bytes each."""
    tidx, _, _ = cute.arch.thread_idx()
    batch, head, number, first, left = find_query_block(config, call)
    if const_expr(config.deterministic):
        if tidx == 0:
            call.mTurns[batch, head, number] = Int32(0)
    elif cute.arch.block_idx()[0] + tidx == 0:
        call.mTurns[0, 0, 0] = Int32(0)

    zeros = cute.make_rmem_tensor(4, Float32)
    zeros.fill(0.0)
    acc = call.mdQacc[batch, head, number, None]  # (tile_m * d)
    for i in cutlass.range_constexpr(config.tile_m * config.head_dim // (4 * THREADS)):
        cute.autovec_copy(zeros, cute.local_tile(acc, (4,), (i * THREADS + tidx,)))

    lanes = 1 << (config.head_dim // 8 - 1).bit_length()
    chunk = tidx % lanes  # of 8 columns
    gO, gdO = call.mO[batch, None, head, None], call.mdO[batch, None, head, None]  # (sq, D)
    for i in cutlass.range_constexpr(config.tile_m * lanes // THREADS):
        r = (i * THREADS + tidx) // lanes
        row = first + r
        delta, seed = Float32(0.0), -Float32.inf
        if r < left and 8 * chunk < gO.shape[1]:
            rO, rdO = (cute.make_rmem_tensor(8, gO.element_type) for _ in range(2))
            cute.autovec_copy(cute.local_tile(gO[row, None], (8,), (chunk,)), rO)
            cute.autovec_copy(cute.local_tile(gdO[row, None], (8,), (chunk,)), rdO)
            product = rO.load().to(Float32) * rdO.load().to(Float32)
            delta = product.reduce(cute.ReductionOp.ADD, Float32(0.0), 0)
        delta = cute.arch.warp_reduction_sum(delta, threads_in_group=lanes)
        if chunk == 0:
            if r < left:
                lse = call.mLSE[batch, head, row]
                if call.has_dlse != 0:
                    delta -= call.mdLSE[batch, head, row]
                if lse != -Float32.inf:
                    seed = -lse * seed_factor
            call.mStats[batch, head, number, 0, r] = seed
            call.mStats[batch, head, number, 1, r] = Float32(0.0) if seed == -Float32.inf else -delta
