"""Loads, stores and atomic operations."""

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from emulator import ptx
from emulator.alu import Step
from emulator.memory import SHARED_BASE, WORD
from emulator.operands import KINDS, address, elements, opcode_kind, reader, writer

if TYPE_CHECKING:
    from emulator.block import Block

POLLED = {"acquire", "relaxed", "volatile"}  # whoever loads so may wait for another block's store


def compile(instruction: ptx.Instruction) -> Step | None:
    name = instruction.opcode[0]
    if name == "ld":
        return _load(instruction)
    if name == "st":
        return _store(instruction)
    if name in ("atom", "red"):
        return _atomic(instruction)
    if name in ("fence", "membar") and instruction.opcode[1] not in ("proxy", "mbarrier_init"):
        return lambda block: None  # memory is one, and blocks take turns
    return None


def space(instruction: ptx.Instruction) -> str:
    spaces = ("param", "global", "shared")
    return next(part for part in map(base_name, instruction.opcode) if part in spaces)


def base_name(part: str) -> str:
    """shared::cta -> shared: there are no clusters."""
    return part.split("::")[0]


def load_shared(block: "Block", addresses: NDArray, size: int) -> NDArray:
    """(n) addresses -> (n, words of at most 4 bytes), by the threads that execute."""
    places = block.shared.places(addresses, size)
    block.shared.note_read(block.threads[:, None], places)
    if size >= WORD:
        return block.shared.views[WORD][places]
    return block.shared.views[size][(addresses - SHARED_BASE) // size][:, None]


def store_shared(block: "Block", addresses: NDArray, values: NDArray) -> None:
    """(n) addresses, (n, words) values."""
    size = values.shape[1] * values.itemsize
    if size < WORD:
        raise NotImplementedError("stores of less than a word to shared memory")
    places = block.shared.places(addresses, size)
    block.shared.write(block.threads, places, values)


def _load(instruction: ptx.Instruction) -> Step:
    destination, source = instruction.operands
    kind, where = opcode_kind(instruction), space(instruction)
    writes = [writer(element, kind) for element in elements(destination)]
    dtype = np.dtype(KINDS[kind])
    size = dtype.itemsize * len(writes)
    at = address(source, "u32" if where == "shared" else "s64")
    polls = POLLED & set(instruction.opcode)

    def load(block: "Block") -> None:
        addresses = at(block)
        if where == "shared":
            raw = load_shared(block, addresses, size)
        else:
            raw = block.memory.load(addresses.astype(np.uint64), size)
        values = np.ascontiguousarray(raw).view(dtype)
        for i, write in enumerate(writes):
            write(block, values[:, i])
        if polls:
            block.poll()

    return load


def _store(instruction: ptx.Instruction) -> Step:
    destination, source = instruction.operands
    kind, where = opcode_kind(instruction), space(instruction)
    reads = [reader(element, kind) for element in elements(source)]
    unit = min(WORD, np.dtype(KINDS[kind]).itemsize * len(reads))
    at = address(destination, "u32" if where == "shared" else "s64")

    def store(block: "Block") -> None:
        columns = [np.broadcast_to(read(block), (block.count,)) for read in reads]
        values = np.ascontiguousarray(np.stack(columns, axis=1)).view(f"u{unit}")
        addresses = at(block)
        if where == "shared":
            store_shared(block, addresses, values)
        else:
            block.memory.store(addresses.astype(np.uint64), values)

    return store


def _atomic(instruction: ptx.Instruction) -> Step:
    """atom and red on global memory: one thread behind the other."""
    assert space(instruction) == "global", instruction.text
    operands = list(instruction.operands)
    writes = [] if instruction.opcode[0] == "red" else [writer(operands.pop(0), opcode_kind(instruction))]
    kind = opcode_kind(instruction)
    at, *sources = address(operands[0]), *(elements(operand) for operand in operands[1:])
    reads = [[reader(element, kind) for element in source] for source in sources]
    name = next(part for part in instruction.opcode if part in ATOMIC)
    dtype, width = np.dtype(KINDS[kind]), len(reads[0])

    def atomic(block: "Block") -> None:
        addresses = at(block).astype(np.uint64)
        values = [
            np.stack([np.broadcast_to(read(block), (block.count,)) for read in source], axis=1)
            for source in reads
        ]
        old = np.empty((block.count, width), dtype)
        for i in range(block.count):
            here = addresses[i : i + 1]
            old[i] = np.ascontiguousarray(block.memory.load(here, dtype.itemsize * width)).view(dtype)[0]
            new = ATOMIC[name](old[i], *(value[i] for value in values)).astype(dtype)
            block.memory.store(here, new[None].view(f"u{min(WORD, new.nbytes)}"))
        for write in writes:
            write(block, old[:, 0])

    return atomic


ATOMIC = {
    "add": np.add,
    "max": np.maximum,
    "min": np.minimum,
    "or": np.bitwise_or,
    "and": np.bitwise_and,
    "exch": lambda old, new: new,
    "cas": lambda old, expected, new: np.where(old == expected, new, old),
    "inc": lambda old, most: np.where(old >= most, 0, old + 1),
}
