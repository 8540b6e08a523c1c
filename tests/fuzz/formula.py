"""What the public functions must return: the formula in float64, each sequence alone, each mask a matrix.

Independent of the package. With `rough` the results are off by what rounding may do to them.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Options(NamedTuple):
    """What all functions share, in its normal form."""

    scale: float
    left: float  # keys that a query sees left of its diagonal
    right: float
    softcap: float
    dropout_p: float


class Alone(NamedTuple):
    """One sequence's queries (seqlen_q, heads, head_dim), its keys and values, and what goes with them."""

    q: Tensor
    k: Tensor
    v: Tensor
    slopes: Tensor | None  # (heads)
    sinks: Tensor | None  # (heads)


class Expected(NamedTuple):
    """Of all sequences, as the function returns them; probabilities are (heads, seqlen_q, seqlen_k) each."""

    out: Tensor
    lse: Tensor
    probabilities: list[Tensor]


Rough = Callable[..., Tensor]  # (x, error=None) -> x with an error


def exact(x: Tensor, error: Tensor | None = None) -> Tensor:
    return x


def rough(relative: float, absolute: float) -> Rough:
    """A function that adds a random error to x: some x * relative, or error * absolute if that is given.

    The gradient of x has one of the first kind. Half of an error is its own, half is that of all elements,
    as errors of equal numbers are equal and add up.
    """

    def some(x: Tensor) -> Tensor:
        own, of_all = torch.rand_like(x), torch.rand((), dtype=x.dtype, device=x.device)
        return 2 * (own + of_all) - 2

    class Noise(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor, error: Tensor | None) -> Tensor:
            return x + some(x) * (relative * x if error is None else absolute * error)

        @staticmethod
        def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
            return gradient * (1 + relative * some(gradient)), None

    return lambda x, error=None: Noise.apply(x, error)


def options(arguments: dict[str, Any], head_dim: int) -> Options:
    window = arguments.get("window_size", (-1, -1))
    window = window.tolist() if isinstance(window, Tensor) else window or (None, None)
    left, right = (float("inf") if limit is None or limit < 0 else limit for limit in window)
    scale = arguments.get("softmax_scale")
    return Options(
        scale=head_dim**-0.5 if scale is None else scale,
        left=left,
        right=0 if arguments.get("causal", False) else right,
        softcap=arguments.get("softcap", 0.0),
        dropout_p=arguments.get("dropout_p", 0.0),
    )


def attention(
    one: Alone, given: Options, keep: Tensor | None, rounded: Rough
) -> tuple[Tensor, Tensor, Tensor]:
    """out (seqlen_q, heads, head_dim), lse (heads, seqlen_q) and P (heads, seqlen_q, seqlen_k)."""
    q, k, v = (x.transpose(0, 1) for x in one[:3])
    k, v = (x.repeat_interleave(len(q) // len(k), dim=0) for x in (k, v))
    S = rounded(given.scale * q @ k.mT, abs(given.scale) * (q.abs() @ k.mT.abs()).detach())
    if given.softcap > 0:
        S = given.softcap * torch.tanh(S / given.softcap)
    i, j = (torch.arange(n, device=q.device) for n in S.shape[1:])
    distance = j - (i.unsqueeze(1) + S.shape[2] - S.shape[1])  # of key j from query i's diagonal
    if one.slopes is not None:
        S = S - one.slopes.double().view(-1, 1, 1) * distance.abs()
    seen = (distance >= -given.left) & (distance <= given.right)
    sink = S.new_full((len(q),), float("-inf")) if one.sinks is None else one.sinks.double()
    sink = sink.view(-1, 1, 1).expand(-1, S.shape[1], 1)
    nothing = ~seen.any(dim=1, keepdim=True) & (sink == float("-inf"))  # queries without keys and sinks
    S, sink = S.masked_fill(~seen, float("-inf")).masked_fill(nothing, 0), sink.masked_fill(nothing, 0)
    row_max = torch.cat((S, sink), dim=2).detach().amax(dim=2, keepdim=True)
    P = torch.exp(S - row_max).masked_fill(~seen, 0)
    row_sum = (P.sum(dim=2, keepdim=True) + torch.exp(sink - row_max)).masked_fill(nothing, 1)
    lse = row_max + row_sum.log()
    # The backward pass recomputes P from the LSE, as rough as that is.
    P = rounded(P, (P * lse.abs()).detach())
    lse = lse.masked_fill(nothing, float("-inf")).squeeze(2)
    kept = P if keep is None else P * keep / (1 - given.dropout_p)
    # By each element of out, so that the gradient of the sum, dO O, is as rough as a rounded O makes it.
    sums = row_sum.expand(-1, -1, v.shape[2])
    out = rounded(rounded(kept) @ v / rounded(sums, row_sum.detach()))
    return out.transpose(0, 1), lse, P / row_sum


def evaluate(
    function: str, arguments: dict[str, Any], kept: Tensor | None = None, rounded: Rough = exact
) -> Expected:
    """The result of the function; `kept`: which probabilities dropout kept, shaped like S_dmask."""
    every = sequences(function, arguments)
    results = []
    for b, one in enumerate(every):
        keep = None if kept is None else kept[b, :, : len(one.q), : len(one.k)]
        results.append(attention(one, options(arguments, one.q.shape[2]), keep, rounded))
    outs, lses, probabilities = ([result[i] for result in results] for i in range(3))
    q = queries(function, arguments)
    if q.ndim == 4:
        lse = torch.stack(lses) if lses else q.new_zeros(0, q.shape[2], q.shape[1])
        return Expected(torch.stack(outs) if outs else q, lse, probabilities)
    rest = len(q) - sum(map(len, outs))  # of no sequence: out 0, lse -inf
    out = torch.cat([*outs, q.new_zeros(rest, *q.shape[1:])])
    lse = torch.cat([*lses, q.new_full((q.shape[1], rest), float("-inf"))], dim=1)
    return Expected(out, lse, probabilities)


def queries(function: str, arguments: dict[str, Any]) -> Tensor:
    return arguments["qkv"].select(-3, 0) if "qkv" in arguments else arguments["q"]


def sequences(function: str, arguments: dict[str, Any]) -> list[Alone]:
    """Each sequence of the call."""
    q, slopes = queries(function, arguments), arguments.get("alibi_slopes")
    sinks = arguments.get("s_aux")
    if "varlen" in function:
        starts = arguments["cu_seqlens" if "qkv" in arguments else "cu_seqlens_q"].tolist()
        q = [q[start:end] for start, end in zip(starts, starts[1:], strict=False)]
    if "qkv" in arguments:
        k, v = (arguments["qkv"].select(-3, i) for i in (1, 2))
    elif "kv" in arguments:
        k, v = arguments["kv"].unbind(-3)
    else:
        k, v = (arguments.get(f"{name}_cache", arguments.get(name)) for name in "kv")
    every = []
    for b in range(len(q)):
        its_k, its_v = k_and_v_of(function, arguments, k, v, b)
        its_slopes = slopes if slopes is None or slopes.ndim == 1 else slopes[b]
        every.append(Alone(q[b], its_k, its_v, its_slopes, sinks))
    return every


def k_and_v_of(
    function: str, arguments: dict[str, Any], k: Tensor, v: Tensor, b: int
) -> tuple[Tensor, Tensor]:
    """The keys and values of sequence b that count."""
    if function == "flash_attn_with_kvcache":
        row, start, end = places_in_cache(arguments)[b]
        end += 0 if arguments.get("k") is None else arguments["k"].shape[1]
        return stored(arguments, k, row, start, end), stored(arguments, v, row, start, end)
    if "varlen" not in function:
        return k[b], v[b]
    used = arguments.get("seqused_k")
    starts = arguments["cu_seqlens"] if "qkv" in arguments else arguments["cu_seqlens_k"]
    length = int(starts[b + 1] - starts[b]) if starts is not None else 0
    length = length if used is None else int(used[b])
    if k.ndim == 3:
        first = int(starts[b])
        return k[first : first + length], v[first : first + length]
    return stored(arguments, k, b, 0, length), stored(arguments, v, b, 0, length)


def places_in_cache(arguments: dict[str, Any]) -> list[tuple[int, int, int]]:
    """Of each sequence: its row, its first token, and where its tokens end before the append."""
    batch, seqlens = len(arguments["q"]), arguments.get("cache_seqlens")
    if seqlens is None:
        table, page_size = arguments.get("block_table"), arguments["k_cache"].shape[1]
        seqlens = page_size if table is None else page_size * table.shape[1]
    ends = [seqlens] * batch if isinstance(seqlens, int) else seqlens.tolist()
    rows, starts = (arguments.get(name) for name in ("cache_batch_idx", "cache_leftpad"))
    rows = range(batch) if rows is None else rows.tolist()
    starts = [0] * batch if starts is None else starts.tolist()
    return list(zip(rows, starts, ends, strict=True))


def stored(arguments: dict[str, Any], cache: Tensor, row: int, start: int, end: int) -> Tensor:
    """Tokens start to end of a row of storage, through the block table if there is one."""
    table = arguments.get("block_table")
    return cache[row, start:end] if table is None else cache[pages(cache, table, row, start, end)]


def pages(cache: Tensor, table: Tensor, row: int, start: int, end: int) -> tuple[Tensor, Tensor]:
    """Where tokens start to end of a row are: their pages, and where in these."""
    tokens = torch.arange(start, end, device=cache.device)
    return table[row, tokens // cache.shape[1]].long(), tokens % cache.shape[1]


def append(arguments: dict[str, Any]) -> dict[str, Any]:
    """The arguments of flash_attn_with_kvcache with q rotated and the new keys and values in the caches."""
    after = dict(arguments)
    if arguments.get("k") is None:
        return after
    caches = [arguments[name].clone() for name in ("k_cache", "v_cache")]
    after |= dict(zip(("k_cache", "v_cache"), caches, strict=True))
    q, new = arguments["q"].clone(), arguments["k"].shape[1]
    given = options(arguments, q.shape[3])
    step = 0 if given.left == given.right == float("inf") else 1
    for b, (row, _, end) in enumerate(places_in_cache(arguments)):
        k, v = arguments["k"][b], arguments["v"][b]
        if arguments.get("rotary_cos") is not None:
            k = rotated(arguments, k, [end + i for i in range(new)])
            q[b] = rotated(arguments, q[b], [end + i * step for i in range(q.shape[1])])
        for cache, x in zip(caches, (k, v), strict=True):
            table = arguments.get("block_table")
            place = (row, slice(end, end + new))
            cache[place if table is None else pages(cache, table, row, end, end + new)] = x
    return after | {"q": q}


def rotated(arguments: dict[str, Any], x: Tensor, positions: Sequence[int]) -> Tensor:
    """x (seqlen, heads, head_dim), each pair of elements turned by its position's angle."""
    cos, sin = (arguments[name].double()[positions].unsqueeze(1) for name in ("rotary_cos", "rotary_sin"))
    half = cos.shape[-1]
    one = torch.arange(half, device=x.device)
    one, two = (2 * one, 2 * one + 1) if arguments.get("rotary_interleaved", True) else (one, one + half)
    wide, turned = x.double(), x.clone()
    turned[..., one] = (wide[..., one] * cos - wide[..., two] * sin).to(x.dtype)
    turned[..., two] = (wide[..., one] * sin + wide[..., two] * cos).to(x.dtype)
    return turned
