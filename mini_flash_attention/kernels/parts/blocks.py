"""Which blocks meet: plain integer arithmetic, on Python integers and on those of a kernel being traced.

Row i may see key j when -window_left <= j - (i + seqlen_k - seqlen_q) <= window_right; None is no
limit. Ranges are half-open, (first, last) with first <= last.
"""

from typing import NamedTuple


class Walk(NamedTuple):
    """How a query block walks its key blocks: down from start to first."""

    start: int
    free_end: int  # blocks in [free_first, free_end) need no mask, the others do
    free_first: int
    first: int


def smaller(a, b):
    if isinstance(a, int) and isinstance(b, int):
        return min(a, b)
    import cutlass

    return cutlass.min(a, b)


def larger(a, b):
    if isinstance(a, int) and isinstance(b, int):
        return max(a, b)
    import cutlass

    return cutlass.max(a, b)


def ceil_div(a, b):
    """For a >= 0: a kernel's division truncates."""
    return (a + b - 1) // b


def key_blocks(m_block, tile_m, tile_n, seqlen_q, seqlen_k, window_left, window_right):
    """The key blocks that hold a key visible to some row of query block m_block."""
    diagonal = m_block * tile_m + seqlen_k - seqlen_q  # of the first row
    first, end = 0, seqlen_k
    if window_right is not None:
        end = larger(0, smaller(end, smaller(diagonal + tile_m, seqlen_k) + window_right))
    last = ceil_div(end, tile_n)
    if window_left is not None:
        first = smaller(larger(0, diagonal - window_left) // tile_n, last)
    return first, last


def unmasked_blocks(m_block, tile_m, tile_n, seqlen_q, seqlen_k, window_left, window_right):
    """Those of key_blocks that every row of query block m_block sees whole."""
    diagonal = m_block * tile_m + seqlen_k - seqlen_q
    window = window_left, window_right
    first, last = key_blocks(m_block, tile_m, tile_n, seqlen_q, seqlen_k, *window)
    last = smaller(last, seqlen_k // tile_n)
    if window_right is not None:
        last = smaller(last, larger(0, diagonal + window_right + 1) // tile_n)
    if window_left is not None:
        whole = larger(0, diagonal + tile_m - 1 - window_left)
        first = smaller(larger(first, ceil_div(whole, tile_n)), last)
    return first, last


def query_blocks(n_block, tile_m, tile_n, seqlen_q, seqlen_k, window_left, window_right):
    """The query blocks with a row that sees a key of block n_block: the window, seen from the keys."""
    return key_blocks(n_block, tile_n, tile_m, seqlen_k, seqlen_q, window_right, window_left)


def walk(m_block, tile_m, tile_n, seqlen_q, seqlen_k, window_left, window_right):
    """The walk of query block m_block.

    Where no row sees a key, the one block start is visited all the same, masked; with a left limit
    start is always masked.
    """
    sizes = tile_m, tile_n, seqlen_q, seqlen_k, window_left, window_right
    first, last = key_blocks(m_block, *sizes)
    free_first, free_end = unmasked_blocks(m_block, *sizes)
    start = larger(last - 1, 0)
    if window_left is not None:
        free_end = smaller(free_end, start)
        free_first = smaller(free_first, free_end)
    return Walk(start, free_end, free_first, first)


def walk_of_part(m_block, parts, part, most, tile_m, tile_n, seqlen_q, seqlen_k, window_left, window_right):
    """The walk of one of the equal parts of query block m_block.

    It may start up to `most` key blocks later than the whole one; first is the whole one's.
    """
    rest = tile_n, seqlen_q, seqlen_k, window_left, window_right
    block_start, _, _, first = walk(m_block, tile_m, *rest)
    start, free_end, free_first, _ = walk(m_block * parts + part, tile_m // parts, *rest)
    start = larger(start, larger(block_start - most, smaller(block_start, first)))
    return Walk(start, free_end, free_first, first)


def unmasked_queries(n_block, tile_m, tile_n, seqlen_q, seqlen_k, window_left, window_right):
    """The query blocks whose rows all see key block n_block whole; rows from seqlen_q on count as well."""
    key = n_block * tile_n  # its first
    diagonal = key + seqlen_q - seqlen_k  # the row on whose diagonal it lies
    first, last = 0, ceil_div(seqlen_q, tile_m)
    if window_right is not None:
        first = ceil_div(larger(0, diagonal + tile_n - 1 - window_right), tile_m)
    if window_left is not None:
        last = smaller(last, larger(0, diagonal + window_left + 1) // tile_m)
    last = last * smaller(1, larger(0, seqlen_k // tile_n - n_block))  # none if the keys end in the block
    return smaller(first, last), last


def in_swaths(tile, blocks, heads, swath):
    """tile -> (block, head), of `blocks` blocks of each head: `swath` heads are walked together."""
    s = tile // (swath * blocks)
    width = smaller(swath, heads - s * swath)  # the last swath may be narrower
    rest = tile - s * swath * blocks
    return rest // width, s * swath + rest % width


# Packed rows are cut into blocks segment by segment: segment 0 lies before the first sequence, 1 to batch are
# the sequences, batch + 1 lies behind the last. Each block has a number of its own; some have no block.


def first_block(start, tile, segment):
    """The number of the first block of a segment that starts at this row."""
    return start // tile + segment


def packed_blocks(rows, tile, batch):
    """How many numbers there are."""
    return rows // tile + batch + 2
