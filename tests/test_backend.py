"""Which backend serves which device, and the limits that tiles must respect; no GPU is needed."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from error_rule import check_forward
from torch import Tensor

from mini_flash_attention import backend, flash_attn_func, flash_attn_varlen_func, reference
from mini_flash_attention.gpu import compile, config, inputs, memory, plans
from mini_flash_attention.kernels.calls import Backward, Forward
from mini_flash_attention.problem import Problem

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)


@pytest.fixture(autouse=True)
def fresh() -> None:
    backend.choose.cache_clear()


def pretend(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int]) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "Pretended GPU")


@pytest.mark.parametrize(
    ("capability", "path"),
    [
        ((8, 0), "sm80"),
        ((8, 6), "sm80"),
        ((8, 9), "sm80"),
        ((9, 0), "sm90"),
        ((10, 0), "sm80"),
        ((12, 0), "sm80"),
    ],
)
def test_the_device_chooses(capability: tuple[int, int], path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, capability)
    assert backend.choose(CUDA, None) == path
    assert backend.choose(CUDA, "sm80") == "sm80"
    assert backend.choose(CUDA, "cpu") == "cpu"
    assert backend.choose(CPU, None) == "cpu"


@pytest.mark.parametrize("capability", [(7, 5), (13, 0)])
def test_gpus_that_no_kernel_runs_on_are_told(
    capability: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend(monkeypatch, capability)
    with pytest.raises(RuntimeError, match="Pretended GPU.*MINI_FLASH_ATTENTION_BACKEND=cpu"):
        backend.choose(CUDA, None)


def test_what_is_forced_must_be_possible(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, (8, 0))
    with pytest.raises(RuntimeError, match="sm90 does not run"):
        backend.choose(CUDA, "sm90")
    q = torch.randn(1, 3, 1, 8)
    for forced, message in (("sm80", "needs CUDA tensors"), ("gpu", "must be cpu, sm80 or sm90")):
        monkeypatch.setenv("MINI_FLASH_ATTENTION_BACKEND", forced)
        with pytest.raises(ValueError, match=message):
            flash_attn_func(q, q, q)


@pytest.mark.parametrize("arch", config.SHARED_MEMORY)
def test_tiles_fit_shared_memory(arch: str) -> None:
    barriers = 1024
    for row in config.forward_configs(arch):
        for tiles in row.variants:
            assert tiles.shared_memory + barriers <= config.SHARED_MEMORY[arch], tiles


@pytest.mark.parametrize("features", [{}, {"dropout": True}], ids=str)
def test_cp_async_copies_whole_tiles(features: dict) -> None:
    """Each round of sm80.make_tiled_load copies so many rows of a tile: none may lie beyond it."""
    for head_dim in config.HEAD_DIMS:
        for mask in config.MASKS:
            row = config.forward("sm80", "sm_80", "float16", head_dim, mask, **features)
            rows = 32 * row.warps // (8 if head_dim % 64 == 0 else 4)
            assert row.tile_m % rows == 0 and row.tile_n % rows == 0, row


def problem(seqlen: int, heads: int, head_dim: int) -> Problem:
    return Problem(torch.bfloat16, CUDA, 1, seqlen, seqlen, heads, heads, head_dim, 1.0)


def test_swaths_are_of_nearly_one_size() -> None:
    row = config.forward("sm90", "sm_90a", "bfloat16", 128, "causal")
    for seqlen in (1, 100, 512, 4096, 65536):
        for heads in (1, 2, 15, 16, 17, 31, 100, 4096):
            size = plans.swath(row.at(seqlen), problem(seqlen, heads, 128), 132)
            swaths = -(-heads // size)
            assert 1 <= size <= min(heads, 48)
            assert size * swaths - heads < swaths  # the last one lacks less than one head for each


class Kernel:
    """Stands in for a compiled one: checks what it is given, and computes with the oracle."""

    def __init__(self) -> None:
        self.calls: list[Forward] = []

    def __call__(self, call: Forward) -> None:
        tensors = call.mQ, call.mK, call.mV, call.mO
        if not inputs.in_place(*tensors):
            raise ValueError("Mismatched mQ.strides[3]")
        self.calls.append(call)
        assert all(x.shape[3] % 8 == 0 for x in tensors)
        assert call.score.scale > 0
        out, lse = reference.attention(
            call.mQ,
            call.mK,
            call.mV,
            softmax_scale=call.score.scale,
            s_aux=call.sinks,
            dtype=torch.float32,
        )
        call.mO.copy_(out)
        call.mLSE.copy_(lse)


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch, pretended_gpu: None) -> Kernel:
    kernel = Kernel()
    monkeypatch.setattr(plans, "decoding_pays", lambda *call: False)
    monkeypatch.setattr(compile, "get", lambda row: lambda *fields: kernel(Forward(*fields)))
    monkeypatch.setattr(memory, "tile_counter", lambda device: "a counter")
    return kernel


def tensors(head_dim: int, seqlen: int = 20, heads: int = 2) -> list[Tensor]:
    return [torch.randn(2, seqlen, heads, head_dim, dtype=torch.float16) for _ in range(3)]


def check(kernel: Kernel, q: Tensor, k: Tensor, v: Tensor, **options: Any) -> None:
    out, lse, _ = flash_attn_func(q, k, v, return_attn_probs=True, **options)
    check_forward(out, lse, q, k, v, **options)


@pytest.mark.parametrize("head_dim", [1, 8, 59, 64, 111, 256])
def test_head_dims_are_padded_to_chunks(kernel: Kernel, head_dim: int) -> None:
    q, k, v = tensors(head_dim)
    check(kernel, q, k, v)
    assert kernel.calls[-1].mQ.shape[3] == -(-head_dim // 8) * 8
    assert (kernel.calls[-1].mQ is q) == (head_dim % 8 == 0)


@pytest.mark.parametrize("scale", [0.3, 0.0, -0.7])
def test_the_kernel_sees_positive_scales(kernel: Kernel, scale: float) -> None:
    check(kernel, *tensors(40), softmax_scale=scale)


def test_the_kernel_is_given_sinks_in_float32(kernel: Kernel, monkeypatch: pytest.MonkeyPatch) -> None:
    rows, get = [], compile.get
    monkeypatch.setattr(compile, "get", lambda row: rows.append(row) or get(row))
    sinks = torch.randn(4)
    for given in (sinks[:2], sinks[::2], sinks[:1].expand(2), torch._neg_view(sinks[:2]), sinks[:2].half()):
        check(kernel, *tensors(40), s_aux=given)
        passed = kernel.calls[-1].sinks
        assert passed.is_contiguous() and not passed.is_neg() and passed.equal(given.float())
        assert rows[-1].sinks
    check(kernel, *tensors(40))
    assert kernel.calls[-1].sinks is None and not rows[-1].sinks


def test_only_what_cannot_be_read_in_place_is_copied(kernel: Kernel) -> None:
    q, k, v = torch.randn(2, 20, 3, 2, 64, dtype=torch.float16).unbind(2)
    q = q.transpose(1, 2).contiguous().transpose(1, 2)
    odd_rows = torch.randn(2, 20, 2, 65, dtype=torch.float16)[..., :64]
    every_second = torch.randn(2, 20, 2, 128, dtype=torch.float16)[..., ::2]
    shifted = torch.randn(2 * 20 * 2 * 64 + 1, dtype=torch.float16)[1:].view(2, 20, 2, 64)
    one_batch = torch.randn(1, 20, 2, 65, dtype=torch.float16)[..., :64]
    check(kernel, q, k, v)
    assert [x.data_ptr() for x in kernel.calls[-1][:3]] == [x.data_ptr() for x in (q, k, v)]
    for copied in (odd_rows, every_second, shifted):
        check(kernel, copied, k, v)
        assert kernel.calls[-1].mQ is not copied and kernel.calls[-1].mK is k
    check(kernel, one_batch, k[:1], v[:1])


def test_a_refusal_that_a_copy_would_not_mend_is_told(
    kernel: Kernel, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refusing(*fields: Any) -> None:
        raise ValueError("Mismatched mO.device")

    monkeypatch.setattr(compile, "get", lambda row: refusing)
    with pytest.raises(ValueError, match="Mismatched mO.device"):
        flash_attn_func(*tensors(64))


def test_a_counter_is_drawn_from_only_by_more_tiles_than_sms(kernel: Kernel) -> None:
    check(kernel, *tensors(64, heads=2))  # 2 x 2 tiles, 4 SMs
    assert kernel.calls[-1].counter is memory.unused(None)
    check(kernel, *tensors(64, heads=3))
    assert kernel.calls[-1].counter == "a counter"


def test_without_keys_nothing_is_launched(kernel: Kernel) -> None:
    q, k, v = tensors(64)
    out, lse, _ = flash_attn_func(q, k[:, :0], v[:, :0], return_attn_probs=True)
    assert not kernel.calls and not out.any() and (lse == -torch.inf).all()
    sinks = torch.randn(2)
    out, lse, _ = flash_attn_func(q, k[:, :0], v[:, :0], return_attn_probs=True, s_aux=sinks)
    assert not kernel.calls and not out.any() and lse.equal(sinks[:, None].expand_as(lse))


def test_windows_become_numbers(kernel: Kernel) -> None:
    q, k, v = tensors(64)
    k, v = k[:, :12], v[:, :12]
    for window_size, causal, numbers in [
        ((-1, -1), False, (0, 20)),
        ((-1, -1), True, (0, 0)),
        ((3, 5), False, (3, 5)),
        ((3, -1), False, (3, 20)),
    ]:
        flash_attn_func(q, k, v, window_size=window_size, causal=causal)
        assert (kernel.calls[-1].window_left, kernel.calls[-1].window_right) == numbers


def test_ragged_batches_are_told_by_flags(kernel: Kernel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plans, "decoding_pays", lambda *call: False)
    seen = []
    monkeypatch.setattr(compile, "get", lambda row: lambda *fields: seen.append(Forward(*fields)))
    q = torch.randn(30, 4, 64, dtype=torch.float16)
    k, v = (torch.randn(50, 2, 64, dtype=torch.float16) for _ in range(2))
    pages = torch.randn(7, 16, 2, 64, dtype=torch.float16)
    cu_q, cu_k = (torch.tensor([0, 10, 30], dtype=torch.int32), torch.tensor([0, 25, 50], dtype=torch.int32))
    used, table = torch.tensor([3, 4], dtype=torch.int32), torch.zeros(2, 3, dtype=torch.int32)
    out = torch.empty_like(q)
    flash_attn_varlen_func(q, k, v, cu_q, cu_k, 20, 25, causal=True)
    flash_attn_varlen_func(q, k, v, cu_q, cu_k, torch.tensor(20), 25, seqused_k=used, out=out)
    flash_attn_varlen_func(q, pages, pages, cu_q, None, 20, 25, seqused_k=used, block_table=table)
    flags, tensors = [], []
    for call in seen:
        assert call.mQ.shape == call.mO.shape == (1, 30, 4, 64) and call.mLSE.shape == (1, 4, 30)
        assert (call.ragged.batch, call.ragged.longest, call.ragged.added) == (2, 20, 0)
        flags.append(call.ragged.given)
        tensors.append(call.ragged[:6])
    assert flags == [0b00011, 0b00111, 0b00101]
    assert tensors[0][0] is cu_q and tensors[1][2] is used and tensors[2][5] is table
    assert seen[1].mO.data_ptr() == out.data_ptr()
    assert seen[2].mK.shape == (7, 16, 2, 64)


@pytest.mark.parametrize(
    ("page_size", "left_padded", "expected"),
    [
        (256, False, ("forward.sm90", 64)),
        (80, False, ("forward.sm90", 16)),
        (8, False, ("forward.sm90", 8)),
        (12, False, ("forward.sm80", 1)),
        (1, False, ("forward.sm80", 1)),
        (64, True, ("forward.sm80", 1)),
    ],
)
def test_pages_choose_their_loads(page_size: int, left_padded: bool, expected: tuple[str, int]) -> None:
    call = replace(problem(100, 1, 64), ragged=True, page_size=page_size, left_padded=left_padded)
    row = plans.forward_config(call, "sm90", "sm_90a")
    assert (row.kernel, row.page) == expected


def test_gradients_of_packed_tensors(kernel: Kernel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plans, "decoding_pays", lambda *call: False)
    rows, seen = [], []

    def launch(*fields: Any) -> None:
        seen.append((Backward if seen else Forward)(*fields))
        if len(seen) == 2:
            for x in (seen[1].mdQ, seen[1].mdK, seen[1].mdV):
                x.fill_(2)

    monkeypatch.setattr(compile, "get", lambda row: rows.append(row) or launch)
    q = torch.randn(150, 4, 59, dtype=torch.float16, requires_grad=True)
    k, v = (torch.randn(50, 2, 59, dtype=torch.float16, requires_grad=True) for _ in range(2))
    cu_q, cu_k = (torch.tensor([0, 10, 30], dtype=torch.int32), torch.tensor([0, 25, 50], dtype=torch.int32))
    slopes = torch.rand(4)
    out = flash_attn_varlen_func(
        q, k, v, cu_q, cu_k, 20, 25, softcap=3.0, alibi_slopes=slopes, softmax_scale=-0.5, deterministic=True
    )
    dq, dk, dv = torch.autograd.grad(out, (q, k, v), torch.ones_like(out))
    assert (dq == -2).all() and (dk == 2).all() and (dv == 2).all()
    assert (dq.shape, dk.shape, dv.shape) == (q.shape, k.shape, v.shape)
    row = rows[1]
    assert (repr(row.score), row.ragged, row.deterministic) == ("softcap_alibi", True, True)
    call = seen[1]
    for x in (call.mQ, call.mO, call.mdO, call.mdQ):
        assert x.shape == (1, 150, 4, 64)
    assert call.mK.shape == call.mdK.shape == (1, 50, 2, 64) and call.mLSE.shape == (1, 4, 150)
    numbers = (1, 4, 150 // row.tile_m + 2 + 2)
    assert call.mStats.shape[:3] == call.mdQacc.shape[:3] == call.mTurns.shape == numbers
    scale, (softcap, given_slopes) = call.score
    assert (scale, softcap, call.has_dlse, call.dropout, call.num_sms) == (0.5, 3.0, 0, None, 4)
    assert given_slopes.shape == (2, 4) and call.ragged.cu_seqlens_q is cu_q
    assert (call.ragged.batch, call.ragged.longest) == (2, 20)
