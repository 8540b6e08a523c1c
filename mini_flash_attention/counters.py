"""Where a persistent kernel's thread blocks draw their tiles: two int32, zero before and after a launch.

Launches that may run at the same time must not share one. Launches on one stream follow each other,
so each stream has a counter of its own. A captured launch may be replayed on any stream, beside any
other: it gets one that nobody else uses.
"""

import functools
import threading

import torch
from torch import Tensor

POOL_ROWS = 4096

_lock = threading.Lock()
_of_stream: dict[tuple[int, int], Tensor] = {}
_unused: dict[int, list[Tensor]] = {}  # device -> counters made and zeroed, but not given away
_captured: list[Tensor] = []  # kept for as long as graphs may use them: for good


def tile_counter(device: int) -> Tensor:
    """A counter for a launch on the device's current stream."""
    if torch._C._cuda_isCurrentStreamCapturing():
        return _counter_for_capture(device)
    stream = torch._C._cuda_getCurrentRawStream(device)
    counter = _of_stream.get((device, stream))
    return _counter_for_stream(device, stream) if counter is None else counter


@functools.cache
def unused_counter(device: int) -> Tensor:
    """For launches that draw no tiles: neither read nor written."""
    return torch.empty(2, dtype=torch.int32, device=f"cuda:{device}")


def _counter_for_stream(device: int, stream: int) -> Tensor:
    with _lock:
        unused = _unused.setdefault(device, [])
        if not unused:
            pool = torch.zeros(POOL_ROWS, 2, dtype=torch.int32, device=f"cuda:{device}")
            torch.cuda.current_stream(device).synchronize()  # any stream may use them from here on
            unused.extend(pool.unbind())
        return _of_stream.setdefault((device, stream), unused.pop())


def _counter_for_capture(device: int) -> Tensor:
    """Nothing can be zeroed ahead in a capture: if no counter is left, each replay zeroes one.

    The counters last for POOL_ROWS captured launches, if an eager one came first.
    """
    with _lock:
        if _unused.get(device):
            counter = _unused[device].pop()
        else:
            counter = torch.zeros(2, dtype=torch.int32, device=f"cuda:{device}")
        _captured.append(counter)
        return counter
