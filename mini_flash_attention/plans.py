"""From a problem to the arguments that kernels share; for dispatch.py, decode.py and kvcache.py."""

import math
from typing import Any

import torch
from torch import Tensor

from mini_flash_attention.gpu import config
from mini_flash_attention.problem import Problem

Score = tuple[float, float | None, Tensor | None]  # kernels/scores.py: Score
UNREAD = 2**18  # elements: of larger results the kernel takes longer than the host saves


def gpu_arch(device: int) -> str:
    return config.gpu_arch(torch.cuda.get_device_capability(device))


def dtype_name(problem: Problem) -> str:
    return str(problem.dtype).removeprefix("torch.")


def score_kind(problem: Problem) -> str:
    score = "_".join(name for name, on in (("softcap", problem.softcap), ("alibi", problem.alibi)) if on)
    return score or "plain"


def score_numbers(problem: Problem) -> Score:
    """Without the slopes, which belong to a call. Scales <= 0 are q's business: dispatch.for_kernels."""
    return abs(problem.softmax_scale) or 1.0, problem.softcap or None, None


def with_slopes(score: Score, alibi_slopes: Tensor, q: Tensor, ragged: tuple | None) -> Score:
    """The same with a call's slopes, (batch, heads), of stride 0 where the batch shares them."""
    if alibi_slopes.ndim == 1:
        alibi_slopes = alibi_slopes.expand(len(q) if ragged is None else ragged[-2], -1)
    return *score[:2], alibi_slopes


def simple(problem: Problem) -> bool:
    """Whether the kernels can take q, k and v as they are, if their strides allow it."""
    return problem.softmax_scale > 0 and problem.head_dim % config.ELEMENTS == 0


def results(plan: Any, q: Tensor, out: Tensor | None, with_lse: bool) -> tuple[Tensor, Any]:
    """Where a ForwardPlan or DecodePlan writes: `out` if given, and an LSE, nobody's unless `with_lse`."""
    if out is None:
        out = empty_like(q, plan.q)
    lse = None if with_lse else plan.unread_lse
    return out, allocate(*plan.lse) if lse is None else lse


Like = tuple[tuple[int, ...], tuple[int, ...], torch.dtype]  # shape, strides, dtype


def like_q(problem: Problem) -> Like:
    """A contiguous q as kernels take it: four modes, the last a multiple of 16 bytes."""
    row = -(-problem.head_dim // config.ELEMENTS) * config.ELEMENTS
    return _contiguous((_rows(problem), problem.seqlen_q, problem.heads_q, row), problem.dtype)


def like_lse(problem: Problem) -> Like:
    return _contiguous((_rows(problem), problem.heads_q, problem.seqlen_q), torch.float32)


def _rows(problem: Problem) -> int:
    return 1 if problem.packed_q else problem.batch


def _contiguous(shape: tuple[int, ...], dtype: torch.dtype) -> Like:
    return shape, tuple(math.prod(shape[i + 1 :]) for i in range(len(shape))), dtype


try:  # what code of torch.compile calls, on the current device: it takes half the time of torch.empty_like
    from torch._C._dynamo.guards import _empty_strided_cuda as allocate
except ImportError:

    def allocate(shape: tuple[int, ...], strides: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return torch.empty_strided(shape, strides, dtype=dtype, device="cuda")


def empty_like(x: Tensor, contiguous: Like) -> Tensor:
    """torch.empty_like; contiguous: what x is like, if it is contiguous."""
    return allocate(*contiguous) if x.is_contiguous() else torch.empty_like(x)


def argument(x: Tensor) -> Any:
    """A tensor that many calls pass, in the form to which TVM-FFI would convert it in each."""
    import tvm_ffi  # not at the top: the CPU backend does without it

    return tvm_ffi.from_dlpack(x)


def unread(shape: tuple[int, ...], device: int) -> Any | None:
    """For what a kernel writes and nobody reads: float32 memory that all calls share.

    None: too large, or not there before a capture in which it cannot be made.
    """
    memory, size = _unread_memory(device), math.prod(shape)
    return None if memory is None or size > UNREAD else argument(memory[:size].view(shape))


_unread: dict[int, Tensor] = {}


def _unread_memory(device: int) -> Tensor | None:
    if device not in _unread and not torch._C._cuda_isCurrentStreamCapturing():
        memory = torch.empty(UNREAD, dtype=torch.float32, device=f"cuda:{device}")
        torch.cuda.current_stream(device).synchronize()  # any stream may write to it from here on
        _unread.setdefault(device, memory)
    return _unread.get(device)
