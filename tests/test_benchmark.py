"""The benchmark on a CPU: its arithmetic, its result files, and the README's table."""

import json
import os
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmark import (
    cases,
    estimates,
    exactness,
    machine,
    measure,
    peers,
    plot,
    results,
    run,
    table,
    timing,
)

HEADER = (
    "date,commit,gpu,driver,torch,cutlass_dsl,suite,direction,variant,dtype,batch,seqlen_q,"
    "seqlen_k,heads_q,heads_k,head_dim,causal,impl,ms,spread,tflops,gbps,max_error"
)
RUN = machine.Run("2025-01-02T03:04:05Z", "abc", "NVIDIA H100 80GB HBM3", "580", "2.11.0", "4.8.1")


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def measured(impl: str, tflops: float, seqlen: int = 4096, run: machine.Run = RUN) -> results.Row:
    case = cases.square("prefill", "fwd", "bf16", (16384 // seqlen, seqlen, 16, 128), causal=True)
    return results.row(run, case, impl, timing.Timing(case.flops / tflops / 1e9, 0.01), 2e-3)


def test_flops_and_bytes() -> None:
    full = cases.Case("prefill", "fwd", "bf16", 2, 3, 5, 8, 2, 64, causal=False)
    assert full.flops == 4 * 2 * 8 * 3 * 5 * 64
    assert full.kv_bytes == 2 * 2 * 5 * 2 * 64 * 2
    assert replace(full, causal=True).flops == full.flops / 2
    assert replace(full, direction="bwd").flops == 2.5 * full.flops
    assert replace(full, direction="fwdbwd").flops == 3.5 * full.flops


def test_sweep_holds_tokens_and_hidden_size() -> None:
    points = list(cases.sweep("cuda"))
    assert len(set(points)) == 36
    assert {(case.batch * case.seqlen_q, case.heads_q * case.head_dim) for case in points} == {(16384, 2048)}


def test_summary_is_median_and_width_of_the_middle() -> None:
    samples = [float(sample) for sample in range(1, 12)]
    assert timing.summary(samples) == timing.Timing(6.0, pytest.approx((10 - 2) / 6))
    assert timing.summary([3.0]) == timing.Timing(3.0, 0.0)


def test_implementations_take_turns() -> None:
    order: list[str] = []

    def clock(call: Callable[[], object], iterations: int) -> float:
        call()
        return 1.0

    timed = {name: timing.Timed(lambda name=name: order.append(name), nullcontext) for name in "abc"}
    timing.in_turn(timed, clock, rounds=3)
    assert "".join(order[-9:]) == "abcbcacab"


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("lengths", [(70, 70), (33, 90), (90, 33)])
def test_oracle_in_blocks_is_the_oracle(
    monkeypatch: pytest.MonkeyPatch, causal: bool, lengths: tuple[int, int]
) -> None:
    case = cases.Case("accuracy", "fwd", "fp32", 2, *lengths, 4, 2, 16, causal)
    inputs = case.inputs("cpu")
    whole = exactness.oracle(*inputs, causal)
    monkeypatch.setattr(exactness, "_ROWS", 16)
    torch.testing.assert_close(exactness.oracle(*inputs, causal), whole)


def test_forcing_the_sm80_path_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    for before in (None, "cpu"):
        monkeypatch.delenv(peers.BACKEND, raising=False)
        if before:
            monkeypatch.setenv(peers.BACKEND, before)
        with peers.forced_sm80():
            assert os.environ[peers.BACKEND] == "sm80"
        assert os.environ.get(peers.BACKEND) == before


def test_absent_peers_are_named_with_a_reason() -> None:
    found, absent = peers.available("cpu")
    assert list(found) == ["mini", "sdpa-flash"]
    assert sorted([*found, *absent]) == sorted(peers.NAMES)
    assert all(absent.values())


def test_rows_survive_the_file(tmp_path: Path) -> None:
    path = tmp_path / "new" / "rows.csv"
    rows = [measured("mini", 600.0), measured("fa4", 550.0)]
    for row in rows:
        results.append(path, [row])
    assert path.read_text().splitlines()[0] == HEADER
    assert results.read(path)[1].tflops == 550.0
    assert [row.impl for row in results.read(path)] == ["mini", "fa4"]
    path.write_text("date,commit\n")
    with pytest.raises(ValueError, match="header"):
        results.read(path)


def test_estimate_is_the_larger_one_and_only_where_measured() -> None:
    rows = {"sdpa-cudnn": measured("sdpa-cudnn", 500.0), "fa4": measured("fa4", 560.0)}
    assert estimates.fa3_tflops(rows) == pytest.approx(max(500 * 1.27, 560 * 1.11))
    elsewhere = {name: replace(row, gpu="NVIDIA A100") for name, row in rows.items()}
    assert estimates.fa3_tflops(elsewhere) is None


def test_table_shows_the_newest_run_its_best_and_its_losses() -> None:
    old = replace(RUN, date="2024-01-01T00:00:00Z")
    rows = [measured("mini", 900.0, run=old), measured("mini", 600.0), measured("fa4", 620.0)]
    text = table.render(table.newest(rows))
    assert "| 128 | yes | 4096 | 4 | 16 | 600 | 620 | **688** | 0.87 |" in text
    assert RUN.date in text and RUN.gpu in text and old.date not in text


def test_readme_table_is_what_the_results_give() -> None:
    readme = (machine.ROOT / "README.md").read_text(encoding="utf-8")
    assert table.insert(readme, table.render(table.newest(table.load()))) == readme


def test_run_measures_and_writes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measure, "_OVERHEAD_CALLS", 10)
    files = {kind: tmp_path / f"rows.{kind}" for kind in ("csv", "json")}
    options = ["--csv", str(files["csv"]), "--json", str(files["json"]), "--rounds", "1"]
    only = ["--only", "sweep", "overhead", "S=512", "causal=1", "--commit", "handed in"]
    assert run.main([*only, *options]) == 0
    rows = results.read(files["csv"])
    assert {(row.suite, row.direction, row.impl) for row in rows} == {
        (suite, direction, impl)
        for suite, direction in (("cpu", "fwd"), ("cpu", "fwdbwd"), ("overhead", "fwd"))
        for impl in ("mini", "sdpa-flash")
    }
    assert {row.commit for row in rows} == {"handed in"} and len({row.date for row in rows}) == 1
    assert all(row.max_error < 1e-5 for row in rows if row.direction == "fwd")
    assert len(json.loads(files["json"].read_text())) == len(rows)
    assert "absent: fa3" in capsys.readouterr().out


def test_classic_prints_the_profile_and_the_differences(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    small = cases.square("cpu", "fwd", "fp32", (1, 64, 2, 32), causal=False)
    monkeypatch.setattr(cases, "classic", lambda device: [small])
    assert run.main(["--only", "classic", "--rounds", "1", "--profile", str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    assert "| Implementation | CPU Time | CUDA Time |" in shown
    assert "Max difference between torch and mini-flash-attn" in shown
    assert "No official flash-attn package" in shown
    assert (tmp_path / "mini.json").exists()


def test_wrong_results_are_not_timed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = peers.Implementation(lambda q, k, v, causal: torch.zeros_like(q))
    monkeypatch.setattr(peers, "available", lambda device: ({"mini": broken}, {}))
    few = list(exactness.cases("cpu"))[:2]
    monkeypatch.setattr(exactness, "cases", lambda device: few)
    assert run.main(["--only", "accuracy", "overhead"]) == 1
    assert "WRONG" in capsys.readouterr().out


def test_plot_draws_what_has_two_lengths(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    path = tmp_path / "sweep.png"
    assert not plot.plot([measured("mini", 600.0)], path)
    assert plot.plot([measured("mini", 600.0), measured("mini", 500.0, seqlen=1024)], path)
    assert path.read_bytes().startswith(b"\x89PNG")


def test_unknown_words_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        run.main(["--only", "sweeep"])
    assert "accuracy, classic, sweep, overhead" in capsys.readouterr().err
