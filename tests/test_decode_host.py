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
from mini_flash_attention.gpu.splits import MAX_BLOCKS, best_splits
from mini_flash_attention.kernels.calls import Append, Decode, Ragged
from mini_flash_attention.kernels.decode.splits import MAX_SPLITS, split_blocks, visible_blocks
from mini_flash_attention.problem import CacheUpdate, Inputs, Layout, Problem

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
    splits = best_splits(tiles, 0.03, blocks, 2**16, num_sms=132, resident=2)
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
    splits = best_splits(tiles, group / 128, -(-keys // 128), 2**16, num_sms=132, resident=2)
    assert best[0] <= splits <= best[-1]


def test_a_window_limits_the_splits() -> None:
    row = plans.decode_config(CALL, "sm_90a")
    call = replace(CALL, batch=1, seqlen_k=100_000, window_left=511)
    assert plans.choose_splits(call, row, 132) == plans.choose_splits(replace(call, seqlen_k=512), row, 132)
    assert plans.choose_splits(replace(call, window_left=None), row, 132) > 4


def test_few_queries_are_decoded_many_are_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plans, "sms", lambda problem: 132)

    def pays(path: str = "sm90", **changes: Any) -> bool:
        return plans.decoding_pays(replace(CALL, **changes), path)

    assert pays() and pays("sm80") and pays(batch=1000) and pays(seqlen_q=4, batch=1000)
    assert pays(seqlen_q=16, heads_q=128, heads_k=1)
    assert not pays(seqlen_q=4096) and not pays("sm80", seqlen_q=8192)
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
    assert plans.decode_config(replace(CALL, softcap=1.0, alibi=True), "sm_90a").score == "softcap_alibi"


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
        scale, softcap, slopes = call.score
        assert scale > 0 and inputs.in_place(q, k, call.mV, out) and lse.is_contiguous()
        if call.num_splits > 1:
            assert call.workspace.is_contiguous()
            assert call.workspace.numel() >= call.num_splits * lse.numel() * (q.shape[3] + 1)
        if call.fused:
            group = q.shape[2] // k.shape[2]
            tiles = len(q) * k.shape[2] * -(-q.shape[1] * group // self.rows[-1].tile_m)
            assert call.num_splits > 1 and len(call.counters) >= tiles and not call.counters.any()
        window = {"window_left": call.window_left, "window_right": call.window_right}
        options = {"softmax_scale": scale, "softcap": softcap or 0.0, "alibi": slopes is not None}
        problem, layout = self.problem(q, k, call.ragged, **window, **options)
        used = layout.keys if layout.seqused_k is None else layout.seqused_k
        used = torch.zeros(problem.batch, dtype=torch.int32) + used + call.ragged.added
        if problem.packed_q:
            q = q.squeeze(0)
        x = Inputs(q, k, call.mV, slopes, None, layout._replace(seqused_k=used, keys=None))
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
    monkeypatch.setattr(plans, "decode", lambda problem, num_splits: num_splits)
    call = replace(CALL, seqlen_q=4096)
    assert backend.attention_plan(call, 0, None) == backend.attention_plan(call, 1, None) == "forward"
    assert backend.attention_plan(call, 2, None) == 2
    assert backend.attention_plan(CALL, 0, None) == 0
    dropping = replace(CALL, dropout_p=0.1)  # decoding has no dropout
    assert backend.attention_plan(dropping, 0, None) == "forward"
    dense = replace(CALL, ragged=False)
    assert backend.attention_plan(dense, 0, None) == "forward"
