"""Backward: the gradients of attention, first with every matrix in memory, then tile by tile.

Given dO, the gradient of O: dV = Pᵀ·dO, dP = dO·Vᵀ, dS = P ∘ (dP - delta), dQ = dS·K, dK = dSᵀ·Q, with
delta the row sums of dO ∘ O, and dQ, dK times the softmax scale. q, k, v, dO: (batch, seqlen, heads, d),
any dtype, any lengths.
"""

import torch
from torch import Tensor

TILE_M = 128  # query rows of a tile
TILE_N = 128  # keys of a block


def forward(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Returns O and the log-sum-exp of each row, (batch, heads, queries, 1): all that backward needs of P."""
    q, k, v = (x.transpose(1, 2).float() for x in (q, k, v))  # (batch, heads, seqlen, d)
    S = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
    lse = S.logsumexp(dim=-1, keepdim=True)
    return (torch.exp(S - lse) @ v).transpose(1, 2), lse


def backward_formula(q: Tensor, k: Tensor, v: Tensor, dO: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """dQ, dK, dV as the formulas stand: P, dP and dS whole."""
    scale = q.shape[-1] ** -0.5
    q, k, v, dO = (x.transpose(1, 2) for x in (q, k, v, dO))
    P = torch.softmax(q @ k.transpose(-1, -2) * scale, dim=-1)
    dV = P.transpose(-1, -2) @ dO
    dP = dO @ v.transpose(-1, -2)
    delta = (dP * P).sum(dim=-1, keepdim=True)  # the same as the row sums of dO ∘ O
    dS = P * (dP - delta)
    return tuple(x.transpose(1, 2) for x in (dS @ k * scale, dS.transpose(-1, -2) @ q * scale, dV))


def backward_tiles(
    q: Tensor, k: Tensor, v: Tensor, O: Tensor, lse: Tensor, dO: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """dQ, dK, dV without a matrix larger than a tile: P is computed again from the log-sum-exp.

    The outer loop is what thread blocks divide: each owns a block of keys, its dK and dV. dQ has no owner:
    every block of keys adds its share to every tile of queries (atomically, on a GPU).
    """
    scale = q.shape[-1] ** -0.5
    q, k, v, O, dO = (x.transpose(1, 2).float() for x in (q, k, v, O, dO))  # (batch, heads, seqlen, d)
    delta = (dO * O).sum(dim=-1, keepdim=True)  # (batch, heads, queries, 1)
    dQ, dK, dV = (torch.zeros_like(x) for x in (q, k, v))
    for n in range(0, k.shape[2], TILE_N):
        keys = slice(n, n + TILE_N)
        for m in range(0, q.shape[2], TILE_M):
            rows = slice(m, m + TILE_M)
            S = q[:, :, rows] @ k[:, :, keys].transpose(-1, -2) * scale  # product 1, once more
            P = torch.exp(S - lse[:, :, rows])
            dP = dO[:, :, rows] @ v[:, :, keys].transpose(-1, -2)  # product 2
            dS = P * (dP - delta[:, :, rows]) * scale
            dV[:, :, keys] += P.transpose(-1, -2) @ dO[:, :, rows]  # product 3: owned
            dK[:, :, keys] += dS.transpose(-1, -2) @ q[:, :, rows]  # product 4: owned
            dQ[:, :, rows] += dS @ k[:, :, keys]  # product 5: shared
    return tuple(x.transpose(1, 2) for x in (dQ, dK, dV))
