"""score_mod and mask_mod on the CPU: right in every layout, or refused in words; and what shares a kernel."""

import functools
import gc
import math
import operator
import os
import pickle
import random
import re
import subprocess
import sys
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import score_functions
import torch
from error_rule import check_forward, check_gradients, reference_options
from random_scores import random_functions
from score_functions import MASKS, SCORES, functions
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from mini_flash_attention import (
    flash_attn_func,
    flash_attn_varlen_func,
    flash_attn_with_kvcache,
    masks,
    reference,
)
from mini_flash_attention.problem import dense, with_functions
from mini_flash_attention.scores import capture as capture_module
from mini_flash_attention.scores.capture import Function, built_in, capture
from mini_flash_attention.scores.numbers import FUNCTIONS, CannotTrace

HEADS, D = 4, 8
Options = dict[str, Any]


# In every layout, against the oracle. `oracle`: the functions as PyTorch computes them


def check_dense(
    given: Options, oracle: Options, options: Options, sizes: tuple, dtype: torch.dtype = torch.float64
) -> None:
    """sizes: batch, seqlen_q, seqlen_k, heads_k."""
    batch, seqlen_q, seqlen_k, heads_k = sizes
    q = random_leaf(batch, seqlen_q, HEADS, D, dtype=dtype)
    k, v = (random_leaf(batch, seqlen_k, heads_k, D, dtype=dtype) for _ in range(2))
    learned = floats_captured_by(given)
    out, lse, dropped = flash_attn_func(q, k, v, **options, **given, return_attn_probs=True)
    expected = reference_options(options) | oracle
    if dropped is not None:
        expected |= {"dropout_mask": ~dropped.signbit(), "dropout_p": options["dropout_p"]}
    check_forward(out, lse, q, k, v, **expected)
    grads = torch.randn_like(out), torch.randn_like(lse)
    (*found,) = torch.autograd.grad((out, lse), (q, k, v, *learned), grads, allow_unused=True)
    assert not any(x.isnan().any() for x in found if x is not None)
    check_gradients(tuple(found[:3]), *grads, q, k, v, **expected)
    if dtype == torch.float64:
        check_learned(learned, found[3:], floats_captured_by(oracle), [((q, k, v), expected, grads)])


def floats_captured_by(functions: Options) -> list[Tensor]:
    """From now on with gradients; in an order that other functions made alike share."""
    cells = [cell.cell_contents for f in functions.values() for cell in f.__closure__ or ()]
    tensors = [x for x in cells if isinstance(x, Tensor) and x.is_floating_point()]
    return [x.requires_grad_() for x in {id(x): x for x in tensors}.values()]


def check_learned(
    learned: list[Tensor], found: list[Tensor | None], wide: list[Tensor], parts: list[Any]
) -> None:
    """Their gradients. wide: the oracle's, in float64. parts: q, k, v; the oracle's options; gradients."""
    for x in wide:
        x.grad = None
    for tensors, options, grads in parts:
        results = reference.attention(*(x.detach() for x in tensors), **options)
        for result, grad in zip(results, grads, strict=True):
            if result.requires_grad:
                result.backward(grad, inputs=wide, retain_graph=True)
    for x, got, y in zip(learned, found, wide, strict=True):
        expected = torch.zeros_like(y) if y.grad is None else y.grad
        if got is None:  # of a function that returns the score, and is dropped
            assert not expected.any()
            continue
        assert got.dtype == x.dtype
        error, largest = (got - expected).abs().max().item(), expected.abs().max().item()
        assert error <= 2 * torch.finfo(x.dtype).eps * max(1, largest), (x.shape, x.dtype, error, largest)


LENGTHS_Q, LENGTHS_K = (20, 0, 7, 30), (25, 9, 0, 31)


def check_varlen(given: Options, oracle: Options, options: Options, heads_k: int, paged: bool) -> None:
    """Packed keys, or pages, which have no gradient."""
    cu_q, cu_k = (torch.tensor([0, *lengths]).cumsum(0).int() for lengths in (LENGTHS_Q, LENGTHS_K))
    q = random_leaf(int(cu_q[-1]), HEADS, D)
    k, v = (random_leaf(int(cu_k[-1]), heads_k, D) for _ in range(2))
    keys, where = (k, v), {}
    if paged:
        pages = torch.randperm(40)[: 4 * 8].view(4, 8).int()
        keys = tuple(to_pages(x.detach(), cu_k.tolist(), pages) for x in (k, v))
        where = {"block_table": pages, "seqused_k": torch.tensor(LENGTHS_K).int()}
    call = q, *keys, cu_q, None if paged else cu_k, 30, 31
    learned = [] if paged else floats_captured_by(given)
    out, lse, _ = flash_attn_varlen_func(*call, **options, **where, **given, return_attn_probs=True)
    dout, dlse = torch.randn_like(out), torch.randn_like(lse)
    found, checked = [], []
    if not paged:
        (*found,) = torch.autograd.grad((out, lse), (q, k, v, *learned), (dout, dlse), allow_unused=True)
    for b in range(len(LENGTHS_Q)):
        rows, these = slice(*cu_q[b : b + 2].tolist()), slice(*cu_k[b : b + 2].tolist())
        parts = [x.detach()[None] for x in (q[rows], k[these], v[these])]
        expected = reference_options(options, b) | oracle | {"first": b}
        check_forward(out[None, rows], lse[None, :, rows], *parts, **expected)
        if not paged:
            its = [x[None, part] for x, part in zip(found[:3], (rows, these, these), strict=True)]
            grads = dout[None, rows], dlse[None, :, rows]
            check_gradients(its, *grads, *parts, **expected)
            checked.append((parts, expected, grads))
    if not paged:
        check_learned(learned, found[3:], floats_captured_by(oracle), checked)


def to_pages(x: Tensor, starts: list[int], table: Tensor) -> Tensor:
    """Packed (total, h, d) -> (40, 4, h, d)."""
    pages = torch.full((40, 4, *x.shape[1:]), math.nan, dtype=x.dtype)
    for b, (start, end) in enumerate(zip(starts[:-1], starts[1:], strict=True)):
        for i in range(end - start):
            pages[table[b, i // 4], i % 4] = x[start + i]
    return pages


def check_cache(given: Options, oracle: Options, options: Options, heads_k: int, seqlen_q: int) -> None:
    """With new keys, and padding on the left."""
    batch, lengths, padding = 3, torch.tensor([30, 12, 0]).int(), torch.tensor([0, 5, 0]).int()
    q, new = torch.randn(batch, seqlen_q, HEADS, D), torch.randn(2, batch, seqlen_q, heads_k, D)
    k, v = (torch.randn(batch, 40, heads_k, D) for _ in range(2))
    places = {"cache_seqlens": lengths, "cache_leftpad": padding, "return_softmax_lse": True}
    out, lse = flash_attn_with_kvcache(q, k, v, *new, **places, **options, **given)
    for b in range(batch):
        keys = slice(int(padding[b]), int(lengths[b]) + seqlen_q)
        parts = q[b : b + 1], k[b : b + 1, keys], v[b : b + 1, keys]
        expected = reference_options(options, b) | oracle | {"first": b}
        check_forward(out[b : b + 1], lse[b : b + 1], *parts, **expected)


def random_leaf(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, dtype=torch.float64).to(dtype).requires_grad_()


WINDOWS = {}, {"causal": True}, {"window_size": (9, 3)}, {"window_size": (-1, 5)}
FEATURES = {}, {"softcap": 2.0}, {"alibi_slopes": "one"}, {"alibi_slopes": "each", "softcap": 3.0}
SCALES = {}, {}, {"softmax_scale": -0.6}, {"softmax_scale": 0.0}
LAYOUTS = "dense", "dense", "long", "dropout", "varlen", "paged", "cache", "decode"


def random_options(rng: random.Random, batch: int) -> Options:
    options = rng.choice(WINDOWS) | rng.choice(FEATURES) | rng.choice(SCALES)
    slopes = options.get("alibi_slopes")
    if slopes:
        shape = (HEADS,) if slopes == "one" else (batch, HEADS)
        options["alibi_slopes"] = torch.rand(shape, dtype=torch.float32)
    return options


@pytest.fixture
def double() -> Iterator[None]:
    """PyTorch, which is the oracle's, makes floats of integers in the default dtype."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def check(layout: str, given: Options, oracle: Options, rng: random.Random) -> None:
    """In one layout, with random options; of up to 4 sequences of up to 300 tokens."""
    batch = {"varlen": 4, "paged": 4, "cache": 3, "decode": 3}.get(layout, 2)
    options, heads_k = random_options(rng, batch), rng.choice((1, 2, 4))
    if layout in ("varlen", "paged"):
        check_varlen(given, oracle, options, heads_k, layout == "paged")
    elif layout in ("cache", "decode"):
        check_cache(given, oracle, options, heads_k, 1 if layout == "decode" else 7)
    else:
        options |= {"dropout_p": 0.2} if layout == "dropout" else {}
        sizes = (
            (rng.randint(135, 200), rng.randint(135, 300)) if layout == "long" else (rng.randint(1, 30), 30)
        )
        check_dense(given, oracle, options, (batch, *sizes, heads_k))


@pytest.mark.parametrize("layout", dict.fromkeys(LAYOUTS))
@pytest.mark.parametrize("name", SCORES + MASKS)
def test_functions_that_people_want(name: str, layout: str, double: None) -> None:
    found, oracle = (functions(name, 4, HEADS, 300, dtype=dtype) for dtype in (torch.float32, torch.float64))
    check(layout, found, oracle, random.Random(f"{name} {layout}"))


@pytest.mark.parametrize("first", range(0, 320, 20))
def test_random_functions(first: int, double: None) -> None:
    """The value and the derivative of expressions of all that is allowed, each in a layout."""
    for seed in range(first, first + 20):
        _random(seed)


@pytest.mark.full
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("first", range(1000, 5000, 500))
def test_more_random_functions(first: int, double: None) -> None:
    for seed in range(first, first + 500):
        _random(seed)


def _random(seed: int) -> None:
    torch.manual_seed(seed)
    made = random_functions(seed, 4, HEADS, 300)
    try:
        check(LAYOUTS[seed % len(LAYOUTS)], made.functions, made.oracle, random.Random(seed))
    except Exception as error:
        raise AssertionError(f"seed {seed}: {error}\n{made.source}") from error


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", SCORES + MASKS)
def test_other_dtypes(name: str, dtype: torch.dtype) -> None:
    """By the error rule, where the oracle's functions compute in the dtype of q."""
    found = functions(name, 2, HEADS, 200)
    check_dense(found, found, {"causal": name == "alibi"}, (2, 150, 200, 2), dtype)


@pytest.mark.parametrize(
    "mask",
    [
        masks.causal(offset=10),
        masks.sliding_window(7, 2),
        masks.prefix_lm(torch.tensor([3, 20])),
        masks.documents(cu_seqlens=[0, 12, 30]),
        masks.documents(ids=torch.arange(60).view(2, 30) // 9),
        masks.tree([*range(-1, 9), *[4] * 10], context=10),
        masks.dilated(3),
        masks.block_diagonal(8),
        masks.and_masks(masks.causal(), masks.not_mask(masks.dilated(2)), lambda b, h, q, k: k != h),
        masks.or_masks(masks.sliding_window(3, 0), lambda b, h, q, k: k < 4),
    ],
    ids=lambda mask: mask.__name__,
)
def test_ready_made_masks(mask: Callable[..., Any], double: None) -> None:
    check_dense({"mask_mod": mask}, {"mask_mod": mask}, {}, (2, 20, 30, 2))


# At the edges


def attend(**options: Any) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
    """out, lse and gradients, of 6 queries and 7 keys."""
    torch.manual_seed(0)
    q, k, v = (random_leaf(2, n, HEADS, D) for n in (6, 7, 7))
    out, lse, _ = flash_attn_func(q, k, v, **options, return_attn_probs=True)
    return out, lse, torch.autograd.grad((out, lse), (q, k, v), (torch.ones_like(out), torch.ones_like(lse)))


def same(a: Any, b: Any) -> bool:
    return all(torch.equal(x, y) for x, y in zip((*a[:2], *a[2]), (*b[:2], *b[2]), strict=True))


@pytest.mark.parametrize(
    "given",
    [
        {"score_mod": lambda score, b, h, q, k: -math.inf},
        {"score_mod": lambda score, b, h, q, k: torch.where(k >= 0, float("-inf"), score)},
        {"score_mod": lambda score, b, h, q, k: score - torch.inf},
        {"mask_mod": lambda b, h, q, k: False},
        {"mask_mod": lambda b, h, q, k: k < 0},
        {
            "mask_mod": lambda b, h, q, k: k < 0,
            "score_mod": lambda score, *place: torch.log(score * 0) * score,
        },
    ],
)
def test_rows_that_see_nothing(given: Options) -> None:
    out, lse, gradients = attend(**given)
    assert not out.any() and (lse == -math.inf).all() and not any(x.any() for x in gradients)


@pytest.mark.parametrize(
    "bad",
    [lambda x: torch.log(x * 0), lambda x: x / 0.0001 / (x - x), lambda x: torch.exp(x * 1e9)],
    ids="abc",
)
def test_what_is_hidden_gives_no_nan(bad: Callable[[Any], Any]) -> None:
    """Its derivative, which is infinite or NaN, is multiplied by a probability of 0."""
    for score_mod, mask_mod in (
        (lambda s, b, h, q, k: torch.where(k < 4, s * 2, bad(s)), lambda b, h, q, k: k < 4),
        (lambda s, b, h, q, k: torch.where(k < 4, s * 2, torch.where(k < 9, -math.inf, bad(s))), None),
        (lambda s, b, h, q, k: torch.where(k < 4, s * 2, -abs(bad(s)) - torch.inf), None),
    ):
        expected = attend(score_mod=lambda s, b, h, q, k: s * 2, mask_mod=lambda b, h, q, k: k < 4)
        assert same(attend(score_mod=score_mod, mask_mod=mask_mod), expected)


def test_the_score_itself_is_dropped() -> None:
    q = torch.randn(1, 3, 2, 8)
    options = 0.0, None, False, (-1, -1), 0.0, None, False, None
    for score_mod in (lambda s, b, h, q, k: s, lambda s, *place: +s, lambda s, b, h, q, k: s if True else k):
        problem, x = with_functions(*dense(q, q, q, options), score_mod, None)
        assert problem.score_mod is None and not problem.scoring and x.captured == ()
        assert problem == dense(q, q, q, options)[0]
    assert same(attend(score_mod=lambda s, b, h, q, k: s), attend())
    assert with_functions(*dense(q, q, q, options), lambda s, b, h, q, k: s * 1.0, None)[0].score_mod


@pytest.mark.parametrize("constant", [0.0, 2, -1.5, torch.tensor(0.5), torch.tensor(3)])
def test_constants(constant: Any) -> None:
    """Every key alike: nothing is written to what was captured."""
    was = constant.clone() if isinstance(constant, Tensor) else constant
    out, lse, (dq, dk, _) = attend(score_mod=lambda s, b, h, q, k: constant)
    assert not dq.any() and not dk.any() and constant == was
    torch.testing.assert_close(lse, torch.full_like(lse, math.log(7) + float(constant)))
    q = torch.randn(1, 1, 1, 8)
    torch.testing.assert_close(flash_attn_func(q, q, q, score_mod=lambda s, b, h, q, k: constant), q)
    assert constant == was
    assert same(attend(mask_mod=lambda b, h, q, k: True), attend())


def test_an_index_out_of_range_reads_the_last_element() -> None:
    table = torch.arange(5.0)
    got = attend(score_mod=lambda s, b, h, q, k: s + table[q - k])
    expected = attend(score_mod=lambda s, b, h, q, k: s + torch.where((q < k) | (q - k > 4), 4, q - k))
    assert same(got, expected)


def test_numbers_are_those_of_python_and_pytorch() -> None:
    """The same in other words."""
    n, m, x, number, half = 3, -2, 0.75, np.float32(0.75), torch.tensor([0.1], dtype=torch.float16)
    pairs: list[tuple[Callable[..., Any], Callable[..., Any]]] = [
        (lambda s, b, h, q, k: s + (q - k) // m, lambda s, b, h, q, k: s - ((q - k + 21) // 2 - 10)),
        (lambda s, b, h, q, k: s + (q - 9) % n, lambda s, b, h, q, k: s + (q + 9) % 3),
        (lambda s, b, h, q, k: s + k % m, lambda s, b, h, q, k: s - k % 2),
        (lambda s, b, h, q, k: s * number, lambda s, b, h, q, k: s * x),
        (lambda s, b, h, q, k: s * half[h - h], lambda s, b, h, q, k: s * 0.0999755859375),
        (lambda s, b, h, q, k: torch.where(half[0] < 0.1, s, k), lambda s, b, h, q, k: s),
        (lambda s, b, h, q, k: torch.sub(1, s), lambda s, b, h, q, k: 1 - s),
        (lambda s, b, h, q, k: torch.maximum(0, s), lambda s, b, h, q, k: s.clamp(0)),
        (lambda s, b, h, q, k: torch.clamp(s, min=x, max=n), lambda s, b, h, q, k: s.clamp(x).clamp(max=n)),
        (lambda s, b, h, q, k: s * (k > 2), lambda s, b, h, q, k: torch.where(k > 2, s, 0)),
        (lambda s, b, h, q, k: s + ((k > 1) + (k > 2)), lambda s, b, h, q, k: s + (k > 1).int() + (k > 2)),
        (lambda s, b, h, q, k: pow(s, 2) + s.pow(3), lambda s, b, h, q, k: s * s + s**3),
        (lambda s, b, h, q, k: operator.add(s, q) - (s + s) / 2, lambda s, b, h, q, k: q),
        (lambda s, b, h, q, k: s * (q == k), lambda s, b, h, q, k: torch.where((q <= k) & (q >= k), s, 0.0)),
        (lambda s, b, h, q, k: s + (s * 10).int(), lambda s, b, h, q, k: s + (s * 10).to(torch.int32)),
    ]  # fmt: skip
    for written, meant in pairs:
        got, expected = attend(score_mod=written), attend(score_mod=meant)
        for one, other in zip((*got[:2], *got[2]), (*expected[:2], *expected[2]), strict=True):
            torch.testing.assert_close(one, other, msg=f"line {written.__code__.co_firstlineno}")


def test_statements_are_python() -> None:
    """Loops over literals, assignments, functions within functions, defaults, comprehensions."""
    weights, table = (0.5, 0.25), torch.randn(7)

    def helper(x, scale, *, shift=1.0):
        return x * scale + shift

    def plain(score, batch, head, q_idx, kv_idx):
        return score * 1.75 + 1 - table[kv_idx] * 0.75

    def written(score, batch, head, q_idx, kv_idx, shift=(1.0,), *, flag=True):
        total = 0
        for i, weight in enumerate(weights):
            total += helper(score, shift=i, scale=weight)
        total -= sum([table[kv_idx] * w for w in weights])
        for _ in range(3):
            shift = (shift[0], 2)

        def inner(x):
            return x + total

        return inner(score) if flag else shift[1]

    expected, got = attend(score_mod=plain), attend(score_mod=written)
    torch.testing.assert_close(got[0], expected[0])
    torch.testing.assert_close(got[2], expected[2])
    scaled = functools.partial(helper, scale=3.0)
    partly = attend(score_mod=lambda s, b, h, q, k: scaled(s, shift=0.0))
    assert same(partly, attend(score_mod=lambda s, b, h, q, k: s * 3.0 + 0.0))
    assert same(
        attend(score_mod=functools.partial(lambda c, s, b, h, q, k: s * c, 3.0)),
        attend(score_mod=lambda s, *p: s * 3.0),
    )


# What cannot be: the argument, the line, what to write


class Config:
    cap = 3.0

    def method(self, score: Any, *place: Any) -> Any:
        return score


GLOBAL = 1.0


def assigns_a_global(score, batch, head, q_idx, kv_idx):
    global GLOBAL
    GLOBAL = 2.0
    return score


def calls_itself(score, batch, head, q_idx, kv_idx):
    return calls_itself(score, batch, head, q_idx, kv_idx) + 1


def wrong_functions() -> Iterator[tuple[str, Callable[..., Any], str]]:
    """role, function, what the error says."""
    config, array, long, far = Config(), np.ones(3), 2**31, 3 * 10**9
    table, whole, names, steps, flag = torch.ones(5), torch.ones(2, 3), {"a": 1}, 3, torch.tensor(True)
    double, bound, get = torch.ones(3, dtype=torch.float64), [].append, {}.get
    state = [0]

    def counts(score, *place):
        nonlocal steps
        steps += 1
        return score

    def branches(score, *place):
        if score > 0:
            return score
        return -score

    def keeps(score, *place):
        score.memory = 1
        return score

    def empty(score, batch, head, q_idx, kv_idx):
        return score * unset

    if config is None:
        unset = 1

    score: list[tuple[Callable[..., Any], str]] = [
        (branches, "torch.where"),
        (lambda s, b, h, q, k: s if q > k else k, "torch.where"),
        (lambda s, b, h, q, k: s if steps > 2 else k, "also a captured one"),
        (lambda s, b, h, q, k: s if flag else k, "also a captured one"),
        (lambda s, b, h, q, k: s * (0 < q < k), "(a < b) & (b < c)"),
        (lambda s, b, h, q, k: s * (q > 1 and k > 1), "& | ~"),
        (lambda s, b, h, q, k: s * (not q > 1), "& | ~"),
        (lambda s, b, h, q, k: max(s, 0), "torch.maximum"),
        (lambda s, b, h, q, k: min(s, 0), "torch.minimum"),
        (lambda s, b, h, q, k: sorted([s, 0])[0], "torch.minimum"),
        (lambda s, b, h, q, k: math.exp(s), "torch's functions for math's"),
        (lambda s, b, h, q, k: float(q) * s, "x.float()"),
        (lambda s, b, h, q, k: s * int(s), "x.int()"),
        (lambda s, b, h, q, k: round(s), "__round__"),
        (lambda s, b, h, q, k: s * (1.0, 2.0)[h], "a captured tensor for a list"),
        (lambda s, b, h, q, k: sum(s for _ in range(steps)), "a literal for the end of a range"),
        (lambda s, b, h, q, k: torch.erf(s), "torch.erf is not known to kernels, but add"),
        (lambda s, b, h, q, k: torch.nn.functional.relu(s), "torch.nn is not known"),
        (lambda s, b, h, q, k: s + torch.rand(1).item(), "torch.rand is not known"),
        (lambda s, b, h, q, k: s.item(), "no 'item'"),
        (lambda s, b, h, q, k: s.mul_(2), "no 'mul_'"),
        (lambda s, b, h, q, k: s.where(q > k, 0), "no 'where'"),
        (lambda s, b, h, q, k: torch.where(q > k, input=s, other=k), "no 'input'"),
        (lambda s, b, h, q, k: torch.add(s, k, alpha=2), "no 'alpha'"),
        (lambda s, b, h, q, k: torch.div(s, 2, rounding_mode="floor"), "no 'rounding_mode'"),
        (lambda s, b, h, q, k: torch.where(s, q, k), "must be a condition"),
        (lambda s, b, h, q, k: s.to(torch.float16), "cannot become torch.float16"),
        (lambda s, b, h, q, k: s**0.5, "torch.sqrt"),
        (lambda s, b, h, q, k: 2**s, "unsupported operand"),
        (lambda s, b, h, q, k: s // 2, "// takes integers"),
        (lambda s, b, h, q, k: s % 2, "% takes integers"),
        (lambda s, b, h, q, k: s + q // 0, "divides by zero"),
        (lambda s, b, h, q, k: s / 0, "divides by zero"),
        (lambda s, b, h, q, k: s * (s & 1), "and takes conditions"),
        (lambda s, b, h, q, k: s * ~q, "xor takes conditions"),
        (lambda s, b, h, q, k: s * abs(q > k), "abs takes numbers"),
        (lambda s, b, h, q, k: s * torch.minimum(q > k, q > 1), "minimum takes numbers"),
        (lambda s, b, h, q, k: s + (k + 4294967296), "no 32-bit integer"),
        (lambda s, b, h, q, k: s + far, "far of <lambda> is 3000000000, which is no 32-bit integer"),
        (lambda s, b, h, q, k: s + long, "no 32-bit integer"),
        (lambda s, b, h, q, k: s + table, "add of a Table: a captured tensor needs indices"),
        (lambda s, b, h, q, k: s + table[s], "integers as indices: write .int()"),
        (lambda s, b, h, q, k: s + table[q > k], "integers as indices"),
        (lambda s, b, h, q, k: s + table[1:][0], "numbers as indices, no slice"),
        (lambda s, b, h, q, k: s + table[..., 0], "takes as many"),
        (lambda s, b, h, q, k: s + table[-2], "is not negative"),
        (lambda s, b, h, q, k: s + whole[h], "2 dimensions takes as many, as in x[i, j], not 1"),
        (lambda s, b, h, q, k: s + whole[h][q], "2 dimensions"),
        (lambda s, b, h, q, k: s + table.sum(), "no 'sum'"),
        (lambda s, b, h, q, k: s * len(table), "no len()"),
        (lambda s, b, h, q, k: s + torch.sum(table), "torch.sum is not known"),
        (lambda s, b, h, q, k: s + array[q], "array of <lambda> is a numpy.ndarray: make it a tensor"),
        (lambda s, b, h, q, k: s * config.cap, "config of <lambda> test_scores.Config: put"),
        (lambda s, b, h, q, k: s * Config.cap, "Config of <lambda> is a class: put"),
        (lambda s, b, h, q, k: s * names["a"], "names of <lambda> is a dict: put"),
        (lambda s, b, h, q, k: s * score_functions.SCALE, "is a module: import from "),
        (lambda s, b, h, q, k: s * (bound(1) or 1), "bound of <lambda> is a builtin_function"),
        (lambda s, b, h, q, k: s * get(1, 2), "get of <lambda> is a builtin_function_or_method: write"),
        (lambda s, b, h, q, k: s * state.append(1), "'tuple' object has no attribute 'append'"),
        (lambda s, b, h, q, k: s + double[0], "double of <lambda> is a tensor of torch.float64; captured"),
        (lambda s, b, h, q, k: print(s) or s, "uses print(), which kernels cannot"),
        (lambda s, b, h, q, k: s if isinstance(s, Tensor) else 0, "Tensor"),
        (lambda s, b, h, q, k: s * len(locals()), "uses locals(), which kernels cannot"),
        (lambda s, b, h, q, k: s + missing, "name 'missing' is not defined"),  # noqa: F821
        (lambda s, b, h, q, k: s + __import__("time").time(), "uses __import__()"),
        (lambda s, b, h, q, k: {q: s}[q], "unhashable"),
        (lambda s, b, h, q, k: s in (1, 2), "torch.where"),
        (lambda s, b, h, q, k: None, "must return a number, not NoneType"),
        (lambda s, b, h, q, k: (s, q), "must return a number, not tuple"),
        (lambda s, b, h, q, k: (yield s), "must return a number, not generator"),
        (lambda s, b, h, q, k: table, "must return a number, not Table"),
        (lambda s, b, h, q, k: q > k, "a score, no condition"),
        (lambda b, h, q, k: q > k, "takes 4 positional arguments but 5 were given"),
        (empty, "empty uses a variable before it has a value"),
        (counts, "counts assigns 'steps', which lies outside of it"),
        (assigns_a_global, "assigns_a_global assigns 'GLOBAL'"),
        (keeps, "keeps assigns the attribute 'memory'"),
        (calls_itself, "calls_itself of calls_itself calls itself"),
        (config.method, "a method: write a plain Python function"),
        (torch.nn.Identity(), "write a plain Python function"),
        (torch.tanh, "positional argument"),
        (3, "it must be a function, not int"),
    ]  # fmt: skip
    yield from (("score_mod", function, says) for function, says in score)
    mask: list[tuple[Callable[..., Any], str]] = [
        (lambda b, h, q, k: q - k, "it must return a condition, such as q_idx >= kv_idx"),
        (lambda b, h, q, k: 1, "it must return a condition"),
        (lambda b, h, q, k: ~True, "it must return a condition"),
        (lambda b, h, q, k: whole[q, k], "it must return a condition"),
        (lambda b, h, q, k: q >= k if q > 3 else k < 3, "torch.where"),
        (lambda b, h, q, k: (q >= k) & 1, "and takes conditions"),
        (lambda s, b, h, q, k: q > k, "missing 1 required positional argument: 'k'"),
    ]
    yield from (("mask_mod", function, says) for function, says in mask)


def test_what_cannot_be_is_refused() -> None:
    q = torch.randn(1, 3, 2, 8)
    for role, function, says in wrong_functions():
        with pytest.raises(TypeError) as error:
            flash_attn_func(q, q, q, **{role: function})
        message, code = str(error.value), getattr(function, "__code__", None)
        assert says in message and message.startswith(f"{role}: "), (says, message)
        if code is not None:  # the line
            place = rf"\n  {re.escape(__file__)}, line (\d+): \S"
            shown = re.search(place, message)
            assert shown, message
            assert 0 <= int(shown[1]) - code.co_firstlineno <= 4, message


def test_refused_in_a_helper_shows_its_line() -> None:
    def helper(x):
        y = x + 1
        return y if y > 0 else x

    with pytest.raises(CannotTrace, match=r"(?s)^score_mod: .*return y if y > 0 else x$"):
        attend(score_mod=lambda s, b, h, q, k: helper(s))


def test_captured_tensors_must_fit_the_call() -> None:
    q, meta = torch.randn(1, 3, 2, 8), torch.randn(3, device="meta")
    call = lambda x: flash_attn_func(q, q, q, score_mod=lambda s, b, h, i, j: s + x[i])  # noqa: E731
    with pytest.raises(ValueError, match=r"^score_mod captures a tensor on meta; it must be on cpu, as q is"):
        call(meta)
    with pytest.raises(ValueError, match=r"^mask_mod captures a tensor on meta"):
        flash_attn_func(q, q, q, mask_mod=lambda b, h, i, j: meta[i] > 0)
    with pytest.raises(ValueError, match=r"^score_mod captures a tensor without elements, of shape \(0,\)"):
        call(torch.ones(0))
    with pytest.raises(TypeError, match=r"^a tensor that score_mod captures has the layout torch.sparse_coo"):
        call(torch.eye(3).to_sparse()[0])
    empty = q[:0]
    flash_attn_func(empty, empty, empty, mask_mod=lambda b, h, i, j: empty[b, 0, 0, 0] > 0)


def watched_calls() -> Iterator[Callable[..., Any]]:
    q = torch.randn(2, 1, 3, 2, 8)

    def call(x: Tensor) -> Tensor:
        return flash_attn_func(x, x, x, score_mod=lambda s, b, h, i, j: s * 2).sum()

    def forward_mode() -> None:
        with torch.autograd.forward_ad.dual_level():
            call(torch.autograd.forward_ad.make_dual(q[0], q[1]))

    def counted() -> None:
        with FlopCounterMode(display=False):
            call(q[0])

    lengths = torch.tensor([0, 3]).int()
    yield lambda: torch.func.grad(call)(q[0])
    yield lambda: torch.func.vmap(call)(q)
    yield lambda: torch.func.jvp(call, (q[0],), (q[1],))
    yield forward_mode
    yield counted
    yield lambda: torch.jit.trace(call, (q[0],))

    def varlen(x: Tensor) -> Tensor:
        mask = lambda b, h, i, j: i >= j  # noqa: E731
        return flash_attn_varlen_func(x[0], x[0], x[0], lengths, lengths, 3, 3, mask_mod=mask).sum()

    def cached(x: Tensor) -> Tensor:
        return flash_attn_with_kvcache(x, x, x, mask_mod=lambda b, h, i, j: i >= j)

    yield lambda: torch.func.grad(varlen)(q[0])
    yield lambda: torch.func.vmap(cached)(q)


@pytest.mark.parametrize("call", list(watched_calls()))
def test_who_watches_is_told(call: Callable[[], Any]) -> None:
    with pytest.raises(NotImplementedError, match="^score_mod and mask_mod: plain calls only"):
        call()


def test_torch_compile_runs_it_outside_of_its_graphs() -> None:
    slopes = torch.rand(HEADS)

    def model(q: Tensor, cap: float) -> Tensor:
        x = flash_attn_func(
            q * 2,
            q,
            q,
            score_mod=lambda s, b, h, i, j: torch.tanh(s / cap) * cap - slopes[h] * abs(i - j),
            mask_mod=lambda b, h, i, j: i >= j,
        )
        return x.sin()

    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager")
    for cap in (3.0, 5.0):
        q = random_leaf(2, 6, HEADS, D)
        (expected,) = torch.autograd.grad(model(q, cap).sum(), q)
        (got,) = torch.autograd.grad(compiled(q, cap).sum(), q)
        torch.testing.assert_close(compiled(q, cap), model(q, cap))
        torch.testing.assert_close(got, expected)
    torch._dynamo.reset()
    with pytest.raises(torch._dynamo.exc.Unsupported):
        torch.compile(model, backend="eager", fullgraph=True)(q, cap)
    torch._dynamo.reset()


# Which functions share a kernel


def of(function: Callable[..., Any], role: str = "score_mod") -> Function:
    return capture(role, function)[0]


def test_functions_alike_are_one() -> None:
    a, b, c, d = 2.0, 7.5, torch.ones(3), torch.zeros(40, dtype=torch.float32)

    def named(score, batch, head, q_idx, kv_idx):
        """With a name."""
        return score * b + d[q_idx]

    def another_name(x, any_other, names, i, j):
        """With another one."""
        return x * a + c[i]

    lambdas = [lambda s, b_, h, q, k: s * a + c[q], lambda t, *, x=1, **rest: t]
    assert of(named) is of(another_name) and repr(of(named)) == repr(of(another_name))
    assert of(lambdas[0]) is of(lambda x, y, z, i, j: x * b + d[i])
    assert hash(of(named)) == hash(of(another_name))
    elsewhere: dict[str, Any] = {"m": 3.0, "t": torch.ones(9)}
    exec(compile("\n\n\nf = lambda s, b, h, q, k: s * m + t[q]", "elsewhere.py", "exec"), elsewhere)
    exec("g = lambda s, b, h, q, k: s * n + u[q]", {"n": 1.5, "u": c}, elsewhere)
    assert of(elsewhere["f"]) is of(elsewhere["g"])
    made = [masks.documents(ids=torch.arange(n)) for n in (5, 9)]
    assert of(made[0], "mask_mod") is of(made[1], "mask_mod")
    assert repr(built_in("softcap")) == "softcap" and built_in("alibi") is built_in("alibi")


def different_functions() -> Iterator[Callable[..., Any]]:
    """Each of another structure, though some have equal bytecodes, or equal constants by ==."""
    for constant in (1, 1.0, True, 0.0, -0.0, 2, math.inf):
        scope: dict[str, Any] = {}
        exec(
            f"f = lambda s, b, h, q, k: torch.where(q > k, s, {constant!r})".replace("inf", "1e999"),
            {"torch": torch},
            scope,
        )
        yield scope["f"]
    yield lambda s, b, h, q, k: torch.sigmoid(s)
    yield lambda s, b, h, q, k: torch.tanh(s)
    yield lambda s, b, h, q, k: s.sigmoid()
    yield lambda s, b, h, q, k: s.tanh()
    yield lambda s, b, h, q, k: s + q
    yield lambda s, b, h, q, k: s + k
    yield lambda s, b, h, q, k: s - q
    yield lambda s, b, h, q, k: s + abs(q)
    yield lambda s, b, h, q, k: s + float("2")
    yield lambda s, b, h, q, k: s + int("2")
    for x in (2, 2.0, True, False, None, "a", "b", torch.float32, math.inf, math.nan, (1, 2), (1.0, 2)):
        yield lambda s, b, h, q, k, x=x: s * 1.0 if x is None else s * 2.0
    for x in (torch.ones(2), torch.ones(2).half(), torch.ones(2).int(), torch.ones(2, 2), torch.tensor(1.0)):
        yield lambda s, b, h, q, k, x=x: s * 3.0
    yield lambda s, b, h, q, k: s + helper_a(s, x=q, y=k)
    yield lambda s, b, h, q, k: s + helper_b(s, x=q, y=k)
    yield lambda s, b, h, q, k: (lambda s, x, y: s * x + y)(s, x=q, y=k)
    yield lambda s, b, h, q, k: (lambda s, y, x: s * y + x)(s, x=q, y=k)
    for helper in (helper_a, helper_b, operator.add, operator.sub, torch.tanh, torch.sigmoid, math.exp, abs):
        yield lambda s, b, h, q, k, helper=helper: s * 4.0
    yield functools.partial(lambda x, s, b, h, q, k: s * 5.0, 1.0)
    yield functools.partial(lambda s, b, h, q, k, x: s * 5.0, x=1.0)
    yield functools.partial(lambda s, b, h, q, k, x, y: s * x - y, x=1.0, y=2.0)
    yield functools.partial(lambda s, b, h, q, k, y, x: s * y - x, x=1.0, y=2.0)


def helper_a(s: Any, x: Any, y: Any) -> Any:
    return s * x + y


def helper_b(s: Any, y: Any, x: Any) -> Any:
    return s * y + x


def test_functions_unlike_are_several() -> None:
    made = list(different_functions())
    found = [of(function) for function in made]
    assert len({one.digest for one in found}) == len(set(found)) == len(made)
    mask = lambda s, b=1, h=1, q=1, k=1: s > 1  # noqa: E731
    assert len({of(mask, "mask_mod").digest, *(one.digest for one in found)}) == len(made) + 1


def test_what_is_captured_is_read_in_each_call() -> None:
    """Also where its structure changes, which is remembered for a code object."""
    x: Any = 2.0

    def score_mod(s, b, h, q, k):
        return s * x

    def by_global(s, b, h, q, k):
        return s * GLOBAL

    def by_helper(s, b, h, q, k):
        return helper(s)

    helper = lambda y: y * x  # noqa: E731
    global GLOBAL
    tensors = torch.tensor(0.5), torch.tensor(2, dtype=torch.int32)
    for x in (2.0, 3.0, 3, -1, np.float32(0.25), *tensors, True, 2.0):
        GLOBAL = x
        expected = attend(score_mod=eval(f"lambda s, b, h, q, k: s * {float(x)!r}"))
        for function in (score_mod, by_global, by_helper):
            for _ in range(2):
                assert same(attend(score_mod=function), expected), (x, function)
    GLOBAL, x = 1.0, 2.0
    helper = lambda y: y - x  # noqa: E731
    assert same(attend(score_mod=by_helper), attend(score_mod=lambda s, b, h, q, k: s - 2.0))
    helper = torch.tanh
    assert same(attend(score_mod=by_helper), attend(score_mod=lambda s, b, h, q, k: torch.tanh(s)))
    helper = helper_a
    with pytest.raises(CannotTrace, match="missing 2 required"):
        attend(score_mod=by_helper)
    score_mod.__defaults__ = (1.0,)
    assert same(attend(score_mod=score_mod), attend(score_mod=lambda s, b, h, q, k: s * 2.0))
    scope: dict[str, Any] = {"torch": torch}
    exec("f = lambda s, b, h, q, k: s * abs(q - k)", scope)
    first = attend(score_mod=scope["f"])
    scope["abs"] = lambda x: -x * 1
    assert same(attend(score_mod=scope["f"]), attend(score_mod=lambda s, b, h, q, k: s * (k - q)))
    del scope["abs"]
    assert same(attend(score_mod=scope["f"]), first)


def test_nothing_captured_is_kept() -> None:
    def call() -> list[weakref.ref]:
        table, ids, given = torch.randn(7), torch.arange(7), torch.randn(7)
        deep = [torch.randn(7), torch.randn(())]

        def helper(x, y=given):
            return x + deep[0][x.int()] * deep[1] + y[0]

        attend(
            score_mod=lambda s, b, h, q, k, *, z=given: helper(s) + table[q] + z[k],
            mask_mod=masks.and_masks(masks.causal(), functools.partial(lambda i, b, h, q, k: i[q] > 0, ids)),
        )
        return [weakref.ref(x) for x in (table, ids, given, *deep, helper)]

    kept = call()
    gc.collect()
    assert [x() for x in kept] == [None] * len(kept)


def test_memory_for_functions_is_bounded() -> None:
    for i in range(1100):
        of(eval(f"lambda s, b, h, q, k: s * {i}.5"))
    assert len(capture_module._recent) <= 1024
    assert capture_module._function.cache_info().currsize <= 1024


SCRIPT = """
import sys
sys.path.insert(0, sys.argv[1])
import torch
from test_scores import different_functions, of
from score_functions import same_document, scaled_and_biased
nothing = [torch.compile]
for function in different_functions():
    print(of(function))
print(of(scaled_and_biased), of(same_document, "mask_mod"))
print(of(lambda s, b, h, q, k: s * ({"b": 1, "a": 2, "c": 3}["a"] if "c" in {"a", "b", "c"} else 1)))
"""


def test_another_process_finds_the_same_names() -> None:
    tests = str(Path(__file__).parent)
    printed = [
        subprocess.run(
            [sys.executable, "-c", SCRIPT, tests],
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    ]
    assert printed[0] == printed[1] and len(printed[0].splitlines()) > 40
    assert str(of(score_functions.scaled_and_biased)) in printed[0]


def test_functions_travel_to_another_process() -> None:
    for name in ("softcap", "alibi"):
        assert pickle.loads(pickle.dumps(built_in(name))) is built_in(name)
    found = of(score_functions.scaled_and_biased)
    data = pickle.dumps(found)
    assert pickle.loads(data) is found and b"SCALE" not in data
    script = f"import pickle, sys; sys.path.insert(0, sys.argv[1]); print(pickle.loads({data!r}))"
    command = [sys.executable, "-c", script, str(Path(__file__).parent)]
    assert subprocess.run(command, capture_output=True, text=True).stdout.strip() == str(found)
    with pytest.raises(pickle.PicklingError, match="^score_mod: define it at a module's level"):
        pickle.dumps(of(lambda s, b, h, q, k: s * 12.5))


def test_a_function_that_has_changed_is_not_taken_for_the_old_one(monkeypatch: pytest.MonkeyPatch) -> None:
    data = pickle.dumps(of(score_functions.scaled_and_biased))
    monkeypatch.setattr(score_functions, "SCALE", 2)
    with pytest.raises(pickle.UnpicklingError, match="score_functions.scaled_and_biased is another function"):
        pickle.loads(data)


def test_a_lambda_does_not_hide_the_name_of_its_like() -> None:
    assert of(lambda s, b, h, q, k: helper_a(s, q, GLOBAL)) is of(by_name)
    assert pickle.loads(pickle.dumps(of(by_name))) is of(by_name)


def by_name(s: Any, b: Any, h: Any, q: Any, k: Any) -> Any:
    return helper_a(s, q, GLOBAL)


def test_every_known_function_is_pytorchs() -> None:
    """By its name, so that a function means the same where tensors are computed with."""
    for name in FUNCTIONS:
        assert name.startswith("__") or hasattr(torch, name)
