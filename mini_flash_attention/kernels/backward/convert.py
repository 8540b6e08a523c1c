"""Backward pass on Hopper, last kernel: rounds dQ = scale * dq_acc, and the sums of shared_keys.py."""

import cutlass
import cutlass.cute as cute
from cutlass import Float32

from mini_flash_attention.kernels.backward import shared_keys
from mini_flash_attention.kernels.backward.schedule import find_query_block
from mini_flash_attention.kernels.calls import Backward
from mini_flash_attention.kernels.parts.fragments import convert
from mini_flash_attention.kernels.parts.scores import gradient_scale
from mini_flash_attention.kernels.parts.seqlen import Sizes, sizes_of

THREADS = 256


@cute.jit
def launch(call: Backward, config: cutlass.Constexpr, stream):
    batch, heads, m_blocks, _ = call.mdQacc.shape
    grid = m_blocks * heads * batch + shared_keys.num_blocks(call)
    kernel(config, call, sizes_of(config, call)).launch(
        grid=(grid, 1, 1), block=(THREADS, 1, 1), stream=stream, use_pdl=config.pdl
    )


@cute.kernel
def kernel(config: cutlass.Constexpr, call: Backward, sizes: Sizes):
    """A thread block for each query block, then for each of shared_keys."""
    batch, heads, m_blocks, _ = call.mdQacc.shape
    i = cute.arch.block_idx()[0] - m_blocks * heads * batch
    if i < 0:
        round_dQ(config, call)
    else:
        cute.arch.griddepcontrol_wait()  # for the main kernel: dkv_acc is complete
        shared_keys.round_sums(config, call, sizes, i, THREADS)


kernel.set_name_prefix("mfa_bwd_convert", remove_cutlass_symbol=True)


@cute.jit
def round_dQ(config: cutlass.Constexpr, call: Backward):
    """A query block; a thread converts 8 neighbouring values at a time.

    Rows of packed queries that belong to no sequence are blocks as well: nothing was added to their zeros.
    """
    tidx, _, _ = cute.arch.thread_idx()
    batch, head, number, first, left = find_query_block(config, call)
    acc = call.mdQacc[batch, head, number, None]  # (tile_m * d)
    gdQ = call.mdQ[batch, None, head, None]  # (sq, D)
    cute.arch.griddepcontrol_wait()  # for the main kernel: dq_acc is complete
    chunks = config.head_dim // 8
    for i in cutlass.range_constexpr(config.tile_m * chunks // THREADS):
        r, chunk = (i * THREADS + tidx) // chunks, (i * THREADS + tidx) % chunks
        if r < left and 8 * chunk < gdQ.shape[1]:
            rdQ = cute.make_rmem_tensor(8, Float32)
            cute.autovec_copy(cute.local_tile(acc, (8,), (offset(config, r, chunk) // 8,)), rdQ)
            rdQ.store(rdQ.load() * gradient_scale(config, call.score))
            out = cute.make_rmem_tensor(8, gdQ.element_type)
            convert(rdQ, out)
            cute.autovec_copy(out, cute.local_tile(gdQ[first + r, None], (8,), (chunk,)))


def offset(config, row, chunk):
    """Where a tile of dq_acc keeps columns 8 * chunk to 8 * chunk + 7 of a row; also on plain integers.

    The tile is stored piece by piece, each as rows and columns. The chunks of a row are exchanged such that
    the threads of a warp, which store one chunk of neighbouring rows at a time, do so in different banks of
    shared memory: of four rows, or where they hold dQ transposed, of every other of eight.
    """
    rows, chunks = config.dq_piece[0], config.dq_piece[1] // 8
    piece = row // rows + chunk // chunks  # pieces divide the rows or the columns, not both
    chunk = chunk % chunks ^ (row // 2 % 4 if config.dq_transposed else row % 4)
    return 8 * ((piece * rows + row % rows) * chunks + chunk)
