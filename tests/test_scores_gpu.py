"""Functions of the scores and block masks in the kernels, on both GPU paths, against the oracle."""

import pytest
import torch
from error_rule import check_forward, check_gradients
from score_functions import MASKS, SCORES, functions
from torch import Tensor

from mini_flash_attention import (
    create_block_mask,
    flash_attn_func,
    flash_attn_varlen_func,
    flash_attn_with_kvcache,
    masks,
)
from mini_flash_attention.gpu import cache, compile
from mini_flash_attention.reference import attention

pytestmark = pytest.mark.timeout(300)
BF16 = torch.bfloat16


def qkv(b: int, sq: int, sk: int, h: int, hk: int, d: int, dtype: torch.dtype = BF16) -> list[Tensor]:
    shapes = (b, sq, h, d), (b, sk, hk, d), (b, sk, hk, d)
    return [torch.randn(shape, dtype=dtype, device="cuda", requires_grad=True) for shape in shapes]


def check(q: Tensor, k: Tensor, v: Tensor, options: dict, reference: dict) -> None:
    """Forward and gradients, with that of the LSE. options: of flash_attn_func; reference: of the oracle."""
    out, lse, _ = flash_attn_func(q, k, v, return_attn_probs=True, **options)
    dout, dlse = torch.randn_like(out), torch.randn_like(lse).masked_fill(lse == -torch.inf, 0)
    gradients = torch.autograd.grad((out, lse), (q, k, v), (dout, dlse))
    plain = [x.detach() for x in (out, lse, q, k, v)]
    check_forward(*plain, **reference)
    check_gradients(gradients, dout, dlse, *plain[2:], **reference)


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("name", [*SCORES, *MASKS])
def test_functions(path: str, name: str, head_dim: int) -> None:
    given = functions(name, 2, 4, 700, "cuda")
    causal = name in SCORES
    tensors = qkv(2, 700, 650, 4, 2, head_dim)
    check(*tensors, given | {"causal": causal}, given | {"window_right": 0 if causal else None})


@pytest.mark.parametrize("options", [{}, {"causal": True}, {"window_size": (60, 20)}], ids=str)
@pytest.mark.parametrize("head_dim", [40, 96, 192, 256])
def test_head_dims_and_windows(path: str, head_dim: int, options: dict) -> None:
    given = functions("awkward", 1, 2, 300, "cuda")
    window = {"window_right": 0} if options.get("causal") else {}
    if "window_size" in options:
        window = dict(zip(("window_left", "window_right"), options["window_size"], strict=True))
    check(*qkv(1, 300, 290, 2, 1, head_dim, torch.float16), given | options, given | window)


def test_with_all_other_changes_of_scores(path: str) -> None:
    given = functions("relative_bias", 2, 4, 300, "cuda") | functions("per_head_window", 2, 4, 300, "cuda")
    more = {"softcap": 5.0, "alibi_slopes": torch.rand(4, device="cuda")}
    sinks = torch.randn(4, device="cuda")
    check(*qkv(2, 257, 300, 4, 2, 64), given | more | {"s_aux": sinks}, given | more | {"s_aux": sinks})


@pytest.mark.parametrize("head_dim", [64, 128, 192])
@pytest.mark.parametrize("name", ["awkward", "relative_bias"])
def test_with_dropout(path: str, name: str, head_dim: int) -> None:
    """Derivatives of either sign, and none."""
    given, tensors = functions(name, 2, 4, 300, "cuda"), qkv(2, 257, 300, 4, 2, head_dim)
    out, lse, S_dmask = flash_attn_func(*tensors, 0.3, return_attn_probs=True, **given)
    dout = torch.randn_like(out)
    gradients = torch.autograd.grad(out, tensors, dout)
    reference = given | {"dropout_mask": ~torch.signbit(S_dmask), "dropout_p": 0.3}
    parts = [x.detach() for x in tensors]
    check_forward(out.detach(), lse.detach(), *parts, **reference)
    check_gradients(gradients, dout, None, *parts, **reference)


def test_packed_sequences(path: str) -> None:
    """Indices count in each sequence, batch is its number."""
    lengths_q, lengths_k = (200, 0, 33, 1), (180, 50, 300, 7)
    cu_q, cu_k = (
        torch.tensor([0, *x], dtype=torch.int32).cumsum(0, dtype=torch.int32) for x in (lengths_q, lengths_k)
    )
    given = functions("awkward", 4, 4, 300, "cuda")
    q, k, v = qkv(1, int(cu_q[-1]), int(cu_k[-1]), 4, 2, 64)
    packed = [x[0] for x in (q, k, v)]
    sequences = cu_q.cuda(), cu_k.cuda(), 200, 300
    out, lse, _ = flash_attn_varlen_func(*packed, *sequences, return_attn_probs=True, **given)
    dout = torch.randn_like(out)
    dq, dk, dv = torch.autograd.grad(out, (q, k, v), dout)
    for b in (0, 2, 3):
        rows, keys = slice(cu_q[b], cu_q[b + 1]), slice(cu_k[b], cu_k[b + 1])
        parts = q[:, rows].detach(), k[:, keys].detach(), v[:, keys].detach()
        reference = given | {"first": b}
        gradients = dq[:, rows], dk[:, keys], dv[:, keys]
        check_gradients(gradients, dout[None, rows], None, *parts, **reference)
        check_forward(out[None, rows].detach(), lse[None, :, rows].detach(), *parts, **reference)
    assert not dk[:, cu_k[1] : cu_k[2]].any()


@pytest.mark.parametrize("num_splits", [1, 3])
@pytest.mark.parametrize("tokens", [1, 20])
def test_caches(path: str, tokens: int, num_splits: int) -> None:
    lengths = torch.tensor([500, 77, 1], dtype=torch.int32, device="cuda")
    given = functions("awkward", 3, 8, 500, "cuda")
    q, k, v = (x.detach() for x in qkv(3, tokens, 500, 8, 2, 64))
    out, lse = flash_attn_with_kvcache(
        q, k, v, cache_seqlens=lengths, num_splits=num_splits, return_softmax_lse=True, **given
    )
    for b, length in enumerate(lengths.tolist()):
        one = slice(b, b + 1)
        parts = q[one], k[one, :length], v[one, :length]
        check_forward(out[one], lse[one], *parts, **given, first=b)


@pytest.mark.parametrize("lengths", [(700, 700), (1000, 333), (64, 1300)], ids=str)
@pytest.mark.parametrize("head_dim", [64, 96, 128, 192, 256])
@pytest.mark.parametrize("name", ["documents", "late", "sink_window"])
def test_block_masks(path: str, name: str, head_dim: int, lengths: tuple[int, int]) -> None:
    given = functions(name, 2, 4, max(lengths), "cuda")
    if name == "late":
        given |= functions("relative_bias", 2, 4, max(lengths), "cuda")
    mask_mod = given.pop("mask_mod")
    block_mask = create_block_mask(mask_mod, 2, 4, *lengths, device="cuda")
    reference = given | {"mask_mod": mask_mod}
    check(*qkv(2, *lengths, 4, 2, head_dim), given | {"block_mask": block_mask}, reference)


def test_block_masks_of_all_batches_and_heads(path: str) -> None:
    """Lists without a mask function, that of PyTorch, deterministic, and with dropout."""
    flex_attention = pytest.importorskip("torch.nn.attention.flex_attention")
    theirs = flex_attention.create_block_mask(masks.causal(), None, None, 400, 400, device="cuda")
    q, k, v = qkv(3, 400, 400, 4, 4, 64)
    reference = {"window_right": 0}
    check(q, k, v, {"block_mask": theirs}, reference)
    check(q, k, v, {"block_mask": theirs, "deterministic": True}, reference)
    out, lse, S_dmask = flash_attn_func(q, k, v, 0.3, block_mask=theirs, return_attn_probs=True)
    reference |= {"dropout_mask": S_dmask >= 0, "dropout_p": 0.3}
    reference["dropout_mask"] &= ~torch.signbit(S_dmask)
    check_forward(*(x.detach() for x in (out, lse, q, k, v)), **reference)


def test_a_captured_number_or_another_name_compiles_nothing(
    path: str, tmp_path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MINI_FLASH_ATTENTION_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(compile, "_loaded", {})
    q, k, v = (x.detach() for x in qkv(1, 300, 300, 2, 2, 64))
    results = []
    for slope in (0.5, 2.0):
        results.append(flash_attn_func(q, k, v, score_mod=lambda s, b, h, i, j: s - slope * abs(i - j)))  # noqa: B023

    def another(score, batch, head, q_idx, kv_idx):
        return score - slope * abs(q_idx - kv_idx)

    assert torch.equal(flash_attn_func(q, k, v, score_mod=another), results[1])
    assert not torch.equal(*results)
    assert len(cache.entries()) == 1


def test_gradients_of_captured_tensors(path: str) -> None:
    table = torch.randn(4, 600, device="cuda", requires_grad=True)
    slopes = torch.rand(4, device="cuda", requires_grad=True)

    def score_mod(score, batch, head, q_idx, kv_idx):
        return torch.tanh(score) + table[head, q_idx - kv_idx + 300] - slopes[head] * abs(q_idx - kv_idx) / 8

    q, k, v = (x.detach() for x in qkv(2, 300, 280, 4, 2, 64))
    out = flash_attn_func(q, k, v, causal=True, score_mod=score_mod)
    dout = torch.randn_like(out)
    gradients = torch.autograd.grad(out, (table, slopes), dout)
    for dtype, tolerance in ((torch.float32, 2e-2),):
        oracle = attention(q, k, v, window_right=0, score_mod=score_mod, dtype=dtype)[0]
        expected = torch.autograd.grad(oracle, (table, slopes), dout.to(dtype))
        for ours, theirs in zip(gradients, expected, strict=True):
            assert (ours - theirs).norm() <= tolerance * theirs.norm()


def test_a_captured_graph_reads_tables_anew(gpu: torch.device) -> None:
    table = torch.zeros(2, 400, device=gpu)
    q, k, v = (x.detach() for x in qkv(1, 200, 200, 2, 2, 64))

    def call() -> Tensor:
        return flash_attn_func(q, k, v, score_mod=lambda s, b, h, i, j: s + table[h, i - j + 200])

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        out = call()
    table.normal_()
    graph.replay()
    assert torch.equal(out, call())
