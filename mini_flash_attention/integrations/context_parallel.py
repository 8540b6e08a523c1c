"""Sequences over several processes: ring attention and Ulysses, on torch.distributed.

    q, k, v = (shard(x, rank, world) for x in (q, k, v))
    out = ring_attention(q, k, v, causal=True)      # like q: what `shard` makes of the whole result

Each function takes the tokens that its rank holds, and is differentiable.

Ring (Liu et al. 2023, arXiv 2310.01889): keys and values travel around while queries stay, and partial
results are merged by their log-sum-exp. With a causal mask a rank holds a chunk of the start and the one
mirrored to it at the end ("zigzag"), so that all ranks have the same work. Ulysses (Jacobs et al. 2023,
arXiv 2309.14509): an all-to-all changes shares of the tokens for shares of the heads, and another one back.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from mini_flash_attention import checks, flash_attn_func, ops


def shard(x: Tensor, rank: int, world: int, dim: int = 1) -> Tensor:
    """The tokens of a rank: chunks `rank` and `2 world - 1 - rank` of 2 world, along `dim`."""
    if x.shape[dim] % (2 * world):
        raise ValueError(f"x must have a multiple of 2 world = {2 * world} tokens, not {x.shape[dim]}")
    chunks = x.chunk(2 * world, dim)
    return torch.cat((chunks[rank], chunks[2 * world - 1 - rank]), dim)


def unshard(parts: list[Tensor], dim: int = 1) -> Tensor:
    """The whole, from the parts of all ranks."""
    halves = [part.chunk(2, dim) for part in parts]
    return torch.cat([first for first, _ in halves] + [second for _, second in reversed(halves)], dim)


def ring_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    causal: bool = False,
    softmax_scale: float | None = None,
    cu_seqlens: Tensor | None = None,
    group: dist.ProcessGroup | None = None,
    return_lse: bool = False,
    window_size: tuple[int, int] = (-1, -1),
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention to the tokens of all ranks.

    Args:
        q: (batch, seqlen / world, heads, head_dim), what `shard` gives; or packed, (total / world, heads,
            head_dim), each sequence sharded.
        k: (batch, seqlen / world, heads_k, head_dim), or packed like q.
        v: like k.
        causal: a query sees no key behind it. Without, and without a window, any division of the tokens will
            do.
        softmax_scale: None is 1 / sqrt(head_dim).
        cu_seqlens: int32 (batch + 1,) of packed tokens: where the sequences start in what this rank holds,
            and the number of its tokens. With causal each has an even number of tokens on a rank.
        group: the processes of the ring; None: all.
        return_lse: return (out, lse).
        window_size: (left, right), as in `flash_attn_func`; not of packed tokens. What nobody sees is not
            computed, but keys and values travel to all ranks.

    Returns:
        out: like q.
        lse: (batch, heads, seqlen / world), packed (heads, total / world). It gets no gradient.
    """
    group = group or dist.group.WORLD
    if q.shape[-3] != k.shape[-3]:
        raise ValueError(
            f"q and k must have the same tokens, but q has {q.shape[-3]} and k has {k.shape[-3]}"
        )
    if (q.ndim == 3) != (cu_seqlens is not None):
        raise ValueError("cu_seqlens must be given with packed q, k and v, and with these only")
    left, right = (checks.limit(*side) for side in zip(("left", "right"), window_size, strict=True))
    window = left, 0 if causal else right
    if window != (None, None) and q.shape[-3] % 2:
        raise ValueError(
            "causal and window_size: a rank must hold as many tokens of the start as of the end, not "
            f"{q.shape[-3]} in all"
        )
    if cu_seqlens is not None and (left, right) != (None, None):
        raise NotImplementedError("window_size: not of packed tokens in a ring; ulysses has windows")
    out, lse = Ring.apply(*(x.contiguous() for x in (q, k, v)), cu_seqlens, window, softmax_scale, group)
    return (out, lse) if return_lse else out


def ulysses(
    q: Tensor, k: Tensor, v: Tensor, group: dist.ProcessGroup | None = None, **options: Any
) -> Tensor:
    """Attention to the tokens of all ranks, each of which computes some heads.

    Args:
        q: (batch, seqlen / world, heads, head_dim): chunk `rank` of the tokens; heads is a multiple of world.
        k: (batch, seqlen / world, heads_k, head_dim); heads_k is a multiple of world, or a divisor of it.
        v: like k.
        options: any of `flash_attn_func`, windows included, alibi_slopes and s_aux of all heads; but no
            dropout_p, whose mask each rank would draw for itself, and no return_attn_probs. The gradient of
            s_aux is that of the rank's heads, 0 for the others: the whole one is the sum of all ranks'.

    Returns:
        out: like q.
    """
    for name in ("dropout_p", "return_attn_probs"):
        if options.get(name):
            raise NotImplementedError(f"{name}: not in ulysses")
    group = group or dist.group.WORLD
    world, heads_k = dist.get_world_size(group), k.shape[2]
    if q.shape[2] % world:
        raise ValueError(f"the heads of q must be a multiple of the {world} ranks, not {q.shape[2]}")
    if heads_k % world and world % heads_k:
        raise ValueError(
            f"the heads of k must be a multiple or a divisor of the {world} ranks, not {heads_k}"
        )
    if heads_k % world:
        k, v = (x.repeat_interleave(world // heads_k, 2) for x in (k, v))
    for name in ("alibi_slopes", "s_aux"):
        if options.get(name) is not None:
            options[name] = options[name].chunk(world, -1)[dist.get_rank(group)]
    q, k, v = (exchange(x, 2, 1, group) for x in (q, k, v))
    return exchange(flash_attn_func(q, k, v, **options), 1, 2, group)


def exchange(x: Tensor, scatter: int, gather: int, group: Any) -> Tensor:
    """Divide dimension `scatter` among the ranks, and put dimension `gather` together."""
    from torch.distributed._functional_collectives import all_to_all_single_autograd

    pieces = torch.stack(x.chunk(dist.get_world_size(group), scatter))
    return torch.cat(all_to_all_single_autograd(pieces, None, None, group).unbind(0), gather)


def merge(out: Tensor, lse: Tensor, part_out: Tensor, part_lse: Tensor, rows: Any) -> None:
    """Add more keys to a softmax, in place: a mean of both parts, weighted by their exp(lse).

    Args:
        out: (..., seqlen_q, heads, head_dim), lse: (..., heads, seqlen_q): of all queries.
        part_out, part_lse: of some of them, and other keys.
        rows: which queries these are: an index along seqlen_q.
    """
    old = lse[..., rows]
    new = torch.logaddexp(old, part_lse)
    safe = new.masked_fill(new == -torch.inf, 0)  # a query that saw no key yet: not inf - inf
    keep, take = ((x - safe).exp().transpose(-1, -2).unsqueeze(-1) for x in (old, part_lse))
    out[..., rows, :, :] = out[..., rows, :, :] * keep + part_out * take
    lse[..., rows] = new


class Part(NamedTuple):
    """Some of the tokens that a rank holds, of each sequence: all, or the first or the second half."""

    rows: slice | Tensor
    cu_seqlens: Tensor | None

    def of(self, x: Tensor) -> Tensor:
        return x[..., self.rows, :, :]


Limit = int | None  # keys that a query sees on one side of the diagonal; None: all


class Call(NamedTuple):
    """One of attention: these queries, these keys, and the window around the diagonal of both."""

    queries: Part
    keys: Part
    left: Limit = None
    right: Limit = None


def steps(
    q: Tensor, cu_seqlens: Tensor | None, window: tuple[Limit, Limit], rank: int, world: int
) -> list[list[Call]]:
    """Which queries of `rank` see which of the keys that are there in each step.

    Step i has the keys of rank - i. Causal, of a rank before: all queries see its first half, and none its
    second. Of a rank behind: the second half of the queries sees all its keys, and the first none.
    """
    every = Part(slice(None), cu_seqlens)
    if window == (None, None):
        return [[Call(every, every)]] * world
    half = q.shape[-3] // 2
    if window != (None, 0):
        return [windowed(half, window, rank, (rank - i) % world, world) for i in range(world)]
    if cu_seqlens is None:
        first, second = Part(slice(half), None), Part(slice(half, None), None)
    else:
        token = torch.arange(2 * half, device=q.device)
        sequence = torch.searchsorted(cu_seqlens, token, right=True) - 1
        early = token < (cu_seqlens[sequence] + cu_seqlens[sequence + 1]) // 2
        # The size is said, so that nothing waits for the device.
        rows = (torch.nonzero_static(x, size=half).flatten() for x in (early, ~early))
        first, second = (Part(x, cu_seqlens // 2) for x in rows)
    others = [Call(every, first) if i <= rank else Call(second, every) for i in range(1, world)]
    return [[call] for call in (Call(every, every, right=0), *others)]


def windowed(half: int, window: tuple[Limit, Limit], rank: int, other: int, world: int) -> list[Call]:
    """The queries of `rank` and the keys of `other` that see each other, chunk by chunk.

    Between two chunks the diagonal is as far off as the chunks are apart. Where it is so far off that a limit
    would be below 0, it is moved: the last keys, or queries, are left out, which nobody sees.
    """
    calls = []
    for i, query_chunk in enumerate((rank, 2 * world - 1 - rank)):
        for j, key_chunk in enumerate((other, 2 * world - 1 - other)):
            apart = (query_chunk - key_chunk) * half
            left = None if window[0] is None else window[0] - apart
            right = None if window[1] is None else window[1] + apart
            fewer_queries, fewer_keys = max(0, -(left or 0)), max(0, -(right or 0))
            if max(fewer_queries, fewer_keys) >= half:
                continue
            queries = Part(slice(i * half, (i + 1) * half - fewer_queries), None)
            keys = Part(slice(j * half, (j + 1) * half - fewer_keys), None)
            moved = fewer_queries - fewer_keys
            left, right = (None if x is None else x + by for x, by in ((left, moved), (right, -moved)))
            calls.append(Call(queries, keys, left, right))
    return calls


def rotate(group: dist.ProcessGroup, *tensors: Tensor) -> Callable[[], list[Tensor]]:
    """Send to the next rank, receive from the one before. Call the result to wait for what comes."""
    rank, world = dist.get_rank(group), dist.get_world_size(group)
    after, before = (dist.get_global_rank(group, (rank + step) % world) for step in (1, -1))
    received = [torch.empty_like(x) for x in tensors]
    operations = [dist.P2POp(dist.isend, x, after, group) for x in tensors]
    operations += [dist.P2POp(dist.irecv, x, before, group) for x in received]
    work = dist.batch_isend_irecv(operations)

    def wait() -> list[Tensor]:
        for one in work:
            one.wait()
        return received

    return wait


class Ring(torch.autograd.Function):
    """(out, lse). The next step's keys and values travel while this step computes."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cu_seqlens: Tensor | None,
        window: tuple[Limit, Limit],
        softmax_scale: float | None,
        group: dist.ProcessGroup,
    ) -> tuple[Tensor, Tensor]:
        ctx.steps = steps(q, cu_seqlens, window, dist.get_rank(group), dist.get_world_size(group))
        keys = [k, v]
        out: Any = None  # to the keys of the steps so far
        for i, calls in enumerate(ctx.steps):
            coming = rotate(group, *keys) if i + 1 < len(ctx.steps) else None
            for call in calls:
                part = ops.forward(
                    call.queries.of(q), *map(call.keys.of, keys), *_options(call, softmax_scale)
                )
                if out is None and part[0].shape == q.shape:
                    out, lse = part[0].to(part[1].dtype), part[1]
                    continue
                if out is None:
                    out = torch.zeros_like(q, dtype=part[1].dtype)
                    lse = part[1].new_full((*part[1].shape[:-1], q.shape[-3]), -torch.inf)
                merge(out, lse, *part, call.queries.rows)
            keys = coming() if coming else keys
        out = out.to(q.dtype)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.softmax_scale, ctx.group = softmax_scale, group
        ctx.mark_non_differentiable(lse)
        return out, lse

    @staticmethod
    def backward(ctx: Any, dout: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        """By the out and the LSE of all keys: P = exp(S - lse) is then the whole softmax's part."""
        checks.no_second_derivative()
        q, k, v, out, lse = ctx.saved_tensors
        keys = [k, v]
        dq = torch.zeros_like(q, dtype=lse.dtype)
        totals = [torch.zeros_like(x, dtype=lse.dtype) for x in keys]
        arriving = lambda: totals  # noqa: E731  of dk and dv, which travel with their keys and end at home
        for i, calls in enumerate(ctx.steps):
            coming = rotate(ctx.group, *keys) if i + 1 < len(ctx.steps) else None
            parts = []
            for call in calls:
                rows = [call.queries.of(x) for x in (dout, q, out)]
                some_lse = lse[..., call.queries.rows].contiguous()
                its_keys, options = map(call.keys.of, keys), _options(call, ctx.softmax_scale)
                parts.append(ops.backward(rows[0], None, rows[1], *its_keys, rows[2], some_lse, *options))
            totals = arriving()
            for call, part in zip(calls, parts, strict=True):
                dq[..., call.queries.rows, :, :] += part[0]
                for total, dx in zip(totals, part[1:], strict=True):
                    total[..., call.keys.rows, :, :] += dx
            if len(ctx.steps) > 1:
                arriving = rotate(ctx.group, *totals)
            keys = coming() if coming else keys
        dk, dv = (x.to(k.dtype) for x in arriving())
        return dq.to(q.dtype), dk, dv, None, None, None, None


def _options(call: Call, softmax_scale: float | None) -> tuple[Any, ...]:
    """Of the operators."""
    starts = call.queries.cu_seqlens, call.keys.cu_seqlens
    layout = ops.DENSE if starts[0] is None else (*starts, None, None, None)
    left, right = (-1 if limit is None else limit for limit in (call.left, call.right))
    return *layout, None, None, None, 0.0, softmax_scale, False, left, right, 0.0, False, 0
