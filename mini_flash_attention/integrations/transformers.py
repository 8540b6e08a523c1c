"""Hugging Face Transformers: attn_implementation="mini_flash_attention".

    from mini_flash_attention.integrations import transformers
    transformers.register()
    model = AutoModelForCausalLM.from_pretrained(..., attn_implementation="mini_flash_attention")

All around attention (padding, packed position_ids, caches, continuous batching) stays Transformers' own: to
it we are one of the FlashAttention packages, because our names hold "flash". It has no public way to be
given a package's functions, so two private functions of it are wrapped. Tried with Transformers 5.17 and
5.24.
"""

from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any

from torch import Tensor

import mini_flash_attention as mini

# With a 2 in the name continuous batching decodes by flash_attn_with_kvcache, on a GPU.
NAMES = ["mini_flash_attention", "mini_flash_attention_2"]


def register(also: Sequence[str] = ()) -> None:
    """Make `attn_implementation="mini_flash_attention"` known. Called again, it adds what is new.

    Args:
        also: other names to serve, such as "flash_attention_2", for which Transformers then asks no package.

    Raises:
        ImportError: Transformers is not installed.
    """
    from transformers import AttentionInterface, PreTrainedModel, modeling_flash_attention_utils
    from transformers.integrations.flash_attention import flash_attention_forward
    from transformers.masking_utils import AttentionMaskInterface, flash_attention_mask

    NAMES.extend(name for name in also if name not in NAMES)
    for name in NAMES:
        AttentionInterface.register(name, flash_attention_forward)
        AttentionMaskInterface.register(name, flash_attention_mask)  # else padding is ignored, without a word
        try:  # before 5.20 continuous batching had names of its own
            from transformers.integrations.flash_paged import paged_attention_forward
        except ImportError:
            continue
        AttentionInterface.register(f"paged|{name}", paged_attention_forward)
        AttentionMaskInterface.register(f"paged|{name}", flash_attention_mask)
    _wrap(modeling_flash_attention_utils, "_lazy_imports", _functions)
    _wrap(PreTrainedModel, "_check_and_adjust_attn_implementation", _keep_name)


def _wrap(owner: Any, name: str, around: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
    original = getattr(owner, name)
    if not hasattr(original, "of_mini_flash_attention"):
        wrapped: Any = wraps(original)(around(original))
        wrapped.of_mini_flash_attention = True
        setattr(owner, name, wrapped)


def _functions(load: Callable[..., Any]) -> Callable[..., Any]:
    """The functions of the package that an implementation's name stands for."""

    def functions(implementation: str | None, *args: Any, **options: Any) -> Any:
        if not _is_ours(implementation):
            return load(implementation, *args, **options)
        from transformers.modeling_flash_attention_utils import _pad_input, _unpad_input

        return flash_attn_func, flash_attn_varlen_func, flash_attn_with_kvcache, _pad_input, _unpad_input

    return functions


def _keep_name(check: Callable[..., Any]) -> Callable[..., Any]:
    """Models that list the implementations they know, as GPT-OSS does, would replace our name by another."""

    def keep(self: Any, implementation: str | None, *args: Any, **options: Any) -> Any:
        if not _is_ours(implementation):
            return check(self, implementation, *args, **options)
        from transformers.modeling_flash_attention_utils import lazy_import_flash_attention

        if not self._supports_flash_attn:  # what it adds to the scores would be left out without a word
            raise ValueError(
                f"{type(self).__name__} does not support FlashAttention, so neither {implementation}"
            )
        lazy_import_flash_attention(implementation)
        return implementation

    return keep


def _is_ours(name: str | None) -> bool:
    return isinstance(name, str) and name.removeprefix("paged|") in NAMES


# Transformers reads from the signatures what a package can do; what it does not find there it drops without
# a word, sinks included. There is no max_seqlen_q: it would come as a tensor, at which torch.compile breaks
# the graph; the number of all tokens is a bound that needs no device.


def flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    deterministic: bool = False,
    s_aux: Tensor | None = None,
) -> Tensor:
    """mini_flash_attention.flash_attn_func, with the options that Transformers knows."""
    options = dropout_p, softmax_scale, causal, window_size, softcap, None, deterministic
    return mini.flash_attn_func(q, k, v, *options, s_aux=s_aux)


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    deterministic: bool = False,
    s_aux: Tensor | None = None,
) -> Tensor:
    """mini_flash_attention.flash_attn_varlen_func, with the options that Transformers knows."""
    lengths = cu_seqlens_q.int(), cu_seqlens_k.int(), q.shape[0], k.shape[0]
    options = *lengths, dropout_p, softmax_scale, causal, window_size, softcap, None, deterministic
    return mini.flash_attn_varlen_func(q, k, v, *options, s_aux=s_aux)


def flash_attn_with_kvcache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor | None = None,
    v: Tensor | None = None,
    cache_seqlens: Tensor | int | None = None,
    block_table: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    s_aux: Tensor | None = None,
) -> Tensor:
    """mini_flash_attention.flash_attn_with_kvcache, with the options that Transformers knows."""
    options: dict[str, Any] = dict(cache_seqlens=cache_seqlens, block_table=block_table, s_aux=s_aux)
    options |= dict(softmax_scale=softmax_scale, causal=causal, window_size=window_size, softcap=softcap)
    return mini.flash_attn_with_kvcache(q, k_cache, v_cache, k, v, **options)
