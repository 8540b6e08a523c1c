"""Every rule that the arguments of a call must obey: on facts, on numbers, on values in device memory.

Facts are what the host knows of a tensor. Values (lengths, tables) are checked by a debug switch,
MINI_FLASH_ATTENTION_CHECK=1: it waits for the device in each call of flash_attn_varlen_func and
flash_attn_with_kvcache, so it has no place in a graph capture. Without it wrong lengths are cut to
what the tensors hold, wrong pages and rows may be read, and nothing outside the tensors is written.

An error names the argument: TypeError or ValueError, before anything runs.
"""

import math
from collections.abc import Sequence
from numbers import Integral, Real
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mini_flash_attention import environment
from mini_flash_attention.kernels.decode.splits import MAX_SPLITS

if TYPE_CHECKING:
    from mini_flash_attention.problem import CacheUpdate, Layout, Lengths, Problem

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
MAX_HEAD_DIM = 256

Facts = tuple[torch.Size, torch.dtype, torch.device]  # of a tensor

_switch = environment.reader("MINI_FLASH_ATTENTION_CHECK")


# Tensors


def facts(name: str, x: Tensor) -> Facts:
    if not isinstance(x, Tensor):
        raise TypeError(not_a_tensor(**{name: x}))
    return x.shape, x.dtype, x.device


def not_a_tensor(**arguments: object) -> str:
    """What to say of the first argument that is none."""
    name, value = next(item for item in arguments.items() if not isinstance(item[1], Tensor))
    return f"{name} must be a torch.Tensor, not {type(value).__name__}"


def rank(name: str, shape: torch.Size, dims: str) -> None:
    rank = dims.count(",") + 1
    if len(shape) != rank:
        raise ValueError(f"{name} must have {rank} dimensions ({dims}), but its shape is {tuple(shape)}")


def sizes(name: str, shape: torch.Size, dims: str, sizes: tuple[int | None, ...]) -> None:
    """The shape is `sizes`; a size of None may be any."""
    if len(shape) != len(sizes) or any(n not in (size, None) for size, n in zip(shape, sizes, strict=True)):
        wanted = ", ".join("*" if n is None else str(n) for n in sizes)
        raise ValueError(f"{name} must have shape ({dims}) = ({wanted}), not {tuple(shape)}")


def heads(q: torch.Size, k: torch.Size, v: torch.Size, names: tuple[str, str, str] = ("q", "k", "v")) -> None:
    """The last two dimensions, heads and head_dim, of q, k and v fit each other."""
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


def same_batch(batch_q: int, batch_k: int) -> None:
    if batch_q != batch_k:
        raise ValueError(f"q, k and v must have one batch size, but q has {batch_q} and k has {batch_k}")


def dtypes_and_devices(
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


def index(
    name: str, x: Facts | None, device: torch.device, dims: str, wanted: tuple[int | None, ...] | None = None
) -> None:
    """An int32 tensor of the sizes `wanted`, if it is given; a size of None may be any."""
    if x is None:
        return
    shape, dtype, its_device = x
    if dtype != torch.int32:
        raise TypeError(f"{name} must be torch.int32, not {dtype}")
    if its_device != device:
        raise ValueError(f"{name} is on {its_device}, but q is on {device}")
    rank(name, shape, dims)
    if wanted is not None:
        sizes(name, shape, dims, wanted)


def batch_of(cu_seqlens_q: Facts, device: torch.device) -> int:
    index("cu_seqlens_q", cu_seqlens_q, device, "batch + 1")
    if cu_seqlens_q[0][0] == 0:
        raise ValueError("cu_seqlens_q must have batch + 1 elements, not none")
    return cu_seqlens_q[0][0] - 1


def some_lengths(cu_seqlens_k: Facts | None, seqused_k: Facts | None) -> None:
    if cu_seqlens_k is None and seqused_k is None:
        raise ValueError("cu_seqlens_k or seqused_k must be given: the lengths of the sequences of keys")


def rows_of_batch(rows: int, batch: int) -> None:
    if rows != batch:
        raise ValueError(f"k and v must have the batch size of cu_seqlens_q, {batch}, not {rows}")


def enough_rows(name: str, rows: int, needed: int, batch: int) -> None:
    """A cache, or a block table, has a row for each sequence."""
    if rows < needed:
        raise ValueError(f"{name} must have at least {needed} rows for {batch} sequences, not {rows}")


def page_size(name: str, pages: torch.Size) -> int:
    if pages[0] == 0 or pages[1] == 0:
        raise ValueError(f"{name} must have at least one page of at least one token, not {tuple(pages)}")
    return pages[1]


def out_like_q(out: Facts | None, q: Facts) -> None:
    if out not in (None, q):
        raise ValueError(
            f"out must be like q, {tuple(q[0])} {q[1]} on {q[2]}, but is {tuple(out[0])} {out[1]} on {out[2]}"
        )


def like_q(name: str, x: Facts, q: tuple[torch.dtype, torch.device]) -> None:
    if x[1:] != q:
        raise ValueError(f"{name} must be {q[0]} on {q[1]}, as q is, not {x[1]} on {x[2]}")


def new_keys(
    k: Facts | None,
    v: Facts | None,
    wanted: tuple[int | None, ...],
    q: tuple[torch.dtype, torch.device],
    cache_seqlens: object,
) -> None:
    """What is to be appended to a cache."""
    if (k is None) != (v is None):
        raise ValueError("k and v must be given together")
    if k is None:
        return
    for name, x in (("k", k), ("v", v)):
        sizes(name, x[0], "batch, seqlen_new, heads_k, head_dim", wanted)
        like_q(name, x, q)
    if k[0] != v[0]:
        raise ValueError(f"k and v must have one shape, but k is {tuple(k[0])} and v is {tuple(v[0])}")
    if cache_seqlens is None:
        raise ValueError("cache_seqlens must be given with k and v: where in the cache they go")


def rotary(
    cos: Facts | None,
    sin: Facts | None,
    k: Facts | None,
    q: tuple[torch.dtype, torch.device],
    head_dim: int,
) -> None:
    if (cos is None) != (sin is None):
        raise ValueError("rotary_cos and rotary_sin must be given together")
    if cos is None:
        return
    if k is None:
        raise ValueError("rotary_cos and rotary_sin need k and v: keys are rotated when they are written")
    for name, x in (("rotary_cos", cos), ("rotary_sin", sin)):
        rank(name, x[0], "seqlen_ro, rotary_dim / 2")
        like_q(name, x, q)
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


def facts_of_alibi(alibi_slopes: Tensor) -> Facts:
    found = facts("alibi_slopes", alibi_slopes)
    if alibi_slopes.requires_grad and torch.is_grad_enabled():
        raise ValueError("alibi_slopes gets no gradient: pass alibi_slopes.detach()")
    return found


def alibi(slopes: Facts | None, batch: int, heads: int, device: torch.device) -> None:
    if slopes is None:
        return
    shape, dtype, its_device = slopes
    if shape not in ((heads,), (batch, heads)):
        raise ValueError(
            f"alibi_slopes must have shape (heads,) = ({heads},) or (batch, heads) = "
            f"({batch}, {heads}), not {tuple(shape)}"
        )
    if dtype != torch.float32:
        raise TypeError(f"alibi_slopes must be torch.float32, not {dtype}")
    if its_device != device:
        raise ValueError(f"alibi_slopes is on {its_device}, but q, k and v are on {device}")


def no_gradient(what: str, *tensors: Tensor | None) -> None:
    """None of the tensors requires a gradient while gradients are enabled."""
    if torch.is_grad_enabled():
        for x in tensors:
            if x is not None and x.requires_grad:
                raise ValueError(
                    f"{what} has no gradient, but an input requires one: call it under torch.no_grad()"
                )


def packed(name: str, x: Tensor, dims: str) -> int:
    """The dimension along which q, k and v are packed: the one whose name is a number."""
    facts(name, x)
    names = dims.split(", ")
    place = len(names) - 3
    if x.ndim != len(names) or x.shape[place] != int(names[place]):
        raise ValueError(f"{name} must have shape ({dims}), not {tuple(x.shape)}")
    return place


# Numbers


def pair(window_size: object) -> Sequence[int | None]:
    """The two numbers of a window_size that is not a tuple of two."""
    if window_size is None:
        return None, None
    two = window_size.tolist() if hasattr(window_size, "tolist") else window_size
    if not isinstance(two, (tuple, list)):
        raise TypeError(f"window_size must be a pair of ints, not {type(window_size).__name__}")
    if len(two) != 2:
        raise ValueError(f"window_size must have two elements (left, right), not {len(two)}")
    return two


def limit(side: str, value: int | None) -> int | None:
    """One side of the window; None is no limit, as is any negative number."""
    if value is None:
        return None
    if not isinstance(value, Integral):
        raise TypeError(f"window_size must be a pair of ints (or None: no limit), but {side} is {value!r}")
    return int(value) if value >= 0 else None


def max_seqlen(name: str, value: int | Tensor) -> int | None:
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


def number(name: str, value: float, compute: torch.dtype) -> float:
    """A number that is finite in the dtype of the computation."""
    if not isinstance(value, Real):
        raise TypeError(f"{name} must be a number, not {type(value).__name__}")
    try:
        result = float(value)
    except OverflowError:
        result = math.inf if value > 0 else -math.inf
    if not abs(result) <= torch.finfo(compute).max:  # nan is not, either
        raise ValueError(f"{name} must be finite in {compute}, not {result}")
    return result


def probability(name: str, value: float, compute: torch.dtype) -> float:
    p = number(name, value, compute)
    if not 0 <= p < 1:
        raise ValueError(f"{name} must be in [0, 1), not {p}")
    return p


def flag(name: str, value: bool) -> bool:
    # Not just bool(value): an array's or a tensor's may be ambiguous, or change under the cache.
    kind = type(value)
    numpy_bool = kind.__module__ == "numpy" and kind.__name__ in ("bool", "bool_")  # NumPy 2, 1
    if not (numpy_bool or isinstance(value, Integral)):
        raise TypeError(f"{name} must be a bool, 0 or 1, not {kind.__name__}")
    if value not in (0, 1):
        raise ValueError(f"{name} must be a bool, 0 or 1, and no other int")
    return bool(value)


def splits(num_splits: int) -> None:
    if not isinstance(num_splits, Integral):
        raise TypeError(f"num_splits must be an int, not {type(num_splits).__name__}")
    if not 0 <= num_splits <= MAX_SPLITS:
        raise ValueError(f"num_splits must be in 0 (automatic) to {MAX_SPLITS}, not {num_splits}")


def length(problem: "Problem", before: int, update: "CacheUpdate | None") -> None:
    """A cache length that the host knows, with the new keys that go behind it."""
    added = 0 if update is None else update.added
    if before < 0 or before + added > problem.seqlen_k:
        plus = f" + {added} new keys" if added else ""
        raise ValueError(f"cache_seqlens{plus} must be in 0 to {problem.seqlen_k}, not {before}{plus}")
    if update is not None and update.rotary_cos is not None:
        needed = before + positions(problem, update)
        if needed > len(update.rotary_cos):
            raise ValueError(
                f"rotary_cos must have at least {needed} rows, cache_seqlens + the new tokens, "
                f"not {len(update.rotary_cos)}"
            )


def positions(problem: "Problem", update: "CacheUpdate") -> int:
    """Rows of the rotary tables that a sequence takes, behind those of the keys it has."""
    return max(update.added, problem.seqlen_q if problem.windowed else 1)


# Values on the device


def of_values() -> bool:
    """Whether the debug switch is on."""
    return _switch() not in (None, "", "0")


def values_of_varlen(problem: "Problem", layout: "Layout", given: "Lengths", num_pages: int) -> None:
    """What flash_attn_varlen_func is given.

    With pages the layout may have the lengths that cu_seqlens_k gives as seqused_k. num_pages: of k.
    """
    cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, _, seqused_k = given
    lengths = _lengths("cu_seqlens_q", cu_seqlens_q.tolist(), problem.seqlen_q)
    _check_longest("cu_seqlens_q", "max_seqlen_q", lengths, max_seqlen_q)
    storage = [problem.seqlen_k] * problem.batch
    if cu_seqlens_k is not None:
        total = problem.seqlen_k if problem.packed_k else None
        lengths = _lengths("cu_seqlens_k", cu_seqlens_k.tolist(), total)
        storage = lengths if problem.packed_k else storage
        _check_longest("cu_seqlens_k", "max_seqlen_k", lengths, max_seqlen_k)
    if layout.seqused_k is not None:
        lengths, name = layout.seqused_k.tolist(), "cu_seqlens_k" if seqused_k is None else "seqused_k"
        _check_range(name, lengths, storage)
        _check_longest(name, "max_seqlen_k", lengths, max_seqlen_k)
    if layout.block_table is not None:
        starts = [0] * problem.batch
        _check_pages(problem, layout, range(problem.batch), starts, lengths, num_pages)


def values_of_cache(
    problem: "Problem", layout: "Layout", update: "CacheUpdate | None", shape: tuple[int, ...]
) -> None:
    """What flash_attn_with_kvcache is given; shape: of k_cache."""
    batch, capacity = problem.batch, problem.seqlen_k
    added = 0 if update is None else update.added
    before = [capacity if layout.keys is None else layout.keys] * batch
    if layout.seqused_k is not None:
        before = layout.seqused_k.tolist()
    _check_range("cache_seqlens", before, [capacity - added] * batch)
    ends = [length + added for length in before]
    starts = [0] * batch
    if layout.leftpad_k is not None:
        starts = layout.leftpad_k.tolist()
        _check_range("cache_leftpad", starts, ends)
    rows = range(batch)
    if layout.batch_idx is not None:
        rows = layout.batch_idx.tolist()
        last = (shape if layout.block_table is None else layout.block_table.shape)[0] - 1
        _check_range("cache_batch_idx", rows, [last] * batch)
    if layout.block_table is not None:
        _check_pages(problem, layout, rows, starts, ends, shape[0])
    if update is not None and update.rotary_cos is not None:
        there = len(update.rotary_cos)
        for b, length in enumerate(before):
            needed = length + positions(problem, update)
            if needed > there:
                raise ValueError(f"rotary_cos has {there} rows, but sequence {b} needs {needed}")


def _lengths(name: str, starts: list[int], total: int | None) -> list[int]:
    """The lengths that cumulative ones give; total: the tokens there are."""
    if starts[0] != 0:
        raise ValueError(f"{name} must start at 0, not {starts[0]}")
    lengths = [end - start for start, end in zip(starts, starts[1:], strict=False)]
    for b, length in enumerate(lengths):
        if length < 0:
            raise ValueError(f"{name}: sequence {b} ends at {starts[b + 1]}, before its start at {starts[b]}")
        if total is not None and starts[b + 1] > total:
            raise ValueError(f"{name}: sequence {b} ends at {starts[b + 1]}, but there are {total} tokens")
    return lengths


def _check_longest(name: str, name_longest: str, lengths: list[int], longest: int | Tensor) -> None:
    longest = int(longest)
    for b, length in enumerate(lengths):
        if length > longest:
            raise ValueError(f"{name}: sequence {b} has {length} tokens, but {name_longest} is {longest}")


def _check_range(name: str, values: list[int], largest: list[int]) -> None:
    for b, (value, limit) in enumerate(zip(values, largest, strict=True)):
        if not 0 <= value <= limit:
            raise ValueError(f"{name} of sequence {b} must be in 0 to {limit}, not {value}")


def _check_pages(
    problem: "Problem",
    layout: "Layout",
    rows: range | list[int],
    starts: list[int],
    ends: list[int],
    num_pages: int,
) -> None:
    """The pages that hold the tokens from start to end of each sequence exist."""
    table = layout.block_table.tolist()
    for b, (row, start, end) in enumerate(zip(rows, starts, ends, strict=True)):
        first, last = start // problem.page_size, -(-end // problem.page_size)
        for i, page in enumerate(table[row][first:last], first):
            if not 0 <= page < num_pages:
                raise ValueError(
                    f"block_table[{row}, {i}], a page of sequence {b}, must be in 0 to {num_pages - 1}, "
                    f"not {page}"
                )
