"""The attention functions as PyTorch operators, for whoever traces, watches or transforms a call.

    torch.ops.mini_flash_attention.{forward, forward_into, backward, cache, cache_append}

torch.compile and torch.export, selective checkpointing, FLOP counters, torch.func, tensor subclasses see one
operator, and what they want to know of it: the shapes of its results, its gradient, its batching rule, its
FLOPs, how it is sharded. Plain eager calls do not come through here: that would cost more than the rest of
the call. The functions at the end are what `api` calls instead of its own ways where `fast.is_watched` says
so.
"""

import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from mini_flash_attention import backend, checks, problem, sinks
from mini_flash_attention.gpu import fast
from mini_flash_attention.problem import Inputs, Layout, Problem

NAMESPACE = "mini_flash_attention"
LIBRARY = torch.library.Library(NAMESPACE, "DEF")
OPERATORS = torch.ops.mini_flash_attention

# cu_seqlens_q says that q is packed. max_seqlen_q: None where the host does not know it, or for dense q.
LAYOUT = (
    "Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, Tensor? seqused_k, Tensor? block_table, SymInt? max_seqlen_q"
)
SCORE = "float? softmax_scale, bool causal, SymInt window_left, SymInt window_right, float softcap"
TENSORS = "Tensor? alibi_slopes, Tensor? s_aux, Tensor? seed"
OPTIONS = f"{LAYOUT}, {TENSORS}, float dropout_p, {SCORE}, bool deterministic, SymInt num_splits"
DENSE = (None,) * 5  # the layout of dense q, k, v
S_AUX = 6  # its place in OPTIONS
UPDATE = "Tensor k, Tensor v, Tensor? rotary_cos, Tensor? rotary_sin, bool rotary_interleaved"
CACHE = (
    "Tensor? cache_seqlens, SymInt? length, Tensor? cache_batch_idx, Tensor? cache_leftpad, "
    f"Tensor? block_table, Tensor? alibi_slopes, Tensor? s_aux, {SCORE}, SymInt num_splits"
)


def define(schema: str, implementation: Callable[..., Any], fake: Callable[..., Any]) -> None:
    name = schema.partition("(")[0]
    LIBRARY.define(schema, tags=torch.Tag.pt2_compliant_tag)
    LIBRARY.impl(name, implementation, "CompositeExplicitAutograd")
    # As torch.library.register_fake does it, which searches the sources for its caller: 2 ms each.
    LIBRARY.impl(name, fake, "Meta")


# Attention to dense and to packed tensors. `options` are those of the schema, in its order.


def call_of(
    q: Tensor, k: Tensor, v: Tensor, *options: Any, out: Tensor | None = None
) -> tuple[Problem, Inputs]:
    (*layout, slopes, s_aux, seed, dropout_p), score, last = options[:-7], options[-7:-2], options[-2:]
    cu_seqlens_q, cu_seqlens_k, seqused_k, table, longest = layout
    (scale, causal, left, right, softcap), (deterministic, num_splits) = score, last
    options = dropout_p, scale, causal, (left, right), softcap, slopes, deterministic, s_aux
    if cu_seqlens_q is None:
        facts, x = problem.dense(q, k, v, options)
    else:
        longest = q.shape[0] if longest is None else longest
        longest_k = _most_keys(k.shape, None if table is None else table.shape)
        lengths = cu_seqlens_q, cu_seqlens_k, longest, longest_k, table, seqused_k, num_splits
        with torch.no_grad():  # whoever called has asked for what requires a gradient
            facts, x = problem.varlen(q, k, v, lengths, options, out)
    if seed is not None:  # as `api` draws it: a number, or one on the GPU
        x = x._replace(seed=seed if seed.is_cuda else seed.item())
    return facts, x


def _most_keys(k: Sequence[int], block_table: Sequence[int] | None) -> int:
    """That a sequence may have, by the shapes: all of packed ones, or the capacity of its row or pages."""
    if block_table is not None:
        return block_table[-1] * k[1]
    return k[0] if len(k) == 3 else k[1]


def forward(q: Tensor, k: Tensor, v: Tensor, *options: Any) -> tuple[Tensor, Tensor]:
    facts, x = call_of(q, k, v, *options)
    out, lse = backend.forward(facts, x)
    return like(q, out), lse


def forward_into(q: Tensor, k: Tensor, v: Tensor, out: Tensor, *options: Any) -> Tensor:
    return backend.forward(*call_of(q, k, v, *options, out=out), out)[1]


def backward(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    *options: Any,
) -> tuple[Tensor, ...]:
    *others, deterministic, num_splits = options
    deterministic = deterministic or torch.are_deterministic_algorithms_enabled()
    facts, x = call_of(q, k, v, *others, deterministic, num_splits)
    return tuple(dx.contiguous() for dx in backend.backward(facts, x, out, lse, dout, dlse))


def like(x: Tensor, result: Tensor) -> Tensor:
    """The result with the strides of empty_like(x), which the fake promises: compiled code relies on them."""
    if x.is_contiguous() and result.is_contiguous():
        return result
    promised = torch.empty_like(x)
    return result if result.stride() == promised.stride() else promised.copy_(result)


def fake_forward(q: Tensor, k: Tensor, v: Tensor, *options: Any) -> tuple[Tensor, Tensor]:
    if _is_known(q, k, v, *options):  # then errors come when it is traced, else when it runs
        _check(q, k, v, *options)
    shape = q.shape[1::-1] if options[0] is not None else (q.shape[0], q.shape[2], q.shape[1])
    return torch.empty_like(q), q.new_empty(shape, dtype=_wide(q))


def _check(*arguments: Any) -> None:
    tensors, numbers = arguments[: 3 + S_AUX + 1], arguments[3 + S_AUX + 2 :]
    call_of(*tensors, None, *numbers)  # without a seed


def fake_forward_into(q: Tensor, k: Tensor, v: Tensor, out: Tensor, *options: Any) -> Tensor:
    pin(out)
    return fake_forward(q, k, v, *options)[1]  # whether out overlaps the others only memory can tell


def fake_backward(
    dout: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, *_: Any
) -> tuple[Tensor, ...]:
    return tuple(x.new_empty(x.shape) for x in (q, k, v))


def _wide(q: Tensor) -> torch.dtype:
    """Of the LSE."""
    return torch.float64 if q.dtype == torch.float64 else torch.float32


def _is_known(*arguments: Any) -> bool:
    """Whether no size and no number is a symbol."""
    sizes = [size for x in arguments for size in (x.shape if isinstance(x, Tensor) else [x])]
    return not any(isinstance(x, torch.SymInt | torch.SymFloat) for x in sizes)


def pin(*written: Tensor) -> None:
    """Make the shape of what is written to a constant of the graph, if it starts inside a larger tensor.

    Inductor takes a symbolic storage offset of a mutated argument for 0 (pytorch#198068, seen with 2.13), and
    without a word the operator writes to the wrong place. So a graph is compiled for each shape of a cache.
    """
    for x in written:
        if type(x.storage_offset()) is not int:
            for size in (*x.shape, *x.stride(), x.storage_offset()):
                int(size)


def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, *options = inputs
    ctx.save_for_backward(q, k, v, *output, *(x if isinstance(x, Tensor) else None for x in options))
    ctx.options = [None if isinstance(x, Tensor) else x for x in options]
    ctx.set_materialize_grads(False)


def saved(ctx: Any) -> tuple[list[Tensor], list[Any]]:
    """q, k, v, out, lse; and the options, tensors among them."""
    q, k, v, out, lse, *tensors = ctx.saved_tensors
    options = [number if x is None else x for x, number in zip(tensors, ctx.options, strict=True)]
    return [q, k, v, out, lse], options


def gradients(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple[Tensor | None, ...]:
    checks.no_second_derivative()
    return _gradients(OPERATORS.backward, ctx, dout, dlse)


def _gradients(
    operator: Callable[..., Any], ctx: Any, dout: Tensor | None, dlse: Tensor | None
) -> tuple[Tensor | None, ...]:
    tensors, options = saved(ctx)
    out, lse = tensors[3:]
    others: list[Tensor | None] = [None] * len(options)
    if ctx.needs_input_grad[3 + S_AUX]:
        others[S_AUX] = sinks.gradient(options[S_AUX], out, lse, dout, dlse)
    dout = torch.zeros_like(out) if dout is None else dout
    return *operator(dout, dlse, *tensors, *options), *others


define(f"forward(Tensor q, Tensor k, Tensor v, {OPTIONS}) -> (Tensor, Tensor)", forward, fake_forward)
define(
    f"forward_into(Tensor q, Tensor k, Tensor v, Tensor(a!) out, {OPTIONS}) -> Tensor",
    forward_into,
    fake_forward_into,
)
define(
    "backward(Tensor dout, Tensor? dlse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, "
    f"{OPTIONS}) -> (Tensor, Tensor, Tensor)",
    backward,
    fake_backward,
)
torch.library.register_autograd(f"{NAMESPACE}::forward", gradients, setup_context=setup_context, lib=LIBRARY)


# torch.func, in whose transforms the gradient of register_autograd takes no part


class Transformed(torch.autograd.Function):
    """`forward` under torch.func.grad, vjp and vmap."""

    generate_vmap_rule = True
    setup_context = staticmethod(setup_context)

    @staticmethod
    def forward(*arguments: Any) -> tuple[Tensor, Tensor]:
        return OPERATORS.forward(*arguments)

    @staticmethod
    def backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple[Tensor | None, ...]:
        return _gradients(TransformedBackward.apply, ctx, dout, dlse)


class TransformedBackward(torch.autograd.Function):
    """torch.func differentiates with create_graph: only a second derivative that is used may raise."""

    generate_vmap_rule = True

    @staticmethod
    def forward(*arguments: Any) -> tuple[Tensor, ...]:
        return OPERATORS.backward(*arguments)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *_: Tensor | None) -> None:
        raise RuntimeError("attention has no second derivative")


def register_batching(name: str, count: int) -> None:
    """torch.vmap: the new dimension joins the batch. count: how many arguments have one."""

    def rule(
        info: Any, in_dims: tuple[int | None, ...], *arguments: Any
    ) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
        options = arguments[count:]
        if any(x is not None for x in options[:5]) or options[7] is not None:
            raise NotImplementedError("torch.vmap takes dense q, k and v only, and no dropout_p")
        if options[5] is not None and (options[5].ndim != 1 or in_dims[count + 5] is not None):
            raise NotImplementedError("alibi_slopes must be (heads,) under torch.vmap, the same for all")
        if in_dims[count + S_AUX] is not None:
            raise NotImplementedError("s_aux must be (heads,) under torch.vmap, the same for all")
        size, flat = info.batch_size, []
        for x, dim in zip(arguments[:count], in_dims, strict=False):
            if x is not None:
                x = x.expand(size, *x.shape) if dim is None else x.movedim(dim, 0)
            flat.append(None if x is None else x.flatten(0, 1))
        results = getattr(OPERATORS, name)(*flat, *options)
        return tuple(x.unflatten(0, (size, -1)) for x in results), (0,) * len(results)

    torch.library.register_vmap(f"{NAMESPACE}::{name}", rule, lib=LIBRARY)


register_batching("forward", 3)
register_batching("backward", 7)


# Attention to a cache


def cache(q: Tensor, k_cache: Tensor, v_cache: Tensor, *options: Any) -> tuple[Tensor, Tensor]:
    return cache_append(q, k_cache, v_cache, None, None, None, None, True, *options)


def cache_append(q: Tensor, k_cache: Tensor, v_cache: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
    new, (seqlens, length, *rest), (slopes, s_aux, *score) = others[:5], others[5:10], others[10:]
    scale, causal, left, right, softcap, num_splits = score
    options = 0.0, scale, causal, (left, right), softcap, slopes, False, s_aux
    places = (length if seqlens is None else seqlens), *rest
    with torch.no_grad():
        facts, x, update = problem.cache(q, k_cache, v_cache, new, places, options, num_splits)
        out, lse = backend.with_cache(facts, x, update, True)
    return like(q, out), lse


def fake_cache(q: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return torch.empty_like(q), q.new_empty((q.shape[0], q.shape[2], q.shape[1]), dtype=_wide(q))


def fake_cache_append(q: Tensor, k_cache: Tensor, v_cache: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    pin(k_cache, v_cache)
    return fake_cache(q)


define(f"cache(Tensor q, Tensor k_cache, Tensor v_cache, {CACHE}) -> (Tensor, Tensor)", cache, fake_cache)
define(
    f"cache_append(Tensor q, Tensor(a!) k_cache, Tensor(b!) v_cache, {UPDATE}, {CACHE}) -> (Tensor, Tensor)",
    cache_append,
    fake_cache_append,
)


# FLOPs, as torch.utils.flop_counter.FlopCounterMode asks for them


def _flops(q: Sequence[int], seqlen_k: int, causal: bool, right: int) -> int:
    """4·B·H·Sq·Sk·D, less the triangle that causal leaves out: of as many queries as keys, half.

    A bound where the lengths are on the device: of packed sequences only the totals are known here, of a
    cache only its capacity.
    """
    batch, seqlen_q, heads, head_dim = (1, *q)[-4:]
    pairs = 2 * seqlen_q * seqlen_k
    if causal or right == 0:  # the last query is on the diagonal of the last key
        pairs = seqlen_k**2 if seqlen_q > seqlen_k else pairs - seqlen_q**2
    return 2 * batch * heads * pairs * head_dim


def _flops_of_attention(q: Sequence[int], k: Sequence[int], options: tuple[Any, ...]) -> int:
    return _flops(q, _most_keys(k, options[3]), options[10], options[12])


def flops_of_forward(q: Any, k: Any, v: Any, *options: Any, out_shape: Any = None, **_: Any) -> int:
    return _flops_of_attention(q, k, options)


def flops_of_forward_into(
    q: Any, k: Any, v: Any, out: Any, *options: Any, out_shape: Any = None, **_: Any
) -> int:
    return _flops_of_attention(q, k, options)


def flops_of_backward(
    dout: Any,
    dlse: Any,
    q: Any,
    k: Any,
    v: Any,
    out: Any,
    lse: Any,
    *options: Any,
    out_shape: Any = None,
    **_: Any,
) -> int:
    return _flops_of_attention(q, k, options) * 5 // 2


def flops_of_cache(q: Any, k_cache: Any, v_cache: Any, *options: Any, out_shape: Any = None, **_: Any) -> int:
    length, table, causal, right = options[1], options[4], options[8], options[10]
    return _flops(q, _most_keys(k_cache, table) if length is None else length, causal, right)


def flops_of_cache_append(
    q: Any, k_cache: Any, v_cache: Any, *others: Any, out_shape: Any = None, **_: Any
) -> int:
    (k, *_new), (seqlens, length, *options) = others[:5], others[5:]
    length = None if length is None else length + k[1]
    return flops_of_cache(q, k_cache, v_cache, seqlens, length, *options)


FLOPS: dict[Any, Callable[..., int]] = {
    OPERATORS.forward: flops_of_forward,
    OPERATORS.forward_into: flops_of_forward_into,
    OPERATORS.backward: flops_of_backward,
    OPERATORS.cache: flops_of_cache,
    OPERATORS.cache_append: flops_of_cache_append,
}


# Who counts FLOPs or splits tensors is told when a call is watched, and not before: flop_counter imports
# Triton, torch.distributed.tensor takes a second.


_told: set[str] = set()


def tell() -> None:
    """Tell those parts of PyTorch that somebody has imported what they want to know of the operators."""
    for module, register in (
        ("torch.utils.flop_counter", register_flops),
        ("torch.distributed.tensor", register_sharding),
    ):
        if module in sys.modules and module not in _told:
            _told.add(module)
            register()


# torch.compile calls it instead of tracing it. torch.compiler.assume_constant_result sets the same, but
# imports the whole compiler for it.
vars(tell)["_dynamo_marked_constant"] = True


def register_flops() -> None:
    from torch.utils.flop_counter import register_flop_formula

    for operator, formula in FLOPS.items():
        register_flop_formula(operator)(formula)


# Tensor parallelism


def register_sharding() -> None:
    """Attention is local where tensors are split over batch or heads."""
    from torch.distributed.tensor import Replicate, Shard
    from torch.distributed.tensor.experimental import register_sharding as register

    whole, batch, heads, heads_of_lse = Replicate(), Shard(0), Shard(2), Shard(1)

    def divides(q: Any, k: Any) -> bool:
        """Whether each process gets the key heads of its query heads."""
        return q.shape[2] == k.shape[2] or k.shape[2] % k.mesh.size() == 0

    @register(OPERATORS.forward.default)
    def of_forward(q: Any, k: Any, v: Any, *options: Any) -> list[Any]:
        rest, dense = [None] * len(options), options[0] is None
        ways: list[Any] = [([whole] * 2, [*[whole] * 3, *rest])]
        if dense:
            ways.append(([batch] * 2, [*[batch] * 3, *rest]))
            if divides(q, k):
                ways.append(([heads, heads_of_lse], [*[heads] * 3, *rest]))
        return ways

    @register(OPERATORS.backward.default)
    def of_backward(
        dout: Any, dlse: Any, q: Any, k: Any, v: Any, out: Any, lse: Any, *options: Any
    ) -> list[Any]:
        rest = [None] * len(options)

        def way(x: Any, of_lse: Any) -> tuple[list[Any], list[Any]]:
            return [x] * 3, [x, None if dlse is None else of_lse, *[x] * 4, of_lse, *rest]

        ways = [way(whole, whole)]
        if options[0] is None:
            ways.append(way(batch, batch))
            if divides(q, k):
                ways.append(way(heads, heads_of_lse))
        return ways


# What `api` calls


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: tuple[Any, ...],
    options: tuple[Any, ...],
    num_splits: int,
    out: Tensor | None,
    return_attn_probs: bool,
) -> Any:
    """flash_attn_func, and flash_attn_varlen_func with a layout. options: problem.Options."""
    dropout_p, scale, causal, window_size, softcap, slopes, deterministic, s_aux = options
    _refuse(q=q, k=k, v=v, s_aux=s_aux)
    if (out is not None or layout[3] is not None) and torch.is_grad_enabled():
        given = {"q": q, "k": k, "v": v, "s_aux": s_aux, "out": out}
        checks.no_gradient("attention to pages, or into a given tensor,", given)
    if slopes is not None:
        checks.facts_of_alibi(slopes)
    if hasattr(q, "to_local"):  # a DTensor
        if s_aux is not None:
            raise NotImplementedError("s_aux: not of a DTensor, whose parts do not know their heads")
        if slopes is not None:
            raise NotImplementedError("alibi_slopes: not of a DTensor, whose parts do not know their heads")
        if dropout_p:
            raise NotImplementedError("dropout_p: not of a DTensor, whose parts would drop the same elements")
    if dropout_p and return_attn_probs:
        raise NotImplementedError("return_attn_probs: S_dmask is for tests of plain calls")
    if not isinstance(num_splits, int | torch.SymInt):
        checks.splits(num_splits)
    left, right = _window(window_size)
    score = scale, checks.flag("causal", causal), left, right, softcap
    return_attn_probs = checks.flag("return_attn_probs", return_attn_probs)
    forward_mode = _in_forward_mode(q, k, v, *(() if s_aux is None else (s_aux,)))
    if forward_mode and out is not None:
        raise NotImplementedError("out: attention into a given tensor has no forward-mode derivative")
    if forward_mode and backend.choose(q.device, backend.forced_backend()) != "cpu":
        raise NotImplementedError(
            "forward-mode differentiation is not there on a GPU; MINI_FLASH_ATTENTION_BACKEND=cpu computes "
            "it with PyTorch operations"
        )
    seed = draw_seed(q.device) if dropout_p else None
    last = checks.flag("deterministic", deterministic), num_splits
    options = *layout, slopes, s_aux, seed, dropout_p, *score, *last
    if out is not None:
        lse = OPERATORS.forward_into(q, k, v, out, *options)
    elif forward_mode:  # PyTorch differentiates the operations of the CPU backend
        out, lse = backend.forward(*call_of(q, k, v, *options))
    elif not torch.compiler.is_compiling() and fast.transforms():
        out, lse = Transformed.apply(q, k, v, *options)
    else:
        out, lse = OPERATORS.forward(q, k, v, *options)
    return (out, lse, None) if return_attn_probs else out


def cached(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    new: tuple[Any, ...],
    places: tuple[Any, ...],
    options: tuple[Any, ...],
    num_splits: int,
) -> tuple[Tensor, Tensor]:
    """flash_attn_with_kvcache: out and LSE. new, places, options: problem.New, Places and Options."""
    scale, causal, window_size, softcap, slopes, _, s_aux = options[1:]
    _refuse(q=q, k_cache=k_cache, v_cache=v_cache, s_aux=s_aux)
    k, v, cos, sin, interleaved = new
    seqlens, *rest = places
    if torch.is_grad_enabled():
        given = {"q": q, "k_cache": k_cache, "v_cache": v_cache, "k": k, "v": v}
        given |= {"rotary_cos": cos, "rotary_sin": sin, "s_aux": s_aux}
        checks.no_gradient("flash_attn_with_kvcache", given)
    if _in_forward_mode(*(x for x in (q, k_cache, v_cache, k, v, s_aux) if x is not None)):
        raise NotImplementedError("flash_attn_with_kvcache has no forward-mode derivative")
    on_device = isinstance(seqlens, Tensor)
    left, right = _window(window_size)
    score = scale, checks.flag("causal", causal), left, right, softcap
    length = (seqlens, None) if on_device else (None, seqlens)
    options = *length, *rest, slopes, s_aux, *score, num_splits
    if k is None and v is None:
        checks.rotary(cos, sin, None, (q.dtype, q.device), 0)
        return OPERATORS.cache(q, k_cache, v_cache, *options)
    if k is None or v is None:
        raise ValueError("k and v must be given together")
    return OPERATORS.cache_append(
        q, k_cache, v_cache, k, v, cos, sin, checks.flag("rotary_interleaved", interleaved), *options
    )


def run_backward(
    problem: Problem, x: Inputs, out: Tensor, lse: Tensor, dout: Tensor, dlse: Tensor | None
) -> tuple[Tensor, ...]:
    """backend.backward, of a plain forward pass."""
    tell()
    layout = x.layout or Layout()
    given = layout.cu_seqlens_q, layout.cu_seqlens_k, layout.seqused_k, None, problem.max_seqlen_q
    seed = x.seed
    if seed is not None and not isinstance(seed, Tensor):
        seed = torch.tensor([seed])
    left, right = (-1 if limit is None else limit for limit in (problem.window_left, problem.window_right))
    score = problem.softmax_scale, False, left, right, problem.softcap
    last = problem.deterministic, problem.num_splits
    options = *given, x.alibi_slopes, x.s_aux, seed, problem.dropout_p, *score, *last
    return OPERATORS.backward(dout, dlse, x.q, x.k, x.v, out, lse, *options)


def draw_seed(device: torch.device) -> Tensor:
    """(1) int64, of 63 bits, by the device's generator.

    By torch.randint, not by an operator of ours nor by another of PyTorch's: it is on the list of those of
    which AOTAutograd does not merge two calls into one, which would give two layers one mask.
    """
    return torch.randint(2**63 - 1, (1,), device=device)


def _window(window_size: Any) -> tuple[int, int]:
    if type(window_size) is not tuple or len(window_size) != 2:
        window_size = checks.pair(window_size)
    left, right = window_size
    return -1 if left is None else left, -1 if right is None else right


def _refuse(*, s_aux: Tensor | None, **tensors: Tensor) -> None:
    """What no operator can take, by name, and what to do about it."""
    for name, x in tensors.items():
        checks.facts(name, x)
    if s_aux is not None:
        checks.facts("s_aux", s_aux)
    tell()


def _in_forward_mode(*tensors: Tensor) -> bool:
    return not torch.compiler.is_compiling() and (fast.is_in_jvp() or any(map(fast.has_tangent, tensors)))
