"""Environment variables that every call reads, so that a change counts from the next call on."""

import os
from collections.abc import Callable

# Where CPython's os.environ keeps them: it takes 0.5 µs to find that one is not set.
_values = getattr(os.environ, "_data", None)


def reader(name: str) -> Callable[[], str | None]:
    """A function that returns the variable's value, None if it is not set."""
    if _values is None:
        return lambda: os.environ.get(name)
    key = os.environ.encodekey(name)
    return lambda: os.environ[name] if key in _values else None
