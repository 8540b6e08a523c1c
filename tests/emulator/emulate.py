"""Runs a kernel on PyTorch tensors of the CPU."""

from typing import Any

import numpy as np
import torch

from emulator.block import execute
from emulator.capture import CudaTensor, Library
from emulator.memory import Global


def emulate(library: Library, call: tuple, unwritten: tuple[torch.Tensor, ...] = ()) -> set[str]:
    """Does what the kernel would do to the tensors of `call`, a record of kernels/calls.py.

    unwritten: the tensors in which nothing is yet. memory.Fault says what a GPU would not forgive.
    Returns the instructions that read shared memory which nobody had written: all its bits are set, NaN, so a
    result that comes of it would show it.
    """
    memory = Global()
    empty = {tensor.untyped_storage().data_ptr() for tensor in unwritten}
    places: dict[int, tuple[torch.UntypedStorage, int]] = {}

    def move(value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(move(field) for field in value)
        if not isinstance(value, torch.Tensor):
            return value
        storage = value.untyped_storage()
        if storage.data_ptr() not in places:
            content = None if storage.data_ptr() in empty else bytes(_view(storage))
            places[storage.data_ptr()] = storage, memory.allocate(storage.nbytes(), content)
        address = places[storage.data_ptr()][1] + value.storage_offset() * value.element_size()
        return CudaTensor(address, value.shape, value.stride(), str(value.dtype).removeprefix("torch."))

    execute(library.launches(move(call)), memory)
    for storage, address in places.values():
        written = memory.is_written(address, storage.nbytes())
        _view(storage)[written] = memory.bytes(address, storage.nbytes())[written]
    return memory.unwritten_reads


def _view(storage: torch.UntypedStorage) -> np.ndarray:
    """The bytes of a storage, themselves."""
    return torch.tensor([], dtype=torch.uint8).set_(storage).numpy()
