"""Memory through which the kernels of one call hand results to each other, kept for the next call.

Launches that may run at the same time must not share it. Those of one thread on one stream follow each
other; those of two threads may alternate, so each thread has memory of its own for each stream. A captured
launch may be replayed beside any other: it gets memory that nobody else uses.

What is kept is kept for good, in the memory pool that is current when it is first needed. A stream's handle
stands for the stream: PyTorch's live as long as the process.
"""

import threading

import torch
from torch import Tensor

KEPT = 2**20  # float32 elements: a call that needs more takes longer than an allocation


class _Kept(threading.local):
    def __init__(self) -> None:
        self.of_stream: dict[tuple[int, int], Tensor] = {}


_kept = _Kept()


def workspace(like: Tensor, device: int) -> Tensor:
    """Float32 memory for a launch on the device's current stream, of the size of `like` at least."""
    if like.numel() > KEPT or torch._C._cuda_isCurrentStreamCapturing():
        return torch.empty_like(like)
    stream = torch._C._cuda_getCurrentRawStream(device)
    kept = _kept.of_stream.get((device, stream))
    if kept is None:
        kept = torch.empty(KEPT, dtype=torch.float32, device=like.device)
        _kept.of_stream[device, stream] = kept
    return kept
