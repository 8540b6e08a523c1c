"""The operators: what torch.compile, torch.export, torch.func, checkpointing and counters make of a call.

On a GPU too, where there is one."""

import pytest
import torch
from torch import nn
from torch.library import opcheck
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts
from torch.utils.flop_counter import FlopCounterMode

import mini_flash_attention as mini
from mini_flash_attention import ops

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
OPS = ops.OPERATORS
DTYPES = [torch.bfloat16] if DEVICE == "cuda" else [torch.float32, torch.bfloat16]
# Compiled and eager run the same kernels; on a GPU gradients are summed up in any order.
EXACT = dict(rtol=0, atol=0) if DEVICE == "cpu" else dict(rtol=2e-2, atol=2e-2)
CLOSE = dict(rtol=1e-4, atol=1e-4) if DEVICE == "cpu" else dict(rtol=2e-2, atol=5e-2)


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    torch.manual_seed(0)


def tensor(*shape, dtype=None, grad=False):
    return torch.randn(*shape, device=DEVICE, dtype=dtype or DTYPES[0]).requires_grad_(grad)


def qkv(batch=2, seqlen_q=37, seqlen_k=53, heads=4, heads_k=2, dim=16, dtype=None, grad=False):
    shapes = (batch, seqlen_q, heads, dim), *[(batch, seqlen_k, heads_k, dim)] * 2
    return [tensor(*shape, dtype=dtype, grad=grad) for shape in shapes]


def packed(lengths=(5, 0, 17), heads=4, heads_k=2, dim=16, grad=False):
    q, k, v = qkv(1, sum(lengths), sum(lengths), heads, heads_k, dim)
    starts = torch.tensor([0, *lengths], device=DEVICE).cumsum(0).int()
    return [x[0].detach().requires_grad_(grad) for x in (q, k, v)], starts, max(lengths)


def run(function, tensors, dout):
    """out and gradients."""
    for x in tensors:
        x.grad = None
    torch.manual_seed(1)
    out = function(*tensors)
    out.backward(dout if dout.shape == out.shape else dout.expand_as(out))
    return [out.detach(), *(x.grad for x in tensors)]


OPTIONS = [
    {}, dict(causal=True), dict(window_size=(7, 3)), dict(softcap=5.0), dict(softmax_scale=-0.3), dict(dropout_p=0.3),
    dict(causal=True, deterministic=True), dict(alibi_slopes=True, causal=True),
]  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("dim", [16, 13])
def test_compiled_is_eager(options, dtype, dim):
    if options.get("alibi_slopes"):
        options = options | dict(alibi_slopes=torch.rand(4, device=DEVICE))
    tensors, dout = qkv(dtype=dtype, dim=dim, grad=True), tensor(2, 37, 4, dim, dtype=dtype)
    compiled = torch.compile(lambda q, k, v: mini.flash_attn_func(q, k, v, **options), fullgraph=True)
    wanted = run(lambda q, k, v: mini.flash_attn_func(q, k, v, **options), tensors, dout)
    with torch._inductor.config.patch(fallback_random=True):
        result = run(compiled, tensors, dout)
    for x, y in zip(result, wanted, strict=True):
        torch.testing.assert_close(x, y, **EXACT)


def test_transposed_inputs_and_lse():
    """Heads before tokens in memory, as SDPA has them; the LSE is used, too."""
    tensors = [
        x.detach().transpose(1, 2).requires_grad_() for x in qkv(seqlen_q=4, heads=36, seqlen_k=4, heads_k=36)
    ]

    def loss(attention):
        def function(q, k, v):
            out, lse, _ = attention(
                q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), return_attn_probs=True
            )
            return out.float().sum() + lse.square().sum()

        return function

    one = torch.ones((), device=DEVICE)
    wanted = run(loss(mini.flash_attn_func), tensors, one)
    for x, y in zip(
        run(torch.compile(loss(mini.flash_attn_func), fullgraph=True), tensors, one), wanted, strict=True
    ):
        torch.testing.assert_close(x, y, **CLOSE)


@torch._dynamo.config.patch(error_on_recompile=True)
def test_dynamic_shapes_compile_once():
    compiled = torch.compile(
        lambda q, k, v: mini.flash_attn_func(q, k, v, causal=True), fullgraph=True, dynamic=True
    )
    for batch, seqlen in (
        (3, 37),
        (5, 64),
        (7, 129),
        (6, 128),
        (9, 2),
    ):  # no two sizes alike, for Dynamo's duck sizing
        tensors = qkv(batch, seqlen, seqlen, grad=True)
        dout = torch.randn_like(tensors[0])
        for x, y in zip(
            run(compiled, tensors, dout),
            run(lambda q, k, v: mini.flash_attn_func(q, k, v, causal=True), tensors, dout),
            strict=True,
        ):
            torch.testing.assert_close(x, y, **EXACT)


@torch._dynamo.config.patch(error_on_recompile=True)
@pytest.mark.parametrize("kind", [int, torch.tensor])  # Hugging Face hands tensors
def test_varlen_dynamic(kind):
    def function(q, k, v, starts, longest):
        return mini.flash_attn_varlen_func(q, k, v, starts, starts, longest, longest, causal=True)

    compiled = torch.compile(function, fullgraph=True, dynamic=True)
    for lengths in (5, 0, 17, 1, 1, 1), (9, 3, 2, 40, 1, 1, 1), (100, 2, 0, 0, 0, 0, 0, 0):
        tensors, starts, longest = packed(lengths, grad=True)
        x = run(lambda *t: compiled(*t, starts, kind(longest)), tensors, torch.ones_like(tensors[0]))
        y = run(lambda *t: mini.flash_attn_varlen_func(*t, starts, starts, longest, longest, causal=True), tensors,
                torch.ones_like(tensors[0]))  # fmt: skip
        for a, b in zip(x, y, strict=True):
            torch.testing.assert_close(a, b, **EXACT)


def test_unpad_in_the_graph():
    """How many tokens there are is known to the device only: unbacked sizes."""

    def function(attention, x, mask):
        tokens, indices, starts, longest, _ = mini.unpad_input(x, mask)
        out = attention(tokens, tokens, tokens, starts, starts, longest, longest)
        return mini.pad_input(out, indices, *x.shape[:2])

    x, mask = (
        tensor(3, 11, 2, 16),
        torch.arange(11, device=DEVICE) < torch.tensor([[11], [4], [7]], device=DEVICE),
    )
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True, capture_scalar_outputs=True):
        out = torch.compile(function, fullgraph=True)(mini.flash_attn_varlen_func, x, mask)
    torch.testing.assert_close(out, function(mini.flash_attn_varlen_func, x, mask), **EXACT)


def test_pages_and_out():
    (q, _, _), starts, longest = packed((3, 1, 2))
    pages = [tensor(8, 4, 2, 16) for _ in range(2)]
    table, used = (
        torch.randperm(8, device=DEVICE)[:6].int().view(3, 2),
        torch.tensor([8, 3, 5], device=DEVICE).int(),
    )

    def function(attention, q, out):
        attention(
            q, *pages, starts, None, longest, 8, block_table=table, seqused_k=used, out=out, causal=True
        )
        return out * 2

    result = torch.compile(function, fullgraph=True)(mini.flash_attn_varlen_func, q, torch.zeros_like(q))
    torch.testing.assert_close(result, function(mini.flash_attn_varlen_func, q, torch.zeros_like(q)), **EXACT)


def test_dropout_draws_anew_and_like_eager():
    tensors = qkv(grad=True)
    twice = lambda f: lambda q, k, v: f(q, k, v, dropout_p=0.5) - f(q, k, v, dropout_p=0.5)  # noqa: E731
    compiled = torch.compile(twice(mini.flash_attn_func), fullgraph=True)
    wanted = run(twice(mini.flash_attn_func), tensors, torch.ones_like(tensors[0]))
    with torch._inductor.config.patch(fallback_random=True):  # else Inductor has a generator of its own
        result = run(compiled, tensors, torch.ones_like(tensors[0]))
    assert wanted[0].abs().max() > 0.1  # two masks
    for x, y in zip(result, wanted, strict=True):
        torch.testing.assert_close(x, y, **CLOSE)
    torch._dynamo.reset()
    compiled = torch.compile(twice(mini.flash_attn_func), fullgraph=True)
    assert compiled(*tensors).abs().max() > 0.1
    assert not compiled(*tensors).equal(compiled(*tensors))


@pytest.mark.parametrize("paged", [False, True])
@pytest.mark.parametrize("length", ["tensor", "int"])
def test_cache_in_place(paged, length):
    dim, batch, capacity = 16, 2, 24
    cos, sin = (torch.rand(capacity, dim // 2, device=DEVICE, dtype=DTYPES[0]) for _ in range(2))
    table = torch.randperm(6, device=DEVICE).int().view(2, 3) if paged else None

    def step(attention, q, k, v, cache, lengths):
        out = attention(q + 1, cache[0], cache[1], k, v, cos, sin, lengths, block_table=table, causal=True)
        return out * 2

    def decode(function, attention):
        torch.manual_seed(3)
        cache = tensor(2, *((6, 8) if paged else (batch, capacity)), 2, dim)
        place, outs = cache.data_ptr(), []
        for i in range(2, 6):
            q, k, v = qkv(batch, 1, 1)
            lengths = i if length == "int" else torch.full((batch,), i, device=DEVICE).int()
            outs.append(function(attention, q, k, v, cache, lengths))
        assert cache.data_ptr() == place
        return [*outs, cache]

    dynamic = True if length == "int" else None  # else the second int compiles anew
    with torch.no_grad(), torch._dynamo.config.patch(error_on_recompile=True):
        result = decode(torch.compile(step, fullgraph=True, dynamic=dynamic), mini.flash_attn_with_kvcache)
        for x, y in zip(result, decode(step, mini.flash_attn_with_kvcache), strict=True):
            torch.testing.assert_close(x, y, **EXACT)


@pytest.mark.parametrize("dynamic", [False, True])
def test_cache_is_not_copied(dynamic):
    """The code that Inductor makes holds no copy of the cache, whether it is an input or a view of one."""
    from torch._inductor.utils import run_and_get_code

    cache, (q, k, v) = tensor(2, 3, 4, 64, 2, 16), qkv(4, 1, 1)
    lengths = torch.zeros(4, device=DEVICE).int()

    def step(q, k, v, cache):
        for layer in range(3):
            q = (
                mini.flash_attn_with_kvcache(q, cache[0, layer], cache[1, layer], k, v, cache_seqlens=lengths)
                + 1
            )
        return q

    with torch.no_grad():
        _, code = run_and_get_code(torch.compile(step, fullgraph=True, dynamic=dynamic), q, k, v, cache)
    assert "cache_append" in code[0]
    assert "as_strided_copy" not in code[0] and "clone" not in code[0]
    assert not [line for line in code[0].splitlines() if "empty_strided" in line and "64" in line]


def test_opcheck():
    q, k, v = qkv(grad=True)
    plain = (None,) * 5 + (None, None, 0.0, None, True, -1, -1, 0.0, False)
    opcheck(OPS.forward.default, (q, k, v, *plain))
    opcheck(OPS.forward.default, (q, k, v, *plain[:6], torch.tensor(7), 0.2, *plain[8:]))
    (a, b, c), starts, longest = packed(grad=True)
    ragged = (starts, starts, None, None, longest, *plain[5:])
    opcheck(OPS.forward.default, (a, b, c, *ragged))
    opcheck(
        OPS.forward_into.default, (a.detach(), b.detach(), c.detach(), torch.empty_like(a.detach()), *ragged)
    )
    out, lse = OPS.forward(a, b, c, *ragged)
    detached = [x.detach() for x in (torch.ones_like(out), lse, a, b, c, out, lse)]
    opcheck(OPS.backward.default, (*detached, *ragged))
    q, k, v = qkv(2, 1, 1)
    cache = [tensor(2, 24, 2, 16) for _ in range(2)]
    lengths = (
        torch.tensor([3, 5], device=DEVICE).int(),
        None,
        None,
        None,
        None,
        None,
        None,
        True,
        -1,
        -1,
        0.0,
        0,
    )
    opcheck(OPS.cache.default, (q, *cache, *lengths))
    opcheck(OPS.cache_append.default, (q, *cache, k, v, None, None, True, *lengths))


class Block(nn.Module):
    """A transformer layer."""

    def __init__(self, width=32, heads=4, dropout=0.0):
        super().__init__()
        self.norm, self.qkv, self.out = (
            nn.LayerNorm(width),
            nn.Linear(width, 3 * width),
            nn.Linear(width, width),
        )
        self.heads, self.dropout = heads, dropout

    def forward(self, x):
        q, k, v = self.qkv(self.norm(x)).unflatten(-1, (3, self.heads, -1)).unbind(2)
        return x + self.out(mini.flash_attn_func(q, k, v, self.dropout, causal=True).flatten(2))


def model(layers=2, **options):
    torch.manual_seed(0)
    return nn.Sequential(*(Block(**options) for _ in range(layers))).to(DEVICE, DTYPES[0])


@pytest.mark.parametrize("strict", [False, True])
def test_export(strict, tmp_path):
    x = tensor(2, 19, 32)
    sizes = ({0: torch.export.Dim("batch"), 1: torch.export.Dim("seqlen")},)
    program = torch.export.export(model(), (x,), dynamic_shapes=sizes, strict=strict)
    assert sum("mini_flash_attention.forward" in str(node.target) for node in program.graph.nodes) == 2
    torch.export.save(program, tmp_path / "model.pt2")
    loaded = torch.export.load(tmp_path / "model.pt2").module()
    y = tensor(3, 41, 32)
    torch.testing.assert_close(loaded(y), model()(y), **EXACT)


def test_aot_inductor(tmp_path):
    x, y = tensor(2, 19, 32), tensor(3, 41, 32)
    sizes = ({0: torch.export.Dim("batch"), 1: torch.export.Dim("seqlen")},)
    with torch.no_grad():
        program = torch.export.export(model(), (x,), dynamic_shapes=sizes)
        package = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "model.pt2"))
        torch.testing.assert_close(torch._inductor.aoti_load_package(package)(y), model()(y))


@torch._inductor.config.patch(fallback_random=True)
def gradients(net, x, function=None):
    net.zero_grad()
    torch.manual_seed(5)
    (function or net)(x).float().square().sum().backward()
    return [p.grad.clone() for p in net.parameters()]


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("save", [False, True])
def test_selective_checkpoint(compiled, dropout, save):
    net, x, calls = model(dropout=dropout), tensor(2, 19, 32), []

    def policy(ctx, op, *args, **kwargs):
        if op is OPS.forward.default:
            calls.append(ctx.is_recompute)
            return CheckpointPolicy.MUST_SAVE if save else CheckpointPolicy.PREFER_RECOMPUTE
        return CheckpointPolicy.PREFER_RECOMPUTE

    context = lambda: create_selective_checkpoint_contexts(policy)  # noqa: E731

    def function(x):
        for block in net:
            x = checkpoint(block, x, use_reentrant=False, context_fn=context)
        return x

    wanted = gradients(net, x)
    result = gradients(net, x, torch.compile(function, fullgraph=True) if compiled else function)
    assert calls
    for a, b in zip(result, wanted, strict=True):
        torch.testing.assert_close(a, b, **CLOSE)


@pytest.mark.parametrize("compiled", [False, True])
def test_checkpoint_with_dropout(compiled):
    net, x = model(dropout=0.3), tensor(2, 19, 32)
    function = lambda x: checkpoint(net[1], checkpoint(net[0], x, use_reentrant=False), use_reentrant=False)  # noqa: E731
    wanted = gradients(net, x)
    result = gradients(net, x, torch.compile(function, fullgraph=True) if compiled else function)
    for a, b in zip(result, wanted, strict=True):
        torch.testing.assert_close(a, b, **CLOSE)


def test_torch_func():
    """Gradients by torch.func, and of each sample of a batch."""
    q, k, v = qkv()
    loss = lambda q, k, v: mini.flash_attn_func(q, k, v, causal=True).square().sum()  # noqa: E731
    result = torch.func.grad(loss, argnums=(0, 1, 2))(q, k, v)
    tensors = [x.clone().requires_grad_() for x in (q, k, v)]
    loss(*tensors).backward()
    for x, y in zip(result, tensors, strict=True):
        torch.testing.assert_close(x, y.grad, **CLOSE)
    batches = [torch.stack([x, x + 1]) for x in (q, k, v)]
    result = torch.vmap(torch.func.grad(loss, argnums=(0, 1, 2)))(*batches)
    for x, y in zip(result, tensors, strict=True):
        torch.testing.assert_close(x[0], y.grad, **CLOSE)
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.func.grad(lambda q: torch.func.grad(loss)(q, k, v).sum())(q)


def test_counts_flops():
    q, k, v = qkv(2, 64, 64, grad=True)
    with FlopCounterMode(display=False) as counter:
        mini.flash_attn_func(q, k, v).sum().backward()
    assert counter.get_total_flops() == 3.5 * 4 * 2 * 4 * 64 * 64 * 16


def test_fake_and_meta():
    from torch._subclasses import FakeTensorMode

    with FakeTensorMode():
        out = mini.flash_attn_func(
            *(torch.empty(2, 5, 4, 16, device="cuda", dtype=torch.bfloat16) for _ in range(3))
        )
    assert out.device.type == "cuda"
    q = torch.empty(2, 5, 4, 16, device="meta")
    assert OPS.forward(q, q, q, *(None,) * 7, 0.0, None, True, -1, -1, 0.0, False)[0].is_meta


def test_errors_name_the_argument():
    q, k, v = qkv()
    with pytest.raises(Exception, match="q, k and v must have one head_dim"):
        torch.compile(mini.flash_attn_func, fullgraph=True)(q[..., :8], k, v)
    q.requires_grad_()
    with pytest.raises(RuntimeError, match="no second derivative"):
        out = OPS.forward(q, k, v, *(None,) * 7, 0.0, None, True, -1, -1, 0.0, False)[0]
        (grad,) = torch.autograd.grad(out.sum(), q, create_graph=True)
        grad.sum().backward()


@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")
def test_cuda_graphs():
    net = model(8).eval()
    compiled = torch.compile(net, mode="reduce-overhead", fullgraph=True)
    with torch.no_grad():
        for _ in range(4):
            x = tensor(2, 19, 32)
            torch.testing.assert_close(compiled(x).clone(), net(x), rtol=2e-2, atol=2e-2)
