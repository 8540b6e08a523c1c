"""A picture of a sweep: one panel a head dim, direction and mask, one line an implementation."""

from collections.abc import Sequence
from pathlib import Path

from benchmark.results import Row, metric


def plot(rows: Sequence[Row], path: Path) -> bool:
    """Writes a PNG with matplotlib (the extra `bench`); False if no panel has two lengths."""
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


def _panels(rows: Sequence[Row]) -> list[list[Row]]:
    """Rows of sweeps that differ in length and implementation only, where there are two lengths or more."""
    panels: dict[tuple, list[Row]] = {}
    for row in rows:
        if row.suite not in ("prefill", "cpu") or row.variant != "plain":
            continue
        kind = (row.suite, row.direction, row.dtype)
        panels.setdefault((*kind, row.heads_q, row.head_dim, row.causal), []).append(row)
    return [panel for panel in panels.values() if len({row.seqlen_k for row in panel}) > 1]
