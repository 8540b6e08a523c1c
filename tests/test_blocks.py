"""Index arithmetic, against the definition, exhaustively over small sizes."""

import itertools

import pytest

from mini_flash_attention.kernels.parts.blocks import (
    first_block,
    in_swaths,
    key_blocks,
    packed_blocks,
    query_blocks,
    unmasked_blocks,
    unmasked_queries,
    walk,
    walk_of_part,
)

LIMITS = (None, 0, 1, 3, 9)


def visible(i: int, j: int, seqlen_q: int, seqlen_k: int, left: int | None, right: int | None) -> bool:
    offset = j - (i + seqlen_k - seqlen_q)
    return (left is None or offset >= -left) and (right is None or offset <= right)


@pytest.mark.parametrize("tile_m,tile_n", list(itertools.product((1, 2, 3), (1, 2, 3))))
def test_ranges_match_their_definition(tile_m: int, tile_n: int) -> None:
    for seqlen_q, seqlen_k in itertools.product(range(1, 9), range(9)):
        for left, right in itertools.product(LIMITS, LIMITS):
            sizes = (seqlen_q, seqlen_k, left, right)
            arguments = (tile_m, tile_n, *sizes)
            m_blocks, n_blocks = -(-seqlen_q // tile_m), -(-seqlen_k // tile_n)

            def meets(m: int, n: int) -> bool:
                rows = range(m * tile_m, min(seqlen_q, (m + 1) * tile_m))  # noqa: B023
                keys = range(n * tile_n, min(seqlen_k, (n + 1) * tile_n))  # noqa: B023
                return any(visible(i, j, *sizes) for i in rows for j in keys)  # noqa: B023

            def whole(m: int, n: int) -> bool:
                rows, keys = range(m * tile_m, (m + 1) * tile_m), range(n * tile_n, (n + 1) * tile_n)
                inside = keys.stop <= seqlen_k  # noqa: B023
                return inside and all(visible(i, j, *sizes) for i in rows for j in keys)  # noqa: B023

            for m in range(m_blocks):
                visited = range(*key_blocks(m, *arguments))
                assert list(visited) == [n for n in range(n_blocks) if meets(m, n)]
                free = range(*unmasked_blocks(m, *arguments))
                assert list(free) == [n for n in visited if whole(m, n)]
                check_walk(walk(m, *arguments), list(visited), list(free), left is not None)
                assert visited.start <= free.start <= free.stop <= visited.stop
            for n in range(n_blocks):
                visited = range(*query_blocks(n, *arguments))
                assert list(visited) == [m for m in range(m_blocks) if meets(m, n)]
                free = range(*unmasked_queries(n, *arguments))
                assert list(free) == [m for m in range(m_blocks) if whole(m, n)]


def check_walk(ends: tuple[int, int, int, int], visited: list[int], free: list[int], limited: bool) -> None:
    """Both kernels' loops over walk's ends visit each block once, in order, and mask each that needs it."""
    start, free_end, free_first, first = ends
    first_part = [start, *range(start - 1, free_end - 1, -1)]
    free_part = list(range(min(free_end, start) - 1, free_first - 1, -1))
    last_part = list(range(free_first - 1, first - 1, -1)) if limited else []
    assert first_part + free_part + last_part == (visited[::-1] or [start])
    assert set(free_part) == set(free) - {start}
    if start < free_end:
        assert start in free


@pytest.mark.parametrize(
    "rows,parts,tile_n", [(1, 2, 1), (2, 2, 1), (2, 2, 3), (2, 3, 2), (3, 2, 2), (1, 3, 2)]
)
def test_parts_of_a_query_block_start_later(rows: int, parts: int, tile_n: int) -> None:
    """A part misses no visible key and masks each block that needs it; it may start later than the whole."""
    tile_m, later = rows * parts, 0
    for seqlen_q, seqlen_k in itertools.product(range(1, 9), range(9)):
        for left, right, most in itertools.product(LIMITS, LIMITS, (0, 1, 2)):
            sizes = (seqlen_q, seqlen_k, left, right)
            for m in range(-(-seqlen_q // tile_m)):
                whole_start, _, _, whole_first = walk(m, tile_m, tile_n, *sizes)
                for part in range(parts):
                    start, free_end, free_first, first = walk_of_part(
                        m, parts, part, most, tile_m, tile_n, *sizes
                    )
                    assert first == whole_first and min(first, whole_start) <= start <= whole_start
                    assert start >= whole_start - most
                    later += start < whole_start
                    queries = range(m * tile_m + part * rows, m * tile_m + (part + 1) * rows)
                    for n in range(first, whole_start + 1):
                        keys = range(n * tile_n, (n + 1) * tile_n)
                        seen = [j < seqlen_k and visible(i, j, *sizes) for i in queries for j in keys]
                        if n > start:
                            assert not any(seen)
                        if free_first <= n < free_end:
                            assert all(seen)
                    if left is None:  # else start is always masked
                        assert not any(
                            whole(queries, n, tile_n, *sizes)
                            for n in (*range(free_end, start + 1), *range(first, free_first))
                        )
    assert later > 0


def whole(
    queries: range, n: int, tile_n: int, seqlen_q: int, seqlen_k: int, left: int | None, right: int | None
) -> bool:
    keys = range(n * tile_n, (n + 1) * tile_n)
    sizes = seqlen_q, seqlen_k, left, right
    return keys.stop <= seqlen_k and all(visible(i, j, *sizes) for i in queries for j in keys)


def test_swaths_visit_each_block_once() -> None:
    for blocks, heads, swath in itertools.product((1, 2, 5), (1, 3, 7, 8), (1, 2, 3, 8)):
        visited = [in_swaths(tile, blocks, heads, swath) for tile in range(blocks * heads)]
        assert sorted(visited) == sorted(itertools.product(range(blocks), range(heads)))
        order = [(head // swath, block, head) for block, head in visited]
        assert order == sorted(order)


def test_packed_blocks_have_numbers_of_their_own() -> None:
    for tile, *lengths in itertools.product((1, 2, 3, 4), (0, 2), *[(0, 1, 3, 4, 9)] * 3, (0, 5)):
        starts = list(itertools.accumulate(lengths, initial=0))  # the first and the last are no sequences
        firsts = [first_block(start, tile, segment) for segment, start in enumerate(starts[:-1])]
        total = packed_blocks(starts[-1], tile, batch=len(lengths) - 2)
        numbers = [first + i for first, n in zip(firsts, lengths, strict=True) for i in range(-(-n // tile))]
        assert len(set(numbers)) == len(numbers) and max(numbers, default=0) < total
        for segment, (first, n) in enumerate(zip(firsts, lengths, strict=True)):
            for i in range(-(-n // tile)):
                assert segment == max(j for j, start in enumerate(firsts) if start <= first + i)
