"""Between padded batches and packed sequences, as flash_attn.bert_padding does it. Differentiable."""

import torch
import torch.nn.functional as F
from torch import Tensor


def unpad_input(
    hidden_states: Tensor, attention_mask: Tensor, unused_mask: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, int, Tensor]:
    """Pack the tokens of a padded batch, one sequence after the other.

    Waits for the device: how many tokens there are is a value that lives there.

    Args:
        hidden_states: (batch, seqlen, ...).
        attention_mask: (batch, seqlen), bool or int: nonzero where a token is valid.
        unused_mask: like attention_mask: nonzero where a token gets a place but is not used, such as
            room for tokens to come. These are behind the sequence's valid ones.

    Returns:
        hidden_states: (total, ...), the tokens that either mask selects.
        indices: (total,), int64: where they were in the flattened batch; `pad_input` takes them.
        cu_seqlens: (batch + 1,), int32: where the sequences start and end in the packed tensor.
        max_seqlen_in_batch: the longest of them.
        seqused: (batch,), int32: the valid tokens of each sequence.

    Raises:
        ValueError: a mask is not (batch, seqlen).
    """
    _check_mask("attention_mask", attention_mask, hidden_states)
    valid = attention_mask != 0
    selected = valid
    if unused_mask is not None:
        _check_mask("unused_mask", unused_mask, hidden_states)
        selected = valid | (unused_mask != 0)
    lengths = selected.sum(dim=1, dtype=torch.int32)
    indices = selected.flatten().nonzero().flatten()
    cu_seqlens = F.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))
    longest = int(lengths.max()) if len(lengths) else 0
    packed = hidden_states.flatten(0, 1).index_select(0, indices)
    return packed, indices, cu_seqlens, longest, valid.sum(dim=1, dtype=torch.int32)


def pad_input(hidden_states: Tensor, indices: Tensor, batch: int, seqlen: int) -> Tensor:
    """The inverse of `unpad_input`: a padded batch, 0 where there is no token.

    Args:
        hidden_states: (total, ...).
        indices: (total,), from `unpad_input`.
        batch, seqlen: of the padded batch.

    Returns:
        (batch, seqlen, ...).
    """
    padded = hidden_states.new_zeros(batch * seqlen, *hidden_states.shape[1:])
    return padded.index_copy(0, indices, hidden_states).unflatten(0, (batch, seqlen))


def _check_mask(name: str, mask: Tensor, hidden_states: Tensor) -> None:
    if mask.shape != hidden_states.shape[:2]:
        raise ValueError(
            f"{name} must have shape (batch, seqlen) = {tuple(hidden_states.shape[:2])}, "
            f"not {tuple(mask.shape)}"
        )
