"""The numbers that a score function computes with, and what it may do to them.

A `Number` carries its derivative with respect to the score, by the rules of calculus: no user writes one.
What it holds is up to its `ops`: tensors, a kernel's registers, or no more than their kinds (Kinds), by which
a function is checked before anything runs.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import torch

NOT_KNOWN = "what a number is, also a captured one, is not known when the kernel is compiled"
NOT_METHODS = ("where",)  # a tensor's has its arguments in another order
# What the functions of PyTorch and the methods of its tensors do, by name; filled by `elementary`.
FUNCTIONS: dict[str, Callable[..., Any]] = {}
CASTS = {"float": torch.float32, "int": torch.int32, "long": torch.int64, "bool": torch.bool}
KINDS_OF_CASTS = {dtype: "int" if name == "long" else name for name, dtype in CASTS.items()}


class CannotTrace(TypeError):
    """The function does what cannot be compiled into a kernel."""


class Number:
    """x, a number of `ops` or one of Python's, and dx, its derivative with respect to the score.

    dx is None where it is 0. Where it is one of Python's numbers it costs nothing.
    """

    def __init__(self, ops: Any, x: Any, dx: Any = None) -> None:
        self.ops, self.x, self.dx = ops, x, dx

    def __bool__(self) -> bool:
        raise CannotTrace(
            f"{NOT_KNOWN}: write torch.where(condition, a, b) for `if`, & | ~ for `and or not`, "
            "(a < b) & (b < c) for a < b < c, torch.minimum and torch.maximum for min and max"
        )

    def __index__(self) -> int:
        raise CannotTrace(
            f"{NOT_KNOWN}: write torch's functions for math's, x.float(), x.int() for float(x), int(x), "
            "a captured tensor for a list that it is to index, a literal for the end of a range"
        )

    __float__ = __int__ = __index__

    def __iter__(self) -> Any:
        raise CannotTrace("a number has no elements")

    def __getattr__(self, name: str) -> Callable[..., Any]:
        if name in CASTS:
            return lambda: self.to(CASTS[name])
        if name in FUNCTIONS and name not in NOT_METHODS:
            return functools.partial(FUNCTIONS[name], self)
        raise CannotTrace(f"a number in a kernel has no '{name}', but {known()}")

    def __setitem__(self, *_: Any) -> None:
        raise CannotTrace("nothing can be assigned to")

    __hash__ = None  # type: ignore[assignment]

    @classmethod
    def __torch_function__(
        cls, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        return getattr(Torch("torch"), function.__name__)(*args, **(kwargs or {}))

    def to(self, dtype: torch.dtype) -> "Number":
        if dtype not in KINDS_OF_CASTS:
            raise CannotTrace(
                f"a number in a kernel cannot become {dtype}: write .float(), .int() or .bool()"
            )
        kind = KINDS_OF_CASTS[dtype]
        return Number(self.ops, self.ops.cast(self.x, kind), self.dx if kind == "float" else None)

    type = to


class Table:
    """A captured tensor: it gives a number for one integer for each dimension.

    An index out of range reads the last element: functions are also asked about keys beyond a sequence's end.
    """

    def __init__(self, ops: Any, tensor: Any, ndim: int) -> None:
        self.ops, self.tensor, self.ndim = ops, tensor, ndim

    def __getitem__(self, index: Any) -> Number:
        index = index if isinstance(index, tuple) else (index,)
        if len(index) != self.ndim:
            raise CannotTrace(
                f"a captured tensor of {self.ndim} dimensions takes as many, as in x[i, j], not {len(index)}"
            )
        for i in index:
            if not isinstance(i, Number | int):
                raise CannotTrace(f"a captured tensor takes numbers as indices, no {type(i).__name__}")
            if self.ops.kind(i.x if isinstance(i, Number) else i) != "int":
                raise CannotTrace("a captured tensor takes integers as indices: write .int()")
            if isinstance(i, int) and i < 0:
                raise CannotTrace("an index of a captured tensor counts from its start: it is not negative")
        return Number(
            self.ops, self.ops.load(self.tensor, [i.x if isinstance(i, Number) else i for i in index])
        )

    def __getattr__(self, name: str) -> Any:
        raise CannotTrace(f"a captured tensor can only be indexed in a kernel, it has no '{name}'")

    @classmethod
    def __torch_function__(cls, function: Any, *_: Any) -> Any:
        raise CannotTrace(
            f"a captured tensor can only be indexed in a kernel: no torch.{function.__name__} of it"
        )


class Torch:
    """PyTorch as a function sees it: what kernels can do, dtypes, numbers."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __getattr__(self, name: str) -> Any:
        if name in FUNCTIONS:
            return FUNCTIONS[name]
        found = getattr(torch, name, None)
        if isinstance(found, torch.dtype | float):
            return found
        raise CannotTrace(f"{self._name}.{name} is not known to kernels, but {known()}")


def known() -> str:
    return ", ".join(name for name in FUNCTIONS if not name.startswith("_"))


# Derivatives: None is 0, and Python's numbers are folded


def plus(ops: Any, a: Any, b: Any) -> Any:
    return b if a is None else a if b is None else ops.add(a, b)


def times(ops: Any, a: Any, b: Any) -> Any:
    if a is None or b is None:
        return None
    return b if is_one(a) else a if is_one(b) else ops.mul(a, b)


def is_int32(a: float) -> bool:
    return -(2**31) <= a < 2**31


def is_one(a: Any) -> bool:
    return isinstance(a, int | float) and a == 1


def minus(ops: Any, a: Any) -> Any:
    return None if a is None else -a if isinstance(a, int | float) else ops.mul(a, -1.0)


def select(ops: Any, c: Any, a: Any, b: Any) -> Any:
    if a is None and b is None or is_one(a) and is_one(b):
        return a
    return ops.where(c, 0.0 if a is None else a, 0.0 if b is None else b)


def elementary(*names: str) -> Callable[..., Any]:
    """f(ops, *(x, dx)) -> (x, dx) as a function of Numbers, of Python's numbers, or both."""

    def lift(f: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(f)
        def function(*args: Any, **named: Any) -> Any:
            for a in args:
                if not isinstance(a, Number | int | float):
                    needs = ": a captured tensor needs indices" if isinstance(a, Table) else ""
                    raise CannotTrace(f"{names[0].strip('_')} of a {type(a).__name__}{needs}")
                if isinstance(a, int) and not is_int32(a):
                    raise CannotTrace(f"{a} is no 32-bit integer")
            if named:
                raise CannotTrace(f"{names[0].strip('_')} takes no '{next(iter(named))}' in a kernel")
            ops = next((a.ops for a in args if isinstance(a, Number)), None)
            if ops is None:
                raise CannotTrace(f"{names[0].strip('_')} of literals: write its result")
            if isinstance(ops, Kinds):
                ops.work += 5 if names[0] in ("floor_divide", "remainder") else 1
            return Number(ops, *f(ops, *((a.x, a.dx) if isinstance(a, Number) else (a, None) for a in args)))

        FUNCTIONS.update(dict.fromkeys(names, function))
        return function

    return lift


@elementary("add")
def add(ops: Any, a: Any, b: Any) -> Any:
    return ops.add(a[0], b[0]), plus(ops, a[1], b[1])


@elementary("sub", "subtract")
def sub(ops: Any, a: Any, b: Any) -> Any:
    return ops.sub(a[0], b[0]), plus(ops, a[1], minus(ops, b[1]))


@elementary("mul", "multiply")
def mul(ops: Any, a: Any, b: Any) -> Any:
    return ops.mul(a[0], b[0]), plus(ops, times(ops, a[1], b[0]), times(ops, b[1], a[0]))


@elementary("div", "divide", "true_divide")
def div(ops: Any, a: Any, b: Any) -> Any:
    _not_by_zero(ops, b)
    inverse = ops.rcp(b[0])
    x = ops.mul(a[0], inverse)
    return x, times(ops, plus(ops, a[1], minus(ops, times(ops, b[1], x))), inverse)


@elementary("neg", "negative")
def neg(ops: Any, a: Any) -> Any:
    return ops.mul(a[0], -1), minus(ops, a[1])


@elementary("abs", "absolute")
def absolute(ops: Any, a: Any) -> Any:
    _no_conditions(ops, "abs", a)
    d = None if a[1] is None else ops.where(ops.compare("lt", a[0], 0), minus(ops, a[1]), a[1])
    return ops.abs(a[0]), d


@elementary("where")
def where(ops: Any, c: Any, a: Any, b: Any) -> Any:
    x = ops.where(c[0], a[0], b[0])
    # A score of -inf has the probability 0: what its derivative is does not matter.
    if _is_hidden(b[0]) and is_one(a[1]):
        return x, a[1]
    if _is_hidden(a[0]) and is_one(b[1]):
        return x, b[1]
    return x, select(ops, c[0], a[1], b[1])


def _is_hidden(x: Any) -> bool:
    return isinstance(x, float) and x == -math.inf


@elementary("minimum", "fmin")
def minimum(ops: Any, a: Any, b: Any) -> Any:
    _no_conditions(ops, "minimum", a, b)
    d = a[1] if a[1] is b[1] is None else select(ops, ops.compare("lt", a[0], b[0]), a[1], b[1])
    return ops.minimum(a[0], b[0]), d


@elementary("maximum", "fmax")
def maximum(ops: Any, a: Any, b: Any) -> Any:
    _no_conditions(ops, "maximum", a, b)
    d = a[1] if a[1] is b[1] is None else select(ops, ops.compare("gt", a[0], b[0]), a[1], b[1])
    return ops.maximum(a[0], b[0]), d


@elementary("exp")
def exp(ops: Any, a: Any) -> Any:
    x = ops.exp(a[0])
    return x, times(ops, a[1], x)


@elementary("log")
def log(ops: Any, a: Any) -> Any:
    return ops.log(a[0]), None if a[1] is None else times(ops, a[1], ops.rcp(a[0]))


@elementary("sqrt")
def sqrt(ops: Any, a: Any) -> Any:
    x = ops.sqrt(a[0])
    return x, None if a[1] is None else times(ops, a[1], ops.mul(ops.rcp(x), 0.5))


@elementary("tanh")
def tanh(ops: Any, a: Any) -> Any:
    x = ops.tanh(a[0])
    return x, None if a[1] is None else times(ops, a[1], ops.sub(1.0, ops.mul(x, x)))


@elementary("sigmoid")
def sigmoid(ops: Any, a: Any) -> Any:
    x = ops.sigmoid(a[0])
    return x, None if a[1] is None else times(ops, a[1], ops.mul(x, ops.sub(1.0, x)))


@elementary("floor_divide")
def floor_divide(ops: Any, a: Any, b: Any) -> Any:
    _only_integers(ops, "//", a, b)
    return ops.floordiv(a[0], b[0]), None


@elementary("remainder")
def remainder(ops: Any, a: Any, b: Any) -> Any:
    _only_integers(ops, "%", a, b)
    return ops.mod(a[0], b[0]), None


def _only_integers(ops: Any, sign: str, a: Any, b: Any) -> None:
    if "float" in (ops.kind(a[0]), ops.kind(b[0])):
        raise CannotTrace(f"{sign} takes integers, such as q_idx and kv_idx")
    _not_by_zero(ops, b)


def _not_by_zero(ops: Any, b: Any) -> None:
    if isinstance(ops, Kinds) and isinstance(b[0], int | float) and b[0] == 0:
        raise CannotTrace("this divides by zero")


def _no_conditions(ops: Any, name: str, *args: Any) -> None:
    if "bool" in (ops.kind(a[0]) for a in args):
        raise CannotTrace(f"{name} takes numbers; of conditions, & is the smaller one, | the larger one")


def clamp(a: Any, min: Any = None, max: Any = None) -> Any:  # noqa: A002, torch's names
    a = a if min is None else maximum(a, min)
    return a if max is None else minimum(a, max)


FUNCTIONS |= {"clamp": clamp, "clip": clamp}


def _condition(name: str, *names: str) -> Callable[..., Any]:
    """A comparison, or a logical function: what it is of a score has no derivative."""

    def condition(ops: Any, a: Any, b: Any) -> Any:
        return ops.compare(name, a[0], b[0]), None

    return elementary(name, *names)(condition)


def logical_not(a: Any) -> Any:
    return FUNCTIONS["__xor__"](a, True)


def power(a: Any, n: int) -> Any:
    if not isinstance(n, int) or not 1 <= n <= 8:
        raise CannotTrace("a power must be a literal from 1 to 8; or write torch.sqrt, torch.exp")
    return functools.reduce(mul, [a] * n)


def _operators() -> None:
    logical = {"and": ("logical_and",), "or": ("logical_or",), "xor": ("logical_xor",)}
    pairs = {"add": add, "sub": sub, "mul": mul, "truediv": div, "floordiv": floor_divide, "mod": remainder}
    pairs |= {name: _condition(f"__{name}__", f"bitwise_{name}", *names) for name, names in logical.items()}
    for name, f in pairs.items():
        setattr(Number, f"__{name}__", lambda a, b, f=f: f(a, b))
        setattr(Number, f"__r{name}__", lambda a, b, f=f: f(b, a))
    orders = {"lt": ("less",), "le": ("less_equal",), "gt": ("greater",), "ge": ("greater_equal",)}
    for name, names in (orders | {"eq": (), "ne": ()}).items():
        condition = _condition(name, *names)
        setattr(Number, f"__{name}__", lambda a, b, f=condition: f(a, b))
    others = {"neg": neg, "abs": absolute, "pow": power, "pos": lambda a: a, "invert": logical_not}
    for name, f in others.items():
        setattr(Number, f"__{name}__", f)
    FUNCTIONS.update({"logical_not": logical_not, "bitwise_not": logical_not})
    FUNCTIONS.update({"square": lambda a: mul(a, a), "pow": power})


_operators()


class Uniform(str):
    """The kind of a number that all scores of a tile share."""


class Constant(str):
    """The kind of a captured number, which all scores share."""


class Kinds:
    """Numbers of which only the kind is known: "bool", "int" or "float". Python's stay as they are."""

    ORDER = "bool", "int", "float"

    def __init__(self) -> None:
        self.work = 0  # operations, and ten for each read of a tensor that tells scores of a tile apart

    def kind(self, a: Any) -> str:
        return a if isinstance(a, str) else type(a).__name__

    def _wider(self, a: Any, b: Any) -> str:
        return self.ORDER[max(self.ORDER.index(self.kind(a)), self.ORDER.index(self.kind(b)), 1)]

    add = sub = mul = minimum = maximum = _wider

    def floordiv(self, a: Any, b: Any) -> str:
        return "int"

    mod = floordiv

    def rcp(self, a: Any) -> str:
        return "float"

    exp = log = sqrt = tanh = sigmoid = rcp

    def abs(self, a: Any) -> str:
        return self._wider(a, a)

    def where(self, c: Any, a: Any, b: Any) -> str:
        if self.kind(c) != "bool":
            raise CannotTrace("the first argument of torch.where must be a condition")
        return "bool" if self.kind(a) == self.kind(b) == "bool" else self._wider(a, b)

    def compare(self, name: str, a: Any, b: Any) -> str:
        if name.startswith("__") and not self.kind(a) == self.kind(b) == "bool":
            raise CannotTrace(f"{name.strip('_')} takes conditions, such as q_idx >= kv_idx")
        return "bool"

    def load(self, table: str, index: Any) -> str:
        self.work += 10 * any(type(i) is str for i in index)
        return table

    def cast(self, a: Any, kind: str) -> str:
        return kind
