"""Rows of packed queries behind the last sequence: they have a result too, zeros."""

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32

from mini_flash_attention.kernels.calls import CU_SEQLENS_Q, Decode, Forward
from mini_flash_attention.kernels.parts.seqlen import clamp


@cute.jit
def clear_rest(call: Forward | Decode, thread: Int32, threads: Int32):
    """O <- 0, LSE <- -inf; by `threads` threads, each with its number. Nothing if q is not packed."""
    ragged, rows = call.ragged, call.mQ.shape[1]
    if ragged.given & CU_SEQLENS_Q:
        end = clamp(ragged.cu_seqlens_q[ragged.batch], Int32(0), rows)
        _, _, heads, head_dim = call.mO.shape
        zeros, chunks = cute.make_rmem_tensor(8, call.mO.element_type), head_dim // 8
        zeros.fill(0.0)
        for i in cutlass.range(thread, (rows - end) * heads * chunks, threads, unroll=1):
            row, head, chunk = end + i // chunks // heads, i // chunks % heads, i % chunks
            cute.autovec_copy(zeros, cute.local_tile(call.mO[0, row, head, None], (8,), (chunk,)))
            if chunk == 0:
                call.mLSE[0, head, row] = -Float32.inf
