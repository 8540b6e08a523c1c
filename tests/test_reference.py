"""The oracle against loops over single scores, and the error rule against wrong answers."""

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from error_rule import assert_by_rule, assert_lse, check_forward, check_gradients
from torch import Tensor

from mini_flash_attention.reference import attention


def inputs(*shape: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    batch, seqlen_q, seqlen_k, heads_q, heads_k, head_dim = shape
    shapes = (seqlen_q, heads_q), (seqlen_k, heads_k), (seqlen_k, heads_k)
    return [torch.randn(batch, *s, head_dim, dtype=dtype) for s in shapes]


def one_row(
    q: Tensor, k: Tensor, v: Tensor, i: int, diagonal: int, slope: float, **options: Any
) -> tuple[Tensor, float]:
    """Attention of query row i of one head, score by score; q (seqlen_q, head_dim)."""
    left, right = options.get("window_left"), options.get("window_right")
    softcap = options.get("softcap", 0.0)
    weights = {}
    for j in range(k.shape[0]):
        distance = j - (i + diagonal)
        if (left is not None and distance < -left) or (right is not None and distance > right):
            continue
        score = options.get("softmax_scale", q.shape[1] ** -0.5) * torch.dot(q[i], k[j]).item()
        if softcap:
            score = softcap * math.tanh(score / softcap)
        weights[j] = math.exp(score - slope * abs(distance))
    total = sum(weights.values())
    out = sum((w / total * v[j] for j, w in weights.items()), torch.zeros_like(q[i]))
    return out, math.log(total) if weights else -math.inf


@pytest.mark.parametrize("lengths", [(5, 5), (4, 7), (7, 4), (1, 6), (6, 1)])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"softmax_scale": -0.7},
        {"window_right": 0},
        {"window_left": 1, "window_right": 2},
        {"window_left": 0},
        {"softcap": 1.5, "window_right": 1},
        {"alibi": (4,), "softmax_scale": 0.3},
        {"alibi": (2, 4), "softcap": 0.8, "window_left": 2},
    ],
)
def test_agrees_with_single_scores(lengths: tuple[int, int], options: dict[str, Any]) -> None:
    q, k, v = inputs(2, *lengths, 4, 2, 3)
    options = dict(options)
    slopes = None
    if alibi := options.pop("alibi", None):
        slopes = torch.rand(alibi)
    out, lse = attention(q, k, v, alibi_slopes=slopes, **options)
    for b in range(2):
        for h in range(4):
            slope = 0.0 if slopes is None else slopes.expand(2, 4)[b, h].item()
            for i in range(lengths[0]):
                heads = q[b, :, h], k[b, :, h // 2], v[b, :, h // 2]
                row, row_lse = one_row(*heads, i, lengths[1] - lengths[0], slope, **options)
                torch.testing.assert_close(out[b, i, h], row)
                assert lse[b, h, i].item() == pytest.approx(row_lse)


@pytest.mark.parametrize("causal", [False, True])
def test_agrees_with_pytorch(causal: bool) -> None:
    q, k, v = inputs(2, 33, 33, 6, 2, 16)
    out, _ = attention(q, k, v, window_right=0 if causal else None)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    expected = F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=True)
    torch.testing.assert_close(out, expected.transpose(1, 2))


def test_dropout_scales_what_it_keeps() -> None:
    q, k, v = inputs(1, 3, 4, 2, 2, 5)
    keep = torch.rand(1, 2, 3, 4) < 0.5
    out, lse = attention(q, k, v, dropout_mask=keep, dropout_p=0.5)
    scores = torch.einsum("bihd,bjhd->bhij", q, k) / 5**0.5
    probabilities = torch.exp(scores - lse.unsqueeze(-1)) * keep * 2
    torch.testing.assert_close(out, torch.einsum("bhij,bjhd->bihd", probabilities, v))
    torch.testing.assert_close(lse, attention(q, k, v)[1])


@pytest.mark.parametrize("window_right", [None, 0])
def test_a_sink_is_a_key_without_a_value(window_right: int | None) -> None:
    """It is one more column of the softmax, which nobody multiplies; rows without keys have nothing else."""
    q, k, v = (x.requires_grad_() for x in inputs(2, 6, 3, 4, 2, 5))
    sinks = torch.randn(4, dtype=torch.float64, requires_grad=True)
    out, lse = attention(q, k, v, window_right=window_right, s_aux=sinks)
    plain, plain_lse = attention(q, k, v, window_right=window_right)
    weight = torch.sigmoid(plain_lse - sinks[:, None]).mT.unsqueeze(-1)  # of the keys, together
    torch.testing.assert_close(out, plain * weight)
    torch.testing.assert_close(lse, torch.logaddexp(plain_lse, sinks[:, None]))
    dout, dlse = torch.randn_like(out), torch.randn_like(lse)
    for g in torch.autograd.grad((out, lse), (q, k, v, sinks), (dout, dlse)):
        assert g.isfinite().all()
    without = attention(q, k, v, window_right=window_right, s_aux=torch.full((4,), -math.inf))
    for x, y in zip(without, (plain, plain_lse), strict=True):
        torch.testing.assert_close(x, y)


def test_rows_without_keys_have_no_gradient() -> None:
    q, k, v = (x.requires_grad_() for x in inputs(1, 6, 3, 2, 1, 4))
    out, lse = attention(q, k, v, window_right=0)  # rows 0 to 2 see nothing
    assert not out[:, :3].any() and (lse[..., :3] == -math.inf).all() and lse[..., 3:].isfinite().all()
    dout, dlse = torch.randn_like(out), torch.randn_like(lse)
    gradients = torch.autograd.grad((out, lse), (q, k, v), (dout, dlse))
    assert all(g.isfinite().all() for g in gradients) and not gradients[0][:, :3].any()
    # As if those rows were not there.
    alone = [x.detach().requires_grad_() for x in (q[:, 3:], k, v)]
    expected = torch.autograd.grad(attention(*alone, window_right=0), alone, (dout[:, 3:], dlse[..., 3:]))
    for gradient, other in zip((gradients[0][:, 3:], *gradients[1:]), expected, strict=True):
        torch.testing.assert_close(gradient, other)


@pytest.mark.parametrize("shape", [(0, 3, 4), (2, 0, 4), (2, 3, 0), (2, 0, 0)])
def test_zero_sizes(shape: tuple[int, int, int]) -> None:
    out, lse = attention(*inputs(*shape, 4, 2, 8))
    assert out.shape == (shape[0], shape[1], 4, 8) and not out.any()
    assert lse.shape == (shape[0], 4, shape[1])
    assert shape[2] > 0 or (lse == -math.inf).all()


def test_dtype_of_the_computation() -> None:
    q, k, v = inputs(1, 3, 4, 2, 2, 8, dtype=torch.bfloat16)
    assert [x.dtype for x in attention(q, k, v)] == [torch.bfloat16] * 2
    assert [x.dtype for x in attention(q, k, v, dtype=torch.float32)] == [torch.float32] * 2


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_the_rule_takes_what_is_right_and_nothing_else(dtype: torch.dtype) -> None:
    q, k, v = inputs(1, 40, 50, 2, 2, 16, dtype=dtype)
    wide = torch.float64 if dtype in (torch.float32, torch.float64) else torch.float32
    out, lse = attention(q, k, v, dtype=wide)
    right = out.to(dtype), lse.to(torch.float32 if dtype != torch.float64 else dtype)
    check_forward(*right, q, k, v)
    for wrong in ({"window_left": 48}, {"softmax_scale": 0.26}, {"window_right": 0}):
        with pytest.raises(AssertionError, match="out: largest error"):
            check_forward(*right, q, k, v, **wrong)
    with pytest.raises(AssertionError, match="lse: largest error"):
        assert_lse(right[1] * 1.0001, lse)
    one_nan = right[0].clone()
    one_nan[0, 0, 0, 0] = math.nan
    with pytest.raises(AssertionError, match="out: largest error nan"):
        check_forward(one_nan, right[1], q, k, v)


def test_the_rule_sees_many_small_errors() -> None:
    ref = torch.randn(10_000)
    low = ref.clone()
    low[0] += 1  # allows one large error, not a small one everywhere
    assert_by_rule("x", low, ref, low)
    with pytest.raises(AssertionError, match="mean error"):
        assert_by_rule("x", ref + 0.01, ref, low)


def test_the_rule_wants_the_same_infinities() -> None:
    ref = torch.tensor([1.0, -math.inf, math.nan])
    assert_by_rule("x", ref.clone(), ref, ref)
    assert_lse(ref.clone(), ref)
    for wrong in ([1.0, math.inf, math.nan], [1.0, -1e30, math.nan], [1.0, -math.inf, 0.0]):
        with pytest.raises(AssertionError, match="1 values should be inf or NaN"):
            assert_by_rule("x", torch.tensor(wrong), ref, ref)
        with pytest.raises(AssertionError, match="1 values should be inf or NaN"):
            assert_lse(torch.tensor(wrong), ref)


def test_the_rule_checks_gradients() -> None:
    q, k, v = inputs(1, 9, 11, 2, 1, 8)
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    out, lse = attention(*leaves, window_right=0)
    dout, dlse = torch.randn_like(out), torch.randn_like(lse)
    dq, dk, dv = torch.autograd.grad((out, lse), leaves, (dout, dlse))
    check_gradients((dq, dk, dv), dout, dlse, q, k, v, window_right=0)
    for name, wrong in (("dq", (dq * 1.01, dk, dv)), ("dk", (dq, dk * 1.01, dv))):
        with pytest.raises(AssertionError, match=f"{name}: largest error"):
            check_gradients(wrong, dout, dlse, q, k, v, window_right=0)
    with pytest.raises(AssertionError, match="dq: largest error"):
        check_gradients((dq, dk, dv), dout, None, q, k, v, window_right=0)
