"""Whether tensors share memory, against sets of all places, exhaustively over small strides."""

import itertools

from mini_flash_attention import overlap
from mini_flash_attention.overlap import Memory


def places(x: Memory) -> list[int]:
    """The offset of each element, in elements from address 0."""
    ranges = map(range, x.shape)
    offsets = (
        sum(i * s for i, s in zip(index, x.stride, strict=True)) for index in itertools.product(*ranges)
    )
    return [x.address // x.itemsize + offset for offset in offsets]


def test_itself() -> None:
    for shape in itertools.product(range(4), repeat=3):
        for stride in itertools.product(range(4), repeat=3):
            x = Memory(0, 2, shape, stride)
            every = places(x)
            assert overlap.itself(x) == (len(set(every)) < len(every)), x


def test_each_other() -> None:
    one = [
        Memory(0, 4, shape, s) for shape in ((3, 2), (2, 3)) for s in itertools.product(range(4), repeat=2)
    ]
    found = {True: 0, False: 0}
    for x, y in itertools.product(one, repeat=2):
        for first in range(11):
            moved = y._replace(address=4 * first)
            expected = not set(places(x)).isdisjoint(places(moved))
            assert overlap.each_other(x, moved) == overlap.each_other(moved, x) == expected, (x, moved)
            found[expected] += 1
    assert min(found.values()) > 1000


def test_elements_that_lie_astride_share_bytes() -> None:
    x = Memory(0, 4, (3,), (2,))
    assert overlap.each_other(x, Memory(2, 4, (3,), (2,)))
    assert not overlap.each_other(x, Memory(20, 4, (3,), (2,)))


def test_nothing_shares_nothing() -> None:
    nothing, x = Memory(0, 4, (3, 0), (1, 1)), Memory(0, 4, (3, 2), (2, 1))
    assert not overlap.itself(nothing) and not overlap.each_other(nothing, x)


def test_parts_of_a_large_packed_tensor() -> None:
    """k and v of qkv (tokens, 3, heads, head_dim), and a part that begins a token later."""
    shape, stride = (10**6, 8, 128), (3 * 8 * 128, 128, 1)
    q, k = (Memory(i * 8 * 128 * 2, 2, shape, stride) for i in (0, 1))
    assert not overlap.each_other(q, k) and overlap.each_other(q, q._replace(address=3 * 8 * 128 * 2))


def test_a_search_ends() -> None:
    """What would take too long counts as shared."""
    sizes = (97,) * 4
    x, y = (
        Memory(0, 2, sizes, (10007, 10009, 10037, 10039)),
        Memory(2, 2, sizes, (30011, 30013, 30029, 30047)),
    )
    assert overlap.each_other(x, y)
