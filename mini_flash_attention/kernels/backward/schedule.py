"""Backward pass: which keys a thread block works on, and whose turn it is to add to dq_acc.

A ragged batch has packed queries, whose blocks are numbered as in blocks.first_block: stats, dq_acc and turns
lie by these numbers. Packed keys are numbered likewise: so a thread block finds the sequence it works on.
"""

from typing import NamedTuple

import cutlass
import cutlass.cute as cute
from cutlass import Int32, const_expr

from mini_flash_attention.kernels.calls import CU_SEQLENS_K, Ragged
from mini_flash_attention.kernels.parts.blocks import (
    first_block,
    in_swaths,
    key_blocks,
    packed_blocks,
    query_blocks,
)
from mini_flash_attention.kernels.parts.seqlen import Keys, Queries, Sizes, clamp, keys, queries


class Segment(NamedTuple):
    """Rows of a packed tensor: those of a sequence, or of none. See blocks.first_block."""

    index: Int32  # sequence b is segment b + 1
    start: Int32
    length: Int32
    first_block: Int32  # its number


@cute.jit
def boundary(cu_seqlens: cute.Tensor, batch: Int32, rows: Int32, segment: Int32) -> Int32:
    """Where a segment starts: in the tensor, whatever cu_seqlens says."""
    start = clamp(cu_seqlens[clamp(segment - 1, Int32(0), batch)], Int32(0), rows)
    start = start if segment > 0 else Int32(0)
    return start if segment < batch + 2 else rows


@cute.jit
def find_segment(
    cu_seqlens: cute.Tensor, batch: Int32, rows: Int32, tile: cutlass.Constexpr, number: Int32
) -> Segment:
    """The last segment whose first block has this number or a lower one: each round tries 32. By a warp."""
    lane = cute.arch.lane_idx()
    stride, segment = Int32(1), Int32(0)
    while stride * 32 < batch + 2:
        stride *= 32
    while stride > 0:
        candidate = segment + lane * stride
        first = first_block(boundary(cu_seqlens, batch, rows, candidate), tile, candidate)
        found = cute.arch.vote_ballot_sync((candidate < batch + 2) & (first <= number))
        segment += stride * (31 - Int32(cute.arch.clz(found)))
        stride = stride // 32
    start = boundary(cu_seqlens, batch, rows, segment)
    end = clamp(boundary(cu_seqlens, batch, rows, segment + 1), start, rows)
    return Segment(segment, start, end - start, first_block(start, tile, segment))


@cute.jit
def query_block(config: cutlass.Constexpr, ragged: Ragged | None, rows: Int32, number: Int32):
    """(first row, rows from there to the end of the sequence) of a query block; the end may lie before it.

    rows: q.shape[1].
    """
    first = number * config.tile_m
    left = rows - first
    if const_expr(ragged is not None):
        segment = find_segment(ragged.cu_seqlens_q, ragged.batch, rows, config.tile_m, number)
        first = (number - segment.first_block) * config.tile_m
        first, left = segment.start + first, segment.length - first
    return first, left


class Sequence(NamedTuple):
    """One sequence of a ragged batch, or rows of k that belong to none: no queries, no keys."""

    q: Queries
    first_block: Int32  # the number of its first query block
    k: Keys
    room: Int32  # rows of its storage: those that do not count as keys have gradients too, zeros


class Block(NamedTuple):
    """What a thread block works on: keys, and the query blocks [first, last) that see one of them."""

    n_block: Int32  # -1: nothing, in a ragged batch
    head_kv: Int32
    batch: Int32  # the sequence
    first: Int32
    last: Int32
    sequence: Sequence | None = None  # ragged batches only

    def sizes(self, sizes: Sizes) -> Sizes:
        """The sizes of the sequence."""
        x = self.sequence
        return sizes if x is None else sizes.of(x.q.seqlen, x.k.seqlen)

    @property
    def q_rows(self) -> tuple[Int32, Int32]:
        """(index into q's first mode, first row) of the sequence."""
        x = self.sequence
        return (self.batch, Int32(0)) if x is None else x.q[:2]

    @property
    def k_rows(self) -> tuple[Int32, Int32]:
        x = self.sequence
        return (self.batch, Int32(0)) if x is None else x.k[:2]

    def place(self, m_block: Int32) -> tuple[Int32, Int32]:
        """(index into the first mode, number) of a query block in stats, dq_acc and turns."""
        x = self.sequence
        return (self.batch, m_block) if x is None else (Int32(0), x.first_block + m_block)


def uniform(block: Block) -> Block:
    """The same: said for the compiler, which keeps what follows in uniform registers."""
    same = cute.arch.make_warp_uniform
    numbers, x = map(same, block[:-1]), block.sequence
    if x is not None:
        x = Sequence(Queries(*map(same, x.q)), same(x.first_block), Keys(*map(same, x.k)), same(x.room))
    return Block(*numbers, x)


@cute.jit
def num_blocks(config: cutlass.Constexpr, sizes: Sizes, ragged: Ragged | None) -> Int32:
    """Thread blocks of the main kernel; ragged: some may have nothing to do."""
    n_blocks = cute.ceil_div(sizes.seqlen_k, config.tile_n) * sizes.batch
    if const_expr(ragged is not None):
        if ragged.given & CU_SEQLENS_K:
            n_blocks = packed_blocks(sizes.seqlen_k, config.tile_n, sizes.batch)
    return n_blocks * (sizes.heads // sizes.group)


@cute.jit
def find_block(config: cutlass.Constexpr, sizes: Sizes, ragged: Ragged | None, swath: Int32) -> Block:
    """What this thread block works on. By all its warps."""
    tile, _, _ = cute.arch.block_idx()
    heads_kv = sizes.heads // sizes.group
    if const_expr(ragged is None):
        n_blocks = cute.ceil_div(sizes.seqlen_k, config.tile_n)
        n_block, head_batch = in_order(config, tile, n_blocks, heads_kv * sizes.batch, swath)
        lengths = config.tile_m, config.tile_n, sizes.seqlen_q, sizes.seqlen_k
        first, last = query_blocks(n_block, *lengths, *sizes.window(config.mask))
        return Block(n_block, head_batch % heads_kv, head_batch // heads_kv, first, last)
    batch, x, tile = find_sequence(config, sizes, ragged, tile)
    n_blocks = cute.ceil_div(x.room, config.tile_n)
    n_block, head_kv = in_order(config, tile, cutlass.max(n_blocks, 1), heads_kv, swath)
    lengths = config.tile_m, config.tile_n, x.q.seqlen, x.k.seqlen
    first, last = query_blocks(n_block, *lengths, *sizes.window(config.mask))
    if n_block * config.tile_n >= x.k.seqlen:  # no keys
        first, last = Int32(0), Int32(0)
    n_block = n_block if tile < n_blocks * heads_kv else Int32(-1)
    return uniform(Block(n_block, head_kv, batch, first, last, x))


@cute.jit
def in_order(config: cutlass.Constexpr, tile: Int32, n_blocks: Int32, heads: Int32, swath: Int32):
    """tile -> (n_block, head), of n_blocks key blocks of each head.

    Causal, a head's first key blocks have the most queries: they start first, so that the work ends on
    short ones. The heads of a swath share the L2 cache.
    """
    n_block, head = tile % n_blocks, tile // n_blocks
    if const_expr(config.mask == "causal"):
        n_block, head = in_swaths(tile, n_blocks, heads, swath)
    if const_expr(config.deterministic):
        n_block = n_blocks - 1 - n_block  # see turn
    return n_block, head


class Order(NamedTuple):
    """The numbers of in_order for a dense batch, from the host: so a kernel need not divide (100 clocks)."""

    n_blocks: cute.FastDivmodDivisorV2  # key blocks of a head
    heads_kv: cute.FastDivmodDivisorV2
    swath_blocks: cute.FastDivmodDivisorV2  # key blocks of a swath
    swath: cute.FastDivmodDivisorV2  # heads of a swath
    last_swath: cute.FastDivmodDivisorV2  # it may be narrower


@cute.jit
def find_order(config: cutlass.Constexpr, sizes: Sizes, swath: Int32) -> Order:
    n_blocks, heads_kv = cute.ceil_div(sizes.seqlen_k, config.tile_n), sizes.heads // sizes.group
    rest = heads_kv * sizes.batch % swath
    numbers = n_blocks, heads_kv, swath * n_blocks, swath, swath if rest == 0 else rest
    return Order(*(cute.fast_divmod_create_divisor_v2(x) for x in numbers))


@cute.jit
def find_dense_block(config: cutlass.Constexpr, sizes: Sizes, order: Order, tile: Int32) -> Block:
    """find_block for a thread block of this number, of a dense batch."""
    n_block, head_batch = in_dense_order(config, sizes, order, tile)
    lengths = config.tile_m, config.tile_n, sizes.seqlen_q, sizes.seqlen_k
    first, last = query_blocks(n_block, *lengths, *sizes.window(config.mask))
    return uniform(Block(n_block, head_batch % order.heads_kv, head_batch // order.heads_kv, first, last))


@cute.jit
def in_dense_order(config: cutlass.Constexpr, sizes: Sizes, order: Order, tile: Int32):
    n_block, head = tile % order.n_blocks, tile // order.n_blocks
    if const_expr(config.mask == "causal"):  # blocks.in_swaths
        s, rest = tile // order.swath_blocks, tile % order.swath_blocks
        swath, heads = Int32(order.swath.divisor), Int32(order.heads_kv.divisor) * sizes.batch
        n_block, head = rest // order.swath, rest % order.swath
        if (s + 1) * swath > heads:
            n_block, head = rest // order.last_swath, rest % order.last_swath
        head += s * swath
    if const_expr(config.deterministic):
        n_block = Int32(order.n_blocks.divisor) - 1 - n_block
    return n_block, head


@cute.jit
def find_sequence(config: cutlass.Constexpr, sizes: Sizes, ragged: Ragged, tile: Int32):
    """(number, sequence, tile among those of the sequence) of a thread block of a ragged batch."""
    heads_kv = sizes.heads // sizes.group
    tiles = cute.ceil_div(sizes.seqlen_k, config.tile_n) * heads_kv  # of each row of k
    b, first_tile = tile // tiles, tile // tiles * tiles
    q, k, room = Queries(Int32(0), Int32(0), Int32(0)), Keys(b, Int32(0), Int32(0)), sizes.seqlen_k
    if ragged.given & CU_SEQLENS_K:
        number = tile // heads_kv
        segment = find_segment(ragged.cu_seqlens_k, sizes.batch, sizes.seqlen_k, config.tile_n, number)
        b, first_tile = segment.index - 1, segment.first_block * heads_kv
        k, room = Keys(Int32(0), segment.start, Int32(0)), segment.length
    batch = clamp(b, Int32(0), sizes.batch - 1)
    if b == batch:
        q, k = queries(ragged, b, sizes.seqlen_q), keys(ragged, b, sizes.seqlen_k)
    number = first_block(q.start, config.tile_m, batch + 1)
    return batch, Sequence(q, number, k, room), tile - first_tile


@cute.jit
def find_swath(config: cutlass.Constexpr, sizes: Sizes, ragged: Ragged | None) -> Int32:
    """How many key heads to walk together: their Q, dO and dq_acc take up to 32 MB of the L2 cache."""
    if const_expr(ragged is not None):  # the heads of a sequence
        sizes = sizes.of(cutlass.max(1, cutlass.min(ragged.longest, sizes.seqlen_q)), sizes.seqlen_k)
    block_kb = config.tile_m * config.head_dim * (2 + 2 + 4) // 1024
    head_kb = cute.ceil_div(sizes.seqlen_q, config.tile_m) * block_kb * sizes.group
    heads = sizes.heads // sizes.group * sizes.batch
    most = cutlass.max(1, cutlass.min(heads, 32 * 1024 // head_kb))
    return cute.ceil_div(heads, cute.ceil_div(heads, most))  # all swaths of nearly one size


def turn(config, sizes: Sizes, n_block: Int32, m_block: Int32) -> Int32:
    """How many key blocks add to a tile of dq_acc before n_block: those that lie right of it.

    Thread blocks start from the right (in_order), so that each waits for earlier ones only. Under a mask
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
        while now < mine:
            now = cute.arch.load(turns.llvm_ptr, Int32, sem="acquire", scope="gpu")
        cute.arch.fence_proxy("async.global")  # the bulk reductions that follow come after


@cute.jit
def pass_turn(turns: cute.Pointer):
    """This thread block's additions are complete. By a warp."""
    with cute.arch.elect_one():
        cute.arch.atomic_add(turns.llvm_ptr, Int32(1), sem="release", scope="gpu")
