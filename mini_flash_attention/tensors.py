"""What a tensor is: memory that kernels read and write by its address, or something that stands for it.

Kernels go past PyTorch's dispatcher, which knows what to do with a DTensor, a negated view or a tensor that
torch.func follows. So each call asks here first whether its tensors are plain memory: by their types and
their dispatch keys, which leave nothing out. What is not is made plain where that is possible (`settled`),
or refused by name before anything runs. The CPU backend's operations take what the dispatcher takes, but the
numbers in int32 tensors are read.
"""

from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from torch import Tensor
from torch._C import DispatchKey, DispatchKeySet, _dispatch_keys, _functorch
from torch.autograd import forward_ad
from torch.nn.parameter import is_lazy

from mini_flash_attention import environment
from mini_flash_attention.kernels.calls import record

try:  # One call for all tensors, which torch.compile makes before each graph; without it: 2 µs more.
    from torch._C._dynamo.guards import TensorGuards
except ImportError:
    TensorGuards = None

Facts = tuple[torch.Size, torch.dtype, torch.device]  # of a tensor


def _bits(*names: str) -> int:
    keys = (DispatchKeySet(getattr(DispatchKey, name)).raw_repr() for name in names)
    bits = 0
    for key in keys:
        bits |= key
    return bits


# The dispatch keys that plain tensors may have (where there are kernels), and those that can be made plain.
PLAIN = _bits("CPU", "AutogradCPU", "AutocastCPU", "CUDA", "AutogradCUDA", "AutocastCUDA", "ADInplaceOrView")
SETTLED = PLAIN | _bits("Negative", "ZeroTensor")

REMEMBERED = 4  # kinds, for each choice of arguments


class Kinds:
    """What the tensors of a call are, beside their shapes. Calls alike share one, which is its own key."""

    def __init__(self, given: Mapping[str, Tensor], plain: bool) -> None:
        self.plain = plain  # kernels can read them all by their addresses
        self.on_cpu = next(iter(given.values())).device.type == "cpu"
        self.of = {name: (x.dtype, x.device) for name, x in given.items()}
        self.alike = _comparison(*given.values()) if plain else None

    def facts(self, shapes: Collection[torch.Size]) -> dict[str, Facts]:
        """Of each tensor, by name."""
        return {name: (shape, *kind) for (name, kind), shape in zip(self.of.items(), shapes, strict=True)}


_remembered: dict[tuple[str, ...], tuple[Kinds, ...]] = {}  # by the names of the arguments


def look(given: Mapping[str, Tensor], names: Mapping[str, str], written: Collection[str] = ()) -> Kinds:
    """What the arguments of a call are.

    Args:
        names: what the caller calls them.
        written: those that the call writes to.

    Raises:
        TypeError: an argument is no tensor, or neither plain nor can it be made so.
        NotImplementedError: forward-mode differentiation on a GPU.
    """
    if forward_ad._current_level < 0:
        for kinds in _remembered.get(tuple(given), ()):
            if kinds.alike(*given.values()):
                return kinds
    for name, x in given.items():
        if not isinstance(x, Tensor):
            raise TypeError(f"{names[name]} must be a torch.Tensor, not {type(x).__name__}")
    kernels = by_kernels(next(iter(given.values())).device)
    for name, x in given.items():
        if kernels and has_tangent(x):
            raise NotImplementedError(
                f"{names[name]} has a tangent, but there is no forward-mode derivative on a GPU; "
                "MINI_FLASH_ATTENTION_BACKEND=cpu computes it with PyTorch operations"
            )
        refusal = None if is_plain(x) else why_not(x, kernels, name in written)
        if refusal is not None:
            raise TypeError(f"{names[name]} {refusal}")
    kinds = Kinds(given, all(map(is_plain, given.values())))
    if kinds.plain:
        same_names = _remembered.get(tuple(given), ())
        _remembered[tuple(given)] = (kinds, *same_names[: REMEMBERED - 1])
    return kinds


def by_kernels(device: torch.device) -> bool:
    """Whether kernels serve tensors on this device, or PyTorch operations."""
    return device.type == "cuda" and environment.forced_backend() != "cpu"


def is_plain(x: Tensor) -> bool:
    return not (x.is_meta or is_lazy(x) or _dispatch_keys(x).raw_repr() & ~PLAIN)


def _comparison(*these: Tensor) -> Callable[..., bool]:
    """Whether other arguments have the same types, dispatch keys, dtypes, devices and ranks."""
    if TensorGuards is None:
        compared = [_compared(x) for x in these]
        return lambda *others: [_compared(x) for x in others] == compared
    places = {id(x): i for i, x in enumerate(these)}  # of one tensor given twice: the last
    once = tuple(places.values())
    any_sizes = [[None] * these[i].ndim for i in once]
    distinct = [these[i] for i in once]
    check = TensorGuards(*distinct, dynamic_dims_sizes=any_sizes, dynamic_dims_strides=any_sizes).check
    if len(once) == len(these):
        return check
    again = [(i, places[id(x)]) for i, x in enumerate(these) if i not in once]
    return lambda *others: (
        all([others[i] is others[j] for i, j in again]) and check(*[others[i] for i in once])
    )


def _compared(x: object) -> tuple[Any, ...]:
    of_tensor = (_dispatch_keys(x).raw_repr(), x.dtype, x.device) if isinstance(x, Tensor) else ()
    return type(x), *of_tensor


# What is not plain


def can_settle(x: Tensor) -> bool:
    """Whether `settled` makes it plain."""
    return is_pending(x) or not _dispatch_keys(x).raw_repr() & ~SETTLED


def is_pending(x: Tensor) -> bool:
    """Whether it is an AsyncCollectiveTensor: the result of a collective, perhaps on its way."""
    return hasattr(x, "trigger_wait")


def settled(x: Any) -> Any:
    """A tensor, or each tensor in a record, as plain memory; `look` let it pass."""
    if isinstance(x, tuple):
        return record(type(x), map(settled, x))
    if not isinstance(x, Tensor) or is_plain(x):
        return x
    if is_pending(x):
        return x.trigger_wait()
    return x.clone() if x._is_zerotensor() else x.resolve_neg()


def why_not(x: Tensor, kernels: bool, written: bool) -> str | None:
    """Why a tensor that is not plain cannot be taken, and what to do about it; None: it can.

    Args:
        kernels: whether kernels serve the call.
        written: whether it writes to the tensor.
    """
    kind = type(x).__name__
    if x.is_nested:
        return "is a nested tensor: pass its values and its offsets to flash_attn_varlen_func"
    if x.layout is not torch.strided:
        return f"has the layout {x.layout}: pass it .to_dense()"
    if is_lazy(x):
        return f"is an {kind}, which has no shape yet: run its module once"
    read = x.dtype == torch.int32 or (kernels and x.is_floating_point())  # others are of a wrong dtype
    if x.is_meta or not read or (can_settle(x) and not (kernels and written)):
        return None
    use = f"a kernel {'writes to' if written else 'reads'} its memory" if kernels else "its numbers are read"
    if _functorch.is_functorch_wrapped_tensor(x):
        return f"is followed by a transform of torch.func, but {use}: call the function outside of it"
    if torch._is_functional_tensor(x) or kind in ("FakeTensor", "FunctionalTensor"):
        return f"is traced, a {kind} without memory, but {use}: call the function outside of the trace"
    if hasattr(x, "to_local"):
        return f"is a {kind}, but {use}: pass its local part, .to_local()"
    plain = ".resolve_neg()" if x.is_neg() else "the plain tensor that it stands for"
    return f"is no plain tensor ({kind}), but {use}: pass {plain}"


# Where it lies


def share_memory(x: Tensor, y: Tensor) -> bool:
    """Whether writing to plain x may change plain y: not where rows of one stride lie beside each other."""
    (start_x, end_x), (start_y, end_y) = _span(x), _span(y)
    if start_x >= end_y or start_y >= end_x:
        return False
    row = x.stride(0) * x.itemsize
    if row != y.stride(0) * y.itemsize or row == 0:
        return True
    row_x, row_y = (end - start for start, end in (_span(x[0]), _span(y[0])))
    distance = (start_y - start_x) % row
    return distance < row_x or distance + row_y > row


def _span(x: Tensor) -> tuple[int, int]:
    """The addresses from its first byte to behind its last."""
    if x.numel() == 0:
        return 0, 0
    last = sum((n - 1) * stride for n, stride in zip(x.shape, x.stride(), strict=True))
    return x.data_ptr(), x.data_ptr() + (last + 1) * x.itemsize


def overlaps_itself(x: Tensor) -> bool:
    """Whether elements share memory; it may say so of some odd strides that keep them apart."""
    reach = 1
    for stride, n in sorted(zip(x.stride(), x.shape, strict=True)):
        if n > 1 and stride < reach:
            return x.numel() > 0
        reach += (n - 1) * stride
    return False


# Who differentiates


def has_tangent(x: Tensor) -> bool:
    """Whether forward-mode differentiation follows x."""
    return forward_ad._current_level >= 0 and forward_ad.unpack_dual(x).tangent is not None


def in_transform() -> bool:
    """Whether a transform of torch.func is at work (vmap, grad, jvp, functionalize)."""
    return _functorch.peek_interpreter_stack() is not None
