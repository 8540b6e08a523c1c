"""The benchmark on a CPU: its arithmetic, its result files, and what is made of them."""

import json
import os
import re
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmark import (
    cases,
    choices,
    compare,
    exactness,
    functions,
    machine,
    measure,
    peers,
    plot,
    results,
    run,
    table,
    timing,
    workloads,
)

HEADER = (
    "date,commit,gpu,driver,torch,cutlass_dsl,suite,direction,variant,dtype,batch,seqlen_q,"
    "seqlen_k,heads_q,heads_k,head_dim,causal,impl,ms,spread,tflops,gbps,max_error"
)
RUN = machine.Run("2025-01-02T03:04:05Z", "abc", "NVIDIA H100 80GB HBM3", "580", "2.11.0", "4.8.1")


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def measured_case(seqlen: int = 4096) -> cases.Case:
    return cases.square("prefill", "fwd", "bf16", (16384 // seqlen, seqlen, 16, 128), causal=True)


def measured(impl: str, tflops: float, seqlen: int = 4096, run: machine.Run = RUN) -> results.Row:
    case = measured_case(seqlen)
    return results.row(run, case, impl, timing.Timing(case.flops / tflops / 1e9, 0.01), 2e-3)


def test_flops_and_bytes() -> None:
    full = cases.Case("prefill", "fwd", "bf16", 2, 3, 5, 8, 2, 64, causal=False)
    assert full.flops == 4 * 2 * 8 * 3 * 5 * 64
    assert full.kv_bytes == 2 * 2 * 5 * 2 * 64 * 2
    assert replace(full, causal=True).flops == 4 * 2 * 8 * 64 * (3 * 5 - 3 * 3 / 2)
    square = replace(full, seqlen_q=5)
    assert replace(square, causal=True).flops == square.flops / 2
    windowed = replace(square, causal=True, window=2)
    assert windowed.flops == 4 * 2 * 8 * 64 * (5 * 5 / 2 - 3 * 3 / 2)
    assert cases.product().flops == 2 * 8192**3
    assert replace(full, direction="bwd").flops == 2.5 * full.flops
    assert replace(full, direction="fwdbwd").flops == 3.5 * full.flops


def test_sweep_holds_tokens_and_hidden_size() -> None:
    points = list(cases.sweep("cuda"))
    assert len(set(points)) == 36
    assert {(case.batch * case.seqlen_q, case.heads_q * case.head_dim) for case in points} == {(16384, 2048)}


def test_packed_sequences_cost_what_each_of_them_costs() -> None:
    case = cases.Case("varlen", "fwd", "bf16", 2, 5, 5, 4, 4, 64, causal=True, lengths=(5, 2))
    assert case.flops == 4 * 4 * 64 * (5 * 5 + 2 * 2) / 2
    assert case.kv_bytes == 2 * 7 * 4 * 64 * 2
    assert [tensor.shape for tensor in case.inputs("cpu")] == [(7, 4, 64)] * 3


def test_varlen_cases_hold_tokens() -> None:
    timed = list(cases.varlen("cuda"))
    assert {(case.direction, case.variant) for case in timed} == {
        (direction, variant) for direction in ("fwd", "bwd") for variant in ("plain", "longtail")
    }
    for case in timed:
        assert sum(case.lengths) == 32768 and len(case.lengths) == case.batch
        assert max(case.lengths) == case.seqlen_q == case.seqlen_k
    lengths = sorted(cases.longtail(32768, 16384))
    assert lengths[len(lengths) // 2] < 1000 < 5000 < lengths[-1]
    assert max(cases.longtail(32768, 1000)) == 1000


def test_decode_speeds_are_those_of_the_quoted_times() -> None:
    """The times of cuDNN in µs and the TB/s that were read off for them."""
    quoted = ((67.2, 2.25), (213.4, 2.83), (794.1, 3.04), (26.8, 1.25))
    quoted += ((193.1, 2.78), (101.9, 2.63), (706.8, 3.04), (190.0, 2.83))
    *plain, eager = cases.decode("cuda")
    for case, (us, speed) in zip(plain, quoted, strict=True):
        row = results.row(RUN, case, "sdpa-cudnn", timing.Timing(us / 1e3, 0.0), None)
        assert row.gbps / 1e3 == pytest.approx(speed, abs=0.01)
    row = results.row(RUN, eager, "mini", timing.Timing(0.02, 0.0), None)
    assert (row.tflops, row.gbps) == (None, None)
    assert results.metric(row).of(row) == 20.0


@pytest.mark.parametrize(
    "make", [cases.backward, cases.models, cases.varlen, cases.decode, cases.scores, cases.masks]
)
def test_a_cpu_runs_only_what_is_made_for_it(make: Callable) -> None:
    assert not list(make("cpu"))


def tiny_decode(variant: str = "plain") -> cases.Case:
    return cases.Case("decode", "fwd", "fp32", 2, 1, 256, 4, 2, 16, causal=False, variant=variant)


def tiny_varlen(direction: str, lengths: tuple[int, ...]) -> cases.Case:
    shape = (len(lengths), max(lengths), max(lengths), 2, 2, 16)
    return cases.Case("varlen", direction, "fp32", *shape, causal=True, lengths=lengths)


def test_decoding_rotates_caches_and_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workloads, "_ROTATED", 3 * tiny_decode().kv_bytes)
    found, _ = peers.available("cpu")
    taking_part = list(workloads.contestants(tiny_decode(), found, "cpu"))
    assert [one.name for one in taking_part] == ["mini", "sdpa-flash"] + [
        f"mini paged{size}" for size in (1, 16, 64, 256)
    ]
    for one in taking_part:
        assert one.problems == 3
        with one.scope():
            assert one.error(one.call()) < 1e-5
    eager = workloads.contestants(tiny_decode("eager"), found, "cpu")
    names = ["mini eager", "sdpa-flash eager", "mini eager paged16", "mini eager append"]
    for one, name in zip(eager, names, strict=True):
        assert (one.name, one.problems) == (name, 1)
        out = one.call()
        assert one.error is None or one.error(out) < 1e-5


@pytest.mark.parametrize(("lengths", "names"), [((8, 8), ["mini", "mini dense"]), ((3, 9, 1), ["mini"])])
def test_varlen_runs_beside_dense_where_lengths_are_equal(lengths: tuple[int, ...], names: list) -> None:
    found, _ = peers.available("cpu")
    for direction in ("fwd", "bwd"):
        case = tiny_varlen(direction, lengths)
        taking_part = list(workloads.contestants(case, found, "cpu"))
        assert [one.name for one in taking_part] == names
        for one in taking_part:
            result = one.call()
            if direction == "fwd":
                assert one.error is None or one.error(result) < 1e-5
            else:
                assert [gradient.shape for gradient in result] == [(sum(lengths), 2, 16)] * 3


def test_features_run_beside_the_plain_kernel() -> None:
    found = {"mini": peers.Implementation(lambda q, k, v, causal, **options: q * len(options))}
    for direction, features in (("fwd", 3), ("bwd", 4)):
        case = replace(measured_case(seqlen=4096), direction=direction, batch=1, heads_q=1, heads_k=1)
        variants = [one.variant for one in workloads.contestants(case, found, "cpu")]
        assert variants == ["plain", "softcap", "alibi", "dropout", "deterministic"][: 1 + features]
    assert len(list(workloads.contestants(replace(case, head_dim=64), found, "cpu"))) == 1


def test_backward_is_timed_without_the_forward_pass() -> None:
    passes = []

    def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool) -> torch.Tensor:
        passes.append("forward")
        return q * k * v

    for direction, forwards in (("bwd", 1), ("fwdbwd", 3)):
        passes.clear()
        case = cases.square("cpu", direction, "fp32", (1, 4, 2, 16), causal=False)
        (one,) = workloads.contestants(case, {"mini": peers.Implementation(attention)}, "cpu")
        for _ in range(3):
            assert len(one.call()) == 3
        assert len(passes) == forwards


def test_what_no_graph_can_hold(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    def refuse(call: timing.Call) -> timing.Call:
        raise RuntimeError("no capture")

    monkeypatch.setattr(timing, "captured", refuse)
    one = workloads.Contestant("fa4", "plain", lambda: None, nullcontext)
    assert measure._timed_call(tiny_varlen("bwd", (8,)), one, "cuda") is one.call
    assert "fa4 is timed without a graph: RuntimeError: no capture" in capsys.readouterr().out
    with pytest.raises(RuntimeError, match="no capture"):
        measure._timed_call(tiny_decode(), one, "cuda")
    for by_calls in (tiny_decode("eager"), measured_case()):
        assert measure._timed_call(by_calls, one, "cuda") is one.call


def test_who_fails_is_named_and_the_others_are_timed(capsys: pytest.CaptureFixture) -> None:
    def fail(*args: object, **options: object) -> torch.Tensor:
        raise NotImplementedError("decode\nis not there")

    impls = {
        name: peers.Implementation(fail, decode=decode)
        for name, decode in (("mini", fail), ("fa4", peers.available("cpu")[0]["mini"].decode))
    }
    result = measure.measure(tiny_decode(), impls, RUN, "cpu", rounds=1)
    assert result.failed == ["mini", "mini paged1", "mini paged16", "mini paged64", "mini paged256"]
    assert [row.impl for row in result.rows] == ["fa4"]
    assert "mini paged16 fails: NotImplementedError: decode\n" in capsys.readouterr().out


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
    timing.in_turn(timed, clock, rounds=20)
    rounds = ["".join(order[i : i + 3]) for i in range(len(order) - 60, len(order), 3)]
    assert all(sorted(names) == ["a", "b", "c"] for names in rounds) and len(set(rounds)) > 3


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


def test_models_are_many_and_each_has_a_name_of_its_own() -> None:
    shapes = cases.models("cuda")
    assert len({case.variant for case in shapes}) == len(shapes) >= 40
    assert sum(case.direction == "bwd" and case.heads_q > case.heads_k for case in shapes) >= 8
    for case in shapes:
        assert case.heads_q % case.heads_k == 0
        assert (case.window is not None) == ("window" in case.variant)
        assert case.window is None or case.variant.endswith(f"window{case.window}") and case.causal
    sections, timed = choices.sections_and_cases(["models", "variant=falcon-7b-train-4k"], "cuda")
    assert sections == ["models"] and [case.heads_q for case in timed] == [71]


@pytest.mark.parametrize("direction", ["fwd", "bwd"])
@pytest.mark.parametrize(("queries", "window"), [(40, None), (40, 7), (3, None)])
def test_models_are_measured_and_a_wrong_peer_is_named(
    direction: str,
    queries: int,
    window: int | None,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    shape = (2, queries, 64, 6, 2, 16)
    case = cases.Case("models", direction, "fp32", *shape, True, "tiny", window)
    monkeypatch.setattr(workloads, "_ROTATED", 3 * case.kv_bytes)
    monkeypatch.setattr(exactness, "_ROWS", 16)
    found, _ = peers.available("cpu")
    right = found["mini"].call
    found |= {"fa4": peers.Implementation(lambda q, *rest, **options: right(1.3 * q, *rest, **options))}
    result = measure.measure(case, found, RUN, "cpu", rounds=1)
    can = ["mini", "sdpa-flash"] if window is None else ["mini"]
    assert [row.impl for row in result.rows] == can
    assert all(row.max_error < 1e-4 and row.variant == "tiny" for row in result.rows)
    assert (
        "fa4 tiny" in result.failed
        and "fa4 tiny is WRONG, not raced: the largest error of" in capsys.readouterr().out
    )


def test_table_of_models_has_names_losses_and_shares() -> None:
    case = cases.Case("models", "bwd", "bf16", 1, 4096, 4096, 8, 1, 128, True, "llama")
    rows = [
        results.row(RUN, case, impl, timing.Timing(ms, 0.0), 1e-3)
        for impl, ms in (("mini", 0.5), ("fa4", 0.25))
    ]
    rows.append(results.row(RUN, cases.product(), "matmul", timing.Timing(2 * 8192**3 / 700e9, 0.0), None))
    runs = compare.newest(rows)
    assert [len(of_kind) for of_kind in runs] == [2]
    text = table.render(runs, compare.products(rows))
    assert "| Shapes of models, backward | llama: D 128, causal, S 4096, B 1, H 8/1 | fa4 | 0.50 |" in text
    share = case.flops / 0.5e-3 / 700e12
    assert f"| 128 | yes | 4096 | 1 | 8/1 | llama | 500.0 | **250.0** | 0.50 | {share:.2f} |" in text


def tiny(case: cases.Case, seqlen: int) -> cases.Case:
    sizes = {"seqlen_q": seqlen, "seqlen_k": seqlen, "heads_q": 4, "heads_k": 4, "head_dim": 16}
    return replace(case, dtype="fp32", batch=2, **sizes)


def uncompiled_flex(monkeypatch: pytest.MonkeyPatch) -> peers.Implementation:
    monkeypatch.setattr(peers, "_compiled", lambda attention: attention)
    create = peers.flex.create_block_mask
    return peers.Implementation(functions=peers._flex_functions, create_block_mask=create)


@pytest.mark.parametrize("direction", ["fwd", "bwd"])
@pytest.mark.parametrize(("make", "seqlen"), [(cases.scores, 96), (cases.masks, 1280)])
def test_functions_are_measured_beside_the_plain_kernel(make: Callable, seqlen: int, direction: str) -> None:
    """1280: ten blocks, and more keys than a window shows."""
    found, _ = peers.available("cpu")
    shapes = {
        (case.causal, case.beside): tiny(case, seqlen)
        for case in make("cuda")
        if case.direction == direction and case.variant == "plain"
    }
    for case in shapes.values():
        result = measure.measure(case, found, RUN, "cpu", rounds=1)
        assert [row.variant for row in result.rows] == ["plain", *case.beside] and not result.failed
        assert all(row.impl == "mini" and row.max_error < 1e-5 for row in result.rows)


@pytest.mark.filterwarnings("ignore:.*flex_attention called without torch.compile")
@pytest.mark.parametrize(("make", "seqlen"), [(cases.scores, 128), (cases.masks, 1280)])
def test_flex_computes_what_the_oracle_does(
    make: Callable, seqlen: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """But for blocks10: uncompiled, it does not look at the lists of blocks."""
    found = {"flex": uncompiled_flex(monkeypatch)}
    cases_with_peers = [case for case in make("cuda") if case.direction == "fwd" and not case.ours_alone]
    for case in {case.causal: tiny(case, seqlen) for case in cases_with_peers if case.beside}.values():
        ours = {"identity", "scale-bias", *(x for x in case.beside if x.endswith(("-builtin", "-varlen")))}
        ours |= {"plain"} if case.suite == "masks" else set()
        taking_part = list(workloads.contestants(case, found, "cpu"))
        assert [one.variant for one in taking_part] == [x for x in ("plain", *case.beside) if x not in ours]
        assert all(one.error(one.call()) < 1e-5 for one in taking_part if one.variant != "blocks10")
        assert not list(workloads.contestants(replace(case, ours_alone=True), found, "cpu"))


def test_making_a_mask_is_a_case(monkeypatch: pytest.MonkeyPatch) -> None:
    (case,) = (case for case in cases.masks("cuda") if case.variant == cases.CREATE)
    found = peers.available("cpu")[0] | {"flex": uncompiled_flex(monkeypatch)}
    case = replace(case, seqlen_q=256, seqlen_k=256)
    ours, theirs = (one.call() for one in workloads.contestants(case, found, "cpu"))
    assert torch.equal(ours.kv_num_blocks, theirs.kv_num_blocks)
    rows = measure.measure(case, found, RUN, "cpu", rounds=1).rows
    assert [(row.impl, row.variant, row.tflops, row.gbps) for row in rows] == [
        ("mini", "create", None, None),
        ("flex", "create", None, None),
    ]
    one = workloads.Contestant("mini", cases.CREATE, lambda: None, nullcontext)
    assert measure._timed_call(case, one, "cuda") is one.call


def test_cases_of_functions_are_few_and_can_be_chosen() -> None:
    every = [case for make in (cases.scores, cases.masks) for case in make("cuda")]
    assert len(set(every)) == len(every) <= 40
    assert {(case.head_dim, case.heads_q) for case in every if case.beside} == {(64, 32), (128, 16)}
    words = ["scores", "masks", "variant=relative-bias,window1024", "D=128", "S=4096", "direction=bwd"]
    _, timed = choices.sections_and_cases(words, "cuda")
    assert [(case.causal, case.beside) for case in timed] == [
        (False, ("relative-bias",)),
        (True, ("relative-bias",)),
        (False, ("window1024",)),
    ]


def test_flops_of_a_mask_are_those_of_its_pairs() -> None:
    case = tiny(next(cases.masks("cuda")), 1280)
    shares = {
        variant: functions.visible(functions.of(case, variant, "cpu"), case, "cpu") for variant in case.beside
    }
    starts = torch.tensor(functions.document_starts(1280))
    assert len(starts) == 9 and starts.diff().min() > 0
    assert shares["documents"] == shares["documents-varlen"] == starts.diff().square().sum() / 1280**2
    assert shares["window1024"] == (1280 * 1281 - 256 * 257) / 2 / 1280**2
    assert shares["dilated"] == 1 / 4 and shares["blocks10"] == 1 / 10
    assert replace(case, visible=0.25).flops == case.flops / 4


def test_table_of_functions_has_ratios_to_plain_and_to_twins() -> None:
    def timed(suite: str, variant: str, impl: str, ms: float, seqlen: int = 4096) -> results.Row:
        shape = (1, seqlen, seqlen, 16, 16, 128)
        case = cases.Case(suite, "fwd", "bf16", *shape, causal=False, variant=variant)
        return results.row(RUN, case, impl, timing.Timing(ms, 0.0), None)

    rows = [timed("scores", "plain", "mini", 1.0), timed("scores", "plain", "flex", 2.0)]
    rows += [timed("scores", "softcap", "mini", 1.25), timed("scores", "softcap", "flex", 1.0)]
    rows += [timed("masks", name, "mini", ms) for name, ms in (("plain", 8.0), ("documents", 2.0))]
    rows += [timed("masks", "documents-varlen", "mini", 1.5), timed("masks", "prefix", "mini", 4.0)]
    rows += [timed("masks", "documents", "mini", 1.0, seqlen=512), timed("masks", "prefix", "flex", 5.0)]
    text = table.render(compare.newest(rows))
    losses, scores, masks = text.split("\n\n**")
    assert "| Functions of scores, forward | softcap: D 128, full, S 4096, B 1, H 16 | flex | 0.80" in losses
    assert "| function | mini | flex | mini / best peer | mini / plain |" in scores
    assert "| 128 | no | 4096 | 1 | 16 | plain | **1.000** | 2.000 | 2.00 | – |" in scores
    assert "| 128 | no | 4096 | 1 | 16 | softcap | 1.250 | **1.000** | 0.80 | 0.80 |" in scores
    assert "| mask | mini | flex | mini / best peer | mini / its twin |" in masks
    assert "| 128 | no | 4096 | 1 | 16 | documents | **2.000** | – | – | 0.75 |" in masks
    assert "| 128 | no | 512 | 1 | 16 | documents | **1.000** | – | – | – |" in masks
    assert "| 128 | no | 4096 | 1 | 16 | documents-varlen | **1.500** | – | – | 5.33 |" in masks
    assert "| 128 | no | 4096 | 1 | 16 | prefix | **4.000** | 5.000 | 1.25 | 2.00 |" in masks


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


def test_table_shows_the_newest_run_its_best_and_its_losses() -> None:
    old = replace(RUN, date="2024-01-01T00:00:00Z")
    rows = [measured("mini", 900.0, run=old), measured("mini", 600.0), measured("fa4", 620.0)]
    text = table.render(compare.newest(rows))
    assert "| 128 | yes | 4096 | 4 | 16 | 600 | **620** | 0.97 |" in text
    assert RUN.date in text and RUN.gpu in text and old.date not in text


def test_table_of_features_gives_shares_of_the_plain_speed() -> None:
    rows = [
        measured("mini", 600.0),
        measured("fa4", 500.0),
        replace(measured("mini", 480.0), variant="alibi"),
    ]
    speeds, features = table.render(compare.newest(rows)).split("\n\n**")
    assert "alibi" not in speeds and "| **600** | 500 | 1.20 |" in speeds
    assert "| D | causal | S | B | H | mini | alibi |" in features
    assert "| 128 | yes | 4096 | 4 | 16 | 600 | 480 [0.80] |" in features


def test_table_of_decoding_has_pages() -> None:
    def decoded(impl: str, us: float, variant: str = "plain") -> results.Row:
        case = cases.Case("decode", "fwd", "bf16", 1, 1, 8192, 32, 8, 128, False, variant=variant)
        return results.row(RUN, case, impl, timing.Timing(us / 1e3, 0.0), None)

    rows = [decoded("mini", 20.0), decoded("sdpa-cudnn", 26.8), decoded("mini", 20.5, "paged16")]
    eager = [decoded("mini", 15.0, "eager"), decoded("sdpa-cudnn", 30.0, "eager")]
    eager.append(decoded("mini", 16.0, "eager append"))
    device, host = table.render(compare.newest(rows + eager)).split("\n\n**")
    assert "| mini | mini paged16 | sdpa-cudnn | mini / best peer |" in device
    cells = "**1678 (20.0)** | 1637 (20.5) | 1252 (26.8) | 1.34"
    assert f"| 128 | no | 1/8192 | 1 | 32/8 | {cells} |" in device
    assert "host time of one eager call: µs" in host
    assert "| 128 | no | 1/8192 | 1 | 32/8 | **15.0** | 16.0 | 30.0 | 2.00 |" in host


def test_table_of_varlen_has_dense_beside_and_longtail_below() -> None:
    rows = []
    for case in cases.varlen("cuda"):
        rows.append(results.row(RUN, case, "mini", timing.Timing(1.0, 0.0), None))
        if case.variant == "plain":
            dense = replace(case, variant="dense")
            rows.append(results.row(RUN, dense, "mini", timing.Timing(0.8, 0.0), None))
    forward, backward = table.render(compare.newest([*rows, measured("mini", 600.0)])).split("\n\n**")[1:]
    assert "Sequences of different lengths in one batch, backward, bf16" in backward
    assert "| mini | mini dense | mini / best peer |" in forward
    assert "| 128 | yes | 4096 | 8 | 16 | **550** | 687 | – |" in forward
    assert "| 128 | yes | up to 5010 | 34 | 16 |" in forward


def test_summary_tells_the_worst_case_of_a_kind() -> None:
    rows = [measured(impl, speed) for impl, speed in (("mini", 760.0), ("mini-sm80", 900.0), ("fa4", 620.0))]
    rows += [measured("mini", 600.0, seqlen=1024), measured("sdpa-cudnn", 630.0, seqlen=1024)]
    rows += [replace(row, head_dim=96) for row in rows if row.seqlen_q == 1024 and row.impl == "mini"]
    rows += [replace(row, suite="cpu", driver="", dtype="fp32") for row in rows]
    lines = table.summary(compare.kinds(compare.newest(rows))).splitlines()[2:]
    assert lines == [
        "| Forward | 2 | 1 | 0.95 | 1.09 | 1.23 | D 128, causal, S 1024, B 16, H 16: sdpa-cudnn |",
        "| CPU | 2 | 1 | 0.95 | 1.09 | 1.23 | D 128, causal, S 1024, B 16, H 16: sdpa-cudnn |",
    ]


def test_pages_show_what_the_results_give() -> None:
    """Else: python benchmark/table.py."""
    rows = compare.load()
    runs = compare.newest(rows)
    for path, tables in (
        (table.README, table.summary(compare.kinds(runs))),
        (table.TABLES, table.render(runs, compare.products(rows))),
    ):
        text = path.read_text(encoding="utf-8")
        assert table.insert(text, tables) == text
    with pytest.raises(ValueError, match="markers"):
        table.insert("no markers", "")


def test_help_writes_nothing(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(Path, "write_text", None)
    for main in (table.main, plot.main):
        with pytest.raises(SystemExit):
            main(["--help"])
        assert "benchmark/results" in capsys.readouterr().out.replace("\n", " ")


def test_run_measures_and_writes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measure, "_HOST_CALLS", 10)
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
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """And nothing on stderr, not even PyTorch's profiler."""
    small = cases.square("cpu", "fwd", "fp32", (1, 64, 2, 32), causal=False)
    monkeypatch.setattr(cases, "classic", lambda device: [small])
    assert run.main(["--only", "classic", "--rounds", "1", "--profile", str(tmp_path)]) == 0
    shown, noise = capfd.readouterr()
    assert noise == ""
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


def test_picture_shows_the_newest_runs(tmp_path: Path) -> None:
    """Else: python benchmark/plot.py. Another matplotlib may draw other paths, but not other words."""
    pytest.importorskip("matplotlib")
    runs = compare.newest(compare.load())
    first, second = tmp_path / "first.svg", tmp_path / "second.svg"
    for path in (first, second):
        plot.picture(runs, path)
    assert first.read_bytes() == second.read_bytes()
    assert words(first) == words(plot.PICTURE)
    assert all(run[0].date[:10] in words(first)[-1] for run in runs)


def words(picture: Path) -> list[str]:
    return re.findall(r"<text[^>]*>([^<]*)<", picture.read_text(encoding="utf-8"))


@pytest.mark.parametrize(
    "arguments, message",
    [
        (
            "--only sweeep",
            "'sweeep' is none of accuracy, classic, sweep, backward, models, varlen, decode, scores, masks",
        ),
        ("--only size=3", "'size' is none of D, S, causal, direction, variant"),
        ("--only S=512,77", "no case has S=77: S is 512, 1024, 4096"),
        (
            "--only overhead D=64",
            "D filters sweep, backward, models, varlen, decode, scores, masks alone, and none is chosen",
        ),
        ("--only overhead backward", "backward: nothing of this runs on a CPU"),
        ("--only scores masks", "scores, masks: nothing of this runs on a CPU"),
        ("--only models", "models: nothing of this runs on a CPU"),
        ("--only memory", "memory: nothing of this runs on a CPU"),
        ("--impls mini,fa9", "'fa9' is none of mini, mini-sm80"),
        ("--impls mini,fa3", "fa3 is not here: needs a GPU"),
        ("--rounds 0", "--rounds: must be a whole number from 1 on, not 0"),
        ("--rounds few", "--rounds: must be a whole number from 1 on, not few"),
        ("--csv {folder}", "--csv: cannot write {folder}: Is a directory"),
        ("--csv {file}", "--csv: {file} is no file of results: {file}: the header must be date,"),
        ("--json {file}/rows.json", "--json: cannot write {file}/rows.json: File exists"),
        ("--plot {folder}/sweep.word", "--plot: sweep.word must end in one of .eps, "),
        ("--plot {folder}/sweep.png --only overhead", "nothing to draw: a line takes two lengths"),
        ("--plot {folder}/sweep.png --only sweep S=512", "nothing to draw: a line takes two lengths"),
        ("--csv {folder}/rows.csv --only accuracy", "--csv: nothing is timed"),
        ("--profile {file} --only classic", "--profile: cannot make the folder {file}: File exists"),
        (
            "--profile {folder} --only sweep",
            "--profile: the classic case, of which the traces are, is not run",
        ),
    ],
)
def test_wrong_choices_are_refused_before_anything_runs(
    arguments: str,
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    if "--plot" in arguments:
        pytest.importorskip("matplotlib")
    names = {"folder": str(tmp_path), "file": str(tmp_path / "file")}
    Path(names["file"]).write_text("date,commit\n")
    monkeypatch.setattr(machine, "start_run", None)
    with pytest.raises(SystemExit) as stopped:
        run.main(arguments.format(**names).split())
    assert stopped.value.code == 2
    assert message.format(**names) in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_plot_needs_matplotlib(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(choices.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(machine, "start_run", None)
    with pytest.raises(SystemExit):
        run.main(["--plot", "sweep.png"])
    assert "--plot: needs matplotlib" in capsys.readouterr().err


def test_a_filter_that_leaves_a_section_nothing() -> None:
    with pytest.raises(ValueError, match="no case of backward has D=64 S=512"):
        choices.sections_and_cases(["sweep", "backward", "D=64", "S=512"], "cuda")
    sections, timed = choices.sections_and_cases(["D=64", "S=512"], "cuda")
    assert sections == choices.SECTIONS
    assert [case for case in timed if case.suite not in ("overhead", "models") and case.dtype != "fp16"] == [
        case for case in cases.sweep("cuda") if (case.head_dim, case.seqlen_k) == (64, 512)
    ]


def test_an_interrupted_run_saves_what_was_measured(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("matplotlib")
    done: list[cases.Case] = []

    def two_cases(case: cases.Case, *_: object) -> measure.Measured:
        if len(done) == 2:
            raise KeyboardInterrupt
        done.append(case)
        return measure.Measured([results.row(RUN, case, "mini", timing.Timing(1.0, 0.1), None)], [])

    monkeypatch.setattr(run, "measure", two_cases)
    files = [tmp_path / "new" / name for name in ("rows.csv", "rows.json", "sweep.png")]
    options = [word for path in files for word in (f"--{path.suffix[1:]}".replace("png", "plot"), str(path))]
    assert run.main(["--only", "sweep", *options]) == 130
    assert len(results.read(files[0])) == len(json.loads(files[1].read_text())) == 2
    assert files[2].read_bytes().startswith(b"\x89PNG")
    said = f"Interrupted.\n2 measurements are in {', '.join(map(str, files))}.\n"
    assert capsys.readouterr().out.endswith(said)


def test_nothing_is_written_where_nothing_was_measured(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: object) -> measure.Measured:
        raise KeyboardInterrupt

    monkeypatch.setattr(run, "measure", interrupt)
    assert run.main(["--only", "sweep", "--json", str(tmp_path / "rows.json")]) == 130
    assert capsys.readouterr().out.endswith("Interrupted.\n") and not list(tmp_path.iterdir())


def test_line_shows_the_spread() -> None:
    case = measured_case()
    rows = [
        results.row(RUN, case, impl, timing.Timing(case.flops / tflops / 1e9, spread), None)
        for impl, tflops, spread in (("mini", 600.0, 0.034), ("fa4", 500.0, 0.2), ("fa2", 300.0, 0.0))
    ]
    rows.append(
        results.row(RUN, replace(case, variant="alibi"), "mini", timing.Timing(rows[0].ms * 2, 0.01), None)
    )
    expected = "mini 600* ~3% | fa4 500 ~20% | fa2 300 | mini alibi 300 ~1% [0.500] TFLOP/s"
    assert measure.line(rows) == expected
