"""Operands into functions: what reads one for the lanes that execute now, and what writes one.

A kind is PTX's name for a type: s32, b64, f16, pred. Registers lie in files of 1, 16, 32 or 64 bits, and
are read as any kind of that size or smaller. A value is an array, one element for each lane that executes,
or one element for all of them.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from emulator import ptx

if TYPE_CHECKING:
    from emulator.block import Block

Read = Callable[["Block"], NDArray]
Write = Callable[["Block", NDArray], None]

KINDS = {
    "pred": np.bool_,
    **{
        f"{sign}{8 * n}": np.dtype(f"{'i' if sign == 's' else 'u'}{n}")
        for sign in "sub"
        for n in (1, 2, 4, 8)
    },
    "f16": np.float16,
    "bf16": np.uint16,  # numpy has none: bits
    "f32": np.float32,
    "f64": np.float64,
    "f16x2": np.uint32,
    "bf16x2": np.uint32,
}
FILE_VIEWS = {
    "pred": ("pred",),
    "b16": ("u16", "s16", "b16", "f16", "bf16"),
    "b32": ("u32", "s32", "b32", "f32", "f16x2", "bf16x2"),
    "b64": ("u64", "s64", "b64", "f64"),
}


def reader(operand: ptx.Operand, kind: str) -> Read:
    dtype = np.dtype(KINDS[kind])
    if isinstance(operand, ptx.Register):
        file, index = operand
        if kind in FILE_VIEWS[file]:
            return lambda block: block.registers[kind][index, block.lanes]
        return lambda block: block.registers[file][index, block.lanes].astype(dtype)
    if isinstance(operand, ptx.Special):
        return lambda block: block.special(operand.name).astype(dtype)
    if isinstance(operand, ptx.Symbol):
        return lambda block: np.array([block.symbols[operand.name]], dtype)
    size = 4 if operand.is_float else 8
    bits = (operand.bits & (1 << 8 * size) - 1).to_bytes(size, "little")
    value = np.frombuffer(bits, "u1")[: dtype.itemsize].copy().view(dtype)
    return lambda block: value


def writer(operand: ptx.Operand, kind: str) -> Write:
    if isinstance(operand, ptx.Symbol):  # "_": nobody wants it
        return lambda block, value: None
    file, index = operand
    view = kind
    if kind not in FILE_VIEWS[file]:  # a smaller value is extended by its sign, or by zeros
        view = kind[0].replace("b", "u") + file[1:]

    def write(block: "Block", value: NDArray) -> None:
        block.registers[view][index, block.lanes] = value

    return write


def elements(operand: ptx.Operand) -> tuple[ptx.Operand, ...]:
    return operand.elements if isinstance(operand, ptx.Vector) else (operand,)


def address(operand: ptx.Address, kind: str = "s64") -> Read:
    """The address for each lane; kind: that of the base."""
    base, offset = reader(operand.base, kind), operand.offset

    def read(block: "Block") -> NDArray:
        return np.broadcast_to(base(block).astype(np.int64) + offset, (block.count,))

    return read


def opcode_kind(instruction: ptx.Instruction) -> str:
    """The last part of an opcode that is a kind: add.rn.f32 -> f32."""
    return next(part for part in reversed(instruction.opcode) if part in KINDS)
