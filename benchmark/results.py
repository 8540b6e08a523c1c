"""The result files: one row a measurement, appended and never edited."""

import csv
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import NamedTuple

from benchmark.cases import CREATE, PRODUCT, Case
from benchmark.machine import Run
from benchmark.timing import Timing


@dataclass(frozen=True)
class Row:
    """One measurement. The fields are the columns of the CSV files, in their order."""

    date: str
    commit: str
    gpu: str
    driver: str
    torch: str
    cutlass_dsl: str
    suite: str
    direction: str
    variant: str
    dtype: str
    batch: int
    seqlen_q: int
    seqlen_k: int
    heads_q: int
    heads_k: int
    head_dim: int
    causal: int
    impl: str
    ms: float
    spread: float
    tflops: float | None
    gbps: float | None
    max_error: float | None


HEADER = [field.name for field in fields(Row)]


class Metric(NamedTuple):
    """How the rows of a suite are shown, and which end of the scale is the better one."""

    unit: str
    of: Callable[[Row], float]
    text: Callable[[Row], str]
    best: Callable[[Iterable[float]], float]

    def ratio(self, one: float, other: float) -> float:
        """How many times as fast one is as the other."""
        return one / other if self.best is max else other / one


_HOST_TIME = Metric("µs", lambda row: 1e3 * row.ms, lambda row: f"{1e3 * row.ms:.1f}", min)
_WORK_RATE = Metric("TFLOP/s", lambda row: row.tflops, lambda row: f"{row.tflops:.0f}", max)
_TIME = Metric("ms", lambda row: row.ms, lambda row: f"{row.ms:.3f}", min)
_METRICS = {
    "prefill": _WORK_RATE,
    "varlen": _WORK_RATE,
    "scores": _TIME,
    "masks": _TIME,
    "models": Metric("µs", lambda row: 1e3 * row.ms, lambda row: f"{1e3 * row.ms:.1f}", min),
    "decode": Metric(
        "GB/s (µs)", lambda row: row.gbps, lambda row: f"{row.gbps:.0f} ({1e3 * row.ms:.1f})", max
    ),
    "cpu": Metric("ms", lambda row: row.ms, lambda row: f"{row.ms:.1f}", min),
    "overhead": _HOST_TIME,
}
SUITES = tuple(_METRICS)
DIRECTIONS = {"fwd": "forward", "bwd": "backward", "fwdbwd": "forward + backward"}


def metric(row: Row) -> Metric:
    """What counts in a row."""
    if row.variant == PRODUCT:
        return _WORK_RATE
    return _HOST_TIME if is_host_time(row) else _METRICS[row.suite]


def is_host_time(case: Case | Row) -> bool:
    """Whether the time is what the host spends on a call, rather than the device."""
    if case.variant == PRODUCT:
        return False
    return case.suite == "overhead" or case.suite == "decode" and case.variant.startswith("eager")


def row(run: Run, case: Case, impl: str, timing: Timing, max_error: float | None) -> Row:
    """Puts a measurement together. The host's time has no throughput, nor has the making of a mask."""
    facts = asdict(run) | asdict(case) | timing._asdict()
    facts |= {"causal": int(case.causal), "impl": impl, "max_error": max_error}
    no_products = is_host_time(case) or case.variant == CREATE
    facts["tflops"] = None if no_products else case.flops / timing.ms / 1e9
    facts["gbps"] = None if no_products or case.variant == PRODUCT else case.kv_bytes / timing.ms / 1e6
    return Row(**{name: facts[name] for name in HEADER})


def append(path: Path, rows: Iterable[Row]) -> None:
    """Adds rows to a file, which gets its header if it is new."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        if file.tell() == 0:
            writer.writerow(HEADER)
        writer.writerows([_text(value) for value in asdict(one).values()] for one in rows)


def read(path: Path) -> list[Row]:
    """The rows of a file; ValueError if its header is another."""
    with path.open(newline="") as file:
        reader = csv.DictReader(file)
        if reader.fieldnames != HEADER:
            raise ValueError(f"{path}: the header must be {','.join(HEADER)}")
        return [Row(**{f.name: _parse(f.type, line[f.name]) for f in fields(Row)}) for line in reader]


def _text(value: object) -> str:
    if value is None:
        return ""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _parse(kind: type, text: str) -> object:
    if kind in (str, int, float):
        return kind(text)
    return float(text) if text else None
