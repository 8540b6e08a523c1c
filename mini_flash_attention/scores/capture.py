"""A Python function of a score, taken apart: its structure, and the numbers and tensors that it captures.

A kernel is compiled for the structure alone: two functions that differ in their names, or in what they
capture, share it. Nothing of it is executed when a kernel is loaded from disk.
"""

import functools
import hashlib
import importlib
import inspect
import linecache
import math
import pickle
import sys
import traceback
import types
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from mini_flash_attention.scores.numbers import CannotTrace, Constant, Kinds, Number, Table, Uniform, where
from mini_flash_attention.scores.walk import Build, Read, kind_of, walk


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
        indices = [Number(ops, x) for x in place[:4]]
        try:
            if self.role == "score_mod":
                return self._result(ops, function(score, *indices))
            return where(self._result(ops, function(*indices)), score, -math.inf)
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
            return _shown(frame.filename, frame.lineno or 0)
    return _start(function)


def _start(function: Callable[..., Any]) -> str:
    code = getattr(function, "__code__", None)
    return "" if code is None else _shown(code.co_filename, code.co_firstlineno)


def _shown(file: str, number: int) -> str:
    line = linecache.getline(file, number).strip()
    return f"\n  {file}, line {number}: {line}" if line else f"\n  {file}, line {number}"


NOT_THE_USERS = str(Path(__file__).parent), str(Path(torch.__file__).parent)


class Scoring(tuple[Function, ...]):
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


def _softcap(score: Any, place: Place, cap: Any) -> Any:
    """cap · tanh(score / cap): Gemma 2, arXiv 2408.00118."""
    return cap * torch.tanh(score * (1.0 / cap))


def _alibi(score: Any, place: Place, slopes: Table) -> Any:
    """score - slope · (distance from the diagonal): Press et al. 2022, arXiv 2108.12409."""
    distance = place.q_idx - place.kv_idx + (place.seqlen_k - place.seqlen_q)
    return score - slopes[place.batch, place.head] * abs(distance)


BUILT_IN: dict[str, tuple[Callable[..., Number], tuple[str, ...]]] = {
    "softcap": (_softcap, ("float",)),
    "alibi": (_alibi, ("float:float32 2",)),
}


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
        key, build, read = walk(function, getattr(function, "__name__", "it"), values, ())
    except CannotTrace as error:
        raise CannotTrace(f"{role}: {error}{_start(function)}") from None
    found = _function(role, key, tuple(map(kind_of, values)), _Once(build))
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
    module, name = getattr(function, "__module__", ""), getattr(function, "__qualname__", "")
    return (module, name) if getattr(sys.modules.get(module), name, None) is function else None


def _imported(role: str, module: str, name: str, digest: str) -> Function:
    function, _ = capture(role, getattr(importlib.import_module(module), name))
    if function.digest != digest:
        raise pickle.UnpicklingError(f"{role}: {module}.{name} is another function here, or captures others")
    return function
