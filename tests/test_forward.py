"""The GPU kernels' forward pass: each path that runs on this GPU, over shapes made to go wrong."""

import functools
import itertools
import math
from functools import partial
from typing import Any

import pytest
import torch
from error_rule import check_forward, reference_options
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from mini_flash_attention import (
    api,
    backend,
    flash_attn_func,
    flash_attn_qkvpacked_func,
    flash_attn_varlen_func,
)
from mini_flash_attention.gpu import fast, memory, plans
from mini_flash_attention.philox import keep_mask

FULL, CAUSAL = {}, {"causal": True}
# tile edges and their neighbours, primes, one row, more queries than keys and fewer
LENGTHS = [
    (1, 1),
    (1, 127),
    (2, 64),
    (17, 2048),
    (63, 65),
    (64, 64),
    (127, 129),
    (128, 128),
    (129, 127),
    (191, 193),
    (192, 385),
    (239, 1),
    (257, 96),
    (333, 1000),
    (512, 512),
    (769, 255),
    (799, 3),
    (1009, 1013),
]
WINDOWS = [
    {"window_size": (50, 20)},
    {"window_size": (0, 0)},
    {"window_size": (-1, 30)},
    {"window_size": (200, -1)},
    {"window_size": (128, 0), "causal": True},
    {"window_size": (1, 300)},
]
GROUPS = [(1, 1), (2, 1), (3, 3), (5, 1), (6, 2), (7, 7), (12, 4)]  # query heads, key heads


@pytest.fixture(autouse=True, params=[False], ids=[""])
def decoding(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether the decode kernels serve a call: here few queries, too, take the forward kernels."""
    plan = functools.lru_cache(maxsize=None)(backend.attention_plan.__wrapped__)
    monkeypatch.setattr(backend, "attention_plan", plan)
    monkeypatch.setattr(plans, "decoding_pays", lambda *call: request.param)


def inputs(
    seqlen_q: int,
    seqlen_k: int,
    heads_q: int = 2,
    heads_k: int = 2,
    head_dim: int = 64,
    dtype: torch.dtype = torch.bfloat16,
    batch: int = 2,
) -> tuple[Tensor, Tensor, Tensor]:
    shapes = (seqlen_q, heads_q), (seqlen_k, heads_k), (seqlen_k, heads_k)
    return tuple(torch.randn(batch, *s, head_dim, device="cuda").to(dtype) for s in shapes)


def check(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> None:
    out, lse, _ = flash_attn_func(q, k, v, return_attn_probs=True, **options)
    check_forward(out, lse, q, k, v, **reference_options(options))


@pytest.mark.parametrize("options", [FULL, CAUSAL], ids=["full", "causal"])
@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_lengths(path: str, lengths: tuple[int, int], head_dim: int, options: dict) -> None:
    check(*inputs(*lengths, head_dim=head_dim), **options)


@pytest.mark.parametrize("decoding", [True], indirect=True, ids=["decode"])
@pytest.mark.parametrize("options", [FULL, CAUSAL, WINDOWS[0], WINDOWS[4]], ids=str)
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_few_queries_are_decoded(path: str, head_dim: int, options: dict) -> None:
    for lengths in LENGTHS[:13]:
        for heads in ((2, 2), (8, 2), (7, 1)):
            check(*inputs(*lengths, *heads, head_dim=head_dim), **options)


@pytest.mark.parametrize("decoding", [False, True], indirect=True, ids=["", "decode"])
@pytest.mark.parametrize("options", [FULL, CAUSAL, WINDOWS[0], {"causal": True, "softcap": 5.0}], ids=str)
@pytest.mark.parametrize("head_dim", [64, 96, 128, 192, 256])
def test_sinks(path: str, head_dim: int, options: dict) -> None:
    """Usual ones, some far above and far below all scores, none; in every dtype."""
    sinks = torch.tensor([1.0, -2.0, 50.0, -1e4, -torch.inf, 12.0], device="cuda")
    for lengths, dtype in (
        ((200, 333), torch.float32),
        ((1500, 1300), torch.bfloat16),  # some rows see no key
        ((5, 1000), torch.float16),
        ((1, 50), torch.float32),
    ):
        tensors = inputs(*lengths, 6, 2, head_dim=head_dim, dtype=torch.float16)
        check(*tensors, **options, s_aux=sinks.to(dtype))


def test_sinks_of_any_layout(path: str) -> None:
    q, k, v = inputs(100, 130, 4, 4)
    one, some = torch.tensor([2.0], device="cuda"), torch.randn(8, device="cuda")
    for sinks in (one.expand(4), some[::2], torch._neg_view(some[:4]), some[4:].double()):
        check(q, k, v, s_aux=sinks)


@pytest.mark.parametrize("options", WINDOWS, ids=str)
@pytest.mark.parametrize("head_dim", [64, 96, 128, 192, 256])
def test_windows(path: str, head_dim: int, options: dict) -> None:
    for lengths in ((113, 203), (1000, 640), (511, 513), (64, 64), (1, 700)):
        check(*inputs(*lengths, head_dim=head_dim), **options)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("head_dim", [1, 5, 8, 40, 59, 72, 80, 96, 104, 111, 136, 160, 192, 200, 224])
def test_head_dims(path: str, head_dim: int, dtype: torch.dtype) -> None:
    for options in (FULL, CAUSAL):
        check(*inputs(200, 333, head_dim=head_dim, dtype=dtype), **options)


@pytest.mark.parametrize("heads", GROUPS, ids=str)
def test_groups(path: str, heads: tuple[int, int]) -> None:
    for options in (FULL, CAUSAL):
        check(*inputs(300, 450, *heads, dtype=torch.float16, batch=3), **options)


@pytest.mark.parametrize("seqlen", [2048, 2049, 4224])
def test_long(path: str, seqlen: int) -> None:
    for head_dim, options in itertools.product((64, 96, 128, 192, 256), (FULL, CAUSAL)):
        check(*inputs(seqlen, seqlen, head_dim=head_dim, batch=1), **options)


@pytest.mark.parametrize("scale", [1.0, 0.01, 0.0, -0.5, 3])
def test_scales(path: str, scale: float) -> None:
    for options in (FULL, CAUSAL):
        check(*inputs(150, 300), softmax_scale=scale, **options)


def test_one_row_of_one_head(path: str) -> None:
    check(*inputs(1, 9, 1, 1, batch=1))


def test_padded_head_dims_give_tensors_like_any_other(path: str) -> None:
    q, k, v = (x.requires_grad_() for x in inputs(30, 30, head_dim=59))
    out = flash_attn_func(q, k, v)
    assert out.view(2, 30, -1).shape == (2, 30, 118)
    out.mul_(2)  # not a view: autograd lets it be written


def test_no_keys_or_no_queries(path: str) -> None:
    for shape in ((0, 5), (5, 0), (0, 0)):
        out, lse, _ = flash_attn_func(*inputs(*shape), return_attn_probs=True)
        assert out.shape == (2, shape[0], 2, 64) and not out.any()
        assert lse.shape == (2, 2, shape[0]) and (lse == -torch.inf).all()
        sinks = torch.randn(2, device="cuda")
        out, lse, _ = flash_attn_func(*inputs(*shape), return_attn_probs=True, s_aux=sinks)
        assert not out.any() and torch.equal(lse, sinks[:, None].expand_as(lse))
    assert flash_attn_func(*inputs(5, 5, batch=0)).shape == (0, 5, 2, 64)


@pytest.mark.parametrize("options", [FULL, CAUSAL], ids=["full", "causal"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("case", ["ramp", "steep ramp", "loud", "negative", "spike"])
def test_scores_that_defeat_the_guard(
    path: str, case: str, head_dim: int, dtype: torch.dtype, options: dict
) -> None:
    """The kernels start from a row's first maximum, at its right end: let scores grow leftwards."""
    seqlen = 1500
    q, k, v = (x.float() for x in inputs(seqlen, seqlen, head_dim=head_dim, dtype=dtype))
    if case in ("ramp", "steep ramp"):
        q[..., 0] = 4.0
        k[..., 0] = torch.linspace(300 if case == "ramp" else 3000, -5, seqlen, device="cuda").view(1, -1, 1)
    elif case == "loud":
        q *= 30
    elif case == "negative":
        q[..., 0], k[..., 0] = 100.0, -1000.0
    else:  # one key far above all others, in the block visited last
        k[:, 3] = q[:, 700] * 20
    check(q.to(dtype), k.to(dtype), v.to(dtype), **options)


def test_layouts(path: str) -> None:
    """Tensors are read where they lie, whatever their strides; what cannot be is copied."""
    qkv = torch.randn(2, 300, 3, 4, 72, device="cuda", dtype=torch.float16)
    q, k, v = (x.contiguous() for x in qkv.unbind(2))
    expected = flash_attn_func(q, k, v, causal=True)
    misaligned = torch.empty(q.numel() + 1, device="cuda", dtype=q.dtype)[1:].view_as(q).copy_(q)
    strange_unit = torch.empty(2, 300, 4, 144, device="cuda", dtype=q.dtype)[..., ::2].copy_(q)
    odd_stride = torch.empty(2, 300, 4, 77, device="cuda", dtype=q.dtype)[..., :72].copy_(q)
    layouts = [
        tuple(qkv.unbind(2)),
        tuple(x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)),
        tuple(x.transpose(0, 1).contiguous().transpose(0, 1) for x in (q, k, v)),
        (misaligned, misaligned_like(k), v),
        (strange_unit, k, v),
        (odd_stride, k, v),
    ]
    for layout in layouts:
        assert torch.equal(flash_attn_func(*layout, causal=True), expected)
    assert torch.equal(flash_attn_qkvpacked_func(qkv, causal=True), expected)
    shared = k[:, :, :1]  # keys expanded over heads, and over the batch
    grouped = flash_attn_func(q, shared, v[:, :, :1])
    assert torch.equal(flash_attn_func(q, shared.expand_as(k), v[:, :, :1].expand_as(v)), grouped)
    assert torch.equal(
        flash_attn_func(q, k[:1].expand_as(k), v[:1].expand_as(v)),
        flash_attn_func(q, k[:1].repeat(2, 1, 1, 1), v[:1].repeat(2, 1, 1, 1)),
    )


def misaligned_like(x: Tensor) -> Tensor:
    return torch.empty(x.numel() + 1, device=x.device, dtype=x.dtype)[1:].view_as(x).copy_(x)


def test_nothing_is_written_outside_the_result(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    guarded = []

    def between_guards(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        pool = torch.full((math.prod(shape) + 8192,), 7.0, dtype=dtype, device="cuda")
        guarded.append(pool)
        return pool[4096:-4096].view(shape)

    for lengths, head_dim in itertools.product(((1, 1), (130, 50), (333, 400)), (40, 64, 128, 256)):
        tensors = inputs(*lengths, head_dim=head_dim)
        with monkeypatch.context() as patched:
            patched.setattr(fast, "allocate", lambda shape, strides, dtype: between_guards(shape, dtype))
            patched.setattr(torch, "empty_like", lambda x: between_guards(x.shape, x.dtype))
            flash_attn_func(*tensors, causal=True, return_attn_probs=True)
        assert len(guarded) == 2  # out, lse
        for pool in guarded:
            assert (pool[:4096] == 7).all() and (pool[-4096:] == 7).all()
        guarded.clear()


def test_an_unwanted_lse_goes_where_nobody_reads(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pool = torch.full((8192 + memory.UNREAD,), 7.0, device="cuda")
    monkeypatch.setitem(memory._unread, torch.cuda.current_device(), pool[4096:-4096])
    backend.attention_plan.cache_clear()  # a plan holds a view of that memory
    q = inputs(130, 50, heads_q=3, heads_k=3)[0]
    flash_attn_func(q, q[:, :50], q[:, :50], causal=True)
    backend.attention_plan.cache_clear()
    written = q.shape[0] * q.shape[2] * q.shape[1]
    assert (pool[:4096] == 7).all() and (pool[4096 + written :] == 7).all()
    assert (pool[4096 : 4096 + written] != 7).all()


def test_nan_stays_in_its_head(path: str) -> None:
    q, k, v = inputs(200, 300, 4, 2, dtype=torch.float16)
    expected = flash_attn_func(q, k, v)
    for x in (k, v):
        x[0, 100, 0] = float("nan")
    out = flash_attn_func(q, k, v)
    assert out[0, :, :2].isnan().any()
    assert torch.equal(out[0, :, 2:], expected[0, :, 2:]) and torch.equal(out[1], expected[1])


@pytest.mark.parametrize("options", [FULL, CAUSAL, {"window_size": (100, 10)}], ids=str)
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_repeats_are_bitwise_equal(path: str, head_dim: int, options: dict) -> None:
    q, k, v = inputs(700, 700, 16, 4, head_dim=head_dim, batch=8)
    out, lse, _ = flash_attn_func(q, k, v, return_attn_probs=True, **options)
    pressure = torch.empty(1 << 26, device="cuda")
    for _ in range(100):
        pressure.add_(1.0)  # other traffic, other timing
        again, lse_again, _ = flash_attn_func(q, k, v, return_attn_probs=True, **options)
        assert torch.equal(out, again) and torch.equal(lse, lse_again)


@pytest.mark.parametrize("empty_pool", [False, True], ids=["counters left", "no counter left"])
def test_graphs_and_streams(path: str, empty_pool: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Replays beside eager calls on other streams: no shared state, no allocation, the right stream."""
    q, k, v = inputs(1025, 700, 16, 4, head_dim=128, batch=4)  # more tiles than SMs: they are drawn
    expected = flash_attn_func(q, k, v, causal=True)
    if empty_pool:
        monkeypatch.setattr(memory, "_stock", {})
    graphs, streams = [], [torch.cuda.Stream() for _ in range(3)]
    captured = []
    for stream in streams[:2]:
        stream.wait_stream(torch.cuda.current_stream())
        graphs.append(torch.cuda.CUDAGraph())
        with torch.cuda.graph(graphs[-1], stream=stream):
            captured += [flash_attn_func(q, k, v, causal=True) for _ in range(2)]
    for _ in range(20):
        for out in captured:
            out.fill_(float("nan"))
        torch.cuda.synchronize()
        for graph, stream in zip(graphs, streams[:2], strict=True):
            with torch.cuda.stream(stream):
                graph.replay()
        with torch.cuda.stream(streams[2]):
            torch.cuda._sleep(100_000)
            late = q.clone()  # ready only after the sleep
            beside = flash_attn_func(late, k, v, causal=True)
        torch.cuda.synchronize()
        for out in (*captured, beside):
            assert torch.equal(out, expected)


def test_other_device(path: str) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    q, k, v = inputs(300, 300)
    expected = flash_attn_func(q, k, v)
    out = flash_attn_func(*(x.to("cuda:1") for x in (q, k, v)))
    assert torch.cuda.current_device() == 0 and out.device.index == 1
    assert torch.equal(out.to("cuda:0"), expected)


def test_more_heads_than_a_grid_dimension_holds(path: str) -> None:
    check(*inputs(3, 5, 700, 100, head_dim=8, batch=100))


def test_more_than_2_to_31_elements(path: str) -> None:
    if torch.cuda.get_device_properties(0).total_memory < 40e9:
        pytest.skip("needs 40 GB")
    seqlen, heads = 1 << 20, 17
    q = torch.randn(1, seqlen, heads, 128, device="cuda", dtype=torch.bfloat16)
    assert q.numel() > 2**31
    k, v = (torch.randn(1, 200, 1, 128, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    out, lse, _ = flash_attn_func(q, k, v, return_attn_probs=True)
    check_forward(out[:, -500:], lse[..., -500:], q[:, -500:], k, v)
    few = torch.randn(1, 200, heads, 128, device="cuda", dtype=torch.bfloat16)
    out, lse, _ = flash_attn_func(few, q, q, causal=True, window_size=(1000, 0), return_attn_probs=True)
    check_forward(out, lse, few, q[:, -1200:], q[:, -1200:], window_left=1000, window_right=0)


# Dropout


@pytest.mark.parametrize("options", [FULL, CAUSAL, WINDOWS[0]], ids=["full", "causal", "window"])
@pytest.mark.parametrize("head_dim", [64, 96, 128, 192, 256])
def test_dropout(path: str, head_dim: int, options: dict) -> None:
    for lengths, dtype in (
        ((200, 333), torch.bfloat16),
        ((1500, 1300), torch.float16),
        ((1, 50), torch.bfloat16),
    ):
        q, k, v = inputs(*lengths, 6, 2, head_dim=head_dim, dtype=dtype)
        out, lse, S_dmask = flash_attn_func(q, k, v, 0.2, return_attn_probs=True, **options)
        dropout = {"dropout_mask": ~S_dmask.signbit(), "dropout_p": 0.2}
        check_forward(out, lse, q, k, v, **reference_options(options), **dropout)


@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_dropout_drops_no_sink(path: str, head_dim: int) -> None:
    sinks = torch.randn(6, device="cuda")
    q, k, v = inputs(200, 333, 6, 2, head_dim=head_dim)
    out, lse, S_dmask = flash_attn_func(q, k, v, 0.2, causal=True, return_attn_probs=True, s_aux=sinks)
    dropout = {"dropout_mask": ~S_dmask.signbit(), "dropout_p": 0.2}
    check_forward(out, lse, q, k, v, window_right=0, s_aux=sinks, **dropout)


@pytest.mark.parametrize("dropout_p", [0.1, 0.5, 0.99, 1e-6, 1 - 1e-6])
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_dropout_drops_the_elements_that_philox_says(
    path: str, head_dim: int, dropout_p: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without scores all P are equal, with the identity as V (of some keys) O is P, element by element."""
    seed = torch.tensor([0x7EDCBA9876543210], device="cuda")
    monkeypatch.setattr(api, "_draw_seed", lambda device: seed)
    q, k, v = (torch.zeros_like(x) for x in inputs(400, 500, 6, 2, head_dim=head_dim))
    kept = []
    for start in range(0, 500, head_dim):
        v.zero_()
        v[:, start : start + head_dim].diagonal(dim1=1, dim2=3).fill_(1)
        kept.append(flash_attn_func(q, k, v, dropout_p) > 0)
    kept = torch.cat(kept, dim=-1)[..., :500].transpose(1, 2)  # (batch, heads, queries, keys)
    heads = torch.arange(12, device="cuda").view(2, 6, 1)
    assert torch.equal(kept, keep_mask(seed, dropout_p, heads, torch.arange(400, device="cuda"), range(500)))
    expected = round((1 - dropout_p) * 2**15) / 2**15
    deviation = (expected * (1 - expected) / kept.numel()) ** 0.5
    assert abs(kept.double().mean().item() - expected) <= 5 * deviation


def test_dropout_repeats_with_the_seed(path: str) -> None:
    q, k, v = inputs(300, 300)

    def run(seed: int) -> Tensor:
        torch.manual_seed(seed)
        return torch.stack([flash_attn_func(q, k, v, 0.3) for _ in range(2)])

    first, again, other = run(1), run(1), run(2)
    assert torch.equal(first, again)
    assert not torch.equal(first[0], first[1]) and not torch.equal(first[0], other[0])


def test_a_graph_drops_anew_in_each_replay(path: str) -> None:
    q, k, v = inputs(300, 300)
    flash_attn_func(q, k, v, 0.3)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = flash_attn_func(q, k, v, 0.3)

    def replays(seed: int) -> Tensor:
        torch.cuda.manual_seed(seed)
        outs = []
        for _ in range(3):
            graph.replay()
            outs.append(out.clone())
        return torch.stack(outs)

    first = replays(1)
    assert torch.equal(first, replays(1)) and not torch.equal(first, replays(2))
    assert not torch.equal(first[0], first[1]) and not torch.equal(first[1], first[2])


def test_checkpointing_drops_the_same(path: str) -> None:
    q, k, v = (x.requires_grad_() for x in inputs(300, 300))
    call = partial(flash_attn_func, dropout_p=0.3, deterministic=True)
    torch.cuda.manual_seed(3)
    expected = torch.autograd.grad(call(q, k, v).sum(), (q, k, v))
    torch.cuda.manual_seed(3)
    out = checkpoint(call, q, k, v, use_reentrant=False)  # restores the generators of its tensors' devices
    assert all(map(torch.equal, torch.autograd.grad(out.sum(), (q, k, v)), expected))


@pytest.mark.parametrize("options", [FULL, CAUSAL], ids=["full", "causal"])
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_dropout_with_variable_lengths(path: str, head_dim: int, options: dict) -> None:
    """Each sequence as if it were dense, in its place of the batch. Few queries: not by the decode kernel."""
    for lengths in ([(200, 300), (0, 40), (77, 129), (500, 130), (64, 64)], [(1, 300), (1, 17), (2, 1000)]):
        seqlens = torch.tensor(lengths, dtype=torch.int32).T
        starts = torch.nn.functional.pad(seqlens.cumsum(1, dtype=torch.int32), (1, 0)).cuda()
        total_q, total_k = seqlens.sum(1).tolist()
        q, k, v = (x[0] for x in inputs(total_q, total_k, 4, 2, head_dim=head_dim, batch=1))
        out, lse, S_dmask = flash_attn_varlen_func(
            q, k, v, *starts, *seqlens.amax(1).tolist(), 0.2, return_attn_probs=True, **options
        )
        for b, (seqlen_q, seqlen_k) in enumerate(lengths):
            rows = slice(starts[0, b], starts[0, b] + seqlen_q)
            keys = slice(starts[1, b], starts[1, b] + seqlen_k)
            kept = ~S_dmask[b : b + 1, :, :seqlen_q, :seqlen_k].signbit()
            one = (x[None] for x in (out[rows], lse[:, rows], q[rows], k[keys], v[keys]))
            dropout = {"dropout_mask": kept, "dropout_p": 0.2}
            check_forward(*one, **reference_options(options), **dropout)


def test_float32_is_for_the_cpu_backend(gpu: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = inputs(64, 64, dtype=torch.float32)
    with pytest.raises(NotImplementedError, match="float32"):
        flash_attn_func(q, k, v)
    monkeypatch.setenv("MINI_FLASH_ATTENTION_BACKEND", "cpu")
    check(q, k, v, causal=True)
