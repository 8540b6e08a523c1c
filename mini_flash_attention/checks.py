"""Every rule that the arguments of a call must obey: on facts, on numbers, on values in device memory.

Facts are what the host knows of a tensor. Values (lengths, tables) are checked on the CPU, and on a GPU by a
debug switch, MINI_FLASH_ATTENTION_CHECK=1: there it waits for the device in each call of
flash_attn_varlen_func and flash_attn_with_kvcache, so it has no place in a graph capture. Unchecked, as with
MINI_FLASH_ATTENTION_CHECK=0 on the CPU too, wrong lengths are cut to what the tensors hold, wrong pages and
rows may be read, and nothing outside the tensors is written.

An error names the argument: TypeError or ValueError, before anything runs.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from numbers import Integral, Real
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mini_flash_attention import environment, overlap
from mini_flash_attention.kernels.decode.splits import MAX_SPLITS

if TYPE_CHECKING:
    from mini_flash_attention.block_mask import BlockMask
    from mini_flash_attention.problem import CacheUpdate, Layout, Lengths, Problem

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
MAX_HEAD_DIM = 256
STRIDED = torch.strided  # looked up once: every call asks

Facts = tuple[torch.Size, torch.dtype, torch.device]  # of a tensor

# What the caller calls an argument: packed functions have others than those that they are made of.
Names = Mapping[str, str]
OUR_NAMES = {
    name: name for name in ("q", "k", "v", "cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k")
}

OFF = "0", "false", "no", "off"
_switch = environment.reader("MINI_FLASH_ATTENTION_CHECK")


def require(condition: bool, message: str, error: type[Exception] = ValueError) -> None:
    if not condition:
        raise error(message)


# Tensors


def facts(name: str, x: Tensor) -> Facts:
    """Of a tensor that is strided memory. A nested one has no shape: asked for it, it raises RuntimeError."""
    try:
        if x.layout is STRIDED:
            return x.shape, x.dtype, x.device
    except (AttributeError, RuntimeError):
        pass
    raise TypeError(not_strided(name, x))


def not_strided(name: str, x: object) -> str:
    """What to say of an argument that is no tensor of strided memory."""
    if not isinstance(x, Tensor):
        return f"{name} must be a torch.Tensor, not {type(x).__name__}"
    if x.is_nested:
        return f"{name} is a nested tensor: its values and offsets are packed sequences already"
    return f"{name} has the layout {x.layout}: pass it .to_dense()"


def every(words: Iterable[object]) -> str:
    """a, b and c; what is there twice is told once."""
    *others, last = dict.fromkeys(map(str, words))
    return f"{', '.join(others)} and {last}" if others else last


def rank(name: str, shape: torch.Size, dims: str) -> None:
    rank = dims.count(",") + 1
    message = f"{name} must have {rank} dimensions ({dims}), but its shape is {tuple(shape)}"
    require(len(shape) == rank, message)


def sizes(name: str, shape: torch.Size, dims: str, sizes: tuple[int | None, ...]) -> None:
    """The shape is `sizes`; a size of None may be any."""
    fits = len(shape) == len(sizes) and all(map(lambda size, n: n in (size, None), shape, sizes))
    wanted = ", ".join("*" if n is None else str(n) for n in sizes)
    require(fits, f"{name} must have shape ({dims}) = ({wanted}), not {tuple(shape)}")


def heads(names: tuple[str, str, str], q: torch.Size, k: torch.Size, v: torch.Size) -> None:
    """The last two dimensions, heads and head_dim, of q, k and v fit each other."""
    name_q, name_k, name_v = names
    all_three = every(names)
    one_shape(name_k, k, name_v, v)
    for name, shape in zip(names[:2], (q, k), strict=True):
        require(shape[-2] > 0, f"{name} must have at least one head, but its shape is {tuple(shape)}")
    (heads_q, head_dim), (heads_k, head_dim_k) = q[-2:], k[-2:]
    unlike = f"but {name_q} has {head_dim} and {name_k} has {head_dim_k}"
    require(head_dim == head_dim_k, f"{all_three} must have one head_dim, {unlike}")
    range_of = f"head_dim of {all_three} must be in 1 to {MAX_HEAD_DIM}, not {head_dim}"
    require(1 <= head_dim <= MAX_HEAD_DIM, range_of)
    message = f"the heads of {name_q} ({heads_q}) must be a multiple of the heads of {name_k} ({heads_k})"
    require(heads_q % heads_k == 0, message)


def one_shape(name_k: str, k: torch.Size, name_v: str, v: torch.Size) -> None:
    shapes = f"{name_k} is {tuple(k)} and {name_v} is {tuple(v)}"
    require(k == v, f"{name_k} and {name_v} must have one shape, but {shapes}")


def dtypes_and_devices(
    dtypes: tuple[torch.dtype, ...],
    devices: tuple[torch.device, ...],
    names: tuple[str, str, str],
) -> None:
    for what, values in (("dtype", dtypes), ("device", devices)):
        found = dict(zip(names, values, strict=True))  # of packed tensors, each once
        have = ", ".join(f"{name} has {value}" for name, value in found.items())
        require(len(set(values)) == 1, f"{every(names)} must have one {what}, but {have}")
    allowed = ", ".join(str(dtype) for dtype in DTYPES)
    message = f"{every(names)} must be one of {allowed}, not {dtypes[0]}"
    require(dtypes[0] in DTYPES, message, TypeError)


def index(
    name: str,
    x: Facts | None,
    q: tuple[str, torch.device],
    dims: str,
    wanted: tuple[int | None, ...] | None = None,
) -> None:
    """An int32 tensor of the sizes `wanted`, if it is given; a size of None may be any.

    q: what the caller calls it, and where it is.
    """
    if x is None:
        return
    shape, dtype, its_device = x
    require(dtype == torch.int32, f"{name} must be torch.int32, not {dtype}", TypeError)
    name_q, device = q
    require(its_device == device, f"{name} is on {its_device}, but {name_q} is on {device}")
    rank(name, shape, dims)
    if wanted is not None:
        sizes(name, shape, dims, wanted)


def like_q(name: str, x: Facts, q: tuple[torch.dtype, torch.device]) -> None:
    require(x[1:] == q, f"{name} must be {q[0]} on {q[1]}, as q is, not {x[1]} on {x[2]}")


def new_keys(
    k: Facts | None,
    v: Facts | None,
    wanted: tuple[int | None, ...],
    q: tuple[torch.dtype, torch.device],
    cache_seqlens: object,
) -> None:
    """What is to be appended to a cache."""
    require((k is None) == (v is None), "k and v must be given together")
    if k is None or v is None:
        return
    for name, x in (("k", k), ("v", v)):
        sizes(name, x[0], "batch, seqlen_new, heads_k, head_dim", wanted)
        like_q(name, x, q)
    one_shape("k", k[0], "v", v[0])
    message = "cache_seqlens must be given with k and v: where in the cache they go"
    require(cache_seqlens is not None, message)


def rotary(
    cos: Facts | None,
    sin: Facts | None,
    k: Facts | None,
    q: tuple[torch.dtype, torch.device],
    head_dim: int,
) -> None:
    tables = "rotary_cos and rotary_sin"
    require((cos is None) == (sin is None), f"{tables} must be given together")
    if cos is None or sin is None:
        return
    require(k is not None, f"{tables} need k and v: keys are rotated when they are written")
    for name, x in (("rotary_cos", cos), ("rotary_sin", sin)):
        rank(name, x[0], "seqlen_ro, rotary_dim / 2")
        like_q(name, x, q)
    shapes = f"{tuple(cos[0])} and {tuple(sin[0])}"
    require(cos[0] == sin[0], f"{tables} must have one shape, but they have {shapes}")
    require(cos[0][0] > 0, f"{tables} must have at least one row")
    rotary_dim = 2 * cos[0][1]
    message = (
        f"{tables} must have shape (seqlen_ro, rotary_dim / 2) with a rotary_dim that is a multiple "
        f"of 16 and at most head_dim, {head_dim}, not {rotary_dim}"
    )
    require(rotary_dim % 16 == 0 and 0 < rotary_dim <= head_dim, message)


def facts_of_alibi(alibi_slopes: Tensor) -> Facts:
    found = facts("alibi_slopes", alibi_slopes)
    learned = alibi_slopes.requires_grad and torch.is_grad_enabled()
    require(not learned, "alibi_slopes gets no gradient: pass alibi_slopes.detach()")
    return found


def alibi(slopes: Facts | None, batch: int, heads: int, device: torch.device) -> None:
    if slopes is None:
        return
    shape, dtype, its_device = slopes
    allowed = f"(heads,) = ({heads},) or (batch, heads) = ({batch}, {heads})"
    message = f"alibi_slopes must have shape {allowed}, not {tuple(shape)}"
    require(shape in ((heads,), (batch, heads)), message)
    require(dtype == torch.float32, f"alibi_slopes must be torch.float32, not {dtype}", TypeError)
    require(its_device == device, f"alibi_slopes is on {its_device}, but the other tensors are on {device}")


def sinks(s_aux: Facts | None, heads: int, device: torch.device) -> None:
    if s_aux is None:
        return
    shape, dtype, its_device = s_aux
    require(shape == (heads,), f"s_aux must have shape (heads,) = ({heads},), not {tuple(shape)}")
    require(dtype in DTYPES, f"s_aux must be one of {', '.join(map(str, DTYPES))}, not {dtype}", TypeError)
    require(its_device == device, f"s_aux is on {its_device}, but the other tensors are on {device}")


def no_gradient(what: str, given: Mapping[str, Tensor | None]) -> None:
    """No tensor requires a gradient. To be asked while gradients are enabled."""
    for name, x in given.items():
        if x is not None and x.requires_grad:
            raise ValueError(
                f"{what} has no gradient, but {name} requires one: call it under torch.no_grad()"
            )


def no_second_derivative() -> None:
    """To be asked in a backward pass: autograd would warn, and take the second derivative for zero."""
    if torch.is_grad_enabled():
        raise RuntimeError("attention has no second derivative: create_graph must be False")


def out_alone(out: Tensor, given: Mapping[str, Tensor]) -> None:
    """out overlaps neither itself nor q, k, v. It may be q, of which a tile is read before it is written."""
    start, mine = out.data_ptr(), None
    end = start + out.nbytes
    if not out.is_contiguous():
        mine = _memory(out)
        require(not overlap.itself(mine), "out overlaps itself: each element needs memory of its own")
        end = mine.end
    for name, x in given.items():
        address = x.data_ptr()
        if address >= end or (x.is_contiguous() and address + x.nbytes <= start):
            continue  # nearly always
        mine, theirs = mine or _memory(out), _memory(x)
        if not (name == "q" and mine == theirs) and overlap.each_other(mine, theirs):
            raise ValueError(f"out shares memory with {name}, which is read while out is written")


def packed(name: str, x: Tensor, dims: str) -> int:
    """The dimension along which q, k and v are packed: the one whose name is a number."""
    facts(name, x)
    names = dims.split(", ")
    place = len(names) - 3
    fits = x.ndim == len(names) and x.shape[place] == int(names[place])
    if not fits:  # torch.compile traces through here, and cannot write a size into a text
        raise ValueError(f"{name} must have shape ({dims}), not {tuple(x.shape)}")
    return place


def _memory(x: Tensor) -> overlap.Memory:
    return overlap.Memory(x.data_ptr(), x.element_size(), x.shape, x.stride())


# Numbers


def pair(window_size: Any) -> Sequence[int | None]:
    """The two numbers of a window_size that is not a tuple of two."""
    if window_size is None:
        return None, None
    two = window_size.tolist() if hasattr(window_size, "tolist") else window_size
    message = f"window_size must be a pair of ints, not {type(window_size).__name__}"
    require(isinstance(two, (tuple, list)), message, TypeError)
    require(len(two) == 2, f"window_size must have two elements (left, right), not {len(two)}")
    return two


def limit(side: str, value: int | None) -> int | None:
    """One side of the window; None is no limit, as is any negative number."""
    if value is None:
        return None
    message = f"window_size must be a pair of ints (or None: no limit), but {side} is {value!r}"
    require(isinstance(value, Integral), message, TypeError)
    return int(value) if value >= 0 else None


def max_seqlen(name: str, value: int | Tensor) -> int | None:
    """The caller's number; None where it lives on a GPU: reading it would wait for the GPU."""
    if type(value) is int and value >= 0:
        return value
    if isinstance(value, Tensor):
        one_int = value.numel() == 1 and not value.is_floating_point() and not value.is_complex()
        require(one_int, f"{name} must be an int or an integer tensor of one element", TypeError)
        if value.device.type != "cpu":
            return None
        value = int(value)
    integer(name, value)
    require(value >= 0, f"{name} must not be negative, but is {value}")
    return int(value)


def integer(name: str, value: int) -> None:
    require(isinstance(value, Integral), f"{name} must be an int, not {type(value).__name__}", TypeError)


def number(name: str, value: float, compute: torch.dtype) -> float:
    """A number that is finite in the dtype of the computation."""
    require(isinstance(value, Real), f"{name} must be a number, not {type(value).__name__}", TypeError)
    try:
        result = float(value)
    except OverflowError:
        result = math.inf if value > 0 else -math.inf
    finite = abs(result) <= torch.finfo(compute).max  # nan is not, either
    require(finite, f"{name} must be finite in {compute}, not {result}")
    return result


def probability(name: str, value: float, compute: torch.dtype) -> float:
    p = number(name, value, compute)
    require(0 <= p < 1, f"{name} must be in [0, 1), not {p}")
    return p


def no_functions(watched: object) -> None:
    if watched:
        raise NotImplementedError(
            "score_mod and mask_mod: plain calls only, not torch.func, forward-mode derivatives, "
            "torch.export, tensor subclasses, FLOP counters or selective checkpointing"
        )


def block_mask(problem: "Problem", given: object, mask_mod: object) -> "BlockMask":
    """The block mask of a dense call, PyTorch's as ours."""
    from mini_flash_attention.block_mask import BlockMask

    require(
        mask_mod is None, "mask_mod: block_mask has one; combine them: create_block_mask(...) & block_mask"
    )
    if not isinstance(given, BlockMask):
        given = BlockMask.from_torch(given, problem.seqlen_q, problem.seqlen_k)
    require(given.block_size == 128, f"block_mask must have blocks of 128, not {given.block_size}")
    batch, heads, *lengths = given.shape
    ours = [problem.seqlen_q, problem.seqlen_k]
    require(lengths == ours, f"block_mask is for seqlen_q, seqlen_k = {lengths}, but they are {ours}")
    for name, size, expected in (("batch", batch, problem.batch), ("heads", heads, problem.heads_q)):
        require(size in (1, expected), f"block_mask is for {size} {name}, but q has {expected}")
    same = given.device == problem.device
    require(same, f"block_mask is on {given.device}; it must be on {problem.device}, as q is")
    windowed = (
        "causal and window_size: put them into the mask_mod of block_mask (masks.causal, sliding_window)"
    )
    require(not problem.windowed, windowed)
    return given


def captured(role: str, value: object, problem: "Problem") -> None:
    """A value that a score function captures."""
    if not isinstance(value, Tensor):
        return
    try:
        if value.layout is STRIDED and value.device == problem.device and 0 not in value.shape:
            return  # before the texts, which take longer
    except RuntimeError:  # a nested tensor has no shape
        pass
    shape, _, device = facts(f"a tensor that {role} captures", value)
    same = device == problem.device
    require(same, f"{role} captures a tensor on {device}; it must be on {problem.device}, as q is")
    require(problem.empty, f"{role} captures a tensor without elements, of shape {tuple(shape)}")


def flag(name: str, value: bool) -> bool:
    # Not just bool(value): an array's or a tensor's may be ambiguous, or change under the cache.
    kind = type(value)
    numpy_bool = kind.__module__ == "numpy" and kind.__name__ in ("bool", "bool_")  # NumPy 2, 1
    is_one = numpy_bool or isinstance(value, Integral)
    require(is_one, f"{name} must be a bool, 0 or 1, not {kind.__name__}", TypeError)
    require(value in (0, 1), f"{name} must be a bool, 0 or 1, and no other int")
    return bool(value)


def splits(num_splits: int) -> None:
    integer("num_splits", num_splits)
    message = f"num_splits must be in 0 (automatic) to {MAX_SPLITS}, not {num_splits}"
    require(0 <= num_splits <= MAX_SPLITS, message)


def length(problem: "Problem", before: int, update: "CacheUpdate | None") -> None:
    """A cache length that the host knows, with the new keys that go behind it."""
    added, capacity = 0 if update is None else update.added, problem.seqlen_k
    if not 0 <= before <= capacity - added:
        plus = f" + {added} new keys" if added else ""
        raise ValueError(f"cache_seqlens{plus} must be in 0 to {capacity}, not {before}{plus}")
    if update is not None and update.rotary_cos is not None:
        needed, rows = before + positions(problem, update), len(update.rotary_cos)
        needs = f"at least {needed} rows, cache_seqlens + the new tokens, not {rows}"
        require(rows >= needed, f"rotary_cos must have {needs}")


def positions(problem: "Problem", update: "CacheUpdate") -> int:
    """Rows of the rotary tables that a sequence takes, behind those of the keys it has."""
    return max(update.added, problem.seqlen_q if problem.windowed else min(1, problem.seqlen_q))


# Values on the device


def switched() -> bool | None:
    """What MINI_FLASH_ATTENTION_CHECK says; None if it is not set."""
    value = _switch()
    return value.lower() not in OFF if value else None


def of_values(x: Tensor) -> bool:
    """Whether to check values on the device of x."""
    value = _switch()
    return value.lower() not in OFF if value else x.is_cpu


def values_of_varlen(
    problem: "Problem", layout: "Layout", given: "Lengths", num_pages: int, names: Names
) -> None:
    """What flash_attn_varlen_func is given.

    With pages the layout may have the lengths that cu_seqlens_k gives as seqused_k. num_pages: of k.
    """
    cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, _, seqused_k, _ = given
    name_q, name_k, longest_q, longest_k = (names[name] for name in tuple(OUR_NAMES)[3:])
    queries = _lengths(name_q, cu_seqlens_q.tolist(), problem.seqlen_q)
    first = cu_seqlens_q[0].item()  # keys may start later: nobody reads those before
    require(first == 0, f"{name_q} must start at 0, not {first}")
    _check_longest(name_q, longest_q, queries, max_seqlen_q)
    storage = [problem.seqlen_k] * problem.batch
    if cu_seqlens_k is not None:
        total = problem.seqlen_k if problem.packed_k else None
        lengths = _lengths(name_k, cu_seqlens_k.tolist(), total)
        storage = lengths if problem.packed_k else storage
        _check_longest(name_k, longest_k, lengths, max_seqlen_k)
    if layout.seqused_k is not None:
        lengths, name = layout.seqused_k.tolist(), name_k if seqused_k is None else "seqused_k"
        _check_range(name, lengths, storage)
        _check_longest(name, longest_k, lengths, max_seqlen_k)
    if layout.block_table is not None:
        starts = [0] * problem.batch
        ends = [
            keys if rows else 0 for keys, rows in zip(lengths, queries, strict=True)
        ]  # pages that are read
        _check_pages(problem, layout, range(problem.batch), starts, ends, num_pages)


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
    rows: Sequence[int] = range(batch)
    if layout.batch_idx is not None:
        rows = layout.batch_idx.tolist()
        last = (shape if layout.block_table is None else layout.block_table.shape)[0] - 1
        _check_range("cache_batch_idx", rows, [last] * batch)
        if update is not None:
            require(len({*rows}) == batch, "cache_batch_idx: k and v are appended to one sequence twice")
    if layout.block_table is not None:
        _check_pages(problem, layout, rows, starts, ends, shape[0])
    if update is not None and update.rotary_cos is not None:
        there = len(update.rotary_cos)
        for b, length in enumerate(before):
            needed = length + positions(problem, update)
            require(needed <= there, f"rotary_cos has {there} rows, but sequence {b} needs {needed}")


def _lengths(name: str, starts: list[int], total: int | None) -> list[int]:
    """The lengths that cumulative ones give; total: the tokens there are."""
    room = math.inf if total is None else total
    require(0 <= starts[0] <= room, f"{name} must start at 0, not {starts[0]}")
    for b, (start, end) in enumerate(zip(starts, starts[1:], strict=False)):
        ends = f"{name}: sequence {b} ends at {end}"
        require(start <= end, f"{ends}, before its start at {start}")
        require(end <= room, f"{ends}, but there are {total} tokens")
    return [end - start for start, end in zip(starts, starts[1:], strict=False)]


def _check_longest(name: str, name_longest: str, lengths: list[int], longest: int | Tensor) -> None:
    """Only if asked for: a wrong one does no harm."""
    if not switched():
        return
    longest = int(longest)
    for b, length in enumerate(lengths):
        message = f"{name}: sequence {b} has {length} tokens, but {name_longest} is {longest}"
        require(length <= longest, message)


def _check_range(name: str, values: Sequence[int], largest: Sequence[int]) -> None:
    for b, (value, limit) in enumerate(zip(values, largest, strict=True)):
        require(0 <= value <= limit, f"{name} of sequence {b} must be in 0 to {limit}, not {value}")


def _check_pages(
    problem: "Problem",
    layout: "Layout",
    rows: Sequence[int],
    starts: list[int],
    ends: list[int],
    num_pages: int,
) -> None:
    """The pages that hold the tokens from start to end of each sequence exist."""
    table = layout.block_table.tolist()
    for b, (row, start, end) in enumerate(zip(rows, starts, ends, strict=True)):
        first, last = start // problem.page_size, -(-end // problem.page_size)
        for i, page in enumerate(table[row][first:last], first):
            entry = f"block_table[{row}, {i}], a page of sequence {b}"
            require(0 <= page < num_pages, f"{entry}, must be in 0 to {num_pages - 1}, not {page}")
