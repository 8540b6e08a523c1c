"""The operators: what torch.compile, torch.export, torch.func, checkpointing and counters make of a call.

On a GPU too, where there is one. Most graphs are not compiled to machine code ("aot_eager"): all that
concerns an operator but its strides happens before.
"""

from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.library import opcheck
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts
from torch.utils.flop_counter import FlopCounterMode

import mini_flash_attention as mini
from mini_flash_attention import ops

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPE = torch.bfloat16 if DEVICE == "cuda" else torch.float32
OPS = ops.OPERATORS
# Compiled and eager run the same kernels; on a GPU gradients are summed up in any order.
EXACT = dict(rtol=0, atol=0) if DEVICE == "cpu" else dict(rtol=2e-2, atol=2e-2)
CLOSE = dict(rtol=1e-4, atol=1e-4) if DEVICE == "cpu" else dict(rtol=2e-2, atol=5e-2)
PLAIN = (
    *ops.DENSE,
    None,
    None,
    None,
    0.0,
    None,
    True,
    -1,
    -1,
    0.0,
    False,
    0,
)  # the options of a causal dense call
SLOW = pytest.mark.full


@pytest.fixture(autouse=True)
def fresh() -> None:
    torch._dynamo.reset()


def tensor(*shape: int, grad: bool = False) -> Tensor:
    return torch.randn(*shape, device=DEVICE, dtype=DTYPE).requires_grad_(grad)


def qkv(batch=2, seqlen_q=37, seqlen_k=53, heads=4, heads_k=2, dim=16, grad=False) -> list[Tensor]:
    shapes = (batch, seqlen_q, heads, dim), *[(batch, seqlen_k, heads_k, dim)] * 2
    return [tensor(*shape, grad=grad) for shape in shapes]


def packed(lengths=(5, 0, 17), grad=False) -> tuple[list[Tensor], Tensor, int]:
    tensors = [x[0].detach().requires_grad_(grad) for x in qkv(1, sum(lengths), sum(lengths))]
    return tensors, torch.tensor([0, *lengths], device=DEVICE).cumsum(0).int(), max(lengths)


def run(function: Callable[..., Tensor], tensors: list[Tensor]) -> list[Tensor]:
    """out and gradients, from the same seed each time."""
    torch.manual_seed(1)
    out = function(*tensors)
    dout = torch.sin(torch.arange(out.numel(), device=out.device)).view(out.shape).to(out.dtype)
    return [out.detach(), *torch.autograd.grad(out, tensors, dout)]


def same(results: Iterable[Tensor], wanted: Iterable[Tensor], tolerance=EXACT) -> None:
    for x, y in zip(results, wanted, strict=True):
        torch.testing.assert_close(x, y, **tolerance)


def compiled(function: Callable[..., Any], backend="aot_eager", **options: Any) -> Callable[..., Any]:
    return torch.compile(function, fullgraph=True, backend=backend, **options)


# torch.compile

OPTIONS = {
    "plain": {},
    "causal": dict(causal=True),
    "window": dict(window_size=(7, None)),
    "softcap": dict(softcap=5.0),
    "negative scale": dict(softmax_scale=-0.3),
    "dropout": dict(dropout_p=0.3),
    "deterministic": dict(causal=True, deterministic=True),
    "alibi": dict(alibi_slopes=torch.tensor([0.1, 0.2, 0.3, 0.4], device=DEVICE), causal=True),
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("dim", [16, 13])
def test_compiled_is_eager(options, dim) -> None:
    tensors = qkv(dim=dim, grad=True)

    def attention(*qkv: Tensor) -> Tensor:
        return mini.flash_attn_func(*qkv, **options)

    same(run(compiled(attention), tensors), run(attention, tensors))


def test_compiled_sinks() -> None:
    """They learn, and so alone; a step of a cache has them too."""
    tensors = [*qkv(grad=True), tensor(4, grad=True)]

    def attention(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor) -> Tensor:
        out, lse, _ = mini.flash_attn_func(q, k, v, causal=True, s_aux=sinks, return_attn_probs=True)
        return torch.cat((out.flatten(), lse.flatten()))

    same(run(compiled(attention), tensors), run(attention, tensors), CLOSE)

    def of_sinks(sinks: Tensor) -> Tensor:
        return attention(*(x.detach() for x in tensors[:3]), sinks)

    same(run(compiled(of_sinks), tensors[3:]), run(of_sinks, tensors[3:]), CLOSE)

    def step(sinks: Tensor) -> Tensor:
        return mini.flash_attn_with_kvcache(*tensors[:3], s_aux=sinks)

    with torch.no_grad():
        torch.testing.assert_close(compiled(step)(tensors[3]), step(tensors[3]), **CLOSE)


@pytest.mark.parametrize("function", ["qkvpacked", "kvpacked", "varlen_qkvpacked", "varlen_kvpacked"])
def test_packed_functions(function) -> None:
    starts, heads = torch.tensor([0, 5, 12], device=DEVICE).int(), (4, 16)
    lead = (12,) if "varlen" in function else (2, 6)
    lengths = () if "varlen" not in function else (starts, 7) if "qkv" in function else (starts, starts, 7, 7)
    packing = (3,) if "qkv" in function else (2,)
    tensors = [tensor(*lead, *packing, *heads, grad=True)]
    if "qkv" not in function:
        tensors.insert(0, tensor(*lead, *heads, grad=True))

    def attention(*tensors: Tensor) -> Tensor:
        return getattr(mini, f"flash_attn_{function}_func")(*tensors, *lengths, causal=True)

    same(run(compiled(attention, dynamic=True), tensors), run(attention, tensors))


def test_inductor_believes_the_strides() -> None:
    """Heads before tokens in memory, as SDPA has them, where compiled code asserts what a fake promised."""
    shapes = qkv(seqlen_q=4, heads=36, seqlen_k=4, heads_k=36)
    tensors = [x.transpose(1, 2).detach().requires_grad_() for x in shapes]

    def loss(*tensors: Tensor) -> Tensor:
        out, lse, _ = mini.flash_attn_func(*(x.transpose(1, 2) for x in tensors), return_attn_probs=True)
        return (out.float().sum() + lse.square().sum()).view(1)

    same(run(compiled(loss, "inductor"), tensors), run(loss, tensors), CLOSE)


@torch._dynamo.config.patch(error_on_recompile=True)
def test_dynamic_shapes_compile_once() -> None:
    def attention(*qkv: Tensor) -> Tensor:
        return mini.flash_attn_func(*qkv, causal=True)

    once = compiled(attention, dynamic=True)
    for batch, seqlen in (3, 37), (5, 64), (7, 129), (6, 128), (9, 2):  # no two alike: Dynamo would join them
        tensors = qkv(batch, seqlen, seqlen, grad=True)
        same(run(once, tensors), run(attention, tensors))


@torch._dynamo.config.patch(error_on_recompile=True)
@pytest.mark.parametrize("kind", [int, torch.tensor])  # Transformers hands over tensors
def test_varlen_dynamic(kind) -> None:
    def attention(q: Tensor, k: Tensor, v: Tensor, starts: Tensor, longest: Any) -> Tensor:
        return mini.flash_attn_varlen_func(q, k, v, starts, starts, longest, longest, causal=True)

    once = compiled(attention, dynamic=True)
    for lengths in (5, 0, 17, 1, 1, 1), (9, 3, 2, 40, 1, 1, 1), (100, 2, 0, 0, 0, 0, 0, 0):
        tensors, *where = packed(lengths, grad=True)
        where = where[0], kind(where[1])
        results = [run(lambda *t, f=f, w=where: f(*t, *w), tensors) for f in (once, attention)]
        same(*results)


def test_values_are_checked_when_it_runs(monkeypatch) -> None:
    """The switch finds no values while it is traced."""
    monkeypatch.setenv("MINI_FLASH_ATTENTION_CHECK", "1")
    (q, k, v), starts, longest = packed()

    def attention(starts: Tensor) -> Tensor:
        return mini.flash_attn_varlen_func(q, k, v, starts, starts, longest, longest)

    torch.testing.assert_close(compiled(attention)(starts), attention(starts), **EXACT)
    with pytest.raises(ValueError, match="cu_seqlens_q"):
        compiled(attention)(starts + 1)


def test_unpad_in_the_graph() -> None:
    """How many tokens there are is known to the device only: unbacked sizes."""

    def attention(x: Tensor, mask: Tensor) -> Tensor:
        tokens, indices, starts, longest, _ = mini.unpad_input(x, mask)
        out = mini.flash_attn_varlen_func(tokens, tokens, tokens, starts, starts, longest, longest)
        return mini.pad_input(out, indices, *x.shape[:2])

    x = tensor(3, 11, 2, 16)
    mask = torch.arange(11, device=DEVICE) < torch.tensor([[11], [4], [7]], device=DEVICE)
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True, capture_scalar_outputs=True):
        torch.testing.assert_close(compiled(attention)(x, mask), attention(x, mask), **EXACT)


def test_pages_and_out() -> None:
    (q, _, _), starts, longest = packed((3, 1, 2))
    pages = [tensor(8, 4, 2, 16) for _ in range(2)]
    table = torch.randperm(8, device=DEVICE)[:6].int().view(3, 2)
    places = dict(block_table=table, seqused_k=torch.tensor([8, 3, 5], device=DEVICE).int())

    def attention(q: Tensor, out: Tensor) -> Tensor:
        mini.flash_attn_varlen_func(q, *pages, starts, None, longest, 8, **places, out=out, causal=True)
        return out * 2

    result = compiled(attention)(q, torch.zeros_like(q))
    torch.testing.assert_close(result, attention(q, torch.zeros_like(q)), **EXACT)


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=SLOW)])
def test_two_dropouts_are_two_masks(backend) -> None:
    """Whether merged into one by common subexpressions, and whether drawn anew in each call."""

    def difference(*qkv: Tensor) -> Tensor:
        return mini.flash_attn_func(*qkv, dropout_p=0.5) - mini.flash_attn_func(*qkv, dropout_p=0.5)

    tensors = qkv(grad=True)
    with torch._inductor.config.patch(fallback_random=True):  # else Inductor has a generator of its own
        result = run(compiled(difference, backend), tensors)
    assert result[0].abs().max() > 0.1
    same(result, run(difference, tensors), CLOSE)
    torch._dynamo.reset()
    again = compiled(difference, backend)
    assert not again(*tensors).equal(again(*tensors))


@pytest.mark.parametrize("length", ["tensor", "int"])
@pytest.mark.parametrize(
    "backend, paged", [("aot_eager", False), ("aot_eager", True), pytest.param("inductor", True, marks=SLOW)]
)
def test_cache_in_place(backend, paged, length) -> None:
    """A step that appends to views which start inside the cache, by one graph for all lengths."""
    cos, sin = (torch.rand(24, 8, device=DEVICE, dtype=DTYPE) for _ in range(2))
    table = torch.randperm(6, device=DEVICE).int().view(2, 3) if paged else None

    def step(q: Tensor, k: Tensor, v: Tensor, cache: Tensor, lengths: Any) -> Tensor:
        places = dict(cache_seqlens=lengths, block_table=table)
        return mini.flash_attn_with_kvcache(q + 1, *cache, k, v, cos, sin, **places, causal=True) * 2

    def decode(function: Callable[..., Tensor]) -> list[Tensor]:
        torch.manual_seed(3)
        cache = tensor(2, *((6, 8) if paged else (2, 24)), 2, 16)
        place, outs = cache.data_ptr(), []
        for i in range(2, 6):
            lengths = i if length == "int" else torch.full((2,), i, device=DEVICE).int()
            outs.append(function(*qkv(2, 1, 1), cache, lengths))
        assert cache.data_ptr() == place
        return [*outs, cache]

    dynamic = True if length == "int" else None  # else the second int compiles anew
    with torch.no_grad(), torch._dynamo.config.patch(error_on_recompile=True):
        same(decode(compiled(step, backend, dynamic=dynamic)), decode(step))


@pytest.mark.parametrize("dynamic", [False, True])
def test_cache_is_not_copied(dynamic) -> None:
    """The code that Inductor makes holds no copy of the cache, whether it is an input or a view of one.

    Where the view starts is a symbol with dynamic shapes (pytorch#198068): what is written is right, too.
    """
    from torch._inductor.utils import run_and_get_code

    caches = [torch.zeros(2, 3, 4, 64, 2, 16, device=DEVICE, dtype=DTYPE) for _ in range(2)]
    tensors, lengths = qkv(4, 1, 1), torch.zeros(4, device=DEVICE).int()

    def step(q: Tensor, k: Tensor, v: Tensor, cache: Tensor) -> Tensor:
        for layer in range(3):
            k_cache, v_cache = cache[0, layer], cache[1, layer]
            q = mini.flash_attn_with_kvcache(q, k_cache, v_cache, k, v, cache_seqlens=lengths) + 1
        return q

    with torch.no_grad():
        out, code = run_and_get_code(compiled(step, "inductor", dynamic=dynamic), *tensors, caches[0])
        same([out, caches[0]], [step(*tensors, caches[1]), caches[1]])
    assert "cache_append" in code[0]
    assert "as_strided_copy" not in code[0] and "clone" not in code[0]
    assert not [line for line in code[0].splitlines() if "empty_strided" in line and "64" in line]


def test_compiled_autograd() -> None:
    tensors = qkv(grad=True)
    wanted = run(mini.flash_attn_func, tensors)[1:]
    torch.manual_seed(1)
    out = mini.flash_attn_func(*tensors)
    dout = torch.sin(torch.arange(out.numel(), device=out.device)).view(out.shape).to(out.dtype)
    with torch._dynamo.compiled_autograd._enable(lambda graph: torch.compile(graph, backend="aot_eager")):
        out.backward(dout)
    same([x.grad for x in tensors], wanted, CLOSE)


# opcheck: schema, fakes, autograd registration, dynamic shapes


def test_opcheck_of_forward_and_backward() -> None:
    tensors = qkv(grad=True)
    opcheck(OPS.forward.default, (*tensors, *PLAIN))
    seed = torch.tensor([7], device=DEVICE)
    sinks = torch.randn(4, device=DEVICE).requires_grad_()
    opcheck(OPS.forward.default, (*tensors, *PLAIN[:6], sinks, seed, 0.2, *PLAIN[9:]))
    tensors, starts, longest = packed(grad=True)
    ragged = starts, starts, None, None, longest, *PLAIN[5:]
    opcheck(OPS.forward.default, (*tensors, *ragged))
    out, lse = OPS.forward(*tensors, *ragged)
    detached = [x.detach() for x in (*tensors, out, lse)]
    opcheck(OPS.backward.default, (torch.ones_like(detached[3]), detached[4], *detached, *ragged))
    opcheck(OPS.forward_into.default, (*detached[:3], torch.empty_like(detached[0]), *ragged))


def test_opcheck_of_cache() -> None:
    q, k, v = qkv(2, 1, 1)
    caches = [tensor(2, 24, 2, 16) for _ in range(2)]
    lengths = torch.tensor([3, 5], device=DEVICE).int()
    options = lengths, *(None,) * 5, torch.rand(4, device=DEVICE), None, True, -1, -1, 0.0, 0
    opcheck(OPS.cache.default, (q, *caches, *options))
    opcheck(OPS.cache_append.default, (q, *caches, k, v, None, None, True, *options))


# Export, checkpointing, torch.func


class Block(nn.Module):
    """A transformer layer."""

    def __init__(self, width=32, heads=4, dropout=0.0) -> None:
        super().__init__()
        self.norm, self.qkv = nn.LayerNorm(width), nn.Linear(width, 3 * width)
        self.out, self.heads, self.dropout = nn.Linear(width, width), heads, dropout

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm(x)).unflatten(-1, (3, self.heads, -1)).unbind(2)
        return x + self.out(mini.flash_attn_func(q, k, v, self.dropout, causal=True).flatten(2))


def model(dropout=0.0) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*(Block(dropout=dropout) for _ in range(2))).to(DEVICE, DTYPE)


def exported(strict=False) -> torch.export.ExportedProgram:
    sizes = ({0: torch.export.Dim("batch"), 1: torch.export.Dim("seqlen")},)
    with torch.no_grad():
        return torch.export.export(model(), (tensor(2, 19, 32),), dynamic_shapes=sizes, strict=strict)


@pytest.mark.parametrize("strict", [False, True])
def test_export(strict, tmp_path) -> None:
    program = exported(strict)
    assert sum("mini_flash_attention.forward" in str(node.target) for node in program.graph.nodes) == 2
    torch.export.save(program, tmp_path / "model.pt2")
    loaded, x = torch.export.load(tmp_path / "model.pt2").module(), tensor(3, 41, 32)
    torch.testing.assert_close(loaded(x), model()(x), **EXACT)


@SLOW
def test_aot_inductor(tmp_path) -> None:
    package = torch._inductor.aoti_compile_and_package(exported(), package_path=str(tmp_path / "model.pt2"))
    x = tensor(3, 41, 32)
    with torch.no_grad():
        torch.testing.assert_close(torch._inductor.aoti_load_package(package)(x), model()(x), **CLOSE)


def test_jit_trace_draws_anew() -> None:
    x = tensor(2, 19, 4, 16)
    traced = torch.jit.trace(lambda x: mini.flash_attn_func(x, x, x, 0.5), x, check_trace=False)
    assert "mini_flash_attention::forward" in str(traced.graph)
    assert not traced(x).equal(traced(x))
    torch.manual_seed(4)
    out = traced(x)
    torch.manual_seed(4)
    torch.testing.assert_close(out, mini.flash_attn_func(x, x, x, 0.5), **EXACT)


def gradients(net: nn.Module, x: Tensor, function: Callable[[Tensor], Tensor] | None = None) -> list[Tensor]:
    torch.manual_seed(5)
    loss = (function or net)(x).float().square().sum()
    return list(torch.autograd.grad(loss, list(net.parameters())))


@pytest.mark.parametrize("backend", [None, "aot_eager"])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("save", [False, True])
def test_selective_checkpoint(backend, dropout, save) -> None:
    net, x, recomputed = model(dropout), tensor(2, 19, 32), []

    def policy(ctx: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        if op is OPS.forward.default:
            recomputed.append(ctx.is_recompute)
            return CheckpointPolicy.MUST_SAVE if save else CheckpointPolicy.PREFER_RECOMPUTE
        return CheckpointPolicy.PREFER_RECOMPUTE

    contexts = lambda: create_selective_checkpoint_contexts(policy)  # noqa: E731

    def function(x: Tensor) -> Tensor:
        for block in net:
            x = checkpoint(block, x, use_reentrant=False, context_fn=contexts)
        return x

    wanted = gradients(net, x)
    result = gradients(net, x, compiled(function, backend) if backend else function)
    assert recomputed
    same(result, wanted, CLOSE)


def test_checkpoint_that_saves_products() -> None:
    """Our own arithmetic is no business of a policy: results of products, written over later, gave NaN."""
    contexts = lambda: create_selective_checkpoint_contexts([torch.ops.aten.bmm.default])  # noqa: E731
    x = tensor(2, 37, 4, 8, grad=True)

    def attention(x: Tensor) -> Tensor:
        return mini.flash_attn_func(x, x, x, causal=True)

    saving = lambda x: checkpoint(attention, x, use_reentrant=False, context_fn=contexts)  # noqa: E731
    same(run(saving, [x]), run(attention, [x]), CLOSE)


def loss(*qkv: Tensor) -> Tensor:
    return mini.flash_attn_func(*qkv, causal=True).square().sum()


def test_torch_func() -> None:
    """Gradients by torch.func: of a sample, of each of a batch, by vjp."""
    tensors = qkv(grad=True)
    wanted = torch.autograd.grad(loss(*tensors), tensors)
    plain = [x.detach() for x in tensors]
    gradient = torch.func.grad(loss, argnums=(0, 1, 2))
    same(gradient(*plain), wanted, CLOSE)
    batches = [torch.stack([x, x + 1]) for x in plain]
    same([x[0] for x in torch.vmap(gradient)(*batches)], wanted, CLOSE)
    value, pull_back = torch.func.vjp(loss, *plain)
    same(pull_back(torch.ones_like(value)), wanted, CLOSE)


def test_torch_func_of_sinks() -> None:
    q, k, v = qkv()
    sinks = torch.randn(4, device=DEVICE)

    def loss_of(sinks: Tensor, q: Tensor) -> Tensor:
        out, lse, _ = mini.flash_attn_func(q, k, v, s_aux=sinks, return_attn_probs=True)
        return out.float().square().sum() + lse.sin().sum()

    leaf = sinks.clone().requires_grad_()
    wanted = [torch.autograd.grad(loss_of(leaf, x), leaf)[0] for x in (q, q + 1)]
    same([torch.func.grad(loss_of)(sinks, q)], wanted[:1], CLOSE)
    each = torch.vmap(torch.func.grad(loss_of), in_dims=(None, 0))(sinks, torch.stack([q, q + 1]))
    same(each, wanted, CLOSE)
    with pytest.raises(NotImplementedError, match="s_aux"):
        torch.vmap(lambda x: mini.flash_attn_func(q, k, v, s_aux=x))(torch.stack([sinks, sinks]))


def test_vmap_over_trained_weights() -> None:
    q, k, v = qkv(grad=True)
    batch = torch.stack([q, q + 1]).detach()
    out = torch.vmap(lambda q: mini.flash_attn_func(q, k, v), in_dims=0)(batch)
    wanted = torch.stack([mini.flash_attn_func(x, k, v) for x in batch])
    same([out, *torch.autograd.grad(out.square().sum(), (k, v))],
         [wanted, *torch.autograd.grad(wanted.square().sum(), (k, v))], CLOSE)  # fmt: skip
    with pytest.raises(NotImplementedError, match="dropout_p"):
        torch.vmap(lambda q: mini.flash_attn_func(q, k, v, 0.5), randomness="same")(batch)


def test_no_second_derivative() -> None:
    """None is better than a wrong one, with a warning alone."""
    q, k, v = qkv()
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.func.grad(lambda q: torch.func.grad(loss)(q, k, v).sum())(q)
    q.requires_grad_()
    for attention in (OPS.forward(q, k, v, *PLAIN)[0], mini.flash_attn_func(q, k, v)):
        with pytest.raises(RuntimeError, match="no second derivative"):
            torch.autograd.grad(attention.sum(), q, create_graph=True)


@pytest.mark.skipif(DEVICE == "cuda", reason="test_forward_mode_on_a_gpu")
def test_forward_mode() -> None:
    """By PyTorch's own differentiation of the CPU backend, for trained weights too."""
    q, k, v = (x.double().requires_grad_() for x in qkv())
    tangent = torch.randn_like(q)

    def attention(q: Tensor) -> Tensor:
        return mini.flash_attn_func(q, k, v, causal=True)

    h = 1e-6
    wanted = (attention(q + h * tangent) - attention(q - h * tangent)) / (2 * h)
    close = dict(rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(torch.func.jvp(attention, (q.detach(),), (tangent,))[1], wanted, **close)
    with forward_ad.dual_level():
        for primal in (q, q.detach()):
            dual = forward_ad.unpack_dual(attention(forward_ad.make_dual(primal, tangent)))
            torch.testing.assert_close(dual.tangent, wanted, **close)
    sinks, tangent = torch.randn(2, 4, dtype=torch.float64)

    def of_sinks(sinks: Tensor) -> Tensor:
        return mini.flash_attn_func(q, k, v, s_aux=sinks)

    wanted = (of_sinks(sinks + h * tangent) - of_sinks(sinks - h * tangent)) / (2 * h)
    torch.testing.assert_close(torch.func.jvp(of_sinks, (sinks,), (tangent,))[1], wanted, **close)


def test_forward_mode_that_is_refused() -> None:
    q, k, v = qkv()
    (x, _, _), starts, longest = packed()
    lengths = starts, starts, longest, longest
    cases = (
        (q, lambda q: mini.flash_attn_with_kvcache(q, k, v)),
        (x, lambda x: mini.flash_attn_varlen_func(x, x, x, *lengths, out=torch.empty_like(x))),
    )
    for primal, function in cases:
        with pytest.raises(NotImplementedError, match="forward-mode"):
            torch.func.jvp(function, (primal,), (torch.ones_like(primal),))


@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")
def test_forward_mode_on_a_gpu() -> None:
    q, k, v = qkv()
    with pytest.raises(NotImplementedError, match="forward-mode"):
        torch.func.jvp(lambda q: mini.flash_attn_func(q, k, v), (q,), (torch.ones_like(q),))


# What counts, what is no plain tensor


@pytest.mark.parametrize("causal", [False, True])
def test_counts_flops(causal) -> None:
    tensors = qkv(2, 64, 64, grad=True)
    forward = 4 * 2 * 4 * 64 * 64 * 16 // (2 if causal else 1)
    with FlopCounterMode(display=False) as counter:
        out = mini.flash_attn_func(*tensors, causal=causal)
        assert counter.get_total_flops() == forward
        out.sum().backward()
    assert counter.get_total_flops() == forward * 7 // 2
    out = mini.flash_attn_func(*tensors, causal=causal)  # plainly, with a gradient that is counted
    with FlopCounterMode(display=False) as counter:
        out.sum().backward()
    assert counter.get_total_flops() == forward * 5 // 2


def test_counts_pairs_that_are_seen() -> None:
    """Of other lengths than q's, pages and caches: what lies under the diagonal, or in the storage."""

    def count(function: Callable[..., Any], *tensors: Tensor, **options: Any) -> int:
        with FlopCounterMode(display=False) as counter:
            function(*tensors, **options)
        return counter.get_total_flops() // (4 * 2 * 4 * 16)

    q, k, v = qkv(2, 8, 32)
    assert count(mini.flash_attn_func, q, k, v) == 8 * 32
    assert count(mini.flash_attn_func, q, k, v, causal=True) == 8 * 32 - 8 * 8 // 2
    assert count(mini.flash_attn_func, *qkv(2, 32, 8), causal=True) == 8 * 8 // 2
    cached = mini.flash_attn_with_kvcache
    assert count(cached, q, k, v) == 8 * 32
    assert count(cached, q, k, v, cache_seqlens=20) == 8 * 20
    assert count(cached, q, k, v, k[:, :4], v[:, :4], cache_seqlens=20, causal=True) == 8 * 24 - 8 * 8 // 2
    pages = [tensor(6, 16, 2, 16) for _ in range(2)]
    table = torch.arange(6, dtype=torch.int32, device=DEVICE).view(2, 3)
    lengths = torch.tensor([30, 40], dtype=torch.int32, device=DEVICE)
    assert count(cached, q, *pages, cache_seqlens=lengths, block_table=table) == 8 * 3 * 16


def test_gradient_of_a_plain_call_under_a_mode() -> None:
    """A call before a mode, its gradient within, with all that a call may have: the same gradients."""
    slopes = torch.rand(4, device=DEVICE)
    tensors, starts, longest = packed(grad=True)
    options = dict(causal=True, window_size=(5, 0), softcap=3.0, alibi_slopes=slopes, dropout_p=0.2)

    def attention(*qkv: Tensor) -> Tensor:
        torch.manual_seed(2)
        return mini.flash_attn_varlen_func(*qkv, starts, starts, longest, longest, **options)

    wanted = torch.autograd.grad(attention(*tensors).square().sum(), tensors)
    out = attention(*tensors).square().sum()
    with FlopCounterMode(display=False):
        same(torch.autograd.grad(out, tensors), wanted, CLOSE)


def test_fake_and_meta() -> None:
    from torch._subclasses import FakeTensorMode

    with FakeTensorMode():
        fakes = (torch.empty(2, 5, 4, 16, device="cuda", dtype=torch.bfloat16) for _ in range(3))
        out = mini.flash_attn_func(*fakes)
    assert out.device.type == "cuda" and out.shape == (2, 5, 4, 16)
    q = torch.empty(2, 5, 4, 16, device="meta")
    assert mini.flash_attn_func(q, q, q).is_meta and OPS.forward(q, q, q, *PLAIN)[1].shape == (2, 4, 5)


def test_negative_bit() -> None:
    """A view that says "minus" and has another's memory: its sign counts, in each place."""
    q, k, v = qkv()
    negative = [torch._neg_view(x) for x in (q, k, v)]
    for i, names in enumerate(("q", "k", "v")):
        given = [n if i == j else x for j, (n, x) in enumerate(zip(negative, (q, k, v), strict=True))]
        wanted = [-x if i == j else x for j, x in enumerate((q, k, v))]
        same([mini.flash_attn_func(*given)], [mini.flash_attn_func(*wanted)], EXACT | dict(msg=names))
    tensors = qkv(grad=True)
    dout = tensor(2, 37, 4, 16)
    results = [
        torch.autograd.grad(mini.flash_attn_func(*tensors), tensors, x)
        for x in (torch._neg_view(dout), -dout)
    ]
    same(*results, CLOSE)


def test_refused_by_name() -> None:
    q, k, v = qkv()
    nested = torch.nested.nested_tensor([q[0], q[1]], layout=torch.jagged)
    with pytest.raises(TypeError, match="v is a nested tensor"):
        mini.flash_attn_func(q, k, nested)
    with FlopCounterMode(display=False):
        with pytest.raises(ValueError, match="one head_dim"):
            mini.flash_attn_func(q[..., :8], k, v)
        with pytest.raises(TypeError, match="q must be a torch.Tensor"):
            mini.flash_attn_func([1.0], k, v)
        with pytest.raises(ValueError, match="alibi_slopes gets no gradient"):
            mini.flash_attn_func(q, k, v, alibi_slopes=torch.ones(4, device=DEVICE, requires_grad=True))
        with pytest.raises(TypeError, match="s_aux must be a torch.Tensor"):
            mini.flash_attn_func(q, k, v, s_aux=[0.0] * 4)
        with pytest.raises(ValueError, match="s_aux must have shape"):
            mini.flash_attn_func(q, k, v, s_aux=torch.zeros(3, device=DEVICE))
        with pytest.raises(TypeError, match="causal must be a bool"):
            mini.flash_attn_func(q, k, v, causal="no")
        with pytest.raises(ValueError, match="but out requires one"):
            starts = torch.tensor([0, 37], dtype=torch.int32, device=DEVICE)
            given = q[0], k[0, :37], v[0, :37], starts, starts, 37, 37
            mini.flash_attn_varlen_func(*given, out=q[0].clone().requires_grad_())
        with pytest.raises(ValueError, match="out"):
            mini.flash_attn_varlen_func(*given, out=torch.empty_like(q[0, 1:]))
    with pytest.raises(Exception, match="q, k and v must have one head_dim"):
        compiled(mini.flash_attn_func)(q[..., :8], k, v)
    with pytest.raises(Exception, match="has no gradient"):
        compiled(mini.flash_attn_with_kvcache)(q.clone().requires_grad_(), k, v)


@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")
def test_cuda_graphs() -> None:
    net = model().eval()
    captured = torch.compile(net, mode="reduce-overhead", fullgraph=True)
    with torch.no_grad():
        for _ in range(4):
            x = tensor(2, 19, 32)
            torch.testing.assert_close(captured(x).clone(), net(x), rtol=2e-2, atol=2e-2)
