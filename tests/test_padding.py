"""pad_input and unpad_input."""

import re
from typing import Any

import pytest
import torch
from torch import Tensor

from mini_flash_attention import flash_attn_func, flash_attn_varlen_func, pad_input, unpad_input


@pytest.fixture(params=["cpu", "cuda"])
def device(request: pytest.FixtureRequest) -> torch.device:
    return request.getfixturevalue("gpu") if request.param == "cuda" else torch.device("cpu")


def mask_of(lengths: list[int], seqlen: int, device: torch.device) -> Tensor:
    return torch.arange(seqlen, device=device) < torch.tensor(lengths, device=device).unsqueeze(1)


@pytest.mark.parametrize(
    "dtype",
    [torch.bool, torch.uint8, torch.int16, torch.int32, torch.int64]
    + [torch.uint32, torch.float32, torch.bfloat16, torch.float8_e4m3fn, torch.complex64],
    ids=str,
)
def test_there_and_back(device: torch.device, dtype: torch.dtype) -> None:
    lengths = [3, 0, 7, 5]
    x, mask = torch.randn(4, 7, 2, 3, device=device), mask_of(lengths, 7, device)
    packed, indices, cu_seqlens, longest, used = unpad_input(x, mask.to(dtype))
    assert torch.equal(packed, x[mask])
    assert torch.equal(x.flatten(0, 1)[indices], packed) and indices.dtype == torch.int64
    assert cu_seqlens.tolist() == [0, 3, 3, 10, 15] and cu_seqlens.dtype == torch.int32
    assert type(longest) is int and longest == 7
    assert used.tolist() == lengths and used.dtype == torch.int32
    assert torch.equal(pad_input(packed, indices, 4, 7), x * mask[..., None, None])


def test_padding_on_the_left_and_in_between(device: torch.device) -> None:
    x = torch.randn(3, 5, device=device)
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 0, 1, 0, 1], [1, 1, 1, 1, 1]], device=device)
    packed, indices, cu_seqlens, *_ = unpad_input(x, mask)
    assert torch.equal(packed, x[mask.bool()]) and cu_seqlens.tolist() == [0, 3, 6, 11]
    assert torch.equal(pad_input(packed, indices, 3, 5), x * mask)


def test_places_that_are_not_used(device: torch.device) -> None:
    x, valid = torch.randn(3, 6, 4, device=device), mask_of([2, 0, 6], 6, device)
    unused = mask_of([5, 3, 6], 6, device) & ~valid
    packed, indices, cu_seqlens, longest, used = unpad_input(x, valid, unused)
    assert torch.equal(packed, x[valid | unused])
    assert cu_seqlens.tolist() == [0, 5, 8, 14] and longest == 6 and used.tolist() == [2, 0, 6]
    assert torch.equal(pad_input(packed, indices, 3, 6), x * (valid | unused)[..., None])


@pytest.mark.parametrize("shape", [(0, 5, 2), (3, 0, 2), (2, 4, 0), (2, 4, 2)], ids=str)
def test_nothing_selected(device: torch.device, shape: tuple[int, ...]) -> None:
    x = torch.randn(shape, device=device)
    packed, indices, cu_seqlens, longest, used = unpad_input(x, torch.zeros(shape[:2], device=device).bool())
    assert packed.shape == (0, shape[2]) and longest == 0
    assert cu_seqlens.tolist() == [0] * (shape[0] + 1) and used.tolist() == [0] * shape[0]
    assert torch.equal(pad_input(packed, indices, *shape[:2]), torch.zeros_like(x))


def test_gradients() -> None:
    x, mask = torch.randn(3, 4, 2, dtype=torch.float64, requires_grad=True), mask_of([2, 0, 4], 4, "cpu")

    def there_and_back(x: Tensor) -> Tensor:
        packed, indices, *_ = unpad_input(x, mask)
        return pad_input(packed.sin(), indices, 3, 4)

    assert torch.autograd.gradcheck(there_and_back, x)


def test_the_attention_of_a_padded_batch() -> None:
    lengths = [5, 1, 8]
    q, k, v = (torch.randn(3, 8, 2, 16, requires_grad=True) for _ in range(3))
    mask = mask_of(lengths, 8, "cpu")
    (q_packed, indices, cu_seqlens, longest, _), (k_packed, *_), (v_packed, *_) = (
        unpad_input(x, mask) for x in (q, k, v)
    )
    packed = flash_attn_varlen_func(
        q_packed, k_packed, v_packed, cu_seqlens, cu_seqlens, longest, longest, causal=True
    )
    out = pad_input(packed, indices, 3, 8)
    alone = [
        flash_attn_func(*(x[b : b + 1, :n] for x in (q, k, v)), causal=True)[0] for b, n in enumerate(lengths)
    ]
    expected = torch.nn.utils.rnn.pad_sequence(alone, batch_first=True)
    torch.testing.assert_close(out, expected)
    dout = torch.randn_like(out)
    ours, theirs = (torch.autograd.grad(x, (q, k, v), dout) for x in (out, expected))
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64, torch.bool], ids=str)
@pytest.mark.parametrize("on_cpu", [False, True])
def test_indices_as_flash_attn_takes_them(device: torch.device, dtype: torch.dtype, on_cpu: bool) -> None:
    """Transformers passes int32 at each step of a padded batch."""
    x = torch.randn(4, 3, device=device, dtype=torch.float64, requires_grad=True)
    places = torch.tensor([7, 0, 3, -1] if dtype != torch.bool else [0, 3, 7, 9], device=device)
    indices = places.to(dtype)
    if dtype == torch.bool:
        indices = torch.zeros(10, dtype=torch.bool, device=device).index_fill(0, places, True)
    indices = indices.cpu() if on_cpu else indices
    expected = torch.zeros(10, 3, device=device, dtype=torch.float64)
    expected[places] = x.detach()
    padded = pad_input(x, indices, 2, 5)
    assert torch.equal(padded, expected.view(2, 5, 3))
    dout = torch.randn_like(padded)
    assert torch.equal(torch.autograd.grad(padded, x, dout)[0], dout.view(10, 3)[places])


def test_padding_of_dynamic_shapes_is_one_graph() -> None:
    torch._dynamo.reset()
    compiled = torch.compile(pad_input, backend="eager", fullgraph=True, dynamic=True)
    for batch, tokens in ((2, 3), (4, 5)):
        arguments = torch.randn(tokens, 3), torch.randperm(3 * batch)[:tokens], batch, 3
        assert torch.equal(compiled(*arguments), pad_input(*arguments))


X, MASK = torch.randn(2, 5, 3), torch.ones(2, 5)
PACKED, INDICES = torch.randn(4, 3), torch.arange(4)


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        ((None, MASK), TypeError, "hidden_states must be a torch.Tensor, not NoneType"),
        ((X.tolist(), MASK), TypeError, "hidden_states must be a torch.Tensor, not list"),
        ((X.numpy(), MASK), TypeError, "hidden_states must be a torch.Tensor, not ndarray"),
        ((X[0, :, 0], MASK), ValueError, "hidden_states must have shape (batch, seqlen, ...), not (5,)"),
        (
            (X.to_sparse(), MASK),
            TypeError,
            "hidden_states has the layout torch.sparse_coo: pass it .to_dense()",
        ),
        ((X, MASK.to_sparse()), TypeError, "attention_mask has the layout torch.sparse_coo"),
        ((X, None), TypeError, "attention_mask must be a torch.Tensor, not NoneType"),
        ((X, MASK.tolist()), TypeError, "attention_mask must be a torch.Tensor, not list"),
        ((X, MASK.numpy()), TypeError, "attention_mask must be a torch.Tensor, not ndarray"),
        ((X, MASK[0]), ValueError, "attention_mask must have shape (batch, seqlen) = (2, 5), not (5,)"),
        ((X, MASK[:, 1:]), ValueError, "attention_mask must have shape (batch, seqlen) = (2, 5), not (2, 4)"),
        ((X, MASK.to("meta")), ValueError, "attention_mask is on meta, but hidden_states is on cpu"),
        ((X, MASK, 0), TypeError, "unused_mask must be a torch.Tensor, not int"),
        ((X, MASK, MASK[1:]), ValueError, "unused_mask must have shape (batch, seqlen) = (2, 5), not (1, 5)"),
    ],
)
def test_unpad_input_names_what_is_wrong(arguments: tuple, error: type, message: str) -> None:
    with pytest.raises(error, match=re.escape(message)):
        unpad_input(*arguments)


@pytest.mark.parametrize(
    "wrong, error, message",
    [
        ({"hidden_states": None}, TypeError, "hidden_states must be a torch.Tensor, not NoneType"),
        ({"hidden_states": PACKED.numpy()}, TypeError, "hidden_states must be a torch.Tensor, not ndarray"),
        ({"hidden_states": PACKED[0, 0]}, ValueError, "hidden_states must have shape (total, ...), not ()"),
        ({"hidden_states": PACKED[1:]}, ValueError, "indices must be 3, one a token of hidden_states, not 4"),
        ({"hidden_states": PACKED[:1]}, ValueError, "indices must be 1, one a token of hidden_states, not 4"),
        ({"hidden_states": PACKED.to_mkldnn()}, TypeError, "hidden_states has the layout torch._mkldnn"),
        ({"indices": INDICES.to_sparse()}, TypeError, "indices has the layout torch.sparse_coo"),
        ({"indices": None}, TypeError, "indices must be a torch.Tensor, not NoneType"),
        ({"indices": [0, 1, 2, 3]}, TypeError, "indices must be a torch.Tensor, not list"),
        ({"indices": INDICES.numpy()}, TypeError, "indices must be a torch.Tensor, not ndarray"),
        ({"indices": INDICES.float()}, TypeError, "indices must be torch.int32, torch.int64 or torch.bool"),
        ({"indices": INDICES.byte()}, TypeError, "torch.int64 or torch.bool, not torch.uint8"),
        ({"indices": INDICES[None]}, ValueError, "indices must have shape (total,), not (1, 4)"),
        ({"indices": INDICES[:3]}, ValueError, "indices must be 4, one a token of hidden_states, not 3"),
        ({"indices": INDICES > 1}, ValueError, "a mask, must have batch * seqlen = 10 elements, not 4"),
        ({"indices": torch.arange(10) > 6}, ValueError, "indices must be 4, one a token of hidden_states"),
        ({"indices": INDICES + 7}, ValueError, "indices must be in 0 to 9, batch * seqlen - 1, but index 10"),
        ({"indices": INDICES - 11}, ValueError, "indices must be in 0 to 9"),
        ({"indices": INDICES.to("meta")}, ValueError, "indices is on meta, but hidden_states is on cpu"),
        ({"batch": -2}, ValueError, "batch must not be negative, but is -2"),
        ({"batch": 2.0}, TypeError, "batch must be an int, not float"),
        ({"batch": None}, TypeError, "batch must be an int, not NoneType"),
        ({"seqlen": -5}, ValueError, "seqlen must not be negative, but is -5"),
        ({"seqlen": "5"}, TypeError, "seqlen must be an int, not str"),
        ({"batch": 0}, ValueError, "indices must be in 0 to -1"),
    ],
)
def test_pad_input_names_what_is_wrong(wrong: dict[str, Any], error: type, message: str) -> None:
    right = {"hidden_states": PACKED, "indices": INDICES, "batch": 2, "seqlen": 5}
    with pytest.raises(error, match=re.escape(message)):
        pad_input(**right | wrong)


def test_indices_on_a_gpu_are_checked_on_demand(gpu: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MINI_FLASH_ATTENTION_CHECK", "1")
    with pytest.raises(ValueError, match="indices must be in 0 to 9, .* they are in 7 to 10"):
        pad_input(PACKED.to(gpu), INDICES.to(gpu) + 7, 2, 5)
