"""How decoding cuts up its work: plain integer arithmetic, on Python integers and on those of a kernel.

The query heads that share a key head are rows of one tile: row r is query r // group of head r % group of the
group. A tile's keys are divided into splits, each for a thread block of its own.
"""

from mini_flash_attention.kernels.parts.blocks import ceil_div, key_blocks, larger, smaller, unmasked_blocks

MAX_SPLITS = 128  # combine.py keeps the log-sum-exps of a row's splits in the registers of a warp


def visible_blocks(first_row, rows, group, tile_n, seqlen_q, seqlen_k, window_left, window_right):
    """(first, last, free_first, free_end): blocks.key_blocks and unmasked_blocks of packed rows.

    The rows are [first_row, first_row + rows), of which those from seqlen_q * group on are none.
    """
    query = first_row // group
    queries = smaller((first_row + rows - 1) // group + 1, seqlen_q) - query
    # Without the queries before it, `query` is query 0, on the same diagonal.
    sizes = queries, tile_n, seqlen_q - query, seqlen_k, window_left, window_right
    return *key_blocks(0, *sizes), *unmasked_blocks(0, *sizes)


def split_blocks(split, num_splits, first, last):
    """(begin, end, parts): the part of the key blocks [first, last) that is `split`'s, and how many have any.

    All parts but the last one are of one length.
    """
    length = larger(ceil_div(last - first, num_splits), 1)
    begin = smaller(first + split * length, last)
    return begin, smaller(begin + length, last), ceil_div(last - first, length)
