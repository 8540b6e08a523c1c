"""Which backend serves a problem, and the call of its kernel."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mini_flash_attention import cpu, decode, environment
from mini_flash_attention.counters import tile_counter, unused_counter
from mini_flash_attention.gpu import compile, config
from mini_flash_attention.gpu.config import ELEMENTS
from mini_flash_attention.philox import kernel_arguments
from mini_flash_attention.plans import (
    Like,
    Score,
    argument,
    dtype_name,
    gpu_arch,
    like_lse,
    like_q,
    results,
    score_kind,
    score_numbers,
    simple,
    unread,
    with_slopes,
)
from mini_flash_attention.problem import Layout, Problem

forced_backend = environment.reader("MINI_FLASH_ATTENTION_BACKEND")


def backend(problem: Problem) -> str:
    """Returns "cpu", "sm80" or "sm90": MINI_FLASH_ATTENTION_BACKEND, else the device's best."""
    return choose(problem.device, forced_backend())


@functools.cache
def choose(device: torch.device, forced: str | None) -> str:
    if forced not in (None, "", "cpu", "sm80", "sm90"):
        raise ValueError(f"MINI_FLASH_ATTENTION_BACKEND must be cpu, sm80 or sm90, but was {forced!r}")
    if forced == "cpu" or (device.type != "cuda" and not forced):
        return "cpu"
    if device.type != "cuda":
        raise ValueError(
            f"MINI_FLASH_ATTENTION_BACKEND={forced} needs CUDA tensors, but they are on {device}"
        )
    capability = torch.cuda.get_device_capability(device)
    if capability < (8, 0):
        raise RuntimeError(
            "mini-flash-attention needs a GPU of compute capability 8.0 (Ampere) or newer, but "
            f"{torch.cuda.get_device_name(device)} has {capability[0]}.{capability[1]}; "
            "MINI_FLASH_ATTENTION_BACKEND=cpu runs on it with PyTorch operations"
        )
    try:
        paths = config.paths(config.gpu_arch(capability))
    except ValueError as error:
        raise RuntimeError(
            f"{torch.cuda.get_device_name(device)} is newer than this version of mini-flash-attention "
            f"({error}); MINI_FLASH_ATTENTION_BACKEND=cpu runs on it with PyTorch operations"
        ) from error
    if forced and forced not in paths:
        raise RuntimeError(f"MINI_FLASH_ATTENTION_BACKEND={forced} does not run on {device}")
    return forced or paths[0]


def forward(
    problem: Problem,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    alibi_slopes: Tensor | None,
    seed: int | None,
    layout: Layout | None = None,
    out: Tensor | None = None,
    with_lse: bool = True,
) -> tuple[Tensor, Tensor | None]:
    """out, like q, and lse (batch, heads_q, seqlen_q), or (heads_q, total_q) where q is packed.

    With `out` given, the result is written there. GPU: rows of q that are in no sequence have no result.
    Without `with_lse` there need be no lse.
    """
    plan = forward_plan(problem, forced_backend())
    if plan is None:
        with torch.autocast(problem.device.type, enabled=False):
            return cpu.forward(problem, q, k, v, alibi_slopes, seed, layout, out)
    if problem.dropout_p:
        plan = plan._replace(dropout=kernel_arguments(seed, problem.dropout_p))
    if layout is None and out is None and plan.simple and ready(q, k, v):
        return plan.run(q, k, v, alibi_slopes, None, None, with_lse)
    ragged = None if layout is None else ragged_arguments(problem, layout, keys=problem.seqlen_k, added=0)
    return forward_ragged(plan, problem, q, k, v, alibi_slopes, ragged, out, with_lse)


def backward(
    problem: Problem,
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    alibi_slopes: Tensor | None,
    seed: int | None,
    layout: Layout | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk, dv, like q, k, v."""
    plan = backward_plan(problem, forced_backend())
    if plan is None:
        with torch.autocast(problem.device.type, enabled=False):
            return cpu.backward(problem, dout, dlse, q, k, v, out, lse, alibi_slopes, seed, layout)
    if plan.launch is None:
        return torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
    ragged = None
    if layout is not None:
        ragged = ragged_arguments(problem, layout, keys=problem.seqlen_k, added=0)
    q, out, dout, lse, dlse = as_batches(problem.packed_q, q, out, dout, lse, dlse)
    k, v = as_batches(problem.packed_k, k, v)
    q, k, v, out, dout = for_kernels(problem, q, k, v, out, dout)
    dropout = kernel_arguments(seed, problem.dropout_p) if problem.dropout_p else None
    dq, dk, dv = plan.run(dout, dlse, q, k, v, out, lse, alibi_slopes, ragged, dropout)
    if problem.softmax_scale <= 0:
        dq = -dq if problem.softmax_scale < 0 else torch.zeros_like(dq)
    if problem.packed_q:
        dq = dq.squeeze(0)
    if problem.packed_k:
        dk, dv = dk.squeeze(0), dv.squeeze(0)
    return tuple(dx[..., : problem.head_dim] for dx in (dq, dk, dv))


def dropout_probabilities(
    problem: Problem,
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    alibi_slopes: Tensor | None,
    seed: int,
    layout: Layout | None = None,
) -> Tensor:
    """S_dmask, for tests: the probabilities (batch, heads_q, seqlen_q, seqlen_k), negative where dropped."""
    with torch.autocast(problem.device.type, enabled=False):
        return cpu.dropout_probabilities(problem, q, k, lse, alibi_slopes, seed, layout)


class ForwardPlan(NamedTuple):
    """A kernel and the numbers it takes, for all calls of one problem."""

    launch: Callable | None  # None: nothing to compute
    simple: bool  # q, k and v can be used as they are, if their strides allow it
    device: int
    q: Like
    lse: Like
    unread_lse: Any | None  # memory for one that nobody wants
    score: Score
    window: tuple[int, int]
    schedule: tuple[int | Tensor, ...]  # the kernel's last arguments
    scheduled: bool  # one more is missing: the counter from which the kernel draws its tiles
    dropout: tuple[int, int, int, float] | None = None  # kernels/dropout.py: Dropout, of one call

    def run(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        alibi_slopes: Tensor | None,
        ragged: tuple | None,
        out: Tensor | None,
        with_lse: bool,
    ) -> tuple[Tensor, Tensor | None]:
        if torch._C._cuda_getDevice() != self.device:
            with torch.cuda.device(self.device):
                return self.run(q, k, v, alibi_slopes, ragged, out, with_lse)
        out, lse = results(self, q, out, with_lse)
        score = self.score if alibi_slopes is None else with_slopes(self.score, alibi_slopes, q, ragged)
        arguments = q, k, v, out, lse, score, *self.window, ragged, self.dropout, *self.schedule
        if self.scheduled:
            self.launch((*arguments, tile_counter(self.device)))
        else:
            self.launch(arguments)
        return out, lse if with_lse else None


@functools.lru_cache(maxsize=4096)
def forward_plan(problem: Problem, forced: str | None) -> ForwardPlan | decode.DecodePlan | None:
    """How to compute a problem on the GPU; None: on the CPU backend."""
    path = choose(problem.device, forced)
    if path == "cpu":
        return None
    check_supported(problem)
    device = problem.device.index
    q, lse = like_q(problem), like_lse(problem)
    score, window = score_numbers(problem), window_numbers(problem)
    if 0 in (problem.batch, problem.seqlen_q, problem.seqlen_k):
        return ForwardPlan(None, False, device, q, lse, None, score, window, (), False)
    properties = torch.cuda.get_device_properties(device)
    num_sms = properties.multi_processor_count
    if problem.ragged and not problem.dropout_p and decode.pays(problem, path, num_sms):
        return decode.plan(problem, num_splits=0)
    row = forward_config(problem, path, config.gpu_arch((properties.major, properties.minor)))
    tiles = row.at(problem.longest_q)
    schedule = (swath(tiles, problem, num_sms), None, None)
    scheduled = False
    if row.kernel == "forward.sm90":
        m_blocks = -(-problem.seqlen_q // tiles.tile_m) * problem.batch
        if problem.packed_q:  # scheduler.num_tiles
            m_blocks = problem.seqlen_q // tiles.tile_m + min(problem.batch, problem.seqlen_q)
        scheduled = m_blocks * problem.heads_q > num_sms  # else it draws nothing, and any address will do
        schedule = (schedule[0], num_sms) if scheduled else (schedule[0], num_sms, unused_counter(device))
    kernel = compile.get(row)
    tensors = q, lse, unread(lse[0], device)
    return ForwardPlan(kernel, simple(problem), device, *tensors, score, window, schedule, scheduled)


class BackwardPlan(NamedTuple):
    """A kernel and the numbers it takes, for all backward passes of one problem."""

    launch: Callable | None  # None: all gradients are 0
    device: int
    workspace: config.Workspace
    score: Score
    window: tuple[int, int]
    schedule: tuple[int, ...] = ()  # the kernel's last arguments

    def run(
        self,
        dout: Tensor,
        dlse: Tensor | None,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        alibi_slopes: Tensor | None,
        ragged: tuple | None,
        dropout: tuple | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        if torch._C._cuda_getDevice() != self.device:
            with torch.cuda.device(self.device):
                return self.run(dout, dlse, q, k, v, out, lse, alibi_slopes, ragged, dropout)
        score = self.score if alibi_slopes is None else with_slopes(self.score, alibi_slopes, q, ragged)
        gradients = dq, dk, dv = [
            torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v)
        ]
        stats, dq_acc = (lse.new_empty(shape) for shape in self.workspace[:2])
        turns = lse.new_empty(self.workspace.turns, dtype=torch.int32)
        has_dlse = dlse is not None
        dlse = dlse.contiguous() if has_dlse else lse
        tensors = q, k, v, out, dout, lse, dlse, stats, dq_acc, *gradients
        numbers = score, int(has_dlse), *self.window, ragged, dropout
        self.launch((*tensors, *numbers, turns, *self.schedule))
        return dq, dk, dv


@functools.lru_cache(maxsize=4096)
def backward_plan(problem: Problem, forced: str | None) -> BackwardPlan | None:
    """How to compute a problem's gradients on the GPU; None: on the CPU backend."""
    path = choose(problem.device, forced)
    if path == "cpu":
        return None
    numbers = score_numbers(problem), window_numbers(problem)
    device = problem.device.index
    if 0 in (problem.batch, problem.seqlen_q, problem.seqlen_k):
        return BackwardPlan(None, device, config.Workspace((), (), ()), *numbers)
    row = backward_config(problem, path, gpu_arch(device))
    workspace = config.workspace(row, problem.batch, problem.heads_q, problem.seqlen_q)
    schedule = (None,)
    if row.kernel == "backward.sm90":
        schedule = (torch.cuda.get_device_properties(device).multi_processor_count,)
    return BackwardPlan(compile.get(row), device, workspace, *numbers, schedule)


def backward_config(problem: Problem, path: str, arch: str) -> config.BackwardConfig:
    """The static facts of a problem's backward pass: what is compiled."""
    return config.backward(
        path,
        arch,
        dtype_name(problem),
        config.bucket(problem.head_dim),
        mask_kind(problem),
        problem.deterministic,
        score=score_kind(problem),
        ragged=problem.ragged,
        dropout=problem.dropout_p > 0,
    )


def mask_kind(problem: Problem) -> str:
    if problem.window_left is not None:
        return "window"
    return "full" if problem.window_right is None else "causal"


def window_numbers(problem: Problem) -> tuple[int, int]:
    """(left, right); what a mask kind does not limit is not read, or hides nothing."""
    right = problem.seqlen_q if problem.window_right is None else problem.window_right
    return problem.window_left or 0, right


def forward_config(problem: Problem, path: str, arch: str) -> config.ForwardConfig:
    """The static facts of a problem, and nothing else of it: what is compiled."""
    page = 0
    if problem.page_size:
        page = next((size for size in config.SM90_PAGES if problem.page_size % size == 0), 1)
        if page == 1 or problem.left_padded:  # TMA copies whole pieces of pages
            path = "sm80"
        if path == "sm80":
            page = 1
    return config.forward(
        path,
        arch,
        dtype_name(problem),
        config.bucket(problem.head_dim),
        mask_kind(problem),
        score=score_kind(problem),
        ragged=problem.ragged,
        page=page,
        dropout=problem.dropout_p > 0,
    )


def check_supported(problem: Problem) -> None:
    """Raise NotImplementedError for what the GPU kernels do not do, naming the argument."""
    if problem.dtype not in (torch.float16, torch.bfloat16):
        raise NotImplementedError(
            f"q: the GPU kernels take float16 and bfloat16, not {problem.dtype}; "
            "MINI_FLASH_ATTENTION_BACKEND=cpu takes it"
        )


def swath(row: config.ForwardConfig, problem: Problem, num_sms: int) -> int:
    """How many heads to walk together (kernels/scheduler.py), all swaths of nearly one size.

    Few enough that the thread blocks at work at one time share keys in the L2 cache; enough (4 tiles
    an SM) that the last swath's short tiles even out its long ones. The bounds were measured on an
    H100: docs/worklog.md.
    """
    tiles = -(-problem.longest_q // row.tile_m)
    heads = problem.heads_q * (1 if problem.ragged else problem.batch)  # ragged: of one sequence
    size = min(32, max(problem.head_dim // 8, round(4 * num_sms / tiles)))
    return -(-heads // max(1, round(heads / size)))


def ready(*tensors: Tensor) -> bool:
    """Whether the kernels can read the tensors where they lie."""
    for x in tensors:
        batch, seqlen, heads, unit = x.stride()
        if unit != 1 or (batch | seqlen | heads) % ELEMENTS or x.data_ptr() % 16:
            return False
    return True


def forward_ragged(
    plan: ForwardPlan,
    problem: Problem,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    alibi_slopes: Tensor | None,
    ragged: tuple | None,
    out: Tensor | None,
    with_lse: bool,
) -> tuple[Tensor, Tensor | None]:
    """What is not a plain dense call: packed tensors, pages, and all that needs a copy."""
    q, result = as_batches(problem.packed_q, q, out)
    k, v = as_batches(problem.packed_k, k, v)
    if plan.launch is None:
        done, lse = empty_result(q)
    else:
        if not (plan.simple and ready(q, k, v)):
            q, k, v = for_kernels(problem, q, k, v)
        usable = result is not None and not problem.head_dim % ELEMENTS and ready(result)
        done, lse = plan.run(q, k, v, alibi_slopes, ragged, result if usable else None, with_lse)
        if problem.head_dim % ELEMENTS:
            done = done[..., : problem.head_dim].contiguous()
    if result is not None and done is not result:
        result.copy_(done)
    if problem.packed_q and with_lse:
        lse = lse.squeeze(0)
    if out is not None:
        return out, lse
    return done.squeeze(0) if problem.packed_q else done, lse


def as_batches(packed: bool, *tensors: Tensor | None) -> Sequence[Tensor | None]:
    """Packed tensors as batches of one, which is how kernels take them."""
    return [None if x is None else x.unsqueeze(0) for x in tensors] if packed else tensors


def for_kernels(problem: Problem, q: Tensor, *others: Tensor) -> tuple[Tensor, ...]:
    """The tensors as kernels can read them: copies for the sake of head dims, strides and scales <= 0."""
    if problem.softmax_scale <= 0:  # the kernels take the maximum before they scale
        q = q * -1.0 if problem.softmax_scale < 0 else torch.zeros_like(q)
    tensors, padding = (q, *others), -problem.head_dim % ELEMENTS
    if padding:
        tensors = (torch.nn.functional.pad(x, (0, padding)) for x in tensors)
    return tuple(x if ready(x) else x.clone(memory_format=torch.contiguous_format) for x in tensors)


def ragged_arguments(problem: Problem, layout: Layout, keys: int, added: int) -> tuple:
    """kernels/seqlen.py: Ragged.

    keys: of each sequence, where no tensor tells; added: what this call has appended to them.
    """
    cu_seqlens_q, cu_seqlens_k, seqused_k, leftpad_k, batch_idx, block_table = layout
    none, no_table = not_given(problem.device.index)
    given = (
        (cu_seqlens_q is not None)
        + 2 * (cu_seqlens_k is not None)
        + 4 * (seqused_k is not None)
        + 8 * (leftpad_k is not None)
        + 16 * (batch_idx is not None)
    )
    return (
        none if cu_seqlens_q is None else cu_seqlens_q,
        none if cu_seqlens_k is None else cu_seqlens_k,
        none if seqused_k is None else seqused_k,
        none if leftpad_k is None else leftpad_k,
        none if batch_idx is None else batch_idx,
        no_table if block_table is None else block_table,
        given,
        keys,
        added,
        problem.batch,
        problem.longest_q,
    )


@functools.cache
def not_given(device: int) -> tuple[Any, Any]:
    """What stands for a tensor that is not given, of one and of two dimensions."""
    unused = unused_counter(device)
    return argument(unused), argument(unused.unsqueeze(0))


def empty_result(q: Tensor) -> tuple[Tensor, Tensor]:
    """No keys (or no queries): out 0, LSE -inf."""
    batch, seqlen_q, heads, _ = q.shape
    lse = q.new_full((batch, heads, seqlen_q), -torch.inf, dtype=torch.float32)
    return torch.zeros_like(q), lse
