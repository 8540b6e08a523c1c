"""A wheel of compiled kernels: where it is installed beside this package, they need not be compiled.

It is a Python package of entries, each a file as the cache has it, with what they were made for. They are
checked like the cache's but for their owner: who may write where Python imports from may change
this package too.
"""

import base64
import functools
import hashlib
import importlib.util
import json
import sysconfig
import warnings
import zipfile
from collections.abc import Iterable, Iterator
from pathlib import Path

from mini_flash_attention.gpu import cache
from mini_flash_attention.version import __version__

NAME = "mini_flash_attention_kernels"
MADE_FOR = "made_for.json"  # the versions, and the hash of the sources, that go into the names of its entries


def find(name: str, made_for: tuple[str, ...]) -> Path | None:
    """The installed wheel's entry, if it is there and whole. made_for: what a wheel must be made for."""
    folder = installed(made_for)
    return None if folder is None else cache.whole_entry(folder, name)


@functools.cache
def installed(made_for: tuple[str, ...]) -> Path | None:
    """Where it is installed. One that does not fit is none, with a warning."""
    spec = importlib.util.find_spec(NAME)
    for folder in map(Path, (spec and spec.submodule_search_locations) or ()):
        try:
            its = json.loads((folder / MADE_FOR).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            its = None
        if its == list(made_for):
            return folder
        text = f"{NAME} is for {_said(its)}, not for {_said(made_for)}, and not used: make it anew"
        warnings.warn(text, RuntimeWarning, stacklevel=2)
    return None


def _said(made_for: object) -> str:
    """The versions, and of the sources, whose hash comes last, its beginning."""
    if not isinstance(made_for, list | tuple) or not made_for:
        return "something unknown"
    *versions, sources = map(str, made_for)
    return " ".join([*versions, sources[:12]])


def write(folder: Path, entries: Iterable[Path], made_for: tuple[str, ...]) -> Path:
    """Makes the wheel in this folder. Same entries, same wheel. OSError: it cannot be written there."""
    folder.mkdir(parents=True, exist_ok=True)
    platform = sysconfig.get_platform().replace("-", "_").replace(".", "_")
    path = folder / f"{NAME}-{__version__}-py3-none-{platform}.whl"
    unfinished = path.with_suffix(".tmp")
    record, info = "", f"{NAME}-{__version__}.dist-info"
    try:
        with zipfile.ZipFile(unfinished, "w", zipfile.ZIP_DEFLATED) as archive:
            for name, content in _files(info, entries, made_for, platform):
                file = zipfile.ZipInfo(name)
                file.external_attr = 0o644 << 16  # for all to read
                archive.writestr(file, content, zipfile.ZIP_DEFLATED)
                digest = base64.urlsafe_b64encode(hashlib.sha256(content).digest()).decode().rstrip("=")
                record += f"{name},sha256={digest},{len(content)}\n"
            archive.writestr(zipfile.ZipInfo(f"{info}/RECORD"), f"{record}{info}/RECORD,,\n")
        return unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


def _files(
    info: str, entries: Iterable[Path], made_for: tuple[str, ...], platform: str
) -> Iterator[tuple[str, bytes]]:
    """What is in the wheel, but for RECORD."""
    for entry in sorted(entries):
        yield f"{NAME}/{entry.name}", entry.read_bytes()
    texts = {
        f"{NAME}/__init__.py": '"""Compiled kernels of mini-flash-attention."""\n',
        f"{NAME}/{MADE_FOR}": json.dumps(made_for),
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {NAME.replace('_', '-')}\nVersion: {__version__}\n"
        f"Summary: Compiled kernels of mini-flash-attention\n"
        f"Requires-Dist: mini-flash-attention=={__version__}\n",
        f"{info}/WHEEL": f"Wheel-Version: 1.0\nGenerator: mini-flash-attention {__version__}\n"
        f"Root-Is-Purelib: false\nTag: py3-none-{platform}\n",
    }
    for name, text in texts.items():
        yield name, text.encode()
