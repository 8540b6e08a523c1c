"""The gradient of attention sinks, in PyTorch operations, for all backends."""

import math

import torch
from torch import Tensor


def gradient(s_aux: Tensor, out: Tensor, lse: Tensor, dout: Tensor | None, dlse: Tensor | None) -> Tensor:
    """ds_aux, in the dtype of s_aux.

    A sink is a key of its own: a score a with P = exp(a - LSE), and the value 0. As for any score, dS =
    P * (dP - delta) with delta = rowsum(dO * O) - dLSE; here dP, its value's part, is 0. Summed over the rows
    of a head. With dropout too, which drops no sink: then O is what delta needs.

    Args:
        s_aux: (heads,).
        out, dout: (..., seqlen_q, heads, head_dim); dout: None is 0.
        lse, dlse: (..., heads, seqlen_q), in the dtype of the computation; dlse: None is 0.
    """
    delta = torch.zeros_like(lse)
    if dout is not None:
        delta = (dout.to(lse.dtype) * out).sum(-1).mT
    if dlse is not None:
        delta = delta - dlse
    # Rows that are in no sequence have an LSE of -inf, as those without keys whose sink is -inf: P is 0.
    empty = lse == -math.inf
    P = (s_aux.to(lse.dtype).unsqueeze(-1) - lse.masked_fill(empty, math.inf)).exp()
    ds = P * delta.masked_fill(empty, 0)
    return -ds.sum(-1).reshape(-1, len(s_aux)).sum(0).to(s_aux.dtype)
