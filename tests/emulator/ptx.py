"""PTX text into kernels of instructions: the part of the language that the compiler writes.

    @%p1 ld.global.v2.b32 {%r1, %r2}, [%rd3+8];

is Instruction(predicate=(%p1, False), opcode=("ld", "global", "v2", "b32"), operands=(Vector, Address)).
"""

import re
from dataclasses import dataclass
from typing import NamedTuple

# The files of registers, and the bits of a register. Floats lie in those of their size.
FILES = {"pred": 1, "b16": 16, "b32": 32, "b64": 64}
SIZES = {"u8": 1, "b8": 1, "s8": 1, "u16": 2, "u32": 4, "s32": 4, "b32": 4, "f32": 4, "u64": 8, "b64": 8}

LABEL = re.compile(r"([$\w]+):")
TOKEN = re.compile(
    r"0[fF][0-9a-fA-F]{8}|0[dD][0-9a-fA-F]{16}|-?0[xX][0-9a-fA-F]+|-?\d+|[%$\w]+(?:\.[xyzw])?|[\[\]{},|+]"
)


class Register(NamedTuple):
    file: str
    index: int


class Special(NamedTuple):
    """A register that the hardware fills, such as %tid.x."""

    name: str


class Immediate(NamedTuple):
    bits: int
    is_float: bool  # the bits are those of a float32


class Symbol(NamedTuple):
    """A label, a parameter, or the dynamic shared memory."""

    name: str


class Address(NamedTuple):
    base: "Operand"
    offset: int
    coordinates: tuple["Operand", ...]  # of a tensor map's box


class Vector(NamedTuple):
    elements: tuple["Operand", ...]


class Pair(NamedTuple):
    """a|b: two results."""

    first: "Operand"
    second: "Operand"


Operand = Register | Special | Immediate | Symbol | Address | Vector | Pair


class Instruction(NamedTuple):
    line: int
    text: str
    predicate: tuple[Register, bool] | None  # (register, whether it must be false)
    opcode: tuple[str, ...]
    operands: tuple[Operand, ...]


class Parameter(NamedTuple):
    name: str
    size: int  # bytes


@dataclass(frozen=True, eq=False)
class Kernel:
    name: str
    parameters: list[Parameter]
    registers: dict[str, int]  # file -> how many
    instructions: list[Instruction]
    labels: dict[str, int]  # -> the instruction behind it


def parse(text: str) -> list[Kernel]:
    """Returns the kernels of a module."""
    text = re.sub(r"//[^\n]*", "", text)
    heads = list(re.finditer(r"\.entry\s+(\w+)\s*\(([^)]*)\)[^{]*\{", text))
    ends = [head.start() for head in heads[1:]] + [len(text)]
    return [_kernel(text, head, end) for head, end in zip(heads, ends, strict=True)]


def _kernel(text: str, head: re.Match, end: int) -> Kernel:
    body = _Body()
    body.read(text[head.end() : end], text.count("\n", 0, head.end()) + 1)
    parameters = [_parameter(p) for p in head[2].split(",") if p.strip()]
    return Kernel(head[1], parameters, body.counts, body.instructions, body.labels)


def _parameter(text: str) -> Parameter:
    kind = re.search(r"\.([usbf]\d+)", text)[1]
    name, count = re.search(r"(\w+)(?:\[(\d+)\])?\s*$", text).groups()
    return Parameter(name, SIZES[kind] * int(count or 1))


class _Body:
    """Reads statements one by one. Braces open scopes, in which names of registers and labels are local."""

    def __init__(self) -> None:
        self.counts = dict.fromkeys(FILES, 0)
        self.instructions: list[Instruction] = []
        self.labels: dict[str, int] = {}
        self._scopes: list[dict[str, Register]] = [{}]
        self._labels: list[str] = [""]  # what makes a scope's labels unique
        self._blocks = 0

    def read(self, text: str, line: int) -> None:
        at = 0
        while at < len(text):
            if text[at].isspace():
                line += text[at] == "\n"
                at += 1
            elif text[at] == "{":
                self._blocks += 1
                self._scopes.append({})
                self._labels.append(f"@{self._blocks}")
                at += 1
            elif text[at] == "}":
                self._scopes.pop()
                self._labels.pop()
                if not self._scopes:
                    return
                at += 1
            elif label := LABEL.match(text, at):
                self.labels[label[1] + self._suffix(label[1])] = len(self.instructions)
                at = label.end()
            else:
                end = text.index(";", at)
                self._statement(" ".join(text[at:end].split()), line)
                line += text.count("\n", at, end)
                at = end + 1

    def _suffix(self, label: str) -> str:
        return "" if label.startswith("$") else self._labels[-1]

    def _statement(self, text: str, line: int) -> None:
        if text.startswith(".reg"):
            self._declare(text)
        elif not text.startswith("."):
            self._instruction(text, line)

    def _declare(self, text: str) -> None:
        kind, names = re.match(r"\.reg\s+\.(\w+)\s+(.*)", text).groups()
        file = kind if kind in FILES else f"b{kind[1:]}"
        for name in names.replace(" ", "").split(","):
            if many := re.match(r"(.+)<(\d+)>", name):
                for i in range(int(many[2])):
                    self._scopes[-1][f"{many[1]}{i}"] = self._new(file)
            else:
                self._scopes[-1][name] = self._new(file)

    def _new(self, file: str) -> Register:
        self.counts[file] += 1
        return Register(file, self.counts[file] - 1)

    def _instruction(self, text: str, line: int) -> None:
        predicate, opcode, rest = re.match(r"(?:@(!?[%\w]+)\s+)?([\w.:]+)\s*(.*)", text).groups()
        if predicate:
            predicate = self._name(predicate.lstrip("!")), predicate.startswith("!")
        tokens = TOKEN.findall(rest)
        operands = []
        while tokens:
            operands.append(self._operand(tokens))
            if tokens and tokens[0] == "|":
                tokens.pop(0)
                operands[-1] = Pair(operands[-1], self._operand(tokens))
            if tokens:
                assert tokens.pop(0) == ",", text
        opcode = tuple(opcode.split("."))
        self.instructions.append(Instruction(line, text, predicate, opcode, tuple(operands)))

    def _operand(self, tokens: list[str]) -> Operand:
        token = tokens.pop(0)
        if token == "{":
            return Vector(tuple(self._until("}", tokens)))
        if token == "[":
            base, offset, coordinates = self._operand(tokens), 0, ()
            for part in self._until("]", tokens):
                if isinstance(part, Vector):
                    coordinates = part.elements
                else:
                    offset = part.bits
            return Address(base, offset, coordinates)
        if re.match(r"0[fF]", token):
            return Immediate(int(token[2:], 16), True)
        if re.match(r"-?\d", token):
            return Immediate(int(token, 0), False)
        return self._name(token)

    def _until(self, end: str, tokens: list[str]) -> list[Operand]:
        found = []
        while (token := tokens[0]) != end:
            if token in ",+":
                tokens.pop(0)
            else:
                found.append(self._operand(tokens))
        tokens.pop(0)
        return found

    def _name(self, name: str) -> Operand:
        for scope in reversed(self._scopes):
            if name in scope:
                return scope[name]
        if name.startswith("%"):
            return Special(name)
        # An inline assembly's labels are in capital letters, and local to its braces.
        return Symbol(name + self._suffix(name) if name.isupper() else name)
