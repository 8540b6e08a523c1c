"""Which backend serves a problem, and the call of its kernel."""

import functools
import os
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from mini_flash_attention import compile, config, cpu
from mini_flash_attention.config import ELEMENTS
from mini_flash_attention.counters import tile_counter, unused_counter
from mini_flash_attention.problem import Problem


def backend(problem: Problem) -> str:
    """Returns "cpu", "sm80" or "sm90": MINI_FLASH_ATTENTION_BACKEND, else the device's best."""
    return choose(problem.device, os.environ.get("MINI_FLASH_ATTENTION_BACKEND"))


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
) -> tuple[Tensor, Tensor]:
    """out (batch, seqlen_q, heads_q, head_dim) and lse (batch, heads_q, seqlen_q)."""
    plan = forward_plan(problem, os.environ.get("MINI_FLASH_ATTENTION_BACKEND"))
    if plan is None:
        with torch.autocast(problem.device.type, enabled=False):
            return cpu.forward(problem, q, k, v, alibi_slopes, seed)
    if plan.launch is None:
        return empty_result(q)
    if plan.simple and ready(q, k, v):
        return plan.run(q, k, v)
    return forward_copied(plan, problem, q, k, v)


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
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk, dv."""
    if backend(problem) != "cpu":
        raise NotImplementedError(
            "backward: gradients on the GPU are not implemented yet; "
            "MINI_FLASH_ATTENTION_BACKEND=cpu has them"
        )
    with torch.autocast(problem.device.type, enabled=False):
        return cpu.backward(problem, dout, dlse, q, k, v, out, lse, alibi_slopes, seed)


def dropout_probabilities(
    problem: Problem, q: Tensor, k: Tensor, lse: Tensor, alibi_slopes: Tensor | None, seed: int
) -> Tensor:
    """S_dmask, for tests: the probabilities (batch, heads_q, seqlen_q, seqlen_k), negative where dropped."""
    with torch.autocast(problem.device.type, enabled=False):
        return cpu.dropout_probabilities(problem, q, k, lse, alibi_slopes, seed)


class ForwardPlan(NamedTuple):
    """A kernel and the numbers it takes, for all calls of one problem."""

    launch: Callable | None  # None: nothing to compute
    simple: bool  # q, k and v can be used as they are, if their strides allow it
    device: int
    lse: Tensor  # (batch, heads, seqlen_q), all one element: empty_like is the cheapest allocation
    rest: tuple[float | int | Tensor, ...]  # the kernel's arguments after q, k, v, out and lse
    scheduled: bool  # a last argument is missing: the counter from which the kernel draws its tiles

    def run(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        if torch._C._cuda_getDevice() != self.device:
            with torch.cuda.device(self.device):
                return self.run(q, k, v)
        out, lse = torch.empty_like(q), torch.empty_like(self.lse)
        if self.scheduled:
            self.launch(q, k, v, out, lse, *self.rest, tile_counter(self.device))
        else:
            self.launch(q, k, v, out, lse, *self.rest)
        return out, lse


@functools.lru_cache(maxsize=4096)
def forward_plan(problem: Problem, forced: str | None) -> ForwardPlan | None:
    """How to compute a problem on the GPU; None: on the CPU backend."""
    path = choose(problem.device, forced)
    if path == "cpu":
        return None
    check_supported(problem)
    device = problem.device.index
    shape = problem.batch, problem.heads_q, problem.seqlen_q
    lse = torch.empty((), dtype=torch.float32, device=problem.device).expand(shape)
    if 0 in (problem.batch, problem.seqlen_q, problem.seqlen_k):
        return ForwardPlan(None, True, device, lse, (), False)
    properties = torch.cuda.get_device_properties(device)
    num_sms = properties.multi_processor_count
    row = forward_config(problem, path, config.gpu_arch((properties.major, properties.minor)))
    tiles = row.at(problem.seqlen_q)
    rest = (
        abs(problem.softmax_scale) or 1.0,
        problem.window_left or 0,
        problem.seqlen_q if problem.window_right is None else problem.window_right,
        swath(tiles, problem, num_sms),
    )
    scheduled = False
    if path == "sm90":
        num_tiles = -(-problem.seqlen_q // tiles.tile_m) * problem.batch * problem.heads_q
        scheduled = num_tiles > num_sms  # else the kernel draws nothing, and any address will do
        rest = (*rest, num_sms) if scheduled else (*rest, num_sms, unused_counter(device))
    simple = problem.softmax_scale > 0 and problem.head_dim % ELEMENTS == 0
    return ForwardPlan(compile.get(row), simple, device, lse, rest, scheduled)


def forward_config(problem: Problem, path: str, arch: str) -> config.ForwardConfig:
    """The static facts of a problem, and nothing else of it: what is compiled."""
    if problem.window_left is not None:
        mask = "window"
    else:
        mask = "full" if problem.window_right is None else "causal"
    dtype = str(problem.dtype).removeprefix("torch.")
    return config.forward(path, arch, dtype, config.bucket(problem.head_dim), mask)


def check_supported(problem: Problem) -> None:
    """Raise NotImplementedError for what the GPU kernels do not do, naming the argument."""
    if problem.dtype not in (torch.float16, torch.bfloat16):
        raise NotImplementedError(
            f"q: the GPU kernels take float16 and bfloat16, not {problem.dtype}; "
            "MINI_FLASH_ATTENTION_BACKEND=cpu takes it"
        )
    for name, wanted in (
        ("dropout_p", problem.dropout_p > 0),
        ("softcap", problem.softcap > 0),
        ("alibi_slopes", problem.alibi),
    ):
        if wanted:
            raise NotImplementedError(
                f"{name} is not implemented on the GPU yet; MINI_FLASH_ATTENTION_BACKEND=cpu has it"
            )


def swath(row: config.ForwardConfig, problem: Problem, num_sms: int) -> int:
    """How many heads to walk together (kernels/scheduler.py), all swaths of nearly one size.

    Few enough that the thread blocks at work at one time share keys in the L2 cache; enough (4 tiles
    an SM) that the last swath's short tiles even out its long ones. The bounds were measured on an
    H100: docs/worklog.md.
    """
    tiles = -(-problem.seqlen_q // row.tile_m)
    heads = problem.batch * problem.heads_q
    size = min(32, max(problem.head_dim // 8, round(4 * num_sms / tiles)))
    return -(-heads // max(1, round(heads / size)))


def ready(*tensors: Tensor) -> bool:
    """Whether the kernels can read the tensors where they lie."""
    for x in tensors:
        batch, seqlen, heads, unit = x.stride()
        if unit != 1 or (batch | seqlen | heads) % ELEMENTS or x.data_ptr() % 16:
            return False
    return True


def forward_copied(
    plan: ForwardPlan, problem: Problem, q: Tensor, k: Tensor, v: Tensor
) -> tuple[Tensor, Tensor]:
    """Through copies: head dims padded to 8, strides that 16-byte loads can't follow, scales <= 0."""
    if problem.softmax_scale <= 0:  # the kernels take the maximum before they scale
        q = q * -1.0 if problem.softmax_scale < 0 else torch.zeros_like(q)
    padding = -problem.head_dim % ELEMENTS
    if padding:
        q, k, v = (torch.nn.functional.pad(x, (0, padding)) for x in (q, k, v))
    q, k, v = (x if ready(x) else x.clone(memory_format=torch.contiguous_format) for x in (q, k, v))
    out, lse = plan.run(q, k, v)
    return (out[..., : problem.head_dim].contiguous() if padding else out), lse


def empty_result(q: Tensor) -> tuple[Tensor, Tensor]:
    """No keys (or no queries): out 0, LSE -inf."""
    batch, seqlen_q, heads, _ = q.shape
    lse = q.new_full((batch, heads, seqlen_q), -torch.inf, dtype=torch.float32)
    return torch.zeros_like(q), lse
