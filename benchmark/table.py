"""Writes the README's speed table from the newest runs in benchmark/results: `python table.py`."""

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmark import estimates, peers
from benchmark.cases import pair
from benchmark.machine import ROOT
from benchmark.results import METRICS, Row, read

START, END = "<!-- speed table -->", "<!-- /speed table -->"
ESTIMATE = "fa3 (est.)"
_DIRECTIONS = {"fwd": "forward", "bwd": "backward", "fwdbwd": "forward + backward"}
_SUITES = {"prefill": "", "cpu": "CPU, ", "overhead": "Host time of one eager call, "}


def main() -> None:
    """Rewrites the README in place."""
    readme = ROOT / "README.md"
    text = insert(readme.read_text(encoding="utf-8"), render(newest(load())))
    readme.write_text(text, encoding="utf-8")


def load(folder: Path = ROOT / "benchmark" / "results") -> list[Row]:
    """All rows of all result files."""
    return [row for path in sorted(folder.glob("*.csv")) for row in read(path)]


def insert(readme: str, table: str) -> str:
    """The text with whatever stands between the markers replaced."""
    before, _, rest = readme.partition(START)
    _, end, after = rest.partition(END)
    if not end:
        raise ValueError(f"the README needs the markers {START} and {END}")
    return f"{before}{START}\n{table}\n{END}{after}"


def newest(rows: Sequence[Row]) -> list[list[Row]]:
    """The rows of the newest run of each suite, direction, variant and data type.

    Runs are not mixed, since machines differ: a partial run hides the cases that it lacks.
    """
    kinds: dict[tuple, list[Row]] = {}
    for row in rows:
        kinds.setdefault((row.suite, row.direction, row.variant, row.dtype), []).append(row)
    runs = []
    order = [*METRICS, *_DIRECTIONS]
    for kind in sorted(kinds, key=lambda kind: (*map(order.index, kind[:2]), *kind[2:])):
        date = max(row.date for row in kinds[kind])
        runs.append([row for row in kinds[kind] if row.date == date])
    return runs


def render(runs: Sequence[Sequence[Row]]) -> str:
    """One Markdown table a run, each under a caption that says what was measured on what."""
    if not runs:
        return "No measurement is there yet: `python benchmark/run.py` makes one on your machine."
    return "\n\n".join(f"{_caption(rows[0])}\n\n{_table(rows)}" for rows in runs)


def _caption(row: Row) -> str:
    what = f"{_SUITES[row.suite]}{_DIRECTIONS[row.direction]}, {row.dtype}"
    what += "" if row.variant == "plain" else f", {row.variant}"
    machine = [row.gpu, row.driver and f"driver {row.driver}", f"PyTorch {row.torch}"]
    machine += [row.cutlass_dsl and f"nvidia-cutlass-dsl {row.cutlass_dsl}", f"commit {row.commit}"]
    title = f"{what[0].upper()}{what[1:]}: {METRICS[row.suite].unit}"
    return f"**{title}**<br>{', '.join(filter(None, machine))}, {row.date}"


def _table(rows: Sequence[Row]) -> str:
    cases: dict[tuple, dict[str, Row]] = {}
    for row in rows:
        case = (row.head_dim, row.causal, row.seqlen_q, row.seqlen_k, row.batch, row.heads_q)
        cases.setdefault((*case, row.heads_k), {})[row.impl] = row
    scores = [_scores(by_impl) for _, by_impl in sorted(cases.items())]
    columns = [name for name in (*peers.NAMES, ESTIMATE) if any(name in score for score in scores)]
    lines = ["| D | causal | S | B | H | " + " | ".join(columns) + " | mini / best peer |"]
    lines.append("|" + "---|" * (len(columns) + 6))
    for (_, by_impl), score in zip(sorted(cases.items()), scores, strict=True):
        lines.append(_line(next(iter(by_impl.values())), score, columns))
    return "\n".join(lines)


def _scores(by_impl: Mapping[str, Row]) -> dict[str, float]:
    """The figure to show for each implementation that ran, and the estimate for FA3."""
    case = next(iter(by_impl.values()))
    scores = {name: METRICS[case.suite].of(row) for name, row in by_impl.items()}
    estimate = estimates.fa3_tflops(by_impl)
    return scores if "fa3" in by_impl or estimate is None else scores | {ESTIMATE: estimate}


def _line(case: Row, scores: Mapping[str, float], columns: Sequence[str]) -> str:
    metric = METRICS[case.suite]
    best = metric.best(scores.values())
    cells = []
    for name in columns:
        text = f"{scores[name]:.{metric.digits}f}" if name in scores else "–"
        cells.append(f"**{text}**" if scores.get(name) == best else text)
    others = [score for name, score in scores.items() if not name.startswith("mini")]
    ratio = "–"
    if "mini" in scores and others:
        mini, other = scores["mini"], metric.best(others)
        ratio = f"{mini / other if metric.best is max else other / mini:.2f}"
    length, heads = pair(case.seqlen_q, case.seqlen_k), pair(case.heads_q, case.heads_k)
    facts = [case.head_dim, "yes" if case.causal else "no", length, case.batch, heads]
    return "| " + " | ".join([*map(str, facts), *cells, ratio]) + " |"


if __name__ == "__main__":
    main()
