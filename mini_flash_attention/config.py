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

    @property
    def stack(self) -> int:
        """Bytes of stack that the kernel may use: here a few spilled words cost less than a smaller tile (SM80_TILES)."""
        return 64 if self.head_dim in (64, 128) else 0


@dataclass(frozen=True)
class ForwardSm90:
    """Every static fact of one fwd_sm90 kernel; its repr is part of the cache key."""

    kernel: ClassVar[str] = "fwd_sm90"
    stack: ClassVar[int] = 0
    arch: str
    dtype: str
    head_dim: int
    mask: str
    tile_m: int  # query rows of a tile: 64 for each consumer warpgroup
    tile_n: int  # keys of a block
    stages: int = 2  # K and V blocks in shared memory
    q_stages: int = 2  # 2: the next tile's Q is loaded, and its first S issued, under this tile's last P·V
    q_regs: bool = False  # Q in registers: less shared memory traffic, head_dim / 4 more registers
    ordered: bool = True  # the warpgroups take turns to issue their products

    @property
    def wgs(self) -> int:
        return self.tile_m // 64

    @property
    def shared_memory(self) -> int:
        """Bytes: Q and the K and V blocks; barriers come on top."""
        return 2 * self.head_dim * (self.q_stages * self.tile_m + 2 * self.stages * self.tile_n)


ForwardConfig = ForwardSm80 | ForwardSm90


def gpu_arch(capability: tuple[int, int]) -> str:
    """(9, 0) -> "sm_90a"; from SM90 on, each architecture's own instructions are allowed."""
    major, minor = capability
    return f"sm_{major}{minor}" + ("a" if major >= 9 else "")


def bucket(head_dim: int) -> int:
    return next(size for size in HEAD_DIMS if size >= head_dim)


def forward(path: str, arch: str, dtype: str, head_dim: int, mask: str) -> ForwardConfig:
    """The configuration for a head dim of HEAD_DIMS on one path ("sm80" or "sm90")."""
    if path == "sm90":
        tile = SM90_TILES[head_dim]
        return ForwardSm90(arch, dtype, head_dim, mask, **tile)
    return ForwardSm80(arch, dtype, head_dim, mask, *SM80_TILES[head_dim])


# head dim -> (tile_m, tile_n, warps). Measured on an H100 against the alternatives named (docs/worklog.md, SM80 tiles);
# each fits the 99 kB of the smallest architecture.
SM80_TILES = {
    64: (128, 128, 4),  # 3 to 6 % ahead of 128 x 96, 5 to 12 % of 128 x 64
    96: (128, 64, 4),
    128: (128, 64, 4),  # 5 to 10 % ahead of 128 x 48, 14 % of 64 x 128, 19 % of 128 x 128 with 8 warps
    192: (128, 64, 8),
    256: (64, 64, 4),  # two thread blocks an SM on SM90; 0 to 14 % ahead of 128 x 64 with 8 warps
}


# Measured on an H100 (docs/worklog.md, SM90 tiles).
SM90_TILES = {
    64: dict(tile_m=192, tile_n=128),
    96: dict(tile_m=128, tile_n=128, q_regs=True),
    128: dict(tile_m=128, tile_n=128, q_regs=True),
    192: dict(tile_m=128, tile_n=96, q_stages=1, ordered=False),
    256: dict(tile_m=128, tile_n=64, q_stages=1, ordered=False),  # two Q buffers would not fit
}


def paths(arch: str) -> tuple[str, ...]:
    """The paths that run on an architecture, the preferred one first."""
    if arch not in SHARED_MEMORY:
        raise ValueError(f"arch must be one of {', '.join(SHARED_MEMORY)}, but was {arch!r}")
    return ("sm90", "sm80") if arch == "sm_90a" else ("sm80",)


def forward_configs(arch: str) -> Iterator[ForwardConfig]:
    """Every row for an architecture: what `precompile --all` compiles."""
    for path in paths(arch):
        for head_dim in HEAD_DIMS:
            for dtype in DTYPES:
                for mask in MASKS:
                    yield forward(path, arch, dtype, head_dim, mask)
