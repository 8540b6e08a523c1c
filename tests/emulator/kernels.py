"""Calls of the package's kernels in the emulator: the records that the host side would make."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from emulator.capture import Library
from emulator.emulate import emulate
from mini_flash_attention import philox
from mini_flash_attention.block_mask import BlockMask
from mini_flash_attention.gpu import config, inputs
from mini_flash_attention.kernels import calls
from mini_flash_attention.scores.capture import Function, Scoring, built_in, capture

library = functools.cache(Library)


class Options(NamedTuple):
    """What changes the formula; `reference` is the same for the oracle."""

    window: tuple[int | None, int | None] = (None, None)
    softcap: float = 0.0
    slopes: Tensor | None = None  # (batch, heads) float32
    dropout: tuple[int, float] | None = None  # seed, probability
    score_mod: Callable[..., Any] | None = None
    mask_mod: Callable[..., Any] | None = None
    block_mask: BlockMask | None = None  # of mask_mod
    sinks: Tensor | None = None  # (heads) float32

    @property
    def functions(self) -> list[tuple[Function, tuple[Any, ...]]]:
        """Each with what it captures."""
        ours = ("softcap", self.softcap or None), ("alibi", self.slopes)
        users = ("score_mod", self.score_mod), ("mask_mod", self.mask_mod)
        functions = [(built_in(name), (value,)) for name, value in ours if value is not None]
        return functions + [capture(role, f) for role, f in users if f is not None]

    @property
    def score(self) -> Scoring:
        return Scoring(function for function, _ in self.functions)

    @property
    def mask(self) -> str:
        left, right = self.window
        return "window" if left is not None else "full" if right is None else "causal"

    def numbers(self, q: Tensor) -> tuple[calls.Score, int, int]:
        """The score, and the window where both sides have a number."""
        captured = [inputs._captured(x) for _, values in self.functions for x in values]
        score = calls.Score(q.shape[-1] ** -0.5, tuple(captured) or None)
        left, right = self.window
        return score, left or 0, q.shape[1] if right is None else right

    def blocks(self, q: Tensor, of_keys: bool = False) -> calls.Blocks | None:
        if self.block_mask is None:
            return None
        size = NamedTuple("Size", [("batch", int), ("heads_q", int)])(q.shape[0], q.shape[2])
        return inputs.blocks(size, inputs.Inputs(q, q, q, block_mask=self.block_mask), of_keys)

    def dropped(self) -> calls.Dropout | None:
        if self.dropout is None:
            return None
        seed, p = self.dropout
        return inputs.dropout(torch.tensor([seed]), p)

    def reference(self, q: Tensor, k: Tensor, b: int | None = None) -> dict[str, Any]:
        """For reference.attention; b: of one sequence of a ragged batch."""
        slopes = self.slopes if b is None or self.slopes is None else self.slopes[b : b + 1]
        options = dict(zip(("window_left", "window_right"), self.window, strict=True))
        options |= {"softcap": self.softcap, "alibi_slopes": slopes, "s_aux": self.sinks}
        options |= {"score_mod": self.score_mod, "mask_mod": self.mask_mod, "first": b or 0}
        if self.dropout:
            seed, p = self.dropout
            batch, seqlen, heads, _ = q.shape
            numbers = torch.arange(batch * heads).reshape(batch, heads, 1) + (b or 0) * heads
            keep = philox.keep_mask(seed, p, numbers, torch.arange(seqlen), range(k.shape[1]))
            options |= {"dropout_mask": keep, "dropout_p": p}
        return options


def ragged(
    *,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    seqused_k: Tensor | None = None,
    leftpad_k: Tensor | None = None,
    batch_idx: Tensor | None = None,
    block_table: Tensor | None = None,
    batch: int,
    longest: int,
    keys: int = 0,
    added: int = 0,
) -> calls.Ragged:
    """keys: of every sequence, where no tensor tells; longest: the most queries of one."""
    tensors = cu_seqlens_q, cu_seqlens_k, seqused_k, leftpad_k, batch_idx
    given = sum(1 << i for i, tensor in enumerate(tensors) if tensor is not None)
    none = torch.zeros(1, dtype=torch.int32)
    tensors = [none if tensor is None else tensor for tensor in tensors]
    table = none.reshape(1, 1) if block_table is None else block_table
    return calls.Ragged(*tensors, table, given, keys, added, batch, longest)


def forward(
    row: config.ForwardConfig,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    options: Options,
    sequences: calls.Ragged | None = None,
    num_sms: int = 2,
) -> tuple[Tensor, Tensor]:
    """out, lse"""
    out, lse = torch.empty_like(q), torch.empty(q.shape[0], q.shape[2], q.shape[1])
    numbers = *options.numbers(q), sequences, options.dropped(), options.sinks, 1, options.blocks(q)
    if row.kernel == "forward.sm90":
        numbers = *numbers, num_sms, torch.zeros(2, dtype=torch.int32)
    reads = emulate(library(row), calls.Forward(q, k, v, out, lse, *numbers), unwritten=(out, lse))
    # After the last tile the Hopper kernel makes an S, of what lies in shared memory, that nobody reads.
    assert not reads or row.kernel == "forward.sm90", reads
    return out, lse


def backward(
    row: config.BackwardConfig,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    dout: Tensor,
    lse: Tensor,
    dlse: Tensor | None,
    options: Options,
    sequences: calls.Ragged | None = None,
    num_sms: int = 2,
    heads_per_tile: int = 1,
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk, dv; heads_per_tile: query heads of a group that a thread block walks."""
    batch = q.shape[0] if sequences is None else sequences.batch
    shared = k.shape[2] * (heads_per_tile * k.shape[2] < q.shape[2])
    packed_k = sequences is not None and bool(sequences.given & calls.CU_SEQLENS_K)
    space = config.workspace(row, batch, q.shape[1:3], (k.shape[1], shared), packed_k)
    stats, dq_acc, dkv_acc = (torch.empty(shape) for shape in (space.stats, space.dq_acc, space.dkv_acc))
    turns, key_turns = (torch.empty(shape, dtype=torch.int32) for shape in (space.turns, space.key_turns))
    gradients = [torch.empty_like(x) for x in (q, k, v)]
    tensors = q, k, v, out, dout, lse, lse if dlse is None else dlse, stats, dq_acc, *gradients
    score, left, right = options.numbers(q)
    numbers = score, int(dlse is not None), left, right, sequences, options.dropped()
    numbers = *numbers, turns, heads_per_tile, dkv_acc, key_turns, options.blocks(q, of_keys=True)
    sms = num_sms if row.kernel == "backward.sm90" else None
    unwritten = (stats, dq_acc, dkv_acc, turns, key_turns, *gradients)
    assert not emulate(library(row), calls.Backward(*tensors, *numbers, sms), unwritten)
    return tuple(gradients)


def decode(
    row: config.Decode,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    options: Options,
    sequences: calls.Ragged,
    num_splits: int,
    fused: bool,
) -> tuple[Tensor, Tensor]:
    """out, lse"""
    out, lse = torch.empty_like(q), torch.empty(q.shape[0], q.shape[2], q.shape[1])
    workspace = torch.empty(num_splits * lse.numel() * (q.shape[-1] + 1))
    counters = torch.zeros(64, dtype=torch.int32)
    score, left, right = options.numbers(q)
    left = 1 << 20 if options.window[0] is None else left
    places = score, left, right, sequences, options.sinks
    call = calls.Decode(q, k, v, out, lse, workspace, *places, num_splits, int(fused), counters)
    assert not emulate(library(row), call, unwritten=(out, lse, workspace))
    assert not counters.any(), "the counters are zero after a launch"
    return out, lse


def append(
    row: config.KvAppend,
    k_new: Tensor,
    v_new: Tensor,
    k: Tensor,
    v: Tensor,
    sequences: calls.Ragged,
    q: Tensor | None = None,
    rotary: tuple[Tensor, Tensor] | None = None,
    advance: int = 1,
) -> Tensor | None:
    """Appends in place; returns the rotated q."""
    q_out = None if q is None else torch.empty_like(q)
    tables = None if rotary is None else calls.Rotary(*rotary)
    call = calls.Append(k_new, v_new, k, v, q, q_out, tables, advance, sequences)
    assert not emulate(library(row), call, unwritten=() if q is None else (q_out,))
    return q_out
