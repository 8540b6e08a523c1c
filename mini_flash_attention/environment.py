"""Environment variables that every call reads, so that a change counts from the next call on."""

import os
from collections.abc import Callable

_environ = os.environ
# Where CPython keeps them: it takes os.environ 0.5 µs to find that one is not set.
_values = getattr(_environ, "_data", None)


def reader(name: str) -> Callable[[], str | None]:
    """A function that returns the variable's value, None if it is not set."""
    if _values is None:
        return lambda: os.environ.get(name)
    key = _environ.encodekey(name)
    return lambda: os.environ.get(name) if key in _values or os.environ is not _environ else None
