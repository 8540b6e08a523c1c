"""Backward pass: which keys a thread block works on, and whose turn it is to add to dq_acc."""

from typing import NamedTuple

import cutlass
import cutlass.cute as cute
from cutlass import Int32, const_expr

from mini_flash_attention.kernels.blocks import in_swaths, key_blocks, query_blocks
from mini_flash_attention.kernels.seqlen import Sizes


class Block(NamedTuple):
    """What a thread block works on: keys, and the query blocks [first, last) that see one of them."""

    n_block: Int32
    head_kv: Int32
    batch: Int32
    first: Int32
    last: Int32


@cute.jit
def find_block(config: cutlass.Constexpr, sizes: Sizes, swath: Int32) -> Block:
    """Causal, a head's first key blocks have the most queries: they start first, so that the work ends on
    short ones. The heads of a swath share the L2 cache.
    """
    tile, _, _ = cute.arch.block_idx()
    n_blocks, heads_kv = cute.ceil_div(sizes.seqlen_k, config.tile_n), sizes.heads // sizes.group
    n_block, head_batch = tile % n_blocks, tile // n_blocks
    if const_expr(config.mask == "causal"):
        n_block, head_batch = in_swaths(tile, n_blocks, heads_kv * sizes.batch, swath)
    if const_expr(config.deterministic):
        n_block = n_blocks - 1 - n_block  # see turn
    lengths = config.tile_m, config.tile_n, sizes.seqlen_q, sizes.seqlen_k
    first, last = query_blocks(n_block, *lengths, *sizes.window(config.mask))
    return Block(n_block, head_batch % heads_kv, head_batch // heads_kv, first, last)


@cute.jit
def find_swath(config: cutlass.Constexpr, sizes: Sizes) -> Int32:
    """How many key heads to walk together: their Q, dO and dq_acc take up to 32 MB of the L2 cache."""
    block_kb = config.tile_m * config.head_dim * (2 + 2 + 4) // 1024
    head_kb = cute.ceil_div(sizes.seqlen_q, config.tile_m) * block_kb * sizes.group
    heads = sizes.heads // sizes.group * sizes.batch
    most = cutlass.max(1, cutlass.min(heads, 32 * 1024 // head_kb))
    return cute.ceil_div(heads, cute.ceil_div(heads, most))  # all swaths of nearly one size


def turn(config, sizes: Sizes, n_block: Int32, m_block: Int32) -> Int32:
    """How many key blocks add to a tile of dq_acc before n_block: those that lie right of it.

    Thread blocks start from the right (find_block), so that each waits for earlier ones only. Under a mask
    that limits the right those also get there earlier: a walk begins where a key block is first seen.
    """
    lengths = config.tile_m, config.tile_n, sizes.seqlen_q, sizes.seqlen_k
    _, last = key_blocks(m_block, *lengths, *sizes.window(config.mask))
    return last - 1 - n_block


@cute.jit
def wait_turn(turns: cute.Pointer, mine: Int32):
    """Until the additions of all that come before are complete. By a warp."""
    with cute.arch.elect_one():
        now = Int32(-1)
        while now != mine:
            now = cute.arch.load(turns.llvm_ptr, Int32, sem="acquire", scope="gpu")
        cute.arch.fence_proxy("async.global")  # the bulk reductions that follow come after


@cute.jit
def pass_turn(turns: cute.Pointer):
    """This thread block's additions are complete. By a warp."""
    with cute.arch.elect_one():
        cute.arch.atomic_add(turns.llvm_ptr, Int32(1), sem="release", scope="gpu")
