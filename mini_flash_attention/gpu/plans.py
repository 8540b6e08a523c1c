"""What to launch for a Problem: a kernel, and all that it is given beside the tensors of a call.

A plan serves every call of its problem. It is made once (backend.py remembers it): here it is decided whether
decoding pays, which kernel is compiled, over how many splits, in which order of tiles.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mini_flash_attention.gpu import compile, config, inputs, memory, splits
from mini_flash_attention.gpu.fast import Like
from mini_flash_attention.kernels.calls import Append, Blocks, Decode, Forward, Ragged, Rotary, Score, record
from mini_flash_attention.problem import CacheUpdate, Maybe, Problem

Tensors = tuple[Tensor, Tensor, Tensor, Tensor, Any]  # q, k, v, out, lse


class Results(NamedTuple):
    """Of what shape and layout results are, and how q, k and v become what the kernel takes."""

    out: Like
    lse: Like
    unread_lse: Any | None  # memory for one that nobody wants
    sign: int  # of the softmax scale: inputs.signed
    whole: bool  # head dims need no padding
    direct: bool  # the kernel takes q, k and v as they are, and makes out as it is, if strides allow it


class ForwardPlan(NamedTuple):
    launch: Callable | Maybe  # None: nothing to compute
    device: int
    results: Results
    score: Score  # without what a call captures: slopes, and what functions use
    window: tuple[int, int] = (0, 0)
    dropout_p: float = 0.0
    swath: int = 0
    num_sms: int | None = None
    counter: Any | None = None  # None: each call has its own

    def call(
        self,
        tensors: Tensors,
        score: Score,
        ragged: Ragged | None,
        seed: Tensor | Maybe,
        sinks: Tensor | None,
        blocks: Blocks | None = None,
    ) -> Forward:
        counter = self.counter
        if counter is None and self.num_sms is not None:
            counter = memory.tile_counter(self.device)
        dropout = inputs.dropout(seed, self.dropout_p) if self.dropout_p else None
        numbers = score, *self.window, ragged, dropout, sinks, self.swath, blocks, self.num_sms, counter
        return record(Forward, (*tensors, *numbers))


class DecodePlan(NamedTuple):
    launch: Callable
    device: int
    results: Results
    score: Score  # as in ForwardPlan
    window: tuple[int, int]
    num_splits: int
    partial: int  # float32 that combine.partial takes
    fused_tiles: int  # each has a counter, and its last thread block merges the splits; 0 if none does
    unused: tuple[Any, Any]  # what stands for workspace and counters if there is one split

    def call(
        self, tensors: Tensors, score: Score, ragged: Ragged | None, seed: Tensor | None, sinks: Tensor | None
    ) -> Decode:
        q, k, v, out, lse = tensors
        left, right = self.window
        splits, fused_tiles = self.num_splits, self.fused_tiles
        workspace, counters = self.unused
        if splits > 1:
            workspace, counters = memory.workspace(self.partial, fused_tiles, self.device)
        fused = int(fused_tiles > 0)
        places = score, left, right, ragged, sinks
        return record(Decode, (q, k, v, out, lse, workspace, *places, splits, fused, counters))


class BackwardPlan(NamedTuple):
    launch: Callable | Maybe  # None: all gradients are 0
    device: int
    sign: int  # of the softmax scale
    score: Score  # as in ForwardPlan
    window: tuple[int, int]
    dropout_p: float
    workspace: config.Workspace
    heads_per_tile: int  # query heads of a group that a thread block walks
    num_sms: int | None = None
    sparse: bool = False  # the kernel takes the lists of a block mask; if not, it visits every block


class AppendPlan(NamedTuple):
    """The kernel that appends to a cache."""

    launch: Callable
    device: int
    q: Like
    advance: int  # whether each query is rotated to a position of its own

    def call(
        self, q: Tensor, q_out: Tensor | None, k: Tensor, v: Tensor, update: CacheUpdate, ragged: Ragged
    ) -> Append:
        if q_out is None:
            return Append(update.k, update.v, k, v, None, None, None, self.advance, ragged)
        rotary = Rotary(update.rotary_cos, update.rotary_sin)
        return Append(update.k, update.v, k, v, q, q_out, rotary, self.advance, ragged)


def attention(problem: Problem, path: str) -> ForwardPlan | DecodePlan:
    """Decoding where it pays or splits are asked for, else the forward kernels."""
    if problem.dtype not in (torch.float16, torch.bfloat16):
        raise NotImplementedError(
            f"q: the GPU kernels take float16 and bfloat16, not {problem.dtype}; "
            "MINI_FLASH_ATTENTION_BACKEND=cpu takes it"
        )
    if problem.empty:
        return ForwardPlan(None, problem.device.index, results(problem, False), score(problem))
    if not problem.dropout_p and not problem.sparse:
        row = decode_config(problem, arch_of(problem))
        if is_decoded(problem, row, path):
            return decode(problem, row)
    return forward(problem, path)


def forward(problem: Problem, path: str) -> ForwardPlan:
    device, num_sms = problem.device.index, sms(problem)
    row = forward_config(problem, path, arch_of(problem))
    tiles = row.at(problem.tiled_for)
    persistent: tuple[Any, ...] = ()
    if row.kernel == "forward.sm90":
        m_blocks = -(-problem.seqlen_q // tiles.tile_m) * problem.batch
        if problem.packed_q:  # scheduler.num_tiles
            m_blocks = problem.seqlen_q // tiles.tile_m + min(problem.batch, problem.seqlen_q)
        drawn = m_blocks * problem.heads_q > num_sms  # else no tile is, and any address will do
        persistent = num_sms, None if drawn else memory.unused(device)
    schedule = problem.dropout_p, swath(tiles, problem, num_sms), *persistent
    return ForwardPlan(compile.get(row), device, results(problem), score(problem), window(problem), *schedule)


def decode(problem: Problem, row: config.Decode) -> DecodePlan:
    device = problem.device.index
    num_splits = problem.num_splits or splits.best_splits(decoding(problem, row), sms(problem))
    of_results = results(problem)
    partial = num_splits * math.prod(of_results.lse[0]) * (of_results.out[0][-1] + 1)
    limits = (
        problem.seqlen_k if problem.window_left is None else problem.window_left,
        problem.seqlen_q if problem.window_right is None else problem.window_right,
    )
    none, _, no_floats = memory.not_given(device)
    work = num_splits, partial, fused_tiles(problem, row, num_splits), (no_floats, none)
    return DecodePlan(compile.get(row), device, of_results, score(problem), limits, *work)


def backward(problem: Problem, path: str) -> BackwardPlan:
    numbers = problem.device.index, sign(problem), score(problem), window(problem), problem.dropout_p
    if problem.empty:
        return BackwardPlan(None, *numbers, config.Workspace((), (), (), (), ()), problem.group)
    row = backward_config(problem, path, arch_of(problem))
    per = heads_per_tile(problem, row)
    q, k = (problem.seqlen_q, problem.heads_q), (problem.seqlen_k, problem.heads_k * (per < problem.group))
    workspace = config.workspace(row, problem.batch, q, k, problem.packed_k)
    num_sms = sms(problem) if row.kernel == "backward.sm90" else None
    return BackwardPlan(compile.get(row), *numbers, workspace, per, num_sms, row.sparse)


def append(problem: Problem, rotary: str) -> AppendPlan:
    """rotary: one of config.ROTARY."""
    row = config.KvAppend(arch_of(problem), dtype_name(problem), rotary, int(problem.page_size > 0))
    return AppendPlan(compile.get(row), problem.device.index, like_q(problem), int(problem.windowed))


# What is compiled: the static facts of a problem, and nothing else of it


def forward_config(problem: Problem, path: str, arch: str) -> config.ForwardConfig:
    page = 0
    if problem.page_size:
        page = next((size for size in config.SM90_PAGES if problem.page_size % size == 0), 1)
        if page == 1 or problem.left_padded:  # TMA copies whole pieces of pages
            path = "sm80"
        if path == "sm80":
            page = 1
    features = _features(problem)
    return config.forward(path, arch, *_facts(problem), **features, page=page, sinks=problem.sinks)


def backward_config(problem: Problem, path: str, arch: str) -> config.BackwardConfig:
    features = _features(problem)
    # Turns are those of all blocks, and the sm80 kernels know no others: each is visited, and masked.
    if problem.deterministic or path == "sm80":
        del features["sparse"]
    return config.backward(path, arch, *_facts(problem), problem.deterministic, **features)


def decode_config(problem: Problem, arch: str) -> config.Decode:
    rows, page = problem.longest_q * problem.group, int(problem.page_size > 0)
    head_dim = config.bucket(problem.head_dim)
    kinds = problem.scoring, page, problem.sinks
    return config.decode(arch, dtype_name(problem), head_dim, rows, *kinds)


def _facts(problem: Problem) -> tuple[str, int, str]:
    mask = "full" if problem.window_right is None else "causal"
    if problem.window_left is not None:
        mask = "window"
    return dtype_name(problem), config.bucket(problem.head_dim), mask


def _features(problem: Problem) -> dict[str, Any]:
    of_call = {"ragged": problem.ragged, "dropout": problem.dropout_p > 0, "sparse": problem.sparse}
    return {"score": problem.scoring, **of_call}


def dtype_name(problem: Problem) -> str:
    return str(problem.dtype).removeprefix("torch.")


def arch_of(problem: Problem) -> str:
    return config.gpu_arch(torch.cuda.get_device_capability(problem.device))


def sms(problem: Problem) -> int:
    return torch.cuda.get_device_properties(problem.device).multi_processor_count


# The numbers of a problem


def score(problem: Problem) -> Score:
    """The scale without its sign, and 1 for 0: inputs.signed; and the first of what scoring captures."""
    return Score(abs(problem.softmax_scale) or 1.0, (problem.softcap,) if problem.softcap else None)


def sign(problem: Problem) -> int:
    return (problem.softmax_scale > 0) - (problem.softmax_scale < 0)


def window(problem: Problem) -> tuple[int, int]:
    """(left, right); what a mask kind does not limit is not read, or hides nothing."""
    right = problem.seqlen_q if problem.window_right is None else problem.window_right
    return problem.window_left or 0, right


def results(problem: Problem, computed: bool = True) -> Results:
    """computed: whether a kernel writes them."""
    lse = contiguous((_rows(problem), problem.heads_q, problem.seqlen_q), torch.float32)
    unread = memory.unread(lse[0], problem.device.index) if computed else None
    whole, packed = problem.head_dim % config.ELEMENTS == 0, problem.packed_q or problem.packed_k
    direct = computed and whole and sign(problem) > 0 and not packed
    return Results(like_q(problem), lse, unread, sign(problem), whole, direct)


def like_q(problem: Problem) -> Like:
    """A contiguous q as kernels take it: four modes, the last a multiple of 16 bytes."""
    row = -(-problem.head_dim // config.ELEMENTS) * config.ELEMENTS
    return contiguous((_rows(problem), problem.seqlen_q, problem.heads_q, row), problem.dtype)


def contiguous(shape: tuple[int, ...], dtype: torch.dtype) -> Like:
    return shape, tuple(math.prod(shape[i + 1 :]) for i in range(len(shape))), dtype


def _rows(problem: Problem) -> int:
    return 1 if problem.packed_q else problem.batch


# The order of tiles, and how many there are


def swath(row: config.ForwardConfig, problem: Problem, num_sms: int) -> int:
    """How many heads to walk together (kernels/parts/scheduler.py), all swaths of nearly one size.

    Few enough that the thread blocks at work at one time share keys in the L2 cache; enough (4 tiles
    an SM) that the last swath's short tiles even out its long ones. The bounds were measured on an
    H100: docs/worklog.md.
    """
    tiles = -(-problem.longest_q // row.tile_m)
    heads = problem.heads_q * (1 if problem.ragged else problem.batch)  # ragged: of one sequence
    size = min(32, max(problem.head_dim // 8, round(4 * num_sms / tiles)))
    return -(-heads // max(1, round(heads / size)))


def heads_per_tile(problem: Problem, row: config.BackwardConfig) -> int:
    """Query heads of a group that a thread block of the backward pass walks."""
    if problem.ragged and problem.batch * problem.seqlen_k * row.head_dim >= 1 << 31:
        return problem.group  # the sums of dK and dV would lie beyond what 32 bits address in a head
    steps, key_blocks = -(-problem.longest_q // row.tile_m), -(-problem.seqlen_k // row.tile_n)
    if problem.window_left is not None and problem.window_right is not None:
        seen = problem.window_left + problem.window_right + row.tile_n
        steps = min(steps, -(-seen // row.tile_m))
    if not problem.packed_k:
        key_blocks *= problem.batch
    shape, uneven = (row.tile_m, row.tile_n), row.mask == "causal"
    return splits.heads_per_tile(
        problem.group, key_blocks * problem.heads_k, steps, uneven, shape, sms(problem)
    )


def decoding(problem: Problem, row: config.Decode) -> splits.Decoding:
    """Of what size the work is."""
    rows, keys = min(problem.longest_q * problem.group, row.tile_m), problem.seqlen_k
    if problem.packed_k:  # of all sequences
        keys = -(-keys // problem.batch)
    if problem.window_left is not None:
        keys = min(keys, problem.window_left + problem.longest_q)
    tiles, storages = decode_tiles(problem, row.tile_m), problem.batch * problem.heads_k
    of_row = row.head_dim, row.tile_n, row.resident, row.can_merge and not problem.packed_q
    return splits.Decoding(tiles, storages, rows, keys, *of_row)


def fused_tiles(problem: Problem, row: config.Decode, num_splits: int) -> int:
    """How many tiles there are, if the last thread block of each is to merge its splits; else 0.

    That saves the launch of the combine kernel, and is as fast as long as all that it reads is on the way at
    once. Packed queries may lie in more tiles than the host knows of.
    """
    if problem.packed_q or not row.can_merge or not 1 < num_splits <= row.merged_splits:
        return 0
    rows = min(problem.longest_q * problem.group, row.tile_m)
    tiles = decode_tiles(problem, row.tile_m)
    return tiles if rows <= row.warps * row.merged_rows and tiles <= memory.COUNTERS else 0


def is_decoded(problem: Problem, row: config.Decode, path: str) -> bool:
    """Whether the decode kernels are to run.

    One split is a promise, too: what a sequence becomes does not depend on what else is in the batch. So
    neither does this; packed, sequences of one query and of thousands may be in one, and only the forward
    kernels take both.
    """
    if problem.num_splits == 1:
        return not problem.packed_q and problem.longest_q * problem.group <= row.tile_m
    return problem.num_splits > 1 or decoding_pays(problem, row, path)


def decoding_pays(problem: Problem, row: config.Decode, path: str) -> bool:
    """Whether the decode kernels take less time than the forward kernels, by the models of both."""
    num_sms, work = sms(problem), decoding(problem, row)
    tiles = problem.heads_q * tiles_of(problem, 1, splits.FORWARD_TILE_M)
    forward = splits.forward_time(work, tiles, path == "sm90", num_sms)
    return splits.decode_time(work, splits.best_splits(work, num_sms), num_sms) < forward


def decode_tiles(problem: Problem, tile_m: int) -> int:
    """Tiles of all key heads, if the query heads of each are packed."""
    return problem.heads_k * tiles_of(problem, problem.group, tile_m)


def tiles_of(problem: Problem, group: int, tile_m: int) -> int:
    """Query tiles of all sequences, for one key head, with `group` rows for each query."""
    each = -(-problem.longest_q * group // tile_m)
    if problem.packed_q:  # no more than if all but the last tile of each sequence are full
        return min(problem.batch * each, problem.seqlen_q * group // tile_m + problem.batch)
    return problem.batch * each
