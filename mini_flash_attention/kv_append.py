"""New keys and values go into a cache: rotary embedding and in-place append, in PyTorch operations.

Runs on any device without waiting for it, because lengths and block tables stay tensors: the way of the CPU
backend, and of a GPU where its kernel, which copies 16 bytes at a time, can't.
"""

import torch
from torch import Tensor

from mini_flash_attention.problem import CacheUpdate, Inputs, Layout, Problem


def append(problem: Problem, x: Inputs, update: CacheUpdate) -> Inputs:
    """Write update.k and update.v behind the keys of each sequence in x.k and x.v, new keys rotated.

    A token that would lie outside the cache (beyond its capacity, in a page or a row that does not
    exist) is not written.

    Returns:
        x with q rotated as update says, and with a layout whose lengths count the new keys.
    """
    before = lengths(problem, x.layout)
    starts = before.unsqueeze(1)
    tokens = starts + torch.arange(update.added, device=x.q.device)  # (batch, seqlen_new)
    q, k = x.q, update.k
    if update.rotary_cos is not None:
        k = rotate(k, update, tokens)
        q = rotate(q, update, query_positions(problem, starts))
    if tokens.numel() > 0 and problem.seqlen_k > 0:
        places = destinations(problem, x.layout, tokens, x.k)
        write(x.k, k, *places)
        write(x.v, update.v, *places)
    layout = x.layout._replace(seqused_k=before + update.added, keys=None)
    return x._replace(q=q, layout=layout)


def lengths(problem: Problem, layout: Layout) -> Tensor:
    """The keys of each sequence before the append: (batch), int64."""
    if layout.seqused_k is not None:
        return layout.seqused_k.long()
    return torch.full((problem.batch,), layout.keys, device=problem.device)


def query_positions(problem: Problem, starts: Tensor) -> Tensor:
    """At which positions the queries are rotated; (batch, seqlen_q).

    With a window each has a position of its own. Without one all count as the next token, as in flash_attn.
    """
    offsets = torch.arange(problem.seqlen_q, device=starts.device)
    return starts + (offsets if problem.windowed else torch.zeros_like(offsets))


def rotate(x: Tensor, update: CacheUpdate, positions: Tensor) -> Tensor:
    """Rotary embedding (Su et al. 2021, arXiv 2104.09864) of the first rotary_dim elements of each head.

    Args:
        x: (batch, seqlen, heads, head_dim).
        positions: (batch, seqlen), rows of the rotary tables.
    """
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    positions = positions.clamp(0, len(update.rotary_cos) - 1)
    cos, sin = (table[positions].unsqueeze(2).to(dtype) for table in (update.rotary_cos, update.rotary_sin))
    rotary_dim = 2 * cos.shape[-1]
    turned = x[..., :rotary_dim].to(dtype)
    a, b = turned.unflatten(-1, (-1, 2)).unbind(-1) if update.interleaved else turned.chunk(2, dim=-1)
    pair = a * cos - b * sin, a * sin + b * cos
    turned = torch.stack(pair, dim=-1).flatten(-2) if update.interleaved else torch.cat(pair, dim=-1)
    return torch.cat((turned.to(x.dtype), x[..., rotary_dim:]), dim=-1)


def destinations(
    problem: Problem, layout: Layout, tokens: Tensor, cache: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Where tokens (batch, seqlen_new) of the sequences lie: cache[block, offset], if that exists."""
    block = (
        torch.arange(problem.batch, device=tokens.device) if layout.batch_idx is None else layout.batch_idx
    )
    block = block.long().unsqueeze(1).expand_as(tokens)
    exists, offset = within(tokens, problem.seqlen_k), tokens
    if layout.block_table is not None:
        rows, pages = layout.block_table.shape
        exists = exists & within(block, rows)
        page, offset = tokens // problem.page_size, tokens % problem.page_size
        block = layout.block_table[block.clamp(0, rows - 1), page.clamp(0, pages - 1)].long()
    return block, offset, exists & within(block, len(cache))


def within(index: Tensor, size: int) -> Tensor:
    return (index >= 0) & (index < size)


def write(cache: Tensor, x: Tensor, block: Tensor, offset: Tensor, exists: Tensor) -> None:
    """cache[block, offset] <- x where that place exists; all are (batch, seqlen_new) and more in x.

    To leave a token out without knowing here which one, it repeats the write of one that has a place,
    or where none has, the element that is in place 0 already.
    """
    block, offset, exists, x = (t.flatten(0, 1) for t in (block, offset, exists, x))
    some, one = exists.any(), exists.int().argmax()
    source = torch.where(exists, torch.arange(len(x), device=x.device), one)
    place = tuple(torch.where(some, index[source], 0) for index in (block, offset))
    cache.index_put_(place, torch.where(some, x[source], cache[0, 0]))
