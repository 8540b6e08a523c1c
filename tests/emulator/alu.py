"""Arithmetic: instructions that read and write registers of one thread alone."""

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from emulator import ptx
from emulator.operands import KINDS, elements, opcode_kind, reader, writer

Step = Callable[["object"], None]


def _step(instruction: ptx.Instruction, function: Callable, kinds: tuple[str, ...], result: str) -> Step:
    """destination = function(sources), the sources of these kinds."""
    destination, *sources = instruction.operands
    read = [reader(source, kind) for source, kind in zip(sources, kinds, strict=True)]
    write = writer(destination, result)
    if len(read) == 1:
        (a,) = read
        return lambda block: write(block, function(a(block)))
    if len(read) == 2:
        a, b = read
        return lambda block: write(block, function(a(block), b(block)))
    return lambda block: write(block, function(*(source(block) for source in read)))


def _plain(instruction: ptx.Instruction, function: Callable, halves: bool = False) -> Step:
    """All operands are of the opcode's kind; halves: the function knows what to do with f16 and bf16."""
    kind = opcode_kind(instruction)
    if "16" in kind and "f" in kind and not halves:
        raise NotImplementedError(instruction.text)
    return _step(instruction, function, (kind,) * (len(instruction.operands) - 1), kind)


# Floats of 16 bits


def bf16_to_f32(bits: NDArray) -> NDArray[np.float32]:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def f32_to_bf16(value: NDArray[np.float32]) -> NDArray[np.uint16]:
    """To nearest, ties to even."""
    bits = value.view(np.uint32)
    rounded = (bits + (0x7FFF + ((bits >> 16) & 1)).astype(np.uint32)) >> 16
    return np.where(np.isnan(value), 0x7FFF, rounded).astype(np.uint16)


def half_to_f32(bits: NDArray, kind: str) -> NDArray[np.float32]:
    """Bits of f16 or bf16."""
    if kind == "bf16":
        return bf16_to_f32(bits)
    return bits.astype(np.uint16).view(np.float16).astype(np.float32)


def f32_to_half(value: NDArray[np.float32], kind: str) -> NDArray[np.uint16]:
    return f32_to_bf16(value) if kind == "bf16" else value.astype(np.float16).view(np.uint16)


def halves(bits: NDArray[np.uint32], kind: str) -> tuple[NDArray, NDArray]:
    """The low and the high element of f16x2 or bf16x2, in float32."""
    return half_to_f32(bits & 0xFFFF, kind), half_to_f32(bits >> 16, kind)


def pack(low: NDArray, high: NDArray, kind: str) -> NDArray[np.uint32]:
    return f32_to_half(low, kind).astype(np.uint32) | f32_to_half(high, kind).astype(np.uint32) << 16


# Functions of the kind of their operands


def _shift_left(a: NDArray, by: NDArray) -> NDArray:
    bits = 8 * a.dtype.itemsize
    return np.where(by < bits, a << np.minimum(by, bits - 1).astype(a.dtype), a.dtype.type(0))


def _shift_right(a: NDArray, by: NDArray) -> NDArray:
    bits = 8 * a.dtype.itemsize
    shifted = a >> np.minimum(by, bits - 1).astype(a.dtype)
    return shifted if a.dtype.kind == "i" else np.where(by < bits, shifted, a.dtype.type(0))


def _divide(a: NDArray, b: NDArray) -> NDArray:
    """Towards zero; by zero, all bits are set, as a GPU has it."""
    if a.dtype.kind == "f":
        return a / b
    safe = np.where(b == 0, b.dtype.type(1), b)
    floor, rest = np.divmod(a, safe)
    quotient = floor + ((rest != 0) & ((a < 0) != (safe < 0))).astype(a.dtype)
    return np.where(b == 0, ~a.dtype.type(0), quotient)


def _remainder(a: NDArray, b: NDArray) -> NDArray:
    return a - _divide(a, b) * b


def _wide(a: NDArray) -> NDArray:
    return a.astype(np.dtype(f"{a.dtype.kind}{2 * a.dtype.itemsize}"))


def _product(a: NDArray, b: NDArray, part: str) -> NDArray:
    """part: lo, hi, or wide."""
    if part == "lo":
        return a * b
    if a.dtype.itemsize == 8:
        high = [(int(x) * int(y)) >> 64 for x, y in np.broadcast(a, b)]
        return np.array([x & (1 << 64) - 1 for x in high], np.uint64).view(a.dtype)
    product = _wide(a) * _wide(b)
    return product if part == "wide" else (product >> 8 * a.dtype.itemsize).astype(a.dtype)


def _fma(a: NDArray, b: NDArray, c: NDArray) -> NDArray:
    return (a.astype(np.float64) * b + c).astype(a.dtype)


def _leading_zeros(a: NDArray[np.uint32]) -> NDArray:
    return (32 - np.frexp(a.astype(np.float64))[1]).astype(np.uint32)


def _ones(a: NDArray[np.uint32]) -> NDArray:
    return np.unpackbits(np.ascontiguousarray(a).view(np.uint8).reshape(-1, 4), axis=1).sum(axis=1)


def _permute(a: NDArray, b: NDArray, selector: NDArray) -> NDArray:
    """prmt: each 4 bits of the selector name one of the 8 bytes of b, a."""
    both = a.astype(np.uint64) | b.astype(np.uint64) << np.uint64(32)
    result = np.zeros(np.broadcast(a, b, selector).shape, np.uint32)
    for i in range(4):
        choice = selector >> np.uint32(4 * i) & 15
        byte = (both >> (8 * (choice & 7)).astype(np.uint64) & np.uint64(255)).astype(np.uint32)
        byte = np.where(choice & 8, (byte >> 7) * np.uint32(255), byte)
        result |= byte << np.uint32(8 * i)
    return result


def _logic3(a: NDArray, b: NDArray, c: NDArray, table: NDArray) -> NDArray:
    result = np.zeros_like(a & b & c)
    for i in range(8):
        if int(table[0]) >> i & 1:
            result = result | ((a if i & 4 else ~a) & (b if i & 2 else ~b) & (c if i & 1 else ~c))
    return result


def _funnel(low: NDArray, high: NDArray, by: NDArray, right: bool) -> NDArray:
    both = low.astype(np.uint64) | high.astype(np.uint64) << np.uint64(32)
    by = (by & 31).astype(np.uint64)
    return ((both >> by) if right else (both << by) >> np.uint64(32)).astype(np.uint32)


PLAIN = {
    "add": np.add,
    "sub": np.subtract,
    "div": _divide,
    "rem": _remainder,
    "neg": np.negative,
    "abs": np.abs,
    "fma": _fma,
    "ex2": np.exp2,
    "lg2": np.log2,
    "rcp": np.reciprocal,
    "sqrt": np.sqrt,
    "rsqrt": lambda a: 1 / np.sqrt(a),
    "tanh": np.tanh,
    "and": np.bitwise_and,
    "or": np.bitwise_or,
    "xor": np.bitwise_xor,
    "not": np.invert,
    "popc": _ones,
    "clz": _leading_zeros,
    "prmt": _permute,
}

COMPARE = {
    "eq": np.equal,
    "ne": np.not_equal,
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
    "lo": np.less,
    "ls": np.less_equal,
    "hi": np.greater,
    "hs": np.greater_equal,
}


def _extreme(instruction: ptx.Instruction) -> Step:
    """max and min. Of a number and NaN, the number, unless the opcode says NaN; .relu: not below 0."""
    name, kind = instruction.opcode[0], opcode_kind(instruction)
    of_nan, relu = "NaN" in instruction.opcode, "relu" in instruction.opcode
    function = {"max": (np.fmax, np.maximum), "min": (np.fmin, np.minimum)}[name][of_nan or kind[0] in "su"]

    def extreme(a: NDArray, b: NDArray) -> NDArray:
        if kind.endswith("x2"):
            element = kind[:-2]
            pairs = zip(halves(a, element), halves(b, element), strict=True)
            return pack(*(function(x, y) for x, y in pairs), element)
        result = function(a, b)
        return np.maximum(result, 0).astype(a.dtype) if relu else result

    return _plain(instruction, extreme, halves=kind.endswith("x2"))


def _multiply(instruction: ptx.Instruction) -> Step:
    """mul and mad; integers: .lo, .hi, or .wide."""
    kind, add = opcode_kind(instruction), instruction.opcode[0] == "mad"
    if "f" in kind:
        return _plain(instruction, _fma if add else np.multiply)
    part = next(p for p in instruction.opcode if p in ("lo", "hi", "wide"))
    result = f"{kind[0]}{2 * int(kind[1:])}" if part == "wide" else kind
    if add:
        return _step(instruction, lambda a, b, c: _product(a, b, part) + c, (kind, kind, result), result)
    return _step(instruction, lambda a, b: _product(a, b, part), (kind, kind), result)


def _shift(instruction: ptx.Instruction) -> Step:
    kind = opcode_kind(instruction).replace("b", "u")
    function = _shift_left if instruction.opcode[0] == "shl" else _shift_right
    return _step(instruction, function, (kind, "u32"), kind)


def _set_predicate(instruction: ptx.Instruction) -> Step:
    """setp.compare[.and|or|xor].kind p[|q], a, b[, c]"""
    _, name, *rest = instruction.opcode
    kind = opcode_kind(instruction)
    destination, *sources = instruction.operands
    both = isinstance(destination, ptx.Pair)
    write = [writer(p, "pred") for p in (destination[:2] if both else (destination,))]
    a, b = (reader(source, kind) for source in sources[:2])
    combine = {"and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor}.get(rest[0])
    c = reader(sources[2], "pred") if combine else None

    def step(block) -> None:
        x, y = a(block), b(block)
        if kind == "bf16":
            x, y = bf16_to_f32(x), bf16_to_f32(y)
        if name in ("num", "nan"):
            nan = np.isnan(x) | np.isnan(y)
            result = nan if name == "nan" else ~nan
        elif "f" in kind and name == "ne":  # ordered: false if one is NaN
            result = (x < y) | (x > y)
        elif name[-1] == "u" and name[:-1] in COMPARE:  # unordered: true if one is NaN
            result = COMPARE[name[:-1]](x, y) | np.isnan(x) | np.isnan(y)
        else:
            result = COMPARE[name](x, y)
        for i, w in enumerate(write):
            value = ~result if i else result
            w(block, combine(value, c(block)) if c else value)

    return step


def _select(instruction: ptx.Instruction) -> Step:
    kind = opcode_kind(instruction)
    return _step(instruction, lambda a, b, p: np.where(p, a, b), (kind, kind, "pred"), kind)


def _move(instruction: ptx.Instruction) -> Step:
    """mov, which also splits a register into a vector, or joins one."""
    destination, source = instruction.operands
    kind = opcode_kind(instruction)
    if isinstance(destination, ptx.Vector) or isinstance(source, ptx.Vector):
        bits = int(kind[1:]) // len(elements(destination if isinstance(destination, ptx.Vector) else source))
        return _split(destination, source, kind, bits)
    return _plain(instruction, lambda a: a)


def _split(destination: ptx.Operand, source: ptx.Operand, kind: str, bits: int) -> Step:
    whole, part = np.dtype(KINDS[f"u{kind[1:]}"]), f"u{bits}"
    if isinstance(destination, ptx.Vector):
        read = reader(source, f"u{kind[1:]}")
        writes = [writer(element, part) for element in destination.elements]

        def split(block) -> None:
            value = read(block)
            for i, write in enumerate(writes):
                write(block, (value >> whole.type(bits * i)).astype(KINDS[part]))

        return split
    reads, write = [reader(element, part) for element in source.elements], writer(destination, f"u{kind[1:]}")

    def join(block) -> None:
        parts = (r(block).astype(whole) << whole.type(bits * i) for i, r in enumerate(reads))
        write(block, np.bitwise_or.reduce(np.broadcast_arrays(*parts)))

    return join


def _convert(instruction: ptx.Instruction) -> Step:
    """cvt.[rounding.]to.from"""
    kinds = [part for part in instruction.opcode if part in KINDS]
    to, of = kinds
    rounding = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}
    round_ = next((rounding[part] for part in instruction.opcode if part in rounding), None)
    if to.endswith("x2"):  # the first source is the high half
        return _step(instruction, lambda high, low: pack(low, high, to[:-2]), (of, of), to)
    if of in ("bf16", "f16") and to == "f32":
        return _step(instruction, lambda a: half_to_f32(a.view(np.uint16), of), (of,), to)
    if to in ("bf16", "f16") and of == "f32":
        return _step(instruction, lambda a: f32_to_half(a, to), (of,), "b16")

    def convert(a: NDArray) -> NDArray:
        if round_ is not None:
            a = round_(a)
        if of[0] == "f" and to[0] in "su":  # out of range: the nearest; NaN: 0
            limits = np.iinfo(KINDS[to])
            a = np.clip(np.nan_to_num(a.astype(np.float64), nan=0), limits.min, limits.max)
        return a.astype(KINDS[to])

    return _step(instruction, convert, (of,), to)


def _look_up_table(instruction: ptx.Instruction) -> Step:
    return _step(instruction, _logic3, ("u32",) * 4, "u32")


def _funnel_shift(instruction: ptx.Instruction) -> Step:
    right = "r" in instruction.opcode
    return _step(instruction, lambda a, b, c: _funnel(a, b, c, right), ("u32",) * 3, "u32")


FORMS = {
    "max": _extreme,
    "min": _extreme,
    "mul": _multiply,
    "mad": _multiply,
    "shl": _shift,
    "shr": _shift,
    "setp": _set_predicate,
    "selp": _select,
    "mov": _move,
    "cvta": lambda instruction: _plain(instruction, lambda a: a),
    "mapa": lambda instruction: _step(instruction, lambda a, rank: a, ("u32", "u32"), "u32"),  # no clusters
    "cvt": _convert,
    "lop3": _look_up_table,
    "shf": _funnel_shift,
}


def compile(instruction: ptx.Instruction) -> Step | None:
    """Returns what executes an arithmetic instruction, or None if it is another one."""
    name = instruction.opcode[0]
    if name in FORMS:
        return FORMS[name](instruction)
    if name in PLAIN:
        return _plain(instruction, PLAIN[name])
    return None
