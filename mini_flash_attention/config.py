"""The tile tables: how each kernel is cut to its GPU, head dim and mask."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

DTYPES = ("float16", "bfloat16")
HEAD_DIMS = (64, 96, 128, 192, 256)  # a head dim in between uses the next one, padded in shared memory
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


@dataclass(frozen=True)
class ForwardSm80:
    """Every static fact of one fwd_sm80 kernel; its repr is part of the cache key."""

    kernel: ClassVar[str] = "fwd_sm80"
    arch: str
    dtype: str
    head_dim: int
    mask: str
    tile_m: int  # query rows of a thread block
    tile_n: int  # keys of a block
    warps: int

    @property
    def shared_memory(self) -> int:
        """Bytes: one tile of Q, one block of K and one of V."""
        return 2 * self.head_dim * (self.tile_m + 2 * self.tile_n)


ForwardConfig = ForwardSm80


def gpu_arch(capability: tuple[int, int]) -> str:
    """(9, 0) -> "sm_90a"; from SM90 on, each architecture's own instructions are allowed."""
    major, minor = capability
    return f"sm_{major}{minor}" + ("a" if major >= 9 else "")


def bucket(head_dim: int) -> int:
    return next(size for size in HEAD_DIMS if size >= head_dim)


def forward(path: str, arch: str, dtype: str, head_dim: int, mask: str) -> ForwardConfig:
    """The configuration for a head dim of HEAD_DIMS on one path ("sm80" or "sm90")."""
    return forward_sm80(arch, dtype, head_dim, mask)


def forward_sm80(arch: str, dtype: str, head_dim: int, mask: str) -> ForwardSm80:
    """32 rows a warp where registers allow: ldmatrix of K and V then feeds twice as many products."""
    tile = {
        64: (128, 128, 4),
        96: (128, 64, 4),
        128: (128, 64, 4),
        192: (128, 64, 8),
        256: (64, 64, 4),
    }[head_dim]
    return ForwardSm80(arch, dtype, head_dim, mask, *tile)


def paths(arch: str) -> tuple[str, ...]:
    """The paths that run on an architecture, the preferred one first."""
    if arch not in SHARED_MEMORY:
        raise ValueError(f"arch must be one of {', '.join(SHARED_MEMORY)}, but was {arch!r}")
    return ("sm80",)


def forward_configs(arch: str) -> Iterator[ForwardConfig]:
    """Every row for an architecture: what `precompile --all` compiles."""
    for path in paths(arch):
        for head_dim in HEAD_DIMS:
            for dtype in DTYPES:
                for mask in MASKS:
                    yield forward(path, arch, dtype, head_dim, mask)
