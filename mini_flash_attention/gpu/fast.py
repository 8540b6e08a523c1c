"""Every private shortcut into PyTorch, with the host time that it saves a call and what does without it.

All that a call of ours needs of PyTorch beyond its public functions. Times: an H100 machine, docs/worklog.md.
"""

import torch
from torch import Tensor
from torch.autograd import forward_ad

# A shape, its strides, a dtype: what `allocate` makes.
Like = tuple[tuple[int, ...], tuple[int, ...], torch.dtype]

try:  # what code of torch.compile calls: 1.5 µs less than torch.empty_like, for each result
    from torch._C._dynamo.guards import _empty_strided_cuda as allocate  # type: ignore[attr-defined]
except ImportError:

    def allocate(shape: tuple[int, ...], strides: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """A tensor on the current device, uninitialised."""
        return torch.empty_strided(shape, strides, dtype=dtype, device="cuda")


# The versions of tensors that a kernel wrote to: 0.1 µs less than torch.autograd.graph.increment_version.
increment_version = getattr(torch._C, "_increment_version", torch.autograd.graph.increment_version)

# Without the check that CUDA is initialised, which whoever has a tensor on a GPU needs not: 0.1 µs each.
current_device = getattr(torch._C, "_cuda_getDevice", torch.cuda.current_device)
is_capturing = getattr(torch._C, "_cuda_isCurrentStreamCapturing", torch.cuda.is_current_stream_capturing)


def _handle(device: int) -> int:
    return torch.cuda.current_stream(device).cuda_stream


# (device) -> the handle of its current stream, without the object around it: 0.7 µs less.
current_stream = getattr(torch._C, "_cuda_getCurrentRawStream", _handle)


# Who traces, watches or transforms calls. Such a call goes through PyTorch's dispatcher, by the operators in
# ops.py; all others, which these questions (0.3 µs, all together) let pass, reach the kernels without.
is_compiling = torch.compiler.is_dynamo_compiling  # less than is_compiling; export has a mode, too
_modes = torch._C._len_torch_dispatch_stack  # FLOP counters, selective checkpointing, FakeTensorMode, make_fx
_is_tracing = torch._C._is_tracing  # torch.jit.trace
transforms = torch._C._functorch.peek_interpreter_stack  # of torch.func; None: none is at work
_PLAIN = {Tensor, torch.nn.Parameter}


def is_watched(q: Tensor, k: Tensor, v: Tensor, s_aux: Tensor | None = None) -> object:
    """Whether a call must be an operator's: it is followed, or its tensors are not what lies in memory."""
    return (
        is_compiling()
        or not (type(q) is type(k) is type(v) is Tensor or {type(q), type(k), type(v)} <= _PLAIN)
        or (s_aux is not None and type(s_aux) not in _PLAIN)
        or _modes()
        or transforms()
        or forward_ad._current_level >= 0
        or _is_tracing()
    )


def has_tangent(x: Tensor) -> bool:
    """Whether forward-mode differentiation follows x."""
    return forward_ad._current_level >= 0 and forward_ad.unpack_dual(x).tangent is not None


def is_in_jvp() -> bool:
    """Whether a torch.func.jvp is at work."""
    jvp = torch._C._functorch.TransformType.Jvp
    return any(level.key() == jvp for level in torch._C._functorch.get_interpreter_stack() or ())
