"""pad_input and unpad_input."""

import pytest
import torch
from torch import Tensor

from mini_flash_attention import flash_attn_func, flash_attn_varlen_func, pad_input, unpad_input


@pytest.fixture(params=["cpu", "cuda"])
def device(request: pytest.FixtureRequest) -> torch.device:
    return request.getfixturevalue("gpu") if request.param == "cuda" else torch.device("cpu")


def mask_of(lengths: list[int], seqlen: int, device: torch.device) -> Tensor:
    return torch.arange(seqlen, device=device) < torch.tensor(lengths, device=device).unsqueeze(1)


@pytest.mark.parametrize("dtype", [torch.bool, torch.int32, torch.int64, torch.float32])
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


@pytest.mark.parametrize("name", ["attention_mask", "unused_mask"])
def test_masks_of_another_shape(name: str) -> None:
    masks = {"attention_mask": torch.ones(2, 5), name: torch.ones(2, 4)}
    with pytest.raises(ValueError, match=rf"{name} must have shape .* = \(2, 5\), not \(2, 4\)"):
        unpad_input(torch.randn(2, 5, 3), **masks)
