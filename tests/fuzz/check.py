"""Judges a call: by the formula in float64 if it is a valid one, by its refusal if it is not."""

import re
import warnings
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

import mini_flash_attention
from tests.error_rule import ROUNDINGS, assert_by_rule
from tests.fuzz.formula import Expected, Rough, append, evaluate, exact, rough, sequences
from tests.fuzz.poison import poisoned

ATTENDED = ("q", "k", "v", "qkv", "kv", "k_cache", "v_cache", "s_aux")
WRITTEN = ("k_cache", "v_cache", "out")
TRIES = 3  # of what rounding may do: one try may be exact by luck

Arguments = dict[str, Any]


class Results(NamedTuple):
    out: Tensor
    lse: Tensor | None = None
    S_dmask: Tensor | None = None


def check(
    function: str, arguments: Arguments, dout: Tensor | None = None, dlse: Tensor | None = None
) -> None:
    """Assert that the call is right: what it returns, what it writes, its gradients for dout and dlse."""
    before = copied(arguments)
    if function in PADDING:
        PADDING[function](called(function, arguments), arguments)
        assert_unchanged(arguments, before)
        return
    got = results(function, arguments)
    if arguments.get("dropout_p") and got.S_dmask is None:
        raise LookupError("which probabilities were dropped? return_attn_probs tells")
    after = append(before) if function == "flash_attn_with_kvcache" else before
    assert_unchanged(arguments, after | {"q": before.get("q")})  # q itself is not rotated

    wide = widened(after, arguments)
    lengths = [(len(one.q), len(one.k)) for one in sequences(function, wide)]
    kept = None if got.S_dmask is None else kept_in(got.S_dmask, arguments["dropout_p"], lengths)
    expected, *tries = (
        evaluate(function, wide, kept, rounded) for rounded in (exact, *[rounding(got.out)] * TRIES)
    )
    assert "out" not in arguments or got.out is arguments["out"], "out is not what is returned"
    assert_right("out", got.out, expected.out, [one.out for one in tries])
    if got.lse is not None:
        assert got.lse.dtype == compute_dtype(got.out), got.lse.dtype
        assert_right("lse", got.lse, expected.lse, [one.lse for one in tries])
    if got.S_dmask is not None:
        expected_P, *tries_P = (as_S_dmask(one.probabilities, got.S_dmask) for one in (expected, *tries))
        assert_right("S_dmask", got.S_dmask.abs(), expected_P, tries_P)
    if dout is not None:
        check_gradients(arguments, wide, got, expected, tries, [x for x in (dout, dlse) if x is not None])
    if arguments.get("deterministic") and not arguments.get("dropout_p"):
        again = results(function, arguments).out
        assert same(again, got.out), "out differs when the call is repeated"


def refuses(function: str, arguments: Arguments, names: Sequence[str]) -> None:
    """Assert that the call raises an error that tells one of the arguments, and writes nothing."""
    before = copied(arguments)
    try:
        called(function, arguments)
    except (TypeError, ValueError, NotImplementedError) as refusal:
        message = str(refusal)
        told = any(re.search(rf"\b{name}\b", message) for name in names)
        assert told, f"the error does not tell {' or '.join(names)}: {type(refusal).__name__}: {message}"
    else:
        raise AssertionError(f"{function} takes it")
    assert_unchanged(arguments, before, WRITTEN)


def called(function: str, arguments: Arguments) -> Any:
    """What the call returns, where nothing is read that nobody wrote; a warning is an error."""
    with poisoned(), warnings.catch_warnings():
        warnings.simplefilter("error")
        return getattr(mini_flash_attention, function)(**arguments)


def results(function: str, arguments: Arguments) -> Results:
    returned = called(function, arguments)
    if arguments.get("return_softmax_lse"):
        assert len(returned) == 2
        return Results(*returned)
    if arguments.get("return_attn_probs"):
        assert len(returned) == 3 and (returned[2] is None) == (not arguments.get("dropout_p"))
        return Results(*returned)
    return Results(returned)


# What goes in


def copied(arguments: Arguments) -> Arguments:
    return {name: x.detach().clone() if is_plain(x) else x for name, x in arguments.items()}


def is_plain(x: Any) -> bool:
    return isinstance(x, Tensor) and x.layout == torch.strided and x.device.type != "meta"


def widened(arguments: Arguments, given: Arguments) -> Arguments:
    """The arguments with what is attended to in float64, as leaves where those given require a gradient."""
    names = [name for name in ATTENDED if arguments.get(name) is not None]
    return arguments | {
        name: arguments[name].double().requires_grad_(given[name].requires_grad) for name in names
    }


def assert_unchanged(arguments: Arguments, expected: Arguments, names: Sequence[str] = ()) -> None:
    """The arguments of these names, all but out if none is given, are what they must be."""
    for name, x in arguments.items():
        if is_plain(x) and (name in names if names else name != "out"):
            assert same(x, expected[name]), f"{name} is not what it must be after the call"


def same(x: Tensor, y: Tensor) -> bool:
    """Equal, NaN where the other is NaN."""
    if x.dtype.itemsize == 1 and x.is_floating_point():  # float8 has no comparison
        x, y = x.float(), y.float()
    return bool(((x == y) | ((x != x) & (y != y))).all())


# What comes out


def compute_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def rounding(out: Tensor) -> Rough:
    """What the dtype of out may do to each probability, and that of the computation to each score."""
    roundings = 0.5 if out.element_size() == 2 else 8
    return rough(roundings * torch.finfo(out.dtype).eps, 4 * torch.finfo(compute_dtype(out)).eps)


def assert_right(name: str, got: Tensor, expected: Tensor, tries: list[Tensor]) -> None:
    """By the error rule, where the tries show what rounding may do."""
    assert got.shape == expected.shape, f"{name} has shape {tuple(got.shape)}, not {tuple(expected.shape)}"
    apart = torch.stack([(one - expected).abs() for one in tries]).amax(dim=0)
    assert_by_rule(name, got.detach(), expected.detach(), (expected + apart).detach())


def kept_in(S_dmask: Tensor, dropout_p: float, lengths: Sequence[tuple[int, int]]) -> Tensor:
    """Which probabilities are kept: about as many as dropout_p says."""
    longest = [max(of_all) for of_all in zip(*lengths, strict=True)]
    shape = list(S_dmask.shape[2:])
    assert not lengths or shape == longest, f"S_dmask has shape (batch, heads, {shape}), not {longest}"
    kept = ~S_dmask.signbit()
    drawn = [kept[b, :, :queries, :keys].flatten() for b, (queries, keys) in enumerate(lengths)]
    drawn = torch.cat(drawn) if drawn else kept.flatten()
    if len(drawn) >= 100:
        allowed = 6 * (dropout_p * (1 - dropout_p) / len(drawn)) ** 0.5 + 2**-15
        dropped = 1 - drawn.double().mean().item()
        assert abs(dropped - dropout_p) <= allowed, f"{dropped:.3f} are dropped, dropout_p is {dropout_p}"
    return kept


def as_S_dmask(probabilities: Sequence[Tensor], like: Tensor) -> Tensor:
    """The probabilities of each sequence, 0 beyond its lengths."""
    every = torch.zeros_like(like, dtype=torch.float64)
    for b, P in enumerate(probabilities):
        every[b, :, : P.shape[1], : P.shape[2]] = P.detach()
    return every


def check_gradients(
    arguments: Arguments,
    wide: Arguments,
    got: Results,
    expected: Expected,
    tries: list[Expected],
    douts: Sequence[Tensor],
) -> None:
    """douts: of out, and of lse if it has one."""
    names = [name for name in ATTENDED if name in arguments and arguments[name].requires_grad]

    def gradients(of: Results | Expected, given: Arguments, douts: Sequence[Tensor]) -> tuple[Tensor, ...]:
        inputs = [given[name] for name in names]
        connected = [i for i in range(len(douts)) if of[i].requires_grad]
        if not connected:  # the formula of no sequence at all
            return tuple(map(torch.zeros_like, inputs))
        outs, grads = [of[i] for i in connected], [douts[i] for i in connected]
        return torch.autograd.grad(outs, inputs, grads, retain_graph=True, materialize_grads=True)

    assert got.out.requires_grad, "out requires no gradient"
    with poisoned():
        ours = gradients(got, arguments, douts)
        again = gradients(got, arguments, douts) if arguments.get("deterministic") else ours
    assert all(map(torch.equal, ours, again)), "gradients differ when they are repeated"
    douts = [dout.double().nan_to_num(0) for dout in douts]  # NaN where no sequence is
    right, *near = (gradients(one, wide, douts) for one in (expected, *tries))
    for i, name in enumerate(names):
        assert ours[i].dtype == arguments[name].dtype, (name, ours[i].dtype)
        if name == "s_aux":
            assert_sums_right(ours[i], right[i], [one[i] for one in near], expected, got.out.dtype, douts)
        else:
            assert_right(f"gradient of {name}", ours[i], right[i], [one[i] for one in near])


def assert_sums_right(
    got: Tensor,
    right: Tensor,
    near: list[Tensor],
    expected: Expected,
    dtype: torch.dtype,
    douts: Sequence[Tensor],
) -> None:
    """The gradient of s_aux: each element to roundings of what it is a sum of, dO * O and dLSE of all rows.

    It has too few elements for the error rule, in which the luck of one would decide; and a sum of many rows
    may be much smaller than they are.
    """
    out, lse = expected.out.detach(), expected.lse.detach()
    size = (douts[0] * out.nan_to_num(0)).norm() + sum(dlse.norm() for dlse in douts[1:])
    size = size * max(1, lse[lse.isfinite()].abs().max().item() if lse.isfinite().any() else 1)
    eps = ROUNDINGS.get(dtype, 4) * torch.finfo(dtype).eps
    apart = torch.stack([(one - right).abs() for one in near]).amax(dim=0)
    allowed = 2 * apart + eps * size + 4 * torch.finfo(got.dtype).eps * right.abs()
    assert got.shape == right.shape, f"gradient of s_aux has shape {tuple(got.shape)}"
    error = (got - right).abs()
    wrong = f"gradient of s_aux: errors {error.tolist()} (allowed {allowed.tolist()})"
    assert (error <= allowed).all(), wrong


# Padding


def check_unpad(returned: tuple, arguments: Arguments) -> None:
    packed, indices, cu_seqlens, longest, used = returned
    x, unused = arguments["hidden_states"], arguments.get("unused_mask")
    valid = [[bool(n) for n in row] for row in arguments["attention_mask"].tolist()]
    others = valid if unused is None else unused.tolist()
    selected = [[bool(a or b) for a, b in zip(*two, strict=True)] for two in zip(valid, others, strict=True)]
    lengths = [sum(row) for row in selected]
    places = [b * x.shape[1] + i for b, row in enumerate(selected) for i, chosen in enumerate(row) if chosen]
    assert indices.tolist() == places and indices.dtype == torch.int64, "indices"
    assert cu_seqlens.tolist() == [sum(lengths[:b]) for b in range(len(lengths) + 1)], "cu_seqlens"
    assert longest == max(lengths, default=0), "max_seqlen_in_batch"
    assert used.tolist() == [sum(row) for row in valid], "seqused"
    assert used.dtype == cu_seqlens.dtype == torch.int32
    check_copy("hidden_states", packed, x.flatten(0, 1)[places], x)


def check_pad(padded: Tensor, arguments: Arguments) -> None:
    x, indices, batch, seqlen = (arguments[name] for name in ("hidden_states", "indices", "batch", "seqlen"))
    places = indices.nonzero().flatten() if indices.dtype == torch.bool else indices
    expected = torch.zeros(batch * seqlen, *x.shape[1:], dtype=x.dtype, device=x.device)
    expected[places.tolist()] = x
    check_copy("padded", padded, expected.view(batch, seqlen, *x.shape[1:]), x)


def check_copy(name: str, got: Tensor, expected: Tensor, x: Tensor) -> None:
    """Tokens of x in other places, and the gradient's in theirs."""
    assert torch.equal(got, expected), name
    if x.requires_grad:
        dout = torch.randn_like(expected)
        ours, theirs = (torch.autograd.grad(out, x, dout)[0] for out in (got, expected))
        assert torch.equal(ours, theirs), f"gradient of {name}"


PADDING = {"unpad_input": check_unpad, "pad_input": check_pad}
