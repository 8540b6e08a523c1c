"""A directory of compiled kernels that any number of processes use at once.

It is what MINI_FLASH_ATTENTION_CACHE_DIR names, else mini_flash_attention in XDG_CACHE_HOME, by default in
~/.cache. An entry is one file: the code, then the SHA-256 of its name and the code, which loaders of
libraries ignore. It appears whole or not at all. Whatever is wrong with the directory costs a compilation,
no more.

Who writes an entry runs code as whoever loads it. So the directory and all in it must be this user's or
root's, and nobody else may write to them; what is made here is for this user alone.
"""

import contextlib
import functools
import hashlib
import os
import stat
import tempfile
import time
import uuid
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

SUFFIXES = (".so", ".o")  # linked, or not, where there was no linker
LOCK_TIMEOUT = 120.0  # seconds to wait for another process that compiles; a kernel takes 2 to 8
ADVICE = "let MINI_FLASH_ATTENTION_CACHE_DIR name a directory of yours to write files in and load them from"

# Neither follow a link nor wait for a pipe's other end; Windows has neither.
_PLAIN_FILE = getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)

_held: set[BinaryIO] = set()  # files that this process has locked
_warned = False


class NotStored(OSError):
    """The cache cannot take an entry. Its name, suffix and code are in `entry`."""

    def __init__(self, reason: OSError, entry: tuple[str, str, bytes]) -> None:
        super().__init__(str(reason))
        self.entry = entry


def directory() -> Path:
    """Returns the directory of the cache, which need not exist yet. OSError: the user has no home."""
    path = os.environ.get("MINI_FLASH_ATTENTION_CACHE_DIR")
    if not path:
        caches = os.environ.get("XDG_CACHE_HOME", "")
        caches = caches if os.path.isabs(caches) else "~/.cache"  # as its specification says
        path = os.path.join(caches, "mini_flash_attention")
    return _absolute(path)


def use(path: str) -> None:
    """Makes it the cache of this process."""
    os.environ["MINI_FLASH_ATTENTION_CACHE_DIR"] = path


@functools.cache
def _absolute(path: str) -> Path:
    """Made absolute once: a process that changes its working directory keeps its cache."""
    try:
        return Path(path).expanduser().absolute()
    except RuntimeError as error:
        raise FileNotFoundError(str(error)) from error


def entries() -> list[Path]:
    """Returns the files of all kernels in the cache, also those of other versions.

    OSError: there is no such directory for this user, or it cannot be trusted.
    """
    folder = directory()
    if not folder.exists():
        return []
    _require_trusted_directory(folder)
    return entries_in(folder)


def entries_in(folder: Path) -> list[Path]:
    return [path for suffix in SUFFIXES for path in folder.glob(f"*{suffix}")]


def find(name: str) -> Path | None:
    """Returns the entry if it is there, can be trusted and is whole: a truncated one kills who loads it."""
    with contextlib.suppress(OSError):
        folder = directory()
        _require_trusted_directory(folder)
        return whole_entry(folder, name, _open_trusted)
    return None


def whole_entry(folder: Path, name: str, opener: Callable[[str, int], int] | None = None) -> Path | None:
    """The entry in this folder, if it is there and whole. opener: as `open` takes it."""
    for suffix in SUFFIXES:
        path = folder / (name + suffix)
        with contextlib.suppress(OSError), open(path, "rb", opener=opener) as file:
            content = file.read()
            if content == _with_checksum(name, content[: -hashlib.sha256().digest_size]):
                return path
    return None


def store(name: str, suffix: str, code: bytes) -> Path:
    """Returns the new entry. NotStored: the cache cannot take it, or cannot be trusted."""
    try:
        folder = made_directory()
        for there in (folder / (name + suffix), folder / f"{name}.lock"):
            with contextlib.suppress(FileNotFoundError):
                _require_trusted(there, there.lstat())
        return _write(folder / (name + suffix), _with_checksum(name, code))
    except OSError as error:
        raise NotStored(error, (name, suffix, code)) from error


@contextlib.contextmanager
def private_copy(name: str, suffix: str, code: bytes, error: Exception) -> Iterator[Path]:
    """An entry in a directory of its own while it is loaded, because the cache fails with `error`.

    What is loaded needs its file no more: nothing is left, however the process ends.
    """
    global _warned
    if not _warned:
        _warned = True
        text = f"the cache of kernels cannot be used ({error}), so every process compiles its own: {ADVICE}"
        warnings.warn(text, RuntimeWarning, stacklevel=2)
    prefix = "mini_flash_attention_"
    with tempfile.TemporaryDirectory(prefix=prefix, ignore_cleanup_errors=True) as folder:
        yield _write(Path(folder, name + suffix), _with_checksum(name, code))


@contextlib.contextmanager
def lock(name: str) -> Iterator[None]:
    """Keeps other processes from compiling `name`, or waits for the one that does.

    A process that dies loses its lock to the operating system. On time-out, and where files cannot
    be locked, the work is done without: twice, at worst.
    """
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError, ImportError):
            stack.enter_context(_locked(made_directory() / f"{name}.lock"))
        yield


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    import fcntl  # not at the top: Windows has none

    with open(path, "ab", opener=_open_trusted) as file:  # to write, as network file systems lock no others
        os.fchmod(file.fileno(), 0o600)
        _held.add(file)
        deadline = time.monotonic() + LOCK_TIMEOUT
        while time.monotonic() < deadline:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                time.sleep(0.05)
        try:
            yield
        finally:
            _held.discard(file)


def _close_held() -> None:
    """A forked child holds its parent's locks too, and could outlive it, or want them itself."""
    while _held:
        _held.pop().close()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_close_held)


def _with_checksum(name: str, code: bytes) -> bytes:
    return code + hashlib.sha256(name.encode() + code).digest()


def _write(path: Path, content: bytes) -> Path:
    unfinished = path.with_name(f"{uuid.uuid4().hex}.tmp")
    try:
        unfinished.touch(0o600, exist_ok=False)
        unfinished.chmod(0o600)  # the umask may have taken from it
        unfinished.write_bytes(content)
        return unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


def made_directory() -> Path:
    """Returns the directory, where it was missing, made for this user alone.

    OSError: it cannot be made, or cannot be trusted.
    """
    folder = directory()
    for path in (*reversed(folder.parents), folder):
        if not path.exists():
            with contextlib.suppress(FileExistsError):  # another process was faster
                path.mkdir(0o700)
                path.chmod(0o700)  # the umask may have taken from it
    _require_trusted_directory(folder)
    return folder


# Trust


def _require_trusted(path: Path, status: os.stat_result) -> None:
    """PermissionError: somebody other than this user and root owns it or may write to it."""
    if not hasattr(os, "geteuid"):  # Windows: nothing can be told from these numbers
        return
    if status.st_uid not in (os.geteuid(), 0):
        raise PermissionError(f"{path} belongs to user {status.st_uid}, neither to you nor to root")
    if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH) and not stat.S_ISLNK(status.st_mode):
        raise PermissionError(f"others may write to {path}: chmod -R go-w {path}")


def _require_trusted_directory(folder: Path) -> None:
    """Where it is a link, who can change the link chooses the directory."""
    _require_trusted(folder, folder.lstat())
    _require_trusted(folder, folder.stat())


def _open_trusted(path: str, flags: int) -> int:
    """For `open`: what is checked is what is read."""
    file = os.open(path, flags | _PLAIN_FILE, 0o600)
    try:
        _require_trusted(Path(path), os.fstat(file))
    except PermissionError:
        os.close(file)
        raise
    return file
