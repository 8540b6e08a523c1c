"""dense: what it makes of the arguments of a call, and every error it raises."""

import itertools
from collections.abc import Sequence
from dataclasses import FrozenInstanceError
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from mini_flash_attention import problem
from mini_flash_attention.problem import Problem

DEFAULTS = dict(
    dropout_p=0.0,
    softmax_scale=None,
    causal=False,
    window_size=(-1, -1),
    softcap=0.0,
    alibi_slopes=None,
    deterministic=False,
)
Q = torch.zeros(2, 5, 6, 32)
KV = torch.zeros(2, 7, 3, 32)


def dense(q: Tensor = Q, k: Tensor = KV, v: Tensor = KV, **options: Any) -> Problem:
    return problem.dense(q, k, v, **DEFAULTS | options)


def test_facts_of_a_call() -> None:
    assert dense() == Problem(
        dtype=torch.float32,
        device=torch.device("cpu"),
        batch=2,
        seqlen_q=5,
        seqlen_k=7,
        heads_q=6,
        heads_k=3,
        head_dim=32,
        softmax_scale=32**-0.5,
    )
    assert dense().group == 2
    with pytest.raises(FrozenInstanceError):
        dense().causal = True


def test_options() -> None:
    slopes = torch.ones(2, 6)
    made = dense(dropout_p=0.25, softmax_scale=-2, softcap=30, alibi_slopes=slopes, deterministic=1)
    assert (made.dropout_p, made.softmax_scale, made.softcap) == (0.25, -2.0, 30.0)
    assert made.alibi and made.deterministic is True
    assert isinstance(made.softmax_scale, float) and isinstance(made.softcap, float)
    assert dense(softmax_scale=0).softmax_scale == 0
    assert dense(softcap=-1.0).softcap == 0


def test_numbers_may_be_as_large_as_the_computation_holds() -> None:
    largest = torch.finfo(torch.float32).max
    assert dense(softmax_scale=-largest, softcap=largest).softmax_scale == -largest
    made = dense(Q.double(), KV.double(), KV.double(), softmax_scale=1e300, softcap=1e300)
    assert (made.softmax_scale, made.softcap) == (1e300, 1e300)


@pytest.mark.parametrize(
    "window_size",
    [
        (2, 1),
        [2, 1],
        torch.tensor([2, 1]),
        torch.tensor([2, 1], dtype=torch.int32),
        np.array([2, 1]),
        (np.int64(2), np.int32(1)),
    ],
    ids=repr,
)
def test_window_is_any_pair_of_ints(window_size: Sequence[int] | Tensor) -> None:
    made = dense(window_size=window_size)
    assert (made.window_left, made.window_right) == (2, 1)
    assert type(made.window_left) is type(made.window_right) is int


@pytest.mark.parametrize("window_size", [None, (None, None), (-1, -1), (-7, None), [None, -1]])
def test_no_limit(window_size: Sequence[int | None] | None) -> None:
    made = dense(window_size=window_size)
    assert (made.window_left, made.window_right) == (None, None)


def test_causal_replaces_the_right_side() -> None:
    assert dense(causal=True).window_right == 0
    made = dense(causal=True, window_size=(3, 2))
    assert (made.window_left, made.window_right) == (3, 0)
    assert dense(causal=np.True_) == dense(causal=np.int64(1)) == dense(causal=1) == dense(causal=True)
    assert dense(causal=np.False_) == dense(causal=0) == dense()


def test_window_is_dropped_exactly_where_it_limits_nothing() -> None:
    def visible(i: int, j: int, left: int | None, right: int | None) -> bool:
        distance = j - (i + seqlen_k - seqlen_q)
        return (left is None or distance >= -left) and (right is None or distance <= right)

    for seqlen_q, seqlen_k in itertools.product(range(1, 5), repeat=2):
        pairs = list(itertools.product(range(seqlen_q), range(seqlen_k)))
        q, k = torch.zeros(1, seqlen_q, 1, 8), torch.zeros(1, seqlen_k, 1, 8)
        for left, right in itertools.product(range(7), repeat=2):
            made = dense(q, k, k, window_size=(left, right))
            assert made.window_left in (None, left) and made.window_right in (None, right)
            assert (made.window_left is None) == all(visible(i, j, left, None) for i, j in pairs)
            assert (made.window_right is None) == all(visible(i, j, None, right) for i, j in pairs)


@pytest.mark.parametrize("batch, seqlen_q, seqlen_k", [(0, 5, 7), (2, 0, 7), (2, 5, 0), (0, 0, 0)])
def test_empty_problems_are_legal(batch: int, seqlen_q: int, seqlen_k: int) -> None:
    made = dense(Q[:batch, :seqlen_q], KV[:batch, :seqlen_k], KV[:batch, :seqlen_k], causal=True)
    assert (made.batch, made.seqlen_q, made.seqlen_k) == (batch, seqlen_q, seqlen_k)


@pytest.mark.parametrize("head_dim", [1, 2, 59, 111, 256])
@pytest.mark.parametrize("dtype", problem.DTYPES)
def test_head_dims_and_dtypes(head_dim: int, dtype: torch.dtype) -> None:
    x = torch.zeros(1, 2, 3, head_dim, dtype=dtype)
    made = dense(x, x, x)
    assert (made.head_dim, made.dtype) == (head_dim, dtype)


def test_a_repeated_call_is_served_from_memory() -> None:
    assert dense(softcap=7.5) is dense(torch.ones_like(Q), softcap=7.5)
    assert dense(window_size=[1, 2]) is dense(window_size=torch.tensor([1, 2]))


def test_what_is_remembered_hides_no_error() -> None:
    dense(window_size=(3, 2), dropout_p=0.5)
    with pytest.raises(TypeError, match="window_size"):
        dense(window_size=(3.0, 2), dropout_p=0.5)


def x(*shape: int, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Tensor:
    return torch.zeros(shape, dtype=dtype, device=device)


HALF, META = x(2, 7, 3, 32, dtype=torch.float16), x(2, 7, 3, 32, device="meta")
F64 = x(2, 7, 3, 32, dtype=torch.float64)
INTS = x(2, 5, 3, 32, dtype=torch.int32)
WIDE, FLAT = x(1, 1, 1, 257), x(1, 1, 1, 0)

ERRORS = [
    (dict(q=[1.0]), TypeError, "q must be a torch.Tensor, not list"),
    (dict(k=None), TypeError, "k must be a torch.Tensor, not NoneType"),
    (dict(v=np.zeros((2, 7, 3, 32))), TypeError, "v must be a torch.Tensor, not ndarray"),
    (dict(q=Q[0]), ValueError, r"q must have 4 dimensions .* \(5, 6, 32\)"),
    (dict(k=KV[None]), ValueError, "k must have 4 dimensions"),
    (dict(v=KV[0]), ValueError, "v must have 4 dimensions"),
    (dict(v=x(2, 8, 3, 32)), ValueError, r"k and v .* \(2, 7, 3, 32\) .* \(2, 8, 3, 32\)"),
    (dict(v=x(2, 7, 3, 16)), ValueError, "k and v must have one shape"),
    (dict(q=x(1, 5, 6, 32)), ValueError, "batch size, but q has 1 and k has 2"),
    (dict(q=x(2, 5, 6, 64)), ValueError, "head_dim, but q has 64 and k has 32"),
    (dict(q=x(2, 5, 4, 32)), ValueError, r"heads of q \(4\) .* multiple of the heads of k \(3\)"),
    (dict(q=x(2, 5, 2, 32)), ValueError, r"heads of q \(2\)"),
    (dict(q=x(2, 5, 0, 32)), ValueError, r"heads of q \(0\)"),
    (dict(k=x(2, 7, 0, 32), v=x(2, 7, 0, 32)), ValueError, r"heads of k \(0\)"),
    (dict(q=WIDE, k=WIDE, v=WIDE), ValueError, "head_dim .* must be in 1 to 256, not 257"),
    (dict(q=FLAT, k=FLAT, v=FLAT), ValueError, "head_dim .* must be in 1 to 256, not 0"),
    (dict(k=HALF), ValueError, "one dtype, .* torch.float32, torch.float16 and"),
    (dict(q=INTS, k=INTS, v=INTS), TypeError, "q, k and v must be one of .*, not torch.int32"),
    (dict(v=META), ValueError, "one device, .* cpu, cpu and meta"),
    (dict(dropout_p=-0.1), ValueError, r"dropout_p must be in \[0, 1\), not -0.1"),
    (dict(dropout_p=1.0), ValueError, "dropout_p"),
    (dict(dropout_p=float("nan")), ValueError, "dropout_p must be finite .*, not nan"),
    (dict(dropout_p=10**400), ValueError, "dropout_p must be finite"),
    (dict(dropout_p=None), TypeError, "dropout_p must be a number, not NoneType"),
    (dict(dropout_p=[0.5]), TypeError, "dropout_p must be a number, not list"),
    (dict(softmax_scale="1"), TypeError, "softmax_scale must be a number, not str"),
    (dict(softmax_scale=torch.tensor(1.0)), TypeError, "softmax_scale must be a number"),
    (dict(softmax_scale=float("inf")), ValueError, "softmax_scale must be finite"),
    (dict(softmax_scale=10**400), ValueError, "softmax_scale must be finite in torch.float32, not inf"),
    (dict(softmax_scale=-(10**5000)), ValueError, "softmax_scale must be finite .*, not -inf"),
    (dict(softmax_scale=1e300), ValueError, r"softmax_scale must be finite in torch.float32, not 1e\+300"),
    (dict(q=HALF, k=HALF, v=HALF, softmax_scale=-1e39), ValueError, r"softmax_scale .*, not -1e\+39"),
    (dict(q=F64, k=F64, v=F64, softmax_scale=10**400), ValueError, "softmax_scale .* torch.float64, not inf"),
    (dict(softcap=None), TypeError, "softcap must be a number"),
    (dict(softcap=1e39), ValueError, r"softcap must be finite in torch.float32, not 1e\+39"),
    (dict(softcap=float("nan")), ValueError, "softcap must be finite"),
    (dict(causal=torch.tensor(True)), TypeError, "causal must be a bool"),
    (dict(causal=np.array([1, 0])), TypeError, "causal must be a bool, 0 or 1, not ndarray"),
    (dict(causal=np.array(True)), TypeError, "causal must be a bool, 0 or 1, not ndarray"),
    (dict(causal=None), TypeError, "causal must be a bool, 0 or 1, not NoneType"),
    (dict(causal="False"), TypeError, "causal must be a bool, 0 or 1, not str"),
    (dict(causal=2), ValueError, "causal must be a bool, 0 or 1, and no other int"),
    (dict(deterministic=torch.tensor(True)), TypeError, "deterministic must be a bool"),
    (dict(deterministic=1.0), TypeError, "deterministic must be a bool, 0 or 1, not float"),
    (dict(deterministic=-1), ValueError, "deterministic must be a bool, 0 or 1"),
    (dict(window_size=3), TypeError, "window_size must be a pair of ints, not int"),
    (dict(window_size=torch.tensor(3)), TypeError, "window_size must be a pair .*, not Tensor"),
    (dict(window_size=(3,)), ValueError, r"window_size must have two .* \(left, right\), not 1"),
    (dict(window_size=torch.tensor([1, 2, 3])), ValueError, "window_size must have two .*, not 3"),
    (dict(window_size=(0.5, 1)), TypeError, "window_size .* left is 0.5"),
    (dict(window_size=(1, "2")), TypeError, "window_size .* right is '2'"),
    (dict(window_size=torch.tensor([1.0, 2.0])), TypeError, "window_size .* left is 1.0"),
    (dict(window_size=(torch.tensor(1), 2)), TypeError, "window_size .* left is tensor"),
    (dict(alibi_slopes=[0.5] * 6), TypeError, "alibi_slopes must be a torch.Tensor, not list"),
    (dict(alibi_slopes=x(3)), ValueError, r"alibi_slopes .* \(6,\) .* \(2, 6\), not \(3,\)"),
    (dict(alibi_slopes=x(6, 2)), ValueError, r"alibi_slopes must have shape .* not \(6, 2\)"),
    (dict(alibi_slopes=x(6, dtype=torch.float16)), TypeError, "alibi_slopes must be torch.float32"),
    (dict(alibi_slopes=x(6, device="meta")), ValueError, "alibi_slopes is on meta, .* on cpu"),
    (dict(alibi_slopes=x(6).requires_grad_()), ValueError, "alibi_slopes gets no gradient"),
]


@pytest.mark.parametrize("arguments, error, message", ERRORS, ids=[case[2] for case in ERRORS])
def test_errors(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message) as raised:
        dense(**arguments)
    assert raised.value.__context__ is None  # one sentence, not a chain of tracebacks


def test_slopes_that_are_parameters_serve_where_nothing_is_trained() -> None:
    with torch.no_grad():
        assert dense(alibi_slopes=x(6).requires_grad_()).alibi
