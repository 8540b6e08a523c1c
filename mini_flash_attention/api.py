"""The public functions, with the signatures and the semantics of flash_attn 2.x, and autograd."""

from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any, ParamSpec

import torch
from torch import Tensor

from mini_flash_attention import dispatch
from mini_flash_attention.problem import Problem, dense

Output = Tensor | tuple[Tensor, Tensor, Tensor | None]
P = ParamSpec("P")


def _graph_break(function: Callable[P, Output]) -> Callable[P, Output]:
    """Make torch.compile call the function instead of tracing it, as torch.compiler.disable does.

    That one as a decorator would nearly double the time of the import.
    """

    @wraps(function)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> Output:
        if torch.compiler.is_compiling():
            return torch.compiler.disable(function)(*args, **kwargs)
        return function(*args, **kwargs)

    return wrapper


@_graph_break
def flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Sequence[int | None] | Tensor | None = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Output:
    """Exact attention, softmax(q kᵀ · softmax_scale) v, that never stores the matrix of scores.

    The method is FlashAttention-2 (Dao 2023, arXiv 2307.08691): tiles of keys and values pass under
    an online softmax (algorithm 1), and the backward pass recomputes the probabilities from the
    log-sum-exp, LSE (algorithm 2).

    Args:
        q: (batch, seqlen_q, heads, head_dim), fp16 or bf16, on the CPU fp32 and fp64 too, with any
            strides. head_dim is 1 to 256, batch and lengths may be 0. Autocast casts nothing.
        k: (batch, seqlen_k, heads_k, head_dim) in the dtype and on the device of q. heads is a
            multiple of heads_k (GQA, MQA); query head h sees key head h // (heads / heads_k).
        v: like k.
        dropout_p: in [0, 1), the probability that an attention probability is dropped; those kept
            are divided by 1 - dropout_p. Pass 0 in evaluation. The seed comes from PyTorch's
            default CPU generator, so torch.manual_seed reproduces it.
        softmax_scale: factor of the scores, finite in fp32 (fp64 for fp64); None is 1 / sqrt(head_dim).
        causal: query i sees no key behind its diagonal, j = i + seqlen_k - seqlen_q: the last query
            sees the last key (bottom-right alignment). Replaces the right side of window_size by 0.
        window_size: (left, right), two ints in a tuple, list or tensor: query i sees that many keys
            on either side of its diagonal, and the diagonal. Negative or None: no limit.
        softcap: scores become softcap · tanh(score / softcap), after softmax_scale; <= 0 is off.
        alibi_slopes: fp32 (heads,) or (batch, heads): score (i, j), after softcap, is lowered by
            slope · |i + seqlen_k - seqlen_q - j|. None is off. It gets no gradient.
        deterministic: gradients are bitwise the same in each run, at some cost in speed.
        return_attn_probs: return (out, softmax_lse, S_dmask) instead of out.

    Returns:
        out: (batch, seqlen_q, heads, head_dim), in the dtype of q.
        softmax_lse: (batch, heads, seqlen_q), fp32 (fp64 for fp64 inputs): the natural logarithm of
            the sum of exp(score) over the keys that the query sees. Differentiable, as out is.
        S_dmask: for tests only; None without dropout, else (batch, heads, seqlen_q, seqlen_k), the
            softmax probabilities, negative where dropped.
        A query that sees no key has out 0, softmax_lse -inf and gradient 0.

    Raises:
        TypeError, ValueError: an argument is wrong: the message names it and says what is allowed.
        NotImplementedError: the backend of this device cannot serve an argument, which is named.
        RuntimeError: the GPU is older than SM80, or not known to this version; from the backward pass,
            create_graph=True (there are no second derivatives).
    """
    options = (dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic)
    problem = dense(q, k, v, *options)
    seed = _draw_seed() if problem.dropout_p else None
    if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
        out, lse = Attention.apply(q, k, v, problem, alibi_slopes, seed)
    else:
        out, lse = dispatch.forward(problem, q, k, v, alibi_slopes, seed)
    if not return_attn_probs:
        return out
    S_dmask = None
    if problem.dropout_p:
        with torch.no_grad():
            S_dmask = dispatch.dropout_probabilities(problem, q, k, lse, alibi_slopes, seed)
    return out, lse, S_dmask


@_graph_break
def flash_attn_qkvpacked_func(
    qkv: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Sequence[int | None] | Tensor | None = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Output:
    """Self-attention of queries, keys and values that one projection made, as one tensor.

    Args:
        qkv: (batch, seqlen, 3, heads, head_dim): q, k and v along dimension 2. They are not copied.

    The other arguments, what is returned and what is raised are those of `flash_attn_func`.
    """
    q, k, v = _unpack("qkv", qkv, 3)
    options = (dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic)
    return flash_attn_func(q, k, v, *options, return_attn_probs)


@_graph_break
def flash_attn_kvpacked_func(
    q: Tensor,
    kv: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Sequence[int | None] | Tensor | None = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Output:
    """Attention to keys and values that one projection made, as one tensor.

    Args:
        q: (batch, seqlen_q, heads, head_dim).
        kv: (batch, seqlen_k, 2, heads_k, head_dim): k and v along dimension 2. They are not copied.

    The other arguments, what is returned and what is raised are those of `flash_attn_func`.
    """
    k, v = _unpack("kv", kv, 2)
    options = (dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic)
    return flash_attn_func(q, k, v, *options, return_attn_probs)


class Attention(torch.autograd.Function):
    """(out, lse) of q, k, v: the backward pass recomputes the probabilities from the LSE."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        problem: Problem,
        alibi_slopes: Tensor | None,
        seed: int | None,
    ) -> tuple[Tensor, Tensor]:
        out, lse = dispatch.forward(problem, q, k, v, alibi_slopes, seed)
        ctx.save_for_backward(q, k, v, out, lse, alibi_slopes)
        ctx.problem, ctx.seed = problem, seed
        ctx.set_materialize_grads(False)  # an LSE that nobody used has gradient None, not zeros
        return out, lse

    @staticmethod
    def backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError("attention has no second derivative: create_graph must be False")
        q, k, v, out, lse, alibi_slopes = ctx.saved_tensors
        if dout is None:
            dout = torch.zeros_like(out)
        dq, dk, dv = dispatch.backward(ctx.problem, dout, dlse, q, k, v, out, lse, alibi_slopes, ctx.seed)
        return dq, dk, dv, None, None, None


def _unpack(name: str, packed: Tensor, count: int) -> tuple[Tensor, ...]:
    """The views along dimension 2; their gradients come back stacked, in one copy."""
    if not isinstance(packed, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, not {type(packed).__name__}")
    if packed.ndim != 5 or packed.shape[2] != count:
        raise ValueError(
            f"{name} must have shape (batch, seqlen, {count}, heads, head_dim), not {tuple(packed.shape)}"
        )
    return packed.unbind(2)


def _draw_seed() -> int:
    return torch.randint(2**63 - 1, (), device="cpu").item()
