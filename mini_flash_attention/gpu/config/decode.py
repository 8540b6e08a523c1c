"""Tiles of decoding, and the kernel that appends to a cache."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from mini_flash_attention.gpu.config.common import (
    DTYPES,
    HEAD_DIMS,
    SHARED_MEMORY,
    is_sm90_or_newer,
)
from mini_flash_attention.scores.capture import PLAIN, Scoring


@dataclass(frozen=True)
class Decode:
    """Every static fact of a decode kernel, and of the combine kernel in the same library."""

    kernel: ClassVar[str] = "decode.attend"
    ragged: ClassVar[bool] = True
    warps: ClassVar[int] = 4
    arch: str
    dtype: str
    head_dim: int
    tile_m: int  # query rows of a thread block, 16 for a warp: queries times the heads that share a key head
    chunk: int  # keys that a warp works on at a time
    slots: int  # chunks of K and V in shared memory, one of them not in flight
    pdl: bool  # each kernel is launched before the one in front of it is done, to wait for it: SM90 on
    score: Scoring = PLAIN  # kernels/parts/scores.py
    page: int = 0  # 1: k and v are pages, of any size
    sinks: bool = False  # attention sinks: kernels/parts/softmax.py

    @property
    def stack(self) -> int:
        """Bytes of stack it may use: a few words, with functions of the scores; not measured against less."""
        return 24 if self.score and self.head_dim == 256 and self.tile_m == 64 else 0

    @property
    def row_warps(self) -> int:
        """Warps that share chunks, for other rows."""
        return self.tile_m // 16

    @property
    def key_warps(self) -> int:
        """Warps, or groups of row_warps, that have chunks of their own."""
        return self.warps // self.row_warps

    @property
    def can_merge(self) -> bool:
        """Whether a thread block can merge the splits of its tile: the rows are few."""
        return self.row_warps == 1

    @property
    def merged_columns(self) -> int:
        """Columns of O where splits are merged: 4 for a lane at a time."""
        return -(-self.head_dim // 128) * 128

    @property
    def merged_splits(self) -> int:
        """Splits whose O a warp has on the way at a time, as it merges a row: 8 KB."""
        return 2048 // self.merged_columns

    @property
    def merged_rows(self) -> int:
        """Rows that a warp merges together: as many as the ring's memory has room for, 8.5 KB each."""
        return min(2, self.shared_memory // (self.warps * 8704 + 1))

    @property
    def tile_n(self) -> int:
        """Keys of a block."""
        return self.chunk * self.key_warps

    @property
    def block_size(self) -> int:
        """Bytes of K and V in a block."""
        return 4 * self.tile_n * self.head_dim

    @property
    def warp_rows(self) -> int:
        """Rows of a chunk that a warp copies."""
        return self.chunk // self.row_warps

    @property
    def shared_memory(self) -> int:
        """Bytes: the rings; the results of the warps, which take their place."""
        rings = 2 * self.slots * self.key_warps * self.chunk * self.head_dim
        return max(rings, 4 * self.key_warps * self.tile_m * (self.head_dim + 8 + 2))

    @property
    def resident(self) -> int:
        """Thread blocks that an SM holds; it has 1 KB more than one may use, and takes 1 KB for each."""
        return min(2, (SHARED_MEMORY[self.arch] + 1024) // (self.shared_memory + 1024))


# head dim -> {tile_m: (chunk, slots)}: two thread blocks an SM, to have loads in flight while one starts or
# ends, and 48 to 64 KB on the way in each. Predicted but for one. 64 rows: at 192 and 256 longer chunks
# would spill. 256: three slots are the fewest that keep loads in flight while a chunk is worked on.
DECODE_TILES = {
    64: {16: (32, 5), 64: (64, 9)},
    96: {16: (16, 6), 64: (64, 5)},
    128: {16: (32, 3), 64: (64, 5)},  # measured on an H100: 0 to 4 % ahead of (16, 3), (16, 5) and (16, 6)
    192: {16: (16, 3), 64: (16, 9)},
    256: {16: (16, 3), 64: (16, 9)},
}

# The same for 99 KB. Their memory needs less than half as much in flight.
DECODE_TILES_SMALL = {
    64: {16: (16, 5), 64: (64, 5)},
    96: {16: (16, 3), 64: (32, 5)},
    128: {16: (16, 3), 64: (32, 5)},
    192: {16: (16, 3), 64: (16, 9)},
    256: {16: (16, 3), 64: (16, 9)},
}


def decode(
    arch: str,
    dtype: str,
    head_dim: int,
    rows: int,
    score: Scoring = PLAIN,
    page: int = 0,
    sinks: bool = False,
) -> Decode:
    """The configuration for a head dim of HEAD_DIMS and tiles of up to `rows` rows."""
    table = DECODE_TILES if SHARED_MEMORY[arch] > 100 * 1024 else DECODE_TILES_SMALL
    tile_m = 16 if rows <= 16 else 64
    pdl = is_sm90_or_newer(arch)
    return Decode(arch, dtype, head_dim, tile_m, *table[head_dim][tile_m], pdl, score, page, sinks)


def decode_configs(arch: str) -> Iterator[Decode]:
    """Every row for an architecture, without score functions."""
    for head_dim in HEAD_DIMS:
        for dtype in DTYPES:
            for rows in (16, 64):
                for page in (0, 1):
                    yield decode(arch, dtype, head_dim, rows, page=page)


# How elements are rotated in pairs: 2i with 2i + 1, or i with i + rotary_dim / 2.
ROTARY = ("none", "interleaved", "halves")


@dataclass(frozen=True)
class KvAppend:
    """Every static fact of one decode.append kernel; its repr is part of the cache key."""

    kernel: ClassVar[str] = "decode.append"
    stack: ClassVar[int] = 0
    arch: str
    dtype: str
    rotary: str  # one of ROTARY
    page: int  # 1: k and v are pages, of any size

    @property
    def pdl(self) -> bool:
        """Launched before the kernel in front of it is done, to wait for it."""
        return is_sm90_or_newer(self.arch)


def append_configs(arch: str) -> Iterator[KvAppend]:
    for dtype in DTYPES:
        for rotary in ROTARY:
            for page in (0, 1):
                yield KvAppend(arch, dtype, rotary, page)
