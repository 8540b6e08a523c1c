"""dQ of sm80.py: all warps add dS·K to dq_acc, and at the end a kernel rounds it.

A tile of dq_acc has the order of the accumulators, thread after thread: a warp adds 128 adjacent bytes at a
time, or 512.
"""

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, const_expr

from mini_flash_attention.kernels.backward import shared_keys
from mini_flash_attention.kernels.backward.schedule import find_query_block, turn
from mini_flash_attention.kernels.backward.sm80_records import Place, Work
from mini_flash_attention.kernels.calls import Backward
from mini_flash_attention.kernels.parts.fragments import convert, quad_transpose, rows_cols, transposed
from mini_flash_attention.kernels.parts.scores import gradient_scale
from mini_flash_attention.kernels.parts.seqlen import Sizes
from mini_flash_attention.kernels.parts.sm80 import add_to_global, gemm, opaque, operand_A, operand_B


@cute.jit
def add_dQ(config: cutlass.Constexpr, w: Work, x: Place, slot: Int32):
    """dq_acc += dS·K of the query block before x, if there is one; slot: its dS."""
    block = w.smem.find_block()
    start = opaque(x.m_block) == block.first
    left = opaque(x.left) + 1 if start else x.left
    m_block = block.last - 1 if start else x.m_block - 1
    if left <= block.heads:
        add_dS_K(config, w, Place(left, m_block), slot)


@cute.jit
def add_dS_K(config: cutlass.Constexpr, w: Work, x: Place, slot: Int32):
    """dq_acc += dS·K of x, whose dS is complete since the last `arrive`."""
    head, m_block = x.head(w), x.m_block
    a = operand_A(w.setup.mma_dQ, transposed(w.smem.dS[None, None, slot]), transpose=True)
    b = operand_B(w.setup.mma_dQ, transposed(w.smem.KV[None, None, 0]), transpose=True)
    w.acc_dQ.fill(0.0)
    gemm(w.setup.mma_dQ, w.acc_dQ, a, b, w.tidx)
    if const_expr(config.deterministic):
        mine = config.warps * turn(config, w.sizes(), w.smem.find_block().n_block, m_block)
        done = Int32(-1)  # warps that have added to this tile
        while done < mine:  # acquire: all key blocks before have added theirs
            done = cute.arch.load(turn_counter(w, head, m_block), Int32, sem="acquire", scope="gpu")
    size = config.atomic_vector
    batch, number = w.smem.find_block().place(m_block)
    acc = w.call.mdQacc[batch, head, number, None].iterator + size * opaque(w.tidx)
    for i in cutlass.range_constexpr(0, cute.size(w.acc_dQ), size):
        values = [w.acc_dQ[i + j] for j in range(size)]
        add_to_global(acc + i * 32 * config.warps, values)
    if const_expr(config.deterministic):
        cute.arch.fence_acq_rel_gpu()  # each lane's additions come before the warp's turn is over
        cute.arch.sync_warp()  # all lanes have passed the fence
        if opaque(w.tidx) % 32 == 0:
            counter = turn_counter(w, head, m_block)
            cute.arch.atomic_add(counter, Int32(1), sem="relaxed", scope="gpu")


@cute.jit
def turn_counter(w: Work, head: Int32, m_block: Int32):
    """Where the warps that have added to a tile of dq_acc are counted."""
    batch, number = w.smem.find_block().place(opaque(m_block))
    turns = w.call.mTurns[batch, opaque(head), None]
    return cute.local_tile(turns, (1,), (number,)).iterator.llvm_ptr


@cute.kernel
def round_all(config: cutlass.Constexpr, call: Backward, sizes: Sizes, tiled_mma: cute.TiledMma):
    """A thread block for each query block, then for each of shared_keys."""
    batch, heads, m_blocks, _ = call.mdQacc.shape
    i = cute.arch.block_idx()[0] - m_blocks * heads * batch
    if i < 0:
        round_dQ(config, call, tiled_mma)
    else:
        if const_expr(config.pdl):
            cute.arch.griddepcontrol_wait()  # for the main kernel: dkv_acc is complete
        shared_keys.round_sums(config, call, sizes, i, 32 * config.warps)


round_all.set_name_prefix("mfa_bwd_convert", remove_cutlass_symbol=True)


@cute.jit
def round_dQ(config: cutlass.Constexpr, call: Backward, tiled_mma: cute.TiledMma):
    """dQ = scale * dq_acc; each thread reads what add_dQ's wrote.

    Rows of packed queries that belong to no sequence are blocks as well: nothing was added to their zeros.
    """
    tidx, _, _ = cute.arch.thread_idx()
    batch, head, number, first, left = find_query_block(config, call)
    if const_expr(config.pdl):
        cute.arch.griddepcontrol_wait()  # for the main kernel: dq_acc is complete
    thr_mma = tiled_mma.get_slice(tidx)
    tile = config.tile_m, config.head_dim
    acc = cute.make_rmem_tensor(thr_mma.partition_shape_C(tile), Float32)
    size = config.atomic_vector
    start = call.mdQacc[batch, head, number, None].iterator + size * tidx
    layout = cute.make_layout((size, cute.size(acc) // size), stride=(1, 32 * config.warps * size))
    flat = cute.make_tensor(acc.iterator, cute.make_layout(layout.shape))
    cute.autovec_copy(cute.make_tensor(start, layout), flat)
    for i in cutlass.range_constexpr(cute.size(acc)):
        acc[i] = acc[i] * gradient_scale(config, call.score)
    gdQ = call.mdQ[batch, None, head, None]  # (sq, D)
    dQ = cute.make_rmem_tensor(acc.shape, gdQ.element_type)
    convert(acc, dQ)
    rc = rows_cols(thr_mma.partition_C(cute.make_identity_tensor(tile)))
    words = rows_cols(cute.recast_tensor(dQ, Int32))  # (rows, columns / 2)
    out, q = cute.make_rmem_tensor(4, Int32), tidx % 4
    # A quad has 2 rows of 2 times 8 columns: after a transpose, each of its threads has 8 of one row.
    for r in cutlass.range_constexpr(0, cute.size(words, mode=[0]), 2):
        for c in cutlass.range_constexpr(0, cute.size(words, mode=[1]), 2):
            for i in cutlass.range_constexpr(4):
                out[i] = words[r + i // 2, c + i % 2]
            quad_transpose(out, q)
            row = first + (rc[r, 0][0] if q < 2 else rc[r + 1, 0][0])
            column = (rc[0, 2 * c][1] if q % 2 == 0 else rc[0, 2 * c + 2][1]) // 8
            if row < first + left and 8 * column < gdQ.shape[1]:
                values = cute.recast_tensor(out, dQ.element_type)
                cute.autovec_copy(values, cute.local_tile(gdQ[row, None], (8,), (column,)))
