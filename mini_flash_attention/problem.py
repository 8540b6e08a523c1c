"""Every fact of a call that does not live in tensor memory, and the one place that validates."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from numbers import Integral, Real

import torch
from torch import Tensor

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
MAX_HEAD_DIM = 256


@dataclass(frozen=True)
class Problem:
    """One attention call, validated and normalised; made by `dense`.

    Query i sits on the diagonal at key j = i + seqlen_k - seqlen_q: the last query meets the last
    key (bottom-right alignment). The window counts the keys that are visible to the left and to the
    right of the diagonal; None is no limit, and causal is window_right = 0.
    """

    dtype: torch.dtype
    device: torch.device
    batch: int
    seqlen_q: int
    seqlen_k: int
    heads_q: int
    heads_k: int
    head_dim: int
    softmax_scale: float
    window_left: int | None = None
    window_right: int | None = None
    softcap: float = 0.0  # 0: off
    alibi: bool = False  # the slopes themselves travel beside q, k, v
    dropout_p: float = 0.0
    deterministic: bool = False

    @property
    def group(self) -> int:
        """Query heads that share one key head: 1 is multi-head attention, more is GQA or MQA."""
        return self.heads_q // self.heads_k


def dense(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float,
    softmax_scale: float | None,
    causal: bool,
    window_size: Sequence[int | None] | Tensor | None,
    softcap: float,
    alibi_slopes: Tensor | None,
    deterministic: bool,
) -> Problem:
    """The Problem of a call of `flash_attn_func`, which documents the arguments and the errors.

    Every eager call runs through here, so this collects hashable facts and little else: the checks
    are in `_problem`, whose answer is remembered.
    """
    if not (isinstance(q, Tensor) and isinstance(k, Tensor) and isinstance(v, Tensor)):
        raise TypeError(_not_a_tensor(q=q, k=k, v=v))
    if type(window_size) is not tuple or len(window_size) != 2:
        window_size = _pair(window_size)
    facts = (
        (q.shape, k.shape, v.shape),
        (q.dtype, k.dtype, v.dtype),
        (q.device, k.device, v.device),
        None if alibi_slopes is None else _alibi_facts(alibi_slopes),
        dropout_p,
        softmax_scale,
        causal,
        window_size[0],
        window_size[1],
        softcap,
        deterministic,
    )
    try:
        return _problem(*facts)
    except TypeError:  # a check failed, or an argument cannot be hashed: then a check names it
        pass
    return _problem.__wrapped__(*facts)


# typed: otherwise a window of 3.0, which is an error, would be served the entry of 3.
@lru_cache(maxsize=1024, typed=True)
def _problem(
    shapes: tuple[torch.Size, torch.Size, torch.Size],
    dtypes: tuple[torch.dtype, torch.dtype, torch.dtype],
    devices: tuple[torch.device, torch.device, torch.device],
    alibi: tuple[torch.Size, torch.dtype, torch.device] | None,
    dropout_p: float,
    softmax_scale: float | None,
    causal: bool,
    window_left: int | None,
    window_right: int | None,
    softcap: float,
    deterministic: bool,
) -> Problem:
    """Validate the facts of a call and put them into their normal form."""
    _check_shapes(*shapes)
    _check_dtypes_and_devices(dtypes, devices)
    (batch, seqlen_q, heads_q, head_dim), (_, seqlen_k, heads_k, _) = shapes[:2]
    if alibi is not None:
        _check_alibi(alibi, batch, heads_q, devices[0])
    compute = torch.float64 if dtypes[0] == torch.float64 else torch.float32
    dropout_p = _number("dropout_p", dropout_p, compute)
    if not 0 <= dropout_p < 1:
        raise ValueError(f"dropout_p must be in [0, 1), not {dropout_p}")
    left = _limit("left", window_left)
    right = 0 if _flag("causal", causal) else _limit("right", window_right)
    return Problem(
        dtype=dtypes[0],
        device=devices[0],
        batch=batch,
        seqlen_q=seqlen_q,
        seqlen_k=seqlen_k,
        heads_q=heads_q,
        heads_k=heads_k,
        head_dim=head_dim,
        softmax_scale=(
            head_dim**-0.5 if softmax_scale is None else _number("softmax_scale", softmax_scale, compute)
        ),
        # A limit that hides no key from any query is none: the last query has seqlen_k - 1 keys to
        # the left of its diagonal, the first one seqlen_q - 1 to the right.
        window_left=None if left is None or left >= seqlen_k - 1 else left,
        window_right=None if right is None or right >= seqlen_q - 1 else right,
        softcap=max(0.0, _number("softcap", softcap, compute)),
        alibi=alibi is not None,
        dropout_p=dropout_p,
        deterministic=_flag("deterministic", deterministic),
    )


def _check_shapes(q: torch.Size, k: torch.Size, v: torch.Size) -> None:
    for name, shape in (("q", q), ("k", k), ("v", v)):
        if len(shape) != 4:
            raise ValueError(
                f"{name} must have 4 dimensions (batch, seqlen, heads, head_dim), "
                f"but its shape is {tuple(shape)}"
            )
    if k != v:
        raise ValueError(f"k and v must have one shape, but k is {tuple(k)} and v is {tuple(v)}")
    if q[0] != k[0]:
        raise ValueError(f"q, k and v must have one batch size, but q has {q[0]} and k has {k[0]}")
    if q[3] != k[3]:
        raise ValueError(f"q, k and v must have one head_dim, but q has {q[3]} and k has {k[3]}")
    if not 1 <= q[3] <= MAX_HEAD_DIM:
        raise ValueError(f"head_dim of q, k and v must be in 1 to {MAX_HEAD_DIM}, not {q[3]}")
    if k[2] == 0 or q[2] == 0 or q[2] % k[2]:
        raise ValueError(f"the heads of q ({q[2]}) must be a multiple of the heads of k ({k[2]})")


def _check_dtypes_and_devices(dtypes: tuple[torch.dtype, ...], devices: tuple[torch.device, ...]) -> None:
    for what, values in (("dtype", dtypes), ("device", devices)):
        if len(set(values)) > 1:
            q, k, v = values
            raise ValueError(f"q, k and v must have one {what}, but they have {q}, {k} and {v}")
    if dtypes[0] not in DTYPES:
        allowed = ", ".join(str(dtype) for dtype in DTYPES)
        raise TypeError(f"q, k and v must be one of {allowed}, not {dtypes[0]}")


def _alibi_facts(alibi_slopes: Tensor) -> tuple[torch.Size, torch.dtype, torch.device]:
    if not isinstance(alibi_slopes, Tensor):
        raise TypeError(_not_a_tensor(alibi_slopes=alibi_slopes))
    if alibi_slopes.requires_grad and torch.is_grad_enabled():
        raise ValueError("alibi_slopes gets no gradient: pass alibi_slopes.detach()")
    return alibi_slopes.shape, alibi_slopes.dtype, alibi_slopes.device


def _check_alibi(
    alibi: tuple[torch.Size, torch.dtype, torch.device],
    batch: int,
    heads: int,
    device: torch.device,
) -> None:
    shape, dtype, alibi_device = alibi
    if shape not in ((heads,), (batch, heads)):
        raise ValueError(
            f"alibi_slopes must have shape (heads,) = ({heads},) or (batch, heads) = "
            f"({batch}, {heads}), not {tuple(shape)}"
        )
    if dtype != torch.float32:
        raise TypeError(f"alibi_slopes must be torch.float32, not {dtype}")
    if alibi_device != device:
        raise ValueError(f"alibi_slopes is on {alibi_device}, but q, k and v are on {device}")


def _pair(window_size: object) -> Sequence[int | None]:
    """The two numbers of a window_size that is not a tuple of two."""
    if window_size is None:
        return None, None
    pair = window_size.tolist() if hasattr(window_size, "tolist") else window_size
    if not isinstance(pair, (tuple, list)):
        raise TypeError(f"window_size must be a pair of ints, not {type(window_size).__name__}")
    if len(pair) != 2:
        raise ValueError(f"window_size must have two elements (left, right), not {len(pair)}")
    return pair


def _limit(side: str, value: int | None) -> int | None:
    """One side of the window; None is no limit, as is any negative number."""
    if value is None:
        return None
    if not isinstance(value, Integral):
        raise TypeError(f"window_size must be a pair of ints (or None: no limit), but {side} is {value!r}")
    return int(value) if value >= 0 else None


def _number(name: str, value: float, compute: torch.dtype) -> float:
    if not isinstance(value, Real):
        raise TypeError(f"{name} must be a number, not {type(value).__name__}")
    try:
        number = float(value)
    except OverflowError:
        number = math.inf if value > 0 else -math.inf
    if not abs(number) <= torch.finfo(compute).max:  # nan is not, either
        raise ValueError(f"{name} must be finite in {compute}, not {number}")
    return number


def _flag(name: str, value: bool) -> bool:
    # Not just bool(value): an array's or a tensor's may be ambiguous, or change under the cache.
    kind = type(value)
    numpy_bool = kind.__module__ == "numpy" and kind.__name__ in ("bool", "bool_")  # NumPy 2, 1
    if not (numpy_bool or isinstance(value, Integral)):
        raise TypeError(f"{name} must be a bool, 0 or 1, not {kind.__name__}")
    if value not in (0, 1):
        raise ValueError(f"{name} must be a bool, 0 or 1, and no other int")
    return bool(value)


def _not_a_tensor(**arguments: object) -> str:
    name, value = next(item for item in arguments.items() if not isinstance(item[1], Tensor))
    return f"{name} must be a torch.Tensor, not {type(value).__name__}"
