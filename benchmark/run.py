"""How fast and how exact: `python benchmark/run.py`, on any machine, no arguments needed."""

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from benchmark import choices, classic, exactness, machine, memory, peers, plot, results
from benchmark.cases import Case
from benchmark.measure import line, measure, measure_product
from benchmark.peers import Implementations

INTERRUPTED = 130  # what a shell calls a process that Ctrl-C ended


def main(arguments: list[str] | None = None) -> int:
    """Runs the chosen sections. 1 if ours fails, or is not exact: then nothing is timed."""
    parser = choices.parser(__doc__)
    args = parser.parse_args(arguments)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    found, absent = peers.available(device)
    try:
        chosen = choices.implementations(args.impls, found, absent)
        sections, timed = choices.sections_and_cases(args.only, device)
        choices.check_files(args, sections, timed)
    except ValueError as wrong:
        parser.error(str(wrong))
    run = machine.start_run(device, args.commit)
    print(machine.describe(run, absent))
    rows: list[results.Row] = []
    try:
        status = _run(args, run, device, sections, timed, chosen, rows)
    except KeyboardInterrupt:
        print("\nInterrupted.")
        status = INTERRUPTED
    _save(args, rows)
    return status


def _run(
    args: argparse.Namespace,
    run: machine.Run,
    device: str,
    sections: Sequence[str],
    timed: Sequence[Case],
    chosen: Implementations,
    rows: list[results.Row],
) -> int:
    """Adds to rows what is measured, case by case, so that it is there if the run is interrupted."""
    if "accuracy" in sections:
        print("\nExactness: largest error against softmax(QK^T)V in a wider type", flush=True)
        if not exactness.check(device, chosen):
            return 1
    if "classic" in sections:
        print("\nThe classic case, under PyTorch's profiler", flush=True)
        classic.show(device, chosen, args.profile)
    rounds = args.rounds or (8 if device == "cuda" else 5)
    failed = False
    if timed:
        print("\nSpeed: all in turn, medians, ~ (p90 - p10) / median of the rounds;")
        print("  * is the fastest, [ratio to the plain kernel]")
    if timed and device == "cuda":
        rows.append(measure_product(run, rounds))
        print(f"  8192³ bf16 matrix product: {rows[-1].tflops:.0f} TFLOP/s", flush=True)
        if args.csv:
            results.append(args.csv, rows)
    for number, case in enumerate(timed, 1):
        measured = measure(case, chosen, run, device, rounds)
        print(f"  [{number}/{len(timed)}] {case.suite} {case}: {line(measured.rows)}", flush=True)
        rows += measured.rows
        failed |= any(name.startswith("mini") for name in measured.failed)
        if args.csv:
            results.append(args.csv, measured.rows)
    if "memory" in sections:
        print("\nPeak memory beyond q, k and v", flush=True)
        memory.show(chosen)
    return int(failed)


def _save(args: argparse.Namespace, rows: Sequence[results.Row]) -> None:
    """Writes what was measured, --csv aside, which has it already, and says where it is."""
    if not rows:
        return
    if args.json:
        args.json.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")
    drawn = args.plot and plot.plot(rows, args.plot)
    if args.plot and not drawn:
        print("Nothing to plot: a line takes two lengths of the sweep.")
    saved = [str(path) for path in (args.csv, args.json, drawn and args.plot) if path]
    if saved:
        print(f"{len(rows)} measurements are in {', '.join(saved)}.")


if __name__ == "__main__":
    sys.exit(main())
