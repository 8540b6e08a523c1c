"""What a thread block of a decode works on: a tile of packed rows, and a split of the keys that they see."""

from typing import NamedTuple

import cutlass
import cutlass.cute as cute
from cutlass import Boolean, Int32, const_expr

from mini_flash_attention.kernels.calls import Decode
from mini_flash_attention.kernels.decode.splits import split_blocks, visible_blocks
from mini_flash_attention.kernels.parts.seqlen import Keys, Queries, clamp, keys, queries


class Position(NamedTuple):
    """A thread block's in the grid."""

    sequence: Int32
    head_kv: Int32
    group: Int32  # query heads for each key head
    m_block: Int32  # its first tile of the sequence and key head
    split: Int32
    tile: Int32  # that tile's number in the call, which its splits share


class Warp(NamedTuple):
    """A thread's place in the thread block."""

    tidx: Int32
    lane: Int32
    row_warp: Int32  # which 16 rows of a tile are its warp's
    key_warp: Int32  # which chunk of a block is


class Tile(NamedTuple):
    """The rows and the keys that a thread block works on."""

    position: Position
    q: Queries
    k: Keys
    first_row: Int32
    begin: Int32  # key blocks of this split: [begin, end)
    end: Int32
    parts: Int32  # splits that have keys
    alone: Boolean  # no other split has a part in the result
    free_first: Int32  # key blocks in [free_first, free_end) need no mask
    free_end: Int32

    def query_and_head(self, row: Int32) -> tuple[Int32, Int32]:
        """Of a row of the tile."""
        row = self.first_row + row
        group = self.position.group
        return row // group, self.position.head_kv * group + row % group

    def holds(self, row: Int32) -> Boolean:
        """Whether the row is the sequence's."""
        return self.query_and_head(row)[0] < self.q.seqlen

    def coords(self, row: Int32) -> tuple[Int32, Int32, Int32]:
        """A row's (batch, token, head) in q and o."""
        query, head = self.query_and_head(row)
        return self.q.batch, self.q.start + query, head


def find_position(call: Decode, m_blocks: Int32) -> Position:
    """m_blocks: tiles of a sequence and key head in the grid."""
    rest, _, _ = cute.arch.block_idx()
    heads_k = call.mK.shape[2]
    m_block, rest = rest % m_blocks, rest // m_blocks
    head_kv, rest = rest % heads_k, rest // heads_k
    split, sequence = rest % call.num_splits, rest // call.num_splits
    tile = (sequence * heads_k + head_kv) * m_blocks + m_block
    return Position(sequence, head_kv, call.mQ.shape[2] // heads_k, m_block, split, tile)


def find_warp(config) -> Warp:
    tidx, _, _ = cute.arch.thread_idx()
    warp = cute.arch.make_warp_uniform(tidx // 32)
    return Warp(tidx, tidx % 32, warp % config.row_warps, warp // config.row_warps)


@cute.jit
def find_sequence(config: cutlass.Constexpr, call: Decode, b: Int32) -> tuple[Queries, Keys]:
    """Where sequence b lies: inside the tensors, whatever the numbers in GPU memory say."""
    q = queries(call.ragged, b, call.mQ.shape[1])
    rows, capacity = call.mK.shape[:2]
    if const_expr(config.page):
        rows, pages = call.ragged.block_table.shape
        capacity = capacity * pages
    k = keys(call.ragged, b, capacity)
    return q, k._replace(batch=clamp(k.batch, Int32(0), rows - 1))


@cute.jit
def find_tile(
    config: cutlass.Constexpr, call: Decode, position: Position, q: Queries, k: Keys, first_row: Int32
) -> Tile:
    """The tile that starts at a row of the sequence and key head, and the split's part of its keys."""
    sizes = position.group, config.tile_n, q.seqlen, k.seqlen
    window = call.window_left, call.window_right
    first, last, *free = visible_blocks(first_row, config.tile_m, *sizes, *window)
    begin, end, parts = split_blocks(position.split, call.num_splits, first, last)
    results = parts if call.fused else call.num_splits  # the combine kernel reads what all splits have
    return Tile(position, q, k, first_row, begin, end, parts, results <= 1, *free)
