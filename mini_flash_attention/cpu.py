"""The CPU backend: FlashAttention-2 (Dao 2023, arXiv 2307.08691) in PyTorch operations.

The readable version of the kernels: same loops, same names. A tile spans all batches and heads,
because PyTorch is at its best with large operations. The query heads that share a key head (their
number is the group) are stacked as rows, so no key is ever repeated. With h = batch * heads_k:

    gQ, gdO, acc_O                  (h, tile_m * group, head_dim)
    gK, gV, acc_dK, acc_dV          (h, tile_n, head_dim)
    acc_S, acc_P, acc_dP, acc_dS    (h, tile_m * group, tile_n)
    row_max, row_sum                (h, tile_m * group, 1)

Works on any device and any strides. Computes in float32, for float64 inputs in float64.
"""

import math

import torch
from torch import Tensor

from mini_flash_attention.kernels.blocks import key_blocks, query_blocks
from mini_flash_attention.philox import keep_mask
from mini_flash_attention.problem import Problem

INF = math.inf
# Scores in a tile: 2 MB, so that the few tiles alive at once stay in cache. 2^18 and 2^20 cost up
# to 8 % more (forward + backward, B=1, H=8, S=4096, D=64; two cores of an AMD EPYC, 32 MB of L3).
TILE_ELEMENTS = 2**19
# Shorter tiles make small products: 64 costs 29 % more (forward, B=H=16, S=512, D=128, one core).
MIN_TILE = 128


def forward(
    problem: Problem, q: Tensor, k: Tensor, v: Tensor, alibi_slopes: Tensor | None, seed: int | None
) -> tuple[Tensor, Tensor]:
    """Algorithm 1: for each query block, an online softmax over its key blocks, last to first.

    Returns:
        out: (batch, seqlen_q, heads_q, head_dim), in the dtype of q.
        lse: (batch, heads_q, seqlen_q), natural logarithm, in the dtype of the computation.
    """
    tile_m, tile_n = tile_shape(problem)
    out = q.new_empty(q.shape)
    lse = q.new_empty((problem.batch, problem.heads_q, problem.seqlen_q), dtype=compute_dtype(problem))
    for m_block in range(math.ceil(problem.seqlen_q / tile_m)):
        rows = block(m_block, tile_m, problem.seqlen_q)
        gQ = load_rows(problem, q, rows) * problem.softmax_scale
        acc_O = torch.zeros_like(gQ)
        row_max = gQ.new_full((*gQ.shape[:2], 1), -INF)
        row_sum = torch.zeros_like(row_max)

        visited = key_blocks(m_block, tile_m, tile_n, *lengths_and_window(problem))
        for n_block in reversed(range(*visited)):
            keys = block(n_block, tile_n, problem.seqlen_k)
            gK, gV = load_keys(problem, k, keys), load_keys(problem, v, keys)
            acc_S, _ = scores(problem, gQ, gK, rows, keys, alibi_slopes)

            old_max, row_max = row_max, torch.maximum(row_max, acc_S.amax(-1, keepdim=True))
            offset = row_max.masked_fill(row_max == -INF, 0)  # no key so far: not -inf - -inf
            rescale = torch.exp(old_max - offset)
            acc_P = acc_S.sub_(offset).exp_()
            row_sum.mul_(rescale).add_(acc_P.sum(-1, keepdim=True))
            if problem.dropout_p > 0:
                acc_P.mul_(kept(problem, seed, rows, keys))
            acc_O.mul_(rescale).baddbmm_(acc_P, gV)
            del acc_S, acc_P  # the next tile takes over their memory, which is still in cache

        store_rows(problem, row_max + row_sum.log(), as_column(lse), rows)
        row_sum.masked_fill_(row_sum == 0, 1)  # a row without keys, where acc_O is 0
        store_rows(problem, acc_O / (row_sum * (1 - problem.dropout_p)), out, rows)
    return out, lse


def backward(
    problem: Problem,
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    alibi_slopes: Tensor | None,
    seed: int | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Algorithm 2: for each key block, recompute P from the LSE in all query blocks that see it.

    Returns:
        dq, dk, dv: of the shapes and the dtype of q, k and v.
    """
    tile_m, tile_n = tile_shape(problem)
    lse, delta = row_statistics(problem, dout, dlse, out, lse)
    dq = q.new_zeros(q.shape, dtype=compute_dtype(problem))
    dk, dv = k.new_empty(k.shape), v.new_empty(v.shape)
    for n_block in range(math.ceil(problem.seqlen_k / tile_n)):
        keys = block(n_block, tile_n, problem.seqlen_k)
        gK, gV = load_keys(problem, k, keys), load_keys(problem, v, keys)
        acc_dK, acc_dV = torch.zeros_like(gK), torch.zeros_like(gV)

        visitors = query_blocks(n_block, tile_m, tile_n, *lengths_and_window(problem))
        for m_block in range(*visitors):
            rows = block(m_block, tile_m, problem.seqlen_q)
            gQ = load_rows(problem, q, rows) * problem.softmax_scale
            gdO = load_rows(problem, dout, rows) / (1 - problem.dropout_p)
            acc_S, tanh = scores(problem, gQ, gK, rows, keys, alibi_slopes)
            acc_P = acc_S.sub_(load_rows(problem, lse, rows)).exp_()
            acc_dP = gdO @ gV.mT
            dropped_P = acc_P
            if problem.dropout_p > 0:
                keep = kept(problem, seed, rows, keys)
                dropped_P = acc_P * keep
                acc_dP.mul_(keep)
            acc_dV.baddbmm_(dropped_P.mT, gdO)

            acc_dS = acc_dP.sub_(load_rows(problem, delta, rows)).mul_(acc_P)
            if tanh is not None:
                acc_dS.mul_(1 - tanh.square_())
            acc_dK.baddbmm_(acc_dS.mT, gQ)
            view_rows(problem, dq, rows).add_(by_head(problem, acc_dS @ gK))

        store_keys(problem, acc_dK, dk, keys)
        store_keys(problem, acc_dV, dv, keys)
    return dq.mul_(problem.softmax_scale).to(problem.dtype), dk, dv


def dropout_probabilities(
    problem: Problem, q: Tensor, k: Tensor, lse: Tensor, alibi_slopes: Tensor | None, seed: int
) -> Tensor:
    """The probabilities before dropout, negative where dropped (-0.0 too); for tests.

    Returns:
        S_dmask: (batch, heads_q, seqlen_q, seqlen_k), in the dtype of the computation.
    """
    rows, keys = slice(0, problem.seqlen_q), slice(0, problem.seqlen_k)
    gQ = load_rows(problem, q, rows) * problem.softmax_scale
    acc_S, _ = scores(problem, gQ, load_keys(problem, k, keys), rows, keys, alibi_slopes)
    lse = lse.masked_fill(lse == -INF, INF)
    acc_P = acc_S.sub_(load_rows(problem, as_column(lse), rows)).exp_()
    S_dmask = torch.where(kept(problem, seed, rows, keys), acc_P, -acc_P)
    return by_head(problem, S_dmask).transpose(2, 3).flatten(1, 2)


def row_statistics(
    problem: Problem, dout: Tensor, dlse: Tensor | None, out: Tensor, lse: Tensor
) -> tuple[Tensor, Tensor]:
    """What the backward pass must know of each row: its LSE, and delta = rowsum(dO * O) - dLSE.

    dS = P * (dP - delta): a softmax's gradient, with that of its LSE, whose derivative is P too.
    Rows that see no key get lse = +inf, so that P = exp(S - lse) is 0 and not exp(-inf + inf).

    Returns:
        lse, delta: (batch, seqlen_q, heads_q, 1).
    """
    dtype = compute_dtype(problem)
    delta = (dout.to(dtype) * out.to(dtype)).sum(-1, keepdim=True)
    if dlse is not None:
        delta -= as_column(dlse)
    lse = as_column(lse)
    empty = lse == -INF
    return lse.masked_fill(empty, INF), delta.masked_fill(empty, 0)


def scores(
    problem: Problem,
    gQ: Tensor,
    gK: Tensor,
    rows: slice,
    keys: slice,
    alibi_slopes: Tensor | None,
) -> tuple[Tensor, Tensor | None]:
    """acc_S = Q K^T with softcap, ALiBi and mask; and the softcap's tanh, which gives its slope."""
    acc_S, tanh = gQ @ gK.mT, None
    if problem.softcap > 0:
        tanh = acc_S.div_(problem.softcap).tanh_()
        acc_S = tanh * problem.softcap
    if alibi_slopes is not None:
        slopes = alibi_slopes.to(acc_S.dtype).expand(problem.batch, problem.heads_q)
        slopes = slopes.unflatten(1, (problem.heads_k, 1, problem.group, 1))
        distance = from_diagonal(problem, rows, keys, acc_S.device).abs().to(acc_S.dtype)
        by_head(problem, acc_S).sub_(slopes * distance)
    mask(problem, acc_S, rows, keys)
    return acc_S, tanh


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


def kept(problem: Problem, seed: int, rows: slice, keys: slice) -> Tensor:
    """Which elements of a score tile dropout keeps: bool (h, tile_m * group, tile_n)."""
    heads = torch.arange(problem.batch * problem.heads_q, device=problem.device)
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


def tile_shape(problem: Problem) -> tuple[int, int]:
    """(tile_m, tile_n): as large as TILE_ELEMENTS allows, but no larger than a window."""
    exponent = int(math.log2(TILE_ELEMENTS / max(1, problem.batch * problem.heads_q)))
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
    """View an LSE (batch, heads_q, seqlen_q) as q is laid out: (batch, seqlen_q, heads_q, 1)."""
    return x.mT.unsqueeze(-1)


def by_head(problem: Problem, tile: Tensor) -> Tensor:
    """View a tile (h, tile_m * group, n) as (batch, heads_k, tile_m, group, n)."""
    return tile.unflatten(0, (problem.batch, problem.heads_k)).unflatten(2, (-1, problem.group))
