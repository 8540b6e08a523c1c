"""What the command line asks for, checked before anything runs: a run takes minutes, a typing error none."""

import argparse
import importlib.util
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from benchmark import cases, peers, results
from benchmark.cases import Case
from benchmark.peers import Implementations

SWEEPS = {
    "sweep": cases.sweep,
    "backward": cases.backward,
    "models": cases.models,
    "varlen": cases.varlen,
    "decode": cases.decode,
    "scores": cases.scores,
    "masks": cases.masks,
}
SECTIONS = ("accuracy", "classic", *SWEEPS, "overhead", "memory")
FILTERS = {
    "D": "head_dim",
    "S": "seqlen_k",
    "causal": "causal",
    "direction": "direction",
    "variant": "variant",
}


def parser(description: str) -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=description)
    add = made.add_argument
    words = "D=64,128 S=4096 causal=1 direction=bwd"
    only = f"{', '.join(SECTIONS)}; of {', '.join(SWEEPS)} only some cases: {words}"
    add("--only", nargs="+", default=[], metavar="WORD", help=only)
    add("--impls", type=lambda text: text.split(","), help="such as mini,fa4; all that are here if not given")
    add("--rounds", type=_positive, help="how often each is timed (8 on a GPU, 5 on a CPU)")
    add("--csv", type=Path, metavar="FILE", help="append the rows to this file")
    add("--json", type=Path, metavar="FILE", help="write the rows of this run to this file")
    add("--plot", type=Path, metavar="PNG", help="draw the sweep (needs matplotlib)")
    add("--profile", type=Path, metavar="FOLDER", help="Chrome traces of the classic case")
    add("--commit", help="for the rows, where the checkout has no .git")
    return made


def _positive(text: str) -> int:
    try:
        number = int(text)
    except ValueError:
        number = 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number from 1 on, not {text}")
    return number


# ValueError says what is wrong with a choice.


def implementations(
    asked: Sequence[str] | None, found: Implementations, absent: Mapping[str, str]
) -> Implementations:
    """Those to run: each one that is asked for, else all that are here."""
    for name in asked or ():
        if name not in peers.NAMES:
            raise ValueError(f"--impls: {name!r} is none of {', '.join(peers.NAMES)}")
        if name in absent:
            raise ValueError(f"--impls: {name} is not here: {absent[name]}")
    return {name: impl for name, impl in found.items() if asked is None or name in asked}


def sections_and_cases(words: Iterable[str], device: str) -> tuple[Sequence[str], list[Case]]:
    """The sections to run, and what is timed in them: of the sweeps, what passes the filters."""
    filters = dict(word.split("=", 1) for word in words if "=" in word)
    named = [word for word in words if "=" not in word]
    for given, allowed in ((named, SECTIONS), (filters, FILTERS)):
        for word in given:
            if word not in allowed:
                raise ValueError(f"--only: {word!r} is none of {', '.join(allowed)}")
    sections = named or SECTIONS
    sweeps = {name: list(make(device)) for name, make in SWEEPS.items() if name in sections}
    nothing = [name for name in named if sweeps.get(name) == [] or (name, device) == ("memory", "cpu")]
    if nothing:
        machine = "CPU" if device == "cpu" else "GPU"
        raise ValueError(f"--only: {', '.join(nothing)}: nothing of this runs on a {machine}")
    _check_filters(filters, [case for every in sweeps.values() for case in every])
    passed = {name: _passing(every, filters) for name, every in sweeps.items()}
    nothing = [name for name in named if passed.get(name) == []]
    if nothing or (filters and not any(passed.values())):
        filtered = " ".join(word for word in words if "=" in word)
        raise ValueError(f"--only: no case of {', '.join(nothing or passed)} has {filtered}")
    timed = cases.classic(device) if "classic" in sections else []
    timed += [case for every in passed.values() for case in every]
    return sections, timed + (cases.overhead(device) if "overhead" in sections else [])


def _check_filters(filters: Mapping[str, str], every: Sequence[Case]) -> None:
    """Each value is one of a case."""
    if filters and not every:
        raise ValueError(
            f"--only: {', '.join(filters)} filters {', '.join(SWEEPS)} alone, and none is chosen"
        )
    for key, values in filters.items():
        there = dict.fromkeys(value for case in every for value in _values(case, key))
        for value in values.split(","):
            if value not in there:
                raise ValueError(f"--only: no case has {key}={value}: {key} is {', '.join(there)}")


def _passing(every: Iterable[Case], filters: Mapping[str, str]) -> list[Case]:
    """The cases that have what is asked for, with those of the variants beside theirs that are."""
    asked = {key: values.split(",") for key, values in filters.items()}
    passed = [case for case in every if all(set(_values(case, key)) & set(asked[key]) for key in asked)]
    if "variant" not in asked:
        return passed
    return [replace(case, beside=tuple(x for x in case.beside if x in asked["variant"])) for case in passed]


def _values(case: Case, key: str) -> tuple[str, ...]:
    """What a case has for a filter: one value, or all of the variants that it times in turn."""
    if key == "variant":
        return case.variant, *case.beside
    value = getattr(case, FILTERS[key])
    return (str(int(value)) if key == "causal" else str(value),)


def check_files(args: argparse.Namespace, sections: Sequence[str], timed: Sequence[Case]) -> None:
    """Each file and folder can be written when its time comes."""
    for option in ("csv", "json", "plot"):
        if getattr(args, option) is not None:
            if not timed:
                raise ValueError(f"--{option}: nothing is timed")
            _check_file(f"--{option}", getattr(args, option))
    if args.csv is not None and args.csv.exists() and args.csv.stat().st_size > 0:
        try:
            results.read(args.csv)
        except ValueError as error:
            raise ValueError(f"--csv: {args.csv} is no file of results: {error}") from error
    if args.plot is not None:
        _check_plot(args.plot, timed)
    if args.profile is not None:
        if "classic" not in sections:
            raise ValueError("--profile: the classic case, of which the traces are, is not run")
        _check_folder("--profile", args.profile)


def _check_file(option: str, path: Path) -> None:
    new = not path.exists()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.open("a").close()
        if new:
            path.unlink()
    except OSError as error:
        raise ValueError(f"{option}: cannot write {path}: {error.strerror}") from error


def _check_folder(option: str, path: Path) -> None:
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"{option}: cannot make the folder {path}: {error.strerror}") from error
    if not os.access(path, os.W_OK):
        raise ValueError(f"{option}: cannot write into {path}")


def _check_plot(path: Path, timed: Sequence[Case]) -> None:
    if importlib.util.find_spec("matplotlib") is None:
        raise ValueError("--plot: needs matplotlib: pip install matplotlib")
    from matplotlib.backend_bases import FigureCanvasBase

    kinds = FigureCanvasBase.filetypes
    if path.suffix[1:].lower() not in kinds:
        raise ValueError(f"--plot: {path.name} must end in one of .{', .'.join(kinds)}")
    if len({case.seqlen_k for case in timed if case.suite in ("prefill", "cpu")}) < 2:
        raise ValueError("--plot: nothing to draw: a line takes two lengths of the sweep")
