"""Tiles of the backward kernels, and the memory that they need."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, ClassVar, NamedTuple

from mini_flash_attention.gpu.config.common import (
    DTYPES,
    HEAD_DIMS,
    MASKS,
    SHARED_MEMORY,
    is_sm90_or_newer,
    of_row,
    paths,
)
from mini_flash_attention.kernels.parts.blocks import packed_blocks
from mini_flash_attention.scores.capture import PLAIN, Scoring


class Workspace(NamedTuple):
    """Shapes of what a backward pass needs beside its results; nothing need be in them at the start."""

    stats: tuple[int, ...]  # float32: what backward/delta.py finds out about the rows
    dq_acc: tuple[int, ...]  # float32: the sum of dQ, tile by tile
    turns: tuple[int, ...]  # int32: who may add to a tile of dq_acc, if deterministic; else drawn tiles
    dkv_acc: tuple[int, ...]  # float32: the sums of dK and dV, if thread blocks share a group
    key_turns: tuple[int, ...]  # int32, like turns


def workspace(
    row: "BackwardConfig", batch: int, q: tuple[int, int], k: tuple[int, int], packed_k: bool = False
) -> Workspace:
    """For `batch` sequences; ragged: all in the rows of q (kernels/backward/schedule.py).

    q, k: (seqlen, heads); k's heads are those whose query heads are shared by thread blocks: all, or 0.
    """
    (seqlen_q, heads_q), (seqlen_k, heads_shared) = q, k
    m_blocks, n_blocks = -(-seqlen_q // row.tile_m), -(-seqlen_k // row.tile_n)
    if row.sparse:  # whole blocks of a block mask are visited
        m_blocks = -(-seqlen_q // 128) * (128 // row.tile_m)
    blocks = batch, heads_q, m_blocks
    key_blocks = batch, heads_shared, n_blocks
    if row.ragged:
        blocks = 1, heads_q, packed_blocks(seqlen_q, row.tile_m, batch)
        n_blocks = packed_blocks(seqlen_k, row.tile_n, batch) if packed_k else batch * n_blocks
        key_blocks = 1, heads_shared, n_blocks
    turns, key_turns = (blocks, key_blocks) if row.deterministic else ((1, 1, 1), (1, 1, 1))
    return Workspace(
        stats=(*blocks, 2, row.tile_m),
        dq_acc=(*blocks, row.tile_m * row.head_dim),
        turns=turns,
        dkv_acc=(2, *key_blocks, row.tile_n * row.head_dim),
        key_turns=key_turns,
    )


@dataclass(frozen=True)
class BackwardSm90:
    """Every static fact of one backward.sm90 kernel; its repr is part of the cache key."""

    kernel: ClassVar[str] = "backward.sm90"
    stack: ClassVar[int] = 0
    page: ClassVar[int] = 0
    pdl: ClassVar[bool] = True  # each kernel starts while the one before it ends
    atomic_vector: ClassVar[int] = 4  # values that one instruction adds to dkv_acc
    adding_warps: ClassVar[int] = 8  # that add to it: both consumer warpgroups'
    arch: str
    dtype: str
    head_dim: int
    mask: str
    deterministic: bool  # dQ, and dK and dV of shared groups, are summed up in a fixed order
    tile_m: int  # queries of a block
    tile_n: int  # keys of a thread block
    dq_piece: tuple[int, int]  # (rows, columns) of a block's dQ that are added to dq_acc at a time
    stages: int = 2  # Q blocks in shared memory
    do_stages: int = 2  # dO blocks
    registers: tuple[int, int, int] = (208, 72, 24)  # of a consumer, dQ and load thread
    dq_transposed: bool = False  # dQᵀ = Kᵀ·dSᵀ, Kᵀ in registers: wgmma reads dS alone from shared memory
    persistent: bool = False  # a thread block stays on its SM; the next keys are loaded while it works
    score: Scoring = PLAIN  # kernels/parts/scores.py
    ragged: bool = False  # sequences have lengths of their own: kernels/parts/seqlen.py
    dropout: bool = False  # kernels/parts/dropout.py
    sparse: bool = False  # visits the blocks of a block mask alone: kernels/parts/sparse.py

    @property
    def factored(self) -> bool:
        """dS takes another factor than P."""
        return self.score.factored or self.dropout

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
SM90_BACKWARD_FACTORED: dict[object, dict[str, Any]] = {
    64: dict(tile_m=64),
    (96, "dropout", "score"): dict(registers=(200, 80, 32)),
    (128, "dropout"): dict(dq_piece=(64, 32), registers=(216, 56, 24)),
    (128, "dropout", "score"): dict(tile_n=64),
    (256, "score"): dict(dq_piece=(64, 32), registers=(216, 56, 24)),
}


def backward_sm90(
    arch: str, dtype: str, head_dim: int, mask: str, deterministic: bool, **features: Any
) -> BackwardSm90:
    """The configuration for a head dim of SM90_BACKWARD_TILES."""
    row = BackwardSm90(
        arch, dtype, head_dim, mask, deterministic, **of_row(SM90_BACKWARD_TILES, head_dim, mask), **features
    )
    if deterministic or row.ragged:  # turns follow the order of starts; ragged: not tried
        row = replace(row, persistent=False)
    score = ("score",) if len(row.score) > 1 or row.score.hides else ()
    keys = ((head_dim, "dropout", *score), (head_dim, "dropout")) if row.dropout else ()
    keys = (*keys, (head_dim, *score), head_dim) if row.factored else ()
    return replace(row, **next((SM90_BACKWARD_FACTORED[k] for k in keys if k in SM90_BACKWARD_FACTORED), {}))


@dataclass(frozen=True)
class BackwardSm80:
    """Every static fact of one backward.sm80 kernel; its repr is part of the cache key."""

    kernel: ClassVar[str] = "backward.sm80"
    page: ClassVar[int] = 0
    sparse: ClassVar[bool] = False
    arch: str
    dtype: str
    head_dim: int
    mask: str
    deterministic: bool  # dQ, and dK and dV of shared groups, are summed up in a fixed order
    tile_m: int  # queries of a block
    tile_n: int  # keys of a thread block: 16 or 32 for each pair of warps
    warps: int
    warps_m: int  # so many of them share out the queries of dQ, the others its columns
    score: Scoring = PLAIN  # kernels/parts/scores.py
    ragged: bool = False  # sequences have lengths of their own: kernels/parts/seqlen.py
    dropout: bool = False  # kernels/parts/dropout.py

    @property
    def pdl(self) -> bool:
        """Whether each kernel starts while the one before it ends."""
        return is_sm90_or_newer(self.arch)

    @property
    def stats(self) -> int:
        """Statistics of each query: two slots of two, and zeros where one of the products is not seeded."""
        return 5 if bool(self.score) != self.dropout else 4

    @property
    def block_numbers(self) -> int:
        """Those that say what a thread block works on, schedule.Block: in fours, as they are read."""
        return 16 if self.ragged else 8

    @property
    def atomic_vector(self) -> int:
        """Values that one instruction adds to dq_acc or dkv_acc."""
        return 4 if is_sm90_or_newer(self.arch) else 1

    @property
    def adding_warps(self) -> int:
        """Warps of a thread block that add to dkv_acc."""
        return self.warps

    @property
    def shared_memory(self) -> int:
        """Bytes: K and V, two slots of Q, dO, dS and the statistics, and what the thread block works on."""
        tiles = 2 * self.head_dim * (2 * self.tile_n + 4 * self.tile_m)
        return tiles + 4 * self.tile_m * (self.tile_n + self.stats) + 4 * self.block_numbers

    @property
    def stack(self) -> int:
        """Bytes of stack it may use: a few words, used once a query block, cost less than a smaller tile."""
        small_256 = self.head_dim == 256 and self.tile_m == 32
        if not self.score and not self.ragged and not self.dropout:
            return 8 if small_256 and self.deterministic else 0
        return 24 if small_256 else 8


# head dim -> tiles of the SM80 backward, the first that fits the shared memory. A warp's keys are as many as
# its registers hold, since all pairs of warps read the same queries: 32 up to 128, else 16. Predicted; on an
# H100 1.05 to 1.2 times as fast as FlashAttention-2 (docs/worklog.md).
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
    arch: str, dtype: str, head_dim: int, mask: str, deterministic: bool, **features: Any
) -> BackwardSm80:
    """The configuration for a head dim of SM80_BACKWARD_TILES."""
    for tiles in of_row(SM80_BACKWARD_TILES, head_dim, mask):
        row = BackwardSm80(arch, dtype, head_dim, mask, deterministic, **tiles, **features)
        if row.shared_memory <= SHARED_MEMORY[arch]:
            break
    return row


BackwardConfig = BackwardSm80 | BackwardSm90


def backward(
    path: str,
    arch: str,
    dtype: str,
    head_dim: int,
    mask: str,
    deterministic: bool = False,
    **features: Any,
) -> BackwardConfig:
    """The configuration of the backward pass for a head dim of HEAD_DIMS on one path.

    features: score, ragged, dropout and, on sm90, sparse, as in the configs.
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
