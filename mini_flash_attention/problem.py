"""Every fact of a call, validated, and its tensors: what the public functions make of their arguments.

`dense`, `varlen` and `cache` return a Problem, which says what is to be computed, without tensor memory,
and Inputs, the tensors to compute it with. Errors in arguments are raised here, by the rules in checks.py.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property, lru_cache
from numbers import Integral
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mini_flash_attention import checks
from mini_flash_attention.block_mask import BlockMask
from mini_flash_attention.checks import OUR_NAMES, STRIDED, Facts, Names, require
from mini_flash_attention.kernels.calls import record
from mini_flash_attention.scores.capture import Function, Scoring, built_in, capture

ENDLESS = 1 << 30  # more than any length; kernels add two such numbers in 32 bits
CACHE_NAMES = OUR_NAMES | {"k": "k_cache", "v": "v_cache"}

# None, where another fact of the call says so, as dropout_p does of the seed. Whoever goes by that fact need
# not ask for None too, for a type checker's sake, in each call.
Maybe = Any


@dataclass(frozen=True)
class Problem:
    """One attention call, validated and normalised.

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
    alibi: bool = False  # the slopes themselves are an input
    score_mod: Function | None = None  # what they capture is an input, too
    mask_mod: Function | None = None
    sparse: bool = False  # a BlockMask comes with it, whose mask is mask_mod
    sinks: bool = False  # s_aux is an input, too
    dropout_p: float = 0.0
    deterministic: bool = False
    ragged: bool = False  # a Layout comes with it
    packed_q: bool = False  # q is (total_q, heads, head_dim)
    packed_k: bool = False
    page_size: int = 0  # tokens of a page of k and v; 0: they are not paged
    left_padded: bool = False
    max_seqlen_q: int = 0  # the longest sequence of q, says the caller: for speed, never for safety
    num_splits: int = 0  # parts of the keys; 0 to choose; 1: nothing is chosen by what else is in the batch

    @cached_property
    def _hash(self) -> int:
        return hash(tuple(getattr(self, field.name) for field in fields(self)))

    def __hash__(self) -> int:
        return self._hash  # each call asks for it, to find its plan

    def __getstate__(self) -> dict[str, object]:
        """Without the hash, which another process would not compute alike."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    @cached_property
    def scoring(self) -> Scoring:
        """What becomes of a score, in this order."""
        ours = [built_in(name) for name, on in (("softcap", self.softcap), ("alibi", self.alibi)) if on]
        return Scoring(f for f in (*ours, self.score_mod, self.mask_mod) if f is not None)

    @property
    def empty(self) -> bool:
        """Whether there is no query or no key at all: out is 0, LSE that of the sinks, or -inf."""
        return 0 in (self.batch, self.seqlen_q, self.seqlen_k)

    @property
    def longest_q(self) -> int:
        return self.max_seqlen_q or self.seqlen_q

    @property
    def tiled_for(self) -> int:
        """The longest sequence of q for which forward tiles are chosen: not by what else is in the batch."""
        return ENDLESS if self.num_splits == 1 and self.packed_q else self.longest_q

    @property
    def group(self) -> int:
        """Query heads that share one key head: 1 is multi-head attention, more is GQA or MQA."""
        return self.heads_q // self.heads_k

    @property
    def windowed(self) -> bool:
        return self.window_left is not None or self.window_right is not None


class Layout(NamedTuple):
    """Where each sequence lies: contiguous int32 tensors on the device of q; None where not given.

    A sequence's storage is its range of packed k and v, or a row of k and v or of the block table.
    """

    cu_seqlens_q: Tensor | Maybe = None  # (batch + 1): sequence b's rows of packed q start and end here
    cu_seqlens_k: Tensor | None = None  # (batch + 1): the same for packed k and v
    seqused_k: Tensor | None = None  # (batch): where its keys end in its storage, those to be appended aside
    leftpad_k: Tensor | None = None  # (batch): where its keys start in its storage
    batch_idx: Tensor | None = None  # (batch): the row that is its storage; row b if not given
    block_table: Tensor | Maybe = None  # (rows, max_pages): token t is in page t // page_size of the row
    keys: int | Maybe = None  # what seqused_k says, if it is one number that the host knows


class Inputs(NamedTuple):
    """What attention is computed from."""

    q: Tensor
    k: Tensor
    v: Tensor
    alibi_slopes: Tensor | None = None
    seed: Tensor | Maybe = None  # of dropout: (1) int64 on a GPU, else an int
    layout: Layout | Maybe = None
    s_aux: Tensor | None = None  # (heads_q), of any float dtype
    captured: tuple[float | int | Tensor, ...] = ()  # by score_mod, then by mask_mod
    block_mask: BlockMask | Maybe = None


class CacheUpdate(NamedTuple):
    """What flash_attn_with_kvcache writes into the cache first, and the rotary tables."""

    k: Tensor  # (batch, seqlen_new, heads_k, head_dim)
    v: Tensor
    rotary_cos: Tensor | Maybe = None  # (seqlen_ro, rotary_dim / 2), contiguous, in the dtype of q
    rotary_sin: Tensor | Maybe = None
    interleaved: bool = True  # rotate dims 2i and 2i + 1; else i and i + rotary_dim / 2

    @property
    def added(self) -> int:
        """New tokens of each sequence."""
        return self.k.shape[1]


# Arguments of the public functions that travel together, as the caller gave them. Plain tuples: each call
# makes some, and a NamedTuple takes 0.3 µs more.
Window = Sequence[int | None] | Tensor | None
# dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic, s_aux
Options = tuple[float, float | None, bool, Window, float, Tensor | None, bool, Tensor | None]
# cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, block_table, seqused_k, num_splits
Lengths = tuple[Tensor, Tensor | Maybe, int | Tensor, int | Tensor, Tensor | None, Tensor | None, int]
# cache_seqlens (an int, too), cache_batch_idx, cache_leftpad, block_table
Places = tuple[Tensor | Maybe, Tensor | None, Tensor | None, Tensor | None]
# k, v, rotary_cos, rotary_sin, rotary_interleaved
New = tuple[Tensor | None, Tensor | Maybe, Tensor | None, Tensor | Maybe, bool]


def dense(
    q: Tensor, k: Tensor, v: Tensor, options: Options, names: Names = OUR_NAMES
) -> tuple[Problem, Inputs]:
    """A call of `flash_attn_func`, which documents the arguments and the errors.

    Every eager call runs through here, so this collects hashable facts and little else: the checks
    are in `_dense`, whose answer is remembered.

    names: what the caller calls q, k, v and so on, for errors.
    """
    slopes, s_aux = options[5], options[7]
    tensors = (
        *_facts_of_three(q, k, v),
        None if slopes is None else checks.facts_of_alibi(slopes),
        None if s_aux is None else checks.facts("s_aux", s_aux),
    )
    problem = _remembered(_dense, tensors, options, (), names)
    return problem, record(Inputs, (q, k, v, slopes, None, None, s_aux, (), None))


def varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lengths: Lengths,
    options: Options,
    out: Tensor | None,
    names: Names = OUR_NAMES,
) -> tuple[Problem, Inputs]:
    """A call of `flash_attn_varlen_func`, which documents arguments and errors; names as in `dense`."""
    cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, block_table, seqused_k, num_splits = lengths
    alibi_slopes, s_aux, facts = options[5], options[7], checks.facts
    three = _facts_of_three(q, k, v)
    checks.max_seqlen(names["max_seqlen_k"], max_seqlen_k)
    tensors = (
        *three,
        facts(names["cu_seqlens_q"], cu_seqlens_q),
        None if cu_seqlens_k is None else facts(names["cu_seqlens_k"], cu_seqlens_k),
        None if seqused_k is None else facts("seqused_k", seqused_k),
        None if block_table is None else facts("block_table", block_table),
        None if out is None else facts("out", out),
        None if alibi_slopes is None else checks.facts_of_alibi(alibi_slopes),
        None if s_aux is None else facts("s_aux", s_aux),
    )
    longest = checks.max_seqlen(names["max_seqlen_q"], max_seqlen_q)
    if out is not None and torch.is_grad_enabled():
        given = {"q": q, "k": k, "v": v, "s_aux": s_aux, "out": out}
        checks.no_gradient("out: attention into a given tensor", given)
    problem = _remembered(_varlen, tensors, options, (longest, num_splits), names)
    if out is not None:
        checks.out_alone(out, {"q": q, "k": k, "v": v})
    used = None if seqused_k is None else seqused_k.contiguous()
    if problem.page_size and seqused_k is None:
        used = cu_seqlens_k.diff()
    table = None if block_table is None else block_table.contiguous()
    packed_k = cu_seqlens_k.contiguous() if problem.packed_k else None
    layout = record(Layout, (cu_seqlens_q.contiguous(), packed_k, used, None, None, table, None))
    if checks.of_values(q) and problem.device.type != "meta":
        checks.values_of_varlen(problem, layout, lengths, len(k), names)
    return problem, record(Inputs, (q, k, v, alibi_slopes, None, layout, s_aux, (), None))


def cache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    new: New,
    places: Places,
    options: Options,
    num_splits: int,
) -> tuple[Problem, Inputs, CacheUpdate | None]:
    """A call of `flash_attn_with_kvcache`, which documents the arguments and the errors.

    A cache's length changes with each step: an int is checked here and is no part of the Problem.
    """
    k, v, rotary_cos, rotary_sin, interleaved = new
    seqlens, batch_idx, leftpad, block_table = places
    alibi_slopes, s_aux, facts = options[5], options[7], checks.facts
    on_device = isinstance(seqlens, Tensor)
    on_host = not on_device and isinstance(seqlens, Integral)
    tensors = (
        *_facts_of_three(q, k_cache, v_cache, CACHE_NAMES),
        None if k is None else facts("k", k),
        None if v is None else facts("v", v),
        None if rotary_cos is None else facts("rotary_cos", rotary_cos),
        None if rotary_sin is None else facts("rotary_sin", rotary_sin),
        "int" if on_host else None if seqlens is None else facts("cache_seqlens", seqlens),
        None if batch_idx is None else facts("cache_batch_idx", batch_idx),
        None if leftpad is None else facts("cache_leftpad", leftpad),
        None if block_table is None else facts("block_table", block_table),
        None if alibi_slopes is None else checks.facts_of_alibi(alibi_slopes),
        None if s_aux is None else facts("s_aux", s_aux),
    )
    if torch.is_grad_enabled():
        given = {"q": q, "k_cache": k_cache, "v_cache": v_cache, "k": k, "v": v}
        given |= {"rotary_cos": rotary_cos, "rotary_sin": rotary_sin, "s_aux": s_aux}
        checks.no_gradient("flash_attn_with_kvcache", given)
    problem = _remembered(_cache, tensors, options, (interleaved, num_splits), CACHE_NAMES)
    update = None
    if k is not None:
        tables: tuple[Tensor | None, Tensor | None] = None, None
        if rotary_cos is not None:
            tables = rotary_cos.resolve_neg().contiguous(), rotary_sin.resolve_neg().contiguous()
        update = record(CacheUpdate, (k, v, *tables, bool(interleaved)))
    if on_host:
        seqlens = int(seqlens)
        checks.length(problem, seqlens, update)
    fields_of_layout = (
        None,
        None,
        seqlens.contiguous() if on_device else None,
        None if leftpad is None else leftpad.contiguous(),
        None if batch_idx is None else batch_idx.contiguous(),
        None if block_table is None else block_table.contiguous(),
        seqlens if on_host else None,
    )
    layout = record(Layout, fields_of_layout)
    if checks.of_values(q):
        checks.values_of_cache(problem, layout, update, k_cache.shape)
    return problem, record(Inputs, (q, k_cache, v_cache, alibi_slopes, None, layout, s_aux, (), None)), update


def with_functions(
    problem: Problem,
    x: Inputs,
    score_mod: Callable[..., Any] | None,
    mask_mod: Callable[..., Any] | None,
    block_mask: Any = None,
) -> tuple[Problem, Inputs]:
    """The same with functions of the scores, which `flash_attn_func` documents."""
    functions: list[Function | None] = []
    captured: list[float | int | Tensor] = []
    if block_mask is not None:
        block_mask = checks.block_mask(problem, block_mask, mask_mod)
        mask_mod = block_mask.as_mask_mod()
    for role, function in (("score_mod", score_mod), ("mask_mod", mask_mod)):
        structure = None
        if function is not None:
            structure, values = capture(role, function)
            if structure.is_identity:
                structure, values = None, ()
            for value in values:
                checks.captured(role, value, problem)
            captured += values
        functions.append(structure)
    problem = _with_functions(problem, *functions, block_mask is not None)
    return problem, record(Inputs, (*x[:-2], tuple(captured), block_mask))


@lru_cache(maxsize=1024)
def _with_functions(
    problem: Problem, score_mod: Function | None, mask_mod: Function | None, sparse: bool
) -> Problem:
    return replace(problem, score_mod=score_mod, mask_mod=mask_mod, sparse=sparse)


def _facts_of_three(q: Tensor, k: Tensor, v: Tensor, names: Names = OUR_NAMES) -> tuple[tuple, ...]:
    """The facts of q, k and v: shapes, dtypes, devices."""
    try:
        if q.layout is k.layout is v.layout is STRIDED:
            return (q.shape, k.shape, v.shape), (q.dtype, k.dtype, v.dtype), (q.device, k.device, v.device)
    except (AttributeError, RuntimeError):
        pass
    every = [checks.facts(names[name], x) for name, x in zip("qkv", (q, k, v), strict=True)]
    return tuple(zip(*every, strict=True))


def _remembered(make: Any, tensors: tuple, options: Options, more: tuple, names: Names) -> Problem:
    """make(tensors, *more, *options); tensors: with slopes and sinks. The window becomes two numbers.

    make: one of the remembered functions below.
    """
    dropout_p, softmax_scale, causal, window_size, softcap, _, deterministic, _ = options
    if type(window_size) is not tuple or len(window_size) != 2:
        window_size = checks.pair(window_size)
    left, right = window_size
    numbers = *more, dropout_p, softmax_scale, causal, left, right, softcap, deterministic
    try:
        return make(tensors, *numbers)
    except (TypeError, ValueError):  # a check failed, or an argument cannot be hashed: then a check names it
        pass
    return make.__wrapped__(tensors, *numbers, names=names)


# typed: otherwise a window of 3.0, which is an error, would be served the entry of 3. It takes time for each
# argument, so the facts of the tensors are one.
@lru_cache(maxsize=1024, typed=True)
def _dense(tensors: tuple, *options: object, names: Names = OUR_NAMES) -> Problem:
    shapes, dtypes, devices, *features = tensors
    three = names["q"], names["k"], names["v"]
    for name, shape in zip(three, shapes, strict=True):
        checks.rank(name, shape, "batch, seqlen, heads, head_dim")
    checks.heads(three, *shapes)
    (batch, seqlen_q, heads_q, head_dim), (batch_k, seqlen_k, heads_k, _) = shapes[:2]
    unlike = f"but {three[0]} has {batch} and {three[1]} has {batch_k}"
    require(batch == batch_k, f"{checks.every(three)} must have one batch size, {unlike}")
    checks.dtypes_and_devices(dtypes, devices, three)
    facts = Problem(dtypes[0], devices[0], batch, seqlen_q, seqlen_k, heads_q, heads_k, head_dim, 1.0)
    return _with_options(replace(facts, max_seqlen_q=seqlen_q), *features, *options)


@lru_cache(maxsize=1024, typed=True)
def _varlen(
    tensors: tuple, max_seqlen_q: int | None, num_splits: int, *options: object, names: Names = OUR_NAMES
) -> Problem:
    shapes, dtypes, devices, cu_seqlens_q, cu_seqlens_k, seqused_k, block_table, out, *features = tensors
    q, k, _ = shapes
    device = devices[0]
    three = names["q"], names["k"], names["v"]
    checks.rank(three[0], q, "total_q, heads, head_dim")
    some = cu_seqlens_k is not None or seqused_k is not None
    require(some, "cu_seqlens_k or seqused_k must be given: the lengths of the sequences of keys")
    packed_k = block_table is None and cu_seqlens_k is not None
    dims = "total_k, heads_k, head_dim" if packed_k else "batch, capacity, heads_k, head_dim"
    if block_table is not None:
        dims = "num_blocks, page_size, heads_k, head_dim"
    for name, shape in zip(three[1:], shapes[1:], strict=True):
        checks.rank(name, shape, dims)
    checks.heads(three, *shapes)
    checks.dtypes_and_devices(dtypes, devices, three)
    whose = three[0], device
    checks.index(names["cu_seqlens_q"], cu_seqlens_q, whose, "batch + 1")
    batch = cu_seqlens_q[0][0] - 1
    require(batch >= 0, f"{names['cu_seqlens_q']} must have batch + 1 elements, not none")
    checks.index(names["cu_seqlens_k"], cu_seqlens_k, whose, "batch + 1", (batch + 1,))
    checks.index("seqused_k", seqused_k, whose, "batch", (batch,))
    checks.index("block_table", block_table, whose, "batch, max_pages", (batch, None))
    one_row_each = block_table is not None or packed_k or k[0] == batch
    require(one_row_each, f"k and v must have the batch size of cu_seqlens_q, {batch}, not {k[0]}")
    if out is not None:
        shape, *rest = out
        like_q = f"{tuple(q)} {dtypes[0]} on {device}, but is {tuple(shape)} {rest[0]} on {rest[1]}"
        require(out == (q, dtypes[0], device), f"out must be like q, {like_q}")
    page_size, seqlen_k = 0, k[0 if packed_k else 1]
    if block_table is not None:
        page_size, seqlen_k = _page_size("k", k), block_table[0][1] * k[1]
    checks.splits(num_splits)
    facts = Problem(dtypes[0], device, batch, q[0], seqlen_k, q[1], k[-2], q[2], 1.0)
    facts = replace(
        facts,
        ragged=True,
        packed_q=True,
        packed_k=packed_k,
        page_size=page_size,
        max_seqlen_q=q[0] if max_seqlen_q is None else min(q[0], max_seqlen_q),
        num_splits=num_splits,
    )
    return _with_options(facts, *features, *options, keep_window=num_splits == 1)


@lru_cache(maxsize=1024, typed=True)
def _cache(
    tensors: tuple, interleaved: bool, num_splits: int, *options: object, names: Names = OUR_NAMES
) -> Problem:
    shapes, dtypes, devices, k, v, rotary_cos, rotary_sin, *others = tensors
    cache_seqlens, cache_batch_idx, cache_leftpad, block_table, *features = others
    three = names["q"], names["k"], names["v"]
    dims = "batch_cache, capacity" if block_table is None else "num_blocks, page_size"
    for name, shape, first in zip(three, shapes, ("batch, seqlen_q", dims, dims), strict=True):
        checks.rank(name, shape, f"{first}, heads, head_dim")
    checks.heads(three, *shapes)
    checks.dtypes_and_devices(dtypes, devices, three)
    q, k_cache, _ = shapes
    like_q, batch = (dtypes[0], devices[0]), q[0]

    checks.new_keys(k, v, (batch, None, *k_cache[2:]), like_q, cache_seqlens)
    whose = three[0], devices[0]
    if cache_seqlens != "int":
        checks.index("cache_seqlens", cache_seqlens, whose, "batch", (batch,))
    checks.index("cache_batch_idx", cache_batch_idx, whose, "batch", (batch,))
    checks.index("cache_leftpad", cache_leftpad, whose, "batch", (batch,))
    page_size, capacity, rows = 0, k_cache[1], k_cache[0]
    if block_table is not None:
        checks.index("block_table", block_table, whose, "batch, max_pages", (None, None))
        page_size, rows = _page_size("k_cache", k_cache), block_table[0][0]
        capacity = page_size * block_table[0][1]
    needed = batch if cache_batch_idx is None else min(batch, 1)
    name = "k_cache" if block_table is None else "block_table"
    require(rows >= needed, f"{name} must have at least {needed} rows for {batch} sequences, not {rows}")
    checks.rotary(rotary_cos, rotary_sin, k, like_q, q[3])
    checks.flag("rotary_interleaved", interleaved)
    checks.splits(num_splits)

    facts = Problem(dtypes[0], devices[0], batch, q[1], capacity, q[2], k_cache[2], q[3], 1.0)
    facts = replace(
        facts,
        ragged=True,
        page_size=page_size,
        left_padded=cache_leftpad is not None,
        max_seqlen_q=q[1],
        num_splits=num_splits,
    )
    # A window decides at which positions several queries are rotated, even where it hides no key.
    keep_window = num_splits == 1 or (rotary_cos is not None and q[1] > 1)
    return _with_options(facts, *features, *options, keep_window=keep_window)


def _page_size(name: str, pages: torch.Size) -> int:
    some = pages[0] > 0 and pages[1] > 0
    require(some, f"{name} must have at least one page of at least one token, not {tuple(pages)}")
    return pages[1]


def _with_options(
    problem: Problem,
    alibi: Facts | None,
    s_aux: Facts | None,
    dropout_p: float,
    softmax_scale: float | None,
    causal: bool,
    window_left: int | None,
    window_right: int | None,
    softcap: float,
    deterministic: bool,
    *,
    keep_window: bool = False,
) -> Problem:
    """The problem with the options that all functions share, checked and in their normal form.

    keep_window: where a limit hides no key, too. Whether it does may depend on what else is in the batch.
    """
    checks.alibi(alibi, problem.batch, problem.heads_q, problem.device)
    checks.sinks(s_aux, problem.heads_q, problem.device)
    compute = torch.float64 if problem.dtype == torch.float64 else torch.float32
    dropout_p = checks.probability("dropout_p", dropout_p, compute)
    left = checks.limit("left", window_left)
    right = checks.limit("right", window_right)
    if checks.flag("causal", causal):
        right = 0
    # A limit that hides no key from any query is none: the last query has seqlen_k - 1 keys to
    # the left of its diagonal, the first one seqlen_q - 1 to the right. Where these are bounds of
    # the lengths, that holds for each sequence.
    if not keep_window and left is not None and left >= problem.seqlen_k - 1:
        left = None
    if not keep_window and right is not None and right >= problem.seqlen_q - 1:
        right = None
    left, right = (None if x is None else min(x, ENDLESS) for x in (left, right))
    scale = problem.head_dim**-0.5
    if softmax_scale is not None:
        scale = checks.number("softmax_scale", softmax_scale, compute)
    return replace(
        problem,
        softmax_scale=scale,
        window_left=left,
        window_right=right,
        softcap=max(0.0, checks.number("softcap", softcap, compute)),
        alibi=alibi is not None,
        sinks=s_aux is not None,
        dropout_p=dropout_p,
        deterministic=checks.flag("deterministic", deterministic),
    )
