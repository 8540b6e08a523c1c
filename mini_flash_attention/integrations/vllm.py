"""vLLM: vllm serve MODEL --attention-backend MINI_FLASH_ATTENTION

vLLM finds `register` by this package's entry point and imports this module, which imports vLLM. Metadata,
the layout of the cache and what writes to it are those of vLLM's own FlashAttention backend; only
attention is ours. Written for vLLM 0.33.
"""

from typing import Any

from torch import Tensor
from vllm.v1.attention.backend import AttentionCGSupport, AttentionType
from vllm.v1.attention.backends.flash_attn import (
    FlashAttentionBackend,
    FlashAttentionImpl,
    FlashAttentionMetadataBuilder,
)

from mini_flash_attention import flash_attn_varlen_func
from mini_flash_attention.checks import MAX_HEAD_DIM

NAME = "MINI_FLASH_ATTENTION"


def register() -> None:
    """What vLLM calls when it loads its plugins."""
    from vllm.v1.attention.backends.registry import register_backend

    register_backend(NAME, f"{__name__}.Backend")


class Backend(FlashAttentionBackend):
    """What vLLM may ask of the backend."""

    supported_kv_cache_dtypes = ["auto", "float16", "bfloat16"]  # no FP8

    @staticmethod
    def get_name() -> str:
        return NAME

    @staticmethod
    def get_impl_cls() -> type:
        return Attention

    @staticmethod
    def get_builder_cls() -> type:
        return MetadataBuilder

    @classmethod
    def supports_head_size(cls, head_size: int) -> bool:
        return head_size <= MAX_HEAD_DIM and head_size % 8 == 0

    @classmethod
    def supports_sink(cls) -> bool:
        return True

    @classmethod
    def supports_mm_prefix(cls) -> bool:
        return False

    @classmethod
    def supports_rswa(cls) -> bool:
        return False

    @classmethod
    def supports_batch_invariance(cls) -> bool:
        return True

    @classmethod
    def supports_per_head_quant_scales(cls) -> bool:
        return False

    @classmethod
    def supports_combination(cls, *_: Any, **__: Any) -> str | None:
        return None


class MetadataBuilder(FlashAttentionMetadataBuilder):
    _cudagraph_support = AttentionCGSupport.UNIFORM_BATCH

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.aot_schedule = False  # FlashAttention-3's schedule, which we do not read


class Attention(FlashAttentionImpl):
    can_return_lse_for_decode = False
    supports_dcp = False

    def __init__(self, *arguments: Any, sinks: Tensor | None = None, **options: Any) -> None:
        super().__init__(*arguments, **options)  # without the sinks, for which it would ask FlashAttention-3
        self.sinks = sinks
        self.supports_quant_query_input = False

    def forward(
        self,
        layer: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kv_cache: Tensor,
        attn_metadata: Any,
        output: Tensor,
        output_scale: Tensor | None = None,
        output_block_scale: Tensor | None = None,
    ) -> Tensor:
        """Writes the first num_actual_tokens rows of output.

        Args:
            query: (tokens, heads, head_size), padded behind num_actual_tokens.
            key, value: (tokens, heads_k, head_size); read by an encoder only, else they are in the cache.
            kv_cache: (blocks, heads_k, block_size, 2 head_size).
            output: (tokens, heads · head_size).
        """
        if output_scale is not None or output_block_scale is not None:
            raise NotImplementedError("output_scale: the output is not quantised")
        if attn_metadata is None:  # vLLM measures its memory
            return output.fill_(0)
        of, tokens = attn_metadata, attn_metadata.num_actual_tokens
        if isinstance(of.causal, Tensor):
            raise NotImplementedError("causal: one for all sequences")
        slopes = None if self.alibi_slopes is None else self.alibi_slopes.to(query.device)
        window = self.sliding_window
        options = dict(softmax_scale=self.scale, softcap=self.logits_soft_cap, alibi_slopes=slopes)
        if self.attn_type in (AttentionType.ENCODER, AttentionType.ENCODER_ONLY):
            key, value, starts_k = key[:tokens], value[:tokens], of.query_start_loc
        else:
            # Both are views: (blocks, block_size, heads_k, head_size).
            key, value = kv_cache.transpose(1, 2).split(self.head_size, dim=-1)
            starts_k = None
            if not of.causal and window[0] >= 0:
                window = window[0], window[0]
            options |= dict(causal=of.causal, block_table=of.block_table, seqused_k=of.seq_lens)
        out = output[:tokens].view(tokens, self.num_heads, self.head_size)
        lengths = of.query_start_loc, starts_k, of.max_query_len, of.max_seq_len
        num_splits = int(self.batch_invariant_enabled)  # else 0: chosen
        options |= dict(window_size=window, out=out, s_aux=self.sinks, num_splits=num_splits)
        flash_attn_varlen_func(query[:tokens], key, value, *lengths, **options)
        return output
