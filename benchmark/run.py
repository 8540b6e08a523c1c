"""How fast and how exact: `python benchmark/run.py`, on any machine, no arguments needed."""

import argparse
import json
import sys
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from benchmark import cases, classic, exactness, machine, memory, peers, plot, results
from benchmark.measure import line, measure

SWEEPS = {
    "sweep": cases.sweep,
    "backward": cases.backward,
    "varlen": cases.varlen,
    "decode": cases.decode,
}
SECTIONS = ("accuracy", "classic", *SWEEPS, "overhead", "memory")
FILTERS = {"D": "head_dim", "S": "seqlen_k", "causal": "causal", "direction": "direction"}


def main(arguments: list[str] | None = None) -> int:
    """Runs the chosen sections. 1 if ours fails, or is not exact: then nothing is timed."""
    args = _parse(arguments)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    run = machine.start_run(device, args.commit)
    found, absent = peers.available(device)
    chosen = {name: found[name] for name in args.impls if name in found}
    print(machine.describe(run, absent))

    if "accuracy" in args.sections:
        print("\nExactness: largest error against softmax(QK^T)V in a wider type", flush=True)
        if not exactness.check(device, chosen):
            return 1
    if "classic" in args.sections:
        print("\nThe classic case, under PyTorch's profiler", flush=True)
        classic.show(device, chosen, args.profile)

    timed = _timed_cases(args, device)
    rounds = args.rounds or (8 if device == "cuda" else 5)
    rows, failed = [], []
    if timed:
        print("\nSpeed: all in turn, medians; * is the fastest, [ratio to the plain kernel]")
    for number, case in enumerate(timed, 1):
        measured = measure(case, chosen, run, device, rounds)
        print(f"  [{number}/{len(timed)}] {case.suite} {case}: {line(measured.rows)}", flush=True)
        rows += measured.rows
        failed += [name for name in measured.failed if name.startswith("mini")]
        if args.csv:
            results.append(args.csv, measured.rows)
    if "memory" in args.sections and device == "cuda":
        print("\nPeak memory beyond q, k and v", flush=True)
        memory.show(chosen)

    if args.json:
        args.json.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")
    if args.plot and not plot.plot(rows, args.plot):
        print("Nothing to plot: a line takes two lengths of the sweep.")
    return 1 if failed else 0


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    words = "D=64,128 S=4096 causal=1 direction=bwd"
    only = f"{', '.join(SECTIONS)}; of {', '.join(SWEEPS)} only some cases: {words}"
    add("--only", nargs="+", default=[], metavar="WORD", help=only)
    add("--impls", type=lambda text: text.split(","), default=peers.NAMES, help="such as mini,fa4")
    add("--rounds", type=int, help="how often each is timed (8 on a GPU, 5 on a CPU)")
    add("--csv", type=Path, help="append the rows to this file")
    add("--json", type=Path, help="write the rows of this run to this file")
    add("--plot", type=Path, metavar="PNG", help="draw the sweep (needs matplotlib)")
    add("--profile", type=Path, metavar="FOLDER", help="Chrome traces of the classic case")
    add("--commit", help="for the rows, where the checkout has no .git")
    args = parser.parse_args(arguments)
    filters = dict(word.split("=", 1) for word in args.only if "=" in word)
    args.sections = [word for word in args.only if "=" not in word] or list(SECTIONS)
    choices = (args.sections, SECTIONS), (filters, FILTERS), (args.impls, peers.NAMES)
    for given, allowed in choices:
        for word in given:
            if word not in allowed:
                parser.error(f"{word!r} is none of {', '.join(allowed)}")
    args.filters = {FILTERS[key]: values.split(",") for key, values in filters.items()}
    return args


def _timed_cases(args: argparse.Namespace, device: str) -> list[cases.Case]:
    """The cases of the chosen sections, those of the sweeps filtered."""
    timed = list(cases.classic(device)) if "classic" in args.sections else []
    for section, make in SWEEPS.items():
        if section in args.sections:
            timed += [case for case in make(device) if _passes(case, args.filters)]
    if "overhead" in args.sections:
        timed += cases.overhead(device)
    return timed


def _passes(case: cases.Case, filters: Mapping[str, list[str]]) -> bool:
    facts = asdict(case) | {"causal": int(case.causal)}
    return all(str(facts[key]) in allowed for key, allowed in filters.items())


if __name__ == "__main__":
    sys.exit(main())
