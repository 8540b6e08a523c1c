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
    Blocks,
    Dropout,
    Ragged,
    Score,
    record,
)
from mini_flash_attention.philox import keep_threshold
from mini_flash_attention.problem import Inputs, Layout, Problem


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
        tensors = tuple(torch.nn.functional.pad(x, (0, padding)) for x in tensors)
    return tuple(x if in_place(x) else x.clone(memory_format=torch.contiguous_format) for x in tensors)


def signed(x: Tensor, sign: int) -> Tensor:
    """sign · x, for q and dq: kernels take the scores' maximum before they scale, by a positive scale."""
    if sign == 0:
        return torch.zeros_like(x)
    return x if sign > 0 else -x


def ragged(problem: Problem, layout: Layout, added: int = 0, longest: int | None = None) -> Ragged:
    """Where each sequence lies.

    added: keys that this call has appended to each. longest: by which sequence of q tiles are chosen.
    """
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
        problem.longest_q if longest is None else longest,
    )
    return record(Ragged, fields)


def score(of_plan: Score, x: Inputs, batch: int) -> Score:
    """The plan's with what a call captures beside the softcap: in the order of Problem.scoring."""
    slopes = x.alibi_slopes
    if slopes is None and not x.captured:
        return of_plan
    # (batch, heads), of stride 0 where the batch shares them
    given = () if slopes is None else (slopes.expand(batch, -1).resolve_neg(),)
    return Score(of_plan.scale, (*(of_plan.captured or ()), *given, *map(_captured, x.captured)))


def _captured(x: float | int | Tensor) -> float | int | Tensor:
    """As kernels take it: with a dimension, a unit last stride, and bytes for truth."""
    if not isinstance(x, Tensor):
        return x
    x = x.detach().resolve_neg().reshape(1) if x.ndim == 0 else x.detach().resolve_neg()
    x = x if x.stride(-1) == 1 else x.contiguous()
    return x.view(torch.uint8) if x.dtype == torch.bool else x


def blocks(problem: Problem, x: Inputs, of_keys: bool = False) -> Blocks:
    """The lists of the block mask; of_keys: which query blocks each key block visits."""
    mask, size = x.block_mask, (problem.batch, problem.heads_q, -1)
    if of_keys:
        lists = mask.q_num_blocks, mask.q_indices, mask.full_q_num_blocks, mask.full_q_indices
    else:
        lists = mask.kv_num_blocks, mask.kv_indices, mask.full_kv_num_blocks, mask.full_kv_indices
    return Blocks(*(x.expand(*size, -1) if x.ndim == 4 else x.expand(size) for x in lists))


def sinks(s_aux: Tensor) -> Tensor:
    """s_aux as kernels take it: itself, if it is float32."""
    return s_aux.float().resolve_neg().contiguous()


def dropout(seed: Tensor, dropout_p: float) -> Dropout:
    """What is dropped. seed: (1) int64; the threshold as the signed integer that kernels take."""
    threshold = keep_threshold(dropout_p)
    both = threshold << 16 | threshold
    return Dropout(seed.view(torch.int32), both - (both >> 31 << 32), 1 / (1 - dropout_p))
