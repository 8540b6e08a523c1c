"""Which blocks of queries and keys meet under a mask: kernels visit those alone, and mask only some of them.

The lists are those of PyTorch's FlexAttention (torch.nn.attention.flex_attention): for each query block the
key blocks that it sees partly, and those that it sees wholly, and the same for each key block.
In shapes: B batch, H heads (query heads), MB query blocks, NB key blocks.
"""

import contextlib
import dis
import functools
import itertools
import math
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from numbers import Integral
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mini_flash_attention import checks
from mini_flash_attention.masks import MaskMod, and_masks, index_into, not_mask, or_masks

# Pairs of query and key that are evaluated at once. On a GPU their bools, 32 MB, stay in the L2 cache of an
# H100, and an operation should take longer than its launch (estimated, not measured yet). On a CPU 2^24 costs
# 2 to 3 times more where mask_mod makes int32 matrices, whose memory is new each time (8k x 8k, one core).
STRIP_ELEMENTS = {"cuda": 2**25, "cpu": 2**22}

EMPTY, PARTIAL, FULL = " ", "▒", "█"


@dataclass(frozen=True, eq=False, repr=False)
class BlockMask:
    """Which blocks are visited, and how. `create_block_mask`, `from_blocks`, `from_torch`, &, |, ~ make it.

    All lists are int32, contiguous, on one device. The first num_blocks entries of a row of indices are
    block numbers in ascending order; the rest are the other block numbers, so that none is out of range.
    B or H is 1 where all batches or heads have the same mask.

    A block is full if all of its pairs within seqlen_q are visible and it does not reach beyond seqlen_k;
    partial if some are visible and it isn't full. So a full block needs no mask at all: what is computed for
    queries beyond seqlen_q is not stored.
    """

    kv_num_blocks: Tensor  # (B, H, MB): partial key blocks of each query block
    kv_indices: Tensor  # (B, H, MB, NB)
    full_kv_num_blocks: Tensor  # (B, H, MB): full ones
    full_kv_indices: Tensor  # (B, H, MB, NB)
    q_num_blocks: Tensor  # (B, H, NB): partial query blocks of each key block, for the backward pass
    q_indices: Tensor  # (B, H, NB, MB)
    full_q_num_blocks: Tensor  # (B, H, NB)
    full_q_indices: Tensor  # (B, H, NB, MB)
    mask_mod: MaskMod | None  # of partial blocks; None: all of their pairs are visible
    seqlen_q: int
    seqlen_k: int
    block_size: int  # queries, and keys, of a block
    # Whether mask_mod alone is the mask. Given lists may hide what it shows, and show what it hides.
    exact: bool

    @staticmethod
    def from_blocks(
        partial: Tensor,
        full: Tensor | None,
        seqlen_q: int,
        seqlen_k: int,
        mask_mod: MaskMod | None = None,
        block_size: int = 128,
    ) -> "BlockMask":
        """A mask from the blocks that are visible.

        Args:
            partial: bool (B, H, MB, NB): the blocks in which mask_mod decides. B or H of 1 is for all.
                MB = ceil(seqlen_q / block_size), NB = ceil(seqlen_k / block_size).
            full: like partial: the blocks that are visible wholly; it wins where both are True. None: none.
            seqlen_q, seqlen_k: the lengths.
            mask_mod: see `create_block_mask`; None: partial blocks are visible wholly, too.
            block_size: queries, and keys, of a block: a multiple of 8.

        Raises:
            TypeError, ValueError: an argument is wrong: the message names it and says what is allowed.
        """
        _integers(seqlen_q=seqlen_q, seqlen_k=seqlen_k)
        _check_block_size(block_size)
        if mask_mod is not None:
            _check_callable(mask_mod)
        if full is None:
            checks.facts("partial", partial)
            full = torch.zeros_like(partial, dtype=torch.bool)
        blocks = tuple(math.ceil(seqlen / block_size) for seqlen in (seqlen_q, seqlen_k))
        for name, x in (("partial", partial), ("full", full)):
            shape, dtype, device = checks.facts(name, x)
            checks.require(dtype == torch.bool, f"{name} must be torch.bool, not {dtype}", TypeError)
            checks.sizes(name, shape, "B, H, blocks of queries, blocks of keys", (None, None, *blocks))
            message = f"{name} has shape {tuple(shape)}, but B and H must be positive"
            checks.require(min(shape[:2]) > 0, message)
        both = f"partial is {tuple(partial.shape)} on {partial.device}, full is {tuple(shape)} on {device}"
        alike = partial.shape == shape and partial.device == device
        checks.require(alike, f"partial and full must have one shape and one device, but {both}")
        lengths = int(seqlen_q), int(seqlen_k)
        return _from_bitmaps(partial | full, full, full.shape[:2], mask_mod, lengths, int(block_size), False)

    @staticmethod
    def from_torch(block_mask: Any, seqlen_q: int | None = None, seqlen_k: int | None = None) -> "BlockMask":
        """A torch.nn.attention.flex_attention.BlockMask, in blocks of 128.

        Its lists of key blocks count; those of query blocks are made anew. It takes some twenty small
        operations, so do it once, not in each layer.

        Args:
            block_mask: its BLOCK_SIZE must be multiples of 128; larger blocks are divided.
            seqlen_q, seqlen_k: the lengths. None: as in block_mask.seq_lengths, which is rounded up to whole
                blocks where it was made by BlockMask.from_kv_blocks without seq_lengths.

        Raises:
            TypeError, ValueError: an argument is wrong: the message names it and says what is allowed.
        """
        # Slow to import, but whoever has a block_mask has done it.
        from torch.nn.attention import flex_attention

        kind = f"{type(block_mask).__module__}.{type(block_mask).__name__}"
        message = f"block_mask must be a torch.nn.attention.flex_attention.BlockMask, not {kind}"
        checks.require(isinstance(block_mask, flex_attention.BlockMask), message, TypeError)
        sizes = block_mask.BLOCK_SIZE
        message = f"BLOCK_SIZE of block_mask must be multiples of 128, not {sizes}: create it anew with 128"
        checks.require(all(size > 0 and size % 128 == 0 for size in sizes), message)
        given, its_own = (seqlen_q, seqlen_k), block_mask.seq_lengths
        named = zip(("seqlen_q", "seqlen_k"), given, strict=True)
        _integers(**{name: seqlen for name, seqlen in named if seqlen is not None})
        lengths = tuple(int(own if one is None else one) for one, own in zip(given, its_own, strict=True))
        for name, seqlen, own, size in zip(("seqlen_q", "seqlen_k"), lengths, its_own, sizes, strict=True):
            blocks = math.ceil(own / size)
            message = f"{name} is {seqlen}, but block_mask has {blocks} blocks of {size}"
            checks.require(math.ceil(seqlen / size) == blocks, message)

        def in_blocks_of_128(counts: Tensor | None, indices: Tensor | None) -> Any:
            if counts is None or indices is None:
                return None
            blocks = _bitmap(counts, indices, math.ceil(lengths[1] / sizes[1]))
            for dim in (0, 1):
                blocks = blocks.repeat_interleave(sizes[dim] // 128, dim=dim - 2)
                blocks = blocks.narrow(dim - 2, 0, math.ceil(lengths[dim] / 128))
            return blocks[(None,) * (4 - blocks.ndim)]

        partial = in_blocks_of_128(block_mask.kv_num_blocks, block_mask.kv_indices)
        full = in_blocks_of_128(block_mask.full_kv_num_blocks, block_mask.full_kv_indices)
        mask_mod = block_mask.mask_mod
        mask_mod = None if mask_mod is flex_attention.noop_mask else mask_mod
        return BlockMask.from_blocks(partial, full, lengths[0], lengths[1], mask_mod)

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """(B, H, seqlen_q, seqlen_k)."""
        return *self.kv_num_blocks.shape[:2], self.seqlen_q, self.seqlen_k

    @property
    def device(self) -> torch.device:
        return self.kv_num_blocks.device

    @property
    def sparsity(self) -> float:
        """The share of blocks that are not visited, 0 to 1. Waits for the device."""
        blocks = self.kv_indices.numel()
        visited = int((self.kv_num_blocks + self.full_kv_num_blocks).sum())
        return (blocks - visited) / blocks if blocks else 0.0

    def as_mask_mod(self) -> MaskMod:
        """A mask function that says the same: mask_mod, and the lists where they say more."""
        return self._as_mask_mod

    @functools.cached_property
    def _as_mask_mod(self) -> MaskMod:
        mask_mod = self.mask_mod
        if self.exact and mask_mod is not None:
            return mask_mod
        some, full = self._bitmaps()
        partial, block_size = some & ~full, self.block_size
        batch_of, head_of = map(index_into, some.shape[:2])

        def listed(batch: Any, head: Any, q_idx: Any, kv_idx: Any) -> Any:
            return some[batch_of(batch), head_of(head), q_idx // block_size, kv_idx // block_size]

        if mask_mod is None:
            return listed

        def listed_and_masked(batch: Any, head: Any, q_idx: Any, kv_idx: Any) -> Any:
            b, h, m, n = batch_of(batch), head_of(head), q_idx // block_size, kv_idx // block_size
            return full[b, h, m, n] | (partial[b, h, m, n] & mask_mod(batch, head, q_idx, kv_idx))

        return listed_and_masked

    def __and__(self, other: "BlockMask") -> "BlockMask":
        """What both show. mask_mods and lists are combined, nothing is evaluated."""
        return self._combine(other, torch.Tensor.__and__, and_masks)

    def __or__(self, other: "BlockMask") -> "BlockMask":
        """What any of the two shows. mask_mods and lists are combined, nothing is evaluated."""
        return self._combine(other, torch.Tensor.__or__, or_masks)

    def __invert__(self) -> "BlockMask":
        """What it hides. mask_mod and lists are inverted, nothing is evaluated."""
        some, full = self._bitmaps()
        mask_mod = not_mask(self.as_mask_mod())
        lengths = self.seqlen_q, self.seqlen_k
        return _from_bitmaps(~full, ~some, some.shape[:2], mask_mod, lengths, self.block_size, True)

    def _combine(
        self,
        other: "BlockMask",
        of_blocks: Callable[[Tensor, Tensor], Tensor],
        of_functions: Callable[..., MaskMod],
    ) -> "BlockMask":
        if not isinstance(other, BlockMask):
            return NotImplemented
        for name in ("seqlen_q", "seqlen_k", "block_size", "device"):
            one, two = getattr(self, name), getattr(other, name)
            checks.require(one == two, f"masks that are combined must have one {name}, not {one} and {two}")
        for name, one, two in zip(("batch", "heads"), self.shape, other.shape, strict=False):
            message = f"masks that are combined must have one {name}, or 1, not {one} and {two}"
            checks.require(one == two or 1 in (one, two), message)
        pairs = zip(self._bitmaps(), other._bitmaps(), strict=True)
        some, full = (of_blocks(one, two) for one, two in pairs)
        mask_mod = of_functions(self.as_mask_mod(), other.as_mask_mod())
        lengths = self.seqlen_q, self.seqlen_k
        return _from_bitmaps(some, full, some.shape[:2], mask_mod, lengths, self.block_size, True)

    def _bitmaps(self) -> tuple[Tensor, Tensor]:
        """The blocks that are visited, and the full ones: bool (B, H, MB, NB)."""
        blocks = self.kv_indices.shape[-1]
        partial = _bitmap(self.kv_num_blocks, self.kv_indices, blocks)
        full = _bitmap(self.full_kv_num_blocks, self.full_kv_indices, blocks)
        return partial | full, full

    def __repr__(self) -> str:
        sparsity = f"{100 * self.sparsity:.1f} %"
        return f"BlockMask(shape={self.shape}, block_size={self.block_size}, sparsity={sparsity})"

    def to_text(self, batch: int = 0, head: int = 0, width: int = 64) -> str:
        """A drawing: a line for each query block, a character for each key block.

        █ is full, ▒ partial, a space empty. Where there are more than `width` key blocks, a character stands
        for a square of blocks, and is ▒ unless they are alike. Waits for the device.
        """
        checks.require(width > 0, f"width must be positive, not {width}")
        states = self._states(batch, head)
        if not states.numel():
            return ""
        side = math.ceil(states.shape[1] / width)
        most, least = (
            sign * F.max_pool2d(sign * states[None].float(), side, ceil_mode=True)[0] for sign in (1, -1)
        )
        alike = torch.where(most == least, most, 1).int().tolist()
        return "\n".join("".join((EMPTY, PARTIAL, FULL)[state] for state in row) for row in alike)

    def plot(self, batch: int = 0, head: int = 0, ax: Any = None) -> Any:
        """Draws the blocks by matplotlib: full ones dark, partial ones light. Waits for the device.

        Args:
            batch, head: which mask.
            ax: matplotlib Axes to draw in; None: new ones.

        Returns:
            axes: the Axes, in tokens.

        Raises:
            ImportError: matplotlib is not installed.
        """
        try:
            from matplotlib import pyplot
            from matplotlib.colors import ListedColormap
        except ImportError as error:
            message = "plot needs matplotlib: pip install matplotlib; to_text needs nothing"
            raise ImportError(message) from error
        if ax is None:
            _, ax = pyplot.subplots()
        states = self._states(batch, head)
        rows, columns = (blocks * self.block_size for blocks in states.shape)
        colours = ListedColormap(["white", "#9ecae1", "#08519c"])
        extent = 0, columns, rows, 0
        ax.imshow(states.numpy(), cmap=colours, vmin=0, vmax=2, extent=extent, interpolation="nearest")
        ax.set(xlabel="key", ylabel="query", title=repr(self))
        return ax

    def _states(self, batch: int, head: int) -> Tensor:
        """0 for empty blocks, 1 for partial ones, 2 for full ones: (MB, NB), on the CPU."""
        place = []
        for name, at, size in zip(("batch", "head"), (batch, head), self.shape, strict=False):
            # A mask that is one for all knows not for how many.
            checks.require(size == 1 or 0 <= at < size, f"{name} must be in 0 to {size - 1}, not {at}")
            place.append(0 if size == 1 else at)
        some, full = (blocks[tuple(place)].cpu() for blocks in self._bitmaps())
        return some.to(torch.uint8) + full


@torch.no_grad()
def create_block_mask(
    mask_mod: MaskMod,
    batch: int | None,
    heads: int | None,
    seqlen_q: int,
    seqlen_k: int,
    device: torch.device | str | None = None,
    block_size: int = 128,
) -> BlockMask:
    """The blocks that a mask function makes visible.

    It evaluates mask_mod for every pair, a strip of query blocks at a time, in memory that does not grow with
    the lengths, and does not wait for the device. A function that does not use batch or head is evaluated
    for one batch or head.

    Args:
        mask_mod: mask_mod(batch, head, q_idx, kv_idx), True where the query sees the key. It is called with
            int32 tensors that broadcast, (batch, 1, 1, 1) to (1, 1, 1, seqlen_k), and returns a bool tensor
            that broadcasts with them, or a bool. Indices count from 0. See `mini_flash_attention.masks`.
        batch, heads: how many sequences and query heads; None: one mask for all, which mask_mod must not
            use then.
        seqlen_q, seqlen_k: the lengths.
        device: where the mask is; None: where the tensors are that mask_mod captures (in its closure, its
            globals or its defaults), or else the CPU.
        block_size: queries, and keys, of a block: a multiple of 8. Attention takes masks of 128.

    Raises:
        TypeError, ValueError: an argument, or what mask_mod returns, is wrong: the message says what is
            allowed.
    """
    _check_callable(mask_mod)
    _integers(seqlen_q=seqlen_q, seqlen_k=seqlen_k)
    _check_block_size(block_size)
    sizes = {"batch": batch, "heads": heads}
    _integers(1, **{name: size for name, size in sizes.items() if size is not None})
    device = _device(mask_mod, device)
    blocks = tuple(math.ceil(seqlen / block_size) for seqlen in (seqlen_q, seqlen_k))

    counts = torch.zeros(1, 1, *blocks, dtype=torch.int32, device=device)
    if 0 not in blocks:
        # Beyond the ends the last query and the last key are repeated: neither "some" nor "all" changes. So
        # is batch 0 or head 0 where None is given: what mask_mod returns then shows whether it uses them.
        there = batch or 1, heads or 1, seqlen_q, seqlen_k
        padded = batch or 2, heads or 2, blocks[0] * block_size, blocks[1] * block_size
        indices = [
            torch.arange(most, dtype=torch.int32, device=device)
            .clamp_(max=length - 1)
            .view([-1 if i == dim else 1 for i in range(4)])
            for dim, (most, length) in enumerate(zip(padded, there, strict=True))
        ]
        one_query, one_key = (index.flatten()[:1].view(1, 1, 1, 1) for index in indices[2:])
        used = _evaluate(mask_mod, (*indices[:2], one_query, one_key)).shape[:2]
        for (name, size), found in zip(sizes.items(), used, strict=True):
            message = f"mask_mod differs in {name}: say how many there are, instead of None"
            checks.require(size is not None or found == 1, message)
        indices[:2] = (index.narrow(dim, 0, used[dim]) for dim, index in enumerate(indices[:2]))
        counts = _visible_pairs(mask_mod, indices, block_size)
    some, full = counts > 0, counts == block_size**2
    lengths = int(seqlen_q), int(seqlen_k)
    return _from_bitmaps(some, full, (batch or 1, heads or 1), mask_mod, lengths, int(block_size), True)


def _visible_pairs(mask_mod: MaskMod, indices: list[Tensor], block_size: int) -> Tensor:
    """Of each block: int32 (B, H, MB, NB).

    indices: of batch, head, query and key, each along its own dimension; of queries and keys whole blocks.
    """
    units = 1, 1, block_size, block_size
    shape = [index.numel() // unit for index, unit in zip(indices, units, strict=True)]
    elements = STRIP_ELEMENTS["cpu" if indices[0].is_cpu else "cuda"]
    room = elements // block_size**2
    steps: list[int] = []
    for size in reversed(shape):  # all keys first, then as many queries, heads, batches as there is room for
        steps.insert(0, min(size, max(room, 1)))
        room //= steps[0]

    counts = torch.empty(shape, dtype=torch.int32, device=indices[0].device)
    parts = [indices[dim].split(steps[dim] * units[dim], dim) for dim in range(4)]
    places = [[slice(i, i + steps[dim]) for i in range(0, shape[dim], steps[dim])] for dim in range(4)]
    for strip, place in zip(itertools.product(*parts), itertools.product(*places), strict=True):
        counts[place] = _count(_evaluate(mask_mod, strip), block_size)
    return counts


def _evaluate(mask_mod: MaskMod, indices: tuple[Tensor, ...]) -> Tensor:
    """What mask_mod returns: bool, 4 dimensions, each of size 1 or of that of its index."""
    try:
        visible = mask_mod(*indices)
    except IndexError as error:
        message = f"mask_mod reads a value that a tensor does not have ({error})"
        raise ValueError(f"{message}: it needs one for every batch, head, query and key") from error
    except RuntimeError as error:
        if "Boolean value of Tensor" not in str(error):
            raise
        message = "mask_mod decides by if, and, or, not, min or max: write &, |, ~ and comparisons instead"
        raise TypeError(message) from error
    device = indices[0].device
    if isinstance(visible, bool):
        visible = torch.full((), visible, device=device)
    if not isinstance(visible, Tensor) or visible.dtype != torch.bool:
        kind = visible.dtype if isinstance(visible, Tensor) else type(visible).__name__
        raise TypeError(f"mask_mod must return bools, as comparisons do, not {kind}")
    if visible.device != device:
        raise ValueError(f"mask_mod returns a tensor on {visible.device}, but the mask is to be on {device}")
    sizes = [index.numel() for index in indices]
    shape = (1,) * (4 - visible.ndim) + visible.shape
    if len(shape) > 4 or any(one not in (1, size) for one, size in zip(shape, sizes, strict=True)):
        message = f"mask_mod returns shape {tuple(visible.shape)}"
        raise ValueError(f"{message}: it must broadcast to (B, H, queries, keys) = {sizes}")
    return visible.view(shape)


def _count(visible: Tensor, block_size: int) -> Tensor:
    """The visible pairs of each block: bool (b, h, queries or 1, keys or 1) -> int32.

    Rows are added as int64, each the bools of eight keys; up to 255 rows no sum overflows its byte.
    """
    if visible.shape[-1] == 1:
        visible = visible.expand(-1, -1, -1, 8)
    b, h, m, n = visible.shape
    rows, columns = min(m, block_size), min(n, block_size)  # of a block, or standing for all of them
    at_once = math.gcd(rows, 128)
    eights = visible.contiguous().view(torch.int64)
    of_rows = eights.view(b, h, m // rows, rows // at_once, at_once, n // 8).sum(4).view(torch.uint8)
    counts = of_rows.view(b, h, m // rows, rows // at_once, n // columns, columns).sum(
        (3, 5), dtype=torch.int32
    )
    stands_for = block_size**2 // (rows * columns)
    return counts * stands_for if stands_for > 1 else counts


def _from_bitmaps(
    some: Tensor,
    full: Tensor,
    batch_and_heads: tuple[int, ...],
    mask_mod: MaskMod | None,
    lengths: tuple[int, int],
    block_size: int,
    exact: bool,
) -> BlockMask:
    """some, full: the blocks with visible pairs, and those with no others, bool (B or 1, H or 1, MB, NB)."""
    if lengths[1] % block_size:
        full = F.pad(full[..., :-1], (0, 1))  # keys beyond the end are masked
    partial = some & ~full

    def lists(blocks: Tensor) -> tuple[Tensor, Tensor]:
        counts = blocks.sum(-1, dtype=torch.int32)
        indices = (~blocks).to(torch.uint8).argsort(dim=-1, stable=True).to(torch.int32)
        both = (x.expand(*batch_and_heads, *x.shape[2:]).contiguous() for x in (counts, indices))
        counts, indices = both
        return counts, indices

    return BlockMask(
        *lists(partial),
        *lists(full),
        *lists(partial.mT),
        *lists(full.mT),
        mask_mod,
        *lengths,
        block_size,
        exact,
    )


def _bitmap(counts: Tensor, indices: Tensor, blocks: int) -> Tensor:
    """Which blocks a list names: (..., rows), (..., rows, anything) -> bool (..., rows, blocks)."""
    places = torch.arange(indices.shape[-1], device=indices.device)
    named = torch.where(places < counts.unsqueeze(-1), indices, blocks).long()  # the others: one too many
    bitmap = torch.zeros(*indices.shape[:-1], blocks + 1, dtype=torch.bool, device=indices.device)
    return bitmap.scatter_(-1, named, True)[..., :-1]


def _device(mask_mod: MaskMod, device: torch.device | str | None) -> torch.device:
    """Where mask_mod is evaluated. Tensors of one number on the CPU go with any device."""
    tensors = list(_captured_tensors(mask_mod, set()))
    bound = {x.device for x in tensors if x.ndim or not x.is_cpu}
    if device is None:
        devices = bound or {torch.device("cpu")}
        found = checks.every(sorted(map(str, devices)))
        checks.require(len(devices) == 1, f"mask_mod captures tensors on {found}: move them to one device")
        return next(iter(devices))
    device = torch.empty(0, device=device).device  # with its index
    others = checks.every(sorted(str(one) for one in bound - {device}) or [device])
    message = f"mask_mod captures tensors on {others}, but device is {device}: move them there"
    checks.require(bound <= {device}, message)
    return device


def _captured_tensors(x: object, seen: set[int]) -> Iterator[Tensor]:
    """The tensors of a function's closure, defaults and globals, and of the functions among these."""
    if id(x) in seen:
        return
    seen.add(id(x))
    values: list[object] = []
    if isinstance(x, Tensor):
        yield x
    elif isinstance(x, functools.partial):
        values = [x.func, *x.args, *x.keywords.values()]
    elif isinstance(x, types.MethodType):
        values = [x.__func__, x.__self__]
    elif isinstance(x, (tuple, list)):
        values = list(x)
    elif isinstance(x, types.FunctionType):
        for cell in x.__closure__ or ():
            with contextlib.suppress(ValueError):  # a variable that has no value yet
                values.append(cell.cell_contents)
        values += [*(x.__defaults__ or ()), *(x.__kwdefaults__ or {}).values()]
        values += [x.__globals__[name] for name in _global_names(x.__code__) if name in x.__globals__]
    for value in values:
        yield from _captured_tensors(value, seen)


@functools.lru_cache(1024)
def _global_names(code: types.CodeType) -> tuple[str, ...]:
    """The globals that a function reads, and those that the functions defined in it read."""
    own = {one.argval for one in dis.get_instructions(code) if one.opname == "LOAD_GLOBAL"}
    inner = (_global_names(const) for const in code.co_consts if isinstance(const, types.CodeType))
    return tuple(sorted(own.union(*inner)))


def _check_callable(mask_mod: MaskMod) -> None:
    message = "mask_mod must be a function mask_mod(batch, head, q_idx, kv_idx)"
    checks.require(callable(mask_mod), f"{message}, not {type(mask_mod).__name__}", TypeError)


def _check_block_size(block_size: int) -> None:
    _integers(8, block_size=block_size)
    checks.require(block_size % 8 == 0, f"block_size must be a multiple of 8, not {block_size}")


def _integers(least: int = 0, /, **sizes: int) -> None:
    for name, size in sizes.items():
        kind = type(size).__name__
        checks.require(isinstance(size, Integral), f"{name} must be an int, not {kind}", TypeError)
        checks.require(size >= least, f"{name} must be at least {least}, not {size}")
