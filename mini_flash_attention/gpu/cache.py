"""A directory of compiled kernels that any number of processes use at once.

It is ~/.cache/mini_flash_attention, or what MINI_FLASH_ATTENTION_CACHE_DIR names. An entry is one
file: the code, then the SHA-256 of its name and the code, which loaders of libraries ignore. It
appears whole or not at all. Whatever is wrong with the directory costs a compilation, no more.
"""

import atexit
import contextlib
import hashlib
import os
import shutil
import tempfile
import threading
import time
import uuid
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

SUFFIXES = (".so", ".o")  # linked, or not, where there was no linker
LOCK_TIMEOUT = 120.0  # seconds to wait for another process that compiles; a kernel takes 2 to 8

_private: dict[int, Path] = {}  # the directory of each process: a forked child makes its own
_one_thread = threading.Lock()


def directory() -> Path:
    """Returns the directory of the cache, which need not exist yet."""
    path = os.environ.get("MINI_FLASH_ATTENTION_CACHE_DIR") or "~/.cache/mini_flash_attention"
    try:
        return Path(path).expanduser().absolute()
    except RuntimeError as error:  # a user without a home
        return _private_directory(error)


def entries() -> list[Path]:
    """Returns the files of all kernels in the cache, also those of other versions."""
    return [path for suffix in SUFFIXES for path in directory().glob(f"*{suffix}")]


def find(name: str) -> Path | None:
    """Returns the entry if it is there and whole: loading a truncated one kills the process."""
    for suffix in SUFFIXES:
        path = directory() / (name + suffix)
        with contextlib.suppress(OSError):
            content = path.read_bytes()
            if content == _with_checksum(name, content[: -hashlib.sha256().digest_size]):
                return path
    return None


def store(name: str, suffix: str, code: bytes) -> Path:
    """Returns the new entry, which is in a directory of this process if the cache refuses it."""
    try:
        return _write(directory() / (name + suffix), _with_checksum(name, code))
    except OSError as error:
        return store_privately(name, suffix, code, error)


def store_privately(name: str, suffix: str, code: bytes, error: Exception) -> Path:
    """Returns the new entry in a directory of this process, because the cache fails with `error`."""
    return _write(_private_directory(error) / (name + suffix), _with_checksum(name, code))


def is_private(path: Path) -> bool:
    """Tells whether this entry is gone when the process ends."""
    return path.parent in _private.values()


@contextlib.contextmanager
def lock(name: str) -> Iterator[None]:
    """Keeps other processes from compiling `name`, or waits for the one that does.

    A process that dies loses its lock to the operating system. On time-out, and where files cannot
    be locked, the work is done without: twice, at worst.
    """
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError):
            directory().mkdir(parents=True, exist_ok=True)
            _wait_for(stack.enter_context(open(directory() / f"{name}.lock", "wb")))
        yield


def _wait_for(file: BinaryIO) -> None:
    import fcntl  # not at the top: Windows, which can use the CPU backend, has none

    deadline = time.monotonic() + LOCK_TIMEOUT
    while time.monotonic() < deadline:
        try:
            return fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            time.sleep(0.05)


def _with_checksum(name: str, code: bytes) -> bytes:
    return code + hashlib.sha256(name.encode() + code).digest()


def _write(path: Path, content: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f"{uuid.uuid4().hex}.tmp")
    try:
        unfinished.write_bytes(content)
        return unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


def _private_directory(error: Exception) -> Path:
    process = os.getpid()
    with _one_thread:
        if process not in _private:
            _private[process] = Path(tempfile.mkdtemp(prefix="mini_flash_attention_"))
            atexit.register(_remove, _private[process], process)
            warnings.warn(
                f"the cache of kernels cannot be used ({error}), so every process makes its own: let "
                "MINI_FLASH_ATTENTION_CACHE_DIR name a directory to write files in and load them from",
                RuntimeWarning,
                stacklevel=3,
            )
        return _private[process]


def _remove(path: Path, process: int) -> None:
    if os.getpid() == process:  # and not a forked child, which inherits what runs at exit
        shutil.rmtree(path, ignore_errors=True)
