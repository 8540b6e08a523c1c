"""The GPU kernels' gradients: each path that runs on this GPU, over shapes made to go wrong."""

from itertools import pairwise
from typing import Any

import pytest
import torch
from error_rule import check_gradients, reference_options
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from mini_flash_attention import backend, flash_attn_func, flash_attn_qkvpacked_func, flash_attn_varlen_func
from mini_flash_attention.gpu import plans
from mini_flash_attention.philox import keep_mask
from mini_flash_attention.problem import Problem

LENGTHS = [(1, 1), (17, 300), (64, 64), (113, 128), (128, 127), (239, 1), (333, 1000), (512, 512), (799, 3)]
MASKS = [
    {},
    {"causal": True},
    {"window_size": (50, 20)},
    {"window_size": (3, -1)},
    {"window_size": (128, 0)},
]
GROUPS = [(2, 2), (4, 2), (3, 1), (8, 1), (10, 2), (4, 1), (7, 1), (12, 1), (16, 1)]  # query heads, key heads


def inputs(
    seqlen_q: int,
    seqlen_k: int,
    heads_q: int = 2,
    heads_k: int = 2,
    head_dim: int = 64,
    dtype: torch.dtype = torch.bfloat16,
    batch: int = 2,
) -> list[Tensor]:
    """q, k, v, which require a gradient, and dout."""
    shapes = (seqlen_q, heads_q), (seqlen_k, heads_k), (seqlen_k, heads_k), (seqlen_q, heads_q)
    tensors = [torch.randn(batch, *s, head_dim, device="cuda").to(dtype) for s in shapes]
    return [*(x.requires_grad_() for x in tensors[:3]), tensors[3]]


def check(
    q: Tensor, k: Tensor, v: Tensor, dout: Tensor, dlse: Tensor | None = None, **options: Any
) -> tuple[Tensor, ...]:
    """The gradients, of the sinks too if they require one."""
    out, lse, _ = flash_attn_func(q, k, v, return_attn_probs=True, **options)
    outputs, leaves, sinks = (out,) if dlse is None else (out, lse), (q, k, v), options.get("s_aux")
    if sinks is not None and sinks.requires_grad:
        leaves = (*leaves, sinks)
    gradients = torch.autograd.grad(outputs, leaves, (dout, dlse)[: len(outputs)])
    check_gradients(gradients, dout, dlse, q, k, v, **reference_options(options))
    return gradients


@pytest.mark.parametrize("options", MASKS, ids=str)
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_lengths(path: str, head_dim: int, options: dict) -> None:
    for i, lengths in enumerate(LENGTHS):
        check(*inputs(*lengths, *GROUPS[i % 5], head_dim=head_dim, batch=1 + i % 2), **options)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
# Not 1: dS is made from the 16-bit P, and with one head dim nothing averages its error out (docs/worklog.md).
@pytest.mark.parametrize("head_dim", [2, 8, 40, 59, 72, 96, 104, 160, 192, 200, 224])
def test_head_dims(path: str, head_dim: int, dtype: torch.dtype) -> None:
    for options in MASKS[:3]:
        check(*inputs(200, 333, 4, 2, head_dim=head_dim, dtype=dtype), **options)


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("per", [1, 2, 3, 16])
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_groups(
    path: str, head_dim: int, per: int, deterministic: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However the query heads of a group are divided over thread blocks: `per` for each."""
    monkeypatch.setattr(backend, "backward_plan", backend.backward_plan.__wrapped__)
    monkeypatch.setattr(plans, "heads_per_tile", lambda problem, row: min(per, problem.group))
    for heads in GROUPS:
        for lengths in ((300, 450), (129, 127), (1, 331)):
            x = inputs(*lengths, *heads, head_dim=head_dim, batch=2)
            check(*x, causal=True, deterministic=deterministic)
    q, k, v, dout = inputs(700, 700, 6, 2, head_dim=head_dim, batch=1)
    cu_seqlens = torch.tensor([0, 128, 128, 439, 700], device="cuda", dtype=torch.int32)
    packed = [x.detach()[0].requires_grad_() for x in (q, k, v)]
    ends = cu_seqlens, cu_seqlens, 311, 311
    out = flash_attn_varlen_func(*packed, *ends, causal=True, deterministic=deterministic)
    gradients = torch.autograd.grad(out, packed, dout[0])
    for start, end in pairwise(cu_seqlens.tolist()):
        if start < end:
            parts = [x[None, start:end] for x in (*gradients, dout[0], *packed)]
            check_gradients(parts[:3], parts[3], None, *parts[4:], window_right=0)


@pytest.mark.parametrize("per", [1, 2])
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_shared_groups_repeat(path: str, head_dim: int, per: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Deterministic, though thread blocks add to the same dK and dV."""
    monkeypatch.setattr(backend, "backward_plan", backend.backward_plan.__wrapped__)
    monkeypatch.setattr(plans, "heads_per_tile", lambda problem, row: per)
    q, k, v, dout = inputs(500, 500, 8, 1, head_dim=head_dim)
    out = flash_attn_func(q, k, v, causal=True, deterministic=True)
    first = torch.autograd.grad(out, (q, k, v), dout, retain_graph=True)
    for _ in range(100):
        again = torch.autograd.grad(out, (q, k, v), dout, retain_graph=True)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_long(path: str, head_dim: int) -> None:
    for options in MASKS[:2]:
        check(*inputs(2048, 2049, 4, 2, head_dim=head_dim, batch=1), **options)


@pytest.mark.parametrize("head_dim", [64, 96, 128, 192, 256])
@pytest.mark.parametrize("options", MASKS[:3], ids=str)
def test_score_functions(path: str, head_dim: int, options: dict) -> None:
    slopes = torch.tensor([0.3, 0.05, 0.01, 0.2], device="cuda")
    for score in ({"softcap": 5.0}, {"alibi_slopes": slopes}, {"softcap": 5.0, "alibi_slopes": slopes}):
        check(*inputs(200, 333, 4, 2, head_dim=head_dim), **options, **score)


@pytest.mark.parametrize("head_dim", [64, 96, 128, 192, 256])
@pytest.mark.parametrize("options", [*MASKS[:3], {"softcap": 5.0}], ids=str)
def test_sinks(path: str, head_dim: int, options: dict) -> None:
    """Of rows that see no key too, whose LSE is finite then: their P must be 0 all the same."""
    sinks = torch.tensor([1.0, -2.0, 12.0, -torch.inf], device="cuda", requires_grad=True)
    for lengths in ((200, 333), (333, 200), (1, 50)):
        tensors, dlse = (
            inputs(*lengths, 4, 2, head_dim=head_dim),
            torch.randn(2, 4, lengths[0], device="cuda"),
        )
        dlse[:, 3] = 0  # rows without keys have an LSE of -inf there, and the oracle no gradient
        check(*tensors, **options, s_aux=sinks)
        check(*tensors, dlse, **options, s_aux=sinks)
        check(*tensors, **options, s_aux=sinks.detach().bfloat16().requires_grad_())


def test_sinks_alone_learn(path: str) -> None:
    q, k, v, dout = inputs(100, 130, 4, 2)
    sinks = torch.randn(4, device="cuda", requires_grad=True)
    every = torch.autograd.grad(flash_attn_func(q, k, v, s_aux=sinks), (q, k, v, sinks), dout)
    out = flash_attn_func(*(x.detach() for x in (q, k, v)), s_aux=sinks)
    assert torch.equal(torch.autograd.grad(out, sinks, dout)[0], every[3])


@pytest.mark.parametrize("head_dim", [64, 256])
def test_gradient_of_lse(path: str, head_dim: int) -> None:
    for options in (*MASKS, {"softcap": 5.0}):
        tensors = inputs(150, 77, 4, 2, head_dim=head_dim)
        hidden = 150 - 77 if options.get("causal") or "window_size" in options else 0
        dlse = torch.randn(2, 4, 150, device="cuda")
        dlse[..., :hidden] = 0  # rows without keys have an LSE of -inf, and the oracle no gradient
        check(*tensors, dlse, **options)


@pytest.mark.parametrize("scale", [0.3, 0.0, -0.2])
def test_scales(path: str, scale: float) -> None:
    check(*inputs(100, 130), softmax_scale=scale)


def test_strides(path: str) -> None:
    q, k, v, dout = inputs(200, 200, 4, 4)
    rows_first = torch.randn(200, 2, 4, 64, device="cuda", dtype=torch.bfloat16).transpose(0, 1)
    expanded = dout[:, :1, :1].expand(-1, 200, 4, -1)
    every_second = torch.randn(2, 200, 4, 128, device="cuda", dtype=torch.bfloat16)[..., ::2]
    for strided in (rows_first, expanded, every_second):
        check(q, k, v, strided)
    one_head = k.detach()[:, :, :1].expand(-1, -1, 4, -1).requires_grad_()
    check(q, one_head, one_head.detach().clone().requires_grad_(), dout)


def test_packed_input(path: str) -> None:
    qkv = torch.randn(2, 150, 3, 4, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    out = flash_attn_qkvpacked_func(qkv, causal=True)
    dout = torch.randn_like(out)
    (gradient,) = torch.autograd.grad(out, qkv, dout)
    check_gradients(gradient.unbind(2), dout, None, *qkv.detach().unbind(2), window_right=0)


def test_rows_and_keys_without_partners_get_zeros(path: str) -> None:
    q, k, v, dout = inputs(300, 100)
    dq, dk, dv = torch.autograd.grad(flash_attn_func(q, k, v, causal=True), (q, k, v), dout)
    assert not dq[:, :200].any() and dq[:, 201:].any(dim=-1).all()  # row 200 sees one key: P is 1 there
    q, k, v, dout = inputs(100, 300)
    _, dk, dv = torch.autograd.grad(flash_attn_func(q, k, v, window_size=(10, 0)), (q, k, v), dout)
    assert not dk[:, :190].any() and not dv[:, :190].any() and dv[:, 190:].any(dim=-1).all()
    for shape_q, shape_k in ((0, 10), (10, 0)):
        q, k, v, dout = inputs(shape_q, shape_k)
        for dx in torch.autograd.grad(flash_attn_func(q, k, v), (q, k, v), dout):
            assert not dx.any()


def test_subsets_of_gradients(path: str) -> None:
    q, k, v, dout = inputs(100, 130)
    all_three = torch.autograd.grad(flash_attn_func(q, k, v, deterministic=True), (q, k, v), dout)
    for i, x in enumerate((q, k, v)):
        others = [y if y is x else y.detach() for y in (q, k, v)]
        (alone,) = torch.autograd.grad(flash_attn_func(*others, deterministic=True), x, dout)
        assert torch.equal(alone, all_three[i])


def test_the_graph_may_be_kept(path: str) -> None:
    q, k, v, dout = inputs(100, 130)
    out = flash_attn_func(q, k, v, deterministic=True)
    first = torch.autograd.grad(out, (q, k, v), dout, retain_graph=True)
    second = torch.autograd.grad(out, (q, k, v), dout)
    assert all(map(torch.equal, first, second))


def test_checkpointing_and_autocast(path: str) -> None:
    q, k, v, dout = inputs(100, 130)

    def attend(*tensors: Tensor) -> Tensor:
        return flash_attn_func(*tensors, causal=True, deterministic=True)

    plain = torch.autograd.grad(attend(q, k, v), (q, k, v), dout)
    again = torch.autograd.grad(checkpoint(attend, q, k, v, use_reentrant=False), (q, k, v), dout)
    with torch.autocast("cuda", dtype=torch.float16):
        cast = torch.autograd.grad(attend(q, k, v), (q, k, v), dout)
    assert all(map(torch.equal, plain, again)) and all(map(torch.equal, plain, cast))


def test_without_gradients_nothing_is_kept(path: str) -> None:
    q, k, v, _ = inputs(1000, 1000)
    with torch.no_grad():
        flash_attn_func(q, k, v)
        before = torch.cuda.memory_allocated()
        out = flash_attn_func(q, k, v)
        assert torch.cuda.memory_allocated() - before == out.numel() * out.itemsize


@pytest.mark.parametrize("options", MASKS[:3], ids=str)
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_deterministic(path: str, head_dim: int, options: dict) -> None:
    q, k, v, dout = inputs(1000, 1100, 6, 2, head_dim=head_dim)
    side, junk = torch.cuda.Stream(), torch.ones(1 << 24, device="cuda")
    first = check(q, k, v, dout, deterministic=True, **options)
    for _ in range(50):
        with torch.cuda.stream(side):
            junk.mul_(1.5)
        out = flash_attn_func(q, k, v, deterministic=True, **options)
        assert all(map(torch.equal, first, torch.autograd.grad(out, (q, k, v), dout)))


def test_torch_can_ask_for_determinism(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[bool] = []
    q, k, v, dout = inputs(100, 130)
    plan = backend.backward_plan

    def spy(problem: Problem, forced: str | None) -> object:
        asked.append(problem.deterministic)
        return plan(problem, forced)

    monkeypatch.setattr(backend, "backward_plan", spy)
    torch.use_deterministic_algorithms(True)
    try:
        torch.autograd.grad(flash_attn_func(q, k, v, softmax_scale=0.123), (q, k, v), dout)
    finally:
        torch.use_deterministic_algorithms(False)
    assert asked == [True]


def test_deterministic_with_variable_lengths(path: str) -> None:
    q, k, v, dout = (x[0].detach() for x in inputs(1000, 1000, 6, 2, head_dim=128, batch=1))
    q, k, v = (x.requires_grad_() for x in (q, k, v))
    cu = torch.tensor([0, 10, 10, 600, 1000], dtype=torch.int32, device="cuda")

    def gradients() -> tuple[Tensor, ...]:
        out = flash_attn_varlen_func(q, k, v, cu, cu, 590, 590, causal=True, deterministic=True)
        return torch.autograd.grad(out, (q, k, v), dout)

    first = gradients()
    assert all(all(map(torch.equal, first, gradients())) for _ in range(20))


def test_no_memory_grows_with_the_square(path: str) -> None:
    q, k, v, dout = inputs(16384, 16384, 4, 4, head_dim=128, batch=1)
    flash_attn_func(q, k, v).backward(dout)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    torch.autograd.grad(flash_attn_func(q, k, v), (q, k, v), dout)
    tensor = q.numel() * q.itemsize
    # out, dq, dk, dv, the sum of dQ in float32 (as large as two), and what belongs to rows
    assert torch.cuda.max_memory_allocated() - before < 7 * tensor


def test_gradients_in_a_graph(path: str) -> None:
    q, k, v, dout = inputs(500, 500, 4, 2)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):

        def run() -> tuple[Tensor, ...]:
            out = flash_attn_func(q, k, v, causal=True, deterministic=True)
            return torch.autograd.grad(out, (q, k, v), dout)

        expected = run()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            captured = run()
    torch.cuda.synchronize()
    for x in captured:
        x.zero_()
    graph.replay()
    assert all(map(torch.equal, captured, expected))


@pytest.mark.parametrize("options", MASKS[:3], ids=str)
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_dropout(path: str, head_dim: int, options: dict) -> None:
    q, k, v, dout = inputs(200, 333, 4, 2, head_dim=head_dim)
    torch.manual_seed(7)
    out = flash_attn_func(q, k, v, dropout_p=0.2, **options)
    gradients = torch.autograd.grad(out, (q, k, v), dout)
    dropped = dropped_after_seed(7, range(2), 4, 200, 333)
    check_gradients(gradients, dout, None, q, k, v, **reference_options(options), **dropped)


def dropped_after_seed(seed: int, batches: range, heads: int, seqlen_q: int, seqlen_k: int) -> dict[str, Any]:
    """Options of reference.attention: what dropout_p=0.2 does in the first call after manual_seed(seed)."""
    torch.manual_seed(seed)
    drawn = torch.empty(1, dtype=torch.int64, device="cuda").random_()
    numbers = torch.arange(batches.start * heads, batches.stop * heads, device="cuda")
    rows = torch.arange(seqlen_q, device="cuda").view(1, 1, -1)
    kept = keep_mask(drawn, 0.2, numbers.view(len(batches), heads, 1), rows, range(seqlen_k))
    return {"dropout_mask": kept, "dropout_p": 0.2}


def test_dropout_with_all_else(path: str) -> None:
    """With both score functions, variable lengths and a fixed order of additions."""
    q, k, v, dout = (x[0].detach() for x in inputs(500, 500, 4, 2, batch=1))
    q, k, v = (x.requires_grad_() for x in (q, k, v))
    cu = torch.tensor([0, 100, 100, 333, 500], dtype=torch.int32, device="cuda")
    slopes = torch.rand(4, 4, device="cuda") * 0.3
    options = {"softcap": 5.0, "alibi_slopes": slopes, "window_size": (70, 20)}

    def gradients() -> tuple[Tensor, ...]:
        torch.manual_seed(7)
        out = flash_attn_varlen_func(q, k, v, cu, cu, 233, 233, 0.2, deterministic=True, **options)
        return torch.autograd.grad(out, (q, k, v), dout)

    first = gradients()
    assert all(map(torch.equal, first, gradients()))
    for b, (start, end) in enumerate(pairwise(cu.tolist())):
        tensors = (x[None, start:end] for x in (dout, q, k, v))
        dropped = dropped_after_seed(7, range(b, b + 1), 4, end - start, end - start)
        its_own = tuple(x[None, start:end] for x in first)
        check_gradients(its_own, next(tensors), None, *tensors, **reference_options(options, b), **dropped)
