"""The error rule by which every backend is judged, forward and gradients.

A result may be wrong by twice as much as the formula itself is when it is computed in the dtype of
the inputs, plus a rounding or two, in its largest error and in its mean error:

    max|out - ref|  <= 2 max|low - ref|  + atol
    mean|out - ref| <= 2 mean|low - ref| + atol / 10

ref is reference.attention in float32 (float64 for float32 and float64 inputs), low the same in the
dtype of the inputs.
"""

from typing import Any

import torch
from torch import Tensor

from mini_flash_attention.reference import attention

# Allowed beside low's error where backends compute in the dtype of the inputs, not in a wider one.
# float32's low may be exact by luck, float64's always is: it is ref itself.
ROUNDINGS = {torch.float32: 16, torch.float64: 4096}


def check_forward(out: Tensor, lse: Tensor, q: Tensor, k: Tensor, v: Tensor, **options: Any) -> None:
    """Assert that out and lse are right; `options` are those of reference.attention."""
    with torch.no_grad():
        ref_out, ref_lse = attention(q, k, v, dtype=_wide(q.dtype), **options)
        low_out, _ = attention(q, k, v, **options)
    assert out.shape == q.shape and out.dtype == q.dtype, (out.shape, out.dtype)
    assert_by_rule("out", out, ref_out, low_out)
    assert_lse(lse, ref_lse)


def check_gradients(
    gradients: tuple[Tensor, ...],
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    **options: Any,
) -> None:
    """Assert that (dq, dk, dv), perhaps ds_aux, are right; `options` are those of reference.attention."""
    ref = _reference_gradients(_wide(q.dtype), dout, dlse, q, k, v, **options)
    low = _reference_gradients(q.dtype, dout, dlse, q, k, v, **options)
    given = q, k, v, options.get("s_aux")
    for name, x, got in zip(("dq", "dk", "dv", "ds_aux"), given, gradients, strict=False):
        assert got.shape == x.shape and got.dtype == x.dtype, (name, got.shape, got.dtype)
    for name, got, r, lo in zip(("dq", "dk", "dv"), gradients, ref, low, strict=False):
        assert_by_rule(name, got, r, lo)
    if len(gradients) == 4:
        _assert_ds_aux(gradients[3], ref[3], dout, dlse, q, k, v, **options)


def reference_options(options: dict[str, Any], b: int | None = None) -> dict[str, Any]:
    """What reference.attention takes, of the public functions' options; b: for one sequence of a batch."""
    left, right = options.get("window_size", (-1, -1))
    right = 0 if options.get("causal") else right
    limits = {"window_left": left, "window_right": right}
    rest = {name: options[name] for name in ("softmax_scale", "softcap", "s_aux") if name in options}
    slopes = options.get("alibi_slopes")
    if slopes is not None:
        rest["alibi_slopes"] = slopes if b is None or slopes.ndim == 1 else slopes[b]
    return {name: limit for name, limit in limits.items() if limit >= 0} | rest


def assert_by_rule(name: str, out: Tensor, ref: Tensor, low: Tensor) -> None:
    """Assert the rule; where ref, rounded to out's dtype, is not finite, out must be the same."""
    rounded = ref.to(out.dtype)
    finite = rounded.isfinite()
    _assert_equal_where(~finite, name, out, rounded)
    if not finite.any():
        return
    ref, low, out = (x[finite].to(ref.dtype) for x in (ref, low, out))
    error, low_error = (out - ref).abs(), (low - ref).abs()
    low_error = low_error[low_error.isfinite()]  # low may overflow where out must not
    if low_error.numel() == 0:
        low_error = torch.zeros(1, dtype=ref.dtype)
    atol = _atol(rounded[finite])
    largest, largest_allowed = error.max().item(), 2 * low_error.max().item() + atol
    mean, mean_allowed = error.mean().item(), 2 * low_error.mean().item() + atol / 10
    assert largest <= largest_allowed and mean <= mean_allowed, (
        f"{name}: largest error {largest:.3g} (allowed {largest_allowed:.3g}), "
        f"mean error {mean:.3g} (allowed {mean_allowed:.3g})"
    )


def assert_lse(lse: Tensor, ref: Tensor) -> None:
    """Assert that lse is right to the precision of float32, which it has for 16-bit inputs too."""
    expected = torch.float64 if lse.dtype == torch.float64 else torch.float32
    assert lse.shape == ref.shape and lse.dtype == expected, (lse.shape, lse.dtype)
    finite = ref.isfinite()
    _assert_equal_where(~finite, "lse", lse, ref.to(lse.dtype))
    if not finite.any():
        return
    error = (lse - ref)[finite].abs().max().item()
    rtol = 1e-12 if lse.dtype == torch.float64 else 1e-5
    allowed = rtol * max(1, ref[finite].abs().max().item())
    assert error <= allowed, f"lse: largest error {error:.3g} (allowed {allowed:.3g})"


def _assert_ds_aux(
    ds_aux: Tensor, ref: Tensor, dout: Tensor, dlse: Tensor | None, q: Tensor, *others: Tensor, **options: Any
) -> None:
    """Assert that it is right to some roundings of the products that it is a sum of, and of the LSE.

    It has too few elements for the rule, in which the luck of one would decide.
    """
    with torch.no_grad():
        out, lse = attention(q, *others, dtype=ref.dtype, **options)
    P = (options["s_aux"].to(lse.dtype)[:, None] - lse.masked_fill(lse == -torch.inf, torch.inf)).exp()
    products = P.unsqueeze(-1) * (dout * out).transpose(1, 2)
    size = products.square().sum((0, 2, 3)).sqrt() + ref.abs()
    if dlse is not None:
        size += (P * dlse).masked_fill(lse == -torch.inf, 0).square().sum((0, 2)).sqrt()
    size = size * max(1, lse[lse.isfinite()].abs().max().item() if lse.isfinite().any() else 1)
    eps = ROUNDINGS.get(q.dtype, 4) * torch.finfo(q.dtype).eps
    error, allowed = (ds_aux - ref).abs(), eps * size + torch.finfo(ds_aux.dtype).eps * ref.abs()
    assert (error <= allowed).all(), f"ds_aux: errors {error.tolist()} (allowed {allowed.tolist()})"


def _reference_gradients(
    dtype: torch.dtype,
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    **options: Any,
) -> tuple[Tensor, ...]:
    """dq, dk, dv, and ds_aux if s_aux is among the options."""
    s_aux = options.pop("s_aux", None)
    given = (q, k, v) if s_aux is None else (q, k, v, s_aux)
    inputs = [x.detach().to(dtype).requires_grad_() for x in given]
    with torch.enable_grad():
        out, lse = attention(*inputs[:3], s_aux=None if s_aux is None else inputs[3], **options)
    dlse = torch.zeros_like(lse) if dlse is None else dlse.to(dtype)
    return torch.autograd.grad((out, lse), inputs, (dout.to(dtype), dlse))


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype in (torch.float32, torch.float64) else torch.float32


def _atol(rounded: Tensor) -> float:
    """For 16-bit values, twice what adding and subtracting 0.3 does to them."""
    if roundings := ROUNDINGS.get(rounded.dtype):
        return roundings * torch.finfo(rounded.dtype).eps * max(1, rounded.abs().max().item())
    return 2 * ((rounded + 0.3 - 0.3) - rounded).abs().max().item()


def _assert_equal_where(where: Tensor, name: str, out: Tensor, expected: Tensor) -> None:
    same = (out == expected) | (out.isnan() & expected.isnan())
    wrong = (where & ~same).nonzero()
    if len(wrong):
        place = tuple(wrong[0].tolist())
        raise AssertionError(
            f"{name}: {len(wrong)} values should be inf or NaN like the reference's, "
            f"first at {place}: {out[place].item()} instead of {expected[place].item()}"
        )
