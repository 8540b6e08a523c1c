"""All memory that outlives a call: counters, the workspace of decoding, and what is written for nobody.

Launches that may run at the same time must not share what both write and read. Those on one stream follow
each other (one that starts early, by programmatic dependent launch, waits first), so a stream has its own
counters. Two threads may alternate on a stream, and a decode's workspace is asked for before it is launched:
each thread has its own for each stream. A captured graph may be replayed on any stream, beside any other:
each of its streams has counters that nobody else uses, and its workspaces lie in its own memory pool.

What is kept is kept for good, outside of the memory pools of callers, who may give them up. A stream's handle
stands for the stream: PyTorch's live as long as the process.
"""

import functools
import math
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from mini_flash_attention.gpu import fast, graphs

WORKSPACE = 2**20  # float32 elements: a call that needs more takes longer than an allocation
COUNTERS = 512  # of a workspace
STOCK = 2**20  # counters of a device, for captured graphs: 4 MB, for 2048 streams of graphs at a time
UNREAD = 2**18  # float32 elements: of larger results the kernel takes longer than the host saves


# Counters: int32, zero before and after each launch. A persistent kernel draws its tiles from two of them; in
# a decode, each tile has one for its splits. They are zero afterwards only if the thread blocks agree on how
# many they are: the lengths that a decode reads must not change while it runs.

_lock = threading.Lock()
_tile_counters: dict[tuple[int, int], Tensor] = {}  # of (device, stream)


class Stock:
    """Counters of a device for captured graphs, as nothing can be zeroed ahead in a capture.

    A graph's streams have a block each, from their first launch until the graph is gone. The block is zero
    then, as every launch leaves it so.
    """

    def __init__(self, counters: Tensor) -> None:
        self.counters = counters
        self.free = list(range(len(counters) // COUNTERS))
        self.gone = graphs.flags(len(self.free))  # of each block: whether its graph is
        self.lent: dict[tuple[int, int], tuple[int, Tensor]] = {}  # (capture, stream) -> block, counters

    def lend(self, graph: graphs.Graph, stream: int) -> Tensor | None:
        """None: all blocks are lent, or nobody will tell when this graph is gone."""
        borrower = graph.capture, stream
        if borrower not in self.lent:
            if not self.free:
                self._take_back()
            if not self.free or not graphs.tell(graph, self.gone, self.free[-1]):
                return None
            block = self.free.pop()
            self.lent[borrower] = block, self.counters[block * COUNTERS : (block + 1) * COUNTERS]
        return self.lent[borrower][1]

    def _take_back(self) -> None:
        for borrower, (block, _) in list(self.lent.items()):
            if self.gone[block]:
                self.gone[block] = 0
                self.free.append(block)
                del self.lent[borrower]


_stock: dict[int, Stock] = {}  # of a device


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
            _stock[device] = Stock(_zeros(device, STOCK))
            torch.cuda.current_stream(device).synchronize()  # any stream may use them from here on
    return _zeros(device, count)


def _for_capture(device: int, count: int) -> Tensor:
    """Counters for a captured launch, `count` at least. If the stock has none, each replay zeroes them."""
    if count == 0:
        return unused(device)
    stream = fast.current_stream(device)
    graph, counters = graphs.captured(stream), None
    if graph is not None and device in _stock:
        with _lock:
            counters = _stock[device].lend(graph, stream)
    return fast.allocate((count,), (1,), torch.int32).zero_() if counters is None else counters


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
        return _for_this_launch(size), _for_capture(device, count)
    stream = fast.current_stream(device)
    kept = _workspaces.of_stream.get((device, stream))
    if kept is None:
        kept = _floats(device, WORKSPACE), _for_stream(device, COUNTERS)
        _workspaces.of_stream[device, stream] = kept
    return kept if size <= WORKSPACE else (_for_this_launch(size), kept[1])


def _for_this_launch(size: int) -> Tensor:
    return fast.allocate((size,), (1,), torch.float32)


# What stands for tensors that a call does without


@functools.cache
def unused(device: int) -> Tensor:
    """(2) int32 that no kernel reads or writes."""
    return _kept(torch.empty, device, 2, torch.int32)


@functools.cache
def not_given(device: int) -> tuple[Any, Any, Any]:
    """What stands for int32 tensors of one and of two dimensions, and a float32 one, that are not given."""
    one, number = unused(device), _floats(device, 1)
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


# Memory that is kept


def _zeros(device: int, count: int) -> Tensor:
    return _kept(torch.zeros, device, count, torch.int32)


def _floats(device: int, size: int) -> Tensor:
    return _kept(torch.empty, device, size, torch.float32)


def _kept(make: Callable[..., Tensor], device: int, size: int, dtype: torch.dtype) -> Tensor:
    """For the device's current stream, but by another thread: this one's memory pool may be a caller's, and
    its modes (inference, fake tensors) would be the tensor's for good.
    """
    stream = torch.cuda.current_stream(device)

    def on_stream() -> Tensor:
        with torch.cuda.stream(stream):
            return make(size, dtype=dtype, device=f"cuda:{device}")

    with ThreadPoolExecutor(1) as other:
        return other.submit(on_stream).result()
