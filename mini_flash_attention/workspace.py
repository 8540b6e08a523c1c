"""Memory through which the thread blocks of one call hand results to each other, kept for the next call.

Launches that may run at the same time must not share it. Those of one thread on one stream follow each
other; those of two threads may alternate, so each thread has memory of its own for each stream. A captured
launch may be replayed beside any other: it gets memory that nobody else uses.

What is kept is kept for good, in the memory pool that is current when it is first needed. A stream's handle
stands for the stream: PyTorch's live as long as the process.
"""

import threading

import torch
from torch import Tensor

from mini_flash_attention import counters

KEPT = 2**20  # float32 elements: a call that needs more takes longer than an allocation
COUNTERS = 512


class _Kept(threading.local):
    def __init__(self) -> None:
        self.of_stream: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}


_kept = _Kept()


def workspace(size: int, count: int, device: int) -> tuple[Tensor, Tensor]:
    """For a launch on the device's current stream: `size` float32 at least, and `count` counters at least.

    COUNTERS at most. They are zero, and must be so again after the launch: counters.py.
    """
    if torch._C._cuda_isCurrentStreamCapturing():
        return _empty(size, device), counters.for_capture(device, count)
    stream = torch._C._cuda_getCurrentRawStream(device)
    kept = _kept.of_stream.get((device, stream))
    if kept is None:
        kept = _empty(KEPT, device), counters.for_stream(device, COUNTERS)
        _kept.of_stream[device, stream] = kept
    return kept if size <= KEPT else (_empty(size, device), kept[1])


def _empty(size: int, device: int) -> Tensor:
    return torch.empty(size, dtype=torch.float32, device=f"cuda:{device}")
