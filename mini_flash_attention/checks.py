"""MINI_FLASH_ATTENTION_CHECK=1: check what only the device knows, the values of lengths and tables.

A debug switch: it waits for the device in each call of flash_attn_varlen_func and
flash_attn_with_kvcache, so it has no place in a graph capture. Without it wrong lengths are cut to
what the tensors hold, wrong pages and rows may be read, and nothing outside the tensors is written.
"""

from torch import Tensor

from mini_flash_attention import environment
from mini_flash_attention.problem import CacheUpdate, Layout, Problem

SWITCH = "MINI_FLASH_ATTENTION_CHECK"
_switch = environment.reader(SWITCH)


def enabled() -> bool:
    return _switch() not in (None, "", "0")


def varlen(
    problem: Problem,
    layout: Layout,
    cu_seqlens_k: Tensor | None,
    seqused_k: Tensor | None,
    max_seqlen_q: int | Tensor,
    max_seqlen_k: int | Tensor,
    num_pages: int,
) -> None:
    """Raise ValueError for values that flash_attn_varlen_func must not be given.

    cu_seqlens_k and seqused_k are the caller's: with pages the layout may have the lengths that
    cu_seqlens_k gives as seqused_k. num_pages: of k.
    """
    lengths = _lengths("cu_seqlens_q", layout.cu_seqlens_q.tolist(), problem.seqlen_q)
    _check_longest("cu_seqlens_q", "max_seqlen_q", lengths, max_seqlen_q)
    storage = [problem.seqlen_k] * problem.batch
    if cu_seqlens_k is not None:
        total = problem.seqlen_k if problem.packed_k else None
        lengths = _lengths("cu_seqlens_k", cu_seqlens_k.tolist(), total)
        storage = lengths if problem.packed_k else storage
        _check_longest("cu_seqlens_k", "max_seqlen_k", lengths, max_seqlen_k)
    if layout.seqused_k is not None:
        lengths, name = layout.seqused_k.tolist(), "cu_seqlens_k" if seqused_k is None else "seqused_k"
        _check_range(name, lengths, storage)
        _check_longest(name, "max_seqlen_k", lengths, max_seqlen_k)
    if layout.block_table is not None:
        starts = [0] * problem.batch
        _check_pages(problem, layout, range(problem.batch), starts, lengths, num_pages)


def cache(
    problem: Problem,
    layout: Layout,
    cache_seqlens: Tensor | int | None,
    update: CacheUpdate | None,
    shape: tuple[int, ...],
) -> None:
    """Raise ValueError for values that flash_attn_with_kvcache must not be given; shape: of k_cache."""
    batch, capacity = problem.batch, problem.seqlen_k
    added = 0 if update is None else update.k.shape[1]
    before = [capacity if cache_seqlens is None else cache_seqlens] * batch
    if isinstance(cache_seqlens, Tensor):
        before = cache_seqlens.tolist()
    _check_range("cache_seqlens", before, [capacity - added] * batch)
    ends = [length + added for length in before]
    starts = [0] * batch
    if layout.leftpad_k is not None:
        starts = layout.leftpad_k.tolist()
        _check_range("cache_leftpad", starts, ends)
    rows = range(batch)
    if layout.batch_idx is not None:
        rows = layout.batch_idx.tolist()
        last = (shape if layout.block_table is None else layout.block_table.shape)[0] - 1
        _check_range("cache_batch_idx", rows, [last] * batch)
    if layout.block_table is not None:
        _check_pages(problem, layout, rows, starts, ends, shape[0])
    if update is not None and update.rotary_cos is not None:
        windowed = problem.window_left is not None or problem.window_right is not None
        needed = max(added, problem.seqlen_q if windowed else 1)
        for b, length in enumerate(before):
            if length + needed > len(update.rotary_cos):
                raise ValueError(
                    f"rotary_cos has {len(update.rotary_cos)} rows, but sequence {b} needs {length + needed}"
                )


def _lengths(name: str, starts: list[int], total: int | None) -> list[int]:
    """The lengths that cumulative ones give; total: the tokens there are."""
    if starts[0] != 0:
        raise ValueError(f"{name} must start at 0, not {starts[0]}")
    lengths = [end - start for start, end in zip(starts, starts[1:], strict=False)]
    for b, length in enumerate(lengths):
        if length < 0:
            raise ValueError(f"{name}: sequence {b} ends at {starts[b + 1]}, before its start at {starts[b]}")
        if total is not None and starts[b + 1] > total:
            raise ValueError(f"{name}: sequence {b} ends at {starts[b + 1]}, but there are {total} tokens")
    return lengths


def _check_longest(name: str, name_longest: str, lengths: list[int], longest: int | Tensor) -> None:
    longest = int(longest)
    for b, length in enumerate(lengths):
        if length > longest:
            raise ValueError(f"{name}: sequence {b} has {length} tokens, but {name_longest} is {longest}")


def _check_range(name: str, values: list[int], largest: list[int]) -> None:
    for b, (value, limit) in enumerate(zip(values, largest, strict=True)):
        if not 0 <= value <= limit:
            raise ValueError(f"{name} of sequence {b} must be in 0 to {limit}, not {value}")


def _check_pages(
    problem: Problem,
    layout: Layout,
    rows: range | list[int],
    starts: list[int],
    ends: list[int],
    num_pages: int,
) -> None:
    """The pages that hold the tokens from start to end of each sequence exist."""
    table = layout.block_table.tolist()
    for b, (row, start, end) in enumerate(zip(rows, starts, ends, strict=True)):
        first, last = start // problem.page_size, -(-end // problem.page_size)
        for i, page in enumerate(table[row][first:last], first):
            if not 0 <= page < num_pages:
                raise ValueError(
                    f"block_table[{row}, {i}], a page of sequence {b}, must be in 0 to {num_pages - 1}, "
                    f"not {page}"
                )
