"""The walk through a Python function: its structure, and the numbers and tensors that it captures.

The structure is found in the bytecode, so functions without a source work too. Names count only where they
mean something: attributes', Python's own, parameters of functions that are called by keyword.
"""

import builtins
import dis
import functools
import inspect
import math
import numbers
import operator
import sys
import types
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mini_flash_attention.scores.numbers import CannotTrace, Torch, is_int32

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
MODULES: dict[str, Any] = {
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


def walk(x: Any, path: str, values: list[Any], parents: tuple) -> Part:
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


def kind_of(x: Any) -> str:
    if isinstance(x, Tensor):
        dtype = str(x.dtype).removeprefix("torch.")
        return f"{KINDS_OF_DTYPES[x.dtype]}:{dtype} {x.ndim}"
    return type(x).__name__


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

    return Part(("value", kind_of(x)), lambda new: new[place], read)


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
    return tuple(zip(*(walk(x, path, values, parents) for path, x in items), strict=True)) or ((), (), ())


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
