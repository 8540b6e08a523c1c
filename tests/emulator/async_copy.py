"""cp.async: copies from global to shared memory that nobody waits for until cp.async.wait_group.

The bytes arrive as late as they may: in the wait. Until then the places count as being written, so whoever
reads them too early, or writes there, is found out.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from emulator import ptx
from emulator.alu import Step
from emulator.memory import RACE, WORD, Fault
from emulator.operands import address, reader

if TYPE_CHECKING:
    from emulator.block import Block


def compile(instruction: ptx.Instruction) -> Step | None:
    if instruction.opcode[:2] != ("cp", "async") or "bulk" in instruction.opcode:
        return None
    what = instruction.opcode[2]
    if what == "commit_group":
        return lambda block: block.copies.commit()
    if what in ("wait_group", "wait_all"):
        left = instruction.operands[0].bits if instruction.operands else None
        return lambda block: block.copies.wait(left)
    if what in ("ca", "cg"):
        return _copy(instruction)
    raise NotImplementedError(instruction.text)


def _copy(instruction: ptx.Instruction) -> Step:
    """cp.async.cg.shared.global [to], [from], size[, how many of them are read: the rest is zero]"""
    to, source, size, *read = instruction.operands
    to, source, size = address(to, "u32"), address(source), size.bits
    read = reader(read[0], "u32") if read else None

    def copy(block: "Block") -> None:
        counts = np.broadcast_to(read(block) if read else np.uint32(size), (block.count,))
        sources = source(block).astype(np.uint64)
        data = np.zeros((block.count, size // WORD), np.uint32)
        written = np.ones(data.shape, bool)
        for count in np.unique(counts):
            if count:
                here = counts == count
                copied, known = block.memory.copy(sources[here], int(count))
                data[here, : count // WORD], written[here, : count // WORD] = copied, known
        block.copies.begin(block.threads, block.shared.places(to(block), size), data, written)

    return copy


@dataclass
class Copy:
    threads: NDArray
    places: NDArray  # (n, words)
    data: NDArray
    written: NDArray[np.bool_]
    groups: NDArray  # each thread's group, once it is committed

    def split(self, chosen: NDArray[np.bool_]) -> "Copy":
        return Copy(*(field[chosen] for field in vars(self).values()))


class Copies:
    """The copies of a block that are on their way."""

    def __init__(self, block: "Block") -> None:
        self._block = block
        self._committed = np.zeros(block.size, np.int64)  # groups of each thread
        self._open: list[Copy] = []
        self._pending: list[Copy] = []

    def begin(self, threads: NDArray, places: NDArray, data: NDArray, written: NDArray) -> None:
        shared = self._block.shared
        shared.check_write(threads[:, None], places, same=False)
        np.add.at(shared.arriving, places, 1)
        if (shared.arriving[places] > 1).any():
            raise Fault(RACE, "two copies to the same place")
        self._open.append(Copy(threads, places, data, written, np.zeros(len(threads), np.int64)))

    def commit(self) -> None:
        threads = self._block.threads
        left = []
        for copy in self._open:
            mine = np.isin(copy.threads, threads)
            done = copy.split(mine)
            if mine.any():
                done.groups = self._committed[done.threads]
                self._pending.append(done)
            if not mine.all():
                left.append(copy.split(~mine))
        self._open = left
        self._committed[threads] += 1

    def wait(self, left: int | None) -> None:
        """Until no more than `left` of the thread's groups are on their way; None: no copy at all."""
        if left is None:
            self.commit()
        threads = self._block.threads
        limit = np.full(self._block.size, -1, np.int64)
        limit[threads] = self._committed[threads] - (left or 0)
        pending = []
        for copy in self._pending:
            arrived = copy.groups < limit[copy.threads]
            if arrived.any():
                self._land(copy.split(arrived))
            if not arrived.all():
                pending.append(copy.split(~arrived))
        self._pending = pending

    def _land(self, copy: Copy) -> None:
        shared = self._block.shared
        shared.arriving[copy.places] -= 1
        shared.write(copy.threads, copy.places, copy.data, copy.written)
