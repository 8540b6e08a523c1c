"""Timing implementations in turn.

A GPU's clock moves with its temperature and load, so figures taken minutes apart do not compare.
Here every implementation of a case is timed in every round, in another order each time, on a warm chip;
what is reported is the median over the rounds.
"""

import functools
import random
import statistics
import time
from collections.abc import Callable, Hashable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple, TypeVar

import torch

Name = TypeVar("Name", bound=Hashable)
Call = Callable[[], object]
Clock = Callable[[Call, int], float]  # (call, iterations) -> milliseconds a call
SLICE_MS = 12.0  # of one implementation in one round


class Timed(NamedTuple):
    """What to time, and the context in which to call it."""

    call: Call
    scope: Callable[[], AbstractContextManager]


class Timing(NamedTuple):
    """Median milliseconds a call, and (p90 - p10) / median of the rounds."""

    ms: float
    spread: float


def in_turn(
    timed: Mapping[Name, Timed], clock: Clock, rounds: int, iterations: int | None = None
) -> dict[Name, Timing]:
    """Times each of `timed`, already called once, in every round.

    One slice is `iterations` calls, or as many as fill SLICE_MS.
    """
    names = list(timed)
    counts, samples = {}, {name: [] for name in names}
    for name, (call, scope) in timed.items():
        with scope():
            counts[name] = iterations or max(1, round(SLICE_MS / clock(call, 1)))
    for turn in range(rounds):
        # Another order in each round: a kernel that draws little power leaves a faster clock to the next one.
        for name in random.Random(turn).sample(names, len(names)):
            call, scope = timed[name]
            with scope():
                samples[name].append(clock(call, counts[name]))
    return {name: summary(values) for name, values in samples.items()}


def summary(samples: list[float]) -> Timing:
    """The median of the samples, and how far the middle 80 % of them lie apart."""
    median = statistics.median(samples)
    if len(samples) == 1:
        return Timing(median, 0.0)
    deciles = statistics.quantiles(samples, n=10, method="inclusive")
    return Timing(median, (deciles[-1] - deciles[0]) / median)


def device_ms(call: Call, iterations: int) -> float:
    """The GPU's time a call, between two events; a call before them hides the first launch."""
    start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    call()
    start.record()
    for _ in range(iterations):
        call()
    stop.record()
    stop.synchronize()
    return start.elapsed_time(stop) / iterations


def host_ms(call: Call, iterations: int) -> float:
    """The host's time a call: on a GPU what launching costs, on a CPU the whole work."""
    synchronize()
    start = time.perf_counter()
    for _ in range(iterations):
        call()
    elapsed = time.perf_counter() - start
    synchronize()
    return 1e3 * elapsed / iterations


def captured(call: Call) -> Call:
    """The call as a CUDA graph, whose replay costs the host nothing; call it once before.

    Raises whatever the call does that a capture does not allow.
    """
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
        call()
    return graph.replay


def stream(device: str) -> AbstractContextManager:
    """The stream to time in, since the default one can't be captured.

    Autograd runs a backward pass in the stream of its forward pass, so both have to be in here.
    """
    return nullcontext() if device == "cpu" else torch.cuda.stream(_side_stream())


@functools.cache
def _side_stream() -> torch.cuda.Stream:
    return torch.cuda.Stream()  # one, since PyTorch keeps freed memory for the stream that used it


def synchronize() -> None:
    """Waits for the GPU, if there is one in use."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.synchronize()


def heat() -> None:
    """Keeps the tensor cores busy, so that compiling in between doesn't let the chip cool down."""
    a = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    stop = time.perf_counter() + 0.3
    while time.perf_counter() < stop:
        (a @ a)[0, 0].item()
