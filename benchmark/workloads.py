"""From a case to what each implementation has to do in it."""

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

from benchmark import functions
from benchmark.cases import CREATE, Case
from benchmark.exactness import check_close, one_group, oracle, oracle_gradients
from benchmark.peers import Implementation, Implementations

PAGE_SIZES = (1, 16, 64, 256)
# A cache that was just read may still be in L2 (50 MB on an H100), as no server's cache is: one call
# attends to so many caches in turn that they fill this many bytes.
_ROTATED = 512 * 2**20


class Contestant(NamedTuple):
    """One implementation of a case, or of a variant of it."""

    impl: str
    variant: str
    call: Callable[[], object]
    scope: Callable[[], AbstractContextManager]
    # Of what call() returns, an output or gradients: raises exactness.Wrong. None where not known.
    error: Callable[..., float] | None = None
    problems: int = 1  # that one call solves
    visible: float = 1.0  # the share of pairs that a mask leaves

    @property
    def name(self) -> str:
        return self.impl if self.variant == "plain" else f"{self.impl} {self.variant}"


def contestants(case: Case, implementations: Implementations, device: str) -> Iterator[Contestant]:
    """Those that can do the case at all; variants that only ours has run beside the plain ones."""
    suites = {"varlen": _varlen, "decode": _decode, "scores": _functions, "masks": _functions}
    make = suites.get(case.suite, _dense)
    return make(case, implementations, device)


def _dense(case: Case, implementations: Implementations, device: str) -> Iterator[Contestant]:
    inputs = case.inputs(device)
    q, *keys_and_values = inputs
    dout = _dout(case, inputs)
    error = _error(case, inputs, dout)
    copies = max(2, -(-_ROTATED // case.kv_bytes)) if _reads_a_cache(case) else 1
    caches = [keys_and_values]
    caches += [[torch.randn_like(x) for x in keys_and_values] for _ in range(copies - 1)]
    options = {} if case.window is None else {"window": case.window}
    seqlens = torch.full((case.batch,), case.seqlen_k, dtype=torch.int32, device=device)
    for name, impl in implementations.items():
        if impl.call is None:
            continue
        attention, rest = impl.call, (case.causal,)
        if case.seqlen_q == 1 and impl.decode is not None and not name.startswith("mini"):
            attention, rest = impl.decode, (seqlens,)  # peers' best for one query
        calls = [functools.partial(attention, q, *cache, *rest, **options) for cache in caches]
        forward = calls[0] if copies == 1 else functools.partial(_all, calls)
        yield Contestant(name, case.variant, _task(case, forward, inputs, dout), impl.scope, error, copies)
    if "mini" in implementations:
        yield from _features(case, implementations["mini"], inputs)


def _reads_a_cache(case: Case) -> bool:
    return case.suite == "models" and case.direction == "fwd" and case.seqlen_q <= 64


def _all(calls: Sequence[Callable[[], Tensor]]) -> Tensor:
    """The result of the first."""
    return [call() for call in calls][0]


def _features(case: Case, mini: Implementation, inputs: Sequence[Tensor]) -> Iterator[Contestant]:
    """What softcap and its kin cost, at one head dim and length of the GPU's sweeps."""
    kind = (case.suite, case.dtype, case.head_dim, case.seqlen_k)
    if kind != ("prefill", "bf16", 128, 4096):
        return
    heads = torch.arange(1, case.heads_q + 1, device=inputs[0].device)
    features = {
        "softcap": {"softcap": 30.0},
        "alibi": {"alibi_slopes": 2.0 ** (-8 * heads / case.heads_q)},
        "dropout": {"dropout_p": 0.1},
    }
    if case.direction != "fwd":
        features["deterministic"] = {"deterministic": True}
    for variant, options in features.items():
        forward = functools.partial(mini.call, *inputs, case.causal, **options)
        yield Contestant("mini", variant, _task(case, forward, inputs, _dout(case, inputs)), mini.scope)


def _varlen(case: Case, implementations: Implementations, device: str) -> Iterator[Contestant]:
    inputs = case.inputs(device)
    bounds = [0, *accumulate(case.lengths)]
    cu_seqlens = torch.tensor(bounds, dtype=torch.int32, device=device)
    longest = case.lengths.index(case.seqlen_q)
    rows = slice(bounds[longest], bounds[longest + 1])
    dout = _dout(case, inputs)
    error = _error(case, inputs, dout, lambda packed: packed[None, rows])
    for name, impl in implementations.items():
        if impl.varlen is not None:
            forward = functools.partial(impl.varlen, *inputs, cu_seqlens, case.seqlen_q)
            yield Contestant(name, case.variant, _task(case, forward, inputs, dout), impl.scope, error)
    if "mini" in implementations and len(set(case.lengths)) == 1:
        forward = functools.partial(_unpacked, implementations["mini"], case, *inputs)
        yield Contestant("mini", "dense", _task(case, forward, inputs, dout), nullcontext)


def _unpacked(mini: Implementation, case: Case, *packed: Tensor) -> Tensor:
    """Sequences of one length as the batch that they are."""
    batched = [tensor.unflatten(0, (case.batch, -1)) for tensor in packed]
    return mini.call(*batched, case.causal).flatten(0, 1)


def _decode(case: Case, implementations: Implementations, device: str) -> Iterator[Contestant]:
    q, *cache = case.inputs(device)
    eager = case.variant == "eager"
    copies = 1 if eager else max(2, -(-_ROTATED // case.kv_bytes))
    caches = [cache] + [[torch.randn_like(tensor) for tensor in cache] for _ in range(copies - 1)]
    seqlens = torch.full((case.batch,), case.seqlen_k, dtype=torch.int32, device=device)

    def each(decode: Callable[..., Tensor], caches: Sequence, **options: Tensor) -> Callable[[], Tensor]:
        """A call for each cache; of one, nothing but the call, as the host's time is what counts."""
        calls = [functools.partial(decode, q, *cache, seqlens, **options) for cache in caches]
        return calls[0] if eager else lambda: [call() for call in calls][0]

    error = _error(case, (q, *cache), None)
    for name, impl in implementations.items():
        if impl.decode is not None:
            yield Contestant(name, case.variant, each(impl.decode, caches), impl.scope, error, copies)
    if "mini" not in implementations:
        return
    mini, prefix = implementations["mini"], "eager " if eager else ""
    for size in (16,) if eager else PAGE_SIZES:
        # The same memory, as pages that belong to the sequences in a random order.
        numbers = torch.randperm(case.batch * case.seqlen_k // size, device=device)
        table = numbers.view(case.batch, -1).int()
        pages = [[_pages(tensor, size) for tensor in cache] for cache in caches]
        call = each(mini.decode, pages, block_table=table)
        first = [tensor[table[0]].flatten(0, 1)[None] for tensor in pages[0]]
        yield Contestant(
            "mini", f"{prefix}paged{size}", call, nullcontext, _error(case, (q, *first), None), copies
        )
    if eager:  # with the newest token's key and value, so the cache is another one afterwards
        seqlens = seqlens - 1
        k, v = (torch.randn_like(tensor[:, :1]) for tensor in cache)
        yield Contestant("mini", "eager append", each(mini.decode, caches, k=k, v=v), nullcontext)


def _functions(case: Case, implementations: Implementations, device: str) -> Iterator[Contestant]:
    """The variants of a case, each by those who have functions of scores and masks."""
    able = {name: impl for name, impl in implementations.items() if impl.functions is not None}
    if "flex" in able:
        torch.compiler.reset()  # the compilations of the case before
    if case.variant == CREATE:
        yield from _creation(case, able, device)
        return
    inputs = case.inputs(device)
    dout = _dout(case, inputs)
    for variant in (case.variant, *case.beside):
        made = functions.of(case, variant, device)
        visible = functions.visible(made, case, device)
        error = _error(case, inputs, dout, **made.exactly(case.heads_q // case.heads_k))
        for name, impl in able.items():
            if name.startswith("mini") or not (case.ours_alone or made.ours_alone):
                prepare = functools.partial(impl.functions, *inputs, case.causal, made)
                task = _task(case, _prepared(prepare), inputs, dout)
                yield Contestant(name, variant, task, impl.scope, error, visible=visible)


def _prepared(prepare: Callable[[], Callable[[], Tensor]]) -> Callable[[], Tensor]:
    """What is prepared, when it is first called."""
    prepared = functools.cache(prepare)
    return lambda: prepared()()


def _creation(case: Case, implementations: Implementations, device: str) -> Iterator[Contestant]:
    """The making of a block mask, of causal documents."""
    mask_mod = functions.of(case, "documents-causal", device).mask_mod
    for name, impl in implementations.items():
        if impl.create_block_mask is not None:
            call = functools.partial(
                impl.create_block_mask, mask_mod, None, None, case.seqlen_q, case.seqlen_k, device
            )
            yield Contestant(name, case.variant, call, impl.scope)


def _pages(cache: Tensor, size: int) -> Tensor:
    return cache.view(-1, size, *cache.shape[2:])


def _dout(case: Case, inputs: Sequence[Tensor]) -> Tensor | None:
    return None if case.direction == "fwd" else torch.randn_like(inputs[0], requires_grad=False)


def _task(
    case: Case, forward: Callable[[], Tensor], inputs: Sequence[Tensor], dout: Tensor | None
) -> Callable[[], object]:
    """What is timed: the forward pass, the backward pass of one forward pass, or both."""
    if case.direction == "fwd":
        return forward
    if case.direction == "fwdbwd":
        return lambda: torch.autograd.grad(forward(), inputs, dout)
    out = functools.cache(forward)
    return lambda: torch.autograd.grad(out(), inputs, dout, retain_graph=True)


def _error(
    case: Case,
    inputs: Sequence[Tensor],
    dout: Tensor | None,
    batched: Callable[[Tensor], Tensor] = lambda tensor: tensor,
    **functions: object,
) -> Callable[..., float]:
    """How far results are off, in the first sequence, for its first key head and the query heads of that.

    `batched` makes (1, seqlen, heads, head_dim) of a packed tensor, for the sequence to look at; `functions`
    are the oracle's.
    """
    group = one_group(*map(batched, inputs))
    heads, mask = group[0].shape[2], (case.causal, case.window)
    if dout is None:
        exact = oracle(*group, *mask, **functions)
        return lambda out: check_close({"the output": (batched(out)[:1, :, :heads], exact)})
    gradients = oracle_gradients(group, batched(dout)[:1, :, :heads], *mask, **functions)

    def error(results: Sequence[Tensor]) -> float:
        pairs = zip(("dq", "dk", "dv"), results, gradients, strict=True)
        return check_close({n: (batched(x)[:1, :, : e.shape[2]], e) for n, x, e in pairs})

    return error
