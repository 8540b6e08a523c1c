"""The attention functions, with the signatures and the semantics of flash_attn 2.x, and autograd."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from mini_flash_attention import backend, checks, ops, sinks
from mini_flash_attention.block_mask import BlockMask
from mini_flash_attention.gpu import fast
from mini_flash_attention.problem import (
    Inputs,
    Layout,
    Lengths,
    New,
    Options,
    Places,
    Problem,
    cache,
    dense,
    varlen,
    with_functions,
)

ScoreMod = Callable[[Any, Any, Any, Any, Any], Any]  # score, batch, head, q_idx, kv_idx
MaskMod = Callable[[Any, Any, Any, Any], Any]  # batch, head, q_idx, kv_idx
Functions = tuple[ScoreMod | None, MaskMod | None, BlockMask | None]
NO_FUNCTIONS = (None, None, None)
Output = Tensor | tuple[Tensor, Tensor, Tensor | None]
KV = checks.OUR_NAMES | {"k": "kv", "v": "kv"}
QKV = checks.OUR_NAMES | {"q": "qkv", "k": "qkv", "v": "qkv"}
QKV |= {"cu_seqlens_q": "cu_seqlens", "cu_seqlens_k": "cu_seqlens"}
QKV |= {"max_seqlen_q": "max_seqlen", "max_seqlen_k": "max_seqlen"}
_grad_enabled = torch.is_grad_enabled  # every call asks


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
    *,
    s_aux: Tensor | None = None,
    score_mod: ScoreMod | None = None,
    mask_mod: MaskMod | None = None,
    block_mask: BlockMask | None = None,
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
            default generator of the device, so torch.manual_seed reproduces it.
        softmax_scale: factor of the scores, finite in fp32 (fp64 for fp64); None is 1 / sqrt(head_dim).
        causal: query i sees no key behind its diagonal, j = i + seqlen_k - seqlen_q: the last query
            sees the last key (bottom-right alignment). Replaces the right side of window_size by 0.
        window_size: (left, right), two ints in a tuple, list or tensor: query i sees that many keys
            on either side of its diagonal, and the diagonal. Negative or None: no limit.
        softcap: scores become softcap · tanh(score / softcap), after softmax_scale; <= 0 is off.
        alibi_slopes: fp32 (heads,) or (batch, heads): score (i, j), after softcap, is lowered by
            slope · |i + seqlen_k - seqlen_q - j|. None is off. It gets no gradient.
        deterministic: gradients are bitwise the same in each run, at some cost in speed. So they are
            under torch.use_deterministic_algorithms(True).
        return_attn_probs: return (out, softmax_lse, S_dmask) instead of out.
        s_aux: (heads,), any of the dtypes of q, computed with in fp32 (fp64 for fp64 inputs): attention
            sinks, as GPT-OSS learns them. Each query of head h sees one more score, s_aux[h], whose value
            is 0: out = sum_j exp(score_j) v_j / (sum_j exp(score_j) + exp(s_aux[h])). It is a natural
            logarithm, which neither softmax_scale nor softcap nor a mask changes, and dropout drops no
            sink. None is off. Differentiable.
        score_mod: score_mod(score, batch, head, q_idx, kv_idx) returns what becomes of a score, after
            softmax_scale, softcap and alibi_slopes. A plain Python function of operators, comparisons,
            & | ~ and torch.where, minimum, maximum, abs, exp, log, sqrt, tanh, sigmoid; it may capture
            numbers and tensors, which it indexes by integers: docs/masks.md. It is compiled into the kernel,
            with its derivative. q_idx and kv_idx count from 0, unlike the diagonal. As in FlexAttention.
        mask_mod: mask_mod(batch, head, q_idx, kv_idx) returns whether the query sees the key, beside causal
            and window_size. Written like score_mod.
        block_mask: `create_block_mask(mask_mod, ...)` in the place of mask_mod, causal and window_size: the
            kernels do not visit what it hides (backward: on Hopper only). FlexAttention's will do, too.

    Returns:
        out: (batch, seqlen_q, heads, head_dim), in the dtype of q. A query that sees no key has out 0 and
            gradient 0.
        softmax_lse: (batch, heads, seqlen_q), fp32 (fp64 for fp64 inputs): the natural logarithm of
            the sum of exp(score) over the keys that the query sees, and over its sink; -inf, or its sink, if
            it sees no key. Differentiable, as out is.
        S_dmask: for tests only; None without dropout, else (batch, heads, seqlen_q, seqlen_k), the
            softmax probabilities, negative where dropped. The sink's are left out.

    Raises:
        TypeError, ValueError: an argument is wrong: the message names it and says what is allowed.
        NotImplementedError: the backend of this device cannot serve an argument, which is named.
        RuntimeError: the GPU is older than SM80, or not known to this version; from the backward pass,
            create_graph=True (there are no second derivatives).
    """
    options = (dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic, s_aux)
    functions = score_mod, mask_mod, block_mask
    return _dense(q, k, v, options, return_attn_probs, checks.OUR_NAMES, functions)


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
    *,
    s_aux: Tensor | None = None,
) -> Output:
    """Self-attention of queries, keys and values that one projection made, as one tensor.

    Args:
        qkv: (batch, seqlen, 3, heads, head_dim): q, k and v along dimension 2. They are not copied.

    The other arguments, what is returned and what is raised are those of `flash_attn_func`.
    """
    q, k, v = _unpack("qkv", qkv, "batch, seqlen, 3, heads, head_dim")
    options = (dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic, s_aux)
    return _dense(q, k, v, options, return_attn_probs, QKV)


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
    *,
    s_aux: Tensor | None = None,
) -> Output:
    """Attention to keys and values that one projection made, as one tensor.

    Args:
        q: (batch, seqlen_q, heads, head_dim).
        kv: (batch, seqlen_k, 2, heads_k, head_dim): k and v along dimension 2. They are not copied.

    The other arguments, what is returned and what is raised are those of `flash_attn_func`.
    """
    k, v = _unpack("kv", kv, "batch, seqlen, 2, heads, head_dim")
    options = (dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic, s_aux)
    return _dense(q, k, v, options, return_attn_probs, KV)


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor | None,
    max_seqlen_q: int | Tensor,
    max_seqlen_k: int | Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Sequence[int | None] | Tensor | None = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    block_table: Tensor | None = None,
    *,
    seqused_k: Tensor | None = None,
    out: Tensor | None = None,
    s_aux: Tensor | None = None,
    score_mod: ScoreMod | None = None,
    mask_mod: MaskMod | None = None,
    num_splits: int = 0,
) -> Output:
    """`flash_attn_func` for a batch of sequences of any lengths, packed one after the other.

    Lengths may be 0, and so may the batch. They stay on the device: nothing waits for them, no kernel is
    compiled for them, and a captured CUDA graph reads them anew in each replay. The diagonal of a
    sequence is at i + seqlen_k - seqlen_q of its own lengths.

    Args:
        q: (total_q, heads, head_dim), the queries of all sequences; dtypes, strides, heads and head_dim
            as in `flash_attn_func`.
        k: packed, (total_k, heads_k, head_dim);
            or one row a sequence, (batch, capacity, heads_k, head_dim), with seqused_k, without cu_seqlens_k;
            or paged, (num_blocks, page_size, heads_k, head_dim), with block_table, any page_size.
        v: like k.
        cu_seqlens_q: int32 (batch + 1,) on the device of q: sequence b's queries are rows
            cu_seqlens_q[b] to cu_seqlens_q[b + 1]. Starts at 0 and does not decrease.
        cu_seqlens_k: the same for k and v, but may start later; with pages only the lengths that it gives
            count. None where seqused_k tells the lengths.
        max_seqlen_q: at least the longest sequence's queries: an int, or an integer tensor of one
            element. It steers speed only: a wrong one does no harm. On a GPU it is not read.
        max_seqlen_k: the same for keys.
        block_table: int32 (batch, max_pages): token t of sequence b is row t % page_size of page
            block_table[b, t // page_size]. Entries behind its last token are not read.
        seqused_k: int32 (batch,): the first tokens of each sequence's keys that count, the others are
            not read. None: all.
        out: where to write the result, a tensor like q; it is returned. It may be q.
        score_mod, mask_mod: as in `flash_attn_func`; batch is the number of the sequence, in which q_idx and
            kv_idx count.
        num_splits: into how many parts to split the keys of few queries, 1 to 128; 0 chooses. With 1 the
            result is batch-invariant: each sequence's out and softmax_lse are, bit for bit, what they are
            without the others (docs/batch_invariance.md). It does not concern the backward pass; more than
            1 does not concern a forward pass with dropout either.

    The other arguments are those of `flash_attn_func`; alibi_slopes may be (batch, heads) here too.
    Lengths out of range are cut to what the tensors hold; pages that are used must exist.
    On the CPU both are checked; on a GPU MINI_FLASH_ATTENTION_CHECK=1 in the environment checks them, waiting
    for the device in each call.

    Returns:
        out: (total_q, heads, head_dim). Rows that belong to no sequence are 0, their softmax_lse is -inf,
            with s_aux too.
        softmax_lse: (heads, total_q), fp32 (fp64 for fp64 inputs).
        S_dmask: for tests only; None without dropout, else (batch, heads, longest seqlen_q,
            longest seqlen_k), 0 beyond a sequence's own lengths.

    Gradients of q, k and v are 0 where these belong to no sequence, and beyond seqused_k.

    Raises:
        TypeError, ValueError, NotImplementedError, RuntimeError: as `flash_attn_func`.
        ValueError: also where a gradient is required with out, or where out shares memory with k, v or
            itself, or is a part of q.
        NotImplementedError: also from the backward pass, with block_table.
    """
    options = (dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic, s_aux)
    lengths = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, block_table, seqused_k, num_splits)
    functions = score_mod, mask_mod, None
    return _varlen(q, k, v, lengths, options, out, return_attn_probs, checks.OUR_NAMES, functions)


def flash_attn_varlen_qkvpacked_func(
    qkv: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int | Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Sequence[int | None] | Tensor | None = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    *,
    s_aux: Tensor | None = None,
) -> Output:
    """Self-attention of sequences of any lengths, whose q, k and v one projection made.

    Args:
        qkv: (total, 3, heads, head_dim): q, k and v along dimension 1. They are not copied.
        cu_seqlens: int32 (batch + 1,): sequence b is rows cu_seqlens[b] to cu_seqlens[b + 1].
        max_seqlen: at least the longest sequence's length.

    The other arguments, what is returned and what is raised are those of `flash_attn_varlen_func`.
    """
    q, k, v = _unpack("qkv", qkv, "total, 3, heads, head_dim")
    lengths = (cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, None, None, 0)
    options = (dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic, s_aux)
    return _varlen(q, k, v, lengths, options, None, return_attn_probs, QKV)


def flash_attn_varlen_kvpacked_func(
    q: Tensor,
    kv: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int | Tensor,
    max_seqlen_k: int | Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Sequence[int | None] | Tensor | None = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    *,
    s_aux: Tensor | None = None,
) -> Output:
    """Attention of sequences of any lengths to keys and values that one projection made.

    Args:
        q: (total_q, heads, head_dim).
        kv: (total_k, 2, heads_k, head_dim): k and v along dimension 1. They are not copied.

    The other arguments, what is returned and what is raised are those of `flash_attn_varlen_func`.
    """
    k, v = _unpack("kv", kv, "total, 2, heads, head_dim")
    lengths = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, None, None, 0)
    options = (dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic, s_aux)
    return _varlen(q, k, v, lengths, options, None, return_attn_probs, KV)


def flash_attn_with_kvcache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor | None = None,
    v: Tensor | None = None,
    rotary_cos: Tensor | None = None,
    rotary_sin: Tensor | None = None,
    cache_seqlens: Tensor | int | None = None,
    cache_batch_idx: Tensor | None = None,
    cache_leftpad: Tensor | None = None,
    block_table: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Sequence[int | None] | Tensor | None = (-1, -1),
    softcap: float = 0.0,
    rotary_interleaved: bool = True,
    alibi_slopes: Tensor | None = None,
    num_splits: int = 0,
    return_softmax_lse: bool = False,
    *,
    s_aux: Tensor | None = None,
    score_mod: ScoreMod | None = None,
    mask_mod: MaskMod | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention to a cache of keys and values, into which the new ones are written first. For inference.

    With few queries the keys are split over the GPU, and the parts are merged by their log-sum-exp
    (Flash-Decoding, Dao et al. 2023). Lengths and tables stay on the device: nothing waits for them, no
    kernel is compiled for them, and a captured CUDA graph reads them anew in each replay.

    Args:
        q: (batch, seqlen_q, heads, head_dim), the queries of the new tokens, one or more; dtypes,
            strides, heads and head_dim as in `flash_attn_func`.
        k_cache: (batch_cache, capacity, heads_k, head_dim), or with block_table (num_blocks, page_size,
            heads_k, head_dim), any page_size. Sequence b's storage is row b, or row
            cache_batch_idx[b], of k_cache or of block_table.
        v_cache: like k_cache.
        k: (batch, seqlen_new, heads_k, head_dim) or None. Written into k_cache, in place, as tokens
            cache_seqlens, cache_seqlens + 1 and so on of each sequence's storage. What would lie beyond
            the capacity is not written.
        v: like k.
        rotary_cos: (seqlen_ro, rotary_dim / 2) in the dtype of q, or None; needs k and v. rotary_dim is a
            multiple of 16, at most head_dim. New keys are rotated by the rows of their tokens' numbers,
            cache_seqlens + i. With causal or a window_size query i is rotated by row cache_seqlens + i,
            otherwise all queries by row cache_seqlens.
        rotary_sin: like rotary_cos.
        cache_seqlens: int32 (batch,), or an int for all: the tokens in each sequence's storage before the
            call, left padding included. None: the whole cache; k and v must be None then.
        cache_batch_idx: int32 (batch,) or None. With k and v its elements must differ.
        cache_leftpad: int32 (batch,) or None: the first tokens of each storage that do not count.
        block_table: int32 (rows, max_pages) or None: token t of row r is row t % page_size of page
            block_table[r, t // page_size]. Entries behind the last token are not read.
        softmax_scale, causal, window_size, softcap, alibi_slopes, s_aux: as in `flash_attn_func`. The last
            query is on the diagonal of the last key, new ones included.
        rotary_interleaved: rotate elements 2i and 2i + 1 of a head; else i and i + rotary_dim / 2.
        num_splits: into how many parts to split the keys, 1 to 128; 0 chooses by the capacity. With 1 the
            result is batch-invariant, as in `flash_attn_varlen_func`.
        return_softmax_lse: return (out, softmax_lse) instead of out.
        score_mod, mask_mod: as in `flash_attn_func`; kv_idx counts a sequence's keys, left padding aside.

    Lengths out of range are cut to what the tensors hold; pages and rows that are used must exist.
    On the CPU both are checked; on a GPU MINI_FLASH_ATTENTION_CHECK=1 in the environment checks them, waiting
    for the device in each call.

    Returns:
        out: (batch, seqlen_q, heads, head_dim), in the dtype of q; 0 for a query that sees no key.
        softmax_lse: (batch, heads, seqlen_q), fp32 (fp64 for fp64 inputs); -inf, or its sink, for a query
            that sees no key.

    Raises:
        TypeError, ValueError: an argument is wrong: the message names it and says what is allowed. Also
            if the cache is too small for an int cache_seqlens, or if a gradient is required.
        NotImplementedError, RuntimeError: as `flash_attn_func`.
    """
    options = (0.0, softmax_scale, causal, window_size, softcap, alibi_slopes, False, s_aux)
    new = (k, v, rotary_cos, rotary_sin, rotary_interleaved)
    places = (cache_seqlens, cache_batch_idx, cache_leftpad, block_table)
    if return_softmax_lse is not False:
        return_softmax_lse = checks.flag("return_softmax_lse", return_softmax_lse)
    functions = score_mod, mask_mod, None
    if functions != NO_FUNCTIONS:
        out, lse = _uncompiled(_cached_with)(functions, q, k_cache, v_cache, new, places, options, num_splits)
    elif fast.is_watched(q, k_cache, v_cache, s_aux):
        out, lse = ops.cached(q, k_cache, v_cache, new, places, options, num_splits)
    else:
        problem, x, update = cache(q, k_cache, v_cache, new, places, options, num_splits)
        out, lse = backend.with_cache(problem, x, update, return_softmax_lse)
    return (out, lse) if return_softmax_lse else out


# Where somebody traces, watches or transforms a call, it is an operator.


def _dense(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    options: Options,
    return_attn_probs: bool,
    names: checks.Names,
    functions: Functions = NO_FUNCTIONS,
) -> Output:
    """names: what the caller calls the arguments. functions: score_mod, mask_mod, block_mask."""
    if functions != NO_FUNCTIONS:
        call = dense, (q, k, v, options), options[7], None
        return _uncompiled(_attention_with)(functions, *call, return_attn_probs)
    if fast.is_watched(q, k, v, options[7]):
        return ops.attention(q, k, v, ops.DENSE, options, 0, None, return_attn_probs)
    problem, x = dense(q, k, v, options, names)
    return _attention(problem, x, None, return_attn_probs)


def _varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lengths: Lengths,
    options: Options,
    out: Tensor | None,
    return_attn_probs: bool,
    names: checks.Names,
    functions: Functions = NO_FUNCTIONS,
) -> Output:
    """As _dense."""
    if functions != NO_FUNCTIONS:
        call = varlen, (q, k, v, lengths, options, out), options[7], out
        return _uncompiled(_attention_with)(functions, *call, return_attn_probs)
    if fast.is_watched(q, k, v, options[7]):
        cu_seqlens_q, cu_seqlens_k, longest, _, block_table, seqused_k, num_splits = lengths
        bound = None if isinstance(longest, Tensor) else longest
        layout = (cu_seqlens_q, cu_seqlens_k, seqused_k, block_table, bound)
        return ops.attention(q, k, v, layout, options, num_splits, out, return_attn_probs)
    problem, x = varlen(q, k, v, lengths, options, out, names)
    return _attention(problem, x, out, return_attn_probs)


# With functions of the scores, which torch.compile runs as they are, outside of its graphs


def _attention_with(
    functions: Functions,
    make: Callable[..., tuple[Problem, Inputs]],
    arguments: tuple[Any, ...],
    s_aux: Tensor | None,
    out: Tensor | None,
    return_attn_probs: bool,
) -> Output:
    """make, arguments: problem.dense or varlen, and what it takes, q, k and v first."""
    q, k, v, *_ = arguments
    checks.no_functions(fast.is_watched(q, k, v, s_aux))
    problem, x = make(*arguments)
    problem, x = with_functions(problem, x, *functions)
    return _attention(problem, x, out, return_attn_probs)


def _cached_with(
    functions: Functions,
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    new: New,
    places: Places,
    options: Options,
    num_splits: int,
) -> tuple[Tensor, Tensor]:
    checks.no_functions(fast.is_watched(q, k_cache, v_cache, options[7]))
    problem, x, update = cache(q, k_cache, v_cache, new, places, options, num_splits)
    problem, x = with_functions(problem, x, *functions)
    if torch.is_grad_enabled():
        tensors = [y for y in x.captured if isinstance(y, Tensor)]
        checks.no_gradient(
            "flash_attn_with_kvcache", {f"captured tensor {i}": y for i, y in enumerate(tensors)}
        )
    return backend.with_cache(problem, x, update, True)


def _uncompiled(function: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compiler.disable(function) if fast.is_compiling() else function


def _attention(problem: Problem, x: Inputs, out: Tensor | None, return_attn_probs: bool) -> Output:
    if return_attn_probs is not False:
        return_attn_probs = checks.flag("return_attn_probs", return_attn_probs)
    if problem.dropout_p:
        x = x._replace(seed=_draw_seed(problem.device))
    learned = [y for y in x.captured if isinstance(y, Tensor) and y.requires_grad] if x.captured else ()
    learns = x.q.requires_grad or x.k.requires_grad or x.v.requires_grad or learned
    if _grad_enabled() and (learns or (x.s_aux is not None and x.s_aux.requires_grad)):
        if out is not None and learned:
            checks.no_gradient("out: attention into a given tensor", {"what a function captures": learned[0]})
        if torch.are_deterministic_algorithms_enabled() and not problem.deterministic:
            problem = replace(problem, deterministic=True)
        out, lse = Attention.apply(problem, *x, *learned)
    else:
        out, lse = backend.forward(problem, x, out, return_attn_probs)
    if not return_attn_probs:
        return out
    S_dmask = None
    if problem.dropout_p:
        with torch.no_grad():
            S_dmask = backend.dropout_probabilities(problem, x, lse)
    return out, lse, S_dmask


class Attention(torch.autograd.Function):
    """(out, lse) of q, k, v, s_aux: the backward pass recomputes the probabilities from the LSE."""

    @staticmethod
    def forward(
        ctx: Any,
        problem: Problem,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        alibi_slopes: Tensor | None,
        seed: int | Tensor | None,
        layout: Layout | None,
        s_aux: Tensor | None,
        captured: tuple[Any, ...],
        block_mask: BlockMask | None,
        *learned: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """learned: the tensors in captured that need a gradient, which autograd finds here."""
        x = Inputs(q, k, v, alibi_slopes, seed, layout, s_aux, captured, block_mask)
        out, lse = backend.forward(problem, x)
        if not problem.page_size:
            tensors = [value if isinstance(value, Tensor) else None for value in captured]
            ctx.save_for_backward(q, k, v, alibi_slopes, s_aux, out, lse, *tensors, *(layout or ()))
        ctx.problem, ctx.seed, ctx.block_mask = problem, seed, block_mask
        ctx.captured = [None if isinstance(value, Tensor) else value for value in captured]
        ctx.set_materialize_grads(False)  # an LSE that nobody used has gradient None, not zeros
        return out, lse

    @staticmethod
    def backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple[Tensor | None, ...]:
        checks.no_second_derivative()
        if ctx.problem.page_size:
            raise NotImplementedError("block_table: attention to pages has no gradient")
        q, k, v, alibi_slopes, s_aux, out, lse, *more = ctx.saved_tensors
        tensors, layout = more[: len(ctx.captured)], more[len(ctx.captured) :]
        captured = (y if x is None else x for x, y in zip(tensors, ctx.captured, strict=True))
        x = Inputs(q, k, v, alibi_slopes, ctx.seed, Layout(*layout) if layout else None, s_aux)
        x = x._replace(captured=tuple(captured), block_mask=ctx.block_mask)
        ds_aux = sinks.gradient(s_aux, out, lse, dout, dlse) if ctx.needs_input_grad[7] else None
        if dout is None:
            dout = torch.zeros_like(out)
        run = (
            ops.run_backward
            if fast.is_watched(dout, out, dout if dlse is None else dlse)
            else backend.backward
        )
        learned: Iterable[Tensor] = ()
        if len(ctx.needs_input_grad) > 10:
            found = backend.captured_gradients(ctx.problem, x, out, lse, dout, dlse)
            learned = (gradient for gradient in found if gradient is not None)
        dq_dk_dv = run(ctx.problem, x, out, lse, dout, dlse)
        return None, *dq_dk_dv, None, None, None, ds_aux, None, None, *learned


def _unpack(name: str, packed: Tensor, dims: str) -> tuple[Tensor, ...]:
    """The views along the dimension of q, k, v; their gradients come back stacked, in one copy.

    dims: the names of the dimensions, with the number of the views in place of the one to unpack.
    """
    place = checks.packed(name, packed, dims)
    return packed.unbind(place)


def _draw_seed(device: torch.device) -> int | Tensor:
    """Of 63 bits. A GPU's is drawn by its own generator and stays there, (1) int64: nothing waits for it, and
    a captured graph draws anew in each replay.
    """
    seed = ops.draw_seed(device)
    return seed if seed.is_cuda else int(seed.item())
