"""Every fact of a call that does not live in tensor memory, and the one place that validates."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property, lru_cache
from numbers import Integral, Real
from typing import NamedTuple

import torch
from torch import Tensor

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
MAX_HEAD_DIM = 256
MAX_SPLITS = 128

Facts = tuple[torch.Size, torch.dtype, torch.device]  # of a tensor


@dataclass(frozen=True)
class Problem:
    """One attention call, validated and normalised; made by `dense`, `varlen` or `cache`.

    Query i sits on the diagonal at key j = i + seqlen_k - seqlen_q: the last query meets the last
    key (bottom-right alignment). The window counts the keys that are visible to the left and to the
    right of the diagonal; None is no limit, and causal is window_right = 0.

    Where a Layout tells each sequence's own lengths, seqlen_q and seqlen_k are bounds of them, and
    the diagonal is that of the sequence.
    """

    dtype: torch.dtype
    device: torch.device
    batch: int
    seqlen_q: int  # packed: the tokens of all sequences
    seqlen_k: int  # packed: the tokens of all sequences; in a cache, the capacity of one
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
    ragged: bool = False  # a Layout comes with it
    packed_q: bool = False  # q is (total_q, heads, head_dim)
    packed_k: bool = False
    page_size: int = 0  # tokens of a page of k and v; 0: they are not paged
    left_padded: bool = False
    max_seqlen_q: int = 0  # the longest sequence of q, says the caller: for speed, never for safety

    @cached_property
    def _hash(self) -> int:
        return hash(tuple(getattr(self, field.name) for field in fields(self)))

    def __hash__(self) -> int:
        return self._hash  # each call asks for it, to find its plan

    def __getstate__(self) -> dict[str, object]:
        """Without the hash, which another process would not compute alike."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    @property
    def longest_q(self) -> int:
        return self.max_seqlen_q or self.seqlen_q

    @property
    def group(self) -> int:
        """Query heads that share one key head: 1 is multi-head attention, more is GQA or MQA."""
        return self.heads_q // self.heads_k


class Layout(NamedTuple):
    """Where each sequence lies: contiguous int32 tensors on the device of q; None where not given.

    A sequence's storage is its range of packed k and v, or a row of k and v or of the block table.
    """

    cu_seqlens_q: Tensor | None = None  # (batch + 1): sequence b's rows of packed q start and end here
    cu_seqlens_k: Tensor | None = None  # (batch + 1): the same for packed k and v
    seqused_k: Tensor | None = None  # (batch): where its keys end in its storage
    leftpad_k: Tensor | None = None  # (batch): where its keys start in its storage
    batch_idx: Tensor | None = None  # (batch): the row that is its storage; row b if not given
    block_table: Tensor | None = None  # (rows, max_pages): token t is in page t // page_size of the row


class CacheUpdate(NamedTuple):
    """What flash_attn_with_kvcache writes into the cache first, and the rotary tables."""

    k: Tensor | None = None  # (batch, seqlen_new, heads_k, head_dim)
    v: Tensor | None = None
    rotary_cos: Tensor | None = None  # (seqlen_ro, rotary_dim / 2), contiguous, in the dtype of q
    rotary_sin: Tensor | None = None
    interleaved: bool = True  # rotate dims 2i and 2i + 1; else i and i + rotary_dim / 2


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
    are in `_dense`, whose answer is remembered.
    """
    if not (isinstance(q, Tensor) and isinstance(k, Tensor) and isinstance(v, Tensor)):
        raise TypeError(_not_a_tensor(q=q, k=k, v=v))
    if type(window_size) is not tuple or len(window_size) != 2:
        window_size = _pair(window_size)
    tensors = (
        (q.shape, k.shape, v.shape),
        (q.dtype, k.dtype, v.dtype),
        (q.device, k.device, v.device),
        None if alibi_slopes is None else _alibi_facts(alibi_slopes),
    )
    left, right = window_size
    options = dropout_p, softmax_scale, causal, left, right, softcap, deterministic
    return _remembered(_dense, tensors, options)


def varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor | None,
    max_seqlen_q: int | Tensor,
    max_seqlen_k: int | Tensor,
    dropout_p: float,
    softmax_scale: float | None,
    causal: bool,
    window_size: Sequence[int | None] | Tensor | None,
    softcap: float,
    alibi_slopes: Tensor | None,
    deterministic: bool,
    block_table: Tensor | None,
    seqused_k: Tensor | None,
    out: Tensor | None,
) -> Problem:
    """The Problem of a call of `flash_attn_varlen_func`, which documents the arguments and the errors."""
    if not (isinstance(q, Tensor) and isinstance(k, Tensor) and isinstance(v, Tensor)):
        raise TypeError(_not_a_tensor(q=q, k=k, v=v))
    if type(window_size) is not tuple or len(window_size) != 2:
        window_size = _pair(window_size)
    _max_seqlen("max_seqlen_k", max_seqlen_k)
    tensors = (
        (q.shape, k.shape, v.shape),
        (q.dtype, k.dtype, v.dtype),
        (q.device, k.device, v.device),
        _facts("cu_seqlens_q", cu_seqlens_q),
        None if cu_seqlens_k is None else _facts("cu_seqlens_k", cu_seqlens_k),
        None if seqused_k is None else _facts("seqused_k", seqused_k),
        None if block_table is None else _facts("block_table", block_table),
        None if out is None else _facts("out", out),
        None if alibi_slopes is None else _alibi_facts(alibi_slopes),
    )
    longest = _max_seqlen("max_seqlen_q", max_seqlen_q)
    left, right = window_size
    options = dropout_p, softmax_scale, causal, left, right, softcap, deterministic
    if block_table is not None and torch.is_grad_enabled():
        _check_no_gradient("block_table: attention to pages", q, k, v)
    if out is not None and torch.is_grad_enabled():
        _check_no_gradient("out: attention into a given tensor", q, k, v, out)
    return _remembered(_varlen, tensors, (longest, *options))


def cache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor | None,
    v: Tensor | None,
    rotary_cos: Tensor | None,
    rotary_sin: Tensor | None,
    cache_seqlens: Tensor | int | None,
    cache_batch_idx: Tensor | None,
    cache_leftpad: Tensor | None,
    block_table: Tensor | None,
    softmax_scale: float | None,
    causal: bool,
    window_size: Sequence[int | None] | Tensor | None,
    softcap: float,
    rotary_interleaved: bool,
    alibi_slopes: Tensor | None,
    num_splits: int,
) -> Problem:
    """The Problem of a call of `flash_attn_with_kvcache`, which documents the arguments and the errors.

    A cache's length changes with each step: an int is checked here and is no part of the Problem.
    """
    if not (isinstance(q, Tensor) and isinstance(k_cache, Tensor) and isinstance(v_cache, Tensor)):
        raise TypeError(_not_a_tensor(q=q, k_cache=k_cache, v_cache=v_cache))
    if type(window_size) is not tuple or len(window_size) != 2:
        window_size = _pair(window_size)
    host_length = not isinstance(cache_seqlens, Tensor) and isinstance(cache_seqlens, Integral)
    tensors = (
        (q.shape, k_cache.shape, v_cache.shape),
        (q.dtype, k_cache.dtype, v_cache.dtype),
        (q.device, k_cache.device, v_cache.device),
        None if k is None else _facts("k", k),
        None if v is None else _facts("v", v),
        None if rotary_cos is None else _facts("rotary_cos", rotary_cos),
        None if rotary_sin is None else _facts("rotary_sin", rotary_sin),
        "int" if host_length else None if cache_seqlens is None else _facts("cache_seqlens", cache_seqlens),
        None if cache_batch_idx is None else _facts("cache_batch_idx", cache_batch_idx),
        None if cache_leftpad is None else _facts("cache_leftpad", cache_leftpad),
        None if block_table is None else _facts("block_table", block_table),
        None if alibi_slopes is None else _alibi_facts(alibi_slopes),
    )
    left, right = window_size
    options = rotary_interleaved, num_splits, softmax_scale, causal, left, right, softcap
    if torch.is_grad_enabled():
        _check_no_gradient("flash_attn_with_kvcache", q, k_cache, v_cache, k, v)
    problem = _remembered(_cache, tensors, options)
    if host_length:
        _check_length(problem, cache_seqlens, k, rotary_cos)
    return problem


def _remembered(make: Callable[..., Problem], tensors: tuple, options: tuple) -> Problem:
    try:
        return make(tensors, *options)
    except TypeError:  # a check failed, or an argument cannot be hashed: then a check names it
        pass
    return make.__wrapped__(tensors, *options)


# typed: otherwise a window of 3.0, which is an error, would be served the entry of 3. It takes time for each
# argument, so the facts of the tensors are one.
@lru_cache(maxsize=1024, typed=True)
def _dense(tensors: tuple, *options: object) -> Problem:
    shapes, dtypes, devices, alibi = tensors
    for name, shape in zip("qkv", shapes, strict=True):
        _check_rank(name, shape, "batch, seqlen, heads, head_dim")
    _check_heads(*shapes)
    (batch, seqlen_q, heads_q, head_dim), (batch_k, seqlen_k, heads_k, _) = shapes[:2]
    if batch != batch_k:
        raise ValueError(f"q, k and v must have one batch size, but q has {batch} and k has {batch_k}")
    _check_dtypes_and_devices(dtypes, devices)
    facts = Problem(dtypes[0], devices[0], batch, seqlen_q, seqlen_k, heads_q, heads_k, head_dim, 1.0)
    return _with_options(replace(facts, max_seqlen_q=seqlen_q), alibi, *options)


@lru_cache(maxsize=1024, typed=True)
def _varlen(tensors: tuple, max_seqlen_q: int | None, *options: object) -> Problem:
    shapes, dtypes, devices, cu_seqlens_q, cu_seqlens_k, seqused_k, block_table, out, alibi = tensors
    q, k, v = shapes
    device = devices[0]
    _check_rank("q", q, "total_q, heads, head_dim")
    if cu_seqlens_k is None and seqused_k is None:
        raise ValueError("cu_seqlens_k or seqused_k must be given: the lengths of the sequences of keys")
    packed_k = block_table is None and cu_seqlens_k is not None
    dims = "total_k, heads_k, head_dim" if packed_k else "batch, capacity, heads_k, head_dim"
    if block_table is not None:
        dims = "num_blocks, page_size, heads_k, head_dim"
    for name, shape in (("k", k), ("v", v)):
        _check_rank(name, shape, dims)
    _check_heads(*shapes)
    _check_dtypes_and_devices(dtypes, devices)

    _check_index("cu_seqlens_q", cu_seqlens_q, device, "batch + 1")
    batch = cu_seqlens_q[0][0] - 1
    if batch < 0:
        raise ValueError("cu_seqlens_q must have batch + 1 elements, not none")
    if cu_seqlens_k is not None:
        _check_index("cu_seqlens_k", cu_seqlens_k, device, "batch + 1", (batch + 1,))
    if seqused_k is not None:
        _check_index("seqused_k", seqused_k, device, "batch", (batch,))
    if block_table is not None:
        _check_index("block_table", block_table, device, "batch, max_pages", (batch, None))
    elif not packed_k and k[0] != batch:
        raise ValueError(f"k and v must have the batch size of cu_seqlens_q, {batch}, not {k[0]}")
    if out is not None and out != (q, dtypes[0], device):
        raise ValueError(
            f"out must be like q, {tuple(q)} {dtypes[0]} on {device}, "
            f"but is {tuple(out[0])} {out[1]} on {out[2]}"
        )
    page_size, seqlen_k = 0, k[0 if packed_k else 1]
    if block_table is not None:
        page_size, seqlen_k = _page_size("k", k), block_table[0][1] * k[1]
    facts = Problem(dtypes[0], device, batch, q[0], seqlen_k, q[1], k[-2], q[2], 1.0)
    facts = replace(
        facts,
        ragged=True,
        packed_q=True,
        packed_k=packed_k,
        page_size=page_size,
        max_seqlen_q=q[0] if max_seqlen_q is None else min(q[0], max_seqlen_q),
    )
    return _with_options(facts, alibi, *options)


@lru_cache(maxsize=1024, typed=True)
def _cache(tensors: tuple, rotary_interleaved: bool, num_splits: int, *options: object) -> Problem:
    shapes, dtypes, devices, k, v, rotary_cos, rotary_sin, *others = tensors
    cache_seqlens, cache_batch_idx, cache_leftpad, block_table, alibi = others
    names = "q", "k_cache", "v_cache"
    dims = "batch_cache, capacity" if block_table is None else "num_blocks, page_size"
    for name, shape, first in zip(names, shapes, ("batch, seqlen_q", dims, dims), strict=True):
        _check_rank(name, shape, f"{first}, heads, head_dim")
    _check_heads(*shapes, names=names)
    _check_dtypes_and_devices(dtypes, devices, names)
    q, k_cache, _ = shapes
    device, batch = devices[0], q[0]

    _check_new_keys(k, v, (batch, None, *k_cache[2:]), dtypes[0], device)
    if k is not None and cache_seqlens is None:
        raise ValueError("cache_seqlens must be given with k and v: where in the cache they go")
    if isinstance(cache_seqlens, tuple):
        _check_index("cache_seqlens", cache_seqlens, device, "batch", (batch,))
    if cache_batch_idx is not None:
        _check_index("cache_batch_idx", cache_batch_idx, device, "batch", (batch,))
    if cache_leftpad is not None:
        _check_index("cache_leftpad", cache_leftpad, device, "batch", (batch,))
    page_size, capacity, rows = 0, k_cache[1], k_cache[0]
    if block_table is not None:
        _check_index("block_table", block_table, device, "batch, max_pages", (None, None))
        page_size, rows = _page_size("k_cache", k_cache), block_table[0][0]
        capacity = page_size * block_table[0][1]
    needed = batch if cache_batch_idx is None else min(batch, 1)
    if rows < needed:
        name = "k_cache" if block_table is None else "block_table"
        raise ValueError(f"{name} must have at least {needed} rows for {batch} sequences, not {rows}")
    _check_rotary(rotary_cos, rotary_sin, k, dtypes[0], device, q[3])
    _flag("rotary_interleaved", rotary_interleaved)
    if not isinstance(num_splits, Integral):
        raise TypeError(f"num_splits must be an int, not {type(num_splits).__name__}")
    if not 0 <= num_splits <= MAX_SPLITS:
        raise ValueError(f"num_splits must be in 0 (automatic) to {MAX_SPLITS}, not {num_splits}")

    facts = Problem(dtypes[0], device, batch, q[1], capacity, q[2], k_cache[2], q[3], 1.0)
    facts = replace(
        facts, ragged=True, page_size=page_size, left_padded=cache_leftpad is not None, max_seqlen_q=q[1]
    )
    # A window decides at which positions several queries are rotated, even where it hides no key.
    keep_window = rotary_cos is not None and q[1] > 1
    return _with_options(facts, alibi, 0.0, *options, deterministic=False, keep_window=keep_window)


def _with_options(
    problem: Problem,
    alibi: Facts | None,
    dropout_p: float,
    softmax_scale: float | None,
    causal: bool,
    window_left: int | None,
    window_right: int | None,
    softcap: float,
    deterministic: bool,
    keep_window: bool = False,
) -> Problem:
    """The problem with the options that all functions share, checked and in their normal form."""
    if alibi is not None:
        _check_alibi(alibi, problem.batch, problem.heads_q, problem.device)
    compute = torch.float64 if problem.dtype == torch.float64 else torch.float32
    dropout_p = _number("dropout_p", dropout_p, compute)
    if not 0 <= dropout_p < 1:
        raise ValueError(f"dropout_p must be in [0, 1), not {dropout_p}")
    left = _limit("left", window_left)
    right = 0 if _flag("causal", causal) else _limit("right", window_right)
    # A limit that hides no key from any query is none: the last query has seqlen_k - 1 keys to
    # the left of its diagonal, the first one seqlen_q - 1 to the right. Where these are bounds of
    # the lengths, that holds for each sequence.
    if not keep_window and left is not None and left >= problem.seqlen_k - 1:
        left = None
    if not keep_window and right is not None and right >= problem.seqlen_q - 1:
        right = None
    return replace(
        problem,
        softmax_scale=(
            problem.head_dim**-0.5
            if softmax_scale is None
            else _number("softmax_scale", softmax_scale, compute)
        ),
        window_left=left,
        window_right=right,
        softcap=max(0.0, _number("softcap", softcap, compute)),
        alibi=alibi is not None,
        dropout_p=dropout_p,
        deterministic=_flag("deterministic", deterministic),
    )


def _check_rank(name: str, shape: torch.Size, dims: str) -> None:
    rank = dims.count(",") + 1
    if len(shape) != rank:
        raise ValueError(f"{name} must have {rank} dimensions ({dims}), but its shape is {tuple(shape)}")


def _check_heads(
    q: torch.Size, k: torch.Size, v: torch.Size, names: tuple[str, str, str] = ("q", "k", "v")
) -> None:
    name_q, name_k, name_v = names
    every = f"{name_q}, {name_k} and {name_v}"
    if k != v:
        raise ValueError(
            f"{name_k} and {name_v} must have one shape, "
            f"but {name_k} is {tuple(k)} and {name_v} is {tuple(v)}"
        )
    if q[-1] != k[-1]:
        raise ValueError(f"{every} must have one head_dim, but {name_q} has {q[-1]} and {name_k} has {k[-1]}")
    if not 1 <= q[-1] <= MAX_HEAD_DIM:
        raise ValueError(f"head_dim of {every} must be in 1 to {MAX_HEAD_DIM}, not {q[-1]}")
    if k[-2] == 0 or q[-2] == 0 or q[-2] % k[-2]:
        raise ValueError(
            f"the heads of {name_q} ({q[-2]}) must be a multiple of the heads of {name_k} ({k[-2]})"
        )


def _check_dtypes_and_devices(
    dtypes: tuple[torch.dtype, ...],
    devices: tuple[torch.device, ...],
    names: tuple[str, str, str] = ("q", "k", "v"),
) -> None:
    every = "{}, {} and {}"
    for what, values in (("dtype", dtypes), ("device", devices)):
        if len(set(values)) > 1:
            raise ValueError(
                f"{every.format(*names)} must have one {what}, but they have {every.format(*values)}"
            )
    if dtypes[0] not in DTYPES:
        allowed = ", ".join(str(dtype) for dtype in DTYPES)
        raise TypeError(f"{every.format(*names)} must be one of {allowed}, not {dtypes[0]}")


def _check_index(
    name: str,
    facts: Facts,
    device: torch.device,
    dims: str,
    sizes: tuple[int | None, ...] | None = None,
) -> None:
    """An int32 tensor of these sizes; a size of None may be any."""
    shape, dtype, its_device = facts
    if dtype != torch.int32:
        raise TypeError(f"{name} must be torch.int32, not {dtype}")
    if its_device != device:
        raise ValueError(f"{name} is on {its_device}, but q is on {device}")
    _check_rank(name, shape, dims)
    if sizes is not None:
        _check_sizes(name, shape, dims, sizes)


def _check_sizes(name: str, shape: torch.Size, dims: str, sizes: tuple[int | None, ...]) -> None:
    """The shape is `sizes`; a size of None may be any."""
    if len(shape) != len(sizes) or any(n not in (size, None) for size, n in zip(shape, sizes, strict=True)):
        wanted = ", ".join("*" if n is None else str(n) for n in sizes)
        raise ValueError(f"{name} must have shape ({dims}) = ({wanted}), not {tuple(shape)}")


def _page_size(name: str, pages: torch.Size) -> int:
    if pages[0] == 0 or pages[1] == 0:
        raise ValueError(f"{name} must have at least one page of at least one token, not {tuple(pages)}")
    return pages[1]


def _check_new_keys(
    k: Facts | None,
    v: Facts | None,
    sizes: tuple[int | None, ...],
    dtype: torch.dtype,
    device: torch.device,
) -> None:
    if (k is None) != (v is None):
        raise ValueError("k and v must be given together")
    if k is None:
        return
    for name, facts in (("k", k), ("v", v)):
        _check_sizes(name, facts[0], "batch, seqlen_new, heads_k, head_dim", sizes)
        _check_like_q(name, facts, dtype, device)
    if k[0] != v[0]:
        raise ValueError(f"k and v must have one shape, but k is {tuple(k[0])} and v is {tuple(v[0])}")


def _check_rotary(
    cos: Facts | None,
    sin: Facts | None,
    k: Facts | None,
    dtype: torch.dtype,
    device: torch.device,
    head_dim: int,
) -> None:
    if (cos is None) != (sin is None):
        raise ValueError("rotary_cos and rotary_sin must be given together")
    if cos is None:
        return
    if k is None:
        raise ValueError("rotary_cos and rotary_sin need k and v: keys are rotated when they are written")
    for name, facts in (("rotary_cos", cos), ("rotary_sin", sin)):
        _check_rank(name, facts[0], "seqlen_ro, rotary_dim / 2")
        _check_like_q(name, facts, dtype, device)
    if cos[0] != sin[0]:
        raise ValueError(
            "rotary_cos and rotary_sin must have one shape, "
            f"but they have {tuple(cos[0])} and {tuple(sin[0])}"
        )
    if cos[0][0] == 0:
        raise ValueError("rotary_cos and rotary_sin must have at least one row")
    rotary_dim = 2 * cos[0][1]
    if rotary_dim % 16 or not 0 < rotary_dim <= head_dim:
        raise ValueError(
            f"rotary_cos and rotary_sin must have shape (seqlen_ro, rotary_dim / 2) with a rotary_dim that "
            f"is a multiple of 16 and at most head_dim, {head_dim}, not {rotary_dim}"
        )


def _check_like_q(name: str, facts: Facts, dtype: torch.dtype, device: torch.device) -> None:
    if facts[1:] != (dtype, device):
        raise ValueError(f"{name} must be {dtype} on {device}, as q is, not {facts[1]} on {facts[2]}")


def _check_length(problem: Problem, length: int, k: Tensor | None, rotary_cos: Tensor | None) -> None:
    """A cache length that the host knows, with the new keys that go behind it."""
    added = 0 if k is None else k.shape[1]
    if length < 0 or length + added > problem.seqlen_k:
        plus = f" + {added} new keys" if added else ""
        raise ValueError(f"cache_seqlens{plus} must be in 0 to {problem.seqlen_k}, not {length}{plus}")
    if rotary_cos is not None:
        windowed = problem.window_left is not None or problem.window_right is not None
        needed = length + max(added, problem.seqlen_q if windowed else 1)
        if needed > rotary_cos.shape[0]:
            raise ValueError(
                f"rotary_cos must have at least {needed} rows, cache_seqlens + the new tokens, "
                f"not {rotary_cos.shape[0]}"
            )


def _check_no_gradient(what: str, *tensors: Tensor | None) -> None:
    """ValueError if one of the tensors requires a gradient; the caller knows that gradients are enabled."""
    for x in tensors:
        if x is not None and x.requires_grad:
            raise ValueError(
                f"{what} has no gradient, but an input requires one: call it under torch.no_grad()"
            )


def _max_seqlen(name: str, value: int | Tensor) -> int | None:
    """The caller's number; None where it lives on a GPU: reading it would wait for the GPU."""
    if type(value) is int and value >= 0:
        return value
    if isinstance(value, Tensor):
        if value.numel() != 1 or value.is_floating_point() or value.is_complex():
            raise TypeError(f"{name} must be an int or an integer tensor of one element")
        if value.device.type != "cpu":
            return None
        value = value.item()
    if not isinstance(value, Integral):
        raise TypeError(f"{name} must be an int, not {type(value).__name__}")
    if value < 0:
        raise ValueError(f"{name} must not be negative, but is {value}")
    return int(value)


def _facts(name: str, x: Tensor) -> Facts:
    if not isinstance(x, Tensor):
        raise TypeError(_not_a_tensor(**{name: x}))
    return x.shape, x.dtype, x.device


def _alibi_facts(alibi_slopes: Tensor) -> Facts:
    if not isinstance(alibi_slopes, Tensor):
        raise TypeError(_not_a_tensor(alibi_slopes=alibi_slopes))
    if alibi_slopes.requires_grad and torch.is_grad_enabled():
        raise ValueError("alibi_slopes gets no gradient: pass alibi_slopes.detach()")
    return alibi_slopes.shape, alibi_slopes.dtype, alibi_slopes.device


def _check_alibi(
    alibi: Facts,
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
