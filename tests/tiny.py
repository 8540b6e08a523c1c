"""A kernel that scales numbers and compiles in a tenth of a second, to test the cache with."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import mini_flash_attention.kernels

mini_flash_attention.kernels.__path__.append(str(Path(__file__).parent))


@dataclass(frozen=True)
class TinyConfig:
    """`live` values are held in registers at the same time: more than 255 spill to the stack."""

    dtype: str = "Float32"
    live: int = 1
    arch: str = "sm_90a"
    kernel: str = "tiny_kernel"


def signature(function: Callable) -> str:
    """Returns how the kernel describes itself when it refuses a tensor, which needs no GPU."""
    import torch

    try:
        function(torch.zeros(1), 1.0)
    except ValueError as error:
        return str(error)
    raise AssertionError("the kernel took a tensor of the CPU")
