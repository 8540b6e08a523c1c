"""What a tensor may be that an argument is: layouts, negative bits, memory that is shared, versions."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import mini_flash_attention
from mini_flash_attention import flash_attn_func, flash_attn_varlen_func, flash_attn_with_kvcache
from mini_flash_attention.gpu import compile, fast, inputs
from mini_flash_attention.kernels.calls import Backward, Forward

LENGTHS = [0, 3, 8]


def int32(values: list[int], device: torch.device | str = "cpu") -> Tensor:
    return torch.tensor(values, dtype=torch.int32, device=device)


def randn(*shape: int, device: torch.device | str = "cpu") -> Tensor:
    return torch.randn(shape, device=device).half()


def calls(device: torch.device | str = "cpu") -> dict[str, dict[str, Any]]:
    """A call of each function, each with all tensors that it takes."""
    x, packed, slopes = randn(2, 8, 2, 16, device=device), randn(8, 2, 16, device=device), torch.ones(2)
    slopes, lengths = slopes.to(device), int32(LENGTHS, device)
    starts = dict(cu_seqlens_q=lengths, cu_seqlens_k=lengths, max_seqlen_q=8, max_seqlen_k=8)
    three, more = torch.stack((x, x, x), dim=2), torch.stack((packed, packed, packed), dim=1)
    table = torch.ones(8, 8, dtype=torch.float16, device=device)
    places = dict(cache_seqlens=int32([1, 2], device), cache_batch_idx=int32([1, 0], device))
    new = dict(k=x[:, :1], v=x[:, :1], rotary_cos=table, rotary_sin=table)
    return {
        "flash_attn_func": dict(q=x, k=x, v=x, alibi_slopes=slopes),
        "flash_attn_qkvpacked_func": dict(qkv=three, alibi_slopes=slopes),
        "flash_attn_kvpacked_func": dict(q=x, kv=three[:, :, :2], alibi_slopes=slopes),
        "flash_attn_varlen_func": dict(
            q=packed, k=packed, v=packed, **starts, seqused_k=int32([2, 5], device), out=packed.clone()
        ),
        "flash_attn_varlen_qkvpacked_func": dict(qkv=more, cu_seqlens=lengths, max_seqlen=8),
        "flash_attn_varlen_kvpacked_func": dict(q=packed, kv=more[:, :2], **starts),
        "flash_attn_with_kvcache": dict(q=x, k_cache=x.clone(), v_cache=x.clone(), **new, **places),
    }


TENSORS = [
    (function, name)
    for function, arguments in calls().items()
    for name, value in arguments.items()
    if isinstance(value, Tensor)
]


@pytest.mark.filterwarnings("ignore")  # PyTorch's, of layouts that are in beta
@pytest.mark.parametrize("function, name", TENSORS, ids="-".join)
def test_what_is_no_strided_memory_is_refused(function: str, name: str, any_path: torch.device) -> None:
    kinds: dict[str, Callable[[Tensor], Tensor]] = {
        "to_dense": lambda x: x.to_sparse(),
        "its values": lambda x: torch.nested.nested_tensor(list(x)),
    }
    if any_path.type == "cpu":
        kinds["_mkldnn"] = lambda x: x.float().to_mkldnn()
    for told, make in kinds.items():
        arguments = calls(any_path)[function]
        arguments[name] = make(arguments[name])
        with pytest.raises(TypeError, match=rf"^{name} .*{told}"):
            getattr(mini_flash_attention, function)(**arguments)


@pytest.mark.filterwarnings("ignore")
def test_quantised_tensors_are_refused() -> None:
    x = torch.quantize_per_tensor(torch.zeros(2, 8, 2, 16), 0.1, 0, torch.quint8)
    with pytest.raises(TypeError, match="q, k and v must be one of .*, not torch.quint8"):
        flash_attn_func(x, x, x)


# Negative bits


def negated(x: Tensor) -> Tensor:
    """The same numbers, by a negative bit."""
    return torch._neg_view(-x)


def test_negative_bits_count(any_path: torch.device) -> None:
    q, k, v, dout = (randn(2, 20, 2, 64, device=any_path) for _ in range(4))
    slopes = torch.tensor([0.1, 0.2], device=any_path)
    dlse = torch.randn(2, 2, 20, device=any_path)
    results = []
    for f in (lambda x: x, negated):
        leaves = [f(x).detach().requires_grad_() for x in (q, k, v)]
        out, lse, _ = flash_attn_func(*leaves, alibi_slopes=f(slopes), return_attn_probs=True)
        results.append([out, lse, *torch.autograd.grad((out, lse), leaves, (f(dout), f(dlse)))])
    for expected, got in zip(*results, strict=True):
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("index", range(5))
@pytest.mark.parametrize("appends", [True, False])
def test_negative_bits_of_a_cache_count(any_path: torch.device, appends: bool, index: int) -> None:
    x = [randn(2, n, 2, 64, device=any_path) for n in (1, 20, 20, 1, 1)]
    angles = torch.rand(20, 16, device=any_path)
    cos, sin = angles.cos().half(), angles.sin().half()
    results = []
    for f in (lambda x: x, negated):
        given = [f(y.clone()) if i == index else y.clone() for i, y in enumerate(x)]
        options = dict(cache_seqlens=int32([5, 9], any_path))
        if appends:
            options |= dict(k=given[3], v=given[4], rotary_cos=f(cos), rotary_sin=f(sin))
        results.append((flash_attn_with_kvcache(*given[:3], **options), *given[1:3]))
    for expected, got in zip(*results, strict=True):
        torch.testing.assert_close(got, expected)


def test_an_out_with_a_negative_bit_is_written(any_path: torch.device) -> None:
    x, lengths = randn(8, 2, 64, device=any_path), int32(LENGTHS, any_path)
    expected = flash_attn_varlen_func(x, x, x, lengths, lengths, 8, 8)
    out = negated(torch.zeros_like(x))
    flash_attn_varlen_func(x, x, x, lengths, lengths, 8, 8, out=out)
    torch.testing.assert_close(out, expected)


def test_kernels_are_given_no_negative_bit(pretended_gpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """They look at memory alone."""
    seen: list[Any] = []
    monkeypatch.setattr(compile, "get", lambda row: lambda *fields: seen.append(fields))
    q, k, v = (negated(randn(2, 8, 2, 64)).detach().requires_grad_() for _ in range(3))
    out, lse, _ = flash_attn_func(q, k, v, alibi_slopes=negated(torch.ones(2)), return_attn_probs=True)
    grads = negated(torch.ones_like(out)), negated(torch.ones_like(lse))
    torch.autograd.grad((out, lse), (q, k, v), grads)
    call, backward = Forward(*seen[0]), Backward(*seen[1])
    tensors = [*call[:5], *call.score.captured, *backward[:7], *backward.score.captured]
    assert not any(x.is_neg() for x in tensors)
    assert torch.equal(call.mQ, q) and torch.equal(backward.mdO, torch.ones_like(out))


# Versions: what autograd has saved must not be written to unnoticed


def test_out_counts_a_version(any_path: torch.device) -> None:
    x, lengths = randn(8, 2, 64, device=any_path), int32(LENGTHS, any_path)
    for out in (torch.zeros_like(x), torch.zeros(8, 2, 65, device=any_path).half()[..., 1:]):
        saved = out.clone().requires_grad_() * 2  # keeps what is written over
        square = saved.square().sum()
        flash_attn_varlen_func(x, x, x, lengths, lengths, 8, 8, out=saved.detach())
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            square.backward()


def test_an_append_counts_a_version(any_path: torch.device) -> None:
    x, new = randn(2, 8, 2, 64, device=any_path), randn(2, 1, 2, 64, device=any_path)
    k, v = x.clone(), x.clone()
    before = k._version, v._version
    flash_attn_with_kvcache(new, k, v, new, new, cache_seqlens=int32([2, 3], any_path))
    assert k._version > before[0] and v._version > before[1]


def test_kernels_count_versions(pretended_gpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compile, "get", lambda row: lambda *fields: None)
    x, lengths = randn(8, 2, 64), int32(LENGTHS)
    out, version = torch.zeros_like(x), 0
    flash_attn_varlen_func(x, x, x, lengths, lengths, 8, 8, out=out)
    assert out._version > version
    k, v, new = randn(2, 8, 2, 64), randn(2, 8, 2, 64), randn(2, 1, 2, 64)
    before = k._version, v._version
    flash_attn_with_kvcache(new, k, v, new, new, cache_seqlens=int32([2, 3]))
    assert (k._version, v._version) == (before[0] + 1, before[1] + 1)


def test_tensors_of_inference_mode_have_none() -> None:
    with torch.inference_mode():
        inferred = torch.zeros(1)
        inputs.written(inferred)
    other = torch.zeros(1)
    inputs.written(inferred, other)
    assert other._version == 1
    assert fast.increment_version is not None


# Gradients


def test_pages_have_no_gradient_but_a_result(any_path: torch.device) -> None:
    """As in flash_attn: only the backward pass raises."""
    q = randn(8, 2, 64, device=any_path).requires_grad_()
    pages, table = randn(4, 4, 2, 64, device=any_path), torch.tensor([[0, 1], [3, 2]], device=any_path).int()
    lengths = int32(LENGTHS, any_path)
    call = lambda q: flash_attn_varlen_func(q, pages, pages, lengths, lengths, 5, 5, block_table=table)  # noqa: E731
    out = call(q)
    assert torch.equal(out, call(q.detach()))
    with pytest.raises(NotImplementedError, match="block_table"):
        out.sum().backward()
