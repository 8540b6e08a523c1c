"""What all tile tables share: data types, head dims, masks, GPUs."""

from typing import Any

ELEMENTS = 8  # of a 16-byte chunk: the kernels' tensors have head dims and strides in multiples of it
DTYPES = ("float16", "bfloat16")
# A head dim in between uses the next one, padded in shared memory.
HEAD_DIMS = (64, 96, 128, 192, 256)
MASKS = ("full", "causal", "window")  # no window limit, one on the right, one on both sides

# Shared memory for one thread block, in bytes (CUDA programming guide, "compute capabilities").
SHARED_MEMORY = {
    "sm_80": 163 * 1024,
    "sm_86": 99 * 1024,
    "sm_87": 163 * 1024,
    "sm_89": 99 * 1024,
    "sm_90a": 227 * 1024,
    "sm_100a": 227 * 1024,
    "sm_103a": 227 * 1024,
    "sm_110a": 227 * 1024,
    "sm_120a": 99 * 1024,
    "sm_121a": 99 * 1024,
}


def gpu_arch(capability: tuple[int, int]) -> str:
    """(9, 0) -> "sm_90a"; from SM90 on, each architecture's own instructions are allowed."""
    major, minor = capability
    return f"sm_{major}{minor}" + ("a" if major >= 9 else "")


def bucket(head_dim: int) -> int:
    return next(size for size in HEAD_DIMS if size >= head_dim)


def paths(arch: str) -> tuple[str, ...]:
    """The paths that run on an architecture, the preferred one first."""
    if arch not in SHARED_MEMORY:
        raise ValueError(f"arch must be one of {', '.join(SHARED_MEMORY)}, but was {arch!r}")
    return ("sm90", "sm80") if arch == "sm_90a" else ("sm80",)


def of_row(table: dict, head_dim: int, mask: str) -> Any:
    """A table's entry for this mask where it has one of its own, else the one for the head dim."""
    return table[head_dim, mask] if (head_dim, mask) in table else table[head_dim]


def is_sm90_or_newer(arch: str) -> bool:
    return int(arch[3:].rstrip("a")) >= 90
