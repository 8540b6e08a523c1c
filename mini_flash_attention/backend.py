"""Which backend serves a call, and the call itself: on the CPU backend, or by a plan on the GPU."""

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.utils import _python_dispatch as dispatch_modes

from mini_flash_attention import cpu, kv_append, tensors
from mini_flash_attention.checks import Names
from mini_flash_attention.environment import forced_backend
from mini_flash_attention.gpu import config, fast, plans, run
from mini_flash_attention.problem import CacheUpdate, Inputs, Problem

GRADIENTS = Names(dout="the gradient of out", dlse="the gradient of softmax_lse")


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
    if torch.version.hip:
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
def attention_plan(problem: Problem, num_splits: int, forced: str | None) -> run.AttentionPlan | None:
    path = choose(problem.device, forced)
    return None if path == "cpu" else plans.attention(problem, num_splits, path)


@functools.lru_cache(maxsize=4096)
def backward_plan(problem: Problem, forced: str | None) -> plans.BackwardPlan | None:
    path = choose(problem.device, forced)
    return None if path == "cpu" else plans.backward(problem, path)


@functools.lru_cache(maxsize=4096)
def append_plan(problem: Problem, added: int, rotary: str) -> plans.AppendPlan | None:
    """None: the GPU has no kernel for this. added: new tokens of each sequence; rotary: of config.ROTARY."""
    nothing = 0 in (problem.batch, problem.seqlen_k, added)
    return None if nothing or problem.head_dim % config.ELEMENTS else plans.append(problem, rotary)


def forward(
    problem: Problem, x: Inputs, out: Tensor | None = None, with_lse: bool = True
) -> tuple[Tensor, Tensor | None]:
    """out, like q, and lse (batch, heads_q, seqlen_q), or (heads_q, total_q) where q is packed.

    With `out` given, the result is written there. Without `with_lse` there need be no lse.
    """
    plan = attention_plan(problem, 0, forced_backend())
    if plan is None:
        return on_cpu(cpu.forward, problem, x, out)
    return on_gpu(run.forward, plan, problem, x, out, with_lse)


def differentiates_itself(problem: Problem, x: Inputs) -> bool:
    """Whether PyTorch is to differentiate the operations of `forward`: torch.func and forward mode do so.

    NotImplementedError: kernels serve the call.
    """
    followed = tensors.in_transform() or any(map(tensors.has_tangent, x[:3]))
    if followed and choose(problem.device, forced_backend()) != "cpu":
        raise NotImplementedError(
            "q, k or v requires a gradient: on a GPU not inside of torch.func nor in forward mode; "
            "MINI_FLASH_ATTENTION_BACKEND=cpu computes it with PyTorch operations"
        )
    return followed


def backward(
    problem: Problem, x: Inputs, out: Tensor, lse: Tensor, dout: Tensor, dlse: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk, dv, like q, k, v. out and lse: what `forward` returned; dlse: None is 0."""
    plan = backward_plan(problem, forced_backend())
    if plan is None:
        return on_cpu(cpu.backward, problem, x, out, lse, dout, dlse)
    given = {"dout": dout} if dlse is None else {"dout": dout, "dlse": dlse}
    if not tensors.look(given, GRADIENTS).plain:
        x = x._replace(plain=False)
    return on_gpu(run.backward, plan, problem, x, out, lse, dout, dlse)


def with_cache(
    problem: Problem, x: Inputs, update: CacheUpdate | None, num_splits: int, with_lse: bool
) -> tuple[Tensor, Tensor | None]:
    """Append to the cache in x.k and x.v, then attention to it: out, like q, and lse as in `forward`."""
    plan = attention_plan(problem, num_splits, forced_backend())
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
    return on_gpu(run.with_cache, plan, problem, x, append, update, with_lse)


def dropout_probabilities(problem: Problem, x: Inputs, lse: Tensor) -> Tensor:
    """S_dmask, for tests: the probabilities (batch, heads_q, seqlen_q, seqlen_k), negative where dropped."""
    return on_cpu(cpu.dropout_probabilities, problem, x, lse)


def on_cpu(function: Callable[..., Any], problem: Problem, *arguments: Any) -> Any:
    """Without autocast, which would cast what the PyTorch operations compute."""
    with torch.autocast(problem.device.type, enabled=False), unseen():
        return function(problem, *arguments)


def unseen() -> AbstractContextManager:
    """Dispatch modes see no operation: selective checkpointing would keep results that are written over.

    But modes that trace, or in which tensors have no memory, see them all.
    """
    modes = dispatch_modes._get_current_dispatch_mode_stack()
    traced = any(mode.is_infra_mode() for mode in modes)
    return dispatch_modes._disable_current_modes() if modes and not traced else nullcontext()


def on_gpu(function: Callable[..., Any], plan: Any, problem: Problem, x: Inputs, *arguments: Any) -> Any:
    """With plain tensors, and the plan's device as the current one, where kernels run and memory is taken."""
    if not x.plain:
        x, *arguments = tensors.settled((x, *arguments))
    if fast.current_device() == plan.device:
        return function(plan, problem, x, *arguments)
    with torch.cuda.device(plan.device):
        return function(plan, problem, x, *arguments)
