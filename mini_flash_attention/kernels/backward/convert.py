"""Backward pass, last kernel: dQ = scale * dq_acc, in the dtype of q."""

import cutlass
import cutlass.cute as cute
from cutlass import Float32, const_expr

from mini_flash_attention.kernels.backward.schedule import query_block
from mini_flash_attention.kernels.calls import Ragged
from mini_flash_attention.kernels.parts.fragments import convert

THREADS = 256


def offset(config, row, chunk):
    """Where a tile of dq_acc keeps columns 8 * chunk to 8 * chunk + 7 of a row; also on plain integers.

    The tile is stored piece by piece, each as rows and columns. Swizzled, the chunks of a row are exchanged
    such that the threads of a warp, which store one chunk of neighbouring rows at a time, do so in different
    banks of shared memory: of four rows, or where they hold dQ transposed, of every other of eight.
    """
    rows, chunks = config.dq_piece[0], config.dq_piece[1] // 8
    piece = row // rows + chunk // chunks  # pieces divide the rows or the columns, not both
    chunk = chunk % chunks
    if config.dq_swizzled:
        chunk = chunk ^ (row // 2 % 4 if config.dq_transposed else row % 4)
    return 8 * ((piece * rows + row % rows) * chunks + chunk)


@cute.kernel
def kernel(
    config: cutlass.Constexpr, mdQacc: cute.Tensor, mdQ: cute.Tensor, ragged: Ragged | None, scale: Float32
):
    """A thread block for each query block; a thread converts 8 neighbouring values at a time.

    Rows of packed queries that belong to no sequence are blocks as well: nothing was added to their zeros.
    """
    block, _, _ = cute.arch.block_idx()
    tidx, _, _ = cute.arch.thread_idx()
    m_blocks, heads = mdQacc.shape[2], mdQacc.shape[1]
    m_block, head, batch = block % m_blocks, block // m_blocks % heads, block // (m_blocks * heads)
    first, left = query_block(config, ragged, mdQ.shape[1], m_block)
    acc, gdQ = mdQacc[batch, head, m_block, None], mdQ[batch, None, head, None]  # (tile_m * d), (sq, D)
    if const_expr(config.pdl):
        cute.arch.griddepcontrol_wait()  # the main kernel is done: dq_acc is complete
    chunks = config.head_dim // 8
    for i in cutlass.range_constexpr(config.tile_m * chunks // THREADS):
        r, chunk = (i * THREADS + tidx) // chunks, (i * THREADS + tidx) % chunks
        if r < left and 8 * chunk < gdQ.shape[1]:
            rdQ = cute.make_rmem_tensor(8, Float32)
            cute.autovec_copy(cute.local_tile(acc, (8,), (offset(config, r, chunk) // 8,)), rdQ)
            rdQ.store(rdQ.load() * scale)
            out = cute.make_rmem_tensor(8, mdQ.element_type)
            convert(rdQ, out)
            cute.autovec_copy(out, cute.local_tile(gdQ[first + r, None], (8,), (chunk,)))


kernel.set_name_prefix("mfa_bwd_convert", remove_cutlass_symbol=True)


@cute.jit
def launch(
    config: cutlass.Constexpr,
    mdQacc: cute.Tensor,
    mdQ: cute.Tensor,
    ragged: Ragged | None,
    scale: Float32,
    stream,
):
    batch, heads, m_blocks = mdQacc.shape[0], mdQacc.shape[1], mdQacc.shape[2]
    kernel(config, mdQacc, mdQ, ragged, scale).launch(
        grid=(m_blocks * heads * batch, 1, 1), block=(THREADS, 1, 1), stream=stream, use_pdl=config.pdl
    )
