"""A Python function of a score, taken apart: its structure, and the numbers and tensors that it captures.

A kernel is compiled for the structure alone: two functions that differ in their names, or in what they
capture, share it. It is found in the bytecode, so functions without a source work too; nothing of it is
executed when a kernel is loaded from disk.
"""

import builtins
import dis
import functools
import hashlib
import inspect
import linecache
import math
import numbers
import sys
import traceback
import types
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mini_flash_attention.scores.numbers import CannotTrace, Constant, Kinds, Number, Table, Uniform

OUTSIDE = ("STORE_GLOBAL", "DELETE_GLOBAL", "STORE_DEREF", "IMPORT_NAME")
KINDS_OF_DTYPES = {
    torch.float32: "float",
    torch.float16: "float",
    torch.bfloat16: "float",
    torch.int32: "int",
    torch.int64: "int",
    torch.bool: "bool",
}
Build = Callable[[Sequence[Any]], Any]  # from captured values, in order, to what was captured


class Place(NamedTuple):
    """Which score it is, in integers of `ops`; sequences count from 0."""

    batch: Any
    head: Any  # query head
    q_idx: Any
    kv_idx: Any
    seqlen_q: Any
    seqlen_k: Any


class Function:
    """A function of a score and its place, without what it captures: what a kernel is compiled for.

    Equal if the structures are; the repr, which is part of the names of kernels and of entries of the cache,
    tells them apart in every process alike.
    """

    def __init__(self, role: str, key: tuple, kinds: tuple[str, ...], build: Build) -> None:
        """role: "score_mod" or "mask_mod", or the name of one of ours. kinds: of the captured values."""
        self.role, self.key, self.kinds, self.build = role, key, kinds, build
        self.digest = hashlib.sha256(repr((role, key, kinds)).encode()).hexdigest()[:32]
        ops = Kinds()
        score, shared = Number(ops, "float", 1.0), Uniform("int")
        result = self.apply(ops, kinds, score, Place(shared, shared, "int", "int", shared, shared))
        self.work = ops.work
        # Whether the derivative differs from score to score: else it is a number, or None is 0.
        self.factored = not isinstance(result.dx, int | float | Constant)
        self.is_identity = result is score

    def __repr__(self) -> str:
        return self.role if self.role in BUILT_IN else f"{self.role}_{self.digest}"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Function) and self.digest == other.digest

    def __hash__(self) -> int:
        return hash(self.digest)

    @property
    def hides(self) -> bool:
        """Whether scores may become -inf."""
        return self.role in ("score_mod", "mask_mod")

    def apply(self, ops: Any, values: Sequence[Any], score: Number, place: Place) -> Number:
        """The score that it makes of `score`. values: those captured, as numbers and tensors of `ops`."""
        function = self.build([self._wrapped(ops, *pair) for pair in zip(self.kinds, values, strict=True)])
        if self.role in BUILT_IN:
            return function(score, Place(*(Number(ops, x) for x in place)))
        where = [Number(ops, x) for x in place[:4]]
        try:
            if self.role == "score_mod":
                return self._number(ops, function(score, *where), score)
            seen = self._number(ops, function(*where), score)
            if ops.kind(seen.x) != "bool":
                raise CannotTrace("it must return a condition, such as q_idx >= kv_idx")
            return torch.where(seen, score, -math.inf)
        except CannotTrace as error:
            raise CannotTrace(f"{self.role}: {error}{_line(error)}") from None

    def _wrapped(self, ops: Any, kind: str, value: Any) -> Any:
        name, _, ndim = kind.partition(" ")
        if not ndim:
            return Number(ops, Constant(kind) if isinstance(ops, Kinds) else value)
        table = Table(ops, name.partition(":")[0] if isinstance(ops, Kinds) else value, int(ndim))
        return table if table.ndim else table[()]

    def _number(self, ops: Any, result: Any, score: Number) -> Number:
        if isinstance(result, Number):
            return result
        if isinstance(result, bool | int | float):
            return Number(ops, result)
        raise CannotTrace(f"it must return a number, not {type(result).__name__}")


def _line(error: CannotTrace) -> str:
    """Where in the user's code it happened."""
    ours = str(Path(__file__).parent)
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        if not frame.filename.startswith(ours):
            line = linecache.getline(frame.filename, frame.lineno).strip()
            return f"\n  {frame.filename}, line {frame.lineno}: {line}" if line else ""
    return ""


class Scoring(tuple):
    """All that becomes of a score before the softmax: Functions, one after the other."""

    def apply(
        self, ops: Any, values: Sequence[Any], score: Number, place: Place, masked: bool = True
    ) -> Number:
        """values: those that the functions capture, one's after the other's. masked: mask_mods too."""
        first = 0
        for function in self:
            end = first + len(function.kinds)
            if masked or function.role != "mask_mod":
                score = function.apply(ops, values[first:end], score, place)
            first = end
        return score

    @property
    def masked(self) -> bool:
        """Whether there is a mask among the functions."""
        return any(function.role == "mask_mod" for function in self)

    @property
    def without_masks(self) -> "Scoring":
        return Scoring(function for function in self if function.role != "mask_mod")

    @property
    def kinds(self) -> tuple[str, ...]:
        return tuple(kind for function in self for kind in function.kinds)

    @property
    def factored(self) -> bool:
        """Whether the derivative differs from score to score."""
        return any(function.factored for function in self)

    @property
    def hides(self) -> bool:
        """Whether scores may become -inf."""
        return any(function.hides for function in self)

    @property
    def heavy(self) -> bool:
        """Whether they take many registers: tensors are read for each score, or much is computed."""
        return sum(function.work for function in self) > 10

    def __repr__(self) -> str:
        return "_".join(map(repr, self)) or "plain"


PLAIN = Scoring()


# Our own functions


def _softcap(score: Number, place: Place, cap: Number) -> Number:
    """cap · tanh(score / cap): Gemma 2, arXiv 2408.00118."""
    return cap * torch.tanh(score * (1.0 / cap))


def _alibi(score: Number, place: Place, slopes: Table) -> Number:
    """score - slope · (distance from the diagonal): Press et al. 2022, arXiv 2108.12409."""
    distance = place.q_idx - place.kv_idx + (place.seqlen_k - place.seqlen_q)
    return score - slopes[place.batch, place.head] * abs(distance)


BUILT_IN = {"softcap": (_softcap, ("float",)), "alibi": (_alibi, ("float:float32 2",))}


@functools.cache
def built_in(name: str) -> Function:
    """ "softcap", which captures the cap, or "alibi", whose slopes are (batch, heads) float32."""
    function, kinds = BUILT_IN[name]
    return Function(name, (), kinds, lambda values: functools.partial(function, **_named(function, values)))


def _named(function: Callable[..., Any], values: Sequence[Any]) -> dict[str, Any]:
    return dict(zip(list(inspect.signature(function).parameters)[2:], values, strict=True))


# A user's


def capture(role: str, function: Callable[..., Any]) -> tuple[Function, tuple[Any, ...]]:
    """The structure of `function`, and the numbers and tensors that it captures now.

    Args:
        role: "score_mod" or "mask_mod".

    Raises:
        CannotTrace: a TypeError that says what to write instead.
    """
    values: list[Any] = []
    try:
        if not callable(function):
            raise CannotTrace(f"it must be a function, not {type(function).__name__}")
        key, build = _walk(function, getattr(function, "__qualname__", repr(function)), values, ())
    except CannotTrace as error:
        raise CannotTrace(f"{role}: {error}") from None
    return _function(role, key, tuple(map(_kind, values)), _Once(build)), tuple(values)


class _Once:
    """A build that is no part of the key of _function's memory: functions of one key build alike."""

    def __init__(self, build: Build) -> None:
        self.build = build

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Once)

    def __hash__(self) -> int:
        return 0


@functools.lru_cache(maxsize=1024)
def _function(role: str, key: tuple, kinds: tuple[str, ...], once: _Once) -> Function:
    return Function(role, (sys.version_info[:2], key), kinds, once.build)


def _kind(x: Any) -> str:
    if isinstance(x, Tensor):
        dtype = str(x.dtype).removeprefix("torch.")
        return f"{KINDS_OF_DTYPES[x.dtype]}:{dtype} {x.ndim}"
    return type(x).__name__


def _walk(x: Any, path: str, values: list[Any], parents: tuple) -> tuple[tuple, Build]:
    """The structure of x, and what makes it again of other values; its values are appended."""
    if hasattr(x, "dtype") and not isinstance(x, Tensor) and getattr(x, "ndim", None) == 0:
        x = x.item()  # NumPy's numbers
    if x is None or isinstance(x, bool | str | torch.dtype):
        return ("static", repr(x)), lambda _: x
    if isinstance(x, numbers.Real):
        x = int(x) if isinstance(x, numbers.Integral) else float(x)
        if isinstance(x, int) and not -(2**31) <= x < 2**31:
            raise CannotTrace(f"{path} is {x}, which is no 32-bit integer")
        if isinstance(x, float) and not math.isfinite(x):
            return ("static", repr(x)), lambda _: x
        return _slot(x, values)
    if isinstance(x, Tensor):
        if x.dtype not in KINDS_OF_DTYPES:
            names = ", ".join(str(dtype).removeprefix("torch.") for dtype in KINDS_OF_DTYPES)
            raise CannotTrace(f"{path} is a tensor of {x.dtype}; captured tensors may be {names}")
        return _slot(x, values)
    if isinstance(x, tuple | list):
        keys, builds = _all(((f"{path}[{i}]", item) for i, item in enumerate(x)), values, parents)
        return ("tuple", *keys), lambda new: tuple(build(new) for build in builds)
    if isinstance(x, types.ModuleType):
        return ("module", x.__name__), lambda _: x
    if isinstance(x, functools.partial):
        return _walk_partial(x, path, values, parents)
    if isinstance(x, types.BuiltinFunctionType | type):
        return ("builtin", x.__module__, x.__name__), lambda _: x
    if not isinstance(x, types.FunctionType):
        kind = f"{type(x).__module__}.{type(x).__qualname__}"
        raise CannotTrace(f"{path} is a {kind}: put the numbers and tensors it needs into variables")
    if x in parents:
        raise CannotTrace(f"{path} calls itself")
    return _walk_function(x, path, values, (*parents, x))


def _slot(x: Any, values: list[Any]) -> tuple[tuple, Build]:
    place = len(values)
    values.append(x)
    return ("value", _kind(x)), lambda new: new[place]


def _all(items: Iterable[tuple[str, Any]], values: list[Any], parents: tuple) -> tuple[tuple, tuple]:
    walked = [_walk(x, path, values, parents) for path, x in items]
    return tuple(key for key, _ in walked), tuple(build for _, build in walked)


def _walk_partial(x: functools.partial, path: str, values: list[Any], parents: tuple) -> tuple[tuple, Build]:
    names = tuple(x.keywords)
    parts = ("func", x.func), ("args", x.args), ("keywords", tuple(x.keywords.values()))
    keys, builds = _all(((f"{path}.{name}", part) for name, part in parts), values, parents)

    def build(new: Sequence[Any]) -> functools.partial:
        function, args, given = (part(new) for part in builds)
        return functools.partial(function, *args, **dict(zip(names, given, strict=True)))

    return ("partial", names, *keys), build


def _walk_function(
    f: types.FunctionType, path: str, values: list[Any], parents: tuple
) -> tuple[tuple, Build]:
    code = f.__code__
    try:
        closure = zip(code.co_freevars, f.__closure__ or (), strict=True)
        cells = [(f"{name} of {path}", cell.cell_contents) for name, cell in closure]
    except ValueError:
        raise CannotTrace(f"{path} uses a variable before it has a value") from None
    names = [n for n in _globals(code) if n in f.__globals__ or not hasattr(builtins, n)]
    for n in names:
        if n not in f.__globals__:
            raise CannotTrace(f"{path}: name '{n}' is not defined")
    name, keywords = f.__name__, tuple(f.__kwdefaults__ or ())  # `build` must not keep what f captures
    parts = (
        cells,
        [(f"{name} of {path}", f.__globals__[name]) for name in names],
        [(f"a default of {path}", x) for x in f.__defaults__ or ()],
        [(f"{keyword} of {path}", f.__kwdefaults__[keyword]) for keyword in keywords],
    )
    keys, builds = zip(*(_all(part, values, parents) for part in parts), strict=True)

    def build(new: Sequence[Any]) -> types.FunctionType:
        cells, taken, defaults, given = ([b(new) for b in part] for part in builds)
        scope = {"__builtins__": builtins, **dict(zip(names, taken, strict=True))}
        closure = tuple(types.CellType(x) for x in cells)
        made = types.FunctionType(code, scope, name, tuple(defaults), closure)
        made.__kwdefaults__ = dict(zip(keywords, given, strict=True))
        return made

    return ("function", _structure(code, frozenset(names)), keywords, *keys), build


@functools.lru_cache(maxsize=1024)
def _globals(code: types.CodeType) -> tuple[str, ...]:
    """The names of a function that are not its own."""
    found: dict[str, None] = {}
    for i in dis.get_instructions(code):
        if i.opname in OUTSIDE and i.argval not in code.co_cellvars:
            raise CannotTrace(f"{code.co_name} imports or assigns '{i.argval}', which lies outside of it")
        if i.opname == "LOAD_GLOBAL":
            found[i.argval] = None
        if isinstance(i.argval, types.CodeType):
            found.update(dict.fromkeys(_globals(i.argval)))
    return tuple(found)


@functools.lru_cache(maxsize=1024)
def _structure(code: types.CodeType, captured: frozenset[str]) -> tuple:
    """The bytecode with its constants; names count where they are attributes' or builtins'."""
    loads = list(dis.get_instructions(code))
    attributes = {i.argval for i in loads if i.opcode in dis.hasname and i.opname != "LOAD_GLOBAL"}
    names = tuple(n if n in attributes or n not in captured else "" for n in code.co_names)
    consts = [
        _structure(x, captured) if isinstance(x, types.CodeType) else (type(x).__name__, repr(x))
        for x in code.co_consts
    ]
    counts = code.co_argcount, code.co_posonlyargcount, code.co_kwonlyargcount
    more = code.co_flags & ~inspect.CO_NESTED, getattr(code, "co_exceptiontable", b"")
    return code.co_code, tuple(consts), names, counts, more
