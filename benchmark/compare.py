"""The newest runs in benchmark/results, case by case: who was how fast. For table.py and plot.py."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from benchmark import results
from benchmark.cases import PRODUCT
from benchmark.machine import ROOT
from benchmark.results import DIRECTIONS, SUITES, Row, metric
from benchmark.workloads import PAGE_SIZES

# Variants of ours that stand beside the plain one, as others have no such function; cases of their own are
# the variants that all implementations run.
FEATURES = ("softcap", "alibi", "dropout", "deterministic")
BESIDE = ("dense", *(f"paged{size}" for size in PAGE_SIZES), "eager paged16", "eager append")
# Whose rows are a case for each variant; their variants are compared with one another, too.
OF_FUNCTIONS = ("scores", "masks")
# What a variant is compared with, if not with the plain kernel.
_TWINS = {
    "documents": "documents-varlen",
    "documents-causal": "documents-causal-varlen",
    "window1024": "window1024-builtin",
}


class Line(NamedTuple):
    """One case of one run."""

    case: Row  # any of its rows
    rows: Mapping[str, Row]  # of an implementation, or of one of our variants

    @property
    def speeds(self) -> dict[str, float]:
        """What the implementations reached, in the unit of the metric."""
        return {name: metric(row).of(row) for name, row in self.rows.items() if name not in BESIDE}

    @property
    def peer(self) -> str | None:
        """The fastest of the others; None if ours ran alone, or did not run."""
        others = {name: speed for name, speed in self.speeds.items() if not name.startswith("mini")}
        if "mini" not in self.rows or not others:
            return None
        best = metric(self.case).best(others.values())
        return next(name for name, speed in others.items() if speed == best)

    @property
    def ratio(self) -> float | None:
        """How many times as fast as the fastest of the others ours is."""
        return self.ratio_to(self.peer) if self.peer else None

    def ratio_to(self, name: str) -> float:
        """How many times as fast as `name` ours is."""
        return metric(self.case).ratio(self.speeds["mini"], self.speeds[name])


def load(folder: Path = ROOT / "benchmark" / "results") -> list[Row]:
    """All rows of all result files."""
    return [row for path in sorted(folder.glob("*.csv")) for row in results.read(path)]


def newest(rows: Sequence[Row]) -> list[list[Row]]:
    """The rows of the newest run of each kind: suite, direction and data type, the host's times apart.

    Runs are not mixed, since machines differ: a partial run hides the cases that it lacks.
    """
    kinds: dict[tuple, list[Row]] = {}
    for row in rows:
        if row.variant == PRODUCT:
            continue
        kind = (SUITES.index(row.suite), list(DIRECTIONS).index(row.direction))
        kinds.setdefault((*kind, results.is_host_time(row), row.dtype), []).append(row)
    runs = []
    for _, of_kind in sorted(kinds.items()):
        date = max(row.date for row in of_kind)
        runs.append([row for row in of_kind if row.date == date])
    return runs


def products(rows: Iterable[Row]) -> dict[str, float]:
    """TFLOP/s of the 8192³ bf16 matrix product in the run of each date."""
    return {row.date: row.tflops for row in rows if row.variant == PRODUCT}


def lines(rows: Iterable[Row]) -> list[Line]:
    """The cases in the order of their facts; those of models, scores and masks by their names, first."""
    cases: dict[tuple, dict[str, Row]] = {}
    for row in rows:
        of_functions = row.suite in OF_FUNCTIONS
        name = row.variant if of_functions or row.suite == "models" else ""
        case = (name, row.head_dim, row.causal, row.seqlen_q, row.seqlen_k)
        case += (row.batch, row.heads_q, row.heads_k)
        beside = row.variant in (*FEATURES, *BESIDE) and not of_functions
        columns = cases.setdefault(case, {})
        columns[row.variant if beside else row.impl] = row
    return [Line(next(iter(cases[case].values())), cases[case]) for case in sorted(cases)]


def without_features(rows: Iterable[Row]) -> list[Line]:
    """The cases, without what features of ours cost."""
    return lines(row for row in rows if row.suite in OF_FUNCTIONS or row.variant not in FEATURES)


def twin(line: Line, others: Iterable[Line]) -> Line | None:
    """The one of the others, ours timed in each, that a variant of scores or masks is compared with."""
    variant = _TWINS.get(line.case.variant, "plain")
    wanted = _facts(replace(line.case, variant=variant))
    there = (other for other in others if "mini" in other.rows and _facts(other.case) == wanted)
    return None if variant == line.case.variant or "mini" not in line.rows else next(there, None)


def _facts(row: Row) -> tuple:
    """What was computed, and in which run."""
    names = "date suite direction variant dtype batch seqlen_q seqlen_k heads_q heads_k head_dim causal"
    return tuple(getattr(row, name) for name in names.split())


def kinds(runs: Iterable[Sequence[Row]]) -> dict[str, list[Line]]:
    """The cases that have a ratio, by what a reader asks about; each kind has one at least."""
    found: dict[str, list[Line]] = {}
    for run in runs:
        for line in without_features(run):
            if line.peer:
                found.setdefault(kind(line.case), []).append(line)
    return dict(sorted(found.items(), key=lambda item: _KINDS.index(item[0])))


_KINDS = (
    "Forward",
    "Backward",
    "Shapes of models, forward",
    "Shapes of models, backward",
    "Forward + backward",
    "Functions of scores, forward",
    "Functions of scores, backward",
    "Masks, forward",
    "Masks, backward",
    "Packed sequences, forward",
    "Packed sequences, backward",
    "Decoding with a KV cache",
    "Host time of a call",
    "CPU",
)


def kind(row: Row) -> str:
    if not row.driver:
        return "CPU"
    if results.is_host_time(row):
        return "Host time of a call"
    if row.suite == "decode":
        return "Decoding with a KV cache"
    direction = DIRECTIONS[row.direction]
    if row.suite in OF_FUNCTIONS:
        return f"{'Masks' if row.suite == 'masks' else 'Functions of scores'}, {direction}"
    if row.suite == "models":
        return f"Shapes of models, {direction}"
    return f"Packed sequences, {direction}" if row.suite == "varlen" else direction.capitalize()
