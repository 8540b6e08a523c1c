"""dK and dV where thread blocks share the query heads of a group: sums in float32, rounded at the end.

Each thread block adds its part to mdKVacc (2, b, hk, n_blocks, tile_n * d), dK and dV. A block of it has the
order of the accumulators, so that a warp adds 512 adjacent bytes at a time and nothing goes through shared
memory: one 16 keys after another, of each one 8 columns after another, of these what each of 32 lanes holds,
two adjacent columns of a row and of the row 8 below.
"""

from typing import NamedTuple

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, const_expr

from mini_flash_attention.kernels.backward.schedule import Block, find_segment
from mini_flash_attention.kernels.calls import CU_SEQLENS_K, Backward
from mini_flash_attention.kernels.parts.fragments import convert
from mini_flash_attention.kernels.parts.seqlen import Sizes
from mini_flash_attention.kernels.parts.sm80 import add_to_global

DK, DV = 0, 1


def num_blocks(call: Backward) -> Int32:
    """Blocks of dK and of dV: none if every thread block walks the query heads of a whole group."""
    _, batch, heads_kv, n_blocks, _ = call.mdKVacc.shape
    return 2 * batch * heads_kv * n_blocks


@cute.jit
def add(
    config: cutlass.Constexpr,
    call: Backward,
    sizes: Sizes,
    block: Block,
    gradients: list[tuple[int, cute.Tensor]],
    row_blocks: list[Int32],
    lane: Int32,
):
    """Add a warp's part of the gradients, scaled; row_blocks: which 16 keys of the tile its rows are."""
    batch, number = block.key_place
    if const_expr(config.pdl):
        cute.arch.griddepcontrol_wait()  # delta is done: dkv_acc and turns are zero
    if const_expr(config.deterministic):
        part = (block.head - block.head_kv * sizes.group) // call.heads_per_tile
        turns = cute.local_tile(call.mKeyTurns[batch, block.head_kv, None], (1,), (number,)).iterator.llvm_ptr
        done = Int32(-1)  # warps that have added to this block
        while done < part * config.adding_warps:  # acquire: all heads before have added theirs
            done = cute.arch.load(turns, Int32, sem="acquire", scope="gpu")
    size, d = config.atomic_vector, config.head_dim
    for which, acc in gradients:
        start = call.mdKVacc[which, batch, block.head_kv, number, None].iterator
        for m in cutlass.range_constexpr(len(row_blocks)):
            at = start + row_blocks[m] * (16 * d) + size * lane
            for g in cutlass.range_constexpr(d // 8):
                part = eight_columns(acc, m, g)
                values = [part[c, r] for r in range(2) for c in range(2)]
                for j in cutlass.range_constexpr(0, 4, size):
                    add_to_global(at + 128 * g + 32 * j, values[j : j + size])
    if const_expr(config.deterministic):
        cute.arch.fence_acq_rel_gpu()  # each lane's additions come before the warp's turn is over
        cute.arch.sync_warp()  # all lanes have passed the fence
        if lane == 0:
            cute.arch.atomic_add(turns, Int32(1), sem="relaxed", scope="gpu")


def eight_columns(acc: cute.Tensor, m: int, g: int) -> cute.Tensor:
    """(2 adjacent columns, 2 rows): a thread's part of columns 8 g to 8 g + 7, in its m-th 16 rows."""
    if const_expr(cute.rank(acc.layout.shape[0]) == 3):  # wgmma: ((2, 2, d / 8), 1, 1)
        return acc[(None, None, g), 0, 0]
    return acc[(None, None), m, g]  # mma.sync: ((2, 2), m, d / 8)


class KeyBlock(NamedTuple):
    """What a thread block clears or rounds: mdKVacc[which, batch, head_kv, number]."""

    which: Int32
    batch: Int32
    head_kv: Int32
    number: Int32


def find_key_block(call: Backward, i: Int32) -> KeyBlock:
    """The i-th of num_blocks."""
    _, batch, heads_kv, n_blocks, _ = call.mdKVacc.shape
    head = i // n_blocks
    return KeyBlock(head // (batch * heads_kv), head // heads_kv % batch, head % heads_kv, i % n_blocks)


@cute.jit
def clear(config: cutlass.Constexpr, call: Backward, i: Int32, threads: cutlass.Constexpr):
    """Zero the i-th block and its turns."""
    tidx, _, _ = cute.arch.thread_idx()
    x = find_key_block(call, i)
    zeros = cute.make_rmem_tensor(4, Float32)
    zeros.fill(0.0)
    acc = call.mdKVacc[(*x, None)]  # (tile_n * d)
    for j in cutlass.range(tidx, config.tile_n * config.head_dim // 4, threads):
        cute.autovec_copy(zeros, cute.local_tile(acc, (4,), (j,)))
    if const_expr(config.deterministic):
        if tidx == 0:
            call.mKeyTurns[x.batch, x.head_kv, x.number] = Int32(0)


@cute.jit
def round_sums(config: cutlass.Constexpr, call: Backward, sizes: Sizes, i: Int32, threads: cutlass.Constexpr):
    """The i-th block of dkv_acc to dK or dV. A thread converts 8 columns of two rows, 8 apart, at a time."""
    tidx, _, _ = cute.arch.thread_idx()
    x = find_key_block(call, i)
    acc = call.mdKVacc[(*x, None)]  # (tile_n * d)
    batch, first, left = x.batch, x.number * config.tile_n, sizes.seqlen_k - x.number * config.tile_n
    if const_expr(config.ragged):
        n_blocks = cute.ceil_div(sizes.seqlen_k, config.tile_n)  # of each row of k
        batch = x.number // n_blocks
        first = (x.number - batch * n_blocks) * config.tile_n
        left = sizes.seqlen_k - first
        ragged = call.ragged
        if ragged.given & CU_SEQLENS_K:
            segment = find_segment(ragged.cu_seqlens_k, sizes.batch, sizes.seqlen_k, config.tile_n, x.number)
            within = (x.number - segment.first_block) * config.tile_n
            batch, first, left = Int32(0), segment.start + within, segment.length - within
    size, groups = config.atomic_vector, config.head_dim // 8
    for j in cutlass.range(tidx, config.tile_n // 16 * groups * 8, threads):
        quad, g, row_block = j % 8, j // 8 % groups, j // (8 * groups)
        sums = cute.make_rmem_tensor((4, 4), Float32)
        for n in cutlass.range_constexpr(4):
            at = 128 // 4 * (row_block * groups + g) + (
                4 * quad + n if const_expr(size == 4) else 8 * n + quad
            )
            cute.autovec_copy(cute.local_tile(acc, (4,), (at,)), sums[None, n])
        for r in cutlass.range_constexpr(2):
            row = 16 * row_block + 8 * r + quad
            if row < left:
                values = cute.make_rmem_tensor(8, Float32)
                for c in cutlass.range_constexpr(8):  # lane c // 2 of the quad has it
                    e, lane = 2 * r + c % 2, c // 2
                    values[c] = sums[e, lane] if const_expr(size == 4) else sums[lane, e]
                out = cute.make_rmem_tensor(8, call.mdK.element_type)
                convert(values, out)
                for which, mX in ((DK, call.mdK), (DV, call.mdV)):
                    if x.which == which and 8 * g < mX.shape[3]:
                        gX = mX[batch, first + row, x.head_kv, None]  # (D)
                        cute.autovec_copy(out, cute.local_tile(gX, (8,), (g,)))
