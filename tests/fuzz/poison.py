"""Uninitialised memory is NaN, so that nothing reads it unnoticed."""

import contextlib
import functools
from collections.abc import Callable, Iterator
from unittest import mock

import torch
from torch import Tensor

from mini_flash_attention.gpu import fast

ALLOCATORS = [(torch, name) for name in ("empty", "empty_like", "empty_strided")]
ALLOCATORS += [(Tensor, name) for name in ("new_empty", "new_empty_strided")]
ALLOCATORS += [(fast, "allocate")]


@contextlib.contextmanager
def poisoned() -> Iterator[None]:
    """What torch.empty and its kin return is filled with NaN."""
    with contextlib.ExitStack() as stack:
        for owner, name in ALLOCATORS:
            stack.enter_context(mock.patch.object(owner, name, _filled(getattr(owner, name))))
        yield


def _filled(allocate: Callable[..., Tensor]) -> Callable[..., Tensor]:
    @functools.wraps(allocate)
    def allocate_nan(*args: object, **kwargs: object) -> Tensor:
        tensor = allocate(*args, **kwargs)
        with torch.no_grad():
            return tensor.fill_(float("nan")) if tensor.is_floating_point() else tensor

    return allocate_nan
