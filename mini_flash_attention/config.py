"""The tile tables: how each kernel is cut to its GPU, head dim and mask."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, ClassVar

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

    def at(self, seqlen_q: int) -> "ForwardSm80":
        return self

    @property
    def variants(self) -> tuple["ForwardSm80", ...]:
        """All tiles of the library."""
        return (self,)

    @property
    def shared_memory(self) -> int:
        """Bytes: one tile of Q, one block of K and one of V."""
        return 2 * self.head_dim * (self.tile_m + 2 * self.tile_n)

    @property
    def stack(self) -> int:
        """Bytes of stack it may use: a few spilled words cost less than a smaller tile (SM80_TILES)."""
        return 64 if self.head_dim == 128 and self.mask != "window" else 0


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
    q_stages: int = 2  # 2: the next tile's Q comes, and its first S, under this tile's last P·V
    q_regs: bool = False  # Q in registers: less shared memory traffic, head_dim / 4 more registers
    ordered: bool = True  # the warpgroups take turns to issue their products
    short: "ForwardSm90 | None" = None  # other tiles, in the same library, up to short_seqlen queries
    short_seqlen: int = 0

    def at(self, seqlen_q: int) -> "ForwardSm90":
        """The tiles that the kernel chooses at launch."""
        return self.short.at(seqlen_q) if self.short and seqlen_q <= self.short_seqlen else self

    @property
    def variants(self) -> tuple["ForwardSm90", ...]:
        """All tiles of the library."""
        return (self, *self.short.variants) if self.short else (self,)

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
    if path == "sm80":
        return ForwardSm80(arch, dtype, head_dim, mask, *of_row(SM80_TILES, head_dim, mask))
    row = ForwardSm90(arch, dtype, head_dim, mask, **of_row(SM90_TILES, head_dim, mask))
    short, short_seqlen = None, 0
    for seqlen, differences in of_row(SM90_SHORT, head_dim, mask):
        short = replace(row, **differences, short=short, short_seqlen=short_seqlen)
        short_seqlen = seqlen
    return replace(row, short=short, short_seqlen=short_seqlen)


def of_row(table: dict, head_dim: int, mask: str) -> Any:
    """A table's entry for this mask where it has one of its own, else the one for the head dim."""
    return table[head_dim, mask] if (head_dim, mask) in table else table[head_dim]


# head dim -> (tile_m, tile_n, warps); each fits the 99 kB of the smallest architecture. 32 rows for each warp
# where registers allow. Measured on an H100 (docs/worklog.md, SM80 tiles): 64: 128 keys would be up to 8 %
# faster, but 96 and more spill; 128: spills a few words (see stack), and is still 5 to 10 % ahead of
# 128 x 48, which does not, 14 % of 64 x 128, 19 % of 128 x 128 with 8 warps; 256: two thread blocks an SM,
# 0 to 14 % ahead of 128 x 64 with 8 warps.
SM80_TILES = {
    64: (128, 80, 4),
    96: (128, 64, 4),
    128: (128, 64, 4),
    (128, "window"): (64, 64, 4),  # the third loop would spill up to 34 words at 128 x 64
    192: (128, 64, 8),
    256: (64, 64, 4),
}

# Measured on an H100 (docs/worklog.md, SM90 tiles). At 192 and 256 two Q buffers would leave too little
# room for keys.
SM90_TILES = {
    64: dict(tile_m=192, tile_n=128),
    96: dict(tile_m=192, tile_n=96),
    128: dict(tile_m=128, tile_n=128, q_regs=True),
    192: dict(tile_m=128, tile_n=96, q_stages=1, ordered=False),
    256: dict(tile_m=128, tile_n=64, q_stages=1),
    (256, "full"): dict(
        tile_m=128, tile_n=64, q_stages=1, ordered=False
    ),  # 1 % ahead; with a mask 1 % behind
}

# head dim -> (longest seqlen_q, what differs), shortest first: smaller tiles waste less of a short sequence,
# and leave room for more of them in flight.
_SHORT_64 = dict(tile_m=128, stages=4, q_regs=True, ordered=False)
SM90_SHORT = {
    64: ((2048, _SHORT_64),),
    (64, "full"): ((1024, _SHORT_64),),
    96: ((2048, dict(tile_m=128, tile_n=128, stages=3, q_regs=True, ordered=False)),),
    (96, "full"): (),
    128: ((512, dict(tile_n=64, stages=5)), (2048, dict(tile_n=96, stages=3))),
    (128, "full"): (),
    192: (),
    256: (),
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
