"""Decoding on the GPU: when it is the faster way, and over how many splits of the keys.

All that is decided here follows from sizes that the host knows. How many keys each sequence has, it does not:
that stands in GPU memory, and the kernel divides what it finds.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mini_flash_attention import compile, config
from mini_flash_attention.counters import unused_counter
from mini_flash_attention.plans import (
    ContiguousQ,
    Score,
    contiguous_q,
    dtype_name,
    results,
    score_kind,
    score_numbers,
    simple,
    unread,
    with_slopes,
)
from mini_flash_attention.problem import MAX_SPLITS, Problem
from mini_flash_attention.workspace import COUNTERS, workspace

MIN_BLOCKS = 4  # key blocks of a split: fewer take less time than a thread block's start and end
MAX_BLOCKS = 128  # beyond, a long sequence among short ones would have too few thread blocks
# In blocks' time (64 keys of head dim 128: 3 µs, as an H100's memory has many thread blocks to serve):
START = 0.5  # of a thread block, until its first keys are there
COMBINE = 1.0  # launching the combine kernel
FUSED_ROUNDS = 2  # in which a thread block merges the splits of its tile, at most
# TFLOP/s that mma.sync and wgmma reach on an H100 (docs/worklog.md).
MMA_RATE, WGMMA_RATE = 350, 650
FORWARD_TILE_M = 128


class DecodePlan(NamedTuple):
    """A kernel and the numbers it takes, for all calls of one problem; used like dispatch.ForwardPlan."""

    launch: Callable | None  # None: nothing to compute
    simple: bool  # these five as in ForwardPlan
    device: int
    contiguous_q: ContiguousQ
    lse: Tensor
    unread_lse: Any | None
    partial: Tensor  # what combine.partial says, all one element; with one split an element, not used
    score: Score
    window: tuple[int, int]
    num_splits: int
    min_blocks: int
    fused: int  # 1: the decode kernel merges the splits, 0: the combine kernel does
    tiles: int  # fused: each of them has a counter

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
        memory, counters = self.partial, unused_counter(self.device)
        if self.num_splits > 1:
            memory, counters = workspace(self.partial, self.tiles, self.device)
        score = self.score if alibi_slopes is None else with_slopes(self.score, alibi_slopes, q, ragged)
        left, right = self.window
        splits = self.num_splits, self.min_blocks, self.fused, counters
        self.launch(q, k, v, out, lse, memory, score, left, right, ragged, *splits)
        return out, lse if with_lse else None


@functools.lru_cache(maxsize=4096)
def plan(problem: Problem, num_splits: int) -> DecodePlan:
    """How to decode; num_splits: 0 if it is to be chosen here."""
    device = problem.device.index
    element = torch.empty(1, dtype=torch.float32, device=problem.device)
    shape = 1 if problem.packed_q else problem.batch, problem.heads_q, problem.seqlen_q
    lse = element.expand(shape)
    like, score = contiguous_q(problem), score_numbers(problem)
    window = (
        problem.seqlen_k if problem.window_left is None else problem.window_left,
        problem.seqlen_q if problem.window_right is None else problem.window_right,
    )
    if 0 in (problem.batch, problem.seqlen_q, problem.seqlen_k):
        return DecodePlan(None, False, device, like, lse, None, element, score, window, 1, 1, 0, 0)
    properties = torch.cuda.get_device_properties(device)
    row = decode_config(problem, config.gpu_arch((properties.major, properties.minor)))
    min_blocks = 1 if num_splits else MIN_BLOCKS
    num_splits = num_splits or choose_splits(problem, row, properties.multi_processor_count)
    partial = element
    if num_splits > 1:
        partial = element.expand(num_splits * lse.numel() * (like[0][-1] + 1))
    tiles = problem.heads_k * tiles_of(problem, problem.group, row.tile_m)
    fused = num_splits > 1 and tiles <= COUNTERS and fuses(problem, row, num_splits)
    kernel = compile.get(row)
    tensors = like, lse, unread(shape, device), partial
    splits = num_splits, min_blocks, int(fused), tiles if fused else 0
    return DecodePlan(kernel, simple(problem), device, *tensors, score, window, *splits)


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
    rows = problem.longest_q * problem.group
    tiles = problem.heads_k * tiles_of(problem, problem.group, row.tile_m)
    blocks = -(-problem.seqlen_k // row.tile_n)
    return best_splits(tiles, min(rows, row.tile_m) / row.tile_n, blocks, num_sms, row.resident)


def fuses(problem: Problem, row: config.Decode, num_splits: int) -> bool:
    """Whether the thread block of a tile that is done last merges its splits faster than the combine kernel.

    It saves a launch, but has only its own warps, a row for each, and an SM's share of the memory's speed.
    Packed queries may lie in more tiles than the host knows of.
    """
    if problem.packed_q or not row.fuses:
        return False
    rows = min(problem.longest_q * problem.group, row.tile_m)
    return -(-rows // row.warps) * -(-num_splits // row.merged_splits) <= FUSED_ROUNDS


def best_splits(tiles: int, rows: float, blocks: int, num_sms: int, resident: int) -> int:
    """The number of splits with the least estimated time, the smallest of those.

    Memory serves all thread blocks alike, so that time is bytes, as long as there is a thread block for
    each SM; with fewer, loads in flight run short.

    Args:
        tiles: thread blocks that a split takes.
        rows: of a tile, in blocks of keys: writing and reading a row's part of O takes twice as long as
            reading a key and its value.
        blocks: key blocks of a tile.
        resident: thread blocks that an SM holds.
    """
    slots = num_sms * resident
    fewest = min(MAX_SPLITS, -(-blocks // MAX_BLOCKS))

    def time(splits: int) -> float:
        length = -(-blocks // splits)
        splits = -(-blocks // length)
        full_rounds, rest = divmod(splits * tiles, slots)
        rounds = full_rounds + (rest > 0)
        reading = length * (full_rounds * slots + (max(rest, num_sms) if rest else 0))
        merging = COMBINE * slots + 2 * rows * splits * tiles if splits > 1 else 0.0
        return reading + START * rounds * slots + merging

    return min(range(fewest, max(fewest, min(MAX_SPLITS, blocks // MIN_BLOCKS)) + 1), key=time)


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
