"""Between padded batches and packed sequences, as flash_attn.bert_padding does it. Differentiable."""

from numbers import Integral

import torch
import torch.nn.functional as F
from torch import Tensor

from mini_flash_attention import checks


def unpad_input(
    hidden_states: Tensor, attention_mask: Tensor, unused_mask: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, int, Tensor]:
    """Pack the tokens of a padded batch, one sequence after the other.

    Waits for the device: how many tokens there are is a value that lives there.

    Args:
        hidden_states: (batch, seqlen, ...).
        attention_mask: (batch, seqlen), of any dtype, on the device of hidden_states: nonzero where a
            token is valid.
        unused_mask: like attention_mask: nonzero where a token gets a place but is not used, such as
            room for tokens to come. These are behind the sequence's valid ones.

    Returns:
        hidden_states: (total, ...), the tokens that either mask selects.
        indices: (total,), int64: where they were in the flattened batch; `pad_input` takes them.
        cu_seqlens: (batch + 1,), int32: where the sequences start and end in the packed tensor.
        max_seqlen_in_batch: the longest of them.
        seqused: (batch,), int32: the valid tokens of each sequence.

    Raises:
        TypeError, ValueError: an argument is wrong: the message names it and says what is allowed.
    """
    shape = checks.facts("hidden_states", hidden_states)[0]
    if len(shape) < 2:
        raise ValueError(f"hidden_states must have shape (batch, seqlen, ...), not {tuple(shape)}")
    valid = _selected("attention_mask", attention_mask, hidden_states)
    selected = valid
    if unused_mask is not None:
        selected = valid | _selected("unused_mask", unused_mask, hidden_states)
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
        indices: where each token goes in the flattened batch, on the device of hidden_states or on the
            CPU: int32 or int64 (total,), as `unpad_input` returns them, or bool (batch * seqlen,), True
            in total places.
        batch, seqlen: of the padded batch.

    Returns:
        padded: (batch, seqlen, ...).

    Raises:
        TypeError, ValueError: an argument is wrong: the message names it and says what is allowed. On a
            GPU the values of indices are checked with MINI_FLASH_ATTENTION_CHECK=1 alone.
    """
    shape = checks.facts("hidden_states", hidden_states)[0]
    if len(shape) < 1:
        raise ValueError("hidden_states must have shape (total, ...), not ()")
    for name, size in (("batch", batch), ("seqlen", seqlen)):
        if not isinstance(size, Integral):
            raise TypeError(f"{name} must be an int, not {type(size).__name__}")
        if size < 0:
            raise ValueError(f"{name} must not be negative, but is {size}")
    places = batch * seqlen
    indices = _places(indices, hidden_states, places)
    padded = hidden_states.new_zeros(places, *shape[1:])
    try:
        padded = padded.index_put((indices,), hidden_states)
    except IndexError as error:
        raise ValueError(_range_of_indices(places, str(error))) from error
    return padded.unflatten(0, (batch, seqlen))


# A message is written where it is raised, not before: torch.compile with dynamic shapes traces through here,
# and cannot write a size into a text.


def _selected(name: str, mask: Tensor, hidden_states: Tensor) -> Tensor:
    """Which tokens a mask selects: bool (batch, seqlen)."""
    shape, _, device = checks.facts(name, mask)
    wanted = hidden_states.shape[:2]
    if shape != wanted:
        raise ValueError(f"{name} must have shape (batch, seqlen) = {tuple(wanted)}, not {tuple(shape)}")
    if device != hidden_states.device:
        raise ValueError(f"{name} is on {device}, but hidden_states is on {hidden_states.device}")
    return mask.bool()


def _places(indices: Tensor, hidden_states: Tensor, places: int) -> Tensor:
    """Where each of the tokens goes, as numbers."""
    shape, dtype, device = checks.facts("indices", indices)
    if dtype not in (torch.int32, torch.int64, torch.bool):
        raise TypeError(f"indices must be torch.int32, torch.int64 or torch.bool, not {dtype}")
    if device not in (hidden_states.device, torch.device("cpu")):
        raise ValueError(f"indices is on {device}, but hidden_states is on {hidden_states.device}")
    if len(shape) != 1:
        raise ValueError(f"indices must have shape (total,), not {tuple(shape)}")
    if dtype == torch.bool:
        if shape[0] != places:
            raise ValueError(f"indices, a mask, must have batch * seqlen = {places} elements, not {shape[0]}")
        indices = indices.nonzero().flatten()
    tokens = hidden_states.shape[0]
    if indices.shape[0] != tokens:
        raise ValueError(f"indices must be {tokens}, one a token of hidden_states, not {indices.shape[0]}")
    if checks.switched() and tokens > 0:
        low, high = indices.min().item(), indices.max().item()
        if low < -places or high >= places:
            raise ValueError(_range_of_indices(places, f"they are in {low} to {high}"))
    return indices


def _range_of_indices(places: int, found: str) -> str:
    return f"indices must be in 0 to {places - 1}, batch * seqlen - 1, but {found}"
