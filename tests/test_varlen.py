"""flash_attn_varlen_func on each path against the oracle, one sequence at a time."""

import itertools
import weakref
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from error_rule import check_forward, check_gradients, reference_options
from torch import Tensor

from mini_flash_attention import (
    flash_attn_func,
    flash_attn_varlen_func,
    flash_attn_varlen_kvpacked_func,
    flash_attn_varlen_qkvpacked_func,
    reference,
)
from mini_flash_attention.gpu import compile

CPU = torch.device("cpu")
INT_MAX = 2**31 - 1
NAN = float("nan")

# Each a batch of (queries, keys): no queries, no keys, neither, one, tile borders and their neighbours,
# more queries than keys and fewer.
BATCHES = [
    [(0, 5), (64, 64), (5, 0), (1, 1), (0, 0), (128, 128), (127, 129), (0, 0)],
    [(1, 300), (192, 385), (2, 17), (257, 96), (1, 64), (70, 130)],
    [(191, 193), (63, 65), (3, 700), (129, 127), (300, 1), (17, 64)],
]
OPTIONS = [
    {},
    {"causal": True},
    {"window_size": (50, 20)},
    {"window_size": (0, 0)},
    {"window_size": (-1, 30), "softmax_scale": 0.3},
    {"window_size": (100, -1)},
    {"window_size": (64, 0), "causal": True, "softcap": 5.0},
    {"softcap": 2.0},
    {"alibi": "heads"},
    {"alibi": "batch", "causal": True, "softcap": 20.0},
    {"alibi": "batch", "window_size": (40, 10)},
    {"sinks": True},
    {"sinks": True, "causal": True, "alibi": "batch", "softcap": 20.0},
]
WHOLE = [{}, {"causal": True}, {"window_size": (50, 20)}]


class Batch(NamedTuple):
    """Packed sequences; the lists are the lengths."""

    q: Tensor
    k: Tensor
    v: Tensor
    seqlens_q: list[int]
    seqlens_k: list[int]

    @property
    def lengths(self) -> tuple[Tensor, Tensor, int, int]:
        """The arguments after q, k and v."""
        longest = max(self.seqlens_q, default=0), max(self.seqlens_k, default=0)
        return cumulative(self.seqlens_q, self.q.device), cumulative(self.seqlens_k, self.q.device), *longest

    def sequences(self) -> Iterator[tuple[slice, slice]]:
        ends = zip(itertools.accumulate(self.seqlens_q), itertools.accumulate(self.seqlens_k), strict=True)
        for (end_q, end_k), n_q, n_k in zip(ends, self.seqlens_q, self.seqlens_k, strict=True):
            yield slice(end_q - n_q, end_q), slice(end_k - n_k, end_k)


def cumulative(lengths: list[int], device: torch.device) -> Tensor:
    return torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32, device=device)


def int32(values: list, device: torch.device) -> Tensor:
    return torch.tensor(values, dtype=torch.int32, device=device)


def batch_of(
    lengths: list[tuple[int, int]],
    device: torch.device,
    heads_q: int = 2,
    heads_k: int = 2,
    head_dim: int = 64,
    dtype: torch.dtype | None = None,
) -> Batch:
    dtype = dtype or (torch.float32 if device.type == "cpu" else torch.bfloat16)
    seqlens_q, seqlens_k = [q for q, _ in lengths], [k for _, k in lengths]
    shapes = (sum(seqlens_q), heads_q), (sum(seqlens_k), heads_k), (sum(seqlens_k), heads_k)
    tensors = (torch.randn(*shape, head_dim, device=device).to(dtype) for shape in shapes)
    return Batch(*tensors, seqlens_q, seqlens_k)


def slopes_for(options: dict[str, Any], batch: int, heads: int, device: torch.device) -> dict[str, Any]:
    """The options with tensors of ALiBi slopes in the place of their kinds, and sinks where they are True."""
    options = dict(options)
    if kind := options.pop("alibi", None):
        shape = (heads,) if kind == "heads" else (batch, heads)
        options["alibi_slopes"] = torch.rand(shape, device=device) * 0.3
    if options.pop("sinks", False):
        options["s_aux"] = 2 * torch.randn(heads, device=device)
    return options


def check_batch(out: Tensor, lse: Tensor, batch: Batch, every: int = 1, **options: Any) -> None:
    """Each sequence, or each of so many, by the error rule."""
    for b, (rows, keys) in enumerate(batch.sequences()):
        if b % every == 0:
            q, k, v = batch.q[rows], batch.k[keys], batch.v[keys]
            tensors = (x.unsqueeze(0) for x in (out[rows], lse[:, rows], q, k, v))
            check_forward(*tensors, **reference_options(options, b))


def check(batch: Batch, every: int = 1, **options: Any) -> None:
    options = slopes_for(options, len(batch.seqlens_q), batch.q.shape[1], batch.q.device)
    tensors = batch.q, batch.k, batch.v, *batch.lengths
    out, lse, _ = flash_attn_varlen_func(*tensors, return_attn_probs=True, **options)
    assert lse.shape == (batch.q.shape[1], batch.q.shape[0])
    check_batch(out, lse, batch, every, **options)


@pytest.mark.parametrize("options", WHOLE, ids=str)
@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("lengths", BATCHES, ids=["zeros", "borders", "primes"])
def test_lengths(any_path: torch.device, lengths: list, head_dim: int, options: dict) -> None:
    check(batch_of(lengths, any_path, head_dim=head_dim), **options)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_scores_and_windows(any_path: torch.device, options: dict) -> None:
    for head_dim in (16,) if any_path.type == "cpu" else (64, 128, 256):
        check(batch_of(BATCHES[1], any_path, 4, 2, head_dim, torch.float16), **options)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("head_dim", [8, 40, 59, 72, 96, 111, 136, 192])
def test_head_dims(any_path: torch.device, head_dim: int, dtype: torch.dtype) -> None:
    for options in ({"causal": True}, {"window_size": (30, 50)}):
        check(batch_of([(70, 130), (1, 33), (0, 9), (100, 40)], any_path, 4, 1, head_dim, dtype), **options)


@pytest.mark.parametrize("heads", [(1, 1), (3, 1), (4, 2), (7, 7), (8, 1), (16, 2)], ids=str)
def test_groups(any_path: torch.device, heads: tuple[int, int]) -> None:
    for options in WHOLE:
        check(batch_of([(33, 100), (1, 200), (130, 131), (64, 0)], any_path, *heads), **options)


@pytest.mark.parametrize("options", WHOLE, ids=str)
def test_thousands_of_sequences(any_path: torch.device, options: dict) -> None:
    lengths = torch.randint(0, 40, (1500, 2)).tolist()
    lengths[700] = (300, 500)
    check(batch_of(lengths, any_path, 4, 2), every=50, **options)


def test_a_long_tail(any_path: torch.device) -> None:
    check(batch_of([(1, 1), (1500, 1500), (3, 3), (20, 1100), (0, 0), (130, 130)], any_path), causal=True)


@pytest.mark.parametrize("lengths", [[], [(0, 0)], [(0, 0), (0, 7)], [(4, 0), (3, 0)]], ids=str)
def test_nothing_to_attend_to(any_path: torch.device, lengths: list) -> None:
    batch = batch_of(lengths, any_path)
    for options in WHOLE:
        out, lse, _ = flash_attn_varlen_func(*batch[:3], *batch.lengths, return_attn_probs=True, **options)
        assert out.shape == batch.q.shape and not out.any()
        assert lse.shape == (2, len(batch.q)) and (lse == -torch.inf).all()


@pytest.mark.parametrize("lengths", [[], [(0, 0)], [(4, 0), (3, 0)], [(4, 0), (3, 9)]], ids=str)
def test_sinks_of_rows_without_keys(any_path: torch.device, lengths: list) -> None:
    """Their LSE is the sink; that of rows in no sequence, whose dO may be anything, is -inf all the same."""
    batch = batch_of(lengths, any_path)
    q = torch.cat((batch.q, batch.q.new_full((3, 2, 64), NAN)))
    leaves = *(x.requires_grad_() for x in (q, *batch[1:3])), torch.randn(2, device=any_path).requires_grad_()
    out, lse, _ = flash_attn_varlen_func(
        *leaves[:3], *batch.lengths, causal=True, s_aux=leaves[3], return_attn_probs=True
    )
    end, sinks = sum(n for n, m in lengths if m == 0), leaves[3]
    assert not out[:end].any() and not out[-3:].any() and (lse[:, -3:] == -torch.inf).all()
    torch.testing.assert_close(lse[:, :end], sinks[:, None].expand(-1, end))
    dout, dlse = torch.randn_like(out), torch.randn_like(lse)
    dout[-3:], dlse[:, -3:] = NAN, NAN
    *gradients, ds_aux = torch.autograd.grad((out, lse), leaves, (dout, dlse))
    assert not gradients[0][:end].any() and not any(x.isnan().any() for x in gradients)
    delta = (dout.float() * out.float()).sum(-1).T - dlse  # of a row without keys: 0 - dlse
    expected = -((sinks[:, None] - lse).exp() * delta)[:, :-3].sum(1)
    torch.testing.assert_close(ds_aux, expected.detach())


def test_longest_lengths_are_hints(any_path: torch.device) -> None:
    """Of any integer kind; wrong ones change nothing."""
    batch = batch_of(BATCHES[1], any_path)
    cu_seqlens_q, cu_seqlens_k, longest_q, longest_k = batch.lengths
    tensors = *batch[:3], cu_seqlens_q, cu_seqlens_k
    expected, lse, _ = flash_attn_varlen_func(*tensors, longest_q, longest_k, return_attn_probs=True)
    check_batch(expected, lse, batch)
    for kind in (np.int64, np.int32, torch.tensor, lambda n: torch.tensor(n, device=any_path)):
        assert torch.equal(flash_attn_varlen_func(*tensors, kind(longest_q), kind(longest_k)), expected)
    for wrong in (0, 1, 100, 10**6):
        out, lse, _ = flash_attn_varlen_func(*tensors, wrong, wrong, return_attn_probs=True)
        check_batch(out, lse, batch)


def test_out_is_written_and_returned(any_path: torch.device) -> None:
    batch = batch_of(BATCHES[0], any_path)
    expected = flash_attn_varlen_func(*batch[:3], *batch.lengths, causal=True)
    room = torch.full((len(batch.q) + 7, 2, 2, 64), 7.0, device=any_path, dtype=batch.q.dtype)
    spread = room[3:-4, 1]  # strided
    q = torch.cat((batch.q, batch.q[:5]))  # five rows that belong to no sequence
    for out in (torch.empty_like(batch.q), spread):
        result = flash_attn_varlen_func(*batch[:3], *batch.lengths, causal=True, out=out)
        assert result is out and torch.equal(out, expected)
    out = torch.full_like(q, 7)
    flash_attn_varlen_func(q, *batch[1:3], *batch.lengths, causal=True, out=out)
    assert torch.equal(out[:-5], expected) and not out[-5:].any()
    out = q.clone()
    flash_attn_varlen_func(out, *batch[1:3], *batch.lengths, causal=True, out=out)
    assert torch.equal(out[:-5], expected) and not out[-5:].any()
    room[3:-4, 1] = 7
    assert (room == 7).all()  # nothing was written around it


def test_lengths_out_of_range_stay_inside(any_path: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are cut to the tensors: the results mean nothing, but nothing else is read or written."""
    monkeypatch.setenv("MINI_FLASH_ATTENTION_CHECK", "0")  # on the CPU they would be refused
    batch = batch_of([(30, 40), (50, 60)], any_path)
    wrong = int32([-5, 40, 10_000], any_path), int32([7, INT_MAX, 3], any_path)
    out = flash_attn_varlen_func(*batch[:3], *wrong, 100, 100)
    expected = flash_attn_varlen_func(
        *batch[:3], int32([0, 40, 80], any_path), int32([7, 100, 100], any_path), 100, 100
    )
    assert torch.equal(out, expected)


@pytest.mark.parametrize("options", [*WHOLE, {"alibi": "batch", "softcap": 4.0}], ids=str)
def test_garbage_behind_the_used_keys(any_path: torch.device, options: dict) -> None:
    """seqused_k with packed k, and with a row for each sequence."""
    used, room = [40, 0, 130, 1, 64], [70, 9, 130, 33, 128]
    options = slopes_for(options, len(used), 4, any_path)
    batch = batch_of(list(zip([33, 5, 64, 1, 200], used, strict=True)), any_path, 4, 2, 72, torch.float16)
    seqused_k = int32(used, any_path)
    cu_seqlens_q, _, longest_q, longest_k = batch.lengths

    packed = [torch.full((sum(room), 2, 72), NAN, dtype=torch.float16, device=any_path) for _ in "kv"]
    rows = [torch.full((len(used), 150, 2, 72), NAN, dtype=torch.float16, device=any_path) for _ in "kv"]
    starts = [0, *itertools.accumulate(room)]
    for b, (_, keys) in enumerate(batch.sequences()):
        for x, into, into_row in zip((batch.k, batch.v), packed, rows, strict=True):
            into[starts[b] : starts[b] + used[b]] = into_row[b, : used[b]] = x[keys]
    for k, v, cu_seqlens_k in ((*packed, cumulative(room, any_path)), (*rows, None)):
        out, lse, _ = flash_attn_varlen_func(
            batch.q,
            k,
            v,
            cu_seqlens_q,
            cu_seqlens_k,
            longest_q,
            longest_k,
            seqused_k=seqused_k,
            return_attn_probs=True,
            **options,
        )
        check_batch(out, lse, batch, **options)


def test_garbage_between_and_after_sequences(any_path: torch.device) -> None:
    batch = batch_of([(30, 50), (65, 70)], any_path)
    k, v = (torch.cat((torch.full_like(x[:9], NAN), x, torch.full_like(x[:60], NAN))) for x in batch[1:3])
    q = torch.cat((batch.q, torch.full_like(batch.q[:100], NAN)))
    cu_seqlens_q, cu_seqlens_k, *longest = batch.lengths
    for options in WHOLE:
        out, lse, _ = flash_attn_varlen_func(
            q, k, v, cu_seqlens_q, cu_seqlens_k + 9, *longest, return_attn_probs=True, **options
        )
        check_batch(out[: len(batch.q)], lse[:, : len(batch.q)], batch, **options)


def paged(batch: Batch, page_size: int, *tensors: Tensor) -> tuple[list[Tensor], Tensor]:
    """Tensors of keys in shuffled pages, NaN where there is no key, and the block table, INT_MAX where
    there is no page."""
    counts = [-(-n // page_size) for n in batch.seqlens_k]
    width, device = max(counts, default=0) + 2, batch.q.device
    numbers = (torch.randperm(sum(counts) + 3) + 1).tolist()  # page 0 and some others stay unused
    table = [[numbers.pop() for _ in range(n)] + [INT_MAX] * (width - n) for n in counts]
    pools = []
    for x in tensors:
        pool = torch.full((sum(counts) + 4, page_size, *x.shape[1:]), NAN, dtype=x.dtype, device=device)
        for row, (_, keys) in zip(table, batch.sequences(), strict=True):
            for i, start in enumerate(range(keys.start, keys.stop, page_size)):
                tokens = x[start : min(start + page_size, keys.stop)]
                pool[row[i], : len(tokens)] = tokens
        pools.append(pool)
    return pools, int32(table, device)


@pytest.mark.parametrize("options", [OPTIONS[i] for i in (0, 1, 2, 6, 9)], ids=str)
@pytest.mark.parametrize("page_size", [1, 16, 48, 64, 256])
def test_pages(any_path: torch.device, page_size: int, options: dict) -> None:
    head_dim = {16: 128, 48: 40, 256: 256}.get(page_size, 64)
    batch = batch_of(BATCHES[page_size % 3], any_path, 6, 2, head_dim, torch.bfloat16)
    options = slopes_for(options, len(batch.seqlens_q), 6, any_path)
    (k, v), block_table = paged(batch, page_size, batch.k, batch.v)
    cu_seqlens_q, cu_seqlens_k, *longest = batch.lengths
    used = {"seqused_k": int32(batch.seqlens_k, any_path)}
    for cu, more in ((cu_seqlens_k, {}), (None, used), (cu_seqlens_k * 2, used)):
        out, lse, _ = flash_attn_varlen_func(
            batch.q,
            k,
            v,
            cu_seqlens_q,
            cu,
            *longest,
            block_table=block_table,
            return_attn_probs=True,
            **more,
            **options,
        )
        check_batch(out, lse, batch, **options)


def test_strides(any_path: torch.device) -> None:
    """Packed tensors of any strides, and index tensors that are not contiguous."""
    batch = batch_of(BATCHES[2], any_path, 4, 4, 72, torch.float16)
    expected = flash_attn_varlen_func(*batch[:3], *batch.lengths, causal=True)
    heads_first = (x.transpose(0, 1).contiguous().transpose(0, 1) for x in batch[:3])
    wide = (torch.cat((x, x), dim=-1)[..., 1:73].copy_(x) for x in batch[:3])
    for tensors in (heads_first, wide):
        assert torch.equal(flash_attn_varlen_func(*tensors, *batch.lengths, causal=True), expected)
    lengths = [torch.stack((x, x), dim=1)[:, 0] for x in batch.lengths[:2]]
    out = flash_attn_varlen_func(*batch[:3], *lengths, *batch.lengths[2:], causal=True)
    assert torch.equal(out, expected)


def test_equal_lengths_are_the_dense_computation(any_path: torch.device) -> None:
    batch = batch_of([(70, 90)] * 3, any_path, 4, 2)
    out = flash_attn_varlen_func(*batch[:3], *batch.lengths, causal=True)
    dense = flash_attn_func(*(x.unflatten(0, (3, -1)) for x in batch[:3]), causal=True)
    # GPU: other tiles, perhaps other kernels, so other roundings
    tolerance = {} if any_path.type == "cpu" else {"rtol": 2e-2, "atol": 2e-2}
    torch.testing.assert_close(out.unflatten(0, (3, -1)), dense, **tolerance)


def backward(batch: Batch, **options: Any) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
    """dout, dlse and the gradients, of the sinks too where they require one."""
    leaves = [x.detach().requires_grad_() for x in batch[:3]]
    sinks = options.get("s_aux")
    if sinks is not None and sinks.requires_grad:
        leaves.append(sinks)
    tensors = *leaves[:3], *batch.lengths
    out, lse, _ = flash_attn_varlen_func(*tensors, return_attn_probs=True, **options)
    dout, dlse = torch.randn_like(out), torch.randn_like(lse)
    return dout, dlse, torch.autograd.grad((out, lse), leaves, (dout, dlse))


@pytest.mark.parametrize("options", [OPTIONS[i] for i in (0, 1, 2, 6, 9, 11, 12)], ids=str)
@pytest.mark.parametrize("lengths", BATCHES, ids=["zeros", "borders", "primes"])
def test_gradients(any_path: torch.device, lengths: list, options: dict) -> None:
    batch = batch_of(lengths, any_path, 4, 2, dtype=torch.bfloat16)
    options = slopes_for(options, len(lengths), 4, any_path)
    dout, dlse, (dq, dk, dv) = backward(batch, **options)
    for b, (rows, keys) in enumerate(batch.sequences()):
        gradients = tuple(x.unsqueeze(0) for x in (dq[rows], dk[keys], dv[keys]))
        given = (x.unsqueeze(0) for x in (dout[rows], dlse[:, rows]))
        tensors = (x.unsqueeze(0) for x in (batch.q[rows], batch.k[keys], batch.v[keys]))
        check_gradients(gradients, *given, *tensors, **reference_options(options, b))


@pytest.mark.parametrize("lengths", BATCHES, ids=["zeros", "borders", "primes"])
def test_gradient_of_sinks(any_path: torch.device, lengths: list) -> None:
    """The sum of what each sequence alone gives."""
    batch = batch_of(lengths, any_path, 4, 2, dtype=torch.bfloat16)
    sinks = torch.randn(4, device=any_path).requires_grad_()
    dout, dlse, (*_, ds_aux) = backward(batch, causal=True, s_aux=sinks)
    parts = []
    for rows, keys in batch.sequences():
        q, k, v = (x.unsqueeze(0).double() for x in (batch.q[rows], batch.k[keys], batch.v[keys]))
        results = reference.attention(q, k, v, window_right=0, s_aux=sinks)
        given = dout[None, rows].double(), dlse[None, :, rows].double()
        parts.append(torch.autograd.grad(results, sinks, given)[0])
    torch.testing.assert_close(ds_aux, torch.stack(parts).sum(0), rtol=0.02, atol=0.02)


@pytest.mark.parametrize("packed", [True, False], ids=["packed", "a row a sequence"])
def test_gradients_are_zero_where_nothing_is_used(any_path: torch.device, packed: bool) -> None:
    """Behind seqused_k, where garbage lies, and in rows of q that belong to no sequence."""
    batch = batch_of([(20, 30), (7, 0), (40, 25)], any_path, 4, 2)
    dout, _, expected = backward(batch, causal=True)
    room, extra = 45, 6
    k, v = (torch.full((3, room, 2, 64), NAN, device=any_path, dtype=x.dtype) for x in batch[1:3])
    for b, (_, keys) in enumerate(batch.sequences()):
        k[b, : batch.seqlens_k[b]], v[b, : batch.seqlens_k[b]] = batch.k[keys], batch.v[keys]
    q = torch.cat((batch.q, torch.full_like(batch.q[:extra], NAN)))
    leaves = [x.requires_grad_() for x in (q, k, v)]
    keys = (x.flatten(0, 1) for x in leaves[1:]) if packed else leaves[1:]
    cu_seqlens_k = cumulative([room] * 3, any_path) if packed else None
    cu_seqlens_q, _, *longest = batch.lengths
    used = int32(batch.seqlens_k, any_path)
    lengths = cu_seqlens_q, cu_seqlens_k, *longest
    out, lse, _ = flash_attn_varlen_func(
        q, *keys, *lengths, causal=True, seqused_k=used, return_attn_probs=True
    )
    garbage = torch.full_like(out, NAN)
    garbage[:-extra] = torch.randn_like(dout)
    dq, dk, dv = torch.autograd.grad(out, leaves, garbage)
    assert not dq[-extra:].any()

    plain = [x.detach().requires_grad_() for x in batch[:3]]
    out = flash_attn_varlen_func(*plain, *batch.lengths, causal=True)
    expected = torch.autograd.grad(out, plain, garbage[:-extra])
    torch.testing.assert_close(dq[:-extra], expected[0])
    for got, want in ((dk, expected[1]), (dv, expected[2])):
        for b, (_, keys) in enumerate(batch.sequences()):
            torch.testing.assert_close(got[b, : batch.seqlens_k[b]], want[keys])
            assert not got[b, batch.seqlens_k[b] :].any()


def test_gradients_by_finite_differences() -> None:
    batch = batch_of([(3, 4), (0, 2), (4, 2), (1, 0)], CPU, 2, 1, 2, torch.float64)
    slopes = torch.rand(4, 2)

    def attention(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        torch.manual_seed(1)  # the same dropout in each evaluation
        return flash_attn_varlen_func(
            q,
            k,
            v,
            *batch.lengths,
            0.3,
            window_size=(2, 1),
            softcap=1.5,
            alibi_slopes=slopes,
            return_attn_probs=True,
        )[:2]

    leaves = [x.requires_grad_() for x in batch[:3]]
    # A row without keys has lse -inf, of which there is no difference.
    seen = attention(*leaves)[1].isfinite()
    assert torch.autograd.gradcheck(lambda *x: (attention(*x)[0], attention(*x)[1][seen]), leaves)


def test_dropout_is_that_of_the_dense_computation() -> None:
    batch = batch_of([(20, 30)] * 3, CPU, 4, 2, 8, torch.float64)
    slopes = torch.rand(3, 4)
    options = dict(causal=True, alibi_slopes=slopes, return_attn_probs=True)
    torch.manual_seed(5)
    out, lse, S_dmask = flash_attn_varlen_func(*batch[:3], *batch.lengths, 0.4, **options)
    torch.manual_seed(5)
    tensors = (x.unflatten(0, (3, -1)) for x in batch[:3])
    expected, expected_lse, expected_S = flash_attn_func(*tensors, 0.4, **options)
    torch.testing.assert_close(out.unflatten(0, (3, -1)), expected)
    torch.testing.assert_close(lse.unflatten(1, (3, -1)).transpose(0, 1), expected_lse)
    torch.testing.assert_close(S_dmask, expected_S)
    assert torch.equal(S_dmask.signbit(), expected_S.signbit())


def test_probabilities_tell_what_dropout_did() -> None:
    batch = batch_of([(20, 30), (0, 7), (33, 11)], CPU, 4, 2, 8, torch.float64)
    leaves = [x.requires_grad_() for x in batch[:3]]
    out, _, S_dmask = flash_attn_varlen_func(*leaves, *batch.lengths, 0.4, return_attn_probs=True)
    assert S_dmask.shape == (3, 4, 33, 30) and not S_dmask.requires_grad
    dout = torch.randn_like(out)
    expected = []
    for b, (rows, keys) in enumerate(batch.sequences()):
        its_own = S_dmask[b, :, : batch.seqlens_q[b], : batch.seqlens_k[b]]
        assert S_dmask[b].count_nonzero() == its_own.count_nonzero()
        tensors = (x.unsqueeze(0) for x in (batch.q[rows], batch.k[keys], batch.v[keys]))
        expected.append(
            reference.attention(*tensors, dropout_mask=~its_own.signbit()[None], dropout_p=0.4)[0][0]
        )
    expected = torch.cat(expected)
    torch.testing.assert_close(out, expected)
    ours, theirs = (torch.autograd.grad(x, leaves, dout) for x in (out, expected))
    torch.testing.assert_close(ours, theirs)


def test_probabilities_have_room_for_the_longest_keys() -> None:
    """Those of sequences without queries too."""
    batch = batch_of([(0, 3), (1, 2)], CPU, 1, 1, 8)
    S_dmask = flash_attn_varlen_func(*batch[:3], *batch.lengths, 0.4, return_attn_probs=True)[2]
    assert S_dmask.shape == (2, 1, 1, 3)
    nothing = batch_of([(0, 3), (0, 0)], CPU, 1, 1, 8)
    S_dmask = flash_attn_varlen_func(*nothing[:3], *nothing.lengths, 0.4, return_attn_probs=True)[2]
    assert S_dmask.shape == (2, 1, 0, 3)


@pytest.mark.parametrize("options", [{}, {"causal": True}, {"softmax_scale": -0.5}], ids=str)
@pytest.mark.parametrize("lengths", [[(30, 40), (0, 3), (50, 60)], [(1, 300), (1, 20)], [(0, 5)]], ids=str)
def test_rows_of_no_sequence_are_zero(any_path: torch.device, lengths: list, options: dict) -> None:
    """With NaN in them, which would get into the next layer's gradient: 0 · NaN is NaN."""
    batch = batch_of(lengths, any_path, 4, 2)
    q = torch.cat((batch.q, batch.q.new_full((130, 4, 64), NAN))).requires_grad_()
    total = len(batch.q)
    for out in (None, torch.full_like(q, NAN).detach()):
        with torch.set_grad_enabled(out is None):
            results = flash_attn_varlen_func(
                q, *batch[1:3], *batch.lengths, return_attn_probs=True, out=out, **options
            )
        assert (results[0][total:] == 0).all() and (results[1][:, total:] == -torch.inf).all()
        check_batch(results[0], results[1], batch, **options)
    dq = torch.autograd.grad(flash_attn_varlen_func(q, *batch[1:3], *batch.lengths, **options).sum(), q)[0]
    assert not dq[total:].any() and not dq.isnan().any()


def test_packed_is_the_same_computation() -> None:
    qkv, kv = (torch.randn(30, n, 4, 8, requires_grad=True) for n in (3, 2))
    cu_seqlens, q = cumulative([13, 0, 17], CPU), torch.randn(30, 4, 8, requires_grad=True)
    options = dict(causal=True, softcap=2.0, window_size=(3, 0))

    out = flash_attn_varlen_func(*qkv.unbind(1), cu_seqlens, cu_seqlens, 17, 17, **options)
    packed = flash_attn_varlen_qkvpacked_func(qkv, cu_seqlens, 17, **options)
    assert torch.equal(packed, out)
    dout = torch.randn_like(out)
    assert torch.equal(*(torch.autograd.grad(x, qkv, dout)[0] for x in (packed, out)))

    lengths = cu_seqlens, cu_seqlens, 17, 17
    out = flash_attn_varlen_func(q, *kv.unbind(1), *lengths, **options)
    packed = flash_attn_varlen_kvpacked_func(q, kv, *lengths, **options)
    assert torch.equal(packed, out)
    ours, theirs = (torch.autograd.grad(x, (q, kv), dout) for x in (packed, out))
    assert all(map(torch.equal, ours, theirs))
    with pytest.raises(ValueError, match=r"qkv must have shape \(total, 3, heads, head_dim\)"):
        flash_attn_varlen_qkvpacked_func(kv, cu_seqlens, 17)
    with pytest.raises(ValueError, match=r"kv must have shape \(total, 2, heads, head_dim\)"):
        flash_attn_varlen_kvpacked_func(q, qkv, *lengths)


def test_without_gradients_nothing_is_saved() -> None:
    batch = batch_of([(5, 7), (3, 2)], CPU)
    leaves = [x.requires_grad_() for x in batch[:3]]
    with torch.no_grad():
        tensors = [x * 1 for x in leaves]
        out = flash_attn_varlen_func(*tensors, *batch.lengths)
        released = weakref.ref(tensors[0])
        del tensors
    assert out.grad_fn is None and released() is None


def test_lengths_changed_before_the_backward_pass_are_noticed() -> None:
    batch = batch_of([(5, 7), (3, 2)], CPU)
    leaves, lengths = [x.requires_grad_() for x in batch[:3]], batch.lengths
    out = flash_attn_varlen_func(*leaves, *lengths)
    lengths[0][1] = 2
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


@pytest.mark.parametrize("options", WHOLE, ids=str)
def test_repeats_are_bitwise_equal(gpu: torch.device, any_path: torch.device, options: dict) -> None:
    lengths = torch.randint(0, 700, (20, 2)).tolist()
    batch = batch_of(lengths, any_path, 8, 2, 128)
    tensors = *batch[:3], *batch.lengths
    out, lse, _ = flash_attn_varlen_func(*tensors, return_attn_probs=True, **options)
    for _ in range(20):
        again, lse_again, _ = flash_attn_varlen_func(*tensors, return_attn_probs=True, **options)
        assert torch.equal(out, again) and torch.equal(lse, lse_again)


@pytest.mark.parametrize("page_size", [0, 16])
def test_graph_replays_read_the_lengths_anew(
    gpu: torch.device, any_path: torch.device, page_size: int
) -> None:
    """Lengths and block tables changed in place between replays, with more total rows than sequences use."""
    if any_path.type == "cpu":
        pytest.skip("needs a GPU path")
    batches = [
        batch_of(lengths, any_path, 4, 2, 128)
        for lengths in (
            [(100, 300), (1, 64), (0, 0), (50, 20)],
            [(1, 1), (150, 384), (0, 9), (9, 0)],
            [(0, 0), (0, 0), (64, 128), (128, 200)],
        )
    ]
    room_q, room_k = 256, 512
    q = torch.zeros(room_q, 4, 128, dtype=torch.bfloat16, device=any_path)
    cu_seqlens_q, cu_seqlens_k = torch.zeros(2, 5, dtype=torch.int32, device=any_path)
    if page_size:
        k, v = torch.zeros(2, 64, page_size, 2, 128, dtype=q.dtype, device=any_path)
        more = {"block_table": torch.full((4, 40), INT_MAX, dtype=torch.int32, device=any_path)}
    else:
        k, v = torch.zeros(2, room_k, 2, 128, dtype=q.dtype, device=any_path)
        more = {}

    def run() -> tuple[Tensor, Tensor]:
        lengths = cu_seqlens_q, cu_seqlens_k, 200, 400
        return flash_attn_varlen_func(q, k, v, *lengths, causal=True, return_attn_probs=True, **more)[:2]

    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, lse = run()
    for batch in batches:
        q[: len(batch.q)] = batch.q
        cu_seqlens_q.copy_(batch.lengths[0])
        cu_seqlens_k.copy_(batch.lengths[1])
        if page_size:
            pools, table = paged(batch, page_size, batch.k, batch.v)
            more["block_table"].fill_(INT_MAX)[:, : table.shape[1]] = table
            for x, pool in zip((k, v), pools, strict=True):
                x.fill_(NAN)[: len(pool)] = pool
        else:
            for x, keys in zip((k, v), batch[1:3], strict=True):
                x.fill_(NAN)[: len(keys)] = keys
        out.fill_(NAN)
        torch.cuda.synchronize()
        allocated = torch.cuda.memory_stats()["allocation.all.allocated"]
        graph.replay()
        torch.cuda.synchronize()
        assert torch.cuda.memory_stats()["allocation.all.allocated"] == allocated
        check_batch(out, lse, batch, causal=True)


def test_no_synchronisation_and_one_kernel_for_all_lengths(
    gpu: torch.device, any_path: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    if any_path.type == "cpu":
        pytest.skip("needs a GPU path")
    batches = [batch_of(lengths, any_path) for lengths in BATCHES]
    arguments = [(*batch[:3], *batch.lengths) for batch in batches]
    flash_attn_varlen_func(*arguments[0], causal=True)

    def load(config: Any) -> None:
        raise AssertionError(f"a kernel of its own for other lengths: {config}")

    monkeypatch.setattr(compile, "_load", load)
    torch.cuda.set_sync_debug_mode("error")
    try:
        results = [flash_attn_varlen_func(*each, causal=True, return_attn_probs=True) for each in arguments]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for batch, (out, lse, _) in zip(batches, results, strict=True):
        check_batch(out, lse, batch, causal=True)
