"""Mask functions that many models need, and how to combine mask functions.

Each of them returns a plain function mask_mod(batch, head, q_idx, kv_idx), True where a query sees a key. As
in FlexAttention q_idx and kv_idx count from 0, whatever the lengths. `offset` moves the queries: it is the
number of keys before query 0, seqlen_k - seqlen_q where the queries are the newest tokens of a cache.

A mask function is evaluated on tensors of indices that broadcast, and traced into kernels on numbers: so it
uses operators alone, and reads tensors by one index a dimension. It is fastest where each side of a
comparison depends on the query alone or on the key alone.
"""

import functools
from collections.abc import Callable, Sequence
from numbers import Integral
from typing import Any

import torch
from torch import Tensor

from mini_flash_attention import checks

MaskMod = Callable[[Any, Any, Any, Any], Any]  # (batch, head, q_idx, kv_idx) -> bool

MAX_NUMBER = 2**30  # so that its sum with an index is an int32


def causal(offset: int = 0) -> MaskMod:
    """A query sees itself and the keys before it.

    Args:
        offset: the keys before query 0. seqlen_k - seqlen_q is what `causal=True` does in flash_attn_func.
    """
    offset = _integer("offset", offset, -MAX_NUMBER)

    def causal_mask(batch, head, q_idx, kv_idx):
        return kv_idx <= q_idx + offset

    return causal_mask


def sliding_window(left: int | None, right: int | None, offset: int = 0) -> MaskMod:
    """A query sees itself, `left` keys before it and `right` keys behind it, as by `window_size`.

    Args:
        left, right: in keys; None or -1: no limit.
        offset: the keys before query 0. seqlen_k - seqlen_q is what `window_size` does in flash_attn_func.
    """
    offset = _integer("offset", offset, -MAX_NUMBER)
    sides = []
    if left not in (None, -1):
        before = _integer("left", left, 0) - offset

        def left_mask(batch, head, q_idx, kv_idx):
            return kv_idx >= q_idx - before

        sides.append(left_mask)
    if right not in (None, -1):
        after = _integer("right", right, 0) + offset

        def right_mask(batch, head, q_idx, kv_idx):
            return kv_idx <= q_idx + after

        sides.append(right_mask)

    def every_mask(batch, head, q_idx, kv_idx):
        return kv_idx >= 0

    return and_masks(*sides) if sides else every_mask


def prefix_lm(prefix: int | Tensor, offset: int = 0) -> MaskMod:
    """Every query sees the prefix, and behind it what comes before it.

    Args:
        prefix: the length of the prefix in keys, one for all sequences, or an integer tensor (batch,).
        offset: the keys before query 0.
    """
    offset = _integer("offset", offset, -MAX_NUMBER)
    if isinstance(prefix, Tensor):
        lengths = _integers("prefix", prefix, "batch")

        def prefix_mask(batch, head, q_idx, kv_idx):
            return (kv_idx < lengths[batch]) | (kv_idx <= q_idx + offset)

        return prefix_mask
    length = _integer("prefix", prefix, 0)

    def one_prefix_mask(batch, head, q_idx, kv_idx):
        return (kv_idx < length) | (kv_idx <= q_idx + offset)

    return one_prefix_mask


def documents(*, cu_seqlens: Tensor | Sequence[int] | None = None, ids: Tensor | None = None) -> MaskMod:
    """A query sees the keys of its own document: several documents in one sequence, seqlen_q = seqlen_k.

    Args:
        cu_seqlens: (documents + 1,), where they start and end: document d is tokens cu_seqlens[d] to
            cu_seqlens[d + 1]. It must start with 0 and end with seqlen. On a GPU this waits for the device.
        ids: (seqlen,), or (batch, seqlen): a number for each token. Tokens of equal number see each other.

    Raises:
        TypeError, ValueError: not exactly one of the two is given, or it is wrong.
    """
    checks.require((cu_seqlens is None) != (ids is None), "documents takes either cu_seqlens or ids")
    if ids is not None:
        number = _integers("ids", ids, "seqlen", "batch, seqlen")
    else:
        starts = _integers("cu_seqlens", torch.as_tensor(cu_seqlens), "documents + 1")
        checks.require(len(starts) > 0, "cu_seqlens must have documents + 1 elements, not 0")
        if checks.of_values(starts):
            good = bool(starts[0] == 0) and bool((starts.diff() >= 0).all())
            checks.require(good, f"cu_seqlens must start with 0 and must not decrease: {starts.tolist()}")
        tokens = torch.arange(int(starts[-1]), dtype=torch.int32, device=starts.device)
        number = torch.bucketize(tokens, starts[1:], out_int32=True, right=True)

    def document_mask(batch, head, q_idx, kv_idx):
        return number[q_idx] == number[kv_idx]

    def document_of_batch_mask(batch, head, q_idx, kv_idx):
        return number[batch, q_idx] == number[batch, kv_idx]

    return document_mask if number.ndim == 1 else document_of_batch_mask


def tree(parents: Tensor | Sequence[int], context: int = 0) -> MaskMod:
    """Speculative decoding: a query sees itself, its ancestors in a tree of drafted tokens, and the context.

    The queries are the tree's nodes, the keys are the context's and then the nodes': seqlen_q = nodes,
    seqlen_k = context + nodes. It reads a table of seqlen_q x seqlen_k bytes.

    Args:
        parents: (nodes,), or (batch, nodes): the parent of each node, -1 for a root. In any order.
        context: keys before the tree that every query sees.

    Raises:
        TypeError, ValueError: parents or context is wrong; on a GPU the values of parents are checked with
            MINI_FLASH_ATTENTION_CHECK=1 alone.
    """
    context = _integer("context", context, 0)
    parents = _integers("parents", torch.as_tensor(parents), "nodes", "batch, nodes")
    reached = _ancestors(parents.view(-1, parents.shape[-1]))
    seen = torch.cat((reached.new_ones(*reached.shape[:2], context), reached), dim=2)
    tree_of = index_into(len(seen) if parents.ndim == 2 else 1)

    def tree_mask(batch, head, q_idx, kv_idx):
        return seen[tree_of(batch), q_idx, kv_idx]

    return tree_mask


def _ancestors(parents: Tensor) -> Tensor:
    """Of each node: itself and its ancestors, bool (trees, nodes, nodes)."""
    nodes = parents.shape[1]
    each = torch.arange(nodes, dtype=torch.int32, device=parents.device)
    link = parents.unsqueeze(2) == each
    reached = link | (each.unsqueeze(1) == each)
    for _ in range(max(nodes - 1, 0).bit_length()):  # steps of 1, 2, 4 ... up the tree
        reached = reached.float() @ reached.float() > 0
    if checks.of_values(parents):
        in_range = bool(((parents >= -1) & (parents < nodes)).all())
        checks.require(in_range, f"parents must be in -1 to {nodes - 1}, nodes - 1")
        cycle = bool((reached.mT & link).any())
        checks.require(not cycle, "parents must be a tree, but a node is its own ancestor")
    return reached


def dilated(step: int, offset: int = 0) -> MaskMod:
    """A query sees every step-th key, on both sides of it, itself among them.

    Args:
        step: the distance of the keys that it sees, at least 1.
        offset: the keys before query 0.
    """
    step = _integer("step", step, 1)
    offset = _integer("offset", offset, 0)

    def dilated_mask(batch, head, q_idx, kv_idx):
        return (q_idx + offset) % step == kv_idx % step

    return dilated_mask


def block_diagonal(size: int, offset: int = 0) -> MaskMod:
    """A query sees the keys of its own block: tokens 0 to size - 1, size to 2 size - 1, and so on.

    Args:
        size: tokens in a block, at least 1. It has nothing to do with the block_size of a BlockMask.
        offset: the keys before query 0.
    """
    size = _integer("size", size, 1)
    offset = _integer("offset", offset, 0)

    def block_diagonal_mask(batch, head, q_idx, kv_idx):
        return (q_idx + offset) // size == kv_idx // size

    return block_diagonal_mask


def and_masks(*masks: MaskMod) -> MaskMod:
    """What all of the mask functions show."""
    return functools.reduce(_both, _functions(masks))


def or_masks(*masks: MaskMod) -> MaskMod:
    """What any of the mask functions shows."""
    return functools.reduce(_either, _functions(masks))


def not_mask(mask: MaskMod) -> MaskMod:
    """What the mask function hides. It must not return Python's True or False, whose ~ is a number."""
    (mask,) = _functions((mask,))

    def negated(batch, head, q_idx, kv_idx):
        return ~mask(batch, head, q_idx, kv_idx)

    return negated


def _both(first: MaskMod, second: MaskMod) -> MaskMod:
    def both(batch, head, q_idx, kv_idx):
        return first(batch, head, q_idx, kv_idx) & second(batch, head, q_idx, kv_idx)

    return both


def _either(first: MaskMod, second: MaskMod) -> MaskMod:
    def either(batch, head, q_idx, kv_idx):
        return first(batch, head, q_idx, kv_idx) | second(batch, head, q_idx, kv_idx)

    return either


def index_into(size: int) -> Callable[[Any], Any]:
    """Of an index: itself, or 0 where a tensor's dimension has size 1, and is for all."""

    def itself(index):
        return index

    def the_only_one(index):
        return 0

    return the_only_one if size == 1 else itself


def _functions(masks: tuple[MaskMod, ...]) -> tuple[MaskMod, ...]:
    checks.require(len(masks) > 0, "at least one mask function is needed")
    for mask in masks:
        message = (
            f"a mask function must be callable, not {type(mask).__name__}; BlockMasks combine by &, |, ~"
        )
        checks.require(callable(mask), message, TypeError)
    return masks


def _integer(name: str, value: int, least: int) -> int:
    checks.require(
        isinstance(value, Integral), f"{name} must be an int, not {type(value).__name__}", TypeError
    )
    in_range = least <= value <= MAX_NUMBER
    checks.require(in_range, f"{name} must be in {least} to {MAX_NUMBER}, not {value}")
    return int(value)


def _integers(name: str, x: Tensor, *dims: str) -> Tensor:
    """An integer tensor of the dimensions that one of `dims` gives, as int32."""
    shape, dtype, _ = checks.facts(name, x)
    whole = not (dtype.is_floating_point or dtype.is_complex or dtype == torch.bool)
    checks.require(whole, f"{name} must hold integers, not {dtype}", TypeError)
    allowed = " or ".join(f"({one})" for one in dims)
    fits = len(shape) in [one.count(",") + 1 for one in dims]
    checks.require(fits, f"{name} must have shape {allowed}, not {tuple(shape)}")
    return x.to(torch.int32).contiguous()
