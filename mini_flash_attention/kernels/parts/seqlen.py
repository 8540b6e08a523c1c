"""The numbers of one call, as the kernels take them, and where each of its sequences lies."""

from dataclasses import dataclass, replace
from typing import NamedTuple

import cutlass
import cutlass.cute as cute
from cutlass import Int32

from mini_flash_attention.kernels import calls
from mini_flash_attention.kernels.calls import Backward, Forward, Ragged
from mini_flash_attention.kernels.parts.blocks import Walk, walk, walk_of_part


@dataclass(frozen=True)
class Sizes:
    seqlen_q: Int32
    seqlen_k: Int32
    heads: Int32
    batch: Int32
    group: Int32  # query heads for each key and value head
    window_left: Int32  # read only where the mask kind limits that side
    window_right: Int32

    def window(self, mask: str) -> tuple[Int32 | None, Int32 | None]:
        """(left, right) for blocks.py and for `mask`; None where the mask kind has no limit."""
        left = self.window_left if mask == "window" else None
        right = self.window_right if mask != "full" else None
        return left, right

    def for_blocks(self, config) -> tuple:
        """What blocks.py takes beside the number of a block."""
        return config.tile_m, config.tile_n, self.seqlen_q, self.seqlen_k, *self.window(config.mask)

    def walk(self, config, m_block: Int32) -> Walk:
        """blocks.walk of query block m_block."""
        return walk(m_block, *self.for_blocks(config))

    def walk_of_wg(self, config, m_block: Int32, wg: Int32) -> Walk:
        """blocks.walk_of_part of the rows of a warpgroup.

        A later start than this would wait for slots that other warpgroups hold, which may wait for this one.
        """
        return walk_of_part(m_block, config.wgs, wg, config.stages - 1, *self.for_blocks(config))

    def of(self, seqlen_q: Int32, seqlen_k: Int32) -> "Sizes":
        """Those of one sequence of a ragged batch."""
        return replace(self, seqlen_q=seqlen_q, seqlen_k=seqlen_k, batch=Int32(1))


def sizes_of(config, call: Forward | Backward) -> Sizes:
    """The sizes of a call; ragged: seqlen_q is q's second mode, seqlen_k the tokens of a storage row."""
    batch, seqlen_q, heads, _ = call.mQ.shape
    _, seqlen_k, heads_k, _ = call.mK.shape
    if call.ragged is not None:
        batch = call.ragged.batch
        if config.page:
            seqlen_k = seqlen_k * call.ragged.block_table.shape[1]
    return Sizes(seqlen_q, seqlen_k, heads, batch, heads // heads_k, call.window_left, call.window_right)


class Queries(NamedTuple):
    """One sequence's rows of q."""

    batch: Int32  # index into q's first mode
    start: Int32  # of its first row
    seqlen: Int32


class Keys(NamedTuple):
    """One sequence's keys: token start + j of a storage row is key j."""

    batch: Int32  # the storage row: index into k's first mode, or row of the block table
    start: Int32
    seqlen: Int32


@cute.jit
def clamp(x: Int32, low: Int32, high: Int32) -> Int32:
    return cutlass.max(low, cutlass.min(x, high))


@cute.jit
def queries(ragged: Ragged, b: Int32, rows: Int32) -> Queries:
    """Sequence b's queries; rows: q.shape[1]. They lie in q whatever the tensors say."""
    batch, start, end = b, Int32(0), rows
    if ragged.given & calls.CU_SEQLENS_Q:
        batch = Int32(0)
        start = clamp(ragged.cu_seqlens_q[b], Int32(0), rows)
        end = clamp(ragged.cu_seqlens_q[b + 1], start, rows)
    return Queries(batch, start, end - start)


@cute.jit
def keys(ragged: Ragged, b: Int32, capacity: Int32) -> Keys:
    """Sequence b's keys; capacity: tokens of a storage row. They lie in it whatever the tensors say."""
    batch, start, end = b, Int32(0), ragged.keys
    limit = capacity
    if ragged.given & calls.BATCH_IDX:
        batch = ragged.batch_idx[b]
    if ragged.given & calls.CU_SEQLENS_K:
        batch = Int32(0)
        start = clamp(ragged.cu_seqlens_k[b], Int32(0), capacity)
        end = limit = clamp(ragged.cu_seqlens_k[b + 1], start, capacity)
    if ragged.given & calls.SEQUSED_K:
        end = start + ragged.seqused_k[b]
    end = clamp(end + ragged.added, start, limit)
    if ragged.given & calls.LEFTPAD_K:
        start = clamp(start + ragged.leftpad_k[b], start, end)
    return Keys(batch, start, end - start)
