"""How work is divided over thread blocks, and whether decoding pays: models of times, on plain numbers.

All that is decided here follows from sizes that the host knows. How many keys each sequence has, it does not:
that stands in GPU memory, and the kernel divides what it finds.
"""

import math

from mini_flash_attention.kernels.decode.splits import MAX_SPLITS

MAX_BLOCKS = 128  # of a split; beyond, a long sequence among short ones would have too few thread blocks
# Of an H100, from times of decodes with 1 to 128 splits (docs/worklog.md); µs, and bytes a µs.
LATENCY = 0.4  # of a key block, in a thread block that has the memory for itself
BANDWIDTH_ALONE = 177e3  # beyond that
BANDWIDTH_OF_SM = 23e3  # with all SMs at work
START = 0.5  # another thread block for each SM
UNEVEN = 0.16  # of the time that all need together, if some SMs have a thread block more than others
MERGE, MERGE_SPLIT = 1.4, 0.03  # of all splits, and of each
# TFLOP/s that mma.sync and wgmma reach on an H100 (docs/worklog.md).
MMA_RATE, WGMMA_RATE = 350, 650
FORWARD_TILE_M = 128
# Of a thread block of the backward pass on an H100 (docs/worklog.md), in the time that a query block takes.
TILE_START = 2.0
TILE_SHARES = 1.5  # adding its dK and dV in float32, for a square tile
LAST_TILES = 0.25  # of the longest tile: how long SMs are idle at the end, if tiles are of different length


def best_splits(tiles: int, rows: float, blocks: int, block_size: int, num_sms: int, resident: int) -> int:
    """The number of splits with the least estimated time, the smallest of those.

    A thread block alone is bound by how much it has on the way, all together by the memory. With a tile for
    each SM there is no need to split.

    Args:
        tiles: thread blocks that a split takes.
        rows: of a tile, in blocks of keys: writing and reading a row's part of O takes twice as long as
            reading a key and its value.
        blocks: key blocks of a tile.
        block_size: bytes of K and V in a block.
        resident: thread blocks that an SM holds.
    """
    fewest = min(MAX_SPLITS, -(-blocks // MAX_BLOCKS))

    def time(splits: int) -> float:
        """In µs, without what all have in common."""
        length = -(-blocks // splits)
        splits = -(-blocks // length)
        per_sm = splits * tiles / num_sms
        alone = math.ceil(per_sm / resident) * length * (LATENCY + block_size / BANDWIDTH_ALONE)
        moved = tiles * (blocks + (2 * rows * splits if splits > 1 else 0))
        together = moved * block_size / (num_sms * BANDWIDTH_OF_SM)
        if per_sm > 1:
            together *= 1 + UNEVEN * (math.ceil(per_sm) / per_sm - 1)
        merging = MERGE + MERGE_SPLIT * splits if splits > 1 else 0.0
        return (alone**3 + together**3) ** (1 / 3) + START * per_sm + merging

    most = 1 if tiles >= num_sms else min(MAX_SPLITS, blocks)
    return min(range(fewest, max(fewest, most) + 1), key=time)


def decoding_pays(decode_rows: int, forward_tiles: int, wgmma: bool, num_sms: int) -> bool:
    """Whether decoding takes less time than the forward kernels.

    Both are compared by the tensor cores' work, padding of tiles included. Decoding packs the query heads
    that share a key head into a tile, and always has enough thread blocks, by splitting.

    Args:
        decode_rows: of all tiles, if it is decoded.
        forward_tiles: of FORWARD_TILE_M rows, if it is not.
        wgmma: what the forward kernel multiplies with, instead of mma.sync.
    """
    rate = WGMMA_RATE if wgmma else MMA_RATE
    return decode_rows / MMA_RATE < max(forward_tiles, num_sms) * FORWARD_TILE_M / rate


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
