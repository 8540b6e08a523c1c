"""vLLM's attention by our kernels, on the CPU: its metadata, its layout of the cache."""

import pytest
import torch
from torch import Tensor

import mini_flash_attention as mini
from mini_flash_attention.integrations.transformers import flash_attn_func

pytest.importorskip("vllm")
from vllm.v1.attention.backends.flash_attn import FlashAttentionMetadata  # noqa: E402
from vllm.v1.attention.backends.registry import AttentionBackendEnum  # noqa: E402

from mini_flash_attention.integrations import vllm  # noqa: E402

HEADS, HEADS_K, DIM, BLOCK = 4, 2, 16, 16


def starts(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).int()


def test_registered() -> None:
    vllm.register()
    backend = AttentionBackendEnum[vllm.NAME].get_class()
    assert backend.get_impl_cls() is vllm.Attention
    asked = dict(head_size=128, dtype=torch.bfloat16, block_size=16, use_mla=False, has_sink=True)
    asked |= dict(use_sparse=False, use_mm_prefix=False, use_per_head_quant_scales=False)
    asked |= dict(device_capability=(9, 0), attn_type="decoder")
    assert backend.validate_configuration(**asked, kv_cache_dtype="fp8") == ["kv_cache_dtype not supported"]
    assert backend.validate_configuration(**asked, kv_cache_dtype="auto") == []


@pytest.mark.parametrize("window", [None, 7])
@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("with_sinks", [False, True])
def test_pages(window, softcap, with_sinks) -> None:
    """Decoding, a prompt, and a chunk of one, against attention to each sequence alone."""
    lengths, queries = [40, 5, 33], [1, 5, 9]
    sinks, tokens = torch.randn(HEADS) if with_sinks else None, sum(queries)
    impl = vllm.Attention(HEADS, DIM, 0.3, HEADS_K, None, window, "auto", softcap, sinks=sinks)
    cache = torch.randn(12, HEADS_K, BLOCK, 2 * DIM)
    table = torch.randperm(12).int().view(3, 4)[:, :3].contiguous()
    metadata = FlashAttentionMetadata(
        num_actual_tokens=tokens,
        max_query_len=9,
        query_start_loc=starts(queries),
        max_seq_len=40,
        seq_lens=torch.tensor(lengths).int(),
        block_table=table,
        slot_mapping=None,
    )
    q = torch.randn(tokens + 3, HEADS, DIM)  # padded, as for a captured graph
    output = torch.full((tokens + 3, HEADS * DIM), -7.0)
    impl.forward(None, q, None, None, cache, metadata, output)
    assert (output[tokens:] == -7).all()
    keys = cache.transpose(1, 2)[table.long()].flatten(1, 2)  # (sequences, capacity, heads_k, 2 dim)
    options = dict(softmax_scale=0.3, causal=True, softcap=softcap or 0.0, s_aux=sinks)
    options |= dict(window_size=(-1 if window is None else window - 1, 0))
    for row, (n, m) in enumerate(zip(lengths, queries, strict=True)):
        start = sum(queries[:row])
        k, v = keys[row : row + 1, :n].split(DIM, -1)
        wanted = flash_attn_func(q[None, start : start + m], k, v, **options)
        torch.testing.assert_close(output[start : start + m].view(1, m, HEADS, DIM), wanted)


def test_batch_invariance(monkeypatch: pytest.MonkeyPatch) -> None:
    """A sequence's rows are bit for bit what they are alone, where vLLM asks for that."""
    monkeypatch.setenv("VLLM_BATCH_INVARIANT", "1")
    impl = vllm.Attention(HEADS, DIM, 0.3, HEADS_K, None, None, "auto")
    called = []
    monkeypatch.setattr(vllm, "flash_attn_varlen_func", lambda *_, **options: called.append(options))
    metadata = FlashAttentionMetadata(
        num_actual_tokens=1,
        max_query_len=1,
        query_start_loc=starts([1]),
        max_seq_len=5,
        seq_lens=torch.tensor([5]).int(),
        block_table=torch.zeros(1, 1).int(),
        slot_mapping=None,
    )
    cache, output = torch.randn(1, HEADS_K, BLOCK, 2 * DIM), torch.empty(1, HEADS * DIM)
    impl.forward(None, torch.randn(1, HEADS, DIM), None, None, cache, metadata, output)
    assert called[0]["num_splits"] == 1 and vllm.Backend.supports_batch_invariance()


def test_encoder() -> None:
    impl = vllm.Attention(HEADS, DIM, 0.3, HEADS_K, None, None, "auto", attn_type="encoder_only")
    q, k, v = (torch.randn(12, heads, DIM) for heads in (HEADS, HEADS_K, HEADS_K))
    output, where = torch.empty(12, HEADS * DIM), starts([5, 7])
    metadata = FlashAttentionMetadata(12, 7, where, 7, torch.tensor([5, 7]).int(), None, None)
    impl.forward(None, q, k, v, None, metadata, output)
    wanted = mini.flash_attn_varlen_func(q, k, v, where, where, 7, 7, softmax_scale=0.3)
    torch.testing.assert_close(output.view_as(q), wanted)
