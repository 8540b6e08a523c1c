"""dense, varlen and cache: what they make of the arguments of a call, and every error they raise."""

import itertools
import pickle
from collections.abc import Sequence
from dataclasses import FrozenInstanceError, replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from mini_flash_attention import checks, problem
from mini_flash_attention.problem import Problem

DEFAULTS = dict(
    dropout_p=0.0,
    softmax_scale=None,
    causal=False,
    window_size=(-1, -1),
    softcap=0.0,
    alibi_slopes=None,
    deterministic=False,
    s_aux=None,
)
Q = torch.zeros(2, 5, 6, 32)
KV = torch.zeros(2, 7, 3, 32)


def dense(q: Tensor = Q, k: Tensor = KV, v: Tensor = KV, **options: Any) -> Problem:
    return problem.dense(q, k, v, tuple((DEFAULTS | options).values()))[0]


def test_another_process_computes_its_own_hash() -> None:
    one = dense()
    hash(one)
    other = pickle.loads(pickle.dumps(one))
    assert other == one and vars(other).keys() < vars(one).keys()


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
        max_seqlen_q=5,
    )
    assert dense().group == 2
    with pytest.raises(FrozenInstanceError):
        dense().causal = True


def test_options() -> None:
    slopes = torch.ones(2, 6)
    made = dense(dropout_p=0.25, softmax_scale=-2, softcap=30, alibi_slopes=slopes, deterministic=1)
    assert (made.dropout_p, made.softmax_scale, made.softcap) == (0.25, -2.0, 30.0)
    assert made.alibi and made.deterministic is True and not made.sinks
    assert all(dense(s_aux=torch.ones(6, dtype=dtype)).sinks for dtype in checks.DTYPES)
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
@pytest.mark.parametrize("dtype", checks.DTYPES)
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
    (dict(q=x(2, 5, 0, 32)), ValueError, r"q must have at least one head, .* \(2, 5, 0, 32\)"),
    (dict(k=x(2, 7, 0, 32), v=x(2, 7, 0, 32)), ValueError, r"k must have at least one head"),
    (dict(q=WIDE, k=WIDE, v=WIDE), ValueError, "head_dim .* must be in 1 to 256, not 257"),
    (dict(q=FLAT, k=FLAT, v=FLAT), ValueError, "head_dim .* must be in 1 to 256, not 0"),
    (dict(k=HALF), ValueError, "one dtype, but q has torch.float32, k has torch.float16"),
    (dict(q=INTS, k=INTS, v=INTS), TypeError, "q, k and v must be one of .*, not torch.int32"),
    (dict(v=META), ValueError, "one device, but q has cpu, k has cpu, v has meta"),
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
    (dict(s_aux=[0.5] * 6), TypeError, "s_aux must be a torch.Tensor, not list"),
    (dict(s_aux=x(3)), ValueError, r"s_aux must have shape \(heads,\) = \(6,\), not \(3,\)"),
    (dict(s_aux=x(2, 6)), ValueError, r"s_aux must have shape \(heads,\) = \(6,\), not \(2, 6\)"),
    (dict(s_aux=x(6, dtype=torch.int32)), TypeError, "s_aux must be one of torch.float16, .* torch.int32"),
    (dict(s_aux=x(6, device="meta")), ValueError, "s_aux is on meta, .* on cpu"),
]


@pytest.mark.parametrize("arguments, error, message", ERRORS, ids=[case[2] for case in ERRORS])
def test_errors(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message) as raised:
        dense(**arguments)
    assert raised.value.__context__ is None  # one sentence, not a chain of tracebacks


def test_slopes_that_are_parameters_serve_where_nothing_is_trained() -> None:
    with torch.no_grad():
        assert dense(alibi_slopes=x(6).requires_grad_()).alibi


QP, KP = x(12, 6, 32), x(20, 3, 32)
PAGES = x(9, 4, 3, 32)  # 9 pages of 4 tokens
VARLEN = dict(
    cu_seqlens_q=x(3, dtype=torch.int32),
    cu_seqlens_k=x(3, dtype=torch.int32),
    max_seqlen_q=7,
    max_seqlen_k=11,
    block_table=None,
    seqused_k=None,
    num_splits=0,
)
USED, TABLE = x(2, dtype=torch.int32), x(2, 5, dtype=torch.int32)


def varlen(q: Tensor = QP, k: Tensor = KP, v: Tensor | None = None, **options: Any) -> Problem:
    lengths, out = chosen(VARLEN, options), options.pop("out", None)
    options = tuple((DEFAULTS | options).values())
    return problem.varlen(q, k, k if v is None else v, lengths, options, out)[0]


def chosen(defaults: dict[str, Any], options: dict[str, Any]) -> tuple:
    """The arguments of these names: taken from the options, else the default."""
    return tuple(options.pop(name, default) for name, default in defaults.items())


def test_facts_of_packed_sequences() -> None:
    packed = Problem(
        dtype=torch.float32,
        device=torch.device("cpu"),
        batch=2,
        seqlen_q=12,
        seqlen_k=20,
        heads_q=6,
        heads_k=3,
        head_dim=32,
        softmax_scale=32**-0.5,
        ragged=True,
        packed_q=True,
        packed_k=True,
        max_seqlen_q=7,
    )
    assert varlen() == packed
    rows = varlen(k=KV, cu_seqlens_k=None, seqused_k=USED)
    assert rows == replace(packed, seqlen_k=7, packed_k=False)
    assert varlen(k=PAGES, block_table=TABLE) == replace(packed, seqlen_k=20, packed_k=False, page_size=4)
    assert varlen(k=PAGES, block_table=TABLE, cu_seqlens_k=None, seqused_k=USED).page_size == 4
    assert varlen(out=torch.empty_like(QP), seqused_k=USED) == packed
    assert varlen(alibi_slopes=x(2, 6), causal=True).window_right == 0
    assert varlen(s_aux=x(6)) == replace(packed, sinks=True)


def test_longest_lengths() -> None:
    for kind in (int, np.int32, torch.tensor, lambda n: torch.tensor([n], dtype=torch.int32)):
        assert varlen(max_seqlen_q=kind(5), max_seqlen_k=kind(5)).max_seqlen_q == 5
    assert varlen(max_seqlen_q=10**9).max_seqlen_q == 12  # no more than there are
    elsewhere = torch.tensor(5, device="meta")  # as on a GPU: it is not read
    assert varlen(max_seqlen_q=elsewhere, max_seqlen_k=elsewhere).max_seqlen_q == 12


def test_windows_of_packed_sequences_are_dropped_only_where_they_limit_no_sequence() -> None:
    assert varlen(window_size=(19, 11)).window_left is varlen(window_size=(19, 11)).window_right is None
    made = varlen(window_size=(18, 10))
    assert (made.window_left, made.window_right) == (18, 10)


@pytest.mark.parametrize("total_q, total_k, batch", [(0, 0, 0), (0, 0, 2), (0, 20, 2), (12, 0, 2)])
def test_empty_packed_problems_are_legal(total_q: int, total_k: int, batch: int) -> None:
    cu_seqlens = x(batch + 1, dtype=torch.int32)
    made = varlen(QP[:total_q], KP[:total_k], cu_seqlens_q=cu_seqlens, cu_seqlens_k=cu_seqlens)
    assert (made.batch, made.seqlen_q, made.seqlen_k) == (batch, total_q, total_k)


LEAF = x(12, 6, 32).requires_grad_()
BOTH = x(20, 2, 6, 32)  # two tensors in one
VARLEN_ERRORS = [
    (dict(q=Q), ValueError, r"q must have 3 dimensions \(total_q, heads, head_dim\)"),
    (dict(k=KV), ValueError, r"k must have 3 dimensions \(total_k, heads_k, head_dim\)"),
    (dict(v=x(21, 3, 32)), ValueError, "k and v must have one shape"),
    (dict(cu_seqlens_k=None, seqused_k=USED), ValueError, r"k must have 4 dimensions \(batch, capacity"),
    (dict(block_table=TABLE), ValueError, r"k must have 4 dimensions \(num_blocks, page_size"),
    (dict(cu_seqlens_k=None), ValueError, "cu_seqlens_k or seqused_k must be given"),
    (dict(k=x(3, 7, 3, 32), cu_seqlens_k=None, seqused_k=USED), ValueError, "batch size of cu_seqlens_q, 2"),
    (dict(q=x(12, 4, 32)), ValueError, r"heads of q \(4\) must be a multiple"),
    (dict(cu_seqlens_q=None), TypeError, "cu_seqlens_q must be a torch.Tensor, not NoneType"),
    (dict(cu_seqlens_q=[0, 5, 12]), TypeError, "cu_seqlens_q must be a torch.Tensor, not list"),
    (dict(cu_seqlens_q=x(3)), TypeError, "cu_seqlens_q must be torch.int32, not torch.float32"),
    (dict(cu_seqlens_k=x(3, dtype=torch.int64)), TypeError, "cu_seqlens_k must be .*int32, not .*int64"),
    (dict(cu_seqlens_q=x(3, 1, dtype=torch.int32)), ValueError, r"cu_seqlens_q .* 1 dimensions \(batch"),
    (dict(cu_seqlens_q=x(0, dtype=torch.int32)), ValueError, "cu_seqlens_q must have batch . 1 elements"),
    (dict(cu_seqlens_k=x(4, dtype=torch.int32)), ValueError, r"cu_seqlens_k .* = \(3\), not \(4,\)"),
    (dict(cu_seqlens_k=x(3, dtype=torch.int32, device="meta")), ValueError, "cu_seqlens_k is on meta"),
    (dict(seqused_k=x(3, dtype=torch.int32)), ValueError, r"seqused_k must have shape \(batch\) = \(2\)"),
    (dict(k=PAGES, block_table=TABLE[:1]), ValueError, r"block_table .* = \(2, \*\), not \(1, 5\)"),
    (dict(k=PAGES, block_table=TABLE[0]), ValueError, "block_table must have 2 dimensions"),
    (dict(k=PAGES, block_table=TABLE.long()), TypeError, "block_table must be torch.int32"),
    (dict(k=PAGES[:0], block_table=TABLE), ValueError, "k must have at least one page of at least one token"),
    (dict(k=PAGES[:, :0], block_table=TABLE), ValueError, "k must have at least one page"),
    (dict(max_seqlen_q=5.0), TypeError, "max_seqlen_q must be an int, not float"),
    (dict(max_seqlen_q=None), TypeError, "max_seqlen_q must be an int, not NoneType"),
    (dict(max_seqlen_k=torch.tensor(5.0)), TypeError, "max_seqlen_k must be an int or an integer tensor"),
    (dict(max_seqlen_k=torch.tensor([5, 6])), TypeError, "max_seqlen_k must be .* of one element"),
    (dict(max_seqlen_q=-1), ValueError, "max_seqlen_q must not be negative, but is -1"),
    (dict(out=x(12, 6, 64)), ValueError, r"out must be like q, .*, but is \(12, 6, 64\)"),
    (dict(out=QP.half()), ValueError, "out must be like q, .* torch.float16 on cpu"),
    (dict(out=1), TypeError, "out must be a torch.Tensor"),
    (dict(q=LEAF, out=torch.empty_like(QP)), ValueError, "out: .* has no gradient, but q requires one"),
    (dict(out=torch.empty_like(QP).requires_grad_()), ValueError, "but out requires one"),
    (dict(out=QP[:1].expand_as(QP)), ValueError, "out overlaps itself"),
    (dict(k=BOTH[:20, 0, :3], v=BOTH[:20, 1, :3], out=BOTH[3:15, 0]), ValueError, "out shares memory with k"),
    (dict(k=BOTH[:20, 0, :3], v=BOTH[:20, 1, :3], out=BOTH[3:15, 1]), ValueError, "out shares memory with v"),
    (dict(q=BOTH[:12, 0], out=BOTH[1:13, 0]), ValueError, "out shares memory with q"),
    (dict(q=torch.from_dlpack(BOTH[:12, 0]), out=BOTH[1:13, 0]), ValueError, "out shares memory with q"),
    (dict(alibi_slopes=x(3, 6)), ValueError, r"alibi_slopes .* \(2, 6\), not \(3, 6\)"),
    (dict(s_aux=x(3)), ValueError, r"s_aux must have shape \(heads,\) = \(6,\), not \(3,\)"),
    (dict(s_aux=x(6).requires_grad_(), out=torch.empty_like(QP)), ValueError, "but s_aux requires one"),
    (dict(window_size=(0.5, 1)), TypeError, "window_size .* left is 0.5"),
    (dict(causal=2), ValueError, "causal must be a bool"),
    (dict(num_splits=129), ValueError, "num_splits must be in 0"),
    (dict(num_splits="1"), TypeError, "num_splits must be an int"),
]  # fmt: skip


@pytest.mark.parametrize("arguments, error, message", VARLEN_ERRORS, ids=[case[2] for case in VARLEN_ERRORS])
def test_varlen_errors(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message) as raised:
        varlen(**arguments)
    assert raised.value.__context__ is None


QC, KC = x(2, 4, 6, 32), x(3, 50, 3, 32)  # two sequences, three rows
NEW, COS = x(2, 4, 3, 32), x(50, 8)
NO_NEW = dict(k=None, v=None, rotary_cos=None, rotary_sin=None, rotary_interleaved=True)
PLACES = dict(cache_seqlens=USED, cache_batch_idx=None, cache_leftpad=None, block_table=None)
APPEND = dict(k=NEW, v=NEW)
ROTARY = APPEND | dict(rotary_cos=COS, rotary_sin=COS)
LEAF_CACHE, LEAF_COS = x(2, 50, 3, 32).requires_grad_(), x(50, 8).requires_grad_()


def cache(q: Tensor = QC, k_cache: Tensor = KC, v_cache: Tensor | None = None, **options: Any) -> Problem:
    v_cache = k_cache if v_cache is None else v_cache
    new, places = chosen(NO_NEW, options), chosen(PLACES, options)
    num_splits = options.pop("num_splits", 0)
    options = tuple((DEFAULTS | options).values())
    made, *_ = problem.cache(q, k_cache, v_cache, new, places, options, num_splits)
    return made


def test_facts_of_a_cache() -> None:
    plain = Problem(
        dtype=torch.float32,
        device=torch.device("cpu"),
        batch=2,
        seqlen_q=4,
        seqlen_k=50,
        heads_q=6,
        heads_k=3,
        head_dim=32,
        softmax_scale=32**-0.5,
        ragged=True,
        max_seqlen_q=4,
    )
    assert cache() == cache(**ROTARY) == cache(cache_seqlens=None) == plain
    assert cache(num_splits=128) == replace(plain, num_splits=128)
    # A limit that hides nothing is kept where the batch must not decide, and where rotation asks for it; but
    # not so large that sums of 32 bits overflow.
    one = replace(plain, num_splits=1)
    endless = dict(window_left=2**30, window_right=2**30)
    assert cache(num_splits=1, window_size=(2**31 - 1, 2**40)) == replace(one, **endless)
    assert cache(**ROTARY, window_size=(2**31 - 1, 2**40)) == replace(plain, **endless)
    assert cache(window_size=(2**31 - 1, 2**40)) == plain
    assert cache(num_splits=1, window_size=(1000, 0)) == replace(one, window_left=1000, window_right=0)
    assert cache(window_size=(1000, -1)) == plain
    paged = replace(plain, seqlen_k=20, page_size=4)
    assert cache(k_cache=PAGES, block_table=TABLE) == paged
    assert cache(k_cache=PAGES, block_table=TABLE[:1], cache_batch_idx=USED) == paged
    assert cache(cache_leftpad=USED) == replace(plain, left_padded=True)
    assert cache(k_cache=KC[:1], cache_batch_idx=USED) == plain
    assert cache(cache_seqlens=46, **APPEND) == plain
    nothing = dict(q=x(2, 0, 6, 32), k=NEW[:, :0], v=NEW[:, :0], rotary_cos=COS, rotary_sin=COS)
    assert cache(cache_seqlens=50, **nothing).seqlen_q == 0  # no token, no row of the rotary tables
    assert cache(s_aux=x(6)) == replace(plain, sinks=True)
    made = cache(causal=True, softcap=3.0, alibi_slopes=x(2, 6), softmax_scale=0.5)
    assert (made.window_right, made.softcap, made.alibi, made.softmax_scale) == (0, 3.0, True, 0.5)


def test_a_step_of_decoding_is_served_from_memory() -> None:
    made = {id(cache(cache_seqlens=length, **APPEND)) for length in (0, 1, 30, np.int64(7))}
    assert len(made) == 1


def test_windows_of_a_cache() -> None:
    """One that hides nothing is none, unless it tells where the queries are rotated."""
    for window_size in ((49, -1), (-1, 3), (1000, 1000)):
        made = cache(window_size=window_size)
        assert made.window_left is made.window_right is None
        made = cache(window_size=window_size, **ROTARY)
        assert (made.window_left, made.window_right) != (None, None)
    made = cache(QC[:, :1], causal=True, **ROTARY)  # one query: the same place either way
    assert made.window_right is None


CACHE_ERRORS = [
    (dict(s_aux=x(3)), ValueError, r"s_aux must have shape \(heads,\) = \(6,\), not \(3,\)"),
    (dict(s_aux=x(6).requires_grad_()), ValueError, "has no gradient, but s_aux requires one"),
    (dict(k_cache=None), TypeError, "k_cache must be a torch.Tensor"),
    (dict(q=QP), ValueError, r"q must have 4 dimensions \(batch, seqlen_q, heads, head_dim\)"),
    (dict(k_cache=KP), ValueError, r"k_cache must have 4 dimensions \(batch_cache, capacity"),
    (dict(v_cache=x(3, 49, 3, 32)), ValueError, "k_cache and v_cache must have one shape"),
    (dict(k_cache=KC.half()), ValueError, "q, k_cache and v_cache must have one dtype"),
    (dict(k_cache=x(3, 50, 3, 64)), ValueError, "q, k_cache and v_cache must have one head_dim"),
    (dict(k_cache=x(3, 50, 4, 32)), ValueError, r"heads of q \(6\) .* heads of k_cache \(4\)"),
    (dict(k_cache=KC[:1]), ValueError, "k_cache must have at least 2 rows for 2 sequences, not 1"),
    (dict(k_cache=PAGES, block_table=TABLE[:1]), ValueError, "block_table must have at least 2 rows"),
    (dict(k_cache=PAGES, block_table=TABLE[0]), ValueError, "block_table must have 2 dimensions"),
    (dict(k_cache=PAGES[:, :0], block_table=TABLE), ValueError, "k_cache must have at least one page"),
    (dict(k=[1.0], v=NEW), TypeError, "k must be a torch.Tensor, not list"),
    (dict(k=NEW), ValueError, "k and v must be given together"),
    (dict(v=NEW), ValueError, "k and v must be given together"),
    (dict(k=NEW, v=NEW[:, :3]), ValueError, "k and v must have one shape"),
    (dict(k=NEW[:1], v=NEW[:1]), ValueError, r"k must have shape .* = \(2, \*, 3, 32\), not \(1, 4, 3, 32\)"),
    (dict(k=NEW.half(), v=NEW), ValueError, "k must be torch.float32 on cpu, as q is, not torch.float16"),
    (dict(cache_seqlens=None, **APPEND), ValueError, "cache_seqlens must be given with k and v"),
    (dict(cache_seqlens=USED.long()), TypeError, "cache_seqlens must be torch.int32"),
    (dict(cache_seqlens=x(3, dtype=torch.int32)), ValueError, r"cache_seqlens .* = \(2\), not \(3,\)"),
    (dict(cache_seqlens=2.0), TypeError, "cache_seqlens must be a torch.Tensor, not float"),
    (dict(cache_seqlens=51), ValueError, "cache_seqlens must be in 0 to 50, not 51"),
    (dict(cache_seqlens=-1), ValueError, "cache_seqlens must be in 0 to 50, not -1"),
    (dict(cache_seqlens=47, **APPEND), ValueError, r"cache_seqlens \+ 4 new keys must be in 0 to 50, not 47"),
    (dict(cache_batch_idx=x(3, dtype=torch.int32)), ValueError, "cache_batch_idx must have shape"),
    (dict(cache_leftpad=x(2)), TypeError, "cache_leftpad must be torch.int32"),
    (dict(rotary_cos=COS, rotary_sin=COS), ValueError, "rotary_cos and rotary_sin need k and v"),
    (dict(rotary_cos=COS, **APPEND), ValueError, "rotary_cos and rotary_sin must be given together"),
    (ROTARY | dict(rotary_sin=COS[:49]), ValueError, "rotary_cos and rotary_sin must have one shape"),
    (ROTARY | dict(rotary_cos=COS.half()), ValueError, "rotary_cos must be torch.float32"),
    (ROTARY | dict(rotary_cos=COS[0]), ValueError, "rotary_cos must have 2 dimensions"),
    (ROTARY | dict(rotary_cos=COS[:, :4], rotary_sin=COS[:, :4]), ValueError, "multiple of 16 .*, not 8"),
    (ROTARY | dict(rotary_cos=COS[:, :0], rotary_sin=COS[:, :0]), ValueError, "multiple of 16 .*, not 0"),
    (ROTARY | dict(rotary_cos=COS[:0], rotary_sin=COS[:0]), ValueError, "at least one row"),
    (ROTARY | dict(rotary_cos=x(50, 24), rotary_sin=x(50, 24)), ValueError, "at most head_dim, 32, not 48"),
    (ROTARY | dict(rotary_cos=COS[:9], rotary_sin=COS[:9], cache_seqlens=6), ValueError, "at least 10 rows"),
    (dict(rotary_interleaved=2), ValueError, "rotary_interleaved must be a bool"),
    (dict(num_splits=-1), ValueError, r"num_splits must be in 0 \(automatic\) to 128, not -1"),
    (dict(num_splits=129), ValueError, "num_splits must be in 0"),
    (dict(num_splits=1.0), TypeError, "num_splits must be an int, not float"),
    (dict(q=x(2, 4, 6, 32).requires_grad_()), ValueError, "flash_attn_with_kvcache .*, but q requires one"),
    (dict(v_cache=LEAF_CACHE), ValueError, "flash_attn_with_kvcache .*, but v_cache requires one"),
    (ROTARY | dict(rotary_cos=LEAF_COS), ValueError, "but rotary_cos requires one"),
    (ROTARY | dict(rotary_sin=LEAF_COS), ValueError, "but rotary_sin requires one"),
    (dict(window_size=(1,)), ValueError, "window_size must have two"),
    (dict(softcap=None), TypeError, "softcap must be a number"),
]  # fmt: skip


@pytest.mark.parametrize("arguments, error, message", CACHE_ERRORS, ids=[case[2] for case in CACHE_ERRORS])
def test_cache_errors(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message) as raised:
        cache(**arguments)
    assert raised.value.__context__ is None
