"""The operations of scores.numbers.Number on a kernel's numbers."""

import operator
from typing import Any, NamedTuple

import cutlass
import cutlass.cute as cute
from cutlass import Boolean, Float32, Int32
from cutlass._mlir.dialects import arith

LOG2_E = 1.4426950408889634


class Index(NamedTuple):
    """The integer base + offset, of which the compiler knows the offset, and the same as a float.

    So differences and comparisons fold the offset of a column into a literal, and a row is converted to a
    float once. What isn't used costs nothing. Floats are exact up to 2^24.
    """

    base: Int32
    floating: Float32
    offset: int = 0

    def integer(self) -> Int32:
        return self.base + self.offset if self.offset else self.base

    def to_float(self) -> Float32:
        return self.floating + float(self.offset) if self.offset else self.floating


def index(base: Int32, offset: int = 0) -> Index:
    return Index(base, base.to(Float32), offset)


class Scaled(NamedTuple):
    """raw · factor, where all scores share the factor: a further one is multiplied into it."""

    raw: Float32
    factor: Float32


class Captured(NamedTuple):
    """A number that all scores share."""

    x: Float32 | Int32


class KernelOps:
    """Numbers are Python's, Float32, Int32, Boolean, Index, Scaled or Captured."""

    def kind(self, a: Any) -> str:
        a = a.x if isinstance(a, Captured) else a
        if isinstance(a, bool | Boolean):
            return "bool"
        return "float" if isinstance(a, float | Float32 | Scaled) else "int"

    def number(self, a: Any) -> Any:
        if isinstance(a, Index):
            return a.integer()
        if isinstance(a, Scaled):
            return a.raw * a.factor
        if isinstance(a, Captured):
            return a.x
        if isinstance(a, bool | int | float):
            return (Boolean if isinstance(a, bool) else Int32 if isinstance(a, int) else Float32)(a)
        return a

    def floating(self, a: Any) -> Float32:
        return a.to_float() if isinstance(a, Index) else self.number(a).to(Float32)

    def pair(self, a: Any, b: Any) -> tuple[Any, Any]:
        """Both as numbers of one kind."""
        kinds = self.kind(a), self.kind(b)
        if "float" in kinds:
            return self.floating(a), self.floating(b)
        kind = Int32 if "int" in kinds else Boolean
        return self.number(a).to(kind), self.number(b).to(kind)

    def indices(self, a: Any, b: Any) -> tuple[Index, Index] | None:
        """Both as Index, if one is and the other is an integer too."""
        if not isinstance(a, Index) and not isinstance(b, Index) or "float" in (self.kind(a), self.kind(b)):
            return None
        return tuple(self._index(x) for x in (a, b))

    def _index(self, x: Any) -> Index:
        if isinstance(x, int):
            return Index(Int32(0), Float32(0.0), int(x))
        return x if isinstance(x, Index) else index(self.number(x).to(Int32))

    def add(self, a: Any, b: Any) -> Any:
        if pair := self.indices(a, b):
            a, b = pair
            return Index(a.base + b.base, a.floating + b.floating, a.offset + b.offset)
        return self._arithmetic(operator.add, a, b)

    def sub(self, a: Any, b: Any) -> Any:
        if pair := self.indices(a, b):
            a, b = pair
            return Index(a.base - b.base, a.floating - b.floating, a.offset - b.offset)
        return self._arithmetic(operator.sub, a, b)

    def mul(self, a: Any, b: Any) -> Any:
        for x, y in ((a, b), (b, a)):
            if isinstance(x, Scaled) and isinstance(y, Captured | float | int):
                return Scaled(x.raw, x.factor * self.floating(y))
            if isinstance(x, Captured) and isinstance(y, Captured | float | int):
                return Captured(self._arithmetic(operator.mul, x, y))
        return self._arithmetic(operator.mul, a, b)

    def _arithmetic(self, f: Any, a: Any, b: Any) -> Any:
        if isinstance(a, int | float) and isinstance(b, int | float):
            return f(a, b)
        a, b = self.pair(a, b)
        return f(*(x.to(Int32) if isinstance(x, Boolean) else x for x in (a, b)))

    def rcp(self, a: Any) -> Any:
        if isinstance(a, int | float):
            return 1.0 / a
        inverse = cute.arch.rcp_approx(self.floating(a))
        return Captured(inverse) if isinstance(a, Captured) else inverse

    def floordiv(self, a: Any, b: Any) -> Int32:
        a, b = self.pair(a, b)
        return a // b

    def mod(self, a: Any, b: Any) -> Int32:
        """Python's, of b's sign; the DSL's % is of a's."""
        literal, (a, b) = b, self.pair(a, b)
        if isinstance(literal, int) and literal > 0 and literal & (literal - 1) == 0:
            return a & (literal - 1)
        return a - (a // b) * b

    def where(self, c: Any, a: Any, b: Any) -> Any:
        a, b = self.pair(a, b)
        return type(a)(arith.select(self.number(c).ir_value(), a.ir_value(), b.ir_value()))

    def compare(self, name: str, a: Any, b: Any) -> Boolean:
        if pair := self.indices(a, b):
            d = self.sub(*pair)  # its base, which a row's columns share, against a literal
            return getattr(operator, name)(d.base, -d.offset)
        a, b = self.pair(a, b)
        return getattr(operator, name)(a, b)

    def abs(self, a: Any) -> Any:
        if isinstance(a, Index):
            return Index(self.abs(a.integer()), self.abs(a.to_float()))
        a = self.number(a)
        return cutlass.max(a, a * -1) if isinstance(a, Int32) else cute.arch.fmax(a, -a)

    def minimum(self, a: Any, b: Any) -> Any:
        a, b = self.pair(a, b)
        return cute.arch.fmin(a, b) if isinstance(a, Float32) else cutlass.min(a, b)

    def maximum(self, a: Any, b: Any) -> Any:
        a, b = self.pair(a, b)
        return cute.arch.fmax(a, b) if isinstance(a, Float32) else cutlass.max(a, b)

    def exp2(self, a: Float32) -> Float32:
        return cute.math.exp2(a, fastmath=True)

    def exp(self, a: Any) -> Float32:
        return self.exp2(self.floating(a) * LOG2_E)

    def log(self, a: Any) -> Float32:
        return cute.math.log2(self.floating(a), fastmath=True) * (1 / LOG2_E)

    def sqrt(self, a: Any) -> Float32:
        return cute.math.sqrt(self.floating(a), fastmath=True)

    def tanh(self, a: Any) -> Float32:
        """To float32's precision near 1, where tanh.approx has 11 bits: 1 - 2 / (e^2x + 1)."""
        x = self.mul(a, 2 * LOG2_E)
        return 1.0 - 2.0 * cute.arch.rcp_approx(self.exp2(self.floating(x)) + 1.0)

    def sigmoid(self, a: Any) -> Float32:
        return cute.arch.rcp_approx(1.0 + self.exp2(self.floating(self.mul(a, -LOG2_E))))

    def load(self, tensor: cute.Tensor, index: list[Any]) -> Any:
        """An index out of range becomes the last one: unsigned, a negative one is large."""
        ends = zip(index, tensor.shape, strict=False)
        index = [smaller_unsigned(Int32(self.number(i)), Int32(n - 1)) for i, n in ends]
        x = tensor[tuple(index) or 0]  # 0: of a tensor without dimensions
        if tensor.element_type is cutlass.Uint8:
            return x != 0
        return x.to(Float32 if tensor.element_type.is_float else Int32)

    def cast(self, a: Any, kind: str) -> Any:
        if kind == "float":
            return self.floating(a)
        return self.number(a).to(Int32) if kind == "int" else self.number(a) != 0


def smaller_unsigned(a: Int32, b: Int32) -> Int32:
    return Int32(arith.minui(a.ir_value(), b.ir_value()))


KERNEL_OPS = KernelOps()
