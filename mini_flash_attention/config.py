"""The tile tables: how each kernel is cut to its GPU, head dim and mask."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, ClassVar, NamedTuple

from mini_flash_attention.kernels.blocks import packed_blocks

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
    score: str = "plain"  # or "softcap", "alibi", "softcap_alibi": kernels/scores.py
    ragged: bool = False  # sequences have lengths of their own: kernels/seqlen.py
    page: int = 0  # 1: k and v are pages, of any size
    dropout: bool = False  # kernels/dropout.py

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
    cluster: int = 1  # thread blocks that load K and V together, so that L2 is read once for all
    score: str = "plain"  # or "softcap", "alibi", "softcap_alibi": kernels/scores.py
    ragged: bool = False  # sequences have lengths of their own: kernels/seqlen.py
    page: int = 0  # what divides a page of k and v: one of SM90_PAGES; 0: no pages
    dropout: bool = False  # kernels/dropout.py
    short: "ForwardSm90 | None" = None  # other tiles, in the same library, up to short_seqlen queries
    short_seqlen: int = 0

    def at(self, seqlen_q: int) -> "ForwardSm90":
        """The tiles that the kernel chooses at launch; a head's tiles must fill clusters."""
        fits = seqlen_q > self.short_seqlen and -(-seqlen_q // self.tile_m) % self.cluster == 0
        return self if fits or self.short is None else self.short.at(seqlen_q)

    @property
    def variants(self) -> tuple["ForwardSm90", ...]:
        """All tiles of the library."""
        return (self, *self.short.variants) if self.short else (self,)

    @property
    def wgs(self) -> int:
        return self.tile_m // 64

    @property
    def registers(self) -> tuple[int, int]:
        """Of a producer's and a consumer's thread: finding sequences takes some of the consumers'."""
        if self.wgs == 3:
            return 32, 160
        return (40, 232) if self.ragged else (24, 240)

    @property
    def staggered(self) -> bool:
        """Whether warpgroups may start at other blocks than the tile's first: none of their rows sees it."""
        return self.mask != "full" and self.tile_n < self.tile_m

    @property
    def piece(self) -> int:
        """Keys that one TMA load copies: they lie in one page."""
        return math.gcd(self.page, self.tile_n // self.cluster)

    @property
    def shared_memory(self) -> int:
        """Bytes: Q and the K and V blocks; barriers come on top."""
        return 2 * self.head_dim * (self.q_stages * self.tile_m + 2 * self.stages * self.tile_n)


ForwardConfig = ForwardSm80 | ForwardSm90


class Workspace(NamedTuple):
    """Shapes of what a backward pass needs beside its results; nothing need be in them at the start."""

    stats: tuple[int, ...]  # float32: what bwd_delta.py finds out about the rows
    dq_acc: tuple[int, ...]  # float32: the sum of dQ, tile by tile
    turns: tuple[int, ...]  # int32: who may add to a tile of dq_acc, if deterministic; else drawn tiles


def workspace(row: "BackwardConfig", batch: int, heads_q: int, seqlen_q: int) -> Workspace:
    """For q of this size; ragged: of `batch` sequences in seqlen_q rows (kernels/bwd_schedule.py)."""
    blocks = batch, heads_q, -(-seqlen_q // row.tile_m)
    if row.ragged:
        blocks = 1, heads_q, packed_blocks(seqlen_q, row.tile_m, batch)
    turns = blocks if row.deterministic else (1, 1, 1)
    return Workspace((*blocks, 2, row.tile_m), (*blocks, row.tile_m * row.head_dim), turns)


@dataclass(frozen=True)
class BackwardSm90:
    """Every static fact of one bwd_sm90 kernel; its repr is part of the cache key."""

    kernel: ClassVar[str] = "bwd_sm90"
    stack: ClassVar[int] = 0
    page: ClassVar[int] = 0
    dq_swizzled: ClassVar[bool] = True  # see bwd_convert.offset
    pdl: ClassVar[bool] = True  # each kernel starts while the one before it ends
    arch: str
    dtype: str
    head_dim: int
    mask: str
    deterministic: bool  # dQ is summed up in a fixed order
    tile_m: int  # queries of a block
    tile_n: int  # keys of a thread block
    dq_piece: tuple[int, int]  # (rows, columns) of a block's dQ that are added to dq_acc at a time
    stages: int = 2  # Q blocks in shared memory
    do_stages: int = 2  # dO blocks
    registers: tuple[int, int, int] = (208, 72, 24)  # of a consumer, dQ and load thread
    dq_transposed: bool = False  # dQᵀ = Kᵀ·dSᵀ, Kᵀ in registers: wgmma reads dS alone from shared memory
    persistent: bool = False  # a thread block stays on its SM; the next keys are loaded while it works
    score: str = "plain"  # or "softcap", "alibi", "softcap_alibi": kernels/scores.py
    ragged: bool = False  # sequences have lengths of their own: kernels/seqlen.py
    dropout: bool = False  # kernels/dropout.py

    @property
    def factored(self) -> bool:
        """dS takes another factor than P."""
        return "softcap" in self.score or self.dropout

    @property
    def kv_stages(self) -> int:
        """K and V blocks in shared memory."""
        return 2 if self.persistent else 1

    @property
    def wide(self) -> bool:
        """One consumer warpgroup computes dV, the other dK; else both, each of 64 keys."""
        return self.tile_n == 64

    @property
    def shared_memory(self) -> int:
        """Bytes: the slots of K, V, Q, dO, dS and P, two pieces of dQ, stats; barriers come on top."""
        rows = 2 * self.kv_stages * self.tile_n + (self.stages + self.do_stages) * self.tile_m
        tiles = 2 * self.head_dim * rows
        scores = 2 * 2 * self.tile_n * self.tile_m * (2 if self.wide else 1)
        return tiles + scores + 2 * 4 * math.prod(self.dq_piece) + self.stages * 2 * 4 * self.tile_m


def gpu_arch(capability: tuple[int, int]) -> str:
    """(9, 0) -> "sm_90a"; from SM90 on, each architecture's own instructions are allowed."""
    major, minor = capability
    return f"sm_{major}{minor}" + ("a" if major >= 9 else "")


def bucket(head_dim: int) -> int:
    return next(size for size in HEAD_DIMS if size >= head_dim)


def forward(
    path: str, arch: str, dtype: str, head_dim: int, mask: str, **features: str | bool | int
) -> ForwardConfig:
    """The configuration for a head dim of HEAD_DIMS on one path ("sm80" or "sm90").

    features: score, ragged, page and dropout, as in the configs.
    """
    if path == "sm80":
        table = SM80_TILES | SM80_DROPOUT if features.get("dropout") else SM80_TILES
        return ForwardSm80(arch, dtype, head_dim, mask, *of_row(table, head_dim, mask), **features)
    if features.get("score", "plain") != "plain" and head_dim in SM90_SCORED:
        return ForwardSm90(arch, dtype, head_dim, mask, **SM90_SCORED[head_dim], **features)
    row = ForwardSm90(arch, dtype, head_dim, mask, **of_row(SM90_TILES, head_dim, mask), **features)
    short, short_seqlen = None, 0
    for seqlen, differences in of_row(SM90_SHORT, head_dim, mask):
        short = replace(row, **differences, short=short, short_seqlen=short_seqlen)
        short_seqlen = seqlen
    row = replace(row, short=short, short_seqlen=short_seqlen)
    for short_seqlen, differences in () if features else SM90_LONG.get((head_dim, mask), ()):
        row = replace(row, **differences, short=row, short_seqlen=short_seqlen)
    return row


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

# With a score function: its registers come from smaller tiles.
SM90_SCORED = {
    64: dict(tile_m=128, tile_n=128, stages=4),
    96: dict(tile_m=128, tile_n=128, stages=3),
    128: dict(tile_m=128, tile_n=112),
    192: dict(tile_m=128, tile_n=80, q_stages=1, ordered=False),
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


# (head dim, mask) -> (seqlen_q beyond which, what differs), for plain dense batches.
SM90_LONG = {
    (256, "full"): (
        (512, dict(cluster=2)),
        (1024, dict(cluster=2, ordered=True)),
        (4096, dict(cluster=2, tile_n=80)),
    )
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


# head dim -> tiles of the Hopper backward. Registers hold no more than 64 queries at 128, and no more than 64
# keys from 192 on; shared memory holds no second dO at 256. Measured on an H100 (docs/worklog.md): 64: dQ
# transposed is up to 3 % ahead, persistent thread blocks another 6 to 17 %; 128: those are 2 % ahead at 1,024
# queries, 4 to 10 % behind at 16,384.
SM90_BACKWARD_TILES = {
    64: dict(
        tile_m=128,
        tile_n=128,
        dq_piece=(64, 64),
        registers=(192, 104, 24),
        dq_transposed=True,
        persistent=True,
    ),
    96: dict(tile_m=64, tile_n=128, dq_piece=(64, 96), registers=(192, 96, 32)),
    128: dict(tile_m=64, tile_n=128, dq_piece=(64, 64)),
    192: dict(tile_m=64, tile_n=64, dq_piece=(64, 64)),
    256: dict(tile_m=64, tile_n=64, dq_piece=(64, 64), do_stages=1),
}


# What differs where dS takes another factor than P, whose registers come from smaller tiles or the dQ WG.
SM90_BACKWARD_FACTORED = {
    64: dict(tile_m=64),
    (96, "dropout", "softcap_alibi"): dict(registers=(200, 80, 32)),
    (128, "dropout"): dict(dq_piece=(64, 32), registers=(216, 56, 24)),
    (128, "dropout", "softcap_alibi"): dict(tile_n=64),
    (256, "softcap_alibi"): dict(dq_piece=(64, 32), registers=(216, 56, 24)),
}


def backward_sm90(
    arch: str, dtype: str, head_dim: int, mask: str, deterministic: bool, **features: str | bool
) -> BackwardSm90:
    """The configuration for a head dim of SM90_BACKWARD_TILES."""
    row = BackwardSm90(
        arch, dtype, head_dim, mask, deterministic, **of_row(SM90_BACKWARD_TILES, head_dim, mask), **features
    )
    if deterministic or row.ragged:  # turns follow the order of starts; ragged: not tried
        row = replace(row, persistent=False)
    keys = ((head_dim, "dropout", row.score), (head_dim, "dropout")) if row.dropout else ()
    keys = (*keys, (head_dim, row.score), head_dim) if row.factored else ()
    return replace(row, **next((SM90_BACKWARD_FACTORED[k] for k in keys if k in SM90_BACKWARD_FACTORED), {}))


@dataclass(frozen=True)
class BackwardSm80:
    """Every static fact of one bwd_sm80 kernel; its repr is part of the cache key."""

    kernel: ClassVar[str] = "bwd_sm80"
    page: ClassVar[int] = 0
    arch: str
    dtype: str
    head_dim: int
    mask: str
    deterministic: bool  # dQ is summed up in a fixed order
    tile_m: int  # queries of a block
    tile_n: int  # keys of a thread block: 16 or 32 for each pair of warps
    warps: int
    warps_m: int  # so many of them share out the queries of dQ, the others its columns
    score: str = "plain"  # or "softcap", "alibi", "softcap_alibi": kernels/scores.py
    ragged: bool = False  # sequences have lengths of their own: kernels/seqlen.py
    dropout: bool = False  # kernels/dropout.py

    @property
    def pdl(self) -> bool:
        """Whether each kernel starts while the one before it ends."""
        return int(self.arch[3:].rstrip("a")) >= 90

    @property
    def stats(self) -> int:
        """Statistics of each query: two slots of two, and zeros where one of the products is not seeded."""
        return 5 if (self.score != "plain") != self.dropout else 4

    @property
    def block_numbers(self) -> int:
        """Those that say what a thread block works on: bwd_schedule.Block."""
        return 13 if self.ragged else 5

    @property
    def dq_vector(self) -> int:
        """Values of dQ that one instruction adds to dq_acc."""
        return 4 if int(self.arch[3:].rstrip("a")) >= 90 else 1

    @property
    def shared_memory(self) -> int:
        """Bytes: K and V, two slots of Q, dO, dS and the statistics, and what the thread block works on."""
        tiles = 2 * self.head_dim * (2 * self.tile_n + 4 * self.tile_m)
        return tiles + 4 * self.tile_m * (self.tile_n + self.stats) + 4 * self.block_numbers

    @property
    def stack(self) -> int:
        """Bytes of stack it may use: a few words, used once a query block, cost less than a smaller tile."""
        small_256 = self.head_dim == 256 and self.tile_m == 32
        if self.score == "plain" and not self.ragged and not self.dropout:
            return 8 if small_256 and self.deterministic else 0
        return 24 if small_256 else 8


# head dim -> tiles of the SM80 backward, the first that fits the shared memory. A warp's keys are as many as
# its registers hold, since all pairs of warps read the same queries: 32 up to 128, else 16. Predicted, not
# measured.
SM80_BACKWARD_TILES = {
    64: (
        dict(tile_m=128, tile_n=128, warps=8, warps_m=4),
        dict(tile_m=64, tile_n=128, warps=8, warps_m=4),
    ),
    96: (
        dict(tile_m=64, tile_n=128, warps=8, warps_m=4),
        dict(tile_m=64, tile_n=64, warps=8, warps_m=4),
    ),
    128: (
        dict(tile_m=64, tile_n=128, warps=8, warps_m=2),
        dict(tile_m=32, tile_n=64, warps=8, warps_m=2),
    ),
    192: (
        dict(tile_m=64, tile_n=64, warps=8, warps_m=2),
        dict(tile_m=32, tile_n=32, warps=4, warps_m=2),
    ),
    256: (
        dict(tile_m=64, tile_n=64, warps=8, warps_m=2),
        dict(tile_m=32, tile_n=64, warps=8, warps_m=2),
        dict(tile_m=16, tile_n=32, warps=4, warps_m=1),
    ),
}


def backward_sm80(
    arch: str, dtype: str, head_dim: int, mask: str, deterministic: bool, **features: str | bool
) -> BackwardSm80:
    """The configuration for a head dim of SM80_BACKWARD_TILES."""
    for tiles in of_row(SM80_BACKWARD_TILES, head_dim, mask):
        row = BackwardSm80(arch, dtype, head_dim, mask, deterministic, **tiles, **features)
        if row.shared_memory <= SHARED_MEMORY[arch]:
            break
    return row


@dataclass(frozen=True)
class Decode:
    """Every static fact of a decode kernel, and of the combine kernel in the same library."""

    kernel: ClassVar[str] = "decode"
    stack: ClassVar[int] = 0
    ragged: ClassVar[bool] = True
    warps: ClassVar[int] = 4
    arch: str
    dtype: str
    head_dim: int
    tile_m: int  # query rows of a thread block, 16 for a warp: queries times the heads that share a key head
    chunk: int  # keys that a warp works on at a time
    slots: int  # chunks of K and V in shared memory, one of them not in flight
    pdl: bool  # the combine kernel is launched before the splits are there, to wait for them: SM90 on
    score: str = "plain"  # or "softcap", "alibi", "softcap_alibi": kernels/scores.py
    page: int = 0  # 1: k and v are pages, of any size

    @property
    def row_warps(self) -> int:
        """Warps that share chunks, for other rows."""
        return self.tile_m // 16

    @property
    def key_warps(self) -> int:
        """Warps, or groups of row_warps, that have chunks of their own."""
        return self.warps // self.row_warps

    @property
    def tile_n(self) -> int:
        """Keys of a block."""
        return self.chunk * self.key_warps

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


def decode(arch: str, dtype: str, head_dim: int, rows: int, score: str = "plain", page: int = 0) -> Decode:
    """The configuration for a head dim of HEAD_DIMS and tiles of up to `rows` rows."""
    table = DECODE_TILES if SHARED_MEMORY[arch] > 100 * 1024 else DECODE_TILES_SMALL
    tile_m = 16 if rows <= 16 else 64
    pdl = int(arch[3:].rstrip("a")) >= 90
    return Decode(arch, dtype, head_dim, tile_m, *table[head_dim][tile_m], pdl, score, page)


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
    """Every static fact of one kv_append kernel; its repr is part of the cache key."""

    kernel: ClassVar[str] = "kv_append"
    stack: ClassVar[int] = 0
    arch: str
    dtype: str
    rotary: str  # one of ROTARY
    page: int  # 1: k and v are pages, of any size


def append_configs(arch: str) -> Iterator[KvAppend]:
    for dtype in DTYPES:
        for rotary in ROTARY:
            for page in (0, 1):
                yield KvAppend(arch, dtype, rotary, page)


BackwardConfig = BackwardSm80 | BackwardSm90


def backward(
    path: str,
    arch: str,
    dtype: str,
    head_dim: int,
    mask: str,
    deterministic: bool = False,
    **features: str | bool,
) -> BackwardConfig:
    """The configuration of the backward pass for a head dim of HEAD_DIMS on one path.

    features: score, ragged and dropout, as in the configs.
    """
    make = backward_sm80 if path == "sm80" else backward_sm90
    return make(arch, dtype, head_dim, mask, deterministic, **features)


def backward_configs(arch: str) -> Iterator[BackwardConfig]:
    """Every row of the backward pass for an architecture."""
    for path in paths(arch):
        for head_dim in HEAD_DIMS:
            for dtype in DTYPES:
                for mask in MASKS:
                    yield backward(path, arch, dtype, head_dim, mask)


Config = ForwardConfig | BackwardConfig | Decode | KvAppend


def configs(arch: str) -> Iterator[Config]:
    """What `precompile --all` compiles: every row, dense, ragged and paged, with plain scores."""
    yield from forward_configs(arch)
    yield from backward_configs(arch)
    yield from decode_configs(arch)
    yield from append_configs(arch)
    for path in paths(arch):
        for row in (row for row in forward_configs(arch) if row.kernel == f"fwd_{path}"):
            for page in (0, *(SM90_PAGES if path == "sm90" else (1,))):
                yield forward(path, arch, row.dtype, row.head_dim, row.mask, ragged=True, page=page)
