"""The CPU backend: FlashAttention-2 (Dao 2023, arXiv 2307.08691) in PyTorch operations.

The readable version of the kernels: same loops, same names. A tile spans all batches and heads,
because PyTorch is at its best with large operations. The query heads that share a key head (their
number is the group) are stacked as rows, so no key is ever repeated. With h = batch * heads_k:

    gQ, gdO, acc_O                  (h, tile_m * group, head_dim)
    gK, gV, acc_dK, acc_dV          (h, tile_n, head_dim)
    acc_S, acc_P, acc_dP, acc_dS    (h, tile_m * group, tile_n)
    row_max, row_sum                (h, tile_m * group, 1)

Sequences of different lengths come one after the other, each as a dense batch of one.
Works on any device and any strides. Computes in float32, for float64 inputs in float64.
"""

import math
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mini_flash_attention.kernels.parts.blocks import key_blocks, query_blocks
from mini_flash_attention.philox import keep_mask
from mini_flash_attention.problem import Inputs, Layout, Problem
from mini_flash_attention.scores.capture import Place
from mini_flash_attention.scores.numbers import Number, is_one
from mini_flash_attention.scores.torch_numbers import TorchOps

INF = math.inf
# Scores in a tile: 2 MB, so that the few tiles alive at once stay in cache. 2^18 and 2^20 cost up
# to 8 % more (forward + backward, B=1, H=8, S=4096, D=64; two cores of an AMD EPYC, 32 MB of L3).
TILE_ELEMENTS = 2**19
# Shorter tiles make small products: 64 costs 29 % more (forward, B=H=16, S=512, D=128, one core).
MIN_TILE = 128


def forward(problem: Problem, x: Inputs, out: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Attention of all sequences.

    Args:
        out: where to write the result. It may be q.

    Returns:
        out: like q.
        lse: (batch, heads_q, seqlen_q), packed (heads_q, total_q), natural logarithm, in the dtype of
            the computation.
        Rows of packed q that belong to no sequence have out 0, lse -inf, with sinks too.
    """
    if out is None:
        out = x.q.new_empty(x.q.shape)
    of_batch = () if problem.packed_q else (problem.batch,)
    sizes = (*of_batch, problem.heads_q, problem.seqlen_q)
    lse = x.q.new_full(sizes, -INF, dtype=compute_dtype(problem))
    if x.layout is None:
        forward_dense(problem, x, 0, out, as_column(lse))
        return out, lse
    unused = torch.ones(len(out), dtype=torch.bool, device=out.device)
    for sequence in attending(problem, x.layout):
        if problem.packed_q:
            unused[sequence.rows] = False
        results = (queries_of(problem, sequence, result) for result in (out, as_column(lse)))
        forward_dense(*dense_batch(problem, x, sequence), sequence.index, *results)
    if problem.packed_q:
        out.masked_fill_(unused.view(-1, 1, 1), 0)
    return out, lse


def forward_dense(problem: Problem, x: Inputs, first: int, out: Tensor, lse: Tensor) -> None:
    """Algorithm 1: for each query block, an online softmax over its key blocks, last to first.

    Writes out (batch, seqlen_q, heads_q, head_dim) and lse (batch, seqlen_q, heads_q, 1). `first` is
    the first sequence's number in the whole batch, of which dropout is a function.
    """
    tile_m, tile_n = tile_shape(problem)
    for m_block in range(math.ceil(problem.seqlen_q / tile_m)):
        rows = block(m_block, tile_m, problem.seqlen_q)
        gQ = load_rows(problem, x.q, rows) * problem.softmax_scale
        acc_O = torch.zeros_like(gQ)
        row_max = gQ.new_full((*gQ.shape[:2], 1), -INF)
        row_sum = torch.zeros_like(row_max)

        visited = key_blocks(m_block, tile_m, tile_n, *lengths_and_window(problem))
        for n_block in reversed(range(*visited)):
            keys = block(n_block, tile_n, problem.seqlen_k)
            gK, gV = load_keys(problem, x.k, keys), load_keys(problem, x.v, keys)
            acc_S, _ = scores(problem, x, (gQ, gK), first, rows, keys)

            old_max, row_max = row_max, torch.maximum(row_max, acc_S.amax(-1, keepdim=True))
            offset = row_max.masked_fill(row_max == -INF, 0)  # no key so far: not -inf - -inf
            rescale = torch.exp(old_max - offset)
            acc_P = acc_S.sub_(offset).exp_()
            row_sum.mul_(rescale).add_(acc_P.sum(-1, keepdim=True))
            if problem.dropout_p > 0:
                acc_P.mul_(kept(problem, x.seed, first, rows, keys))
            acc_O.mul_(rescale).baddbmm_(acc_P, gV)
            del acc_S, acc_P  # the next tile takes over their memory, which is still in cache

        if x.s_aux is not None:  # one more key, whose value is 0
            sink = sinks_of_rows(problem, x.s_aux, row_max)
            old_max, row_max = row_max, torch.maximum(row_max, sink)
            offset = row_max.masked_fill(row_max == -INF, 0)
            rescale = torch.exp(old_max - offset)
            row_sum = row_sum * rescale + torch.exp(sink - offset)
            acc_O = acc_O * rescale

        store_rows(problem, row_max + row_sum.log(), lse, rows)
        row_sum.masked_fill_(row_sum == 0, 1)  # a row without keys, where acc_O is 0
        store_rows(problem, acc_O / (row_sum * (1 - problem.dropout_p)), out, rows)


def backward(
    problem: Problem, x: Inputs, out: Tensor, lse: Tensor, dout: Tensor, dlse: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of all sequences.

    Returns:
        dq, dk, dv: of the shapes and the dtype of q, k and v; 0 where these belong to no sequence.
    """
    rows = out, as_column(lse), dout, None if dlse is None else as_column(dlse)
    if x.layout is None:
        return backward_dense(problem, x, 0, *rows)
    dq, dk, dv = (tensor.new_zeros(tensor.shape) for tensor in x[:3])
    for sequence in attending(problem, x.layout):
        its_rows: Any = (None if row is None else queries_of(problem, sequence, row) for row in rows)
        gradients = backward_dense(*dense_batch(problem, x, sequence), sequence.index, *its_rows)
        queries_of(problem, sequence, dq).copy_(gradients[0])
        for of_all, gradient in zip((dk, dv), gradients[1:], strict=True):
            keys_of(problem, x.layout, sequence, of_all).copy_(gradient)
    return dq, dk, dv


def backward_dense(
    problem: Problem, x: Inputs, first: int, out: Tensor, lse: Tensor, dout: Tensor, dlse: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Algorithm 2: for each key block, recompute P from the LSE in all query blocks that see it.

    lse and dlse are (batch, seqlen_q, heads_q, 1).
    """
    tile_m, tile_n = tile_shape(problem)
    lse, delta = row_statistics(problem, dout, dlse, out, lse)
    dq = x.q.new_zeros(x.q.shape, dtype=compute_dtype(problem))
    dk, dv = x.k.new_empty(x.k.shape), x.v.new_empty(x.v.shape)
    for n_block in range(math.ceil(problem.seqlen_k / tile_n)):
        keys = block(n_block, tile_n, problem.seqlen_k)
        gK, gV = load_keys(problem, x.k, keys), load_keys(problem, x.v, keys)
        acc_dK, acc_dV = torch.zeros_like(gK), torch.zeros_like(gV)

        visitors = query_blocks(n_block, tile_m, tile_n, *lengths_and_window(problem))
        for m_block in range(*visitors):
            rows = block(m_block, tile_m, problem.seqlen_q)
            gQ = load_rows(problem, x.q, rows) * problem.softmax_scale
            gdO = load_rows(problem, dout, rows) / (1 - problem.dropout_p)
            acc_S, derivative = scores(problem, x, (gQ, gK), first, rows, keys)
            acc_P = acc_S.sub_(load_rows(problem, lse, rows)).exp_()
            acc_dP = gdO @ gV.mT
            dropped_P = acc_P
            if problem.dropout_p > 0:
                keep = kept(problem, x.seed, first, rows, keys)
                dropped_P = acc_P * keep
                acc_dP.mul_(keep)
            acc_dV.baddbmm_(dropped_P.mT, gdO)

            acc_dS = acc_dP.sub_(load_rows(problem, delta, rows)).mul_(acc_P)
            if derivative is not None:
                acc_dS.mul_(derivative)
            acc_dK.baddbmm_(acc_dS.mT, gQ)
            view_rows(problem, dq, rows).add_(by_head(problem, acc_dS @ gK))

        store_keys(problem, acc_dK, dk, keys)
        store_keys(problem, acc_dV, dv, keys)
    return dq.mul_(problem.softmax_scale).to(problem.dtype), dk, dv


def dropout_probabilities(problem: Problem, x: Inputs, lse: Tensor) -> Tensor:
    """The probabilities before dropout, negative where dropped (-0.0 too); for tests.

    Returns:
        S_dmask: (batch, heads_q, seqlen_q, seqlen_k), in the dtype of the computation. Of packed
            sequences these are the largest lengths, and elements beyond a sequence's own are 0.
    """
    lse = as_column(lse)
    if x.layout is None:
        return probabilities_dense(problem, x, 0, lse)
    every = sequences(problem, x.layout)
    seqlen_q = max((sequence.rows.stop - sequence.rows.start for sequence in every), default=0)
    seqlen_k = max((sequence.keys.stop - sequence.keys.start for sequence in every), default=0)
    S_dmask = lse.new_zeros((problem.batch, problem.heads_q, seqlen_q, seqlen_k))
    for sequence in attending(problem, x.layout):
        alone, its = dense_batch(problem, x, sequence)
        its_S = probabilities_dense(alone, its, sequence.index, queries_of(problem, sequence, lse))
        S_dmask[sequence.index, :, : alone.seqlen_q, : alone.seqlen_k] = its_S[0]
    return S_dmask


def probabilities_dense(problem: Problem, x: Inputs, first: int, lse: Tensor) -> Tensor:
    rows, keys = slice(0, problem.seqlen_q), slice(0, problem.seqlen_k)
    gQ = load_rows(problem, x.q, rows) * problem.softmax_scale
    acc_S, _ = scores(problem, x, (gQ, load_keys(problem, x.k, keys)), first, rows, keys)
    lse = lse.masked_fill(lse == -INF, INF)
    acc_P = acc_S.sub_(load_rows(problem, lse, rows)).exp_()
    S_dmask = torch.where(kept(problem, x.seed, first, rows, keys), acc_P, -acc_P)
    return by_head(problem, S_dmask).transpose(2, 3).flatten(1, 2)


class Sequence(NamedTuple):
    """Where one sequence of a ragged batch lies."""

    index: int  # type: ignore[assignment]  # in the batch; no tuple.index here
    rows: slice  # of packed q; of q[index]
    storage: int  # the row of k and v, or of the block table, that holds its keys; 0 if they are packed
    keys: slice  # tokens of its storage; of packed k


def sequences(problem: Problem, layout: Layout) -> list[Sequence]:
    """All sequences, cut to what the tensors hold, as in kernels/parts/seqlen.py."""
    starts_q, starts_k, used, leftpad, storage = (None if x is None else x.tolist() for x in layout[:5])
    if layout.keys is not None:
        used = [layout.keys] * problem.batch
    found = []
    for b in range(problem.batch):
        rows = interval(starts_q, b, problem.seqlen_q)
        keys = interval(starts_k, b, problem.seqlen_k)
        start, end = keys.start, keys.stop
        if used is not None:
            end = clamp(start + used[b], start, end)
        if leftpad is not None:
            start = clamp(start + leftpad[b], start, end)
        row = 0 if problem.packed_k else b if storage is None else storage[b]
        found.append(Sequence(b, rows, row, slice(start, end)))
    return found


def attending(problem: Problem, layout: Layout) -> list[Sequence]:
    """The sequences that have queries: of the others no key is read, and no page need exist."""
    return [one for one in sequences(problem, layout) if one.rows.start < one.rows.stop]


def interval(starts: list[int] | None, b: int, total: int) -> slice:
    """Sequence b of packed ones; without `starts`, one of `total` tokens."""
    if starts is None:
        return slice(0, total)
    start = clamp(starts[b], 0, total)
    return slice(start, clamp(starts[b + 1], start, total))


def clamp(x: int, low: int, high: int) -> int:
    return max(low, min(x, high))


def dense_batch(problem: Problem, x: Inputs, sequence: Sequence) -> tuple[Problem, Inputs]:
    """One sequence as a dense batch of one."""
    q = queries_of(problem, sequence, x.q)
    k, v = (keys_of(problem, x.layout, sequence, tensor) for tensor in (x.k, x.v))
    alone = replace(problem, batch=1, seqlen_q=q.shape[1], seqlen_k=k.shape[1])
    return alone, x._replace(q=q, k=k, v=v, layout=None)


def queries_of(problem: Problem, sequence: Sequence, x: Tensor) -> Tensor:
    """View a sequence's rows of x, which is laid out as q is, as (1, seqlen_q, heads_q, n)."""
    return x[sequence.rows].unsqueeze(0) if problem.packed_q else x[sequence.index].unsqueeze(0)


def keys_of(problem: Problem, layout: Layout, sequence: Sequence, x: Tensor) -> Tensor:
    """A sequence's keys of x, k or v, as (1, seqlen_k, heads_k, head_dim): a view, or a copy of pages."""
    if problem.packed_k:
        return x[sequence.keys].unsqueeze(0)
    if not problem.page_size:
        return x[clamp(sequence.storage, 0, len(x) - 1), sequence.keys].unsqueeze(0)
    first, last = sequence.keys.start // problem.page_size, -(-sequence.keys.stop // problem.page_size)
    table = layout.block_table
    pages = table[clamp(sequence.storage, 0, len(table) - 1), first:last]  # what is not used is not read
    tokens = x[pages.clamp(0, len(x) - 1)].flatten(0, 1)
    start = sequence.keys.start - first * problem.page_size
    return tokens[start : start + sequence.keys.stop - sequence.keys.start].unsqueeze(0)


def row_statistics(
    problem: Problem, dout: Tensor, dlse: Tensor | None, out: Tensor, lse: Tensor
) -> tuple[Tensor, Tensor]:
    """What the backward pass must know of each row: its LSE, and delta = rowsum(dO * O) - dLSE.

    dS = P * (dP - delta): a softmax's gradient, with that of its LSE, whose derivative is P too.
    Rows that see no key and no sink get lse = +inf, so that P = exp(S - lse) is 0 and not exp(-inf + inf).

    Everything is (batch, seqlen_q, heads_q, 1), but dout and out, which have head_dim elements there.
    """
    dtype = compute_dtype(problem)
    delta = (dout.to(dtype) * out.to(dtype)).sum(-1, keepdim=True)
    if dlse is not None:
        delta -= dlse
    empty = lse == -INF
    return lse.masked_fill(empty, INF), delta.masked_fill(empty, 0)


def sinks_of_rows(problem: Problem, s_aux: Tensor, like: Tensor) -> Tensor:
    """s_aux (heads_q) as a tile (h, tile_m * group, 1), like the one given."""
    sinks = s_aux.to(like.dtype).view(problem.heads_k, 1, problem.group, 1)
    return sinks.expand_as(by_head(problem, like)).flatten(2, 3).flatten(0, 1)


def scores(
    problem: Problem, x: Inputs, tiles: tuple[Tensor, Tensor], first: int, rows: slice, keys: slice
) -> tuple[Tensor, Tensor | None]:
    """acc_S = Q K^T after its functions and the mask; and the functions' derivative, None where it is 1.

    tiles: gQ, gK. first: the number of the first sequence.
    """
    gQ, gK = tiles
    acc_S, derivative = gQ @ gK.mT, None
    if problem.scoring:
        S = by_head(problem, acc_S)
        result = transformed(problem, x, S, first, rows, keys)
        acc_S = whole(result.x, S).view(acc_S.shape)
        if not is_one(result.dx):
            derivative = whole(0.0 if result.dx is None else result.dx, S).view(acc_S.shape)
    mask(problem, acc_S, rows, keys)
    if derivative is not None:
        derivative = derivative.masked_fill(acc_S == -INF, 0)  # else 0 · NaN, if it is one there
    return acc_S, derivative


def whole(x: Tensor | float, S: Tensor) -> Tensor:
    """x in the shape and dtype of S, in memory of its own: what is captured is not written to."""
    x = torch.as_tensor(x, dtype=S.dtype, device=S.device)
    return x.contiguous() if x.shape == S.shape else torch.empty_like(S).copy_(x)


def transformed(problem: Problem, x: Inputs, S: Tensor, first: int, rows: slice, keys: slice) -> Number:
    """What becomes of scores (batch, heads_k, tile_m, group, tile_n)."""
    device = S.device
    batch = torch.arange(first, first + problem.batch, device=device).view(-1, 1, 1, 1, 1)
    head = torch.arange(problem.heads_q, device=device).view(1, problem.heads_k, 1, problem.group, 1)
    q_idx = torch.arange(rows.start, rows.stop, device=device).view(-1, 1, 1)
    kv_idx = torch.arange(keys.start, keys.stop, device=device)
    captured: list[float | Tensor] = [problem.softcap] if problem.softcap else []
    if x.alibi_slopes is not None:  # of all sequences, as batch counts them
        slopes = x.alibi_slopes
        captured.append(slopes if slopes.ndim == 2 else slopes.expand(max(first + problem.batch, 1), -1))
    ops = TorchOps(S.dtype, device)
    place = Place(batch, head, q_idx, kv_idx, problem.seqlen_q, problem.seqlen_k)
    return problem.scoring.apply(ops, [*captured, *x.captured], Number(ops, S, 1.0), place)


def mask(problem: Problem, acc_S: Tensor, rows: slice, keys: slice) -> None:
    """acc_S <- -inf outside the window. Most tiles lie inside: those that do are left alone."""
    left = INF if problem.window_left is None else problem.window_left
    right = INF if problem.window_right is None else problem.window_right
    diagonal = problem.seqlen_k - problem.seqlen_q
    farthest_left = keys.start - (rows.stop - 1 + diagonal)  # the last row's first key
    farthest_right = keys.stop - 1 - (rows.start + diagonal)  # the first row's last key
    if farthest_left < -left or farthest_right > right:
        distance = from_diagonal(problem, rows, keys, acc_S.device)
        by_head(problem, acc_S).masked_fill_((distance < -left) | (distance > right), -INF)


def from_diagonal(problem: Problem, rows: slice, keys: slice, device: torch.device) -> Tensor:
    """How far right of each row's diagonal each key lies: (tile_m, 1 for the group, tile_n)."""
    i = torch.arange(rows.start, rows.stop, device=device)[:, None, None]
    j = torch.arange(keys.start, keys.stop, device=device)
    return j - (i + problem.seqlen_k - problem.seqlen_q)


def kept(problem: Problem, seed: int | Tensor, first: int, rows: slice, keys: slice) -> Tensor:
    """Which elements of a score tile dropout keeps: bool (h, tile_m * group, tile_n)."""
    heads = first * problem.heads_q + torch.arange(problem.batch * problem.heads_q, device=problem.device)
    i = torch.arange(rows.start, rows.stop, device=problem.device)
    return keep_mask(
        seed,
        problem.dropout_p,
        heads.view(-1, 1, problem.group),
        i.unsqueeze(-1),
        range(keys.start, keys.stop),
    ).flatten(1, 2)


def compute_dtype(problem: Problem) -> torch.dtype:
    return torch.float64 if problem.dtype == torch.float64 else torch.float32


def tile_shape(problem: Problem, elements: int = TILE_ELEMENTS) -> tuple[int, int]:
    """(tile_m, tile_n): as large as so many scores allow, but no larger than a window."""
    exponent = int(math.log2(elements / max(1, problem.batch * problem.heads_q)))
    tile_m, tile_n = 2 ** -(-exponent // 2), 2 ** (exponent // 2)
    if problem.window_left is not None and problem.window_right is not None:
        window = problem.window_left + problem.window_right + 1
        tile_m, tile_n = min(tile_m, window), min(tile_n, window)
    return max(tile_m, MIN_TILE), max(tile_n, MIN_TILE)


def lengths_and_window(problem: Problem) -> tuple[int, int, int | None, int | None]:
    return problem.seqlen_q, problem.seqlen_k, problem.window_left, problem.window_right


def block(index: int, tile: int, seqlen: int) -> slice:
    """Rows or keys of a block; the last one may be shorter."""
    return slice(index * tile, min((index + 1) * tile, seqlen))


def load_rows(problem: Problem, x: Tensor, rows: slice) -> Tensor:
    """Rows of x (batch, seqlen_q, heads_q, n) as a tile (h, tile_m * group, n)."""
    return load(problem, view_rows(problem, x, rows)).flatten(2, 3).flatten(0, 1)


def store_rows(problem: Problem, tile: Tensor, x: Tensor, rows: slice) -> None:
    view_rows(problem, x, rows).copy_(by_head(problem, tile))


def load_keys(problem: Problem, x: Tensor, keys: slice) -> Tensor:
    """Keys of x (batch, seqlen_k, heads_k, head_dim) as a tile (h, tile_n, head_dim)."""
    return load(problem, x[:, keys].transpose(1, 2)).flatten(0, 1)


def store_keys(problem: Problem, tile: Tensor, x: Tensor, keys: slice) -> None:
    x[:, keys].transpose(1, 2).copy_(tile.unflatten(0, (problem.batch, problem.heads_k)))


def load(problem: Problem, x: Tensor) -> Tensor:
    """x in the dtype of the computation and, where that needs a copy, contiguous."""
    return x.to(compute_dtype(problem), memory_format=torch.contiguous_format)


def view_rows(problem: Problem, x: Tensor, rows: slice) -> Tensor:
    """View rows of x (batch, seqlen_q, heads_q, n) as (batch, heads_k, tile_m, group, n)."""
    return x[:, rows].unflatten(2, (problem.heads_k, problem.group)).transpose(1, 2)


def as_column(x: Tensor) -> Tensor:
    """View an LSE (batch, heads_q, seqlen_q) or (heads_q, total_q) as q is laid out, with one element."""
    return x.mT.unsqueeze(-1)


def by_head(problem: Problem, tile: Tensor) -> Tensor:
    """View a tile (h, tile_m * group, n) as (batch, heads_k, tile_m, group, n)."""
    return tile.unflatten(0, (problem.batch, problem.heads_k)).unflatten(2, (-1, problem.group))
