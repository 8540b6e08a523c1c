"""Decode: one query, many keys. Splits of the keys, each by itself, merged by their log-sum-exps.

q: (batch, 1 or a few, heads, d); k, v: (batch, seqlen, heads_k, d), heads_k a divisor of heads; any dtype.
"""

import torch
from torch import Tensor


def attend(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """O of these keys alone, normalised, and their log-sum-exp: (batch, heads, queries, d) and (..., 1).

    Query heads that share a key head are rows of one product: K and V are read once for all of them.
    """
    batch, queries, heads, d = q.shape
    group = heads // k.shape[2]
    q, k, v = (x.transpose(1, 2).float() for x in (q, k, v))  # (batch, heads, seqlen, d)
    q = q.reshape(batch, heads // group, group * queries, d)  # (batch, heads_k, rows, d)
    S = q @ k.transpose(-1, -2) * d**-0.5
    lse = S.logsumexp(dim=-1, keepdim=True)
    O = torch.exp(S - lse) @ v
    return O.reshape(batch, heads, queries, d), lse.reshape(batch, heads, queries, 1)


def merge(parts: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """O and log-sum-exp over all splits: each O counts by its share of the sum of exponentials."""
    O, lse = (torch.stack(x) for x in zip(*parts, strict=True))  # (splits, batch, heads, queries, d or 1)
    total = lse.logsumexp(dim=0)
    return (torch.exp(lse - total) * O).sum(dim=0), total


def attention(q: Tensor, k: Tensor, v: Tensor, splits: int) -> Tensor:
    """Returns O, (batch, queries, heads, d). Splits are independent: on a GPU, thread blocks of their own."""
    parts = zip(k.tensor_split(splits, dim=1), v.tensor_split(splits, dim=1), strict=True)
    O, _ = merge([attend(q, *part) for part in parts])
    return O.transpose(1, 2).to(q.dtype)


def num_splits(batch: int, heads_k: int, seqlen: int, num_sms: int = 132, block: int = 128) -> int:
    """As many as give each SM one thread block, while each has a block of keys."""
    return max(1, min(num_sms // (batch * heads_k), seqlen // block))
