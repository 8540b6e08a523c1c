"""flash_attn_with_kvcache on each path: attention against the oracle, and what becomes of the cache."""

import itertools
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from error_rule import check_forward, reference_options
from torch import Tensor

from mini_flash_attention import backend, flash_attn_with_kvcache, kv_append
from mini_flash_attention.gpu import compile, inputs, memory, run
from mini_flash_attention.problem import cache as problem_of_cache

INT_MAX = 2**31 - 1
NAN = float("nan")

PAGE_SIZES = [0, 1, 16, 48, 64, 256]  # 0: not paged
SPLITS = [0, 1, 2, 3, 8, 128]
SEQLENS_Q = [1, 2, 5, 17, 70, 130]
HEADS = [(2, 2), (4, 2), (3, 1), (8, 2), (8, 1), (16, 1)]
HEAD_DIMS = [64, 128, 256, 40, 72, 96]
DTYPES = [torch.bfloat16, torch.float16]
OPTIONS = [
    {"causal": True},
    {},
    {"window_size": (100, 0)},
    {"window_size": (30, 20), "softcap": 5.0},
    {"softcap": 10.0, "causal": True},
    {"alibi": "heads"},
    {"alibi": "batch", "causal": True},
    {"softmax_scale": 0.3, "window_size": (300, -1)},
    {"sinks": True},
    {"sinks": True, "alibi": "heads", "softcap": 5.0, "window_size": (30, 20)},
]
LENGTHS = [0, 1, 255, 256, 300, 831]  # of the keys in the cache, new ones not included


class Cache:
    """k and v, (rows, capacity, heads_k, head_dim), and how the function is given them.

    Paged, the pages are shuffled, entries behind the first `ends[row]` tokens are INT_MAX, and pages
    that no entry names are NaN.
    """

    def __init__(
        self,
        k: Tensor,
        v: Tensor,
        page_size: int = 0,
        ends: list[int] | None = None,
    ) -> None:
        self.page_size, self.block_table = page_size, None
        self.k, self.v = k.clone(), v.clone()
        if not page_size:
            return
        rows, capacity = k.shape[:2]
        ends = [capacity] * rows if ends is None else ends
        max_pages = -(-capacity // page_size)
        counts = [-(-end // page_size) for end in ends]
        numbers = (torch.randperm(sum(counts) + 3) + 1).tolist()  # page 0 and some others stay unused
        table = [[numbers.pop() for _ in range(n)] + [INT_MAX] * (max_pages - n) for n in counts]
        self.block_table = torch.tensor(table, dtype=torch.int32, device=k.device).view(rows, max_pages)
        self.k, self.v = (torch.full((sum(counts) + 4, page_size, *k.shape[2:]), NAN).to(k) for _ in "kv")
        self.counts, self.table = counts, table
        for pool, x in ((self.k, k), (self.v, v)):
            for row in range(rows):
                tokens, places = self.places(row, capacity)
                pool[places] = x[row, tokens]

    def places(self, row: int, capacity: int) -> tuple[list[int], tuple[list[int], list[int]]]:
        """The tokens of a row that have a page, and where they are: pages and rows of these."""
        tokens = list(range(min(capacity, self.counts[row] * self.page_size)))
        pages = [self.table[row][token // self.page_size] for token in tokens]
        return tokens, (pages, [token % self.page_size for token in tokens])

    def read(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """k and v, (rows, capacity, heads_k, head_dim), NaN where there is no page."""
        if not self.page_size:
            return self.k.clone(), self.v.clone()
        found = torch.full_like(like, NAN), torch.full_like(like, NAN)
        for pool, x in zip((self.k, self.v), found, strict=True):
            for row in range(len(x)):
                tokens, places = self.places(row, x.shape[1])
                x[row, tokens] = pool[places]
        return found


def bits(x: Tensor) -> Tensor:
    """For a comparison in which NaN is equal to NaN."""
    return x.contiguous().view({2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()])


def int32(values: list[int], device: torch.device) -> Tensor:
    return torch.tensor(values, dtype=torch.int32, device=device)


def rotary_tables(seqlen: int, rotary_dim: int, dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    """cos and sin of random quarter turns: whoever rotates, and in whichever precision, is exact."""
    quarters = torch.randint(0, 4, (seqlen, rotary_dim // 2), device=device)
    return [
        torch.tensor(values, device=device)[quarters].to(dtype) for values in ([1, 0, -1, 0], [0, 1, 0, -1])
    ]


def rotated(x: Tensor, cos: Tensor, sin: Tensor, first: int, step: int, interleaved: bool) -> Tensor:
    """x (seqlen, heads, head_dim), token i at position first + i * step."""
    half, out = cos.shape[1], x.clone()
    one = list(range(0, 2 * half, 2)) if interleaved else list(range(half))
    two = [i + (1 if interleaved else half) for i in one]
    for token in range(len(x)):
        c, s = cos[first + token * step], sin[first + token * step]
        out[token][:, one] = x[token][:, one] * c - x[token][:, two] * s
        out[token][:, two] = x[token][:, one] * s + x[token][:, two] * c
    return out


def check(
    device: torch.device,
    *,
    lengths: list[int] = LENGTHS,
    capacity: int = 1024,
    page_size: int = 0,
    seqlen_q: int = 1,
    seqlen_new: int | None = None,
    heads: tuple[int, int] = (4, 2),
    head_dim: int = 64,
    dtype: torch.dtype = torch.bfloat16,
    rotary_dim: int = 0,
    interleaved: bool = True,
    leftpad: list[int] | None = None,
    batch_idx: list[int] | None = None,
    num_splits: int = 0,
    int_length: bool = False,
    **options: Any,
) -> None:
    """One call: out and lse of each sequence by the error rule, and every element of the cache."""
    batch, rows = len(lengths), max(batch_idx or [len(lengths) - 1]) + 1
    storage = range(batch) if batch_idx is None else batch_idx
    ends = [length + (seqlen_new or 0) for length in lengths]
    assert max(ends) <= capacity
    pads = leftpad or [0] * batch
    q = torch.randn(batch, seqlen_q, heads[0], head_dim, device=device).to(dtype)
    k, v = (torch.randn(rows, capacity, heads[1], head_dim, device=device).to(dtype) for _ in "kv")
    new = []
    if seqlen_new is not None:
        new = [torch.randn(batch, seqlen_new, heads[1], head_dim, device=device).to(dtype) for _ in "kv"]
    used = [0] * rows
    for b, row in enumerate(storage):
        used[row] = ends[b]
        for x in (k, v):
            x[row, lengths[b] :] = NAN
            x[row, : pads[b]] = NAN
    cache = Cache(k, v, page_size, used)
    before = cache.read(k)
    outside = bits(cache.k).clone(), bits(cache.v).clone()

    if kind := options.pop("alibi", None):
        shape = (heads[0],) if kind == "heads" else (batch, heads[0])
        options["alibi_slopes"] = torch.rand(shape, device=device) * 0.1
    if options.pop("sinks", False):
        options["s_aux"] = 2 * torch.randn(heads[0], device=device)
    arguments: dict[str, Any] = dict(zip("kv", new, strict=False))
    tables: list[Tensor] = []
    if rotary_dim:
        tables = rotary_tables(capacity, rotary_dim, dtype, device)
        arguments |= dict(zip(("rotary_cos", "rotary_sin"), tables, strict=True))
        arguments["rotary_interleaved"] = interleaved
    out, lse = flash_attn_with_kvcache(
        q,
        cache.k,
        cache.v,
        **arguments,
        cache_seqlens=lengths[0] if int_length else int32(lengths, device),
        cache_batch_idx=None if batch_idx is None else int32(batch_idx, device),
        cache_leftpad=None if leftpad is None else int32(leftpad, device),
        block_table=cache.block_table,
        num_splits=num_splits,
        return_softmax_lse=True,
        **options,
    )

    left, right = options.get("window_size", (-1, -1))
    right = 0 if options.get("causal") else right
    step = int(left >= 0 or right >= 0)  # without a window all queries are at one position
    expected = [x.clone() for x in before]
    for b, row in enumerate(storage):
        places = slice(lengths[b], ends[b])
        for x, added in zip(expected, new, strict=False):
            x[row, places] = added[b]
        if rotary_dim:
            expected[0][row, places] = rotated(new[0][b], *tables, lengths[b], 1, interleaved)
            q[b] = rotated(q[b], *tables, lengths[b], step, interleaved)
    after = cache.read(k)
    for got, want in zip(after, expected, strict=True):
        # + 0: a rotation by a quarter may leave -0
        assert torch.equal(bits(got + 0), bits(want + 0))
    if page_size:
        check_other_pages(cache, storage, lengths, ends, outside)

    for b, row in enumerate(storage):
        keys, values = (x[row : row + 1, pads[b] : ends[b]] for x in after)
        tensors = (out[b : b + 1], lse[b : b + 1], q[b : b + 1], keys, values)
        check_forward(*tensors, **reference_options(options, b))


def check_other_pages(
    cache: Cache, storage: Any, lengths: list[int], ends: list[int], outside: tuple[Tensor, Tensor]
) -> None:
    """Nothing but the appended tokens changed in the whole pool, unused pages and rows included."""
    untouched = torch.ones(cache.k.shape[:2], dtype=torch.bool)
    for b, row in enumerate(storage):
        for token in range(lengths[b], ends[b]):
            untouched[cache.table[row][token // cache.page_size], token % cache.page_size] = False
    for x, old in zip((cache.k, cache.v), outside, strict=True):
        assert torch.equal(bits(x)[untouched.to(x.device)], old[untouched.to(x.device)])


@pytest.mark.parametrize(
    ("i", "page_size", "num_splits"),
    [(i, *pair) for i, pair in enumerate(itertools.product(PAGE_SIZES, SPLITS))],
    ids=str,
)
def test_pages_splits_groups_and_queries(
    any_path: torch.device, i: int, page_size: int, num_splits: int
) -> None:
    """Each page size with each number of splits; the rest takes turns, so that each meets each."""
    row, column = divmod(i, 6)
    check(
        any_path,
        page_size=page_size,
        num_splits=num_splits,
        seqlen_q=SEQLENS_Q[(row + column) % 6],
        heads=HEADS[(2 * row + column) % 6],
        head_dim=HEAD_DIMS[(row + 5 * column) % 6],
        dtype=DTYPES[i % 2],
        **OPTIONS[(i + row) % 8],
    )


@pytest.mark.parametrize("heads", HEADS, ids=str)
@pytest.mark.parametrize("seqlen_q", SEQLENS_Q)
def test_queries_and_groups(any_path: torch.device, seqlen_q: int, heads: tuple[int, int]) -> None:
    lengths = [0, 3, 129, 300]
    page_size = PAGE_SIZES[(seqlen_q + heads[0]) % 6]
    for options in ({"causal": True}, {"window_size": (40, 3)}):
        check(
            any_path,
            lengths=lengths,
            capacity=304,
            seqlen_q=seqlen_q,
            heads=heads,
            page_size=page_size,
            **options,
        )


@pytest.mark.parametrize("num_splits", [0, 2, 16, 50])
def test_few_keys_in_a_large_cache(any_path: torch.device, num_splits: int) -> None:
    """Splits without keys, tiles that only one split has a part of, or none."""
    sizes = {"lengths": [0, 1, 130, 700], "capacity": 4000, "num_splits": num_splits}
    for seqlen_q, heads in ((1, (8, 2)), (1, (8, 1)), (2, (4, 1)), (5, (8, 2))):
        check(any_path, seqlen_q=seqlen_q, heads=heads, head_dim=128, causal=True, **sizes)
    check(any_path, seqlen_q=2, heads=(2, 2), head_dim=64, window_size=(100, 0), page_size=16, **sizes)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("seqlen_q", [1, 5])
def test_options(any_path: torch.device, seqlen_q: int, options: dict) -> None:
    for page_size, dtype in ((0, torch.float16), (16, torch.bfloat16)):
        check(any_path, page_size=page_size, seqlen_q=seqlen_q, dtype=dtype, heads=(8, 2), **options)


@pytest.mark.parametrize("page_size", [0, 16])
@pytest.mark.parametrize("num_splits", [1, 4, 20])  # 4: the decode kernel merges them, 20: combine
@pytest.mark.parametrize("seqlen_q", [1, 5, 70])
def test_sinks_count_once(any_path: torch.device, seqlen_q: int, num_splits: int, page_size: int) -> None:
    """However the keys are split. Some rows see nothing, some sinks are far above or below all scores."""
    sinks = torch.tensor([1.0, -1e4, -torch.inf, 50.0, 15.0, 0.0, -3.0, 3.0], device=any_path)
    for dtype in DTYPES:
        options = dict(num_splits=num_splits, page_size=page_size, dtype=dtype, heads=(8, 2))
        check(any_path, seqlen_q=seqlen_q, seqlen_new=seqlen_q, causal=True, s_aux=sinks, **options)
        check(any_path, seqlen_q=seqlen_q, s_aux=sinks, causal=True, **options)  # some rows see nothing


@pytest.mark.parametrize("head_dim", [8, 40, 59, 72, 111, 136, 192, 256])
def test_head_dims(any_path: torch.device, head_dim: int) -> None:
    for page_size, seqlen_q in ((0, 1), (48, 3)):
        check(
            any_path,
            head_dim=head_dim,
            page_size=page_size,
            seqlen_q=seqlen_q,
            seqlen_new=seqlen_q,
            causal=True,
            num_splits=4,
            rotary_dim=head_dim // 16 * 16,
            lengths=[0, 50, 289],
            capacity=300,
        )


@pytest.mark.parametrize("page_size", PAGE_SIZES)
@pytest.mark.parametrize("seqlen_new", [0, 1, 2, 5, 17, 130])
def test_append(any_path: torch.device, seqlen_new: int, page_size: int) -> None:
    """From before, at and behind page borders, up to the last token of the capacity."""
    size = max(page_size, 16)
    lengths = [0, 1, size - 1, size, size + 1, 3 * size - 1, 600 - seqlen_new]
    head_dim = HEAD_DIMS[PAGE_SIZES.index(page_size)]
    check(
        any_path,
        lengths=[min(length, 600 - seqlen_new) for length in lengths],
        capacity=600,
        page_size=page_size,
        seqlen_new=seqlen_new,
        seqlen_q=max(1, seqlen_new),
        head_dim=head_dim,
        dtype=DTYPES[seqlen_new % 2],
        causal=True,
    )


def test_queries_need_not_be_as_many_as_new_keys(any_path: torch.device) -> None:
    for seqlen_q, seqlen_new in ((1, 5), (7, 2), (3, 0)):
        check(any_path, seqlen_q=seqlen_q, seqlen_new=seqlen_new, page_size=16, causal=True)


@pytest.mark.parametrize("options", [{}, {"causal": True}, {"window_size": (50, -1)}], ids=str)
@pytest.mark.parametrize("interleaved", [True, False])
@pytest.mark.parametrize(("head_dim", "rotary_dim"), [(64, 16), (64, 64), (128, 96), (40, 32), (256, 256)])
def test_rotary(
    any_path: torch.device, head_dim: int, rotary_dim: int, interleaved: bool, options: dict
) -> None:
    for page_size, tokens in ((0, 1), (16, 3)):
        check(
            any_path,
            lengths=[0, 15, 200],
            capacity=224,
            page_size=page_size,
            seqlen_q=tokens,
            seqlen_new=tokens,
            head_dim=head_dim,
            rotary_dim=rotary_dim,
            interleaved=interleaved,
            **options,
        )


@pytest.mark.parametrize("interleaved", [True, False])
def test_rotary_by_any_angle(any_path: torch.device, interleaved: bool) -> None:
    """What is written is right to a rounding of its dtype."""
    device, seqlen, dtype = any_path, 50, torch.float16
    q, k, v = (torch.randn(2, 5, 2, 64, device=device).to(dtype) for _ in range(3))
    angles = torch.rand(seqlen, 16, device=device) * 6.28
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    k_cache, v_cache = (torch.zeros(2, seqlen, 2, 64, device=device, dtype=dtype) for _ in "kv")
    lengths = int32([3, 45], device)
    out = flash_attn_with_kvcache(
        q, k_cache, v_cache, k, v, cos, sin, lengths, causal=True, rotary_interleaved=interleaved
    )
    for b, length in enumerate(lengths.tolist()):
        wide = (x.double() for x in (k[b], cos, sin))
        expected = rotated(*wide, length, 1, interleaved)
        torch.testing.assert_close(k_cache[b, length : length + 5].double(), expected, rtol=1e-3, atol=2e-3)
        wide = (x.double() for x in (q[b], cos, sin))
        turned = rotated(*wide, length, 1, interleaved).to(dtype)
        tensors = turned, k_cache[b, : length + 5], v_cache[b, : length + 5]
        expected = torch.nn.functional.scaled_dot_product_attention(
            *(x.float().transpose(0, 1) for x in tensors),
            attn_mask=torch.ones(5, length + 5, dtype=torch.bool, device=device).tril(length),
        )
        torch.testing.assert_close(out[b].float(), expected.transpose(0, 1), rtol=5e-3, atol=5e-3)


def test_a_window_that_hides_nothing_still_spreads_the_queries(any_path: torch.device) -> None:
    """Rotary positions depend on the arguments of the call, not on the capacity of the cache."""
    for window_size in ((5000, -1), (-1, 5000), (5000, 5000)):
        check(
            any_path,
            lengths=[10, 30],
            capacity=40,
            seqlen_q=3,
            seqlen_new=3,
            rotary_dim=32,
            window_size=window_size,
        )


@pytest.mark.parametrize("page_size", [0, 16, 64])
@pytest.mark.parametrize("options", [{"causal": True}, {"window_size": (60, 0)}, {"alibi": "heads"}], ids=str)
def test_left_padding_and_batch_index(any_path: torch.device, options: dict, page_size: int) -> None:
    leftpad, batch_idx = [0, 1, 70, 255, 17], [5, 0, 2, 6, 1]
    lengths = [0, 40, 300, 256, 17]
    for seqlen_new, rotary_dim in ((None, 0), (3, 32)):
        for given in ({"leftpad": leftpad}, {"batch_idx": batch_idx}):
            both = given | {"leftpad": leftpad}
            for arguments in (given, both):
                check(
                    any_path,
                    lengths=lengths,
                    capacity=320,
                    page_size=page_size,
                    seqlen_q=3,
                    seqlen_new=seqlen_new,
                    rotary_dim=rotary_dim,
                    **arguments,
                    **options,
                )


@pytest.mark.parametrize("page_size", [0, 16])
def test_lengths_as_an_int(any_path: torch.device, page_size: int) -> None:
    for length in (0, 100, 199):
        check(
            any_path,
            lengths=[length] * 3,
            capacity=200,
            page_size=page_size,
            int_length=True,
            seqlen_new=1,
            causal=True,
        )


def test_the_whole_cache(any_path: torch.device) -> None:
    q = torch.randn(2, 3, 4, 64, device=any_path, dtype=torch.float16)
    k, v = torch.randn(2, 3, 100, 2, 64, device=any_path, dtype=torch.float16)
    out, lse = flash_attn_with_kvcache(q, k, v, causal=True, return_softmax_lse=True)  # rows 0 and 1
    check_forward(out, lse, q, k[:2], v[:2], window_right=0)
    assert torch.equal(flash_attn_with_kvcache(q, k, v, causal=True), out)
    assert torch.equal(flash_attn_with_kvcache(q, k, v, cache_seqlens=100, causal=True), out)


def test_caches_of_any_strides(any_path: torch.device) -> None:
    q = torch.randn(2, 1, 4, 64, device=any_path, dtype=torch.float16)
    k, v, new_k, new_v = (
        torch.randn(2, n, 2, 64, device=any_path, dtype=torch.float16) for n in (90, 90, 1, 1)
    )
    lengths = int32([5, 89], any_path)
    plain = k.clone(), v.clone()
    expected = flash_attn_with_kvcache(q, *plain, new_k, new_v, cache_seqlens=lengths)
    one_tensor = torch.stack((k, v), dim=3).unbind(3)
    heads_first = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (k, v)]
    wide = [torch.full((2, 90, 2, 77), NAN).to(x)[..., 3:67].copy_(x) for x in (k, v)]
    for cache in (one_tensor, heads_first, wide):
        out = flash_attn_with_kvcache(q, *cache, new_k, new_v, cache_seqlens=lengths)
        torch.testing.assert_close(out, expected)
        assert torch.equal(cache[0], plain[0]) and torch.equal(cache[1], plain[1])
    for shifted in (q, new_k, new_v):
        copies = [torch.empty(x.numel() + 1).to(x)[1:].view_as(x).copy_(x) for x in (q, new_k, new_v)]
        copies = [there if x is shifted else x for x, there in zip((q, new_k, new_v), copies, strict=True)]
        cache = k.clone(), v.clone()
        out = flash_attn_with_kvcache(copies[0], *cache, *copies[1:], cache_seqlens=lengths)
        torch.testing.assert_close(out, expected)
        assert torch.equal(cache[0], plain[0]) and torch.equal(cache[1], plain[1])


@pytest.mark.parametrize("num_splits", [1, 4, 20])  # 4: the decode kernel merges them, 20: combine
def test_nan_goes_through_the_splits(any_path: torch.device, num_splits: int) -> None:
    q = torch.randn(1, 1, 8, 128, device=any_path, dtype=torch.float16)
    k, v = torch.randn(2, 1, 3000, 2, 128, device=any_path, dtype=torch.float16)
    k[0, 700, 0] = NAN
    out, lse = flash_attn_with_kvcache(q, k, v, num_splits=num_splits, return_softmax_lse=True)
    assert out[:, :, :4].isnan().all() and lse[:, :4].isnan().all()
    assert not out[:, :, 4:].isnan().any() and not lse[:, 4:].isnan().any()


@pytest.mark.parametrize("paged", [False, True])
def test_what_has_no_place_is_not_written(
    any_path: torch.device, paged: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tokens beyond the capacity, before it, in pages and rows that do not exist; the append alone."""
    monkeypatch.setenv("MINI_FLASH_ATTENTION_CHECK", "0")  # on the CPU they would be refused
    device = any_path
    k, v = torch.randn(2, 4, 32, 2, 64, device=device, dtype=torch.float16)
    cache = Cache(k, v, 16 if paged else 0)
    if paged:
        cache.block_table[0, 1] = INT_MAX
        cache.block_table[1, 1] = -1
    lengths, batch_idx = int32([30, 14, -2, 20], device), int32([3, 0, 1, 4], device)
    q, new_k, new_v = (torch.randn(4, 5, 2, 64, device=device, dtype=torch.float16) for _ in range(3))
    before = cache.k.clone(), cache.v.clone()
    new, places = (new_k, new_v, None, None, True), (lengths, batch_idx, None, cache.block_table)
    options = (0.0, None, False, (-1, -1), 0.0, None, False, None)
    problem, x, update = problem_of_cache(q, cache.k, cache.v, new, places, options, 0)
    if device.type == "cpu":
        kv_append.append(problem, x, update)
    else:
        plan, ragged = backend.append_plan(problem, 5, "none"), inputs.ragged(problem, x.layout, 5)
        assert run.append(plan, problem, x, update, ragged) is x  # by the kernel
    places = [(3, 30, 0, 0), (3, 31, 0, 1), (0, 14, 1, 0), (0, 15, 1, 1)]  # row, token, sequence, new token
    places += [(1, 0, 2, 2), (1, 1, 2, 3), (1, 2, 2, 4)]
    places += [] if paged else [(0, 16, 1, 2), (0, 17, 1, 3), (0, 18, 1, 4)]
    for x, new in zip(before, (new_k, new_v), strict=True):
        for row, token, b, i in places:
            block = cache.table[row][token // 16] if paged else row
            x[block, token % 16 if paged else token] = new[b, i]
    assert torch.equal(bits(cache.k), bits(before[0])) and torch.equal(bits(cache.v), bits(before[1]))


def test_no_token_has_a_place(any_path: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MINI_FLASH_ATTENTION_CHECK", "0")
    q, k, v = (torch.randn(2, 3, 2, 64, device=any_path, dtype=torch.float16) for _ in range(3))
    k_cache, v_cache = torch.randn(2, 2, 8, 2, 64, device=any_path, dtype=torch.float16)
    before = k_cache.clone(), v_cache.clone()
    flash_attn_with_kvcache(q, k_cache, v_cache, k, v, cache_seqlens=int32([8, INT_MAX - 8], any_path))
    assert torch.equal(k_cache, before[0]) and torch.equal(v_cache, before[1])


def test_empty_inputs(any_path: torch.device) -> None:
    q, k = (torch.randn(2, n, 2, 64, device=any_path, dtype=torch.float16) for n in (3, 8))
    lengths = int32([8, 5], any_path)
    out, lse = flash_attn_with_kvcache(
        q, k[:, :0], k[:, :0], cache_seqlens=int32([0, 0], any_path), return_softmax_lse=True
    )
    assert not out.any() and (lse == -torch.inf).all()
    sinks = torch.randn(2, device=any_path)
    out, lse = flash_attn_with_kvcache(q, k[:, :0], k[:, :0], return_softmax_lse=True, s_aux=sinks)
    assert not out.any() and torch.equal(lse, sinks[:, None].expand_as(lse))
    assert flash_attn_with_kvcache(q[:0], k[:0], k[:0], cache_seqlens=lengths[:0]).shape == (0, 3, 2, 64)
    assert flash_attn_with_kvcache(q[:, :0], k, k, cache_seqlens=lengths).shape == (2, 0, 2, 64)
    new = torch.randn_like(q)[:, :2]
    flash_attn_with_kvcache(q[:, :0], k, k.clone(), new, new, cache_seqlens=int32([0, 5], any_path))
    assert torch.equal(k[1, 5:7], new[1])


@pytest.mark.parametrize("page_size", [0, 16])
def test_step_by_step_is_all_at_once(any_path: torch.device, page_size: int) -> None:
    """A prompt, then one token after the other, with rotary embedding: the rows of causal attention."""
    device, dtype, steps, prompts = any_path, torch.float16, 20, [7, 1]
    q, k, v = (torch.randn(2, 40, 2, 64, device=device).to(dtype) for _ in range(3))
    tables = rotary_tables(64, 32, dtype, device)
    empty = torch.zeros(2, 64, 2, 64, device=device, dtype=dtype)
    at_once, stepwise = Cache(empty, empty, page_size), Cache(empty, empty, page_size)

    def run(cache: Cache, first: list[int], count: int) -> Tensor:
        tokens = [torch.stack([x[b, n : n + count] for b, n in enumerate(first)]) for x in (q, k, v)]
        return flash_attn_with_kvcache(
            tokens[0],
            cache.k,
            cache.v,
            *tokens[1:],
            *tables,
            cache_seqlens=int32(first, device),
            block_table=cache.block_table,
            causal=True,
        )

    expected = run(at_once, [0, 0], 40)
    for b, prompt in enumerate(prompts):  # sequence b's prompt; the other one is written over later
        out = run(stepwise, [0, 0], prompt)
        torch.testing.assert_close(out[b], expected[b, :prompt], rtol=2e-3, atol=2e-3)
    for step in range(steps):
        first = [prompt + step for prompt in prompts]
        if step == 0:
            run(stepwise, [0, 0], max(prompts))
        out = run(stepwise, first, 1)
        for b, n in enumerate(first):
            torch.testing.assert_close(out[b, 0], expected[b, n], rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("page_size", [0, 16, 64])
@pytest.mark.parametrize(("seqlen_q", "num_splits"), [(1, 0), (1, 5), (3, 0), (100, 1)])
def test_graph_replays_read_the_lengths_anew(
    gpu: torch.device, any_path: torch.device, seqlen_q: int, num_splits: int, page_size: int
) -> None:
    """Lengths and block tables changed in place between replays; replays allocate nothing."""
    if any_path.type == "cpu":
        pytest.skip("needs a GPU path")
    capacity, heads, dtype = 1024, (8, 2), torch.bfloat16
    q = torch.zeros(3, seqlen_q, heads[0], 128, device=any_path, dtype=dtype)
    new_k, new_v = torch.zeros(2, 3, seqlen_q, heads[1], 128, device=any_path, dtype=dtype)
    tables = rotary_tables(capacity, 64, dtype, any_path)
    k, v = torch.randn(2, 3, capacity, heads[1], 128, device=any_path, dtype=dtype)
    held, lengths = Cache(k, v, page_size), int32([0, 0, 0], any_path)

    def run(cache: Cache) -> tuple[Tensor, Tensor]:
        return flash_attn_with_kvcache(
            q,
            cache.k,
            cache.v,
            new_k,
            new_v,
            *tables,
            cache_seqlens=lengths,
            block_table=cache.block_table,
            causal=True,
            num_splits=num_splits,
            return_softmax_lse=True,
        )

    run(held)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, lse = run(held)
    for step, values in enumerate(([0, 1, 63], [900, 300, 64], [16, 256, 511])):
        for x in (q, new_k, new_v):
            x.copy_(torch.randn_like(x))
        lengths.copy_(int32(values, any_path))
        if page_size:  # the same pages, in another order
            shuffled = held.block_table.flatten()[torch.randperm(held.block_table.numel(), device=any_path)]
            held.block_table.copy_(shuffled.view_as(held.block_table))
        alone = Cache(k, v)
        alone.page_size, alone.block_table = page_size, held.block_table
        alone.k, alone.v = held.k.clone(), held.v.clone()
        out.fill_(NAN)
        torch.cuda.synchronize()
        allocated = torch.cuda.memory_stats()["allocation.all.allocated"]
        graph.replay()
        torch.cuda.synchronize()
        assert torch.cuda.memory_stats()["allocation.all.allocated"] == allocated, step
        expected, expected_lse = run(alone)
        assert torch.equal(out, expected) and torch.equal(lse, expected_lse), step
        for pool, other in ((held.k, alone.k), (held.v, alone.v)):  # as bits: unused pages are NaN
            assert torch.equal(pool.view(torch.int16), other.view(torch.int16)), step


@pytest.mark.parametrize("num_splits", [16, 17])  # merged by the decode kernel, by the combine kernel
def test_threads_and_streams_do_not_disturb_each_other(gpu: torch.device, num_splits: int) -> None:
    """The results of splits lie in memory that is kept from call to call."""
    k, v = torch.randn(2, 2, 4096, 2, 128, device=gpu, dtype=torch.float16)
    queries = [torch.randn(2, 1, 8, 128, device=gpu, dtype=torch.float16) for _ in range(4)]
    expected = [flash_attn_with_kvcache(q, k, v, num_splits=num_splits) for q in queries]
    streams = 2 * [torch.cuda.current_stream(), torch.cuda.Stream()]
    torch.cuda.synchronize()

    def repeat(q: Tensor, expected: Tensor, stream: torch.cuda.Stream) -> bool:
        with torch.cuda.stream(stream):
            outs = [flash_attn_with_kvcache(q, k, v, num_splits=num_splits) for _ in range(200)]
            return all(torch.equal(out, expected) for out in outs)

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(repeat, queries, expected, streams))


def test_calls_follow_each_other(gpu: torch.device) -> None:
    """A kernel that is launched early waits for what the one before it writes."""
    k, v, new_k, new_v = (
        torch.randn(2, n, 2, 128, device=gpu, dtype=torch.float16) for n in (2048, 2048, 1, 1)
    )
    lengths = int32([1000, 2047], gpu)

    def chain(num_splits: int, wait: bool) -> Tensor:
        out, cache = torch.ones(2, 1, 8, 128, device=gpu, dtype=torch.float16), (k.clone(), v.clone())
        for step in range(30):  # every second one appends
            new = (new_k * out[:, :, :2], new_v) if step % 2 else ()
            out = flash_attn_with_kvcache(out, *cache, *new, cache_seqlens=lengths, num_splits=num_splits)
            if wait:
                torch.cuda.synchronize()
        return out

    for num_splits in (1, 8, 20):
        assert torch.equal(chain(num_splits, wait=False), chain(num_splits, wait=True))


def test_what_is_kept_in_inference_mode_serves_outside_of_it(gpu: torch.device) -> None:
    q = torch.randn(1, 1, 8, 128, device=gpu, dtype=torch.float16)
    k, v = torch.randn(2, 1, 2048, 2, 128, device=gpu, dtype=torch.float16)

    def both() -> bool:
        with torch.inference_mode():
            inside = flash_attn_with_kvcache(q, k, v, num_splits=8)
        outside = flash_attn_with_kvcache(q, k, v, num_splits=8)
        return torch.equal(inside, outside) and inside.is_inference() and not outside.is_inference()

    with ThreadPoolExecutor(1) as pool:  # a thread of its own has memory of its own
        assert pool.submit(both).result()


def test_other_device(gpu: torch.device) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    tensors = [
        torch.randn(1, n, h, 128, device=gpu, dtype=torch.float16) for n, h in ((1, 8), *2 * [(2048, 2)])
    ]
    expected = flash_attn_with_kvcache(*tensors)
    out = flash_attn_with_kvcache(*(x.to("cuda:1") for x in tensors))
    assert torch.cuda.current_device() == 0 and out.device.index == 1
    assert torch.equal(out.to(gpu), expected)


@pytest.mark.parametrize("stock", ["enough", "none"])
def test_graphs_count_their_splits_apart(
    gpu: torch.device, stock: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Replays on two streams, beside eager calls; all counters are 0 again afterwards."""
    q = torch.randn(3, 1, 8, 128, device=gpu, dtype=torch.bfloat16)
    k, v = torch.randn(2, 3, 2048, 2, 128, device=gpu, dtype=torch.bfloat16)
    expected = flash_attn_with_kvcache(q, k, v, num_splits=16)
    if stock == "none":
        monkeypatch.setattr(memory, "_stock", {})
    graphs, streams, captured = [], [torch.cuda.Stream() for _ in range(2)], []
    for stream in streams:
        stream.wait_stream(torch.cuda.current_stream())
        graphs.append(torch.cuda.CUDAGraph())
        with torch.cuda.graph(graphs[-1], stream=stream):
            captured += [flash_attn_with_kvcache(q, k, v, num_splits=16) for _ in range(3)]
    for _ in range(20):
        for out in captured:
            out.fill_(NAN)
        torch.cuda.synchronize()
        for graph, stream in zip(graphs, streams, strict=True):
            with torch.cuda.stream(stream):
                graph.replay()
        beside = flash_attn_with_kvcache(q, k, v, num_splits=16)
        torch.cuda.synchronize()
        assert all(torch.equal(out, expected) for out in (*captured, beside))
    kept = [counts for _, counts in memory._workspaces.of_stream.values()]
    assert kept and memory._captured
    assert not any(counts.any() for counts in (*kept, *memory._captured))


def test_no_synchronisation_and_one_kernel_for_all_lengths(
    gpu: torch.device, any_path: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For other lengths, batches, capacities and page counts of one kind of call."""
    if any_path.type == "cpu":
        pytest.skip("needs a GPU path")

    def calls() -> list[dict[str, Any]]:
        made = []
        for batch, capacity, pages in ((1, 64, 0), (5, 4000, 0), (2, 0, 4), (3, 0, 200)):
            q = torch.randn(batch, 1, 8, 128, device=any_path, dtype=torch.bfloat16)
            shape = (700, 16, 2, 128) if pages else (batch, capacity, 2, 128)
            k_cache, v_cache = torch.randn(2, *shape, device=any_path, dtype=q.dtype)
            k, v = torch.randn(2, batch, 1, 2, 128, device=any_path, dtype=q.dtype)
            call = dict(q=q, k_cache=k_cache, v_cache=v_cache, k=k, v=v, causal=True)
            call["cache_seqlens"] = torch.full((batch,), 50, dtype=torch.int32, device=any_path)
            if pages:
                table = torch.randperm(700, device=any_path)[: batch * pages].view(batch, pages)
                call["block_table"] = table.int()
            made.append(call)
        return made

    warm, again = calls(), calls()
    for call in (warm[1], warm[3], warm[0], warm[2]):
        flash_attn_with_kvcache(**call)

    def load(config: Any) -> None:
        raise AssertionError(f"a kernel of its own for other lengths: {config}")

    monkeypatch.setattr(compile, "_load", load)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for call in again:
            flash_attn_with_kvcache(**call)
            call["cache_seqlens"] = 20
            flash_attn_with_kvcache(**call)
    finally:
        torch.cuda.set_sync_debug_mode("default")
