"""A Python function of a score, taken apart: its structure, and the numbers and tensors that it captures.

A kernel is compiled for the structure alone: two functions that differ in their names, or in what they
capture, share it. It is found in the bytecode, so functions without a source work too; nothing of it is
executed when a kernel is loaded from disk.
"""

import builtins
import dis
import functools
import hashlib
import importlib
import inspect
import linecache
import math
import numbers
import operator
import pickle
import sys
import traceback
import types
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mini_flash_attention.scores.numbers import (
    CannotTrace,
    Constant,
    Kinds,
    Number,
    Table,
    Torch,
    Uniform,
    is_int32,
)

# What a function must not do: what happens outside of it happens once, when a kernel is compiled.
OUTSIDE = {
    "STORE_GLOBAL": "assigns '{}', which lies outside of it",
    "DELETE_GLOBAL": "deletes '{}', which lies outside of it",
    "STORE_DEREF": "assigns '{}', which lies outside of it",
    "STORE_ATTR": "assigns the attribute '{}'",
    "DELETE_ATTR": "deletes the attribute '{}'",
    "IMPORT_NAME": "imports '{}': do so outside of it",
    "LOAD_BUILD_CLASS": "defines a class: do so outside of it",
}
# Of Python's own functions those whose results depend on their arguments alone, and are the same for a number
# in a kernel as for a tensor.
BUILTINS = {
    name: getattr(builtins, name)
    for name in (
        *("abs", "all", "any", "bool", "dict", "divmod", "enumerate", "float", "int", "len", "list", "map"),
        *("max", "min", "pow", "range", "reversed", "round", "sorted", "sum", "tuple", "zip"),
    )
}
MODULES = {
    "torch": Torch("torch"),
    "torch.nn.functional": Torch("torch.nn.functional"),
    "math": math,
    "operator": operator,
}
KINDS_OF_DTYPES = {
    torch.float32: "float",
    torch.float16: "float",
    torch.bfloat16: "float",
    torch.int32: "int",
    torch.int64: "int",
    torch.bool: "bool",
}
Build = Callable[[Sequence[Any]], Any]  # from captured values, in order, to what was captured
Read = Callable[[Any, list[Any]], bool]  # whether another has the same structure; its values are appended


class Part(NamedTuple):
    """A captured thing without its values."""

    key: tuple
    build: Build
    read: Read


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
        self.found_at: tuple[str, str] | None = None  # module and name, if it can be imported
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

    def __reduce__(self) -> tuple:
        if self.role in BUILT_IN:
            return built_in, (self.role,)
        if self.found_at is None:
            raise pickle.PicklingError(
                f"{self.role}: define it at a module's level: another process is to import it"
            )
        return _imported, (self.role, *self.found_at, self.digest)

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
                return self._result(ops, function(score, *where))
            return torch.where(self._result(ops, function(*where)), score, -math.inf)
        except Exception as error:
            if not isinstance(ops, Kinds):  # it has passed that test
                raise
            kind = "" if isinstance(error, CannotTrace) else f"{type(error).__name__}: "
            raise CannotTrace(f"{self.role}: {kind}{error}{_line(error, function)}") from error

    def _wrapped(self, ops: Any, kind: str, value: Any) -> Any:
        name, _, ndim = kind.partition(" ")
        if not ndim:
            return Number(ops, Constant(kind) if isinstance(ops, Kinds) else value)
        table = Table(ops, name.partition(":")[0] if isinstance(ops, Kinds) else value, int(ndim))
        return table if table.ndim else table[()]

    def _result(self, ops: Any, result: Any) -> Number:
        if isinstance(result, bool | int | float):
            result = Number(ops, result)
        if not isinstance(result, Number):
            raise CannotTrace(f"it must return a number, not {type(result).__name__}")
        condition = ops.kind(result.x) == "bool"
        if condition and self.role == "score_mod":
            raise CannotTrace("it must return a score, no condition, which is for mask_mod")
        if not condition and self.role == "mask_mod":
            raise CannotTrace("it must return a condition, such as q_idx >= kv_idx")
        return result


def _line(error: Exception, function: Callable[..., Any]) -> str:
    """Where in the user's code it happened, or where that starts."""
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        if not frame.filename.startswith(NOT_THE_USERS):
            return _shown(frame.filename, frame.lineno)
    return _start(function)


def _start(function: Callable[..., Any]) -> str:
    code = getattr(function, "__code__", None)
    return "" if code is None else _shown(code.co_filename, code.co_firstlineno)


def _shown(file: str, number: int) -> str:
    line = linecache.getline(file, number).strip()
    return f"\n  {file}, line {number}: {line}" if line else f"\n  {file}, line {number}"


NOT_THE_USERS = str(Path(__file__).parent), str(Path(torch.__file__).parent)


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
    code = getattr(function, "__code__", None)
    recent = _recent.get((role, id(code)))
    if recent is not None and recent.read(function, values):
        return recent.function, tuple(values)
    values.clear()
    try:
        if not callable(function):
            raise CannotTrace(f"it must be a function, not {type(function).__name__}")
        key, build, read = _walk(function, getattr(function, "__name__", "it"), values, ())
    except CannotTrace as error:
        raise CannotTrace(f"{role}: {error}{_start(function)}") from None
    found = _function(role, key, tuple(map(_kind, values)), _Once(build))
    found.found_at = found.found_at or _module_and_name(function)
    if len(_recent) >= 1024:
        _recent.clear()
    _recent[role, id(code)] = Recent(code, read, found)
    return found, tuple(values)


class Recent(NamedTuple):
    """What was last found in a code object, which it keeps alive: its id is no other's."""

    code: types.CodeType | None
    read: Read
    function: Function


_recent: dict[tuple[str, int], Recent] = {}


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


def _module_and_name(function: Callable[..., Any]) -> tuple[str, str] | None:
    """Where another process finds it."""
    module, name = getattr(function, "__module__", None), getattr(function, "__qualname__", "")
    return (module, name) if getattr(sys.modules.get(module), name, None) is function else None


def _imported(role: str, module: str, name: str, digest: str) -> Function:
    function, _ = capture(role, getattr(importlib.import_module(module), name))
    if function.digest != digest:
        raise pickle.UnpicklingError(f"{role}: {module}.{name} is another function here, or captures others")
    return function


def _kind(x: Any) -> str:
    if isinstance(x, Tensor):
        dtype = str(x.dtype).removeprefix("torch.")
        return f"{KINDS_OF_DTYPES[x.dtype]}:{dtype} {x.ndim}"
    return type(x).__name__


def _walk(x: Any, path: str, values: list[Any], parents: tuple) -> Part:
    """The structure of x; its values are appended. path: what to call x in errors."""
    if hasattr(x, "dtype") and not isinstance(x, Tensor) and getattr(x, "ndim", None) == 0:
        x = x.item()  # NumPy's numbers
    if x is None or isinstance(x, bool | str):
        return _static(("static", repr(x)), x)
    if isinstance(x, numbers.Real):
        return _walk_number(int(x) if isinstance(x, numbers.Integral) else float(x), path, values)
    if isinstance(x, Tensor):
        return _walk_tensor(x, path, values)
    if isinstance(x, tuple | list):
        return _walk_tuple(x, path, values, parents)
    if isinstance(x, functools.partial):
        return _walk_partial(x, path, values, parents)
    if isinstance(x, types.FunctionType):
        if x in parents:
            raise CannotTrace(f"{path} calls itself")
        return _walk_function(x, path, values, parents)
    return _walk_name(x, path)


def _static(key: tuple, x: Any, becomes: Any = None) -> Part:
    """What is known when a kernel is compiled."""
    becomes = x if becomes is None else becomes
    return Part(key, lambda _: becomes, lambda other, _: other is x)


def _walk_name(x: Any, path: str) -> Part:
    """Modules, functions of Python and PyTorch, dtypes: by their names, which they keep."""
    name = getattr(x, "__name__", "")
    if isinstance(x, types.ModuleType):
        if name not in MODULES:
            raise CannotTrace(f"{path} is a module: import from {name} the numbers and functions it needs")
        return _static(("module", name), x, MODULES[name])
    if name in BUILTINS and x is BUILTINS[name]:
        return _static(("builtin", name), x)
    name = str(x).removeprefix("torch.") if isinstance(x, torch.dtype) else name
    for module in ("torch", "math", "operator"):
        if name and x is getattr(sys.modules[module], name, None):
            return _static((module, name), x, getattr(MODULES[module], name))
    kind = f"{type(x).__module__}.{type(x).__qualname__}".removeprefix("builtins.")
    instead = "put the numbers and tensors it needs into variables"
    if isinstance(x, type):
        kind = "class"
    elif hasattr(x, "__array__"):
        instead = "make it a tensor, torch.as_tensor"
    elif callable(x):
        instead = "write a plain Python function"
    raise CannotTrace(f"{path} is a {kind}: {instead}")


def _walk_number(x: int | float, path: str, values: list[Any]) -> Part:
    kind = type(x)
    if kind is int and not is_int32(x):
        raise CannotTrace(f"{path} is {x}, which is no 32-bit integer")
    if kind is float and not math.isfinite(x):
        return Part(("static", repr(x)), lambda _: x, lambda *_: False)
    place, fits = len(values), is_int32 if kind is int else math.isfinite
    values.append(x)

    def read(other: Any, new: list[Any]) -> bool:
        new.append(other)
        return type(other) is kind and fits(other)

    return Part(("value", kind.__name__), lambda new: new[place], read)


def _walk_tensor(x: Tensor, path: str, values: list[Any]) -> Part:
    dtype, ndim = x.dtype, x.ndim
    if dtype not in KINDS_OF_DTYPES:
        names = ", ".join(str(dtype).removeprefix("torch.") for dtype in KINDS_OF_DTYPES)
        raise CannotTrace(f"{path} is a tensor of {dtype}; captured tensors may be {names}")
    place = len(values)
    values.append(x)

    def read(other: Any, new: list[Any]) -> bool:
        new.append(other)
        return isinstance(other, Tensor) and other.dtype is dtype and other.ndim == ndim

    return Part(("value", _kind(x)), lambda new: new[place], read)


def _walk_tuple(x: Sequence[Any], path: str, values: list[Any], parents: tuple) -> Part:
    keys, builds, reads = _all(((f"{path}[{i}]", item) for i, item in enumerate(x)), values, parents)
    alike = _alike(reads)
    return Part(
        ("tuple", *keys),
        lambda new: tuple(build(new) for build in builds),
        lambda other, new: type(other) in (tuple, list) and alike(other, new),
    )


def _all(items: Iterable[tuple[str, Any]], values: list[Any], parents: tuple) -> tuple[tuple, ...]:
    """keys, builds, reads"""
    return tuple(zip(*(_walk(x, path, values, parents) for path, x in items), strict=True)) or ((), (), ())


def _alike(reads: tuple[Read, ...]) -> Read:
    """Reads several, in order."""

    def read(others: Sequence[Any], new: list[Any]) -> bool:
        if len(others) != len(reads):
            return False
        for one, other in zip(reads, others):  # noqa: B905, SIM110, the other ways take time
            if not one(other, new):
                return False
        return True

    return read


def _walk_partial(x: functools.partial, path: str, values: list[Any], parents: tuple) -> Part:
    names = tuple(x.keywords)
    parts = ("func", x.func), ("args", x.args), ("keywords", tuple(x.keywords.values()))
    items = ((f"{path}.{name}", part) for name, part in parts)
    keys, builds, _ = _all(items, values, (*parents, x))

    def build(new: Sequence[Any]) -> functools.partial:
        function, args, given = (part(new) for part in builds)
        return functools.partial(function, *args, **dict(zip(names, given, strict=True)))

    return Part(("partial", names, *keys), build, lambda *_: False)


def _walk_function(f: types.FunctionType, path: str, values: list[Any], parents: tuple) -> Part:
    code, name = f.__code__, f.__name__
    used = _globals(code)
    names = tuple(n for n in used if n in f.__globals__ or n not in BUILTINS)
    for n in names:
        if n not in f.__globals__:
            what = (
                f"uses {n}(), which kernels cannot" if hasattr(builtins, n) else f"name '{n}' is not defined"
            )
            raise CannotTrace(f"{path}: {what}")
    own = tuple(n for n in used if n not in names)  # Python's
    try:
        captured = _captured(f, names)
    except ValueError:
        raise CannotTrace(f"{path} uses a variable before it has a value") from None
    keywords, defaults = tuple(f.__kwdefaults__ or ()), len(f.__defaults__ or ())
    called = *code.co_freevars, *names, *("a default",) * defaults, *keywords
    items = ((f"{what} of {path}", x) for what, x in zip(called, captured, strict=True))
    keys, builds, reads = _all(items, values, (*parents, f))
    free, end = len(code.co_freevars), len(code.co_freevars) + len(names)
    alike = _alike(reads)

    def build(new: Sequence[Any]) -> types.FunctionType:
        made = [b(new) for b in builds]
        scope = {"__builtins__": BUILTINS, **dict(zip(names, made[free:end], strict=True))}
        closure = tuple(types.CellType(x) for x in made[:free])
        function = types.FunctionType(code, scope, name, tuple(made[end : end + defaults]), closure)
        function.__kwdefaults__ = dict(zip(keywords, made[end + defaults :], strict=True))
        return function

    def read(other: Any, new: list[Any]) -> bool:
        if type(other) is not types.FunctionType or other.__code__ is not code:
            return False
        if len(other.__defaults__ or ()) != defaults or tuple(other.__kwdefaults__ or ()) != keywords:
            return False
        for n in own:
            if n in other.__globals__:
                return False
        try:
            return alike(_captured(other, names), new)
        except (KeyError, ValueError):
            return False

    structure = _structure(code, frozenset(names), bool(parents))
    return Part(("function", structure, keywords, defaults, *keys), build, read)


def _captured(f: types.FunctionType, names: tuple[str, ...]) -> list[Any]:
    """What a function captures: variables around it, globals, defaults. KeyError, ValueError: one is gone."""
    found, scope = [cell.cell_contents for cell in f.__closure__ or ()], f.__globals__
    found += [scope[name] for name in names]
    if f.__defaults__:
        found += f.__defaults__
    if f.__kwdefaults__:
        found += f.__kwdefaults__.values()
    return found


@functools.lru_cache(maxsize=1024)
def _globals(code: types.CodeType) -> tuple[str, ...]:
    """The names of a function that are not its own."""
    found: dict[str, None] = {}
    for i in dis.get_instructions(code):
        if i.opname in OUTSIDE and i.argval not in code.co_cellvars:
            raise CannotTrace(f"{code.co_name} {OUTSIDE[i.opname].format(i.argval)}")
        if i.opname == "LOAD_GLOBAL":
            found[i.argval] = None
        if isinstance(i.argval, types.CodeType):
            found.update(dict.fromkeys(_globals(i.argval)))
    return tuple(found)


@functools.lru_cache(maxsize=1024)
def _structure(code: types.CodeType, captured: frozenset[str], named: bool) -> tuple:
    """The bytecode with its constants; names count where they are attributes', builtins' or parameters'.

    named: whether its parameters have names for whoever calls it.
    """
    loads = list(dis.get_instructions(code))
    attributes = {i.argval for i in loads if i.opcode in dis.hasname and i.opname != "LOAD_GLOBAL"}
    names = tuple(n if n in attributes or n not in captured else "" for n in code.co_names)
    consts = [
        _structure(x, captured, True) if isinstance(x, types.CodeType) else _constant(x)
        for x in code.co_consts
    ]
    used = {i.arg for i in loads if i.opcode in dis.hasconst}
    if consts and 0 not in used and isinstance(code.co_consts[0], str | types.NoneType):
        consts[0] = ("docstring",)
    counts = code.co_argcount, code.co_posonlyargcount, code.co_kwonlyargcount
    parameters = code.co_varnames[: code.co_argcount + code.co_kwonlyargcount] if named else ()
    more = code.co_flags & ~inspect.CO_NESTED, getattr(code, "co_exceptiontable", b"")
    return code.co_code, tuple(consts), names, counts, parameters, more


def _constant(x: Any) -> tuple[str, str]:
    """In words that are the same in each process."""
    return type(x).__name__, repr(sorted(map(repr, x)) if isinstance(x, frozenset) else x)
