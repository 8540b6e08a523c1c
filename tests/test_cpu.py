"""The CPU backend against the oracle: forward and gradients, under the error rule."""

import itertools
import subprocess
import sys
from typing import Any

import pytest
import torch
from error_rule import check_forward, check_gradients
from torch import Tensor

from mini_flash_attention import cpu, flash_attn_func, sinks
from mini_flash_attention.philox import keep_mask
from mini_flash_attention.problem import Inputs, Problem, dense

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
SEED = 0x0123_4567_89AB_CDEF


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many tiles from short sequences, so that small tests cross many edges."""
    monkeypatch.setattr(cpu, "tile_shape", lambda problem: (32, 16))


def inputs(
    batch: int = 2,
    seqlen_q: int = 33,
    seqlen_k: int = 47,
    heads_q: int = 2,
    heads_k: int = 2,
    head_dim: int = 16,
    dtype: torch.dtype = torch.float32,
) -> list[Tensor]:
    """Random q, k, v, dout and dlse."""
    q_shape, k_shape = (batch, seqlen_q, heads_q, head_dim), (batch, seqlen_k, heads_k, head_dim)
    shapes = q_shape, k_shape, k_shape, q_shape, (batch, heads_q, seqlen_q)
    return [torch.randn(shape, dtype=dtype) for shape in shapes]


def problem_of(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Problem:
    window = (options.get("window_left"), options.get("window_right"))
    numbers = options.get("dropout_p", 0.0), options.get("softmax_scale"), False, window
    rest = options.get("softcap", 0.0), options.get("alibi_slopes"), False, options.get("s_aux")
    return dense(q, k, v, (*numbers, *rest))[0]


def attend(
    q: Tensor, k: Tensor, v: Tensor, dout: Tensor, dlse: Tensor | None, **options: Any
) -> tuple[Tensor, ...]:
    """out, lse, dq, dk, dv, perhaps ds_aux, of the CPU; the options are those of reference.attention."""
    problem, slopes, s_aux = problem_of(q, k, v, **options), options.get("alibi_slopes"), options.get("s_aux")
    x = Inputs(q, k, v, slopes, SEED, s_aux=s_aux)
    out, lse = cpu.forward(problem, x)
    of_sinks = () if s_aux is None else (sinks.gradient(s_aux, out, lse, dout, dlse),)
    return out, lse, *cpu.backward(problem, x, out, lse, dout, dlse), *of_sinks


def check(q: Tensor, k: Tensor, v: Tensor, dout: Tensor, dlse: Tensor | None, **options: Any) -> None:
    out, lse, *gradients = attend(q, k, v, dout, dlse, **options)
    if options.get("dropout_p"):
        (batch, seqlen_q, heads_q, _), seqlen_k = q.shape, k.shape[1]
        heads, rows = torch.arange(batch * heads_q).unsqueeze(-1), torch.arange(seqlen_q)
        keep = keep_mask(SEED, options["dropout_p"], heads, rows, range(seqlen_k))
        options["dropout_mask"] = keep.unflatten(0, (batch, heads_q)).to(q.device)
    check_forward(out, lse, q, k, v, **options)
    check_gradients(tuple(gradients), dout, dlse, q, k, v, **options)


# Tile edges ± 1, primes, one row, one key, more queries than keys and the other way round.
LENGTHS = [
    (1, 1), (1, 16), (1, 97), (2, 5), (17, 1), (97, 1), (15, 17), (31, 33), (32, 32), (33, 31),
    (64, 16), (63, 65), (65, 64), (113, 103), (128, 31), (101, 127), (129, 128), (20, 160),
]  # fmt: skip
WINDOWS = [
    (None, None), (None, 0), (0, None), (0, 0), (5, 0), (16, 15), (31, 33), (None, 20), (40, None),
    (None, 1000), (1000, 0),
]  # fmt: skip


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("window", WINDOWS, ids=str)
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_lengths_and_windows(lengths: tuple[int, int], window: tuple[int | None, int | None]) -> None:
    left, right = window
    dtype = DTYPES[sum(lengths, left or 0) % 3]  # not float64, which has tests of its own
    heads_q, heads_k = [(2, 2), (3, 1), (4, 2)][lengths[0] % 3]
    tensors = inputs(2, *lengths, heads_q, heads_k, 16, dtype)
    check(*tensors, window_left=left, window_right=right)


@pytest.mark.parametrize("lengths", [(127, 129), (128, 257), (300, 640), (1030, 513)], ids=str)
def test_tiles_as_they_are(lengths: tuple[int, int]) -> None:
    for window_right, dtype in ((None, torch.bfloat16), (0, torch.float32)):
        check(*inputs(1, *lengths, 2, 1, 64, dtype), window_right=window_right)


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", [1, 8, 40, 59, 64, 128, 256])
def test_head_dims_and_dtypes(head_dim: int, dtype: torch.dtype) -> None:
    check(*inputs(2, 67, 83, 2, 1, head_dim, dtype), window_right=0)


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("heads_k", [1, 2])
@pytest.mark.parametrize("group", [1, 2, 3, 5, 7])
def test_gqa_ratios(group: int, heads_k: int) -> None:
    for dtype, left in itertools.product((torch.float16, torch.float64), (None, 9)):
        tensors = inputs(2, 37, 45, group * heads_k, heads_k, 24, dtype)
        check(*tensors, window_left=left, window_right=3, alibi_slopes=torch.rand(group * heads_k))


SINKS = [
    torch.tensor([-1.0, 0.5, 2.0, 4.0]),
    torch.tensor([50.0, -50.0, 1e4, -1e4]),
    torch.tensor([-torch.inf, 3.0, -torch.inf, 0.0]),
    torch.tensor([-1.0, 0.5, 2.0, 4.0], dtype=torch.bfloat16),
    torch.tensor([1.0, -2.0, 30.0, 0.0], dtype=torch.float16),
]


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("dropout_p", [0.0, 0.17])
@pytest.mark.parametrize("window", [(None, None), (None, 0), (20, 4)], ids=str)
@pytest.mark.parametrize("s_aux", SINKS, ids=str)
def test_sinks(s_aux: Tensor, window: tuple[int | None, int | None], dropout_p: float) -> None:
    """More queries than keys: with a mask the first ones see none, so that the LSE is the sink."""
    limits = dict(zip(("window_left", "window_right"), window, strict=True))
    slopes = torch.rand(4)
    for dtype, heads_k, score in zip(DTYPES, (1, 2, 4, 2), (True, False, True, True), strict=True):
        features = dict(softcap=2.0, alibi_slopes=slopes) if score else {}
        tensors = inputs(2, 61, 50, 4, heads_k, 16, dtype)
        check(*tensors, **limits, **features, s_aux=s_aux, dropout_p=dropout_p)


def test_a_sink_that_is_not_there() -> None:
    tensors = inputs(dtype=torch.float64)
    without, least = attend(*tensors), attend(*tensors, s_aux=torch.full((2,), -torch.inf))
    for x, y in zip(without, least, strict=False):
        torch.testing.assert_close(x, y)
    assert not least[-1].any()


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("dropout_p", [0.0, 0.17, 0.8])
@pytest.mark.parametrize("alibi", [None, (4,), (2, 4)], ids=str)
@pytest.mark.parametrize("softcap", [0.0, 2.0])
@pytest.mark.parametrize("window", [(None, None), (20, 4)], ids=str)
def test_features_combine(
    window: tuple[int | None, int | None],
    softcap: float,
    alibi: tuple[int, ...] | None,
    dropout_p: float,
) -> None:
    left, right = window
    slopes = None if alibi is None else torch.rand(alibi)
    for dtype in (torch.bfloat16, torch.float32, torch.float64):
        check(
            *inputs(2, 61, 50, 4, 2, 16, dtype),
            window_left=left,
            window_right=right,
            softcap=softcap,
            alibi_slopes=slopes,
            dropout_p=dropout_p,
        )


def test_tensors_on_a_gpu(gpu: torch.device) -> None:
    for dtype in DTYPES:
        tensors = [x.to(gpu) for x in inputs(2, 261, 250, 4, 2, 64, dtype)]
        slopes = torch.rand(4, device=gpu)
        check(*tensors, window_right=3, softcap=2.0, alibi_slopes=slopes, dropout_p=0.2)


@pytest.mark.parametrize("softmax_scale", [1.0, 0.0, -0.3, 5.0])
def test_any_scale(softmax_scale: float) -> None:
    check(*inputs(dtype=torch.float64), softmax_scale=softmax_scale, softcap=3.0)


def test_the_lse_gradient_is_optional() -> None:
    *tensors, dlse = inputs(dtype=torch.float64)
    check(*tensors, None)
    without, zero = attend(*tensors, None), attend(*tensors, torch.zeros_like(dlse))
    assert all(map(torch.equal, without, zero))


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_numerical_gradients(dropout_p: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "tile_shape", lambda problem: (4, 3))
    q, k, v = (x.requires_grad_() for x in inputs(1, 5, 7, 4, 2, 3, torch.float64)[:3])
    slopes = torch.rand(4)

    def attention(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None = None) -> tuple[Tensor, Tensor]:
        torch.manual_seed(1)  # the same dropout in each evaluation
        options = dropout_p, None, False, (3, 1), 1.5, slopes
        return flash_attn_func(q, k, v, *options, return_attn_probs=True, s_aux=sinks)[:2]

    assert torch.autograd.gradcheck(attention, (q, k, v))
    sinks = torch.randn(4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(attention, (q, k, v, sinks), check_forward_ad=dropout_p == 0)


@pytest.mark.parametrize("tiles", [(1, 1), (7, 5), (16, 64), (128, 4), (256, 256)], ids=str)
def test_tiles_change_nothing(tiles: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = inputs(2, 45, 61, 6, 2, 8, torch.float64)
    options = {"window_left": 30, "window_right": 7, "softcap": 4.0, "dropout_p": 0.4}
    expected = attend(*tensors, **options)
    monkeypatch.setattr(cpu, "tile_shape", lambda problem: tiles)
    for got, want in zip(attend(*tensors, **options), expected, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-12)


def test_tile_shape_bounds_the_memory_of_a_tile() -> None:
    for batch, heads in itertools.product((1, 7, 600), (1, 12)):
        q = torch.empty(1).expand(batch, 5000, heads, 64)
        tile_m, tile_n = cpu.tile_shape(problem_of(q, q, q))
        elements = batch * heads * tile_m * tile_n
        assert cpu.TILE_ELEMENTS // 4 < elements <= cpu.TILE_ELEMENTS or tile_n == cpu.MIN_TILE
    q = torch.empty(1).expand(1, 5000, 1, 64)
    assert cpu.tile_shape(problem_of(q, q, q, window_left=150, window_right=49)) == (200, 200)


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("window", [(None, 0), (3, 5)], ids=str)
def test_rows_that_see_no_key(window: tuple[int | None, int]) -> None:
    """More queries than keys: the first 80 rows, and whole tiles, lie left of all keys."""
    options = {"window_left": window[0], "window_right": window[1]}
    q, k, v, dout, dlse = inputs(2, 130, 40)
    dlse[:, :, :80] = torch.nan  # what autograd may find for an LSE of -inf
    out, lse, dq, dk, dv = attend(q, k, v, dout, dlse, **options)
    assert not out[:, :80].any() and not dq[:, :80].any() and (lse[:, :, :80] == -torch.inf).all()
    assert all(x.isfinite().all() for x in (out, dq, dk, dv))
    check(q, k, v, dout, dlse, **options)


@pytest.mark.parametrize("sizes", [(0, 3, 4), (2, 0, 4), (2, 3, 0), (2, 0, 0)], ids=str)
@pytest.mark.parametrize("dropout_p", [0.0, 0.5])
def test_zero_sizes(sizes: tuple[int, int, int], dropout_p: float) -> None:
    tensors = inputs(*sizes, 4, 2, 8)
    options = {"window_right": 0, "alibi_slopes": torch.rand(4), "dropout_p": dropout_p}
    out, lse, *gradients = attend(*tensors, **options)
    assert out.shape == tensors[0].shape and not out.any()
    assert lse.shape == (sizes[0], 4, sizes[1])
    assert sizes[2] > 0 or (lse == -torch.inf).all()
    for x, gradient in zip(tensors, gradients, strict=False):
        assert gradient.shape == x.shape and not gradient.any()


@pytest.mark.usefixtures("small_tiles")
def test_huge_inputs() -> None:
    q, k, v, dout, dlse = inputs(1, 40, 50, dtype=torch.bfloat16)
    huge = [torch.full_like(x, 133120) for x in (q, k, v)]
    out, lse, *gradients = attend(*huge, dout, dlse)
    check_forward(out, lse, *huge)
    assert all(x.isfinite().all() for x in gradients)


@pytest.mark.usefixtures("small_tiles")
def test_fp16_up_to_its_end() -> None:
    q, k, v, dout, dlse = inputs(1, 40, 50, dtype=torch.float16)
    q, k = (x.clamp(-3, 3) * 20000 for x in (q, k))
    check(q, k, v, dout, dlse, softmax_scale=1e-9)


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("logit", [-1e5, -(2.0**100), 1e5])
def test_no_logit_is_too_low_or_too_high(logit: float) -> None:
    """A mask that is a large finite number instead of -inf would show here."""
    q, k, v, dout, dlse = inputs(1, 50, 37)
    q, k = torch.ones_like(q), (logit + torch.randint(0, 3, k.shape)) / k.shape[-1]
    options = {"window_right": 0, "softmax_scale": 1.0}
    out, lse, *gradients = attend(q, k, v, dout, dlse, **options)
    check_forward(out, lse, q, k, v, **options)
    assert all(x.isfinite().all() for x in gradients)


@pytest.mark.parametrize("poisoned", [0, 1, 2], ids=["q", "k", "v"])
def test_nan_stays_in_its_group_of_heads(poisoned: int) -> None:
    tensors = inputs(2, 40, 50, 4, 2)
    clean = attend(*tensors, window_right=0)
    tensors[poisoned][1, 7, 0, 3] = torch.nan
    dirty = attend(*tensors, window_right=0)
    assert any(x.isnan().any() for x in dirty)
    for got, want in zip(dirty, clean, strict=True):
        got, want = (x.mT.unsqueeze(-1) if x.ndim == 3 else x for x in (got, want))
        got, want = (x.unflatten(2, (2, -1)) for x in (got, want))
        assert torch.equal(got[0], want[0]) and torch.equal(got[1, :, 1], want[1, :, 1])


STRIDED = {
    "heads first": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    "sequence first": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "head dim not last": lambda x: x.mT.contiguous().mT,
    "packed": lambda x: torch.stack((x, -x, x), dim=2)[:, :, 1],
    "expanded heads": lambda x: x[:, :, :1].expand(x.shape),
    "expanded batch": lambda x: x[:1].expand(x.shape),
    "gaps, misaligned": lambda x: torch.cat((x, x), dim=-1)[:, ::2, :, 3 : 3 + x.shape[-1]],
}


@pytest.mark.parametrize("how", STRIDED)
def test_any_strides(how: str) -> None:
    *tensors, dlse = inputs(2, 40, 50, 4, 4)
    tensors = [STRIDED[how](x) for x in tensors]
    tensors.append(dlse[:, :, : tensors[0].shape[1]])
    check(*tensors, window_right=0)


def test_dropout_probabilities() -> None:
    q, k, v, *_ = inputs(2, 40, 50, 4, 2, dtype=torch.float64)
    slopes = torch.rand(4)
    problem = problem_of(q, k, v, dropout_p=0.3, window_right=0, softcap=2.0, alibi_slopes=slopes)
    x = Inputs(q, k, v, slopes, SEED)
    out, lse = cpu.forward(problem, x)
    S_dmask = cpu.dropout_probabilities(problem, x, lse)
    torch.testing.assert_close(S_dmask.abs().sum(-1), torch.ones(2, 4, 40, dtype=torch.float64))
    kept = S_dmask.masked_fill(S_dmask < 0, 0) / 0.7
    heads = v.repeat_interleave(2, dim=2).transpose(1, 2)
    torch.testing.assert_close(out, (kept @ heads).transpose(1, 2))
    assert torch.equal(
        ~torch.signbit(S_dmask).flatten(0, 1),
        keep_mask(SEED, 0.3, torch.arange(8).unsqueeze(-1), torch.arange(40), range(50)),
    )


def test_seeds_differ() -> None:
    q, k, v, *_ = inputs()
    problem = problem_of(q, k, v, dropout_p=0.5)
    one, again, two = (cpu.forward(problem, Inputs(q, k, v, None, seed))[0] for seed in (1, 1, 2))
    assert torch.equal(one, again) and not torch.equal(one, two)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_does_not_grow_with_the_square_of_the_length() -> None:
    code = """if True:
        import torch
        from mini_flash_attention import flash_attn_func

        def kilobytes(what):
            lines = open("/proc/self/status").read().splitlines()
            return next(int(line.split()[1]) for line in lines if line.startswith(what))

        def run(seqlen):
            q, k, v = (torch.randn(1, seqlen, 1, 64, requires_grad=True) for _ in range(3))
            flash_attn_func(q, k, v).backward(torch.randn_like(q))

        run(16)
        start = kilobytes("VmRSS")
        run(16384)
        print(kilobytes("VmHWM") - start)
    """
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(run.stdout) < 500_000
