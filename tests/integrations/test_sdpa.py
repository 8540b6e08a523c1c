"""PyTorch's attention by our kernels, on the CPU: they serve its dispatch key instead of CUDA's.

What only a GPU can show: tests/integrations/gpu.py.
"""

import inspect

import pytest
import torch
import torch.nn.functional as F
from torch.nn import attention
from torch.nn.attention.varlen import AuxRequest, varlen_attn

import mini_flash_attention as mini
from mini_flash_attention import backend
from mini_flash_attention.integrations import sdpa

if not hasattr(attention, "restore_flash_attention_impl"):
    with pytest.raises(ImportError, match=r"needs PyTorch 2.11, not 2.10"):
        sdpa.activate()
    pytest.skip("PyTorch 2.10 cannot restore its own kernels", allow_module_level=True)

aten = torch.ops.aten
NEW = "seqused_k" in inspect.signature(varlen_attn).parameters  # torch 2.12


@pytest.fixture(autouse=True)
def hook():
    attention.register_flash_attention_impl("MINI_CPU", register_fn=lambda: sdpa.Hook("CPU"))
    attention.activate_flash_attention_impl("MINI_CPU")
    torch.manual_seed(0)
    yield attention._registry._FLASH_ATTENTION_ACTIVE[1].calls
    attention.restore_flash_attention_impl()


def bhsd(*sizes, grad=True):
    return [torch.randn(2, heads, seqlen, 16, requires_grad=grad) for heads, seqlen in sizes]


def gradients(out, tensors):
    return torch.autograd.grad(out, tensors, torch.ones_like(out))


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("heads_k", [4, 2])
def test_sdpa(hook, compiled, causal, heads_k) -> None:
    tensors = bhsd((4, 37), (heads_k, 37), (heads_k, 37))

    def function(q, k, v):
        return aten._scaled_dot_product_flash_attention(q, k, v, 0.0, causal, scale=0.3)[0] * 2

    out = (torch.compile(function, fullgraph=True) if compiled else function)(*tensors)
    wanted = 2 * F.scaled_dot_product_attention(*tensors, is_causal=causal, scale=0.3, enable_gqa=True)
    torch.testing.assert_close(out, wanted)
    for x, y in zip(gradients(out, tensors), gradients(wanted, tensors), strict=True):
        torch.testing.assert_close(x, y)
    assert (
        hook["_scaled_dot_product_flash_attention"]
        == hook["_scaled_dot_product_flash_attention_backward"]
        == 1
    )


def packed(grad=True):
    starts = torch.tensor([0, 5, 5, 22], dtype=torch.int32)
    return [torch.randn(22, 4, 16, requires_grad=grad) for _ in range(3)], starts


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("window", [(-1, -1), (-1, 0), (4, 0), (3, 2)])
def test_varlen(hook, compiled, window) -> None:
    tensors, starts = packed()
    options = dict(window_size=window, return_aux=AuxRequest(True))
    function = lambda *t: varlen_attn(*t, starts, starts, 17, 17, **options)  # noqa: E731
    out, lse = (torch.compile(function, fullgraph=True) if compiled else function)(*tensors)
    lengths = (starts, starts, 17, 17)
    wanted, wanted_lse, _ = mini.flash_attn_varlen_func(
        *tensors, *lengths, window_size=window, return_attn_probs=True
    )
    torch.testing.assert_close(out, wanted)
    torch.testing.assert_close(lse, wanted_lse)
    for x, y in zip(gradients(out, tensors), gradients(wanted, tensors), strict=True):
        torch.testing.assert_close(x, y)
    assert hook["_flash_attention_forward"] == hook["_flash_attention_backward"] == 1


@pytest.mark.skipif(not NEW, reason="torch 2.12")
def test_varlen_pages_and_out(hook) -> None:
    (q, _, _), starts = packed(grad=False)
    pages = [torch.randn(9, 4, 2, 16) for _ in range(2)]
    table, used = torch.randperm(9).int().view(3, 3), torch.tensor([8, 3, 12], dtype=torch.int32)
    paged = dict(seqused_k=used, block_table=table)
    options = dict(window_size=(-1, 0), enable_gqa=True, **paged)
    out = varlen_attn(q, *pages, starts, None, 17, 12, **options)
    wanted = mini.flash_attn_varlen_func(q, *pages, starts, None, 17, 12, causal=True, **paged)
    torch.testing.assert_close(out, wanted)
    result = attention.varlen.varlen_attn_out(torch.empty_like(q), q, *pages, starts, None, 17, 12, **options)
    torch.testing.assert_close(result, wanted)
    assert hook["_flash_attention_forward_no_dropout_inplace"] == 1


@pytest.mark.skipif(not NEW, reason="torch 2.12")
@pytest.mark.parametrize("compiled", [False, True])
def test_num_splits_reaches_the_kernels(hook, compiled, monkeypatch) -> None:
    """PyTorch's word for batch invariance."""
    tensors, starts = packed()
    problems, forward = [], backend.forward
    monkeypatch.setattr(backend, "forward", lambda *x: problems.append(x[0]) or forward(*x))
    function = lambda *t: varlen_attn(*t, starts, starts, 17, 17, num_splits=1)  # noqa: E731
    out = (torch.compile(function, fullgraph=True) if compiled else function)(*tensors)
    assert {x.num_splits for x in problems} == {1} and hook["_flash_attention_forward"] == 1
    gradients(out, tensors)


def test_no_gradient_of_alibi(hook) -> None:
    """PyTorch's operator does not hand them to its backward, whose gradient would be of other scores."""
    tensors, starts = packed()
    arguments = *tensors, starts, starts, 17, 17, 0.0, False, False
    with pytest.raises(ValueError, match="alibi_slopes"):
        aten._flash_attention_forward(*arguments, alibi_slopes=torch.rand(4))
    with torch.no_grad():
        out = aten._flash_attention_forward(*arguments, alibi_slopes=(slopes := torch.rand(4)))[0]
    wanted = mini.flash_attn_varlen_func(*tensors, starts, starts, 17, 17, alibi_slopes=slopes)
    torch.testing.assert_close(out, wanted)


def test_causal_lower_right(hook) -> None:
    """The bias that PyTorch has for FlashAttention's alignment is what the operator means by causal."""
    q, k, v = bhsd((4, 3), (4, 9), (4, 9))
    out = aten._scaled_dot_product_flash_attention(q, k, v, 0.0, True)[0]
    mask = torch.ones(3, 9, dtype=torch.bool).tril(6)
    torch.testing.assert_close(out, F.scaled_dot_product_attention(q, k, v, mask))


def test_dropout(hook) -> None:
    """The backward pass drops what the forward pass did, and each call draws anew."""
    q, k, v = bhsd((4, 37), (4, 37), (4, 37))
    function = lambda v: aten._scaled_dot_product_flash_attention(q, k, v, 0.5, False)[0]  # noqa: E731
    torch.manual_seed(3)
    out = function(v)
    (dv,) = torch.autograd.grad(out.square().sum() / 2, v)
    torch.testing.assert_close((dv * v).sum(), out.square().sum())  # linear in v, with one mask
    assert not function(v).equal(out)
    torch.manual_seed(3)
    assert function(v).equal(out)
    assert hook["_scaled_dot_product_flash_attention_backward"] == 1
    with pytest.raises(ValueError, match="debug_mask"):
        aten._scaled_dot_product_flash_attention(q, k, v, 0.5, False, True)


def test_activate_and_restore() -> None:
    """cuDNN is switched off: else plain calls come to no flash kernel on a Hopper GPU."""
    attention.restore_flash_attention_impl()
    assert torch.backends.cuda.cudnn_sdp_enabled()
    active = sdpa.activate()
    assert attention.current_flash_attention_impl() == "MINI" and not active.calls
    assert not torch.backends.cuda.cudnn_sdp_enabled()
    sdpa.restore()
    assert torch.backends.cuda.cudnn_sdp_enabled() and attention.current_flash_attention_impl() is None


def test_without_a_way_back_it_does_not_begin(hook, monkeypatch) -> None:
    """PyTorch 2.10 can be given other kernels, but not its own again."""
    monkeypatch.delattr(attention, "restore_flash_attention_impl")
    with pytest.raises(ImportError, match="needs PyTorch 2.11"):
        sdpa.activate()
    monkeypatch.undo()


def test_restored_kernels() -> None:
    tensors = bhsd((4, 8), (4, 8), (4, 8), grad=False)
    aten._scaled_dot_product_flash_attention(*tensors)
    attention.restore_flash_attention_impl()
    with pytest.raises(NotImplementedError):  # the CPU has none of its own
        aten._scaled_dot_product_flash_attention(*tensors)
    attention.activate_flash_attention_impl("MINI_CPU")
    aten._scaled_dot_product_flash_attention(*tensors)


def test_what_we_cannot_serve_says_so() -> None:
    """Where PyTorch has a kernel, that runs instead: tests/integrations/gpu.py."""
    with pytest.raises(NotImplementedError):
        aten._scaled_dot_product_flash_attention(*bhsd((4, 8), (4, 8), (4, 8)), 0.0, False, True)
