"""Tiles of the forward kernels."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from mini_flash_attention.gpu.config.common import (
    DTYPES,
    HEAD_DIMS,
    MASKS,
    of_row,
    paths,
)
from mini_flash_attention.scores.capture import PLAIN, Scoring


@dataclass(frozen=True)
class ForwardSm80:
    """Every static fact of one forward.sm80 kernel; its repr is part of the cache key."""

    kernel: ClassVar[str] = "forward.sm80"
    arch: str
    dtype: str
    head_dim: int
    mask: str
    tile_m: int  # query rows of a thread block
    tile_n: int  # keys of a block
    warps: int
    score: Scoring = PLAIN  # kernels/parts/scores.py
    ragged: bool = False  # sequences have lengths of their own: kernels/parts/seqlen.py
    page: int = 0  # 1: k and v are pages, of any size
    dropout: bool = False  # kernels/parts/dropout.py
    sparse: bool = False  # visits the blocks of a block mask alone: kernels/parts/sparse.py
    sinks: bool = False  # attention sinks: kernels/parts/softmax.py

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
        return 64 if self.sparse or (self.head_dim == 128 and self.mask != "window") else 0


@dataclass(frozen=True)
class ForwardSm90:
    """Every static fact of one forward.sm90 kernel; its repr is part of the cache key."""

    kernel: ClassVar[str] = "forward.sm90"
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
    score: Scoring = PLAIN  # kernels/parts/scores.py
    ragged: bool = False  # sequences have lengths of their own: kernels/parts/seqlen.py
    page: int = 0  # what divides a page of k and v: one of SM90_PAGES; 0: no pages
    dropout: bool = False  # kernels/parts/dropout.py
    sparse: bool = False  # visits the blocks of a block mask alone: kernels/parts/sparse.py
    sinks: bool = False  # attention sinks: kernels/parts/softmax.py
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
    def registers(self) -> tuple[int, int]:
        """Of a producer's and a consumer's thread.

        Finding sequences takes some of the consumers', unless they need all for a score function.
        """
        if self.wgs == 3:
            return 32, 160
        return (40, 232) if self.ragged and not self.score else (24, 240)

    @property
    def stack(self) -> int:
        """Bytes of stack it may use: where functions spill, smaller tiles are slower (SM90_SCORED)."""
        light = self.score and not self.score.heavy and not self.sparse
        return 0 if not light else {64: 128, 128: 48}.get(self.head_dim, 0)

    @property
    def staggered(self) -> bool:
        """Whether warpgroups may start at other blocks than the tile's first: none of their rows sees it."""
        return self.mask != "full" and self.tile_n < self.tile_m

    @property
    def piece(self) -> int:
        """Keys that one TMA load copies: they lie in one page."""
        return math.gcd(self.page, self.tile_n)

    @property
    def shared_memory(self) -> int:
        """Bytes: Q and the K and V blocks; barriers come on top."""
        return 2 * self.head_dim * (self.q_stages * self.tile_m + 2 * self.stages * self.tile_n)


ForwardConfig = ForwardSm80 | ForwardSm90


def forward(path: str, arch: str, dtype: str, head_dim: int, mask: str, **features: Any) -> ForwardConfig:
    """The configuration for a head dim of HEAD_DIMS on one path ("sm80" or "sm90").

    features: score, ragged, page, dropout, sinks and sparse, as in the configs.
    """
    if path == "sm80":
        table = SM80_TILES | SM80_DROPOUT if features.get("dropout") else SM80_TILES
        table = table | SM80_SPARSE if features.get("sparse") else table
        return ForwardSm80(arch, dtype, head_dim, mask, *of_row(table, head_dim, mask), **features)
    score, sparse = features.get("score", PLAIN), features.get("sparse", False)
    if sparse or (score and head_dim in SM90_SCORED):
        light, heavy = (SM90_SPARSE, SM90_SPARSE_HEAVY) if sparse else (SM90_SCORED, SM90_HEAVY)
        often = score.without_masks if sparse else score  # what is computed in more than a few blocks
        tiles: dict[str, Any] = heavy.get(head_dim, light[head_dim]) if often.heavy else light[head_dim]
        return ForwardSm90(arch, dtype, head_dim, mask, **tiles, **features)
    row = ForwardSm90(arch, dtype, head_dim, mask, **of_row(SM90_TILES, head_dim, mask), **features)
    short, short_seqlen = None, 0
    for seqlen, differences in of_row(SM90_SHORT, head_dim, mask):
        short = replace(row, **differences, short=short, short_seqlen=short_seqlen)
        short_seqlen = seqlen
    return replace(row, short=short, short_seqlen=short_seqlen)


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

# What differs with a block mask: tiles that divide its blocks.
SM80_SPARSE = {
    64: (128, 64, 4),
    96: (128, 32, 4),
}

# What differs with dropout: random numbers take registers too.
SM80_DROPOUT = {
    96: (64, 32, 4),
    (128, "window"): (64, 48, 4),
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

# Keys that TMA copies at once, as many as divide a page; pages of other sizes are for the SM80 path.
SM90_PAGES = (64, 16, 8)

# With functions of the scores. Measured on an H200 (docs/worklog.md): 64: 192 rows are 15 to 20 % ahead of
# 128, though they spill; 128: keys of 128 with Q in registers 3 to 6 % ahead of 112 without.
SM90_SCORED = {
    64: dict(tile_m=192, tile_n=128),
    96: dict(tile_m=128, tile_n=128, stages=3),
    128: dict(tile_m=128, tile_n=128, q_regs=True),
    192: dict(tile_m=128, tile_n=80, q_stages=1, ordered=False),
}

# With functions that take more registers: Scoring.heavy. Smaller tiles spill less: a table of biases is 1.7
# times as fast as with the tiles above.
SM90_HEAVY = {
    64: dict(tile_m=128, tile_n=128, stages=4),
    128: dict(tile_m=128, tile_n=112),
}

# With a block mask, whose blocks are 128 queries and 128 keys. Measured on an H200: 128: 6 to 8 % ahead of 64
# keys.
SM90_SPARSE = {
    64: dict(tile_m=128, tile_n=128, stages=4, q_regs=True, ordered=False),
    96: dict(tile_m=128, tile_n=128, stages=3),
    128: dict(tile_m=128, tile_n=128),
    192: dict(tile_m=128, tile_n=64, q_stages=1, ordered=False),
    256: dict(tile_m=128, tile_n=64, q_stages=1),
}

# The same with such functions.
SM90_SPARSE_HEAVY = {
    64: dict(tile_m=128, tile_n=128, stages=4),
    128: dict(tile_m=128, tile_n=64, stages=4),
}

# head dim -> (longest seqlen_q, what differs), shortest first: smaller tiles waste less of a short sequence,
# and leave room for more of them in flight.
_SHORT_64 = dict(tile_m=128, stages=4, q_regs=True, ordered=False)

SM90_SHORT = {
    64: ((2048, _SHORT_64),),
    (64, "full"): ((1024, _SHORT_64),),
    96: ((2048, dict(tile_m=128, tile_n=128, stages=3, q_regs=True, ordered=False)),),
    (96, "full"): (),
    128: ((1024, dict(tile_n=64, stages=5)), (2048, dict(tile_n=96, stages=3))),
    (128, "full"): (),
    192: (),
    256: (),
}


def forward_configs(arch: str) -> Iterator[ForwardConfig]:
    """Every row for an architecture: what `precompile --all` compiles."""
    for path in paths(arch):
        for head_dim in HEAD_DIMS:
            for dtype in DTYPES:
                for mask in MASKS:
                    yield forward(path, arch, dtype, head_dim, mask)
