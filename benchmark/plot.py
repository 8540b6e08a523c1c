"""Draws the README's picture from the newest runs in benchmark/results; for run.py, a sweep.

Needs matplotlib (the extra `bench`). The same results give the same file.
"""

import argparse
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmark import compare
from benchmark.compare import Line
from benchmark.machine import ROOT
from benchmark.results import Row, metric

if TYPE_CHECKING:
    from matplotlib.axes import Axes

PICTURE = ROOT / "docs" / "pictures" / "speed.svg"
# Read on a white page and on a black one, so no colour is near either.
INK, LOST = "#7d8590", "#e5534b"
COLOURS = {
    "mini": "#3f8fe0",
    "fa4": "#d9822b",
    "fa3": "#c2a83e",
    "sdpa-cudnn": "#4fa35a",
    "sdpa-flash": "#a371d8",
}
STYLE = {
    "svg.hashsalt": "mini-flash-attention",
    "svg.fonttype": "none",
    "font.size": 11,
    "axes.titlesize": 11,
    "axes.spines.top": False,
    "axes.spines.right": False,
    **dict.fromkeys(("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), INK),
}


def main(arguments: list[str] | None = None) -> None:
    """Rewrites docs/pictures/speed.svg."""
    argparse.ArgumentParser(description=__doc__).parse_args(arguments)
    picture(compare.newest(compare.load()), PICTURE)


def picture(runs: Sequence[Sequence[Row]], path: Path) -> None:
    """Above, what is reached in training and prefill; below, every case that was compared, losses too."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(9, 6.5), layout="constrained")
        above, below = figure.subfigures(2, 1, height_ratios=(5, 6), hspace=0.05)
        for place, direction in enumerate(("fwd", "bwd"), 1):
            run = next(run for run in runs if _is_of(run[0], direction))
            _draw_lengths(above.add_subplot(1, 2, place), run)
        _draw_ratios(below.add_subplot(), compare.kinds(runs))
        machines = sorted({f"{run[0].gpu}, {run[0].date[:10]}" for run in runs})
        below.supxlabel("; ".join(machines), fontsize=8)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, format="svg", transparent=True, metadata={"Date": None, "Creator": None})


def _is_of(row: Row, direction: str) -> bool:
    return (row.suite, row.direction, row.dtype) == ("prefill", direction, "bf16")


def _draw_lengths(axis: "Axes", run: Sequence[Row]) -> None:
    """TFLOP/s over the length, causal, head dim 128: a line an implementation, its name at the end."""
    rows = [row for row in run if (row.head_dim, row.causal, row.variant) == (128, 1, "plain")]
    for impl, colour in COLOURS.items():
        points = sorted((row.seqlen_k, row.tflops) for row in rows if row.impl == impl)
        if not points:
            continue
        axis.plot(*zip(*points, strict=True), marker="o", markersize=4, color=colour)
        raised = 4 if impl == "mini" else -3  # names of neighbours do not touch
        axis.annotate(impl, points[-1], (7, raised), textcoords="offset points", va="center", color=colour)
    lengths = sorted({row.seqlen_k for row in rows})
    axis.set_xscale("log", base=2)
    axis.set_xticks(lengths, [f"{length // 1024}k" if length >= 1024 else str(length) for length in lengths])
    axis.minorticks_off()
    axis.set(ylim=(0, None), xlabel="tokens of a sequence", ylabel="TFLOP/s")
    axis.set_title(f"{compare.kind(rows[0])}, causal, head dim 128, bf16")


def _draw_ratios(axis: "Axes", kinds: Mapping[str, Sequence[Line]]) -> None:
    """A dot a case: how many times as fast as the fastest of the others ours is."""
    for place, lines in enumerate(kinds.values()):
        ratios = [line.ratio for line in lines]
        colours = [LOST if ratio < 0.995 else COLOURS["mini"] for ratio in ratios]
        axis.scatter(ratios, [place] * len(ratios), c=colours, s=30, alpha=0.7, linewidths=0)
    axis.axvline(1, color=INK, linewidth=1)
    axis.set_xscale("log")
    ticks = (0.4, 0.5, 0.7, 1, 1.4, 2)
    axis.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axis.minorticks_off()
    axis.set_yticks(range(len(kinds)), [f"{kind} ({len(lines)})" for kind, lines in kinds.items()])
    axis.invert_yaxis()
    axis.set_xlabel("our speed / the best other's, a dot a case: to the left of 1 we lose")


def plot(rows: Sequence[Row], path: Path) -> bool:
    """Writes a sweep as PNG: a panel a head dim, direction and mask, a line an implementation.

    False if no panel has two lengths.
    """
    panels = _panels(rows)
    if not panels:
        return False
    from matplotlib.figure import Figure

    columns = min(2, len(panels))
    lines = -(-len(panels) // columns)
    figure = Figure(figsize=(6 * columns, 4 * lines), layout="constrained")
    figure.suptitle(f"{rows[0].gpu}, PyTorch {rows[0].torch}, {rows[0].date}")
    for number, panel in enumerate(panels, 1):
        first, shown = panel[0], metric(panel[0])
        axis = figure.add_subplot(lines, columns, number)
        for impl in dict.fromkeys(row.impl for row in panel):
            points = {row.seqlen_k: shown.of(row) for row in panel if row.impl == impl}
            axis.plot(points.keys(), points.values(), marker="o", label=impl)
        mask = "causal" if first.causal else "full"
        axis.set_title(f"{first.direction}, {first.dtype}, head dim {first.head_dim}, {mask}")
        axis.set(xlabel="length", ylabel=shown.unit, ylim=(0, None))
        axis.set_xscale("log", base=2)
        axis.grid(alpha=0.3)
        axis.legend()
    figure.savefig(path, dpi=120)
    return True


def _panels(rows: Iterable[Row]) -> list[list[Row]]:
    """Rows of sweeps that differ in length and implementation only, where there are two lengths or more."""
    panels: dict[tuple, list[Row]] = {}
    for row in rows:
        if row.suite not in ("prefill", "cpu") or row.variant != "plain":
            continue
        kind = (row.suite, row.direction, row.dtype)
        panels.setdefault((*kind, row.heads_q, row.head_dim, row.causal), []).append(row)
    return [panel for panel in panels.values() if len({row.seqlen_k for row in panel}) > 1]


if __name__ == "__main__":
    main()
