"""Writes the README's speed tables from the newest runs in benchmark/results: `python table.py`."""

import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmark import estimates, peers, results
from benchmark.cases import pair
from benchmark.machine import ROOT
from benchmark.results import Row, metric
from benchmark.workloads import PAGE_SIZES

START, END = "<!-- speed table -->", "<!-- /speed table -->"
_DIRECTIONS = {"fwd": "forward", "bwd": "backward", "fwdbwd": "forward + backward"}
_SUITES = {
    "prefill": "",
    "varlen": "Sequences of different lengths in one batch, ",
    "decode": "Decoding with a KV cache, ",
    "cpu": "CPU, ",
    "overhead": "Host time of one eager call, ",
}
# Variants of ours that are columns beside the plain one, as others have no such function; lines are
# for the variants that all implementations run.
_FEATURES = ("softcap", "alibi", "dropout", "deterministic")
_BESIDE = ("dense", *(f"paged{size}" for size in PAGE_SIZES), "eager paged16", "eager append")
_COLUMNS = ("mini", *_FEATURES, *_BESIDE, *peers.NAMES[1:], estimates.NAME)

Line = tuple[Row, dict[str, Row]]  # a case, by any of its rows, and the rows by column


def main() -> None:
    """Rewrites the README in place."""
    readme = ROOT / "README.md"
    text = insert(readme.read_text(encoding="utf-8"), render(newest(load())))
    readme.write_text(text, encoding="utf-8")


def load(folder: Path = ROOT / "benchmark" / "results") -> list[Row]:
    """All rows of all result files."""
    return [row for path in sorted(folder.glob("*.csv")) for row in results.read(path)]


def insert(readme: str, table: str) -> str:
    """The text with whatever stands between the markers replaced."""
    before, _, rest = readme.partition(START)
    _, end, after = rest.partition(END)
    if not end:
        raise ValueError(f"the README needs the markers {START} and {END}")
    return f"{before}{START}\n{table}\n{END}{after}"


def newest(rows: Sequence[Row]) -> list[list[Row]]:
    """The rows of the newest run of each kind: suite, direction and data type, the host's times apart.

    Runs are not mixed, since machines differ: a partial run hides the cases that it lacks.
    """
    kinds: dict[tuple, list[Row]] = {}
    for row in rows:
        kind = (results.SUITES.index(row.suite), list(_DIRECTIONS).index(row.direction))
        kinds.setdefault((*kind, results.is_host_time(row), row.dtype), []).append(row)
    runs = []
    for _, of_kind in sorted(kinds.items()):
        date = max(row.date for row in of_kind)
        runs.append([row for row in of_kind if row.date == date])
    return runs


def render(runs: Sequence[Sequence[Row]]) -> str:
    """One Markdown table a run, each under a caption that says what was measured on what.

    What features of ours cost is a table of its own.
    """
    tables = [table for run in runs for table in _tables(run)]
    if not tables:
        return "No measurement is there yet: `python benchmark/run.py` makes one on your machine."
    return "\n\n".join(tables)


def _tables(run: Sequence[Row]) -> Iterator[str]:
    lines = _lines(row for row in run if row.variant not in _FEATURES)
    yield f"{_caption(run[0], '')}\n\n{_speeds(lines)}"
    featured = _lines(row for row in run if row.impl == "mini")
    featured = [line for line in featured if not line[1].keys().isdisjoint(_FEATURES)]
    if featured:
        yield f"{_caption(run[0], ' with features, [share of the plain speed]')}\n\n{_features(featured)}"


def _caption(row: Row, more: str) -> str:
    what = f"{_SUITES[row.suite]}{_DIRECTIONS[row.direction]}, {row.dtype}"
    what += ", host time of one eager call" if row.suite == "decode" and results.is_host_time(row) else ""
    machine = [row.gpu, row.driver and f"driver {row.driver}", f"PyTorch {row.torch}"]
    machine += [row.cutlass_dsl and f"nvidia-cutlass-dsl {row.cutlass_dsl}", f"commit {row.commit}"]
    title = f"{what[0].upper()}{what[1:]}: {metric(row).unit}{more}"
    return f"**{title}**<br>{', '.join(filter(None, machine))}, {row.date}"


def _lines(rows: Iterable[Row]) -> list[Line]:
    """The cases in the order of their facts; where FA3 did not run, its estimate is among the rows."""
    cases: dict[tuple, dict[str, Row]] = {}
    for row in rows:
        case = (row.head_dim, row.causal, row.seqlen_q, row.seqlen_k, row.batch, row.heads_q, row.heads_k)
        beside = row.variant in (*_FEATURES, *_BESIDE)
        columns = cases.setdefault(case, {})
        columns[row.variant if beside else row.impl] = row
    for columns in cases.values():
        estimate = estimates.fa3(columns)
        if estimate is not None and "fa3" not in columns:
            columns[estimates.NAME] = estimate
    return [(next(iter(cases[case].values())), cases[case]) for case in sorted(cases)]


def _speeds(lines: Sequence[Line]) -> str:
    """What all implementations reach, the fastest in bold, and how ours compares."""
    columns = [name for name in _COLUMNS if any(name in rows for _, rows in lines)]
    heads = [f"mini {name}" if name in _BESIDE else name for name in columns]
    table = [_header([*heads, "mini / best peer"])]
    for case, rows in lines:
        shown = metric(case)
        speeds = {name: shown.of(row) for name, row in rows.items() if name not in _BESIDE}
        best = shown.best(speeds.values())
        cells = []
        for name in columns:
            text = shown.text(rows[name]) if name in rows else "–"
            cells.append(f"**{text}**" if speeds.get(name) == best else text)
        others = [speed for name, speed in speeds.items() if not name.startswith("mini")]
        compared = "mini" in speeds and others
        ratio = f"{shown.ratio(speeds['mini'], shown.best(others)):.2f}" if compared else "–"
        table.append(_line(case, [*cells, ratio]))
    return "\n".join(table)


def _features(lines: Sequence[Line]) -> str:
    """Our plain kernel, and what is left of its speed with each feature."""
    columns = [name for name in ("mini", *_FEATURES) if any(name in rows for _, rows in lines)]
    table = [_header(columns)]
    for case, rows in lines:
        shown, cells = metric(case), []
        for name in columns:
            text = shown.text(rows[name]) if name in rows else "–"
            if name != "mini" and {name, "mini"} <= rows.keys():
                text += f" [{shown.ratio(shown.of(rows[name]), shown.of(rows['mini'])):.2f}]"
            cells.append(text)
        table.append(_line(case, cells))
    return "\n".join(table)


def _header(columns: Sequence[str]) -> str:
    columns = ["D", "causal", "S", "B", "H", *columns]
    return f"| {' | '.join(columns)} |\n|{'---|' * len(columns)}"


def _line(case: Row, cells: Sequence[str]) -> str:
    length, heads = pair(case.seqlen_q, case.seqlen_k), pair(case.heads_q, case.heads_k)
    length = f"up to {length}" if case.variant == "longtail" else length
    facts = [case.head_dim, "yes" if case.causal else "no", length, case.batch, heads]
    return f"| {' | '.join([*map(str, facts), *cells])} |"


if __name__ == "__main__":
    main()
