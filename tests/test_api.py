"""The public functions: signatures, results, autograd, torch.compile, and what an import costs."""

import inspect
import math
import subprocess
import sys
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import mini_flash_attention
from mini_flash_attention import (
    flash_attn_func,
    flash_attn_kvpacked_func,
    flash_attn_qkvpacked_func,
    flash_attn_varlen_func,
    flash_attn_varlen_kvpacked_func,
    flash_attn_varlen_qkvpacked_func,
    flash_attn_with_kvcache,
    pad_input,
    reference,
    unpad_input,
)

OPTIONS = (
    "dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0, "
    "alibi_slopes=None, deterministic=False, return_attn_probs=False, *, s_aux=None"
)


def inputs(seqlen_q: int = 5, seqlen_k: int = 7, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """q, k and v with 2 query heads for each key head."""
    shapes = (2, seqlen_q, 4, 8), (2, seqlen_k, 2, 8), (2, seqlen_k, 2, 8)
    return [torch.randn(shape, dtype=dtype) for shape in shapes]


def leaves(*tensors: Tensor) -> list[Tensor]:
    return [tensor.detach().clone().requires_grad_() for tensor in tensors]


def gradients(out: Any, inputs: list[Tensor], dout: Any = None) -> tuple[Tensor, ...]:
    return torch.autograd.grad(out, inputs, torch.ones_like(out) if dout is None else dout)


def test_signatures_are_those_of_flash_attn() -> None:
    """With keywords of our own behind them."""

    def signature(function: Any) -> str:
        parameters = inspect.signature(function).parameters.values()
        shown = inspect.Signature([p.replace(annotation=p.empty) for p in parameters])
        return str(shown).removeprefix("(").removesuffix(")")

    functions = "score_mod=None, mask_mod=None"
    assert signature(flash_attn_func) == f"q, k, v, {OPTIONS}, {functions}, block_mask=None"
    assert signature(flash_attn_qkvpacked_func) == f"qkv, {OPTIONS}"
    assert signature(flash_attn_kvpacked_func) == f"q, kv, {OPTIONS}"
    lengths = "cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k"
    assert signature(flash_attn_varlen_func) == (
        f"q, k, v, {lengths}, {OPTIONS.partition(', *')[0]}, "
        f"block_table=None, *, seqused_k=None, out=None, s_aux=None, {functions}, num_splits=0"
    )
    assert signature(flash_attn_varlen_qkvpacked_func) == f"qkv, cu_seqlens, max_seqlen, {OPTIONS}"
    assert signature(flash_attn_varlen_kvpacked_func) == f"q, kv, {lengths}, {OPTIONS}"
    assert signature(flash_attn_with_kvcache) == (
        "q, k_cache, v_cache, k=None, v=None, rotary_cos=None, rotary_sin=None, cache_seqlens=None, "
        "cache_batch_idx=None, cache_leftpad=None, block_table=None, softmax_scale=None, causal=False, "
        "window_size=(-1, -1), softcap=0.0, rotary_interleaved=True, alibi_slopes=None, num_splits=0, "
        f"return_softmax_lse=False, *, s_aux=None, {functions}"
    )
    assert signature(unpad_input) == "hidden_states, attention_mask, unused_mask=None"
    assert signature(pad_input) == "hidden_states, indices, batch, seqlen"


def test_every_public_name_is_there() -> None:
    assert all(hasattr(mini_flash_attention, name) for name in mini_flash_attention.__all__)


def test_import_touches_neither_cuda_nor_the_compiler() -> None:
    code = """if True:
        import sys
        import mini_flash_attention, torch
        assert not torch.cuda.is_initialized()
        slow = {"cutlass", "tvm_ffi", "torch._dynamo", "triton"} & sys.modules.keys()
        assert not slow, slow
    """
    root = Path(mini_flash_attention.__file__).parents[1]
    subprocess.run([sys.executable, "-c", code], cwd=root, check=True)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_what_is_returned(dtype) -> None:
    q, k, v = inputs(dtype=dtype)
    out, lse, S_dmask = flash_attn_func(q, k, v, return_attn_probs=True)
    assert (out.shape, out.dtype) == (q.shape, dtype)
    assert lse.shape == (2, 4, 5)
    assert lse.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert S_dmask is None
    assert torch.equal(flash_attn_func(q, k, v), out)


def test_options_reach_the_computation() -> None:
    q, k, v = inputs()
    slopes, sinks = torch.rand(2, 4), torch.randn(4)
    out, lse, _ = flash_attn_func(
        q,
        k,
        v,
        softmax_scale=0.3,
        causal=True,
        window_size=(2, 4),
        softcap=1.5,
        alibi_slopes=slopes,
        return_attn_probs=True,
        s_aux=sinks,
    )
    expected = reference.attention(
        q,
        k,
        v,
        softmax_scale=0.3,
        window_left=2,
        window_right=0,
        softcap=1.5,
        alibi_slopes=slopes,
        s_aux=sinks,
    )
    torch.testing.assert_close((out, lse), expected)


def test_rows_without_keys() -> None:
    q, k, v = leaves(*inputs(seqlen_q=7, seqlen_k=5))
    out, lse, _ = flash_attn_func(q, k, v, causal=True, return_attn_probs=True)
    assert (out[:, :2] == 0).all() and (lse[:, :, :2] == float("-inf")).all()
    assert lse[:, :, 2:].isfinite().all()
    for gradient in gradients((out, lse), [q, k, v], (torch.ones_like(out), torch.ones_like(lse))):
        assert gradient.isfinite().all()


@pytest.mark.parametrize("batch, seqlen_q, seqlen_k", [(0, 5, 7), (2, 0, 7), (2, 5, 0)])
def test_empty_inputs(batch, seqlen_q, seqlen_k) -> None:
    q, k, v = leaves(*(x[:batch] for x in inputs(seqlen_q, seqlen_k)))
    out = flash_attn_func(q, k, v)
    assert out.shape == q.shape and (out == 0).all()
    assert all((gradient == 0).all() for gradient in gradients(out, [q, k, v]))


def wide(x: Tensor, n: int) -> Tensor:
    """n tensors, packed, whose head dim is too large."""
    return x.new_zeros(2, 5, n, 2, 300)


def packed_sequences(x: Tensor, **changes: Any) -> Any:
    lengths = dict(cu_seqlens=torch.tensor([0, 5], dtype=torch.int32), max_seqlen=5) | changes
    return flash_attn_varlen_qkvpacked_func(x.new_zeros(5, 3, 2, 8), **lengths)


def test_packed_is_the_same_computation() -> None:
    qkv, kv = (torch.randn(2, 5, n, 4, 8, requires_grad=True) for n in (3, 2))
    options = dict(causal=True, softcap=2.0, window_size=(3, 0))

    q, k, v = leaves(*qkv.unbind(2))
    out = flash_attn_func(q, k, v, **options)
    packed = flash_attn_qkvpacked_func(qkv, **options)
    assert torch.equal(packed, out)
    expected = torch.stack(gradients(out, [q, k, v]), dim=2)
    assert torch.equal(gradients(packed, [qkv])[0], expected)

    k, v = leaves(*kv.unbind(2))
    out = flash_attn_func(q, k, v, **options)
    packed = flash_attn_kvpacked_func(q, kv, **options)
    assert torch.equal(packed, out)
    dq, dk, dv = gradients(out, [q, k, v])
    packed_dq, dkv = gradients(packed, [q, kv])
    assert torch.equal(packed_dq, dq) and torch.equal(dkv, torch.stack((dk, dv), dim=2))


@pytest.mark.parametrize(
    "call, error, message",
    [
        (lambda x: flash_attn_func(x, x, x[..., :4]), ValueError, "k and v"),
        (lambda x: flash_attn_func(x, x, x, window_size=(1, 2, 3)), ValueError, "window_size"),
        (lambda x: flash_attn_qkvpacked_func(x), ValueError, r"qkv .*seqlen, 3, .*\(2, 5, 2, 8\)"),
        (lambda x: flash_attn_qkvpacked_func(x[:, :, None]), ValueError, "qkv must have shape"),
        (lambda x: flash_attn_qkvpacked_func([x, x, x]), TypeError, "qkv must be a .*, not list"),
        (lambda x: flash_attn_kvpacked_func(x, x), ValueError, "kv .*seqlen, 2, "),
        (lambda x: flash_attn_kvpacked_func(x, None), TypeError, "kv must be a .*, not NoneType"),
        (lambda x: flash_attn_qkvpacked_func(wide(x, 3)), ValueError, "head_dim of qkv must be in 1 to 256"),
        (lambda x: flash_attn_kvpacked_func(wide(x, 1)[:, :, 0], wide(x, 2)), ValueError, "of q and kv must"),
        (
            lambda x: flash_attn_kvpacked_func(x[:1], x[:, :, None].repeat(1, 1, 2, 1, 1)),
            ValueError,
            "kv has 2",
        ),
        (lambda x: packed_sequences(x, cu_seqlens=x), TypeError, "^cu_seqlens must be torch.int32"),
        (lambda x: packed_sequences(x.to("meta")), ValueError, "cu_seqlens is on cpu, but qkv is on meta"),
        (lambda x: packed_sequences(x, max_seqlen=-1), ValueError, "^max_seqlen must not be negative"),
        (lambda x: packed_sequences(x, max_seqlen=None), TypeError, "^max_seqlen must be an int"),
        (lambda x: packed_sequences(x, cu_seqlens=[0]), TypeError, "^cu_seqlens must be a torch.Tensor"),
        (lambda x: flash_attn_func(x, x, x, return_attn_probs="False"), TypeError, "return_attn_probs must"),
        (lambda x: flash_attn_func(x, x, x, return_attn_probs=math.nan), TypeError, "return_attn_probs must"),
        (lambda x: flash_attn_func(x, x, x, return_attn_probs=2), ValueError, "return_attn_probs must"),
        (
            lambda x: flash_attn_with_kvcache(x, x, x, return_softmax_lse="no"),
            TypeError,
            "return_softmax_lse must",
        ),
    ],
)
def test_errors(call, error, message) -> None:
    with pytest.raises(error, match=message):
        call(torch.zeros(2, 5, 2, 8))


def test_gradients_by_finite_differences() -> None:
    def attention(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        return flash_attn_func(q, k, v, causal=True, softcap=3.0, return_attn_probs=True)[:2]

    assert torch.autograd.gradcheck(attention, leaves(*inputs(3, 4)))


@pytest.mark.parametrize("use_out, use_lse", [(True, False), (False, True), (True, True)])
def test_gradients_flow_through_out_and_lse(use_out, use_lse) -> None:
    q, k, v = leaves(*inputs())
    dout, dlse = torch.randn_like(q), torch.randn(2, 4, 5, dtype=q.dtype)

    def chosen(out: Tensor, lse: Tensor) -> tuple[Tensor, ...]:
        outputs, douts = [out] * use_out + [lse] * use_lse, [dout] * use_out + [dlse] * use_lse
        return gradients(outputs, [q, k, v] if use_out else [q, k], douts)

    ours = chosen(*flash_attn_func(q, k, v, causal=True, return_attn_probs=True)[:2])
    torch.testing.assert_close(ours, chosen(*reference.attention(q, k, v, window_right=0)))


@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (0, 1), (0, 2), (1, 2)])
def test_any_subset_of_the_inputs_may_require_gradients(wanted) -> None:
    tensors = inputs()
    every = leaves(*tensors)
    expected = gradients(flash_attn_func(*every), every)
    for i in wanted:
        tensors[i].requires_grad_()
    flash_attn_func(*tensors).sum().backward()
    for i, tensor in enumerate(tensors):
        assert torch.equal(tensor.grad, expected[i]) if i in wanted else tensor.grad is None


def test_strides_of_inputs_and_of_the_gradient_of_out() -> None:
    q, k, v = leaves(*inputs())
    strided = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)]
    permuted = torch.randn(8, 4, 5, 2, dtype=q.dtype).permute(3, 2, 1, 0)
    expanded = torch.tensor(2.0, dtype=q.dtype).expand(q.shape)
    for dout in (permuted, expanded):
        expected = gradients(flash_attn_func(q, k, v), [q, k, v], dout.contiguous())
        ours = gradients(flash_attn_func(*strided), [q, k, v], dout)
        torch.testing.assert_close(ours, expected)


def test_backward_runs_again_with_retain_graph_only() -> None:
    q, k, v = leaves(*inputs())
    out = flash_attn_func(q, k, v, dropout_p=0.5).sum()
    first = torch.autograd.grad(out, [q, k, v], retain_graph=True)
    assert all(map(torch.equal, first, torch.autograd.grad(out, [q, k, v])))
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(out, [q, k, v])


def test_gradients_of_gradients_raise() -> None:
    q, k, v = leaves(*inputs())
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(flash_attn_func(q, k, v).sum(), [q], create_graph=True)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients_nothing_is_saved(mode) -> None:
    q, k, v = leaves(*inputs())
    expected = flash_attn_func(q, k, v)
    assert expected.requires_grad
    with mode():
        out, lse, _ = flash_attn_func(q * 1, k, v, return_attn_probs=True)
        packed = torch.stack((q, q, q), dim=2)
        flash_attn_qkvpacked_func(packed)
    assert torch.equal(out, expected)
    assert out.grad_fn is None and lse.grad_fn is None
    released = weakref.ref(packed)
    del packed
    assert released() is None


def test_dropout_repeats_with_the_seed() -> None:
    q, k, v = inputs(64, 64)

    def run(seed: int) -> tuple[Tensor, Tensor]:
        torch.manual_seed(seed)
        first = flash_attn_func(q, k, v, dropout_p=0.3)
        return first, flash_attn_func(q, k, v, dropout_p=0.3)

    (a, b), (c, d) = run(1), run(1)
    assert torch.equal(a, c) and torch.equal(b, d)
    assert not torch.equal(a, b) and not torch.equal(a, run(2)[0])


def test_probabilities_tell_what_dropout_did() -> None:
    q, k, v = leaves(*inputs(64, 80))
    out, lse, S_dmask = flash_attn_func(q, k, v, dropout_p=0.3, return_attn_probs=True)
    assert S_dmask.shape == (2, 4, 64, 80) and not S_dmask.requires_grad
    kept = ~S_dmask.signbit()
    assert kept.double().mean().item() == pytest.approx(0.7, abs=0.01)
    torch.testing.assert_close(S_dmask.abs().sum(-1), torch.ones_like(lse))

    expected = reference.attention(q, k, v, dropout_mask=kept, dropout_p=0.3)
    torch.testing.assert_close((out, lse), expected)
    dout = torch.randn_like(out)
    ours, theirs = (gradients(x, [q, k, v], dout) for x in (out, expected[0]))
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_activation_checkpointing_repeats_dropout(use_reentrant) -> None:
    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return flash_attn_func(q, k, v, dropout_p=0.5)

    q, k, v = leaves(*inputs())
    torch.manual_seed(3)
    expected = attention(q, k, v)
    torch.manual_seed(3)
    out = checkpoint(attention, q, k, v, use_reentrant=use_reentrant)
    assert torch.equal(out, expected)
    expected.sum().backward()
    plain = [x.grad.clone() for x in (q, k, v)]
    out.sum().backward()
    for x, gradient in zip((q, k, v), plain, strict=True):
        assert torch.equal(x.grad, 2 * gradient)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_changes_nothing(dtype) -> None:
    q, k, v = leaves(*inputs(dtype=dtype))
    expected = flash_attn_func(q, k, v)
    expected_gradients = gradients(expected, [q, k, v])
    with torch.autocast("cpu", torch.bfloat16):
        out = flash_attn_func(q, k, v)
        assert all(map(torch.equal, gradients(out, [q, k, v]), expected_gradients))
    assert torch.equal(out, expected)


def test_autocast_leaves_the_dropout_probabilities_alone() -> None:
    q, k, v = inputs(dtype=torch.float32)
    torch.manual_seed(1)
    expected = flash_attn_func(q, k, v, dropout_p=0.3, return_attn_probs=True)[2]
    torch.manual_seed(1)
    with torch.autocast("cpu", torch.bfloat16):
        S_dmask = flash_attn_func(q, k, v, dropout_p=0.3, return_attn_probs=True)[2]
    assert torch.equal(S_dmask, expected)


def test_torch_compile_leaves_lengths_and_caches_alone() -> None:
    def model(x: Tensor, cu_seqlens: Tensor, cache: Tensor) -> tuple[Tensor, Tensor]:
        y = flash_attn_varlen_qkvpacked_func(x * 2, cu_seqlens, 4, causal=True)
        q, k, v = x[:2].unsqueeze(1).unbind(2)
        return y + 1, flash_attn_with_kvcache(q, *cache, k, v, cache_seqlens=3) + 1

    torch._dynamo.reset()
    x, cu_seqlens = torch.randn(6, 3, 2, 8), torch.tensor([0, 4, 6], dtype=torch.int32)
    caches = [torch.zeros(2, 2, 5, 2, 8) for _ in range(2)]
    expected = model(x, cu_seqlens, caches[0])
    torch.testing.assert_close(torch.compile(model, backend="eager")(x, cu_seqlens, caches[1]), expected)
    assert caches[0].any() and torch.equal(*caches)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_torch_compile_breaks_no_graph(backend) -> None:
    def model(x: Tensor, weight: Tensor, **options: Any) -> Tensor:
        qkv = (x @ weight).unflatten(-1, (3, 2, 8))
        return flash_attn_qkvpacked_func(qkv, causal=True, **options).square()

    torch._dynamo.reset()
    compiled = torch.compile(model, backend=backend)
    for seqlen in (5, 9, 12):
        x, weight = torch.randn(2, seqlen, 16), torch.randn(16, 48)
        for window_size in ((-1, -1), (4, 0)):
            tensors, compiled_tensors = leaves(x, weight), leaves(x, weight)
            expected = model(*tensors, window_size=window_size)
            out = compiled(*compiled_tensors, window_size=window_size)
            torch.testing.assert_close(out, expected)
            torch.testing.assert_close(gradients(out, compiled_tensors), gradients(expected, tensors))
    with torch.no_grad():
        torch.testing.assert_close(compiled(x, weight), model(x, weight))
    assert torch._dynamo.explain(model)(x, weight).graph_break_count == 0
    with pytest.raises(Exception, match="softmax_scale"):  # wrapped by an error of torch.compile
        compiled(x, weight, softmax_scale=float("nan"))
