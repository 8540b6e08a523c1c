"""One case, every implementation: errors, times, rows, and a line on the screen."""

from collections.abc import Iterable

import torch

from benchmark import exactness, results, timing
from benchmark.cases import Case
from benchmark.peers import Implementation, Implementations

_OVERHEAD_CALLS = 2000  # over all rounds


def measure(
    case: Case, implementations: Implementations, run: results.Run, device: str, rounds: int
) -> list[results.Row]:
    """The rows of a case; an implementation that fails gives a printed line instead."""
    inputs = case.inputs(device)
    timed, errors = {}, {}
    with torch.no_grad():
        exact = exactness.oracle(*exactness.one_head(*inputs), case.causal)
    for name, impl in implementations.items():
        call = _call(case, impl, inputs)
        try:
            with impl.scope():
                out = call()
        except Exception as failure:  # whatever a peer raises, the others go on
            print(f"  {name} fails: {type(failure).__name__}: {failure}".splitlines()[0])
            continue
        timed[name] = timing.Timed(call, impl.scope)
        forward = case.direction == "fwd"
        errors[name] = exactness.distance(out[:1, :, :1], exact) if forward else None
    of_host = device == "cpu" or case.suite == "overhead"
    iterations = -(-_OVERHEAD_CALLS // rounds) if case.suite == "overhead" else None
    if device == "cuda":
        timing.heat()
    clock = timing.host_ms if of_host else timing.device_ms
    times = timing.in_turn(timed, clock, rounds, iterations)
    return [results.row(run, case, name, times[name], errors[name]) for name in timed]


def _call(case: Case, impl: Implementation, inputs: tuple[torch.Tensor, ...]) -> timing.Call:
    if case.direction == "fwd":
        return lambda: impl.call(*inputs, case.causal)
    dout = torch.randn_like(inputs[0])
    return lambda: torch.autograd.grad(impl.call(*inputs, case.causal), inputs, dout)


def line(rows: Iterable[results.Row]) -> str:
    """The rows of one case, in the unit of its suite, fastest marked by a star."""
    rows = list(rows)
    if not rows:
        return "no implementation ran"
    metric = results.METRICS[rows[0].suite]
    best = metric.best(map(metric.of, rows))
    cells = [
        f"{row.impl} {metric.of(row):.{metric.digits}f}{'*' if metric.of(row) == best else ''}"
        for row in rows
    ]
    return f"{' | '.join(cells)} {metric.unit}"
