"""The tensors of a call as kernels take them: where they lie, or copied."""

import torch
from torch import Tensor

from mini_flash_attention.gpu import fast, memory
from mini_flash_attention.gpu.config import ELEMENTS
from mini_flash_attention.kernels.calls import (
    BATCH_IDX,
    CU_SEQLENS_K,
    CU_SEQLENS_Q,
    LEFTPAD_K,
    SEQUSED_K,
    Dropout,
    Ragged,
    Score,
    record,
)
from mini_flash_attention.philox import keep_threshold
from mini_flash_attention.problem import Layout, Problem


def in_place(*tensors: Tensor) -> bool:
    """Whether kernels can read the tensors (batch, seqlen, heads, head_dim) where they lie.

    Kernels check the same themselves, in native code (ValueError, before they do anything): asked before each
    launch, this would take 1 µs. What they cannot see is a negative bit.
    """
    for x in tensors:
        batch, seqlen, heads, unit = x.stride()
        if unit != 1 or (batch | seqlen | heads) % ELEMENTS or x.data_ptr() % 16 or x.is_neg():
            return False
    return True


def written(*tensors: Tensor) -> None:
    """A kernel wrote to the tensors: autograd, which may have saved what was there, is to know."""
    try:
        fast.increment_version(tensors)
    except RuntimeError:  # tensors of inference mode outside of it: autograd never saves them
        for x in tensors:
            if not x.is_inference():
                fast.increment_version((x,))


def readable(problem: Problem, *tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors (batch, seqlen, heads, head_dim), or copies with padded head dims and other strides."""
    padding = -problem.head_dim % ELEMENTS
    if not padding and in_place(*tensors):
        return tensors
    if padding:
        tensors = (torch.nn.functional.pad(x, (0, padding)) for x in tensors)
    return tuple(x if in_place(x) else x.clone(memory_format=torch.contiguous_format) for x in tensors)


def signed(x: Tensor, sign: int) -> Tensor:
    """sign · x, for q and dq: kernels take the scores' maximum before they scale, by a positive scale."""
    if sign == 0:
        return torch.zeros_like(x)
    return x if sign > 0 else -x


def ragged(problem: Problem, layout: Layout, added: int = 0) -> Ragged:
    """Where each sequence lies. added: keys that this call has appended to each."""
    cu_seqlens_q, cu_seqlens_k, seqused_k, leftpad_k, batch_idx, block_table, keys = layout
    none, no_table, _ = memory.not_given(problem.device.index)
    given = (
        (cu_seqlens_q is not None) * CU_SEQLENS_Q
        + (cu_seqlens_k is not None) * CU_SEQLENS_K
        + (seqused_k is not None) * SEQUSED_K
        + (leftpad_k is not None) * LEFTPAD_K
        + (batch_idx is not None) * BATCH_IDX
    )
    fields = (
        none if cu_seqlens_q is None else cu_seqlens_q,
        none if cu_seqlens_k is None else cu_seqlens_k,
        none if seqused_k is None else seqused_k,
        none if leftpad_k is None else leftpad_k,
        none if batch_idx is None else batch_idx,
        no_table if block_table is None else block_table,
        given,
        problem.seqlen_k if keys is None else keys,
        added,
        problem.batch,
        problem.longest_q,
    )
    return record(Ragged, fields)


def with_slopes(score: Score, alibi_slopes: Tensor, batch: int) -> Score:
    """The same with a call's slopes, (batch, heads), of stride 0 where the batch shares them."""
    if alibi_slopes.ndim == 1:
        alibi_slopes = alibi_slopes.expand(batch, -1)
    return Score(score.scale, score.softcap, alibi_slopes.resolve_neg())


def sinks(s_aux: Tensor) -> Tensor:
    """s_aux as kernels take it: itself, if it is float32."""
    return s_aux.float().resolve_neg().contiguous()


def dropout(seed: Tensor, dropout_p: float) -> Dropout:
    """What is dropped. seed: (1) int64; the threshold as the signed integer that kernels take."""
    threshold = keep_threshold(dropout_p)
    both = threshold << 16 | threshold
    return Dropout(seed.view(torch.int32), both - (both >> 31 << 32), 1 / (1 - dropout_p))
