"""Block masks against a matrix of all pairs; the ready-made mask functions, on tensors and on numbers."""

import functools
import inspect
import math
import random
import re
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention import flex_attention

from mini_flash_attention import BlockMask, block_mask, create_block_mask, masks

LENGTHS = [(1, 1), (127, 128), (128, 127), (128, 128), (129, 300), (300, 129), (257, 521), (640, 384)]
BLOCK_SIZES = [8, 24, 128, 256]
ONE = torch.ones(1, 1, 3, 2, dtype=torch.bool)
EVERYWHERE = torch.arange(1024, dtype=torch.int32)
table_in_globals = EVERYWHERE % 5


def dense(mask_mod: masks.MaskMod, shape: tuple[int, int, int, int]) -> Tensor:
    """The mask as a matrix, bool (B, H, seqlen_q, seqlen_k): no block in it."""
    b, h, q, k = (
        torch.arange(size, dtype=torch.int32).view([-1 if dim == i else 1 for i in range(4)])
        for dim, size in enumerate(shape)
    )
    return torch.as_tensor(mask_mod(b, h, q, k)).broadcast_to(shape)


def blocks_of(mask: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """The blocks with a visible pair, and those without any other that lie within the keys, one by one."""
    rows, columns = (math.ceil(length / size) for length in mask.shape[-2:])
    some, full = torch.zeros(2, *mask.shape[:2], rows, columns, dtype=torch.bool)
    for m in range(rows):
        for n in range(columns):
            block = mask[..., m * size : (m + 1) * size, n * size : (n + 1) * size]
            some[..., m, n] = block.any(-1).any(-1)
            full[..., m, n] = block.all(-1).all(-1) & ((n + 1) * size <= mask.shape[-1])
    return some, full


def named(counts: Tensor, indices: Tensor) -> Tensor:
    """Which blocks a list names, read entry by entry as a kernel does; the rules for lists hold."""
    batch, heads, rows, columns = indices.shape
    assert counts.shape == (batch, heads, rows)
    for x in (counts, indices):
        assert x.dtype == torch.int32 and x.is_contiguous()
    assert ((indices >= 0) & (indices < columns)).all()
    found = torch.zeros(indices.shape, dtype=torch.bool)
    for place in torch.cartesian_prod(*map(torch.arange, (batch, heads, rows))).tolist():
        entries = indices[tuple(place)][: counts[tuple(place)]].tolist()
        assert entries == sorted(set(entries))
        found[tuple(place)][entries] = True
    return found


def assert_lists(made: BlockMask, some: Tensor, full: Tensor) -> None:
    """The lists of queries and of keys, partial and full, name these blocks."""
    assert torch.equal(named(made.full_kv_num_blocks, made.full_kv_indices), full)
    assert torch.equal(named(made.kv_num_blocks, made.kv_indices), some & ~full)
    assert torch.equal(named(made.full_q_num_blocks, made.full_q_indices).mT, full)
    assert torch.equal(named(made.q_num_blocks, made.q_indices).mT, some & ~full)


def assert_is(made: BlockMask, mask: Tensor) -> None:
    """It is this matrix, bool (B, H, seqlen_q, seqlen_k); a full block that is listed as partial is no error.

    So the union of partial and full blocks covers the visible pairs, and a full one hides none.
    """
    assert made.shape[2:] == mask.shape[2:]
    lists = named(made.kv_num_blocks, made.kv_indices), named(made.full_kv_num_blocks, made.full_kv_indices)
    partial, full = (
        x.repeat_interleave(made.block_size, 2)
        .repeat_interleave(made.block_size, 3)[..., : mask.shape[2], : mask.shape[3]]
        .expand(mask.shape)
        for x in lists
    )
    inside = torch.ones((), dtype=torch.bool)
    if made.mask_mod is not None:
        inside = dense(made.mask_mod, mask.shape)
    assert torch.equal(full | (partial & inside), mask)
    assert torch.equal(dense(made.as_mask_mod(), mask.shape), mask)
    assert torch.equal(named(made.q_num_blocks, made.q_indices).mT, lists[0])
    assert torch.equal(named(made.full_q_num_blocks, made.full_q_indices).mT, lists[1])
    assert not (lists[0] & lists[1]).any()


def random_mask(numbers: random.Random, batch: int | None, heads: int | None) -> masks.MaskMod:
    """A mask function that may use batch and head where they are given."""
    seed = numbers.randrange(1000)
    noise = torch.rand(1024, 1024, generator=torch.Generator().manual_seed(seed)) < 0.0005
    limits = torch.tensor([numbers.randrange(300) for _ in range(7)], dtype=torch.int32)
    ids = torch.tensor([[numbers.randrange(2) + i // 150 for i in range(1024)] for _ in range(7)])
    one = [
        masks.causal(numbers.randrange(-50, 300)),
        masks.sliding_window(numbers.choice([None, 10, 200]), numbers.choice([-1, 0, 150])),
        masks.prefix_lm(numbers.randrange(300)),
        masks.documents(ids=ids[0] // 2),
        masks.dilated(numbers.randrange(1, 300)),
        masks.block_diagonal(numbers.randrange(1, 300)),
        lambda b, h, q, k: noise[q, k],
        lambda b, h, q, k: k % 256 >= 128,
        lambda b, h, q, k: q >= 128,
        lambda b, h, q, k: k.view(-1) >= 200,
    ]
    if batch is not None:
        one += [masks.prefix_lm(limits), masks.documents(ids=ids)]
    if heads is not None:
        one += [lambda b, h, q, k: q - k < limits[h], lambda b, h, q, k: h % 2 == 0]
    if batch is not None and heads is not None:
        one += [lambda b, h, q, k: k < limits[b + h]]
    mask = numbers.choice(one)
    if numbers.random() < 0.5:
        mask = numbers.choice([masks.and_masks, masks.or_masks])(mask, numbers.choice(one))
    return masks.not_mask(mask) if numbers.random() < 0.1 else mask


@pytest.mark.parametrize("seed", range(40))
def test_random_masks(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    numbers = random.Random(seed)
    batch, heads = numbers.choice([(None, None), (1, 1), (2, None), (None, 3), (2, 3)])
    seqlen_q, seqlen_k = numbers.choice(LENGTHS)
    size = numbers.choice(BLOCK_SIZES)
    monkeypatch.setitem(block_mask.STRIP_ELEMENTS, "cpu", numbers.choice([1, 2**12, 2**17, 2**24]))
    mask_mod = random_mask(numbers, batch, heads)
    made = create_block_mask(mask_mod, batch, heads, seqlen_q, seqlen_k, block_size=size)
    assert made.shape == (batch or 1, heads or 1, seqlen_q, seqlen_k)
    assert made.mask_mod is mask_mod and made.as_mask_mod() is mask_mod and made.block_size == size
    mask = dense(mask_mod, made.shape)
    some, full = blocks_of(mask, size)
    assert_lists(made, some, full)
    assert_is(made, mask)
    assert made.sparsity == pytest.approx(1 - some.double().mean().item())


def test_lists_of_a_mask() -> None:
    """As in the layout of FlexAttention."""
    made = create_block_mask(masks.causal(), None, None, 300, 300)
    assert made.kv_num_blocks.tolist() == [[[1, 1, 1]]]
    assert made.kv_indices[0, 0, :, 0].tolist() == [0, 1, 2]
    assert made.full_kv_num_blocks.tolist() == [[[0, 1, 2]]]
    assert made.full_kv_indices[0, 0, 2, :2].tolist() == [0, 1]
    assert made.q_num_blocks.tolist() == [[[1, 1, 1]]] and made.full_q_num_blocks.tolist() == [[[2, 1, 0]]]
    assert made.full_q_indices[0, 0, 0, :2].tolist() == [1, 2]


@pytest.mark.parametrize("answer", [True, False])
def test_a_mask_of_pythons_bools(answer: bool) -> None:
    made = create_block_mask(lambda b, h, q, k: answer, 2, None, 300, 200)
    assert made.to_text() == ("█▒\n█▒\n█▒" if answer else "  \n  \n  ")
    assert_is(made, torch.full((2, 1, 300, 200), answer))
    assert (made & create_block_mask(masks.causal(), None, None, 300, 200)).sparsity == (
        1 / 6 if answer else 1
    )


@pytest.mark.parametrize(("seqlen_q", "seqlen_k"), [(0, 0), (0, 200), (200, 0)])
def test_no_queries_or_no_keys(seqlen_q: int, seqlen_k: int) -> None:
    made = create_block_mask(masks.documents(ids=EVERYWHERE[:0]), 2, 3, seqlen_q, seqlen_k)
    blocks = math.ceil(seqlen_q / 128), math.ceil(seqlen_k / 128)
    assert made.kv_indices.shape == (2, 3, *blocks) and made.q_indices.shape == (2, 3, *blocks[::-1])
    assert made.sparsity == (0 if 0 in blocks else 1) and not made.kv_num_blocks.any()
    assert (made & made).shape == (~made).shape == made.shape
    assert made.to_text() == ""


def test_what_does_not_depend_on_batch_and_head_is_evaluated_once() -> None:
    pairs = []

    def counted(batch: Tensor, head: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        pairs.append(math.prod(torch.broadcast_shapes(*(x.shape for x in (batch, head, q_idx, kv_idx)))))
        return (kv_idx <= q_idx) & (batch >= 0)

    create_block_mask(counted, 3, 50, 256, 256)
    assert sum(pairs) == 3 * 50 + 3 * 256 * 256


def test_a_strip_bounds_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(block_mask.STRIP_ELEMENTS, "cpu", 2**18)
    largest = []

    def watched(batch: Tensor, head: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        seen = (q_idx + kv_idx + batch + head) % 7 == 0
        largest.append(seen.numel())
        return seen

    made = create_block_mask(watched, 3, 5, 600, 3000)
    assert max(largest) <= 2**18 and len(largest) == 1 + 3 * 5 * 5 * 2
    assert made.kv_num_blocks.eq(24).all() and made.sparsity == 0


# Where the mask is


def test_device_is_that_of_captured_tensors() -> None:
    elsewhere = torch.zeros(5, device="meta")

    def in_globals(b: Any, h: Any, q: Any, k: Any) -> Any:
        return table_in_globals[q] == table_in_globals[k]

    def in_closure(b: Any, h: Any, q: Any, k: Any) -> Any:
        return elsewhere[q] > 0

    def in_default(b: Any, h: Any, q: Any, k: Any, table: Tensor = elsewhere) -> Any:
        return table[q] > 0

    def in_keyword_default(b: Any, h: Any, q: Any, k: Any, *, table: Tensor = elsewhere) -> Any:
        return table[q] > 0

    def within(b: Any, h: Any, q: Any, k: Any) -> Any:
        def inner() -> Any:
            return in_closure(b, h, q, k)

        return inner()

    def of_inner_globals(b: Any, h: Any, q: Any, k: Any) -> Any:
        return (lambda: table_in_globals[q] == 0)()

    def recursive(b: Any, h: Any, q: Any, k: Any) -> Any:
        return recursive(b, h, q, k)

    device = functools.partial(block_mask._device, device=None)
    assert device(masks.causal()).type == device(in_globals).type == device(recursive).type == "cpu"
    assert list(block_mask._captured_tensors(in_globals, set())) == [table_in_globals]
    assert list(block_mask._captured_tensors(of_inner_globals, set())) == [table_in_globals]
    for mask_mod in (in_closure, in_default, in_keyword_default, within):
        assert device(mask_mod).type == device(masks.and_masks(masks.causal(), mask_mod)).type == "meta"
    assert device(functools.partial(in_default, table=elsewhere)).type == "meta"
    assert device(masks.or_masks(in_closure, lambda b, h, q, k: k < torch.tensor(3))).type == "meta"
    with pytest.raises(ValueError, match="captures tensors on cpu and meta: move them to one device"):
        device(masks.and_masks(in_closure, in_globals))
    with pytest.raises(ValueError, match="captures tensors on meta, but device is cpu: move them there"):
        create_block_mask(in_closure, None, None, 5, 5, device="cpu")


def test_on_a_gpu(gpu: torch.device) -> None:
    """Lists as on the CPU, made without waiting for the device."""
    ids = EVERYWHERE // 100
    for mask_mod, on_gpu in (
        (masks.documents(ids=ids), masks.documents(ids=ids.to(gpu))),
        (masks.dilated(200), masks.dilated(200)),
    ):
        made = create_block_mask(mask_mod, 2, None, 900, 1000)
        torch.cuda.set_sync_debug_mode("error")
        try:
            there = create_block_mask(on_gpu, 2, None, 900, 1000, device=gpu)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert there.device == gpu
        for name in ("kv", "full_kv", "q", "full_q"):
            for field in (f"{name}_num_blocks", f"{name}_indices"):
                assert torch.equal(getattr(there, field).cpu(), getattr(made, field))


def test_captured_tensors_that_need_gradients() -> None:
    bias = torch.randn(300, requires_grad=True)
    made = create_block_mask(lambda b, h, q, k: bias[k] > bias[q], None, None, 300, 300)
    assert made.sparsity == 0 and not made.kv_indices.requires_grad


# Made of other masks


@pytest.mark.parametrize("seed", range(20))
def test_combined(seed: int) -> None:
    """&, | and ~, of masks from functions, from lists, and of such combinations."""
    numbers = random.Random(seed)
    seqlen_q, seqlen_k = numbers.choice(LENGTHS)
    size = numbers.choice(BLOCK_SIZES)
    blocks = math.ceil(seqlen_q / size), math.ceil(seqlen_k / size)

    def some_mask() -> BlockMask:
        batch, heads = numbers.choice([None, 2]), numbers.choice([None, 3])
        mask_mod = random_mask(numbers, batch, heads)
        if numbers.random() < 0.5:
            return create_block_mask(mask_mod, batch, heads, seqlen_q, seqlen_k, block_size=size)
        partial, full = torch.rand(2, batch or 1, heads or 1, *blocks) < 0.4
        given = None if numbers.random() < 0.3 else mask_mod
        return BlockMask.from_blocks(partial, full, seqlen_q, seqlen_k, given, size)

    torch.manual_seed(seed)
    shape = 2, 3, seqlen_q, seqlen_k
    a, b, c = (some_mask() for _ in range(3))
    of_a, of_b, of_c = (dense(one.as_mask_mod(), shape) for one in (a, b, c))
    for made, mask in (
        (a & b, of_a & of_b),
        (a | b, of_a | of_b),
        (~a, ~of_a),
        ((a | ~b) & c, (of_a | ~of_b) & of_c),
    ):
        assert_is(made, mask)
        assert made.exact and all(
            1 in (one, two) or one == two for one, two in zip(made.shape, shape, strict=True)
        )


def test_combining_keeps_full_and_empty_blocks() -> None:
    """full & full = full, full | anything = full, anything & empty = empty: nothing is evaluated for it."""
    causal = create_block_mask(masks.causal(), None, None, 512, 512)
    window = create_block_mask(masks.sliding_window(200, 0), None, None, 512, 512)
    assert (causal & window).to_text() == "▒   \n▒▒  \n▒▒▒ \n ▒▒▒"
    assert (causal | window).to_text() == causal.to_text() == "▒   \n█▒  \n██▒ \n███▒"
    assert (~causal).to_text() == "▒███\n ▒██\n  ▒█\n   ▒"
    assert torch.equal((causal & causal).full_kv_indices, causal.full_kv_indices)
    assert causal.__and__(3) is NotImplemented
    with pytest.raises(TypeError, match="unsupported operand"):
        causal & masks.causal()


@pytest.mark.parametrize("size", BLOCK_SIZES)
def test_from_blocks(size: int) -> None:
    partial, full = torch.rand(2, 2, 3, math.ceil(300 / size), math.ceil(200 / size)) < 0.4
    made = BlockMask.from_blocks(partial, full, 300, 200, masks.causal(), size)
    assert made.shape == (2, 3, 300, 200) and not made.exact
    last = torch.zeros_like(full)
    last[..., -1] = 200 % size > 0
    assert_lists(made, partial | full, full & ~last)
    whole = BlockMask.from_blocks(partial, None, 300, 200, block_size=size)
    assert_lists(whole, partial, torch.zeros_like(full))
    mask = partial.repeat_interleave(size, 2).repeat_interleave(size, 3)[..., :300, :200]
    assert_is(whole, mask)


@pytest.mark.parametrize("shape", [(1, 1, 300, 301), (2, 3, 256, 640), (1, 3, 129, 127)], ids=str)
@pytest.mark.parametrize("separate", [True, False])
def test_from_torch(shape: tuple[Any, ...], separate: bool) -> None:
    lengths = torch.tensor([50, 170, 280], dtype=torch.int32)

    def mask_mod(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return (k <= q) | (k < lengths[h])

    keywords = {} if separate else {"separate_full_blocks": False}
    if (
        not separate
        and "separate_full_blocks" not in inspect.signature(flex_attention.create_block_mask).parameters
    ):
        pytest.skip("this PyTorch always separates full blocks")
    theirs = flex_attention.create_block_mask(mask_mod, *shape, device="cpu", **keywords)
    made, ours = BlockMask.from_torch(theirs), create_block_mask(mask_mod, *shape)
    assert made.shape == ours.shape and made.mask_mod is mask_mod
    assert_is(made, dense(mask_mod, made.shape))
    if made.seqlen_q % 128 == 0:  # PyTorch takes a block that reaches beyond the queries for partial
        some, full = ours._bitmaps()
        assert_lists(made, some, full if separate else torch.zeros_like(full))


def test_from_torch_of_other_blocks() -> None:
    theirs = flex_attention.create_block_mask(
        masks.causal(), 1, 2, 700, 900, device="cpu", BLOCK_SIZE=(256, 384)
    )
    made = BlockMask.from_torch(theirs)
    assert made.block_size == 128 and made.kv_indices.shape == (1, 2, 6, 8)
    assert_is(made, dense(masks.causal(), (1, 2, 700, 900)))
    for size in (64, (128, 192)):
        with pytest.raises(ValueError, match=r"BLOCK_SIZE of block_mask must be multiples of 128, not \("):
            BlockMask.from_torch(
                flex_attention.create_block_mask(
                    masks.causal(), 1, 1, 768, 768, device="cpu", BLOCK_SIZE=size
                )
            )


def test_from_torch_of_lists() -> None:
    """Lists without transposes, not in order, with garbage behind their end; lengths rounded; no function."""
    counts = torch.tensor([[[2, 1, 3]]], dtype=torch.int32)
    indices = torch.tensor([[[[1, 0, 999], [2, -7, 999], [2, 0, 1]]]], dtype=torch.int32)
    theirs = flex_attention.BlockMask.from_kv_blocks(counts, indices, BLOCK_SIZE=128, compute_q_blocks=False)
    assert theirs.seq_lengths == (384, 384) and theirs.q_indices is None
    visible = torch.tensor([[1, 1, 0], [0, 0, 1], [1, 1, 1]]).bool()
    mask = visible.repeat_interleave(128, 0).repeat_interleave(128, 1)[None, None]
    whole, short = BlockMask.from_torch(theirs), BlockMask.from_torch(theirs, 300, 257)
    assert whole.mask_mod is None and whole.shape == (1, 1, 384, 384) and short.shape == (1, 1, 300, 257)
    assert_is(whole, mask)
    assert_is(short, mask[..., :300, :257])
    plane = flex_attention.BlockMask.from_kv_blocks(counts[0, 0], indices[0, 0].clamp(0, 2), BLOCK_SIZE=128)
    assert_is(BlockMask.from_torch(plane), mask)
    with pytest.raises(ValueError, match="seqlen_q is 256, but block_mask has 3 blocks of 128"):
        BlockMask.from_torch(theirs, 256)
    with pytest.raises(ValueError, match="seqlen_k is 385, but block_mask has 3 blocks of 128"):
        BlockMask.from_torch(theirs, None, 385)
    larger = flex_attention.BlockMask.from_kv_blocks(counts, indices.clamp(0, 2), BLOCK_SIZE=256)
    assert BlockMask.from_torch(larger, 600, 520).kv_indices.shape == (1, 1, 5, 5)


# Pictures


def test_to_text() -> None:
    made = create_block_mask(masks.causal(), 2, None, 512, 512)
    assert made.to_text() == made.to_text(1, 7) == "▒   \n█▒  \n██▒ \n███▒"
    assert made.to_text(width=3) == "▒ \n█▒"
    assert create_block_mask(masks.causal(), None, None, 700, 700).to_text(width=3) == "▒  \n█▒ \n██▒"
    heads = create_block_mask(lambda b, h, q, k: h == 1, None, 2, 128, 128)
    assert (heads.to_text(head=0), heads.to_text(head=1)) == (" ", "█")
    large = create_block_mask(masks.causal(), None, None, 2_000, 1_800, block_size=8)
    lines = large.to_text().splitlines()
    assert len(lines[0]) == 57 and len(lines) == 63 and set(map(len, lines)) == {57}
    with pytest.raises(ValueError, match="width must be positive, not 0"):
        made.to_text(width=0)
    with pytest.raises(ValueError, match="batch must be in 0 to 1, not 2"):
        made.to_text(batch=2)


def test_repr_is_short() -> None:
    made = create_block_mask(masks.causal(), 2, 3, 512, 512)
    assert repr(made) == str(made) == "BlockMask(shape=(2, 3, 512, 512), block_size=128, sparsity=37.5 %)"
    assert made.sparsity == 0.375


def test_plot() -> None:
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("agg")
    from matplotlib import pyplot

    made = create_block_mask(masks.causal(), None, None, 300, 200)
    ax = made.plot()
    assert ax.images[0].get_array().tolist() == [[1, 0], [2, 1], [2, 1]]
    assert ax.images[0].get_extent() == [0, 256, 384, 0]
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("key", "query")
    assert made.plot(0, 0, ax) is ax
    pyplot.close("all")


def test_plot_without_matplotlib(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match="plot needs matplotlib: pip install matplotlib"):
        create_block_mask(masks.causal(), None, None, 1, 1).plot()


# Ready-made mask functions


def rows_of(mask_mod: masks.MaskMod, seqlen_q: int, seqlen_k: int) -> list[str]:
    mask = dense(mask_mod, (1, 1, seqlen_q, seqlen_k))[0, 0]
    return ["".join("x" if one else "." for one in row) for row in mask.tolist()]


def test_ready_made() -> None:
    assert rows_of(masks.causal(), 2, 3) == ["x..", "xx."]
    assert rows_of(masks.causal(1), 2, 3) == ["xx.", "xxx"]
    assert rows_of(masks.sliding_window(1, 0), 3, 3) == ["x..", "xx.", ".xx"]
    assert rows_of(masks.sliding_window(0, 1, 1), 2, 4) == [".xx.", "..xx"]
    assert rows_of(masks.sliding_window(None, 0), 2, 2) == rows_of(masks.causal(), 2, 2)
    assert rows_of(masks.sliding_window(-1, None), 1, 2) == ["xx"]
    assert rows_of(masks.prefix_lm(2), 3, 4) == ["xx..", "xx..", "xxx."]
    assert rows_of(masks.prefix_lm(torch.tensor([2])), 3, 4) == ["xx..", "xx..", "xxx."]
    assert rows_of(masks.prefix_lm(0, 1), 2, 3) == ["xx.", "xxx"]
    diagonal = ["x...", ".xx.", ".xx.", "...x"]
    assert rows_of(masks.documents(cu_seqlens=[0, 1, 1, 3, 4]), 4, 4) == diagonal
    assert rows_of(masks.documents(ids=torch.tensor([7, 3, 3, 9])), 4, 4) == diagonal
    assert rows_of(masks.documents(ids=torch.tensor([[7, 3, 3, 9]])), 4, 4) == diagonal
    assert rows_of(masks.dilated(2), 2, 5) == ["x.x.x", ".x.x."]
    assert rows_of(masks.dilated(2, 1), 2, 5) == [".x.x.", "x.x.x"]
    assert rows_of(masks.block_diagonal(2), 3, 5) == ["xx...", "xx...", "..xx."]
    assert rows_of(masks.block_diagonal(2, 1), 2, 5) == ["xx...", "..xx."]
    assert rows_of(masks.not_mask(masks.causal()), 2, 2) == [".x", ".."]
    three = masks.and_masks(masks.causal(), masks.dilated(2), masks.sliding_window(2, 2))
    assert rows_of(three, 4, 4) == ["x...", ".x..", "x.x.", ".x.x"]


def test_what_is_for_all_batches_is_no_function_of_batch() -> None:
    for mask_mod in (
        masks.tree([-1, 0, 0]),
        BlockMask.from_blocks(ONE[..., :1, :1], None, 3, 3).as_mask_mod(),
    ):
        assert create_block_mask(mask_mod, None, None, 3, 3).shape == (1, 1, 3, 3)


def test_tree() -> None:
    """Node 0 is a root with children 1 and 2, 3 is below 1, 4 is another root; in any order."""
    tree = ["x....", "xx...", "x.x..", "xx.x.", "....x"]
    assert rows_of(masks.tree([-1, 0, 0, 1, -1]), 5, 5) == tree
    assert rows_of(masks.tree([-1, 0, 0, 1, -1], context=2), 5, 7) == ["xx" + row for row in tree]
    assert rows_of(masks.tree([1, 2, 3, -1]), 4, 4) == ["xxxx", ".xxx", "..xx", "...x"]
    chain = masks.tree(list(range(-1, 99)))
    assert torch.equal(dense(chain, (1, 1, 100, 100)), dense(masks.causal(), (1, 1, 100, 100)))
    two = masks.tree(torch.tensor([[-1, 0], [-1, -1]]), 1)
    assert dense(two, (2, 1, 2, 3)).int().tolist() == [[[[1, 1, 0], [1, 1, 1]]], [[[1, 1, 0], [1, 0, 1]]]]


class Number:
    """What a kernel has of an index or a truth: operators, no truth value for Python, no other method."""

    def __init__(self, value: int | bool) -> None:
        self.value = int(value)

    def __bool__(self) -> bool:
        raise AssertionError("a traced number has no value")


def operator_of(name: str) -> Callable[[Number, Any], Number]:
    def operator(self: Number, other: Any) -> Number:
        value = other.value if isinstance(other, Number) else other
        assert type(value) in (int, bool)
        return Number(getattr(self.value, name)(value))

    return operator


OPERATORS = ["add", "sub", "mul", "floordiv", "mod", "lt", "le", "gt", "ge", "eq", "and", "or"]
for operator_name in OPERATORS:
    setattr(Number, f"__{operator_name}__", operator_of(f"__{operator_name}__"))
Number.__invert__ = lambda self: Number(not self.value)


class Table:
    """A captured tensor in a kernel: read by one number a dimension."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor

    def __getitem__(self, place: Any) -> Number:
        place = place if isinstance(place, tuple) else (place,)
        assert len(place) == self.tensor.ndim and all(isinstance(one, (Number, int)) for one in place)
        place = [one if isinstance(one, Number) else Number(one) for one in place]
        assert all(0 <= one.value < size for one, size in zip(place, self.tensor.shape, strict=True))
        return Number(self.tensor[tuple(one.value for one in place)].item())


def on_numbers(mask_mod: Any) -> Callable[..., Number]:
    """The function with its captured tensors exchanged, as a kernel's tracer does it."""

    def exchanged(x: Any) -> Any:
        if isinstance(x, Tensor):
            return Table(x)
        assert isinstance(x, (int, type(rows_of)))
        return x if isinstance(x, int) else on_numbers(x)

    cells = tuple(type(cell)(exchanged(cell.cell_contents)) for cell in mask_mod.__closure__ or ())
    return type(mask_mod)(mask_mod.__code__, mask_mod.__globals__, mask_mod.__name__, None, cells)


IDS = torch.tensor([[0, 0, 1, 1, 2, 2, 2, 3], [0, 1, 1, 1, 1, 4, 4, 4]])
LISTED = torch.tensor([[1, 0], [1, 1]]).bool().expand(2, 2, 2, 2)
OF_EACH = {
    "causal": masks.causal(1),
    "window": masks.sliding_window(2, 1, 1),
    "every": masks.sliding_window(None, None),
    "prefix": masks.prefix_lm(3, 1),
    "prefixes": masks.prefix_lm(torch.tensor([1, 3])),
    "cu_seqlens": masks.documents(cu_seqlens=[0, 3, 8]),
    "ids": masks.documents(ids=IDS),
    "tree": masks.tree([-1, 0, 0, 1, 1, 2, -1, 6]),
    "trees": masks.tree(torch.tensor([[-1, 0, 0, 1, 1, 2, -1, 6], [1, 2, -1, 2, 3, -1, 5, 5]])),
    "dilated": masks.dilated(3, 1),
    "blocks": masks.block_diagonal(3, 1),
    "and, or, not": masks.and_masks(
        masks.or_masks(masks.causal(), masks.dilated(2)), masks.not_mask(masks.dilated(3))
    ),
    "listed": BlockMask.from_blocks(LISTED[:, :1], None, 16, 16, block_size=8).as_mask_mod(),
    "listed and masked": BlockMask.from_blocks(
        LISTED, LISTED.mT & ~LISTED, 16, 16, masks.causal(), 8
    ).as_mask_mod(),
}


@pytest.mark.parametrize("name", OF_EACH)
def test_functions_run_on_a_kernels_numbers(name: str) -> None:
    """Operators and lookups are all that they use, on what they capture: numbers, tensors, functions."""
    mask_mod = OF_EACH[name]
    traced, mask = on_numbers(mask_mod), dense(mask_mod, (2, 2, 8, 8))
    for place in torch.cartesian_prod(*map(torch.arange, mask.shape)).tolist():
        assert traced(*map(Number, place)).value == mask[tuple(place)], place


# Errors


def causal(b: Any, h: Any, q: Any, k: Any) -> Any:
    return k <= q


def decides(b: Any, h: Any, q: Any, k: Any) -> Any:
    return k <= q if q > 5 else k < 3


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda: create_block_mask(None, 1, 1, 5, 5),
            TypeError,
            r"mask_mod must be a function .*not NoneType",
        ),
        (lambda: create_block_mask(causal, 1.5, 1, 5, 5), TypeError, "batch must be an int, not float"),
        (lambda: create_block_mask(causal, 1, 0, 5, 5), ValueError, "heads must be at least 1, not 0"),
        (lambda: create_block_mask(causal, 1, 1, -1, 5), ValueError, "seqlen_q must be at least 0, not -1"),
        (lambda: create_block_mask(causal, 1, 1, 5, "5"), TypeError, "seqlen_k must be an int, not str"),
        (
            lambda: create_block_mask(masks.documents(ids=IDS), None, 1, 5, 5),
            ValueError,
            "mask_mod differs in batch: say how many there are, instead of None",
        ),
        (
            lambda: create_block_mask(lambda b, h, q, k: h > 0, 1, None, 5, 5),
            ValueError,
            "mask_mod differs in heads: say how many",
        ),
        (
            lambda: create_block_mask(causal, 1, 1, 5, 5, block_size=100),
            ValueError,
            "block_size must be a multiple of 8, not 100",
        ),
        (
            lambda: create_block_mask(lambda b, h, q, k: (k <= q).float(), 1, 1, 5, 5),
            TypeError,
            r"mask_mod must return bools, as comparisons do, not torch\.float32",
        ),
        (
            lambda: create_block_mask(lambda b, h, q, k: None, 1, 1, 5, 5),
            TypeError,
            "mask_mod must return bools, as comparisons do, not NoneType",
        ),
        (
            lambda: create_block_mask(lambda b, h, q, k: ONE[0, 0], 1, 1, 5, 5),
            ValueError,
            r"mask_mod returns shape \(3, 2\): it must broadcast to \(B, H, queries, keys\) = \[1, 1, 1, 1\]",
        ),
        (
            lambda: create_block_mask(lambda b, h, q, k: ONE[None], 1, 1, 5, 5),
            ValueError,
            r"mask_mod returns shape \(1, 1, 1, 3, 2\)",
        ),
        (
            lambda: create_block_mask(masks.documents(ids=EVERYWHERE[:50]), 1, 1, 51, 51),
            ValueError,
            "mask_mod reads a value that a tensor does not have .*it needs one for every batch, head, query",
        ),
        (
            lambda: create_block_mask(decides, 1, 1, 50, 50),
            TypeError,
            "mask_mod decides by if, .*write &, |, ~",
        ),
        (
            lambda: create_block_mask(lambda b, h, q: q > 0, 1, 1, 5, 5),
            TypeError,
            "takes 3 positional arguments but 4 were given",
        ),
        (
            lambda: create_block_mask(causal, 1, 1, 5, 5) & create_block_mask(causal, 1, 1, 6, 5),
            ValueError,
            "masks that are combined must have one seqlen_q, not 5 and 6",
        ),
        (
            lambda: create_block_mask(causal, 2, 1, 5, 5) | create_block_mask(causal, 3, 1, 5, 5),
            ValueError,
            "masks that are combined must have one batch, or 1, not 2 and 3",
        ),
        (
            lambda: BlockMask.from_blocks(ONE, ONE, 300, 300),
            ValueError,
            r"partial must have shape \(B, H, blocks of queries, blocks of keys\) = \(\*, \*, 3, 3\)",
        ),
        (
            lambda: BlockMask.from_blocks(ONE, ONE.int(), 300, 200),
            TypeError,
            r"full must be torch\.bool, not torch\.int32",
        ),
        (
            lambda: BlockMask.from_blocks([[True]], None, 5, 5),
            TypeError,
            r"partial must be a torch\.Tensor, not list",
        ),
        (
            lambda: BlockMask.from_blocks(ONE, ONE.expand(2, 1, 3, 2), 300, 200),
            ValueError,
            r"partial and full must have one shape and one device, but partial is \(1, 1, 3, 2\)",
        ),
        (
            lambda: BlockMask.from_blocks(ONE[:0], None, 300, 200),
            ValueError,
            "B and H must be positive",
        ),
        (
            lambda: BlockMask.from_blocks(ONE, None, 300, 200, 3),
            TypeError,
            "mask_mod must be a function .*not int",
        ),
        (
            lambda: BlockMask.from_torch(create_block_mask(causal, 1, 1, 5, 5)),
            TypeError,
            r"block_mask must be a torch\.nn\.attention\.flex_attention\.BlockMask, not mini_flash_attention",
        ),
        (lambda: masks.causal("1"), TypeError, "offset must be an int, not str"),
        (lambda: masks.sliding_window(-2, 0), ValueError, "left must be in 0 to 1073741824, not -2"),
        (
            lambda: masks.prefix_lm(torch.zeros(2)),
            TypeError,
            r"prefix must hold integers, not torch\.float32",
        ),
        (lambda: masks.documents(), ValueError, "documents takes either cu_seqlens or ids"),
        (lambda: masks.documents(cu_seqlens=[0], ids=IDS), ValueError, "either cu_seqlens or ids"),
        (lambda: masks.documents(cu_seqlens=[1, 2]), ValueError, "cu_seqlens must start with 0 and must not"),
        (lambda: masks.documents(cu_seqlens=[0, 3, 2]), ValueError, "must not decrease"),
        (
            lambda: masks.documents(ids=IDS[None]),
            ValueError,
            r"ids must have shape \(seqlen\) or \(batch, seqlen\)",
        ),
        (lambda: masks.tree([-1, 2]), ValueError, "parents must be in -1 to 1, nodes - 1"),
        (
            lambda: masks.tree([1, 0, -1]),
            ValueError,
            "parents must be a tree, but a node is its own ancestor",
        ),
        (lambda: masks.tree([0]), ValueError, "a node is its own ancestor"),
        (lambda: masks.tree([-1], context=-1), ValueError, "context must be in 0 to"),
        (lambda: masks.dilated(0), ValueError, "step must be in 1 to"),
        (lambda: masks.block_diagonal(0), ValueError, "size must be in 1 to"),
        (lambda: masks.and_masks(), ValueError, "at least one mask function is needed"),
        (
            lambda: masks.or_masks(causal, create_block_mask(causal, 1, 1, 5, 5)),
            TypeError,
            "a mask function must be callable, not BlockMask; BlockMasks combine by &, |, ~",
        ),
    ],
)
def test_errors(call: Callable[[], object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()


def test_other_errors_of_a_mask_function_are_its_own() -> None:
    with pytest.raises(RuntimeError, match=re.escape("The size of tensor a")):
        create_block_mask(lambda b, h, q, k: EVERYWHERE[:2] <= EVERYWHERE[:3], None, None, 10, 10)
