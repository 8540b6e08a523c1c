"""Backward pass: which keys a thread block works on, and whose turn it is to add to dq_acc.

A ragged batch has packed queries, whose blocks are numbered as in blocks.first_block: stats, dq_acc and turns
lie by these numbers. Packed keys are numbered likewise: so a thread block finds the sequence it works on.
"""

from typing import NamedTuple

import cutlass
import cutlass.cute as cute
from cutlass import Int32, const_expr

from mini_flash_attention.kernels.calls import CU_SEQLENS_K, Backward, Ragged
from mini_flash_attention.kernels.parts import sparse
from mini_flash_attention.kernels.parts.blocks import (
    first_block,
    in_swaths,
    key_blocks,
    packed_blocks,
    query_blocks,
)
from mini_flash_attention.kernels.parts.seqlen import Keys, Queries, Sizes, clamp, keys, queries


class Sequence(NamedTuple):
    """One sequence of a ragged batch, or rows of k that belong to none: no queries, no keys."""

    q: Queries
    first_block: Int32  # the number of its first query block
    k: Keys
    room: Int32  # rows of its storage: those that do not count as keys have gradients too, zeros
    first_key_block: Int32  # the number of the first key block of its storage


class Visits(NamedTuple):
    """Which query blocks of one head a tile visits."""

    first: Int32
    last: Int32
    partial: Int32  # with a block mask: positions before it need the mask


class Block(NamedTuple):
    """A tile: keys of one head, and the query blocks [first, last) that see one of them."""

    n_block: Int32  # -1: nothing, in a ragged batch
    head_kv: Int32
    batch: Int32  # the sequence
    first: Int32
    last: Int32
    head: Int32  # the first of its query heads
    heads: Int32  # how many it has
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
        """(index into k's first mode, first row) of the sequence."""
        x = self.sequence
        return (self.batch, Int32(0)) if x is None else x.k[:2]

    def place(self, m_block: Int32) -> tuple[Int32, Int32]:
        """(index into the first mode, number) of a query block in stats, dq_acc and turns."""
        x = self.sequence
        return (self.batch, m_block) if x is None else (Int32(0), x.first_block + m_block)

    @property
    def key_place(self) -> tuple[Int32, Int32]:
        """(index into the batch's mode, number) of its keys in dkv_acc and key_turns."""
        x = self.sequence
        return (self.batch, self.n_block) if x is None else (Int32(0), x.first_key_block + self.n_block)


@cute.jit
def visits(config: cutlass.Constexpr, call: Backward, block: Block, head: Int32) -> Visits:
    """The query blocks [first, last) of a head that see a key of the tile; with a block mask, positions."""
    if const_expr(config.sparse):
        found = sparse.visits(call.blocks, _row(config, block, head), config.tile_m)
        return Visits(Int32(0), found.end, found.partial)
    return Visits(block.first, block.last, Int32(0))


def query_block(config, call: Backward, block: Block, head: Int32, x: Visits, position: Int32) -> Int32:
    """The number of the query block at a position."""
    if not config.sparse:
        return position
    return sparse.tile_at(call.blocks, _row(config, block, head), x.partial, config.tile_m, position)


def _row(config, block: Block, head: Int32) -> sparse.Row:
    return sparse.Row.of_tile(block.batch, head, block.n_block, config.tile_n)


def uniform(block: Block) -> Block:
    """The same: said for the compiler, which keeps what follows in uniform registers."""
    same = cute.arch.make_warp_uniform
    numbers, x = map(same, block[:-1]), block.sequence
    if x is not None:
        q, k = Queries(*map(same, x.q)), Keys(*map(same, x.k))
        x = Sequence(q, same(x.first_block), k, same(x.room), same(x.first_key_block))
    return Block(*numbers, x)


# The order of tiles


class Order(NamedTuple):
    """Numbers of find_block, from the host. Dense: divisors, as a division in a kernel takes 100 clocks.

    A unit is what a key block makes a tile of: `per` of the query heads of a group, or what is left of them.
    """

    swath: Int32  # units walked together
    per: Int32
    parts: Int32  # units of a group
    units: Int32  # of a batch, of a sequence
    n_blocks: cute.FastDivmodDivisorV2 | None = None  # key blocks of a unit; ragged: None, like all below
    by_parts: cute.FastDivmodDivisorV2 | None = None
    by_units: cute.FastDivmodDivisorV2 | None = None
    swath_blocks: cute.FastDivmodDivisorV2 | None = None  # key blocks of a swath
    swath_units: cute.FastDivmodDivisorV2 | None = None
    last_units: cute.FastDivmodDivisorV2 | None = None  # units of the last swath, which may be narrower


@cute.jit
def find_order(config: cutlass.Constexpr, sizes: Sizes, call: Backward) -> Order:
    ragged, per = call.ragged, call.heads_per_tile
    parts = cute.ceil_div(sizes.group, per)
    units = sizes.heads // sizes.group * parts
    swath = find_swath(config, sizes, ragged, per, units)
    if const_expr(ragged is not None):
        return Order(swath, per, parts, units)
    n_blocks, rest = cute.ceil_div(sizes.seqlen_k, config.tile_n), units * sizes.batch % swath
    divisors = n_blocks, parts, units, swath * n_blocks, swath, swath if rest == 0 else rest
    return Order(swath, per, parts, units, *(cute.fast_divmod_create_divisor_v2(x) for x in divisors))


@cute.jit
def find_swath(
    config: cutlass.Constexpr, sizes: Sizes, ragged: Ragged | None, per: Int32, units: Int32
) -> Int32:
    """How many units to walk together: their Q, dO and dq_acc take up to 32 MB of the L2 cache."""
    if const_expr(ragged is not None):  # the heads of a sequence
        sizes = sizes.of(cutlass.max(1, cutlass.min(ragged.longest, sizes.seqlen_q)), sizes.seqlen_k)
    block_kb = config.tile_m * config.head_dim * (2 + 2 + 4) // 1024
    unit_kb = cute.ceil_div(sizes.seqlen_q, config.tile_m) * block_kb * per
    units = units * sizes.batch
    most = cutlass.max(1, cutlass.min(units, 32 * 1024 // unit_kb))
    return cute.ceil_div(units, cute.ceil_div(units, most))  # all swaths of nearly one size


@cute.jit
def num_blocks(config: cutlass.Constexpr, sizes: Sizes, ragged: Ragged | None, order: Order) -> Int32:
    """How many tiles there are; ragged: some may be nothing."""
    n_blocks = cute.ceil_div(sizes.seqlen_k, config.tile_n) * sizes.batch
    if const_expr(ragged is not None):
        if ragged.given & CU_SEQLENS_K:
            n_blocks = packed_blocks(sizes.seqlen_k, config.tile_n, sizes.batch)
    return n_blocks * order.units


@cute.jit
def find_block(config: cutlass.Constexpr, call: Backward, setup, tile: Int32) -> Block:
    """The tile of this number. By a whole warp. setup: of either kernel.

    Causal, the first key blocks have the most queries: they come first, so that the work ends on short ones.
    The units of a swath share the L2 cache. Deterministic, the last key blocks come first: see turn.
    """
    sizes, order = setup.sizes, setup.order
    if const_expr(not config.ragged):
        n_block, unit = find_dense(config, sizes, order, tile)
        first, last = query_blocks(n_block, *sizes.for_blocks(config))
        batch, unit = unit // order.by_units, unit % order.by_units
        head_kv, part = unit // order.by_parts, unit % order.by_parts
        heads = query_heads(sizes, order, head_kv, part)
        return uniform(Block(n_block, head_kv, batch, first, last, *heads))
    batch, x, tile = find_sequence(config, sizes, call.ragged, order, tile)
    n_blocks = cute.ceil_div(x.room, config.tile_n)
    most = cutlass.max(n_blocks, 1)
    n_block, unit = tile % most, tile // most
    if const_expr(config.mask == "causal"):
        n_block, unit = in_swaths(tile, most, order.units, order.swath)
    if const_expr(config.deterministic):
        n_block = most - 1 - n_block
    first, last = query_blocks(n_block, *sizes.of(x.q.seqlen, x.k.seqlen).for_blocks(config))
    if n_block * config.tile_n >= x.k.seqlen:  # no keys
        first, last = Int32(0), Int32(0)
    n_block = n_block if tile < n_blocks * order.units else Int32(-1)
    head_kv = unit // order.parts
    heads = query_heads(sizes, order, head_kv, unit - head_kv * order.parts)
    return uniform(Block(n_block, head_kv, batch, first, last, *heads, x))


@cute.jit
def query_heads(sizes: Sizes, order: Order, head_kv: Int32, part: Int32) -> tuple[Int32, Int32]:
    """(first, how many) of a unit."""
    before = part * order.per  # of the group
    return head_kv * sizes.group + before, cutlass.min(order.per, sizes.group - before)


@cute.jit
def find_dense(config: cutlass.Constexpr, sizes: Sizes, order: Order, tile: Int32):
    """(n_block, unit, those of all batches counted through) of a tile of a dense batch."""
    n_block, unit = tile % order.n_blocks, tile // order.n_blocks
    if const_expr(config.mask == "causal"):  # blocks.in_swaths
        s, rest = tile // order.swath_blocks, tile % order.swath_blocks
        n_block, unit = rest // order.swath_units, rest % order.swath_units
        if (s + 1) * order.swath > order.units * sizes.batch:
            n_block, unit = rest // order.last_units, rest % order.last_units
        unit += s * order.swath
    if const_expr(config.deterministic):
        n_block = Int32(order.n_blocks.divisor) - 1 - n_block
    return n_block, unit


@cute.jit
def find_sequence(config: cutlass.Constexpr, sizes: Sizes, ragged: Ragged, order: Order, tile: Int32):
    """(number, sequence, tile among those of the sequence) of a tile of a ragged batch."""
    number = tile // order.units  # as if the tiles of a key block followed each other
    n_blocks = cute.ceil_div(sizes.seqlen_k, config.tile_n)  # of each row of k
    b = number // n_blocks
    first_key_block = b * n_blocks
    q, k, room = Queries(Int32(0), Int32(0), Int32(0)), Keys(b, Int32(0), Int32(0)), sizes.seqlen_k
    if ragged.given & CU_SEQLENS_K:
        segment = find_segment(ragged.cu_seqlens_k, sizes.batch, sizes.seqlen_k, config.tile_n, number)
        b, first_key_block = segment.index - 1, segment.first_block
        k, room = Keys(Int32(0), segment.start, Int32(0)), segment.length
    batch = clamp(b, Int32(0), sizes.batch - 1)
    if b == batch:
        q, k = queries(ragged, b, sizes.seqlen_q), keys(ragged, b, sizes.seqlen_k)
    x = Sequence(q, first_block(q.start, config.tile_m, batch + 1), k, room, first_key_block)
    return batch, x, tile - first_key_block * order.units


# Query blocks by number: delta and convert


class QueryBlock(NamedTuple):
    """What a thread block of delta.py or convert.py works on: dq_acc[batch, head, number]."""

    batch: Int32
    head: Int32
    number: Int32
    first: Int32  # its first row of q
    left: Int32  # rows from there to the end of the sequence; the end may lie before it


@cute.jit
def find_query_block(config: cutlass.Constexpr, call: Backward) -> QueryBlock:
    block, _, _ = cute.arch.block_idx()
    _, heads, m_blocks, _ = call.mdQacc.shape
    number, head, batch = block % m_blocks, block // m_blocks % heads, block // (m_blocks * heads)
    rows, first = call.mQ.shape[1], number * config.tile_m
    left = rows - first
    if const_expr(config.ragged):
        ragged = call.ragged
        segment = find_segment(ragged.cu_seqlens_q, ragged.batch, rows, config.tile_m, number)
        first = (number - segment.first_block) * config.tile_m
        first, left = segment.start + first, segment.length - first
    return QueryBlock(batch, head, number, first, left)


class Segment(NamedTuple):
    """Rows of a packed tensor: those of a sequence, or of none. See blocks.first_block."""

    index: Int32  # sequence b is segment b + 1
    start: Int32
    length: Int32
    first_block: Int32  # its number


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
def boundary(cu_seqlens: cute.Tensor, batch: Int32, rows: Int32, segment: Int32) -> Int32:
    """Where a segment starts: in the tensor, whatever cu_seqlens says."""
    start = clamp(cu_seqlens[clamp(segment - 1, Int32(0), batch)], Int32(0), rows)
    start = start if segment > 0 else Int32(0)
    return start if segment < batch + 2 else rows


# Deterministic: turns


def turn(config, sizes: Sizes, n_block: Int32, m_block: Int32) -> Int32:
    """How many key blocks add to a tile of dq_acc before n_block: those that lie right of it.

    Thread blocks start from the right (find_block), so that each waits for earlier ones only. Under a mask
    that limits the right those also get there earlier: a walk begins where a key block is first seen.
    """
    _, last = key_blocks(m_block, *sizes.for_blocks(config))
    return last - 1 - n_block


@cute.jit
def wait_turn(turns: cute.Pointer, mine: Int32):
    """Until the additions of all that come before are complete. By a warp."""
    with cute.arch.elect_one():
        now = Int32(-1)
        while now < mine:  # acquire: their additions are seen from here on
            now = cute.arch.load(turns.llvm_ptr, Int32, sem="acquire", scope="gpu")
        cute.arch.fence_proxy("async.global")  # the bulk reductions that follow come after


@cute.jit
def pass_turn(turns: cute.Pointer):
    """This thread block's additions, which the caller has waited for, are complete. By a warp."""
    with cute.arch.elect_one():  # release: they are seen by who acquires the count
        cute.arch.atomic_add(turns.llvm_ptr, Int32(1), sem="release", scope="gpu")
