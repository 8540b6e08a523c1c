"""Every fact of a call, validated, and its tensors: what the public functions make of their arguments.

`dense`, `varlen` and `cache` return a Problem, which says what is to be computed, without tensor memory,
and Inputs, the tensors to compute it with. Errors in arguments are raised here, by the rules in checks.py.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from functools import cached_property, lru_cache, partial
from numbers import Integral
from typing import NamedTuple

import torch
from torch import Tensor

from mini_flash_attention import checks, tensors
from mini_flash_attention.checks import OUR_NAMES, Names, require
from mini_flash_attention.kernels.calls import record
from mini_flash_attention.tensors import Facts, Kinds


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
    def empty(self) -> bool:
        """Whether there is no query or no key at all: out is 0, LSE -inf."""
        return 0 in (self.batch, self.seqlen_q, self.seqlen_k)

    @property
    def longest_q(self) -> int:
        return self.max_seqlen_q or self.seqlen_q

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

    cu_seqlens_q: Tensor | None = None  # (batch + 1): sequence b's rows of packed q start and end here
    cu_seqlens_k: Tensor | None = None  # (batch + 1): the same for packed k and v
    seqused_k: Tensor | None = None  # (batch): where its keys end in its storage, those to be appended aside
    leftpad_k: Tensor | None = None  # (batch): where its keys start in its storage
    batch_idx: Tensor | None = None  # (batch): the row that is its storage; row b if not given
    block_table: Tensor | None = None  # (rows, max_pages): token t is in page t // page_size of the row
    keys: int | None = None  # what seqused_k says, if it is one number that the host knows


class Inputs(NamedTuple):
    """What attention is computed from."""

    q: Tensor
    k: Tensor
    v: Tensor
    alibi_slopes: Tensor | None = None
    seed: int | Tensor | None = None  # of dropout; a tensor (1) int64 on a GPU
    layout: Layout | None = None
    plain: bool = True  # kernels can read all tensors of the call by their addresses: tensors.settled


class CacheUpdate(NamedTuple):
    """What flash_attn_with_kvcache writes into the cache first, and the rotary tables."""

    k: Tensor  # (batch, seqlen_new, heads_k, head_dim)
    v: Tensor
    rotary_cos: Tensor | None = None  # (seqlen_ro, rotary_dim / 2), contiguous, in the dtype of q
    rotary_sin: Tensor | None = None
    interleaved: bool = True  # rotate dims 2i and 2i + 1; else i and i + rotary_dim / 2

    @property
    def added(self) -> int:
        """New tokens of each sequence."""
        return self.k.shape[1]


# Arguments of the public functions that travel together, as the caller gave them. Plain tuples: each call
# makes some, and a NamedTuple takes 0.3 µs more.
Options = tuple  # dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic
Lengths = tuple  # cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, block_table, seqused_k
Places = tuple  # cache_seqlens, cache_batch_idx, cache_leftpad, block_table
New = tuple  # k, v, rotary_cos, rotary_sin, rotary_interleaved


def dense(
    q: Tensor, k: Tensor, v: Tensor, options: Options, names: Names = OUR_NAMES
) -> tuple[Problem, Inputs]:
    """A call of `flash_attn_func`, which documents the arguments and the errors.

    Every eager call runs through here, so this collects hashable facts and little else: the checks
    are in `_dense`, whose answer is remembered. names: what the caller calls the arguments.
    """
    given, slopes = {"q": q, "k": k, "v": v}, options[5]
    if slopes is not None:
        given["alibi_slopes"] = slopes
    kinds = tensors.look(given, names)
    problem = _remembered(_dense, given, kinds, options, names=names)
    return problem, record(Inputs, (q, k, v, slopes, None, None, kinds.plain))


def varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lengths: Lengths,
    options: Options,
    out: Tensor | None,
    names: Names = OUR_NAMES,
) -> tuple[Problem, Inputs]:
    """A call of `flash_attn_varlen_func`, which documents the arguments and the errors."""
    cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, block_table, seqused_k = lengths
    slopes = options[5]
    given = {"q": q, "k": k, "v": v, "cu_seqlens_q": cu_seqlens_q}
    if cu_seqlens_k is not None:
        given["cu_seqlens_k"] = cu_seqlens_k
    if seqused_k is not None:
        given["seqused_k"] = seqused_k
    if block_table is not None:
        given["block_table"] = block_table
    if out is not None:
        given["out"] = out
    if slopes is not None:
        given["alibi_slopes"] = slopes
    kinds = tensors.look(given, names, ("out",))
    checks.max_seqlen(names["max_seqlen_k"], max_seqlen_k)
    longest = checks.max_seqlen(names["max_seqlen_q"], max_seqlen_q)
    if out is not None and torch.is_grad_enabled():
        checks.no_gradient("out: attention into a given tensor", given)
    problem = _remembered(_varlen, given, kinds, options, (longest,), names)
    if out is not None and kinds.plain:
        checks.alone("out", out, given, "q")
    used = None if seqused_k is None else seqused_k.contiguous()
    if problem.page_size and seqused_k is None:
        used = cu_seqlens_k.diff()
    table = None if block_table is None else block_table.contiguous()
    packed_k = cu_seqlens_k.contiguous() if problem.packed_k else None
    layout = record(Layout, (cu_seqlens_q.contiguous(), packed_k, used, None, None, table, None))
    if checks.of_values(kinds.on_cpu):
        checks.values_of_varlen(problem, layout, lengths, len(k), names)
    return problem, record(Inputs, (q, k, v, slopes, None, layout, kinds.plain))


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
    on_device = isinstance(seqlens, Tensor)
    on_host = not on_device and isinstance(seqlens, Integral)
    given = {"q": q, "k_cache": k_cache, "v_cache": v_cache}
    if k is not None:
        given["k"] = k
    if v is not None:
        given["v"] = v
    if rotary_cos is not None:
        given["rotary_cos"] = rotary_cos
    if rotary_sin is not None:
        given["rotary_sin"] = rotary_sin
    if seqlens is not None and not on_host:
        given["cache_seqlens"] = seqlens
    if batch_idx is not None:
        given["cache_batch_idx"] = batch_idx
    if leftpad is not None:
        given["cache_leftpad"] = leftpad
    if block_table is not None:
        given["block_table"] = block_table
    if options[5] is not None:
        given["alibi_slopes"] = options[5]
    kinds = tensors.look(given, OUR_NAMES, () if k is None else ("k_cache", "v_cache"))
    if torch.is_grad_enabled():
        checks.no_gradient("flash_attn_with_kvcache", given)
    problem = _remembered(_cache, given, kinds, options, (on_host, interleaved, num_splits))
    update = None
    if k is not None:
        tables = (None, None) if rotary_cos is None else (rotary_cos.contiguous(), rotary_sin.contiguous())
        update = record(CacheUpdate, (k, v, *tables, bool(interleaved)))
    if on_host:
        seqlens = int(seqlens)
        checks.length(problem, seqlens, update)
    layout = (
        None,
        None,
        seqlens.contiguous() if on_device else None,
        None if leftpad is None else leftpad.contiguous(),
        None if batch_idx is None else batch_idx.contiguous(),
        None if block_table is None else block_table.contiguous(),
        seqlens if on_host else None,
    )
    layout = record(Layout, layout)
    if checks.of_values(kinds.on_cpu):
        checks.values_of_cache(problem, layout, update, k_cache.shape)
    return problem, record(Inputs, (q, k_cache, v_cache, options[5], None, layout, kinds.plain)), update


def _remembered(
    make: Callable[..., Problem],
    given: Mapping[str, Tensor],
    kinds: Kinds,
    options: Options,
    more: tuple = (),
    names: Names = OUR_NAMES,
) -> Problem:
    """make(kinds, shapes, *more, *options): slopes are among the tensors, the window becomes two numbers."""
    dropout_p, softmax_scale, causal, window_size, softcap, slopes, deterministic = options
    if type(window_size) is not tuple or len(window_size) != 2:
        window_size = checks.pair(window_size)
    if slopes is not None:
        checks.not_learned(slopes)
    left, right = window_size
    shapes = tuple([x.shape for x in given.values()])
    numbers = *more, dropout_p, softmax_scale, causal, left, right, softcap, deterministic
    if kinds.plain:
        try:
            return make(kinds, shapes, *numbers)
        except (TypeError, ValueError):  # an argument is wrong, or cannot be hashed: then a check names it
            pass
    return make.__wrapped__(kinds, shapes, *numbers, names=names)


# typed: otherwise a window of 3.0, which is an error, would be served the entry of 3. It takes time for each
# argument, so the shapes are one.
@lru_cache(maxsize=1024, typed=True)
def _dense(
    kinds: Kinds, shapes: tuple[torch.Size, ...], *options: object, names: Names = OUR_NAMES
) -> Problem:
    facts = kinds.facts(shapes)
    three = names["q"], names["k"], names["v"]
    for name, shape in zip(three, shapes, strict=False):
        checks.rank(name, shape, "batch, seqlen, heads, head_dim")
    checks.heads(*shapes[:3], three)
    (batch, seqlen_q, heads_q, head_dim), (batch_k, seqlen_k, heads_k, _) = shapes[:2]
    unlike = f"but {three[0]} has {batch} and {three[1]} has {batch_k}"
    require(batch == batch_k, f"{checks.every(dict.fromkeys(three))} must have one batch size, {unlike}")
    dtype, device = checks.one_dtype_and_device(facts, ("q", "k", "v"), three)
    problem = Problem(dtype, device, batch, seqlen_q, seqlen_k, heads_q, heads_k, head_dim, 1.0)
    problem = replace(problem, max_seqlen_q=seqlen_q)
    return _with_options(problem, facts.get("alibi_slopes"), *options, name_q=three[0])


@lru_cache(maxsize=1024, typed=True)
def _varlen(
    kinds: Kinds,
    shapes: tuple[torch.Size, ...],
    max_seqlen_q: int | None,
    *options: object,
    names: Names = OUR_NAMES,
) -> Problem:
    facts = kinds.facts(shapes)
    three = names["q"], names["k"], names["v"]
    q, k, v = shapes[:3]
    cu_seqlens_k, seqused_k, block_table = map(facts.get, ("cu_seqlens_k", "seqused_k", "block_table"))
    checks.rank(three[0], q, "total_q, heads, head_dim")
    some = cu_seqlens_k is not None or seqused_k is not None
    require(some, "cu_seqlens_k or seqused_k must be given: the lengths of the sequences of keys")
    packed_k = block_table is None and cu_seqlens_k is not None
    dims = "total_k, heads_k, head_dim" if packed_k else "batch, capacity, heads_k, head_dim"
    if block_table is not None:
        dims = "num_blocks, page_size, heads_k, head_dim"
    for name, shape in zip(three[1:], (k, v), strict=True):
        checks.rank(name, shape, dims)
    checks.heads(q, k, v, three)
    dtype, device = checks.one_dtype_and_device(facts, ("q", "k", "v"), three)
    index = partial(checks.index, facts, names, device)
    index("cu_seqlens_q", "batch + 1")
    batch = facts["cu_seqlens_q"][0][0] - 1
    require(batch >= 0, f"{names['cu_seqlens_q']} must have batch + 1 elements, not none")
    index("cu_seqlens_k", "batch + 1", (batch + 1,))
    index("seqused_k", "batch", (batch,))
    index("block_table", "batch, max_pages", (batch, None))
    one_row_each = block_table is not None or packed_k or k[0] == batch
    require(one_row_each, f"k and v must have the batch size of cu_seqlens_q, {batch}, not {k[0]}")
    if "out" in facts:
        shape, *rest = facts["out"]
        like_q = f"{tuple(q)} {dtype} on {device}, but is {tuple(shape)} {rest[0]} on {rest[1]}"
        require(facts["out"] == (q, dtype, device), f"out must be like q, {like_q}")
    page_size, seqlen_k = 0, k[0 if packed_k else 1]
    if block_table is not None:
        page_size, seqlen_k = _page_size("k", k), block_table[0][1] * k[1]
    problem = Problem(dtype, device, batch, q[0], seqlen_k, q[1], k[-2], q[2], 1.0)
    problem = replace(
        problem,
        ragged=True,
        packed_q=True,
        packed_k=packed_k,
        page_size=page_size,
        max_seqlen_q=q[0] if max_seqlen_q is None else min(q[0], max_seqlen_q),
    )
    return _with_options(problem, facts.get("alibi_slopes"), *options, name_q=three[0])


@lru_cache(maxsize=1024, typed=True)
def _cache(
    kinds: Kinds,
    shapes: tuple[torch.Size, ...],
    length_on_host: bool,
    interleaved: bool,
    num_splits: int,
    *options: object,
    names: Names = OUR_NAMES,
) -> Problem:
    facts = kinds.facts(shapes)
    k, rotary_cos, block_table = map(facts.get, ("k", "rotary_cos", "block_table"))
    three = "q", "k_cache", "v_cache"
    dims = "batch_cache, capacity" if block_table is None else "num_blocks, page_size"
    for name, shape, first in zip(three, shapes, ("batch, seqlen_q", dims, dims), strict=False):
        checks.rank(name, shape, f"{first}, heads, head_dim")
    checks.heads(*shapes[:3], three)
    dtype, device = like_q = checks.one_dtype_and_device(facts, three, three)
    q, k_cache = shapes[:2]
    batch = q[0]

    has_length = length_on_host or "cache_seqlens" in facts
    checks.new_keys(k, facts.get("v"), (batch, None, *k_cache[2:]), like_q, has_length)
    index = partial(checks.index, facts, names, device)
    for name in ("cache_seqlens", "cache_batch_idx", "cache_leftpad"):
        index(name, "batch", (batch,))
    page_size, capacity, rows = 0, k_cache[1], k_cache[0]
    if block_table is not None:
        index("block_table", "batch, max_pages", (None, None))
        page_size, rows = _page_size("k_cache", k_cache), block_table[0][0]
        capacity = page_size * block_table[0][1]
    needed = batch if "cache_batch_idx" not in facts else min(batch, 1)
    name = "k_cache" if block_table is None else "block_table"
    require(rows >= needed, f"{name} must have at least {needed} rows for {batch} sequences, not {rows}")
    checks.rotary(rotary_cos, facts.get("rotary_sin"), k, like_q, q[3])
    checks.flag("rotary_interleaved", interleaved)
    checks.splits(num_splits)

    problem = Problem(dtype, device, batch, q[1], capacity, q[2], k_cache[2], q[3], 1.0)
    left_padded = "cache_leftpad" in facts
    problem = replace(problem, ragged=True, page_size=page_size, left_padded=left_padded, max_seqlen_q=q[1])
    # A window decides at which positions several queries are rotated, even where it hides no key.
    keep_window = rotary_cos is not None and q[1] > 1
    return _with_options(problem, facts.get("alibi_slopes"), *options, keep_window=keep_window)


def _page_size(name: str, pages: torch.Size) -> int:
    some = pages[0] > 0 and pages[1] > 0
    require(some, f"{name} must have at least one page of at least one token, not {tuple(pages)}")
    return pages[1]


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
    name_q: str = "q",
) -> Problem:
    """The problem with the options that all functions share, checked and in their normal form."""
    checks.alibi(alibi, problem.batch, problem.heads_q, problem.device, name_q)
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
        dropout_p=dropout_p,
        deterministic=checks.flag("deterministic", deterministic),
    )
