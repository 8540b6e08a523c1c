"""Writes mini_flash_attention/__init__.pyi, for type checkers: what a function returns depends on a flag.

    python -m tests.stub && ruff format

Signatures are those of the functions, so nothing is written twice by hand; a test compares the file.
"""

import inspect
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import mini_flash_attention

STUB = Path(mini_flash_attention.__file__).with_name("__init__.pyi")
HEAD = '''"""Made by tests/stub.py of the functions' signatures."""

from collections.abc import Callable, Sequence
from typing import Any, Literal, overload

from torch import Tensor

from mini_flash_attention.block_mask import BlockMask as BlockMask
from mini_flash_attention.block_mask import create_block_mask as create_block_mask

__version__: str
'''
# The flag, what is returned without it, and with it.
RETURNED = {
    "return_attn_probs": ("Tensor", "tuple[Tensor, Tensor, Tensor | None]"),
    "return_softmax_lse": ("Tensor", "tuple[Tensor, Tensor]"),
}


def stub() -> str:
    names = [name for name in mini_flash_attention.__all__ if f" as {name}\n" not in HEAD]
    functions = [(name, getattr(mini_flash_attention, name)) for name in names]
    exported = f"\n__all__ = {mini_flash_attention.__all__}\n"
    return (
        HEAD
        + exported
        + "".join(text for name, value in functions if callable(value) for text in of(name, value))
    )


def of(name: str, function: Callable[..., Any]) -> Iterator[str]:
    """The function, once for each of the flag's values and once for a flag that is not known before."""
    parameters = list(inspect.signature(function).parameters.values())
    flag = next((parameter for parameter in parameters if parameter.name in RETURNED), None)
    if flag is None:
        yield definition(name, parameters, written(inspect.signature(function).return_annotation))
        return
    without, with_flag = RETURNED[flag.name]
    off, known = (flag.replace(annotation=f"Literal[{value}]") for value in (False, True))
    first = [parameter for parameter in parameters if parameter.name != flag.name]
    keyword = known.replace(kind=inspect.Parameter.KEYWORD_ONLY, default=inspect.Parameter.empty)
    at = parameters.index(flag)
    yield "@overload\n" + definition(name, [*parameters[:at], off, *parameters[at + 1 :]], without)
    with_keyword = [*of_kind(first, False), keyword, *of_kind(first, True)]
    yield "@overload\n" + definition(name, with_keyword, with_flag)
    yield "@overload\n" + definition(name, parameters, f"{without} | {with_flag}")


def of_kind(parameters: list[inspect.Parameter], keyword_only: bool) -> list[inspect.Parameter]:
    return [one for one in parameters if (one.kind is inspect.Parameter.KEYWORD_ONLY) == keyword_only]


def definition(name: str, parameters: list[inspect.Parameter], returned: str) -> str:
    lines, starred = [], False
    for one in parameters:
        if one.kind is inspect.Parameter.KEYWORD_ONLY and not starred:
            lines.append("*")
            starred = True
        default = "" if one.default is inspect.Parameter.empty else f" = {one.default!r}"
        lines.append(f"{one.name}: {written(one.annotation)}{default}")
    return f"def {name}(\n" + "".join(f"    {line},\n" for line in lines) + f") -> {returned}: ...\n"


def written(annotation: Any) -> str:
    """As in the source: without the modules of the names."""
    text = annotation if isinstance(annotation, str) else inspect.formatannotation(annotation)
    return re.sub(r"\b(collections\.abc|mini_flash_attention\.block_mask|torch|typing)\.", "", text)


if __name__ == "__main__":
    STUB.write_text(stub())
