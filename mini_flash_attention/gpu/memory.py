"""All memory that outlives a call: counters, the workspace of decoding, and what is written for nobody.

Launches that may run at the same time must not share what both write and read. Those on one stream follow
each other (one that starts early, by programmatic dependent launch, waits first), so a stream has its own
counters. Two threads may alternate on a stream, and a decode's workspace is asked for before it is launched:
each thread has its own for each stream. A captured launch may be replayed on any stream, beside any other: it
gets memory that nobody else uses; counters, which nothing can zero ahead in a capture, come from a stock.

What is kept is kept for good, in the memory pool that is current when it is first needed. A stream's handle
stands for the stream: PyTorch's live as long as the process.
"""

import functools
import math
import threading
from typing import Any

import torch
from torch import Tensor

from mini_flash_attention.gpu import fast

WORKSPACE = 2**20  # float32 elements: a call that needs more takes longer than an allocation
COUNTERS = 512  # of a workspace
STOCK = 2**20  # counters of a device, for captured launches: 4 MB
UNREAD = 2**18  # float32 elements: of larger results the kernel takes longer than the host saves


# Counters: int32, zero before and after each launch. A persistent kernel draws its tiles from two of them; in
# a decode, each tile has one for its splits. They are zero afterwards only if the thread blocks agree on how
# many they are: the lengths that a decode reads must not change while it runs.

_lock = threading.Lock()
_tile_counters: dict[tuple[int, int], Tensor] = {}  # of (device, stream)
_stock: dict[int, Tensor] = {}  # device -> those not given away
_captured: list[Tensor] = []  # kept for as long as graphs may use them: for good


def tile_counter(device: int) -> Tensor:
    """Two counters for a launch on the device's current stream."""
    if fast.is_capturing():
        return _for_capture(device, 2)
    stream = fast.current_stream(device)
    counter = _tile_counters.get((device, stream))
    if counter is None:
        counter = _tile_counters.setdefault((device, stream), _for_stream(device, 2))
    return counter


def _for_stream(device: int, count: int) -> Tensor:
    """New counters for all launches on the device's current stream; with the first ones comes the stock."""
    with _lock:
        if device not in _stock:
            _stock[device] = _zeros(device, STOCK)
            torch.cuda.current_stream(device).synchronize()  # any stream may use them from here on
    return _zeros(device, count)


def _for_capture(device: int, count: int) -> Tensor:
    """New counters for a captured launch: if the stock has too few, each replay zeroes them."""
    if count == 0:
        return unused(device)
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


# The workspace through which the thread blocks of a decode hand their splits to each other


class _Workspaces(threading.local):
    def __init__(self) -> None:
        self.of_stream: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}


_workspaces = _Workspaces()


def workspace(size: int, count: int, device: int) -> tuple[Tensor, Tensor]:
    """For a launch on the device's current stream: `size` float32 at least, and `count` counters at least.

    count: COUNTERS at most.
    """
    if fast.is_capturing():
        return _floats(device, size), _for_capture(device, count)
    stream = fast.current_stream(device)
    kept = _workspaces.of_stream.get((device, stream))
    if kept is None:
        kept = _floats(device, WORKSPACE), _for_stream(device, COUNTERS)
        _workspaces.of_stream[device, stream] = kept
    return kept if size <= WORKSPACE else (_floats(device, size), kept[1])


def _floats(device: int, size: int) -> Tensor:
    return torch.empty(size, dtype=torch.float32, device=f"cuda:{device}")


# What stands for tensors that a call does without


@functools.cache
def unused(device: int) -> Tensor:
    """(2) int32 that no kernel reads or writes."""
    return torch.empty(2, dtype=torch.int32, device=f"cuda:{device}")


@functools.cache
def not_given(device: int) -> tuple[Any, Any, Any]:
    """What stands for int32 tensors of one and of two dimensions, and a float32 one, that are not given."""
    one, number = unused(device), torch.empty(1, dtype=torch.float32, device=f"cuda:{device}")
    return argument(one), argument(one.unsqueeze(0)), argument(number)


def unread(shape: tuple[int, ...], device: int) -> Any | None:
    """For what a kernel writes and nobody reads: float32 memory that all calls share.

    None: too large, or not there before a capture in which it cannot be made.
    """
    size = math.prod(shape)
    memory = _unread_memory(device) if size <= UNREAD else None
    return None if memory is None else argument(memory[:size].view(shape))


_unread: dict[int, Tensor] = {}


def _unread_memory(device: int) -> Tensor | None:
    if device not in _unread and not fast.is_capturing():
        memory = _floats(device, UNREAD)
        torch.cuda.current_stream(device).synchronize()  # any stream may write to it from here on
        _unread.setdefault(device, memory)
    return _unread.get(device)


def argument(x: Tensor) -> Any:
    """A tensor that many calls pass, in the form to which TVM-FFI would convert it in each."""
    import tvm_ffi  # not at the top: the CPU backend does without it

    return tvm_ffi.from_dlpack(x)
