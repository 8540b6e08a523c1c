"""What the thread blocks of a launch count together: int32 in GPU memory, zero before and after each launch.

A persistent kernel draws its tiles from two of them; in a decode, each tile has one for its splits. Launches
that may run at the same time must not share them. Launches on one stream follow each other (one that starts
early, by programmatic dependent launch, waits first), so each stream has its own. A captured launch may be
replayed on any stream, beside any other: it gets some that nobody else uses, from a stock, as nothing can be
zeroed ahead in a capture.

They are zero afterwards only if the thread blocks agree on how many they are: the lengths that a decode reads
must not change while it runs.
"""

import functools
import threading

import torch
from torch import Tensor

STOCK = 2**20  # of a device, for captured launches: 4 MB

_lock = threading.Lock()
_of_stream: dict[tuple[int, int], Tensor] = {}
_stock: dict[int, Tensor] = {}  # device -> those not given away
_captured: list[Tensor] = []  # kept for as long as graphs may use them: for good


def tile_counter(device: int) -> Tensor:
    """Two counters for a launch on the device's current stream."""
    if torch._C._cuda_isCurrentStreamCapturing():
        return for_capture(device, 2)
    stream = torch._C._cuda_getCurrentRawStream(device)
    counter = _of_stream.get((device, stream))
    if counter is None:
        counter = _of_stream.setdefault((device, stream), for_stream(device, 2))
    return counter


@functools.cache
def unused_counter(device: int) -> Tensor:
    """For launches that count nothing: neither read nor written."""
    return torch.empty(2, dtype=torch.int32, device=f"cuda:{device}")


def for_stream(device: int, count: int) -> Tensor:
    """New counters for all launches on the device's current stream; with the first ones comes the stock."""
    with _lock:
        if device not in _stock:
            _stock[device] = _zeros(device, STOCK)
            torch.cuda.current_stream(device).synchronize()  # any stream may use them from here on
    return _zeros(device, count)


def for_capture(device: int, count: int) -> Tensor:
    """New counters for a captured launch: if the stock has too few, each replay zeroes them."""
    if count == 0:
        return unused_counter(device)
    with _lock:
        stock = _stock.get(device)
        if stock is None or len(stock) < count:
            counters = _zeros(device, count)
        else:
            counters, _stock[device] = stock[:count], stock[count:]
        _captured.append(counters)
        return counters


def _zeros(device: int, count: int) -> Tensor:
    return torch.zeros(count, dtype=torch.int32, device=f"cuda:{device}")
