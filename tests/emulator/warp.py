"""Instructions of a whole warp: shuffles, votes, matrices.

A warp's threads come together, 32 in a row, so a register of all of them is (warps, 32). In a matrix
instruction thread 4g + t, "group" g and "thread in group" t, holds pairs of adjacent elements: a register of
all threads is (warps, g, t, 2), and where an element lies in its matrix is only an order of these axes.
"""

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from emulator import ptx
from emulator.alu import Step, half_to_f32
from emulator.loads import store_shared
from emulator.operands import address, elements, reader, writer

if TYPE_CHECKING:
    from emulator.block import Block


def compile(instruction: ptx.Instruction) -> Step | None:
    name = instruction.opcode[0]
    if name == "bar":
        return _warp_sync(instruction)
    compilers = {
        "shfl": _shuffle,
        "vote": _vote,
        "elect": _elect,
        "mma": _mma,
        "ldmatrix": _load_matrix,
        "stmatrix": _store_matrix,
    }
    return compilers[name](instruction) if name in compilers else None


def _whole(instruction: ptx.Instruction) -> None:
    """The last operand is the mask of the threads that take part: here all."""
    mask = instruction.operands[-1]
    if not isinstance(mask, ptx.Immediate) or mask.bits & 0xFFFFFFFF != 0xFFFFFFFF:
        raise NotImplementedError(f"line {instruction.line}, not of a whole warp: {instruction.text}")


def _warp_sync(instruction: ptx.Instruction) -> Step:
    _whole(instruction)
    return lambda block: block.clocks.warp_sync(block.threads)


def _shuffle(instruction: ptx.Instruction) -> Step:
    """shfl.sync.mode.b32 d[|p], a, b, c, mask: the a of another thread of the segment that c names."""
    _whole(instruction)
    mode = instruction.opcode[2]
    destination, source, by, clamp, _ = instruction.operands
    found = writer(destination.second, "pred") if isinstance(destination, ptx.Pair) else None
    write = writer(destination.first if found else destination, "u32")
    a, b, c = reader(source, "u32"), reader(by, "u32"), reader(clamp, "u32")

    def shuffle(block: "Block") -> None:
        lane = block.threads % 32
        segment, last = c(block) >> 8 & 31, c(block) & 31
        low, high = lane & segment, (lane & segment) | (last & ~segment & 31)
        step = b(block).astype(np.int64)
        other = {
            "up": lane - step,
            "down": lane + step,
            "bfly": lane ^ step,
            "idx": low | (step & ~segment.astype(np.int64) & 31),
        }[mode]
        there = other >= high if mode == "up" else other <= high
        other = np.where(there, other, lane).reshape(-1, 32)
        values = np.broadcast_to(a(block), (block.count,)).reshape(-1, 32)
        write(block, np.take_along_axis(values, other, axis=1).reshape(-1))
        if found:
            found(block, there)
        # What the others receive, this thread has loaded: in practice that orders its loads.
        block.clocks.warp_sync(block.threads)

    return shuffle


def _vote(instruction: ptx.Instruction) -> Step:
    _whole(instruction)
    mode = instruction.opcode[2]
    destination, source, _ = instruction.operands
    read, write = reader(source, "pred"), writer(destination, "u32" if mode == "ballot" else "pred")
    bits = np.uint32(1) << np.arange(32, dtype=np.uint32)

    def vote(block: "Block") -> None:
        votes = np.broadcast_to(read(block), (block.count,)).reshape(-1, 32)
        result = {
            "any": lambda: votes.any(axis=1),
            "all": lambda: votes.all(axis=1),
            "uni": lambda: votes.all(axis=1) | ~votes.any(axis=1),
            "ballot": lambda: (votes * bits).sum(axis=1, dtype=np.uint32),
        }[mode]()
        write(block, result.repeat(32))
        block.clocks.warp_sync(block.threads)

    return vote


def _elect(instruction: ptx.Instruction) -> Step:
    """One thread of each warp, here the first."""
    _whole(instruction)
    write = writer(instruction.operands[0].second, "pred")
    return lambda block: write(block, block.threads % 32 == 0)


# Matrices


def _pairs(block: "Block", registers: list, kind: str) -> NDArray[np.float32]:
    """(registers, warps, g, t, 2)"""
    words = np.stack([np.broadcast_to(read(block), (block.count,)) for read in registers])
    return half_to_f32(words.view(np.uint16), kind).reshape(len(registers), -1, 8, 4, 2)


def _mma(instruction: ptx.Instruction) -> Step:
    """mma.sync.m16n8k16: D = A·B + C, A (16, 16) and B (16, 8) of 16 bits, C and D (16, 8) float32."""
    _, _, _, shape, *_, out, a_kind, _, c_kind = instruction.opcode[:10]
    assert (shape, out, c_kind) == ("m16n8k16", "f32", "f32"), instruction.text
    d, a, b, c = (elements(operand) for operand in instruction.operands)
    a, b = ([reader(register, "u32") for register in x] for x in (a, b))
    c, d = [reader(register, "f32") for register in c], [writer(register, "f32") for register in d]

    def mma(block: "Block") -> None:
        # registers of A: rows g, g + 8, then the same 8 columns to the right
        A = _pairs(block, a, a_kind).reshape(2, 2, -1, 8, 4, 2)  # (k / 8, m / 8, warps, g, t, 2)
        A = A.transpose(2, 1, 3, 0, 4, 5).reshape(-1, 16, 16)
        B = _pairs(block, b, a_kind)  # (k / 8, warps, g, t, 2): column g
        B = B.transpose(1, 0, 3, 4, 2).reshape(-1, 16, 8)
        product = (A @ B).reshape(-1, 2, 8, 4, 2).transpose(1, 4, 0, 2, 3).reshape(4, -1)
        for i in range(4):  # two adjacent columns of row g, then of row g + 8
            d[i](block, product[i] + c[i](block))

    return mma


def _load_matrix(instruction: ptx.Instruction) -> Step:
    """ldmatrix: 8x8 matrices of 16 bits; thread 8i + j has the address of row j of matrix i."""
    destination, source = instruction.operands
    writes = [writer(register, "u32") for register in elements(destination)]
    at, count, transposed = address(source, "u32"), len(writes), "trans" in instruction.opcode

    def load_matrix(block: "Block") -> None:
        given = block.threads.reshape(-1, 32)[:, : 8 * count]
        places = block.shared.places(at(block).reshape(-1, 32)[:, : 8 * count].reshape(-1), 16)
        rows, pairs = np.arange(given.size)[:, None] % 8, np.arange(4)
        first = given.reshape(-1, 1) // 32 * 32  # of the warp
        for receiver in (
            (8 * pairs + rows // 2, 8 * pairs + 4 + rows // 2) if transposed else (4 * rows + pairs,)
        ):
            block.shared.note_read(first + receiver, places)
        words = block.shared.views[4][places].reshape(-1, count, 8, 4)  # (warps, matrix, row g, pair t)
        if transposed:
            matrices = words.view(np.uint16).swapaxes(2, 3)
            words = np.ascontiguousarray(matrices).view(np.uint32)
        for i, write in enumerate(writes):
            write(block, words[:, i].reshape(-1))

    return load_matrix


def _store_matrix(instruction: ptx.Instruction) -> Step:
    """stmatrix, the reverse of ldmatrix."""
    destination, source = instruction.operands
    reads = [reader(register, "u32") for register in elements(source)]
    at, count, transposed = address(destination, "u32"), len(reads), "trans" in instruction.opcode

    def store_matrix(block: "Block") -> None:
        words = np.stack([np.broadcast_to(read(block), (block.count,)) for read in reads], axis=0)
        words = words.reshape(count, -1, 8, 4).swapaxes(0, 1)
        if transposed:
            matrices = np.ascontiguousarray(words).view(np.uint16).swapaxes(2, 3)
            words = np.ascontiguousarray(matrices).view(np.uint32)
        threads, addresses = block.threads, at(block)
        if count < 4:
            block.choose(threads[threads % 32 < 8 * count])
            addresses = addresses[threads % 32 < 8 * count]
        store_shared(block, addresses, np.ascontiguousarray(words).reshape(-1, 4))
        block.choose(threads)

    return store_matrix
