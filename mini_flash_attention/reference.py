"""The oracle: attention as the formula says it, softmax(QK^T)V, with every matrix in memory.

Slow and large on purpose; autograd gives its gradients. Every backend is judged against it.
"""

from collections.abc import Callable

import torch
from torch import Tensor


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    softmax_scale: float | None = None,
    window_left: int | None = None,
    window_right: int | None = None,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    score_mod: Callable[..., Tensor] | None = None,
    mask_mod: Callable[..., Tensor] | None = None,
    first: int = 0,
    s_aux: Tensor | None = None,
    dropout_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """softmax(QK^T)V (Vaswani et al. 2017, section 3.2.1), differentiable in q, k, v and s_aux.

    Args:
        q: (batch, seqlen_q, heads_q, head_dim).
        k, v: (batch, seqlen_k, heads_k, head_dim); heads_q is a multiple of heads_k.
        softmax_scale: factor on QK^T; head_dim ** -0.5 by default.
        window_left, window_right: how many keys row i sees left and right of the diagonal,
            j = i + seqlen_k - seqlen_q. None is no limit; causal is window_right=0.
        softcap: if above 0, scores are squashed to softcap * tanh(scores / softcap).
        alibi_slopes: (heads_q,) or (batch, heads_q); -slope * (distance from the diagonal) is
            added to the scores, after the softcap.
        score_mod: score_mod(score, batch, head, q_idx, kv_idx) returns what becomes of a score after that, of
            tensors that broadcast to (batch, heads_q, seqlen_q, seqlen_k).
        mask_mod: mask_mod(batch, head, q_idx, kv_idx) returns whether a query sees a key.
        first: the batch of the first sequence, for these two.
        s_aux: (heads_q,): sinks, one more score of each row, as it is, whose value is 0.
        dropout_mask: bool (batch, heads_q, seqlen_q, seqlen_k), True where a probability is kept.
        dropout_p: those kept are divided by 1 - dropout_p.
        dtype: of the whole computation and of the results; that of q by default.

    Returns:
        out: (batch, seqlen_q, heads_q, head_dim).
        lse: (batch, heads_q, seqlen_q), natural log-sum-exp of the scores, the sink's among them, before
            dropout.
        A row that sees no key has out 0, lse -inf or the sink, and gives q, k and v no gradient.
    """
    dtype = dtype or q.dtype
    group = q.shape[2] // k.shape[2]
    scale = q.shape[3] ** -0.5 if softmax_scale is None else softmax_scale
    q = q.to(dtype).transpose(1, 2)  # (batch, heads_q, seqlen_q, head_dim)
    k, v = (x.to(dtype).transpose(1, 2).repeat_interleave(group, dim=1) for x in (k, v))

    scores = (q * scale) @ k.transpose(2, 3)  # (batch, heads_q, seqlen_q, seqlen_k)
    if softcap > 0:
        scores = softcap * torch.tanh(scores / softcap)
    distance = _distance_from_diagonal(q.shape[2], k.shape[2], q.device)
    if alibi_slopes is not None:
        slopes = alibi_slopes.to(dtype).reshape(-1, q.shape[1], 1, 1)
        scores = scores - slopes * distance.abs()
    hidden = _outside_window(distance, window_left, window_right)
    sizes = enumerate(((first, first + len(q)), (0, q.shape[1]), (0, q.shape[2]), (0, k.shape[2])))
    place = [torch.arange(*ends, device=q.device).view(-1, *[1] * (3 - i)) for i, ends in sizes]
    if score_mod is not None:
        new = torch.as_tensor(score_mod(scores, *place), dtype=dtype, device=q.device)
        scores = new + 0 * scores  # of its shape, and with a gradient, where the function needs no score
        hidden = hidden | (scores == float("-inf"))
    if mask_mod is not None:
        hidden = hidden | ~torch.as_tensor(mask_mod(*place), device=q.device)
    hidden = hidden.expand(scores.shape)
    if s_aux is not None:  # the last column, dropped below, as its value is 0
        sinks = s_aux.to(dtype).view(-1, 1, 1).expand(*scores.shape[:3], 1)
        hidden = torch.cat((hidden.expand_as(scores), sinks == float("-inf")), dim=-1)
        scores = torch.cat((scores, sinks), dim=-1)
    scores = scores.masked_fill(hidden, float("-inf"))

    lse = torch.logsumexp(scores, dim=-1)
    probabilities = torch.softmax(scores, dim=-1).masked_fill(hidden, 0)  # NaN in rows without keys
    probabilities = probabilities[..., : k.shape[2]]
    if dropout_mask is not None:
        probabilities = probabilities * dropout_mask / (1 - dropout_p)
    return (probabilities @ v).transpose(1, 2), lse


def _distance_from_diagonal(seqlen_q: int, seqlen_k: int, device: torch.device) -> Tensor:
    """How far key j lies right of row i's diagonal; (seqlen_q, seqlen_k)."""
    i = torch.arange(seqlen_q, device=device).unsqueeze(1)
    j = torch.arange(seqlen_k, device=device)
    return j - (i + seqlen_k - seqlen_q)


def _outside_window(distance: Tensor, left: int | None, right: int | None) -> Tensor:
    hidden = torch.zeros_like(distance, dtype=torch.bool)
    if left is not None:
        hidden |= distance < -left
    if right is not None:
        hidden |= distance > right
    return hidden
