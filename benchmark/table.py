"""Writes docs/speed.md and the README's summary from the newest runs in benchmark/results.

What stands between the markers is written anew, the rest of the files stays.
"""

import argparse
import statistics
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmark import compare, peers, results
from benchmark.cases import pair
from benchmark.compare import BESIDE, FEATURES, Line
from benchmark.machine import ROOT
from benchmark.results import DIRECTIONS, Row, metric

LOST = 0.995  # of the best other's speed; from there on it counts as equal
START, END = "<!-- made by benchmark/table.py -->", "<!-- /made by benchmark/table.py -->"
README, TABLES = ROOT / "README.md", ROOT / "docs" / "speed.md"
_SUITES = {
    "prefill": "",
    "models": "Shapes of models, ",
    "varlen": "Sequences of different lengths in one batch, ",
    "scores": "Functions of scores, ",
    "masks": "Masks, ",
    "decode": "Decoding with a KV cache, ",
    "cpu": "CPU, ",
    "overhead": "Host time of one eager call, ",
}
# Suites whose cases have names, and what those are.
_NAMED = {"models": "model", "scores": "function", "masks": "mask"}
# Suites whose cases are compared with others of ours: what that column is called.
_TWINS = {"scores": "mini / plain", "masks": "mini / its twin"}
_COLUMNS = ("mini", *FEATURES, *BESIDE, *peers.NAMES[1:])


def main(arguments: list[str] | None = None) -> None:
    """Rewrites both files in place."""
    description = __doc__ + " `benchmark/plot.py` draws the picture of the same runs."
    argparse.ArgumentParser(description=description).parse_args(arguments)
    rows = compare.load()
    runs = compare.newest(rows)
    pages = ((README, summary(compare.kinds(runs))), (TABLES, render(runs, compare.products(rows))))
    for path, tables in pages:
        path.write_text(insert(path.read_text(encoding="utf-8"), tables), encoding="utf-8")


def insert(text: str, tables: str) -> str:
    """The text with whatever stands between the markers replaced."""
    before, _, rest = text.partition(START)
    _, end, after = rest.partition(END)
    if not end:
        raise ValueError(f"the text needs the markers {START} and {END}")
    return f"{before}{START}\n\n{tables}\n\n{END}{after}"


def summary(kinds: Mapping[str, Sequence[Line]]) -> str:
    """A line a kind: our speed relative to the fastest of the others, from the worst case to the best."""
    columns = (
        "our speed / the best other's | cases | lost | worst | typical | best | the worst case, and the best"
    )
    table = [f"| {columns} |", "|---|---|---|---|---|---|---|"]
    for kind, lines in kinds.items():
        worst = min(lines, key=lambda line: line.ratio)
        ratios = [line.ratio for line in lines]
        figures = [f"{figure:.2f}" for figure in (min(ratios), statistics.median(ratios), max(ratios))]
        lost = sum(ratio < LOST for ratio in ratios)
        cells = (kind, str(len(lines)), str(lost), *figures, f"{_facts(worst.case)}: {worst.peer}")
        table.append(f"| {' | '.join(cells)} |")
    return "\n".join(table)


def _facts(row: Row) -> str:
    """A case in a few words."""
    head_dim, mask, *shape = _cells(row)
    mask = "causal" if row.causal else "full"
    name = f"{row.variant}: " if row.suite in _NAMED else ""
    return name + ", ".join(
        [f"D {head_dim}", mask, *(f"{name} {x}" for name, x in zip("SBH", shape, strict=True))]
    )


def render(runs: Sequence[Sequence[Row]], products: Mapping[str, float] | None = None) -> str:
    """One Markdown table a run, each under a caption that says what was measured on what.

    What features of ours cost is a table of its own, and so is where we lose. `products` gives for a
    run's date the TFLOP/s of a matrix product in it, of which our share is shown.
    """
    products = products or {}
    tables = [table for run in runs for table in _tables(run, products.get(run[0].date))]
    lost = [line for lines in compare.kinds(runs).values() for line in lines if line.ratio < LOST]
    if lost:
        tables.insert(0, _losses(lost))
    if not tables:
        return "No measurement is there yet: `python benchmark/run.py` makes one on your machine."
    return "\n\n".join(tables)


def _losses(lost: Sequence[Line]) -> str:
    """The cases in which another is faster, the worst first."""
    table = ["**Where another is faster**, the worst first\n", "| what | case | the best other | ratio |"]
    table.append("|---|---|---|---|")
    for line in sorted(lost, key=lambda line: line.ratio):
        cells = compare.kind(line.case), _facts(line.case), line.peer, f"{line.ratio:.2f}"
        table.append(f"| {' | '.join(cells)} |")
    return "\n".join(table)


def _tables(run: Sequence[Row], product: float | None) -> Iterator[str]:
    yield f"{_caption(run[0], '')}\n\n{_speeds(compare.without_features(run), product)}"
    featured = compare.lines(row for row in run if row.impl == "mini")
    featured = [line for line in featured if not line.rows.keys().isdisjoint(FEATURES)]
    if featured:
        yield f"{_caption(run[0], ' with features, [share of the plain speed]')}\n\n{_features(featured)}"


def _caption(row: Row, more: str) -> str:
    what = f"{_SUITES[row.suite]}{DIRECTIONS[row.direction]}, {row.dtype}"
    what += ", host time of one eager call" if row.suite == "decode" and results.is_host_time(row) else ""
    machine = [row.gpu, row.driver and f"driver {row.driver}", f"PyTorch {row.torch}"]
    machine += [row.cutlass_dsl and f"nvidia-cutlass-dsl {row.cutlass_dsl}", f"commit {row.commit}"]
    title = f"{what[0].upper()}{what[1:]}: {metric(row).unit}{more}"
    return f"**{title}**<br>{', '.join(filter(None, machine))}, {row.date}"


def _speeds(lines: Sequence[Line], product: float | None) -> str:
    """What all implementations reach, the fastest in bold; how ours compares, also with a product."""
    suite = lines[0].case.suite
    shares = product is not None and suite in ("prefill", "varlen", "models")
    named = [_NAMED[suite]] if suite in _NAMED else []
    twins = [_TWINS[suite]] if suite in _TWINS else []
    columns = [name for name in _COLUMNS if any(name in line.rows for line in lines)]
    heads = [f"mini {name}" if name in BESIDE else name for name in columns]
    shared = [f"mini / 8192³ product ({product:.0f} TFLOP/s)"] if shares else []
    table = [_header([*named, *heads, "mini / best peer", *twins, *shared])]
    for line in lines:
        shown, speeds = metric(line.case), line.speeds
        best = shown.best(speeds.values())
        cells = []
        for name in columns:
            text = shown.text(line.rows[name]) if name in line.rows else "–"
            cells.append(f"**{text}**" if speeds.get(name) == best else text)
        cells.append(f"{line.ratio:.2f}" if line.peer else "–")
        if twins:
            twin = compare.twin(line, lines)
            ratio = twin and shown.ratio(line.speeds["mini"], twin.speeds["mini"])
            cells.append(f"{ratio:.2f}" if ratio else "–")
        if shares:
            cells.append(f"{line.rows['mini'].tflops / product:.2f}" if "mini" in line.rows else "–")
        table.append(_line(line.case, [line.case.variant, *cells] if named else cells))
    return "\n".join(table)


def _features(lines: Sequence[Line]) -> str:
    """Our plain kernel, and what is left of its speed with each feature."""
    columns = [name for name in ("mini", *FEATURES) if any(name in line.rows for line in lines)]
    table = [_header(columns)]
    for line in lines:
        cells = []
        for name in columns:
            text = metric(line.case).text(line.rows[name]) if name in line.rows else "–"
            if name != "mini" and {name, "mini"} <= line.rows.keys():
                text += f" [{1 / line.ratio_to(name):.2f}]"
            cells.append(text)
        table.append(_line(line.case, cells))
    return "\n".join(table)


def _header(columns: Sequence[str]) -> str:
    columns = ["D", "causal", "S", "B", "H", *columns]
    return f"| {' | '.join(columns)} |\n|{'---|' * len(columns)}"


def _line(case: Row, cells: Sequence[str]) -> str:
    return f"| {' | '.join([*_cells(case), *cells])} |"


def _cells(case: Row) -> list[str]:
    """D, causal, S, B and H of a case."""
    length, heads = pair(case.seqlen_q, case.seqlen_k), pair(case.heads_q, case.heads_k)
    length = f"up to {length}" if case.variant == "longtail" else length
    return [str(case.head_dim), "yes" if case.causal else "no", length, str(case.batch), heads]


if __name__ == "__main__":
    main()
