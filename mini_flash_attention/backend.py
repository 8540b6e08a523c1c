"""Which backend serves a call, and the call itself: on the CPU backend, or by a plan on the GPU."""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from mini_flash_attention import captured, cpu, environment, kv_append
from mini_flash_attention.gpu import config, fast, plans, run
from mini_flash_attention.problem import CacheUpdate, Inputs, Maybe, Problem

forced_backend = environment.reader("MINI_FLASH_ATTENTION_BACKEND")


@functools.cache
def choose(device: torch.device, forced: str | None) -> str:
    """Returns "cpu", "sm80" or "sm90": what MINI_FLASH_ATTENTION_BACKEND forces, else the device's best."""
    if forced not in (None, "", "cpu", "sm80", "sm90"):
        raise ValueError(f"MINI_FLASH_ATTENTION_BACKEND must be cpu, sm80 or sm90, but was {forced!r}")
    if forced == "cpu" or (device.type != "cuda" and not forced):
        return "cpu"
    if device.type != "cuda":
        raise ValueError(
            f"MINI_FLASH_ATTENTION_BACKEND={forced} needs CUDA tensors, but they are on {device}"
        )
    if torch.version.hip:  # else a gfx90a, which reports (9, 0), would be given Hopper's code
        raise RuntimeError(
            f"mini-flash-attention needs an NVIDIA GPU, which {torch.cuda.get_device_name(device)} is not; "
            "MINI_FLASH_ATTENTION_BACKEND=cpu runs on it with PyTorch operations"
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


# Plans are remembered here: None is the CPU backend.


@functools.lru_cache(maxsize=4096)
def attention_plan(problem: Problem, forced: str | None) -> run.AttentionPlan | None:
    path = choose(problem.device, forced)
    return None if path == "cpu" else plans.attention(problem, path)


@functools.lru_cache(maxsize=4096)
def backward_plan(problem: Problem, forced: str | None) -> plans.BackwardPlan | None:
    path = choose(problem.device, forced)
    return None if path == "cpu" else plans.backward(problem, path)


@functools.lru_cache(maxsize=4096)
def append_plan(problem: Problem, added: int, rotary: str) -> plans.AppendPlan | None:
    """None: the GPU has no kernel for this. added: new tokens of each sequence; rotary: of config.ROTARY."""
    nothing = 0 in (problem.batch, problem.seqlen_k, added)
    return None if nothing or problem.head_dim % config.ELEMENTS else plans.append(problem, rotary)


# On a GPU the plan's device is the current one, on which kernels run and memory is allocated. Where it is so
# already no context is entered: that would take 0.2 µs.


def forward(
    problem: Problem, x: Inputs, out: Tensor | None = None, with_lse: bool = True
) -> tuple[Tensor, Tensor | Maybe]:
    """out, like q, and lse (batch, heads_q, seqlen_q), or (heads_q, total_q) where q is packed.

    With `out` given, the result is written there. Without `with_lse` there need be no lse.
    """
    plan = attention_plan(problem, forced_backend())
    if plan is None:
        return on_cpu(cpu.forward, problem, x, out)
    if fast.current_device() == plan.device:
        return run.forward(plan, problem, x, out, with_lse)
    with torch.cuda.device(plan.device):
        return run.forward(plan, problem, x, out, with_lse)


def backward(
    problem: Problem, x: Inputs, out: Tensor, lse: Tensor, dout: Tensor, dlse: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk, dv, like q, k, v. out and lse: what `forward` returned; dlse: None is 0."""
    plan = backward_plan(problem, forced_backend())
    if plan is None:
        return on_cpu(cpu.backward, problem, x, out, lse, dout, dlse)
    if fast.current_device() == plan.device:
        return run.backward(plan, problem, x, out, lse, dout, dlse)
    with torch.cuda.device(plan.device):
        return run.backward(plan, problem, x, out, lse, dout, dlse)


def captured_gradients(
    problem: Problem, x: Inputs, out: Tensor, lse: Tensor, dout: Tensor, dlse: Tensor | None
) -> list[Tensor | None]:
    """Of the values that functions of the scores capture; None where one needs none."""
    return on_cpu(captured.gradients, problem, x, (out, lse, dout, dlse))


def with_cache(
    problem: Problem, x: Inputs, update: CacheUpdate | None, with_lse: bool
) -> tuple[Tensor, Tensor | Maybe]:
    """Append to the cache in x.k and x.v, then attention to it: out, like q, and lse as in `forward`."""
    plan = attention_plan(problem, forced_backend())
    if plan is None:
        if update is not None:
            x = on_cpu(kv_append.append, problem, x, update)
        return on_cpu(cpu.forward, problem, x)
    append = None
    if update is not None:
        rotary = "none"
        if update.rotary_cos is not None:
            rotary = "interleaved" if update.interleaved else "halves"
        append = append_plan(problem, update.added, rotary)
    if fast.current_device() == plan.device:
        return run.with_cache(plan, append, problem, x, update, with_lse)
    with torch.cuda.device(plan.device):
        return run.with_cache(plan, append, problem, x, update, with_lse)


def dropout_probabilities(problem: Problem, x: Inputs, lse: Tensor) -> Tensor:
    """S_dmask, for tests: the probabilities (batch, heads_q, seqlen_q, seqlen_k), negative where dropped."""
    return on_cpu(cpu.dropout_probabilities, problem, x, lse)


def on_cpu(function: Callable[..., Any], problem: Problem, *arguments: Any) -> Any:
    """Without autocast, which would cast what the PyTorch operations compute; meta tensors have none."""
    device = "cpu" if problem.device.type == "meta" else problem.device.type
    with torch.autocast(device, enabled=False):
        return function(problem, *arguments)
