"""Decoding on the GPU: when it is the faster way, and over how many splits of the keys.

All that is decided here follows from sizes that the host knows. How many keys each sequence has, it does not:
that stands in GPU memory, and the kernel divides what it finds.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mini_flash_attention.counters import unused_counter
from mini_flash_attention.gpu import compile, config
from mini_flash_attention.plans import (
    Like,
    Score,
    argument,
    dtype_name,
    like_lse,
    like_q,
    results,
    score_kind,
    score_numbers,
    simple,
    unread,
    with_slopes,
)
from mini_flash_attention.problem import MAX_SPLITS, Problem
from mini_flash_attention.workspace import COUNTERS, workspace

MAX_BLOCKS = 128  # of a split; beyond, a long sequence among short ones would have too few thread blocks
# Of an H100, from times of decodes with 1 to 128 splits (docs/worklog.md); µs, and bytes a µs.
LATENCY = 0.4  # of a key block, in a thread block that has the memory for itself
BANDWIDTH_ALONE = 177e3  # beyond that
BANDWIDTH_OF_SM = 23e3  # with all SMs at work
START = 0.5  # another thread block for each SM
UNEVEN = 0.16  # of the time that all need together, if some SMs have a thread block more than others
MERGE, MERGE_SPLIT = 1.4, 0.03  # of all splits, and of each
# TFLOP/s that mma.sync and wgmma reach on an H100 (docs/worklog.md).
MMA_RATE, WGMMA_RATE = 350, 650
FORWARD_TILE_M = 128


class DecodePlan(NamedTuple):
    """A kernel and the numbers it takes, for all calls of one problem; used like dispatch.ForwardPlan."""

    launch: Callable | None  # None: nothing to compute
    simple: bool  # these five as in ForwardPlan
    device: int
    q: Like
    lse: Like
    unread_lse: Any | None
    score: Score
    window: tuple[int, int]
    num_splits: int
    partial: int  # float32 that combine.partial takes
    tiles: int  # each has a counter, and its last thread block merges the splits; 0 if none does
    unused: tuple[Any, Any] | None  # what stands for memory and counters if there is one split

    def run(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        alibi_slopes: Tensor | None,
        ragged: tuple,
        out: Tensor | None,
        with_lse: bool,
    ) -> tuple[Tensor, Tensor | None]:
        if torch._C._cuda_getDevice() != self.device:
            with torch.cuda.device(self.device):
                return self.run(q, k, v, alibi_slopes, ragged, out, with_lse)
        out, lse = results(self, q, out, with_lse)
        memory, counters = self.unused
        if self.num_splits > 1:
            memory, counters = workspace(self.partial, self.tiles, self.device)
        score = self.score if alibi_slopes is None else with_slopes(self.score, alibi_slopes, q, ragged)
        left, right = self.window
        splits = self.num_splits, int(self.tiles > 0), counters
        self.launch((q, k, v, out, lse, memory, score, left, right, ragged, *splits))
        return out, lse if with_lse else None


@functools.lru_cache(maxsize=4096)
def plan(problem: Problem, num_splits: int) -> DecodePlan:
    """How to decode; num_splits: 0 if it is to be chosen here."""
    device = problem.device.index
    q, lse, score = like_q(problem), like_lse(problem), score_numbers(problem)
    window = (
        problem.seqlen_k if problem.window_left is None else problem.window_left,
        problem.seqlen_q if problem.window_right is None else problem.window_right,
    )
    if 0 in (problem.batch, problem.seqlen_q, problem.seqlen_k):
        return DecodePlan(None, False, device, q, lse, None, score, window, 1, 0, 0, None)
    properties = torch.cuda.get_device_properties(device)
    row = decode_config(problem, config.gpu_arch((properties.major, properties.minor)))
    num_splits = num_splits or choose_splits(problem, row, properties.multi_processor_count)
    kernel = compile.get(row)
    tensors = q, lse, unread(lse[0], device)
    partial = num_splits * math.prod(lse[0]) * (q[0][-1] + 1)
    splits = num_splits, partial, fused_tiles(problem, row, num_splits)
    memory = torch.empty(1, dtype=torch.float32, device=problem.device)
    unused = argument(memory), argument(unused_counter(device))
    return DecodePlan(kernel, simple(problem), device, *tensors, score, window, *splits, unused)


def decode_config(problem: Problem, arch: str) -> config.Decode:
    """The static facts of a problem: what is compiled."""
    return config.decode(
        arch,
        dtype_name(problem),
        config.bucket(problem.head_dim),
        problem.longest_q * problem.group,
        score_kind(problem),
        int(problem.page_size > 0),
    )


def choose_splits(problem: Problem, row: config.Decode, num_sms: int) -> int:
    """Into how many parts to divide the keys of each tile."""
    tiles = problem.heads_k * tiles_of(problem, problem.group, row.tile_m)
    rows = min(problem.longest_q * problem.group, row.tile_m)
    keys = problem.seqlen_k
    if problem.window_left is not None:
        keys = min(keys, problem.window_left + problem.longest_q)
    blocks = -(-keys // row.tile_n)
    return best_splits(tiles, rows / row.tile_n, blocks, row.block_size, num_sms, row.resident)


def best_splits(tiles: int, rows: float, blocks: int, block_size: int, num_sms: int, resident: int) -> int:
    """The number of splits with the least estimated time, the smallest of those.

    A thread block alone is bound by how much it has on the way, all together by the memory. With a tile for
    each SM there is no need to split.

    Args:
        tiles: thread blocks that a split takes.
        rows: of a tile, in blocks of keys: writing and reading a row's part of O takes twice as long as
            reading a key and its value.
        blocks: key blocks of a tile.
        block_size: bytes of K and V in a block.
        resident: thread blocks that an SM holds.
    """
    fewest = min(MAX_SPLITS, -(-blocks // MAX_BLOCKS))

    def time(splits: int) -> float:
        """In µs, without what all have in common."""
        length = -(-blocks // splits)
        splits = -(-blocks // length)
        per_sm = splits * tiles / num_sms
        alone = math.ceil(per_sm / resident) * length * (LATENCY + block_size / BANDWIDTH_ALONE)
        moved = tiles * (blocks + (2 * rows * splits if splits > 1 else 0))
        together = moved * block_size / (num_sms * BANDWIDTH_OF_SM)
        if per_sm > 1:
            together *= 1 + UNEVEN * (math.ceil(per_sm) / per_sm - 1)
        merging = MERGE + MERGE_SPLIT * splits if splits > 1 else 0.0
        return (alone**3 + together**3) ** (1 / 3) + START * per_sm + merging

    most = 1 if tiles >= num_sms else min(MAX_SPLITS, blocks)
    return min(range(fewest, max(fewest, most) + 1), key=time)


def fused_tiles(problem: Problem, row: config.Decode, num_splits: int) -> int:
    """How many tiles there are, if the last thread block of each is to merge its splits; else 0.

    That saves the launch of the combine kernel, and is as fast as long as all that it reads is on the way at
    once. Packed queries may lie in more tiles than the host knows of.
    """
    if problem.packed_q or not row.can_merge or not 1 < num_splits <= row.merged_splits:
        return 0
    rows = min(problem.longest_q * problem.group, row.tile_m)
    tiles = problem.heads_k * tiles_of(problem, problem.group, row.tile_m)
    return tiles if rows <= row.warps * row.merged_rows and tiles <= COUNTERS else 0


def pays(problem: Problem, path: str, num_sms: int) -> bool:
    """Whether decoding takes less time than the forward kernels of a path.

    Both are compared by the tensor cores' work, padding of tiles included. Decoding packs the query heads
    that share a key head into a tile, and always has enough thread blocks, by splitting.
    """
    decode_tile = 16 if problem.longest_q * problem.group <= 16 else 64
    decode = problem.heads_k * tiles_of(problem, problem.group, decode_tile) * decode_tile / MMA_RATE
    tiles = problem.heads_q * tiles_of(problem, 1, FORWARD_TILE_M)
    rate = WGMMA_RATE if path == "sm90" else MMA_RATE
    return decode < max(tiles, num_sms) * FORWARD_TILE_M / rate


def tiles_of(problem: Problem, group: int, tile_m: int) -> int:
    """Query tiles of all sequences, for one key head, with `group` rows for each query."""
    each = -(-problem.longest_q * group // tile_m)
    if problem.packed_q:  # no more than if all but the last tile of each sequence are full
        return min(problem.batch * each, problem.seqlen_q * group // tile_m + problem.batch)
    return problem.batch * each
