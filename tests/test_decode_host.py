"""How decoding is planned and cut up, and what its kernels are given; no GPU is needed."""

import itertools
import math
import threading
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from mini_flash_attention import backend, cpu, flash_attn_with_kvcache, kv_append
from mini_flash_attention.gpu import compile, config, fast, inputs, memory, plans
from mini_flash_attention.gpu.splits import MAX_BLOCKS, Decoding, best_splits
from mini_flash_attention.kernels.calls import Append, Decode, Ragged
from mini_flash_attention.kernels.decode.splits import MAX_SPLITS, split_blocks, visible_blocks
from mini_flash_attention.problem import CacheUpdate, Inputs, Layout, Problem
from mini_flash_attention.scores.capture import Scoring, built_in

CUDA = torch.device("cuda", 0)
CALL = Problem(
    dtype=torch.bfloat16,
    device=CUDA,
    batch=4,
    seqlen_q=1,
    seqlen_k=4096,
    heads_q=32,
    heads_k=8,
    head_dim=128,
    softmax_scale=0.125,
    ragged=True,
)

ROWS = [row for arch in config.SHARED_MEMORY for row in config.decode_configs(arch)]


# Index arithmetic


@pytest.mark.parametrize("group", [1, 2, 3, 8])
@pytest.mark.parametrize("rows", [4, 16])
def test_packed_rows_visit_the_blocks_that_they_see(group: int, rows: int) -> None:
    tile_n = 4
    lengths = itertools.product([1, 2, 5], [0, 1, 3, 4, 9, 16])
    windows = itertools.product([0, 2, 7, 20], [0, 1, 6, 20])
    for (seqlen_q, seqlen_k), (left, right) in itertools.product(lengths, windows):
        for first_row in range(0, seqlen_q * group, rows):
            queries = {r // group for r in range(first_row, min(first_row + rows, seqlen_q * group))}
            first, last, free_first, free_end = visible_blocks(
                first_row, rows, group, tile_n, seqlen_q, seqlen_k, left, right
            )
            assert 0 <= first <= last <= math.ceil(seqlen_k / tile_n)
            for block in range(-(-seqlen_k // tile_n) + 1):
                keys = range(block * tile_n, (block + 1) * tile_n)
                seen = [
                    j < seqlen_k and -left <= j - (i + seqlen_k - seqlen_q) <= right
                    for i in queries
                    for j in keys
                ]
                assert first <= block < last or not any(seen)
                assert all(seen) or not free_first <= block < free_end


def test_splits_cover_the_blocks_once() -> None:
    for count, num_splits in itertools.product(range(40), (1, 2, 3, 7, 64)):
        first = 5
        splits = [split_blocks(split, num_splits, first, first + count) for split in range(num_splits)]
        lengths = [end - begin for begin, end, _ in splits]
        covered = [block for begin, end, _ in splits for block in range(begin, end)]
        assert covered == list(range(first, first + count))
        assert max(lengths) == -(-count // num_splits)
        used = sum(length > 0 for length in lengths)
        assert all(parts == used for _, _, parts in splits)
        assert all(lengths[:used]) and len(set(lengths[: used - 1])) <= 1


# Plans


@pytest.mark.parametrize(
    ("tiles", "blocks"), [(8, 64), (8, 1024), (1, 8192), (128, 64), (576, 8), (512, 128), (70_000, 32)]
)
def test_splits_fill_the_gpu(tiles: int, blocks: int) -> None:
    splits = best_splits(Decoding(tiles, tiles, 4, 128 * blocks, 128, 128, 2, True), num_sms=132)
    assert 1 <= splits <= MAX_SPLITS
    assert blocks / splits <= MAX_BLOCKS
    assert tiles * splits >= min(0.4 * 132, tiles * MAX_SPLITS)  # so many keep the memory busy
    if tiles >= 132:
        assert splits == -(-blocks // MAX_BLOCKS)


@pytest.mark.parametrize(
    ("tiles", "group", "keys", "best"),
    [
        (8, 4, 256, (1,)),
        (8, 4, 512, (1, 4)),
        (8, 4, 1024, (4, 8)),
        (8, 4, 2048, (8, 16)),
        (8, 4, 8192, (8, 16)),
        (8, 4, 32768, (10, 16)),
        (8, 4, 131072, (10, 16)),
        (32, 4, 32768, (3, 4)),
        (24, 4, 8192, (3, 5)),
        (1, 8, 2048, (12, 16)),
        (1, 8, 8192, (24, 64)),
        (1, 8, 32768, (43, 96)),
        (32, 4, 512, (1,)),
        (32, 4, 2048, (1, 4)),
        (64, 4, 1024, (1,)),
        (128, 4, 4096, (1, 2)),
        (144, 4, 8192, (1,)),
    ],
)
def test_splits_are_those_that_were_fast(tiles: int, group: int, keys: int, best: tuple[int, ...]) -> None:
    """Within 4 % of the fastest on an H100, head dim 128 (docs/worklog.md); best: from, to."""
    splits = best_splits(Decoding(tiles, tiles, group, keys, 128, 128, 2, True), num_sms=132)
    assert best[0] <= splits <= best[-1]


def test_a_window_limits_the_splits() -> None:
    row = plans.decode_config(CALL, "sm_90a")

    def splits(seqlen_k: int, window_left: int | None) -> int:
        call = replace(CALL, batch=1, seqlen_k=seqlen_k, window_left=window_left)
        return best_splits(plans.decoding(call, row), 132)

    assert splits(100_000, 511) == splits(512, 511) <= 4 < splits(100_000, None)


# (batch, queries, keys, query heads, key heads), head dim 128, causal: µs of the decode kernels and of the
# forward kernels (H200, graph replay, keys beyond the L2 cache)
MEASURED = [
    ((1, 1, 8192, 32, 8), 16.5, 86.5),
    ((1, 1, 1024, 32, 8), 7.2, 15.5),
    ((8, 1, 4096, 32, 8), 42.7, 98.6),
    ((64, 1, 1024, 32, 32), 249.8, 257.2),
    ((4, 1, 512, 16, 16), 8.4, 12.4),
    ((8, 4, 8192, 32, 8), 72.2, 195.4),
    ((32, 8, 4096, 32, 8), 141.8, 374.8),
    ((1, 8, 8192, 32, 8), 22.8, 93.4),
    ((1, 16, 8192, 32, 8), 26.0, 93.4),
    ((4, 16, 8192, 32, 8), 57.4, 101.4),
    ((16, 16, 4096, 32, 8), 88.9, 192.7),
    ((1, 32, 8192, 32, 8), 36.7, 92.9),
    ((4, 32, 8192, 32, 8), 94.5, 99.5),
    ((16, 32, 4096, 32, 8), 136.2, 194.9),
    ((1, 64, 8192, 32, 8), 50.4, 93.5),
    ((4, 64, 8192, 32, 8), 167.1, 101.4),
    ((16, 64, 4096, 32, 8), 249.7, 196.9),
    ((1, 128, 8192, 32, 8), 90.7, 93.3),
    ((4, 128, 8192, 32, 8), 255.8, 105.3),
    ((1, 256, 8192, 32, 8), 202.5, 94.5),
    ((1, 256, 32768, 32, 8), 509.2, 365.7),
    ((1, 512, 8192, 32, 8), 251.0, 98.9),
    ((1, 512, 32768, 32, 8), 982.6, 386.6),
    ((1, 64, 32768, 8, 1), 48.3, 350.6),
    ((1, 128, 32768, 8, 1), 86.5, 350.3),
    ((1, 256, 32768, 8, 1), 165.1, 351.8),
    ((8, 64, 4096, 8, 1), 50.8, 48.9),
    ((1, 64, 8192, 16, 16), 38.3, 93.5),
    ((4, 16, 4096, 16, 16), 39.9, 52.9),
    ((4, 64, 4096, 16, 16), 56.4, 53.3),
    ((1, 128, 4096, 16, 16), 37.6, 49.3),
    ((1, 64, 1024, 32, 8), 19.3, 15.9),
    ((1, 128, 1024, 32, 8), 25.7, 15.7),
    ((8, 32, 512, 32, 8), 20.5, 18.4),
    ((2, 77, 4096, 10, 10), 37.5, 50.4),
    ((1, 16, 1024, 8, 8), 8.0, 15.4),
    ((1, 4, 256, 32, 8), 5.2, 7.5),
]


def test_a_window_of_packed_keys_is_that_of_each_sequence() -> None:
    call = replace(CALL, batch=8, window_left=8191)
    packed = replace(call, packed_k=True, seqlen_k=8 * 32768)
    row = plans.decode_config(call, "sm_90a")
    assert plans.decoding(packed, row) == plans.decoding(replace(call, seqlen_k=32768), row)


@pytest.mark.parametrize(("shape", "decode", "forward"), MEASURED, ids=str)
def test_the_faster_kernels_are_chosen(
    shape: tuple[int, ...], decode: float, forward: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is chosen takes at most 12 % more time than the other."""
    monkeypatch.setattr(plans, "sms", lambda problem: 132)
    batch, seqlen_q, seqlen_k, heads_q, heads_k = shape
    lengths = {"seqlen_q": seqlen_q, "seqlen_k": seqlen_k, "max_seqlen_q": seqlen_q}
    heads = {"heads_q": heads_q, "heads_k": heads_k, "batch": batch}
    call = replace(CALL, **lengths, **heads, window_right=0, ragged=False)
    pays = plans.decoding_pays(call, plans.decode_config(call, "sm_90a"), "sm90")
    assert (decode if pays else forward) <= 1.12 * min(decode, forward)


# (batch, length, query heads, key heads, head dim, causal): µs of the backward pass by heads of a tile (H200)
BACKWARD = [
    ((1, 4096, 8, 1, 128, 1), {1: 172, 2: 267, 4: 476, 8: 893}),
    ((1, 8192, 16, 1, 64, 1), {1: 602, 2: 599, 4: 599, 16: 2170}),
    ((1, 16384, 8, 1, 128, 1), {1: 2142, 2: 2114, 4: 2131, 8: 4117}),
    ((1, 4096, 32, 4, 128, 1), {1: 609, 2: 585, 4: 795, 8: 997}),
    ((1, 8192, 32, 4, 128, 1), {1: 2391, 2: 2343, 4: 2793, 8: 3342}),
    ((4, 4096, 14, 2, 64, 1), {1: 608, 2: 602, 4: 667, 7: 819}),
    ((4, 4096, 32, 8, 128, 1), {1: 2629, 2: 2525, 4: 2595}),
    ((1, 1024, 32, 8, 128, 1), {1: 87, 2: 106, 4: 150}),
    ((8, 512, 32, 8, 128, 1), {1: 236, 2: 210, 4: 189}),
    ((32, 512, 32, 8, 64, 1), {1: 444, 2: 406, 4: 334}),
    ((2, 2048, 32, 8, 128, 1), {1: 387, 2: 370, 4: 428}),
    ((1, 4096, 16, 4, 256, 1), {1: 793, 2: 779, 4: 983}),
    ((1, 2048, 64, 8, 64, 1), {1: 210, 2: 207, 4: 204, 8: 316}),
    ((4, 4096, 32, 8, 128, 0), {1: 4691, 2: 4625, 4: 4452}),
    ((1, 8192, 16, 2, 128, 0), {1: 2228, 2: 2203, 4: 2185, 8: 2158}),
]


@pytest.mark.parametrize(("shape", "times"), BACKWARD, ids=str)
def test_a_group_is_divided_as_is_fast(
    shape: tuple[int, ...], times: dict[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Within 4 % of the fastest."""
    monkeypatch.setattr(plans, "sms", lambda problem: 132)
    batch, seqlen, heads_q, heads_k, head_dim, causal = shape
    lengths = {"seqlen_q": seqlen, "seqlen_k": seqlen, "max_seqlen_q": seqlen, "head_dim": head_dim}
    heads = {"heads_q": heads_q, "heads_k": heads_k, "batch": batch}
    call = replace(CALL, **lengths, **heads, window_right=0 if causal else None, ragged=False)
    row = plans.backward_config(call, "sm90", "sm_90a")
    assert times[plans.heads_per_tile(call, row)] <= 1.04 * min(times.values())


def test_few_queries_are_decoded_many_are_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plans, "sms", lambda problem: 132)

    def pays(path: str = "sm90", **changes: Any) -> bool:
        call = replace(CALL, **changes)
        return plans.decoding_pays(call, plans.decode_config(call, "sm_90a"), path)

    assert pays() and pays("sm80") and pays(batch=1000) and pays(seqlen_q=4, batch=1000)
    assert pays(seqlen_q=16, heads_q=128, heads_k=1)
    assert pays(batch=4096, heads_q=64) and pays(batch=600, seqlen_q=4, heads_q=64)
    assert not pays(seqlen_q=4096) and not pays("sm80", seqlen_q=8192)
    assert not pays(batch=2, seqlen_q=4096, seqlen_k=77, heads_q=10, heads_k=10, head_dim=64)  # 16 µs, not 30
    packed = {"packed_q": True, "seqlen_q": 1024, "batch": 64}
    assert pays(**packed, max_seqlen_q=16)
    assert not pays(**packed, max_seqlen_q=1024 - 63, heads_q=8)  # mostly one sequence


def test_numbers_do_not_choose_the_kernel() -> None:
    row = plans.decode_config(CALL, "sm_90a")
    for changes in (
        {"batch": 1},
        {"seqlen_k": 77},
        {"softmax_scale": -1.0},
        {"heads_q": 8},
        {"heads_q": 16, "heads_k": 1},
        {"window_left": 5},
        {"window_right": 0},
        {"packed_q": True},
        {"left_padded": True},
        {"head_dim": 120},
        {"seqlen_q": 3},
    ):
        assert plans.decode_config(replace(CALL, **changes), "sm_90a") == row
    for page_size in (1, 16, 100):
        assert plans.decode_config(replace(CALL, page_size=page_size), "sm_90a") == replace(row, page=1)
    assert plans.decode_config(replace(CALL, seqlen_q=5), "sm_90a").tile_m == 64
    capped = plans.decode_config(replace(CALL, softcap=1.0, alibi=True), "sm_90a")
    assert capped.score == Scoring(map(built_in, ("softcap", "alibi")))


def test_tiles_fit() -> None:
    for row in ROWS:
        assert row.shared_memory <= config.SHARED_MEMORY[row.arch], row
        assert row.resident >= 1
        chunk = 2 * row.chunk * row.head_dim  # bytes
        assert chunk % 1024 == 0  # a whole number of swizzle patterns
        assert row.slots * row.key_warps * chunk == row.shared_memory  # the results fit where the ring was
        assert row.slots >= 3  # one is read, one arrives, one is on the way
        assert row.warp_rows % (4 if row.head_dim % 64 == 0 else 8) == 0 and row.warp_rows <= 32
        if row.can_merge:  # kernels/decode/combine.py: Shared, of each warp, and what is shared by all
            each = row.merged_rows * (row.merged_columns * row.merged_splits + MAX_SPLITS)
            assert 4 * (row.warps * each + 1) <= row.shared_memory
        assert row.row_warps == 1 or row.key_warps == 1  # a chunk's readers are a warp, or the thread block


# What the kernels are given


class Kernels:
    """Stands in for the compiled ones: keeps what they are given, and computes with the CPU backend."""

    def __init__(self) -> None:
        self.rows: list[Any] = []
        self.decoded: Decode | None = None
        self.appended = False

    def get(self, row: Any) -> Any:
        self.rows.append(row)
        function, record = {
            "decode.attend": (self.decode, Decode),
            "decode.append": (self.append, Append),
        }[row.kernel]
        return lambda *fields: function(record(*fields))

    def problem(self, q: Tensor, k: Tensor, ragged: Ragged, **changes: Any) -> tuple[Problem, Layout]:
        layout = Layout(*(x if ragged.given >> i & 1 else None for i, x in enumerate(ragged[:5])))
        paged, packed = self.rows[-1].page == 1, layout.cu_seqlens_q is not None
        table = ragged.block_table
        if paged:
            layout = layout._replace(block_table=table)
        if layout.seqused_k is None:
            layout = layout._replace(keys=ragged.keys)
        capacity = k.shape[1] * (table.shape[1] if paged else 1)
        facts = q.dtype, q.device, ragged.batch, q.shape[1], capacity, q.shape[2], k.shape[2], q.shape[3], 1.0
        problem = Problem(*facts, ragged=True, packed_q=packed, page_size=k.shape[1] if paged else 0)
        return replace(problem, max_seqlen_q=ragged.longest, **changes), layout

    def decode(self, call: Decode) -> None:
        q, k, out, lse = call.mQ, call.mK, call.mO, call.mLSE
        scale, captured = call.score
        row = next(row for row in self.rows if row.kernel == "decode.attend")
        given = dict(zip(map(repr, row.score), captured or (), strict=True))
        softcap, slopes = given.get("softcap", 0.0), given.get("alibi")
        assert scale > 0 and inputs.in_place(q, k, call.mV, out) and lse.is_contiguous()
        if call.num_splits > 1:
            assert call.workspace.is_contiguous()
            assert call.workspace.numel() >= call.num_splits * lse.numel() * (q.shape[3] + 1)
        if call.fused:
            group = q.shape[2] // k.shape[2]
            tiles = len(q) * k.shape[2] * -(-q.shape[1] * group // self.rows[-1].tile_m)
            assert call.num_splits > 1 and len(call.counters) >= tiles and not call.counters.any()
        window = {"window_left": call.window_left, "window_right": call.window_right}
        options = {"softmax_scale": scale, "softcap": softcap, "alibi": slopes is not None}
        options["sinks"] = call.sinks is not None
        problem, layout = self.problem(q, k, call.ragged, **window, **options)
        used = layout.keys if layout.seqused_k is None else layout.seqused_k
        used = torch.zeros(problem.batch, dtype=torch.int32) + used + call.ragged.added
        if problem.packed_q:
            q = q.squeeze(0)
        x = Inputs(q, k, call.mV, slopes, None, layout._replace(seqused_k=used, keys=None), call.sinks)
        expected, expected_lse = cpu.forward(problem, x)
        out.copy_(expected.view_as(out))
        lse.copy_(expected_lse.view_as(lse))
        self.decoded = call

    def append(self, call: Append) -> None:
        kind = self.rows[-1].rotary
        assert (call.rotary is None) == (kind == "none") == (call.mQ is None)
        queries = call.mK_new if call.mQ is None else call.mQ
        window = {"window_right": 0 if call.advance else None}
        problem, layout = self.problem(queries, call.mK, call.ragged, **window)
        tables = call.rotary or (None, None)
        update = CacheUpdate(call.mK_new, call.mV_new, *tables, kind == "interleaved")
        rotated = kv_append.append(problem, Inputs(queries, call.mK, call.mV, layout=layout), update).q
        if call.mQ_out is not None:
            call.mQ_out.copy_(rotated)
        self.appended = True


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch, pretended_gpu: None) -> Kernels:
    kernels = Kernels()
    monkeypatch.setattr(compile, "get", kernels.get)
    return kernels


def check(
    monkeypatch: pytest.MonkeyPatch,
    head_dim: int = 64,
    seqlen_q: int = 1,
    heads: tuple[int, int] = (4, 2),
    page_size: int = 0,
    new: int = 0,
    rotary_dim: int = 0,
    lengths: tuple[int, ...] | int | None = (7, 0, 40),
    **options: Any,
) -> None:
    """Both ways of one call give the same, and leave the same in the cache."""
    batch, capacity = 3, 48
    q = torch.randn(batch, seqlen_q, heads[0], head_dim, dtype=torch.float16)
    shape = (batch, capacity, heads[1], head_dim)
    if page_size:
        pages = capacity // page_size
        shape = (batch * pages + 2, page_size, heads[1], head_dim)
        options["block_table"] = torch.randperm(batch * pages).int().view(batch, pages)
    k_cache, v_cache = (torch.randn(shape, dtype=torch.float16) for _ in range(2))
    if new:
        options["k"], options["v"] = (
            torch.randn(batch, new, heads[1], head_dim, dtype=torch.float16) for _ in range(2)
        )
    if rotary_dim:
        angles = torch.rand(capacity, rotary_dim // 2)
        options["rotary_cos"], options["rotary_sin"] = angles.cos().half(), angles.sin().half()
    if isinstance(lengths, tuple):
        lengths = torch.tensor(lengths, dtype=torch.int32)
    results = []
    for forced in ("cpu", ""):
        monkeypatch.setenv("MINI_FLASH_ATTENTION_BACKEND", forced)
        caches = k_cache.clone(), v_cache.clone()
        out = flash_attn_with_kvcache(q, *caches, cache_seqlens=lengths, return_softmax_lse=True, **options)
        results.append((*out, *caches))
    for expected, got in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, rtol=0, atol=2e-3, equal_nan=True)


@pytest.mark.parametrize("page_size", [0, 16])
@pytest.mark.parametrize("lengths", [(7, 0, 40), 13, None])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"causal": True, "seqlen_q": 3},
        {"window_size": (5, 2), "seqlen_q": 4, "num_splits": 3},
        {"softcap": 2.0, "alibi_slopes": torch.arange(4) / 5},
        {"alibi_slopes": torch.arange(12).view(3, 4) / 13},
        {"s_aux": torch.tensor([0.5, -3.0, 20.0, 1.0]), "num_splits": 2},
        {"s_aux": torch.tensor([0.5, -3.0, 20.0, 1.0]).bfloat16()},
        {"heads": (6, 1), "softmax_scale": -0.3},
        {"head_dim": 59, "softmax_scale": 0.0, "num_splits": 2},
        {"cache_batch_idx": torch.tensor([2, 0, 1], dtype=torch.int32)},
    ],
    ids=str,
)
def test_the_kernel_is_given_the_call(
    kernels: Kernels,
    monkeypatch: pytest.MonkeyPatch,
    page_size: int,
    lengths: tuple[int, ...] | int | None,
    options: dict[str, Any],
) -> None:
    check(monkeypatch, page_size=page_size, lengths=lengths, **options)
    assert kernels.decoded.num_splits == options.get("num_splits", 1)


def test_left_padding_is_given(kernels: Kernels, monkeypatch: pytest.MonkeyPatch) -> None:
    check(monkeypatch, cache_leftpad=torch.tensor([2, 0, 11], dtype=torch.int32))


@pytest.mark.parametrize("page_size", [0, 16])
@pytest.mark.parametrize("lengths", [(7, 0, 40), 13])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"rotary_dim": 32},
        {"rotary_dim": 64, "rotary_interleaved": False, "causal": True, "seqlen_q": 3, "new": 3},
    ],
    ids=str,
)
def test_the_append_kernel_is_given_the_update(
    kernels: Kernels,
    monkeypatch: pytest.MonkeyPatch,
    page_size: int,
    lengths: tuple[int, ...] | int,
    options: dict[str, Any],
) -> None:
    check(monkeypatch, page_size=page_size, lengths=lengths, **{"new": 2, **options})
    assert kernels.appended


@pytest.mark.parametrize("options", [{"head_dim": 59}, {"new": 0, "lengths": (7, 0, 40)}], ids=str)
def test_what_the_append_kernel_cannot_do_takes_another_way(
    kernels: Kernels, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]
) -> None:
    check(monkeypatch, **{"new": 2, **options})
    assert not kernels.appended


def test_what_a_kernel_refuses_is_copied(kernels: Kernels, monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels check strides and addresses themselves, and raise ValueError before they do anything."""
    refused = []

    def refusing(kernel: Any) -> Any:
        def launch(*fields: Any) -> None:
            if not inputs.in_place(*fields[:4]):
                refused.append(kernel)
                raise ValueError("Mismatched mQ.strides[3]")
            kernel(*fields)

        return launch

    get = kernels.get
    monkeypatch.setattr(compile, "get", lambda row: refusing(get(row)))
    q, new_k, new_v = (torch.randn(3, 1, heads, 64, dtype=torch.float16) for heads in (4, 2, 2))
    k, v = torch.randn(2, 3, 48, 2, 64, dtype=torch.float16)
    odd = [torch.zeros(3, 48, 2, 77, dtype=torch.float16)[..., 3:67].copy_(x) for x in (k, v)]
    lengths = torch.tensor([7, 0, 40], dtype=torch.int32)
    expected = flash_attn_with_kvcache(q, k, v, new_k, new_v, cache_seqlens=lengths)
    assert kernels.appended and not refused
    kernels.appended = False
    out = flash_attn_with_kvcache(q, *odd, new_k, new_v, cache_seqlens=lengths)
    assert len(refused) == 2 and not kernels.appended
    assert torch.equal(out, expected) and torch.equal(odd[0], k) and torch.equal(odd[1], v)


def test_a_length_on_the_host_makes_no_tensor(kernels: Kernels, monkeypatch: pytest.MonkeyPatch) -> None:
    check(monkeypatch, lengths=13, new=1)
    monkeypatch.setattr(torch, "full", lambda *_, **__: pytest.fail("a tensor was filled"))
    q = torch.randn(3, 1, 4, 64, dtype=torch.float16)
    k = torch.randn(3, 48, 2, 64, dtype=torch.float16)
    monkeypatch.setattr(kernels, "decode", lambda _: None)
    flash_attn_with_kvcache(q, k, k.clone(), cache_seqlens=13)


def test_an_lse_that_nobody_wants_is_not_allocated(kernels: Kernels, monkeypatch: pytest.MonkeyPatch) -> None:
    q = torch.randn(3, 1, 4, 64, dtype=torch.float16)
    k = torch.randn(3, 48, 2, 64, dtype=torch.float16)
    lengths = torch.tensor([7, 0, 40], dtype=torch.int32)
    allocated, allocate = [], fast.allocate
    monkeypatch.setattr(fast, "allocate", lambda *like: allocated.append(like[0]) or allocate(*like))
    for options, shapes in (
        ({}, [q.shape]),
        ({"return_softmax_lse": True}, [q.shape, (3, 4, 1)]),
        ({"num_splits": 3}, [q.shape]),
    ):
        allocated.clear()
        flash_attn_with_kvcache(q, k, k, cache_seqlens=lengths, **options)
        assert allocated == shapes
    assert memory.unread((1, 1, memory.UNREAD + 1), 0) is None


def test_no_memory_is_made_in_a_capture(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fast, "is_capturing", lambda: True)
    monkeypatch.setattr(memory, "_unread", {})
    assert memory.unread((1, 2, 3), 0) is None
    monkeypatch.setattr(memory, "_unread", {0: torch.empty(memory.UNREAD)})
    assert memory.unread((1, 2, 3), 0).shape == (1, 2, 3)
    assert memory.unread((1, 1, memory.UNREAD + 1), 0) is None


def test_a_workspace_is_for_one_thread_and_one_stream(
    pretended_gpu: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "_workspaces", memory._Workspaces())
    monkeypatch.setattr(memory, "unused", lambda device: "unused")
    state = {"capturing": False, "stream": 1}
    monkeypatch.setattr(fast, "is_capturing", lambda: state["capturing"])
    monkeypatch.setattr(fast, "current_stream", lambda device: state["stream"])

    def get(size: int = 100, count: int = 9, device: int = 0, **changes: Any) -> tuple[Tensor, Tensor]:
        state.update(capturing=False, stream=1)
        state.update(changes)
        return memory.workspace(size, count, device)

    first = get()
    assert get() is get(memory.WORKSPACE) is first
    others = [get(stream=2), get(device=1), get(capturing=True)]
    thread = threading.Thread(target=lambda: others.append(get()))
    thread.start()
    thread.join()
    large, its_counters = get(memory.WORKSPACE + 1)
    assert large.numel() == memory.WORKSPACE + 1 and its_counters is first[1]
    for memories in zip(first, *others, strict=True):
        assert len({x.data_ptr() for x in memories}) == 5
    assert not any(counts.any() for _, counts in others)
    captured = [get(count=n, capturing=True)[1] for n in (20, 30, 40)]  # the last ones are not in stock
    assert [len(x) for x in captured] == [20, 30, 40]
    ranges = [range(x.data_ptr(), x.data_ptr() + 4 * len(x)) for x in (others[2][1], *captured)]
    assert sum(map(len, ranges)) == len(set().union(*ranges))
    assert get(count=0, capturing=True)[1] == "unused"


def test_many_queries_take_the_forward_kernels(pretended_gpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plans, "forward", lambda problem, path: "forward")
    monkeypatch.setattr(plans, "decode", lambda problem, row: problem.num_splits)

    def plan(call: Problem, **changes: Any) -> Any:
        return backend.attention_plan(replace(call, **changes), None)

    call = replace(CALL, seqlen_q=4096)
    assert plan(call) == plan(call, num_splits=1) == "forward"
    assert plan(call, num_splits=2) == 2
    assert plan(CALL) == 0
    dropping = replace(CALL, dropout_p=0.1)  # decoding has no dropout
    assert plan(dropping) == "forward"
    assert plan(CALL, ragged=False) == 0  # a dense call decodes as well
