"""What is compiled: every row of the tile tables, once, with no more stack than its row states."""

import dataclasses
import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

if importlib.util.find_spec("nvidia_cutlass_dsl") is None:
    pytest.skip("CuTe DSL is not installed", allow_module_level=True)

from cubin import resources
from score_functions import same_document, scaled_and_biased
from tiny import TinyConfig

from mini_flash_attention import __main__, flash_attn_func
from mini_flash_attention.gpu import cache, compile, config, plans
from mini_flash_attention.gpu.compile import KernelConfig
from mini_flash_attention.gpu.config import ForwardConfig
from mini_flash_attention.problem import Problem
from mini_flash_attention.scores.capture import Scoring, built_in, capture

ARCHS = ("sm_80", "sm_90a", "sm_120a")
OURS = Scoring(map(built_in, ("softcap", "alibi")))
BIASED = capture("score_mod", scaled_and_biased)[0]
MASKED = capture("mask_mod", same_document)[0]
# Where a function that reads tables spills 8 to 56 bytes, on one architecture or another; both together spill
# in nearly every forward kernel, on SM90 200 to 400 bytes.
SPILL = {
    "forward": {("sm80", 64), ("sm80", 96), ("sm80", 256), ("sm90", 192)},
    "backward": {("sm80", 64), ("sm90", 64), ("sm90", 128)},
}


def features(arch: str) -> Iterator[KernelConfig]:
    """Each optional feature, once for a row of the tables; the masks take turns but for what spills first."""
    for path in config.paths(arch):
        for i, head_dim in enumerate(config.HEAD_DIMS):
            call = path, arch, "bfloat16", head_dim, config.MASKS[i % 3]
            page = config.SM90_PAGES[i % 3] if path == "sm90" else 1
            for mask in config.MASKS:
                yield config.forward(*call[:-1], mask, ragged=True, score=OURS)
                yield config.forward(*call[:-1], mask, sinks=True)
            for function in () if (path, head_dim) in SPILL["forward"] else (BIASED, MASKED):
                yield config.forward(*call, score=Scoring((function,)))
            yield config.forward(*call, ragged=True, page=page)
            yield config.forward(*call, ragged=True, page=page, sinks=True)
            yield config.forward(*call, dropout=True)
            yield config.backward(*call, deterministic=True)
            yield config.backward(*call, deterministic=path == "sm80", ragged=True, score=OURS)
            if (path, head_dim) not in SPILL["backward"]:
                yield config.backward(*call, score=Scoring((BIASED, MASKED)))
            yield config.backward(*call, ragged=True, dropout=True)
    for head_dim in config.HEAD_DIMS:
        for rows in (16, 64):
            yield config.decode(arch, "float16", head_dim, rows, OURS, page=1)
            if head_dim in (64, 192):  # elsewhere a table of biases spills 8 to 40 bytes, at 64 or at 16 rows
                yield config.decode(arch, "float16", head_dim, rows, Scoring((BIASED,)), page=1)
            if head_dim < 256:
                yield config.decode(arch, "float16", head_dim, rows, Scoring((MASKED,)))
            yield config.decode(arch, "bfloat16", head_dim, rows, sinks=True)


CONFIGS = [
    row
    for arch in ARCHS
    for rows in (
        config.forward_configs(arch),
        config.backward_configs(arch),
        (row for row in config.decode_configs(arch) if row.dtype == "bfloat16" or not row.page),
        config.append_configs(arch),
        features(arch),
    )
    for row in rows
]
KERNELS = {
    "forward.sm80": 1,
    "backward.sm80": 3,
    "backward.sm90": 3,
    "decode.attend": 2,
    "decode.append": 1,
}  # of a library


NAMES = {BIASED: "biased", MASKED: "masked"}


def label(row: KernelConfig) -> str:
    facts = {name: getattr(row, name, None) for name in ("dtype", "head_dim", "tile_m", "mask")}
    facts["score"] = "_".join(NAMES.get(function, repr(function)) for function in getattr(row, "score", ()))
    facts |= {name: getattr(row, name, None) for name in ("rotary", "page")}
    flags = [name for name in ("ragged", "dropout", "deterministic", "sinks") if getattr(row, name, False)]
    return "-".join([row.kernel, row.arch, *(str(fact) for fact in facts.values() if fact), *flags])


@pytest.fixture(scope="session")
def filled_cache(request: pytest.FixtureRequest) -> None:
    """Fills the cache for this run's tests, in parallel. A kernel that fails here fails again in its test."""
    tests = (item for item in request.session.items if "filled_cache" in getattr(item, "fixturenames", ()))
    capture = request.config.pluginmanager.getplugin("capturemanager")
    with capture.global_and_fixture_disabled():  # show the progress
        print()
        try:
            compile.precompile([test.callspec.params["row"] for test in tests])
        except RuntimeError as error:
            print(error, file=sys.stderr)


def one_of_each_kernel(rows: list[KernelConfig]) -> list[object]:
    """The first row of each kernel for every run, the others for --full."""
    first = {row.kernel: row for row in reversed(rows)}
    return [pytest.param(row, marks=() if row is first[row.kernel] else pytest.mark.full) for row in rows]


@pytest.mark.timeout(5400)  # the first of these compiles all kernels
@pytest.mark.parametrize("row", one_of_each_kernel(CONFIGS), ids=label)
def test_every_kernel_compiles_without_a_stack(row: KernelConfig, filled_cache: None) -> None:
    kernels = [kernel for kernel in resources(compile.library(row)) if kernel.registers]
    variants = len(row.variants) if row.kernel == "forward.sm90" else KERNELS[row.kernel]
    assert len(kernels) == variants
    assert max(kernel.stack_bytes for kernel in resources(compile.library(row))) <= row.stack


@pytest.mark.parametrize("arch", config.SHARED_MEMORY)
def test_backward_tiles_fit_the_shared_memory(arch: str) -> None:
    for row in (*config.backward_configs(arch), *(row for row in features(arch) if "backward" in row.kernel)):
        barriers = 512 if row.kernel == "backward.sm90" else 0  # bytes, more than enough
        assert row.shared_memory + barriers <= config.SHARED_MEMORY[arch]


@pytest.mark.parametrize("head_dim", config.SM90_BACKWARD_TILES)
def test_dq_tiles_are_read_as_they_are_written(head_dim: int) -> None:
    from mini_flash_attention.kernels.backward import convert

    row = config.backward_sm90("sm_90a", "bfloat16", head_dim, "full", False)
    chunks = [convert.offset(row, r, c) for r in range(row.tile_m) for c in range(head_dim // 8)]
    assert sorted(chunks) == list(range(0, row.tile_m * head_dim, 8))
    rows, cols = row.dq_piece
    assert [convert.offset(row, r, cols // 8 - 1) // (rows * cols) for r in range(rows)] == [0] * rows
    step = 2 if row.dq_transposed else 1
    for r in range(0, rows, 4 * step):  # a warp stores one 32-byte chunk of four rows: 128 bytes, all banks
        for first in range(r, r + step):
            banks = {convert.offset(row, first + step * i, 0) % 32 for i in range(4)}
            assert len(banks) == 4


def test_dense_batches_are_persistent_where_any_order_will_do() -> None:
    call = "sm_90a", "bfloat16", 64, "causal"
    assert config.backward_sm90(*call, deterministic=False).persistent
    assert not config.backward_sm90(*call, deterministic=True).persistent  # turns follow the order of starts
    assert not config.backward_sm90(*call, deterministic=False, ragged=True).persistent


@pytest.mark.parametrize("arch", ARCHS)
def test_a_kernel_that_spills_is_found_out(
    arch: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MINI_FLASH_ATTENTION_CACHE_DIR", str(tmp_path))
    (modest,) = resources(compile.library(TinyConfig(arch=arch, live=200)))
    (greedy,) = resources(compile.library(TinyConfig(arch=arch, live=300)))
    assert 200 < modest.registers < 255 and modest.stack_bytes == 0
    assert greedy.registers == 255 and greedy.stack_bytes > 4 * (300 - 255)


CALL = Problem(
    dtype=torch.float16,
    device=torch.device("cuda", 0),
    batch=2,
    seqlen_q=1024,
    seqlen_k=1024,
    heads_q=8,
    heads_k=8,
    head_dim=64,
    softmax_scale=0.125,
)
CAUSAL = dataclasses.replace(CALL, window_right=0)
WINDOW = dataclasses.replace(CALL, window_left=256, window_right=0)
NUMBERS = [
    {"batch": 7},
    {"seqlen_q": 1000},
    {"seqlen_k": 77},
    {"seqlen_q": 1, "seqlen_k": 65536},
    {"heads_q": 12, "heads_k": 12},
    {"heads_q": 12, "heads_k": 4},
    {"heads_q": 7, "heads_k": 1},
    {"softmax_scale": -3.0},
    {"device": torch.device("cuda", 1)},
    {"head_dim": 40},
]


def config_of(call: Problem, path: str = "sm90", **changes: object) -> ForwardConfig:
    return plans.forward_config(dataclasses.replace(call, **changes), path, "sm_90a")


@pytest.mark.parametrize("call", [CALL, CAUSAL, WINDOW], ids=["full", "causal", "window"])
@pytest.mark.parametrize("changes", NUMBERS, ids=str)
def test_numbers_do_not_choose_the_kernel(call: Problem, changes: dict[str, object]) -> None:
    assert config_of(call, **changes) == config_of(call)


@pytest.mark.parametrize("window", [(0, 0), (1, 0), (255, 0), (100, 20), (20, 100)], ids=str)
def test_windows_share_a_kernel(window: tuple[int, int]) -> None:
    left, right = window
    assert config_of(CALL, window_left=left, window_right=right) == config_of(WINDOW)


def test_kinds_choose_the_kernel() -> None:
    bfloat16 = {"dtype": torch.bfloat16}
    calls = [(call, kind) for call in (CALL, CAUSAL, WINDOW) for kind in ({}, bfloat16)]
    configs = [config_of(call, head_dim=d, **kind) for d in (64, 128) for call, kind in calls]
    assert len(set(configs)) == len(configs) == 12
    assert len({compile._entry_name(row) for row in configs}) == 12


def test_calls_of_all_sizes_compile_once(
    gpu: torch.device, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MINI_FLASH_ATTENTION_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(compile, "_loaded", {})
    for batch, seqlen_q, seqlen_k, heads_q, heads_k in [
        (1, 128, 128, 1, 1),
        (3, 77, 1000, 12, 4),
        (2, 1, 4096, 8, 1),
        (2, 300, 200, 6, 6),
    ]:
        q = torch.randn(batch, seqlen_q, heads_q, 64, dtype=torch.float16, device=gpu)
        k = torch.randn(batch, heads_k, seqlen_k, 64, dtype=torch.float16, device=gpu)
        v = torch.randn(batch, seqlen_k, heads_k, 128, dtype=torch.float16, device=gpu)
        k, v = k.transpose(1, 2), v[..., :64]
        for scale in (None, 0.3):
            flash_attn_func(q, k, v, softmax_scale=scale)
    assert len(cache.entries()) == 1


def asked_for(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> list[config.Config]:
    """Returns what the command `precompile` with these arguments would compile."""
    asked = []
    monkeypatch.setattr(compile, "precompile", lambda rows, jobs: asked.extend(rows) or 0)
    monkeypatch.setattr(sys, "argv", ["mini_flash_attention", "precompile", *arguments])
    __main__.main()
    return asked


def test_precompile_command(monkeypatch: pytest.MonkeyPatch) -> None:
    common = asked_for(monkeypatch, "--arch", "sm_90a")
    assert {getattr(row, "head_dim", 64) for row in common} == {64, 128}
    assert {getattr(row, "mask", "full") for row in common} == {"full", "causal"}
    kernels = {
        "forward.sm80",
        "forward.sm90",
        "backward.sm80",
        "backward.sm90",
        "decode.attend",
        "decode.append",
    }
    assert {row.kernel for row in common} == kernels
    everything = asked_for(monkeypatch, "--all", "--arch", "sm_80", "sm_90a")
    assert everything == [row for arch in ("sm_80", "sm_90a") for row in config.configs(arch)]
    assert len(set(everything)) == len(everything)
    chosen = asked_for(
        monkeypatch, "--arch", "sm_80", "--head-dim", "72", "--dtype", "bfloat16", "--mask", "full"
    )
    masks = {(row.head_dim, row.dtype, row.mask) for row in chosen if row.kernel.endswith("sm80")}
    assert masks == {(96, "bfloat16", "full")}


def test_precompile_command_is_for_the_gpu_here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    assert {row.arch for row in asked_for(monkeypatch)} == {"sm_90a"}


def test_precompile_command_explains_mistakes(monkeypatch: pytest.MonkeyPatch) -> None:
    for head_dim in ("512", "257", "0", "-5"):
        with pytest.raises(SystemExit, match=f"--head-dim is from 1 to 256, not {head_dim}"):
            asked_for(monkeypatch, "--arch", "sm_90a", "--head-dim", "64", head_dim)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="--arch sm_90a"):
        asked_for(monkeypatch)


def test_env_command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setattr(sys, "argv", ["mini_flash_attention", "env"])
    __main__.main()
    printed = capsys.readouterr().out
    for word in ("mini-flash-attention", torch.__version__, "nvidia-cutlass-dsl", "driver"):
        assert word in printed
    assert str(cache.directory()) in printed
