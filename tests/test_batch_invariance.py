"""num_splits=1: what a sequence becomes does not depend, bit for bit, on what else is in the batch."""

import itertools
from collections.abc import Iterator
from random import Random
from typing import Any

import pytest
import torch
from torch import Tensor

from mini_flash_attention import backend, flash_attn_varlen_func, flash_attn_with_kvcache
from mini_flash_attention.gpu import compile, plans

HEADS, DTYPES = ((4, 4), (6, 2), (8, 1)), {"cpu": torch.float32, "cuda": torch.bfloat16}


def random_options(random: Random) -> dict[str, Any]:
    windows = ((-1, -1), (-1, -1), (20, 0), (5, 90), (1000, 1000))
    options = dict(causal=random.random() < 0.5, window_size=random.choice(windows))
    options["softcap"] = random.choice((0.0, 0.0, 5.0))
    return options | dict(num_splits=1)


def starts(lengths: list[int], device: torch.device) -> Tensor:
    return torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32, device=device)


def spans(lengths: list[int]) -> Iterator[slice]:
    ends = list(itertools.accumulate(lengths))
    return (slice(end - n, end) for n, end in zip(lengths, ends, strict=True))


def values(random: Random, device: torch.device, *sizes: int) -> Tensor:
    """Of very different sizes, so that maxima grow late, in some sequences and not in others."""
    rows = torch.tensor([10 ** random.uniform(-1, 1) for _ in range(sizes[0])])
    return (rows.view(-1, *(1,) * (len(sizes) - 1)) * torch.randn(sizes)).to(device, DTYPES[device.type])


def lengths_of(random: Random) -> tuple[list[int], list[int]]:
    """Prompts, chunks of prompts and single queries in one batch."""
    count = random.randint(2, 5)
    queries = [
        random.choice((0, 1, 1, 3, random.randint(2, 90), random.randint(100, 400))) for _ in range(count)
    ]
    return queries, [random.choice((n, n + random.randint(0, 300), random.randint(0, 700))) for n in queries]


def paged(random: Random, x: Tensor, lengths: list[int], size: int) -> tuple[Tensor, Tensor]:
    """Packed keys in pages of any order, and the table, wider than the longest sequence needs."""
    counts = [-(-n // size) for n in lengths]
    order = random.sample(range(sum(counts) + 3), sum(counts) + 3)
    pages = x.new_full((len(order), size, *x.shape[1:]), float("nan"))
    table = torch.zeros(len(lengths), max(counts) + random.randint(0, 9), dtype=torch.int32, device=x.device)
    for row, (span, count) in enumerate(zip(spans(lengths), counts, strict=True)):
        for i in range(count):
            page, part = order.pop(), x[span][i * size : (i + 1) * size]
            table[row, i], pages[page, : len(part)] = page, part
    return pages, table


def assert_as_alone(device: torch.device, seed: int, pages: bool) -> None:
    random = Random(seed)
    torch.manual_seed(seed)
    queries, keys = lengths_of(random)
    (heads, heads_k), head_dim = random.choice(HEADS), random.choice((32, 64, 128))
    q = values(random, device, sum(queries), heads, head_dim)
    k, v = (values(random, device, sum(keys), heads_k, head_dim) for _ in range(2))
    options, size = random_options(random) | dict(return_attn_probs=True), random.choice((16, 24, 128))

    def attend(q: Tensor, k: Tensor, v: Tensor, queries: list[int], keys: list[int]) -> tuple[Tensor, Tensor]:
        lengths = starts(queries, device), starts(keys, device), max(queries), max(keys)
        if not pages:
            return flash_attn_varlen_func(q, k, v, *lengths, **options)[:2]
        (k, table), (v, _) = (paged(Random(seed), x, keys, size) for x in (k, v))
        return flash_attn_varlen_func(q, k, v, *lengths, block_table=table, **options)[:2]

    if random.random() < 0.3:
        options["s_aux"] = 3 * torch.randn(heads, device=device)
    if random.random() < 0.3:
        options["alibi_slopes"] = torch.rand(heads, device=device)
    out, lse = attend(q, k, v, queries, keys)
    for b, (rows, its) in enumerate(zip(spans(queries), spans(keys), strict=True)):
        alone = attend(q[rows], k[its], v[its], [queries[b]], [keys[b]])
        assert torch.equal(out[rows], alone[0]) and torch.equal(lse[:, rows], alone[1]), (seed, b, options)


@pytest.mark.parametrize("pages", [False, True])
def test_packed_sequences(any_path: torch.device, pages: bool) -> None:
    for seed in range(10):
        assert_as_alone(any_path, seed, pages)


@pytest.mark.full
@pytest.mark.timeout(600)
@pytest.mark.parametrize("pages", [False, True])
def test_a_hundred_batches(any_path: torch.device, pages: bool) -> None:
    for seed in range(10, 110):
        assert_as_alone(any_path, seed, pages)


@pytest.mark.parametrize("seqlen_q", [1, 3, 40])
def test_caches(any_path: torch.device, seqlen_q: int) -> None:
    """Of more capacity in the batch than alone."""
    for seed in range(5):
        random = Random(seed)
        torch.manual_seed(seed)
        lengths = [random.randint(seqlen_q, 900) for _ in range(random.randint(2, 6))]
        (heads, heads_k), capacity = random.choice(HEADS), max(lengths) + random.randint(0, 500)
        q = values(random, any_path, len(lengths), seqlen_q, heads, 64)
        k, v = (values(random, any_path, len(lengths), capacity, heads_k, 64) for _ in range(2))
        options = random_options(random) | dict(return_softmax_lse=True)
        used = torch.tensor(lengths, dtype=torch.int32, device=any_path)
        out, lse = flash_attn_with_kvcache(q, k, v, cache_seqlens=used, **options)
        for b, n in enumerate(lengths):
            one = slice(b, b + 1)
            its = k[one, :n].contiguous(), v[one, :n].contiguous()
            alone = flash_attn_with_kvcache(q[one], *its, cache_seqlens=used[one], **options)
            assert torch.equal(out[one], alone[0]) and torch.equal(lse[one], alone[1]), (seed, b, options)


def test_compiled_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """The number of splits reaches the backend through the operators."""
    q, k = torch.randn(9, 4, 16), torch.randn(9, 2, 16)
    where = starts([4, 5], q.device), starts([4, 5], q.device), 5, 5
    problems, forward = [], backend.forward
    monkeypatch.setattr(backend, "forward", lambda *call: problems.append(call[0]) or forward(*call))

    @torch.compile(fullgraph=True, backend="aot_eager")
    def function(q: Tensor, num_splits: int) -> Tensor:
        return flash_attn_varlen_func(q, k, k, *where, causal=True, num_splits=num_splits)

    for num_splits in (1, 7):
        assert function(q, num_splits).equal(flash_attn_varlen_func(q, k, k, *where, causal=True))
        assert problems[0].num_splits == num_splits
        problems.clear()


class Chosen(Exception):
    """Instead of a launch: what would run."""


@pytest.fixture(params=["sm80", "sm90"])
def chosen(request: pytest.FixtureRequest, pretended_gpu: None, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(backend, "choose", lambda device, forced: request.param)
    monkeypatch.setattr(compile, "get", lambda row: row)
    monkeypatch.setattr(plans, "sms", lambda problem: 132)

    def kernel(call: Any, *arguments: Any, **options: Any) -> Any:
        """The kernel with its tiles and its mask, and the number of splits."""

        def stop(plan: Any, problem: Any, x: Any, ragged: Any, *_: Any) -> None:
            tiles = plan.launch
            if tiles.kernel.startswith("forward"):  # as the kernel's launch chooses them
                tiles = tiles.at(ragged.longest)
            raise Chosen(tiles, getattr(plan, "num_splits", None))

        monkeypatch.setattr(backend.run, "attend", stop)
        with pytest.raises(Chosen) as raised:
            call(*arguments, **options)
        return raised.value.args

    return kernel


BATCHES = [
    ([1], [5]),
    ([1] * 80, [4000] * 80),
    ([1, 900], [4000, 900]),
    ([3000] * 9, [3000] * 9),
    ([70], [9000]),
]


@pytest.mark.parametrize("heads", [(32, 32), (32, 8)])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_the_kernel_is_the_same(chosen: Any, head_dim: int, heads: tuple[int, int]) -> None:
    """Whatever the batch; and not so where the number of splits is left open."""
    meta, options = torch.device("meta"), dict(dtype=torch.bfloat16, device="meta")

    def packed(queries: list[int], keys: list[int], **more: Any) -> Any:
        q = torch.empty(sum(queries), heads[0], head_dim, **options)
        k = torch.empty(sum(keys), heads[1], head_dim, **options)
        lengths = (torch.empty(len(queries) + 1, dtype=torch.int32, device=meta) for _ in range(2))
        return chosen(flash_attn_varlen_func, q, k, k, *lengths, max(queries), max(keys), **more)

    def cached(batch: int, capacity: int, seqlen_q: int, **more: Any) -> Any:
        q = torch.empty(batch, seqlen_q, heads[0], head_dim, **options)
        k = torch.empty(batch, capacity, heads[1], head_dim, **options)
        return chosen(flash_attn_with_kvcache, q, k, k, cache_seqlens=q.new_empty(batch).int(), **more)

    for mask in (dict(), dict(causal=True), dict(window_size=(2000, 0)), dict(window_size=(5, 5))):
        assert len({packed(*batch, num_splits=1, **mask) for batch in BATCHES}) == 1
        assert len({packed(*batch, **mask) for batch in BATCHES}) > 1
        for seqlen_q in (1, 2, 20, 300):
            sizes = itertools.product((1, 3, 200), (300, 5000, 100_000))
            kernels = {cached(*size, seqlen_q, num_splits=1, **mask) for size in sizes}
            assert len(kernels) == 1
    assert len({cached(batch, 5000, 1) for batch in (1, 3, 200)}) > 1
