"""Whether tensors share memory, on integers: an element lies at the sum of index * stride over dimensions."""

from collections.abc import Sequence
from typing import NamedTuple

TRIES = 10_000  # what a search may cost; where it is not over by then, memory counts as shared


class Memory(NamedTuple):
    """Where a tensor lies."""

    address: int
    itemsize: int
    shape: Sequence[int]
    stride: Sequence[int]  # in elements, as PyTorch has them: not negative

    @property
    def empty(self) -> bool:
        return 0 in self.shape

    @property
    def steps(self) -> list[tuple[int, int]]:
        """(stride, size) of the dimensions that matter, the largest stride first."""
        return sorted(((s, n) for s, n in zip(self.stride, self.shape, strict=True) if n > 1), reverse=True)

    @property
    def end(self) -> int:
        """The address behind its last element."""
        return self.address + self.itemsize * (
            1 + sum(s * (n - 1) for s, n in zip(self.stride, self.shape, strict=True))
        )


def itself(x: Memory) -> bool:
    """Whether two indices lie at one place: where the difference of two has an offset of 0, but is not 0."""
    if x.empty:
        return False
    inner = 0  # the largest offset of all smaller strides
    for stride, size in reversed(x.steps):
        if stride <= inner:
            break
        inner += stride * (size - 1)
    else:
        return False  # each stride steps over all that the smaller ones reach: the usual case
    differences = [(stride, 1 - size, size - 1) for stride, size in x.steps]
    for i, (stride, _, most) in enumerate(differences):  # the first dimension in which they differ
        if reaches([(stride, 1, most), *differences[i + 1 :]], 0):
            return True
    return False


def each_other(x: Memory, y: Memory) -> bool:
    """Whether an element of x shares a byte with one of y. Both have elements of one size."""
    if x.empty or y.empty or x.end <= y.address or y.end <= x.address:
        return False
    apart = y.address - x.address
    if apart % x.itemsize:
        return True  # elements that lie astride: nobody means this
    if x.steps == y.steps:  # as parts of one packed tensor have them: fewer terms, a faster search
        terms = [(stride, 1 - size, size - 1) for stride, size in x.steps]
    else:
        terms = [(stride, 0, size - 1) for stride, size in x.steps]
        terms += [(stride, 1 - size, 0) for stride, size in y.steps]
    return reaches(sorted(terms, reverse=True), apart // x.itemsize)


def reaches(terms: Sequence[tuple[int, int, int]], target: int) -> bool:
    """Whether numbers n, low <= n <= high for each (stride, low, high), have sum(n * stride) = target.

    The largest strides come first: what those after them can still reach leaves few n to try.
    """
    rest = [(0, 0)]  # what the terms from each one on reach: the least, the most
    for stride, low, high in reversed(terms):
        least, most = rest[-1]
        rest.append((least + stride * low, most + stride * high))
    rest.reverse()
    tries = 0
    stack = [(0, target)]
    while stack:
        i, left = stack.pop()
        tries += 1
        if tries > TRIES:
            return True
        if not rest[i][0] <= left <= rest[i][1]:
            continue
        if i == len(terms):
            return True
        stride, low, high = terms[i]
        least, most = rest[i + 1]
        if stride > 0:
            low, high = max(low, -((most - left) // stride)), min(high, (left - least) // stride)
        else:
            high = low  # all are alike
        stack.extend((i + 1, left - n * stride) for n in range(low, min(high, low + TRIES) + 1))
    return False
