"""One case, every implementation: errors, times, rows, and a line on the screen."""

from collections.abc import Iterable
from contextlib import nullcontext
from dataclasses import replace
from typing import NamedTuple

import torch

from benchmark import results, timing, workloads
from benchmark.cases import CREATE, Case, product
from benchmark.exactness import Wrong
from benchmark.peers import Implementations
from benchmark.workloads import Contestant

_HOST_CALLS = 2000  # over all rounds, where the host's time is what counts


class Measured(NamedTuple):
    """The rows of a case, and the names of those that could not do it."""

    rows: list[results.Row]
    failed: list[str]


def measure(
    case: Case, implementations: Implementations, run: results.Run, device: str, rounds: int
) -> Measured:
    """An implementation that fails gives a printed line instead of a row."""
    timed, errors, failed = {}, {}, []
    with timing.stream(device):
        for one in workloads.contestants(case, implementations, device):
            try:
                with one.scope():
                    out = one.call()
                    errors[one] = one.error(out) if one.error else None
                    timed[one] = timing.Timed(_timed_call(case, one, device), one.scope)
            except Wrong as wrong:
                print(f"  {one.name} is WRONG, not raced: {wrong}", flush=True)
                failed.append(one.name)
            except Exception as failure:  # whatever a peer raises, the others go on
                print(f"  {one.name} fails: {_reason(failure)}", flush=True)
                failed.append(one.name)
        if device == "cuda":
            timing.heat()
        of_host = results.is_host_time(case) or device == "cpu"
        clock = timing.host_ms if of_host else timing.device_ms
        iterations = -(-_HOST_CALLS // rounds) if results.is_host_time(case) else None
        times = timing.in_turn(timed, clock, rounds, iterations)
    rows = []
    for one, (ms, spread) in times.items():
        variant = replace(case, variant=one.variant, visible=one.visible)
        of_one = timing.Timing(ms / one.problems, spread)
        rows.append(results.row(run, variant, one.impl, of_one, errors[one]))
    return Measured(rows, failed)


def measure_product(run: results.Run, rounds: int) -> results.Row:
    """The row of the 8192³ bf16 matrix product, by which those of its run can be read."""
    case = product()
    with timing.stream("cuda"):
        a, b = (torch.randn(case.seqlen_q, case.seqlen_k, device="cuda", dtype=torch.bfloat16) for _ in "ab")
        timing.heat()
        timed = {"matmul": timing.Timed(lambda: a @ b, nullcontext)}
        of_product = timing.in_turn(timed, timing.device_ms, rounds)["matmul"]
    return results.row(run, case, "matmul", of_product, None)


def _timed_call(case: Case, one: Contestant, device: str) -> timing.Call:
    """By graph replay, since some would wait for the host otherwise; long forward passes by calls in a row.

    A block mask is made by calls in a row: what it waits for the host is its time, too.
    """
    if device == "cpu" or results.is_host_time(case) or case.variant == CREATE:
        return one.call
    if (case.suite, case.direction) == ("prefill", "fwd"):
        return one.call
    try:
        return timing.captured(one.call)
    except Exception as failure:
        if case.suite == "decode":  # too short: the host's time would be most of it
            raise
        print(f"  {one.name} is timed without a graph: {_reason(failure)}", flush=True)
        return one.call


def _reason(failure: Exception) -> str:
    return f"{type(failure).__name__}: {failure}".splitlines()[0]


def line(rows: Iterable[results.Row]) -> str:
    """The rows of one case, in the unit of its suite, fastest marked by a star, with their spread.

    A variant beside its plain implementation has its ratio to that one in brackets.
    """
    rows = list(rows)
    if not rows:
        return "no implementation ran"
    metric = results.metric(rows[0])
    values = [metric.of(row) for row in rows]
    best, first = metric.best(values), rows[0]
    cells = []
    for row, value in zip(rows, values, strict=True):
        cell = f"{row.impl} {metric.text(row)}{'*' if value == best else ''}"
        ratio = ""
        if row.variant != first.variant:
            ratio = f" [{metric.ratio(value, values[0]):.3f}]" if row.impl == first.impl else ""
            cell = f"{row.impl} {row.variant} {metric.text(row)}"
        spread = f" ~{row.spread:.0%}" if row.spread else ""  # of one round there is none
        cells.append(cell + spread + ratio)
    return f"{' | '.join(cells)} {metric.unit}"
