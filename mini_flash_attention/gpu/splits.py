"""How work is divided over thread blocks, and whether decoding pays: models of times, on plain numbers.

All that is decided here follows from sizes that the host knows. How many keys each sequence has, it does not:
that stands in GPU memory, and the kernel divides what it finds.
"""

import math
from typing import NamedTuple

from mini_flash_attention.kernels.decode.splits import MAX_SPLITS

MAX_BLOCKS = 128  # of a split; beyond, a long sequence among short ones would have too few thread blocks
# Of an H100, from times of decodes with 1 to 128 splits (docs/worklog.md); µs, and bytes or FLOPs a µs.
LATENCY = 0.4  # of a key block, in a thread block that has the memory for itself
BANDWIDTH_ALONE = 177e3  # beyond that
BANDWIDTH_OF_SM = 23e3  # with all SMs at work
MMA_ALONE = 1.45e6  # mma.sync in a thread block that has an SM for itself
MMA_OF_SM = 2.12e6  # in several
START = 0.5  # another thread block for each SM
UNEVEN = 0.16  # of the time that all need together, if some SMs have a thread block more than others
MERGE, MERGE_SPLIT = 1.4, 0.03  # of all splits, and of each
COMBINE = 4.0  # instead of MERGE, if another kernel does it
# A decode kernel without all that: up to 16 rows of a tile, and more; a forward kernel, each of its tiles.
DECODE_BASE, DECODE_BASE_WIDE, FORWARD_BASE, FORWARD_TILE = 3.5, 8.0, 3.1, 1.4
# What a thread block of 128 rows of the forward kernels reaches, with mma.sync and with wgmma.
FORWARD_MMA, FORWARD_WGMMA = 2.65e6, 5.8e6
FORWARD_TILE_M = 128
# Of a thread block of the backward pass on an H200 (docs/worklog.md), in the time that a query block takes.
TILE_START = 2.0
TILE_SHARES = 1.5  # adding its dK and dV in float32, for a square tile
LAST_TILES = 0.25  # of the longest tile: how long SMs are idle at the end, if tiles are of different length


class Decoding(NamedTuple):
    """What is to be decoded."""

    tiles: int  # thread blocks that a split takes
    storages: int  # key heads of all sequences: tiles of one share its keys in the L2 cache
    rows: int  # of a tile
    keys: int  # of a tile
    head_dim: int
    tile_n: int  # keys of a block
    resident: int  # thread blocks that an SM holds
    fused: bool  # the last thread block of a tile merges its splits

    @property
    def blocks(self) -> int:
        """Key blocks of a tile."""
        return -(-self.keys // self.tile_n)


def decode_time(x: Decoding, splits: int, num_sms: int) -> float:
    """In µs. A thread block alone is bound by how much it has on the way, all together by the memory."""
    length = -(-x.blocks // splits)
    splits = -(-x.blocks // length)
    per_sm = splits * x.tiles / num_sms
    block_size, flops = 4 * x.tile_n * x.head_dim, 4 * x.rows * x.tile_n * x.head_dim
    alone = math.ceil(per_sm / x.resident) * length * (LATENCY + block_size / BANDWIDTH_ALONE)
    busy = length * flops * max(1 / MMA_ALONE, math.ceil(per_sm) / MMA_OF_SM)
    together: float = x.storages * x.blocks * block_size
    if splits > 1:  # writing and reading a row's part of O takes twice as long as reading a key and its value
        together += x.tiles * splits * x.rows * 8 * x.head_dim
    together /= num_sms * BANDWIDTH_OF_SM
    if per_sm > 1:
        together *= 1 + UNEVEN * (math.ceil(per_sm) / per_sm - 1)
    merging = (MERGE if x.fused else COMBINE) + MERGE_SPLIT * splits if splits > 1 else 0.0
    base = DECODE_BASE if x.rows <= 16 else DECODE_BASE_WIDE
    return base + (max(alone, busy) ** 3 + together**3) ** (1 / 3) + START * per_sm + merging


def best_splits(x: Decoding, num_sms: int) -> int:
    """The number of splits with the least estimated time, the smallest of those.

    With a tile for each SM there is no need to split, unless the tensor cores are what all wait for: they
    are faster with two thread blocks on an SM.
    """
    fewest = min(MAX_SPLITS, -(-x.blocks // MAX_BLOCKS))
    most = min(MAX_SPLITS, x.blocks)
    if x.tiles >= num_sms * (1 if x.rows <= 16 else x.resident):
        most = 1
    return min(range(fewest, max(fewest, most) + 1), key=lambda splits: decode_time(x, splits, num_sms))


def forward_time(x: Decoding, tiles: int, wgmma: bool, num_sms: int) -> float:
    """In µs: of the forward kernels for the same work, in so many tiles of FORWARD_TILE_M rows."""
    flops, rate = 4 * FORWARD_TILE_M * x.keys * x.head_dim, FORWARD_WGMMA if wgmma else FORWARD_MMA
    alone = FORWARD_BASE + -(-tiles // num_sms) * (FORWARD_TILE + flops / rate)
    together = x.storages * x.keys * 4 * x.head_dim / (num_sms * BANDWIDTH_OF_SM)
    return (alone**3 + together**3) ** (1 / 3)


def heads_per_tile(
    group: int, key_blocks: int, steps: int, uneven: bool, shape: tuple[int, int], num_sms: int
) -> int:
    """How many query heads of a group a thread block of the backward pass walks: all, or a power of two.

    Fewer mean more thread blocks, shorter ones, which add what they have to the others' dK and dV.

    Args:
        key_blocks: of all key heads and sequences.
        steps: query blocks that see a key block: the most if uneven.
        uneven: whether there are fewer and fewer of them, as under a causal mask.
        shape: (tile_m, tile_n).
    """
    shares = TILE_SHARES * shape[1] / shape[0]

    def time(per: int) -> float:
        """In query blocks."""
        tiles = key_blocks * -(-group // per)
        start = TILE_START + (shares if per < group else 0)
        longest = per * steps + start
        if not uneven:
            return math.ceil(tiles / num_sms) * longest
        each_sm = (key_blocks * group * (steps + 1) / 2 + tiles * start) / num_sms
        return each_sm + LAST_TILES * longest * min(1.0, longest / each_sm)

    powers = (1 << i for i in range(group.bit_length()))
    return min((*(per for per in powers if per < group), group), key=time)
