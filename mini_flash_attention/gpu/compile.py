"""From a kernel's config to a function that can be called: the only file that compiles.

Every kernel goes the same way, whether it was compiled a second ago or by another process last
week: compile, export an object file, link a shared library, store it on disk, load it. A process
that finds its kernels on disk never imports the compiler (`cutlass`, up to 3 seconds).

The name under which it is stored holds a hash of all that the compiled code depends on, so it never
goes stale. Debugging switches of CuTe DSL (CUTE_DSL_LINEINFO and the like) are not among that: use
an empty cache directory with them.
"""

import contextlib
import ctypes
import functools
import hashlib
import importlib
import importlib.metadata
import importlib.util
import itertools
import multiprocessing
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Protocol

from mini_flash_attention.gpu import cache, wheel
from mini_flash_attention.version import __version__

SYMBOL = "mini_flash_attention"  # the function in every library: each is loaded on its own
RUNTIME = "cu[0-9]*/lib/libcute_dsl_runtime.so"
INSTALL = (
    "GPU kernels need Linux and: pip install 'nvidia-cutlass-dsl[cu13]' apache-tvm-ffi (without "
    "them there is the CPU backend: MINI_FLASH_ATTENTION_BACKEND=cpu)"
)
TESTED = {"nvidia-cutlass-dsl": (4, 8), "apache-tvm-ffi": (0, 1)}  # the newest releases that were
FORK_TIMEOUT = 20.0  # seconds that a fork waits for another thread that compiles


class KernelConfig(Protocol):
    """Every static fact of one kernel: a frozen dataclass whose repr tells all of them."""

    @property
    def kernel(self) -> str:
        """The module of mini_flash_attention.kernels with `launch` and `fake_call`: "forward.sm90"."""

    @property
    def arch(self) -> str:
        """The architecture to compile for, such as "sm_90a"."""


_loaded: dict[KernelConfig, Callable] = {}
_one_thread = threading.RLock()  # the compiler too serves one thread at a time


def get(config: KernelConfig) -> Callable:
    """Returns the kernel of `config`: from memory, from disk, or compiled now.

    It takes the fields of the record that its module's `launch` takes, one by one: PyTorch tensors and
    numbers. (A record as one argument takes TVM-FFI longer.) It runs on PyTorch's current stream.
    ImportError says what is not installed.
    """
    function = _loaded.get(config)
    return _load(config) if function is None else function


def _load(config: KernelConfig) -> Callable:
    with _one_thread:
        if config not in _loaded:
            try:
                _loaded[config] = _found_or_compiled(config)
            except Exception as error:
                if _advice():
                    raise RuntimeError(f"{type(error).__name__}: {error}{_advice()}") from error
                raise
        return _loaded[config]


def _found_or_compiled(config: KernelConfig) -> Callable:
    try:
        path = library(config)
    except cache.NotStored as refused:
        return _open_copy(refused.entry, refused)
    try:
        return _open(path)
    except Exception as error:  # the entry may be where nothing can be loaded from
        with contextlib.suppress(Exception):
            return _open_copy((path.stem, path.suffix, path.read_bytes()), error)
        return _open_copy((path.stem, *_compile(config)), error)


def _open_copy(entry: tuple[str, str, bytes], error: Exception) -> Callable:
    with cache.private_copy(*entry, error) as path:
        return _open(path)


def library(config: KernelConfig) -> Path:
    """Returns the file with the kernel of `config`, compiled now if the cache doesn't have it.

    cache.NotStored: it is compiled, but the cache cannot take it.
    """
    name = _entry_name(config)
    found = _found(name)
    if found is None:
        with _one_thread, cache.lock(name):
            found = cache.find(name) or cache.store(name, *_compile(config))
    return found


def _found(name: str) -> Path | None:
    """The entry in the cache, or in an installed wheel."""
    return cache.find(name) or wheel.find(name, made_for())


# Naming an entry


def _entry_name(config: KernelConfig) -> str:
    facts = repr((config, made_for()))
    return f"{config.kernel}-{config.arch}-{hashlib.sha256(facts.encode()).hexdigest()[:32]}"


def made_for() -> tuple[str, ...]:
    """All beside its config that a kernel's code depends on: the versions, and the hash of the sources."""
    return *_versions(), _sources()


@functools.cache
def _versions() -> tuple[str, ...]:
    try:
        packages = [importlib.metadata.version(p) for p in ("nvidia-cutlass-dsl", "apache-tvm-ffi")]
    except importlib.metadata.PackageNotFoundError as error:
        raise ImportError(f"{error.name} is not installed. {INSTALL}") from None
    cuda = _runtime_library().parent.parent.name  # "cu12" or "cu13"
    return __version__, *packages, cuda, sys.platform, platform.machine()


@functools.cache
def _sources() -> str:
    """The hash of the code that makes a kernel: the kernels', what they import, and this file's."""
    package = Path(__file__).parent.parent
    folders = (sorted(package.glob(f"{folder}/**/*.py")) for folder in ("gpu/config", "kernels", "scores"))
    files = [Path(__file__), package / "philox.py", *itertools.chain(*folders)]
    return hashlib.sha256(b"\0".join(file.read_bytes() for file in files)).hexdigest()


def _advice() -> str:
    """What a failure may come from: packages newer than this version was tested with. Else nothing."""
    newer, older = [], []
    for package, tested in TESTED.items():
        with contextlib.suppress(importlib.metadata.PackageNotFoundError, ValueError):
            version = importlib.metadata.version(package)
            if tuple(int(number) for number in version.split(".")[:2]) > tested:
                newer.append(f"{package} {version}")
                older.append("'{}=={}.{}.*'".format(package, *tested))
    if not newer:
        return ""
    return (
        f". mini-flash-attention {__version__} was not tested with {' and '.join(newer)}, newer than it; "
        f"perhaps: pip install {' '.join(older)}"
    )


# Compiling and linking


def _compile(config: KernelConfig) -> tuple[str, bytes]:
    """Returns (".so", a shared library), or (".o", an object file) where there is no linker."""
    import cutlass
    import cutlass.cute as cute

    from mini_flash_attention.kernels.parts.arguments import stream

    kernel = importlib.import_module(f"mini_flash_attention.kernels.{config.kernel}")
    call = kernel.fake_call(config)

    @cute.jit
    def launch(config: cutlass.Constexpr, stream, *fields):  # type: ignore[no-untyped-def]  # cute reads annotations
        kernel.launch(type(call)(*fields), config, stream)

    options = f"--enable-tvm-ffi --gpu-arch {config.arch}"
    compiled = cute.compile(launch, config, stream(), *call, options=options)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernel.o")
        compiled.export_to_c(str(path), SYMBOL)
        path = _link(path)
        return path.suffix, path.read_bytes()


def _link(path: Path) -> Path:
    for linker in filter(shutil.which, ("ld", "cc")):
        command: list[str | Path] = [linker, "-shared", "-o", path.with_suffix(".so"), path]
        if subprocess.run(command, capture_output=True).returncode == 0:
            return path.with_suffix(".so")
    return path


# Loading


def _open(path: Path) -> Callable:
    import tvm_ffi

    _load_runtime()
    if path.suffix == ".so":
        return tvm_ffi.load_module(path)[SYMBOL]
    try:
        import tvm_ffi_orcjit  # apache-tvm-ffi-orcjit: loads object files without the compiler
    except ImportError:
        from cutlass.cute import runtime

        return runtime.load_module(str(path), enable_tvm_ffi=True)[SYMBOL]
    session = tvm_ffi_orcjit.default_session()
    return session.load_module(path, keep_module_alive=True)[SYMBOL]


@functools.cache
def _load_runtime() -> ctypes.CDLL:
    """Loads the library whose functions every kernel's library calls."""
    return ctypes.CDLL(str(_runtime_library()), mode=ctypes.RTLD_GLOBAL)


@functools.cache
def _runtime_library() -> Path:
    """CuTe DSL's, for the CUDA version that `cutlass` takes: the newest that the driver knows."""
    package = importlib.util.find_spec("nvidia_cutlass_dsl")
    folders = (package and package.submodule_search_locations) or ()
    files = [file for folder in folders for file in Path(folder).glob(RUNTIME)]
    installed = {int(file.parts[-3].removeprefix("cu")): file for file in files}
    driver = driver_cuda_version()
    usable = [cuda for cuda in installed if driver is None or cuda <= driver[0]]
    if not usable:
        raise ImportError(
            f"nvidia-cutlass-dsl is installed for CUDA {sorted(installed)}, the driver supports "
            f"{driver}. Update the driver, or: {INSTALL}"
        )
    return installed[max(usable)]


def driver_cuda_version() -> tuple[int, int] | None:
    """Returns the newest CUDA that the driver supports, (13, 1) for 13.1; None without a driver."""
    version = ctypes.c_int()
    try:
        failed = ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(version))
    except OSError:
        return None
    return None if failed else (version.value // 1000, version.value % 1000 // 10)


# Compiling ahead of time


def precompile(configs: Iterable[KernelConfig], jobs: int | None = None) -> int:
    """Compiles those `configs` that the cache lacks, in parallel, for any GPU, without a GPU.

    jobs: processes at once, each of about 1 GB; by default one per CPU core of this process. They
    are spawned, so a script that calls this must guard its work with `__name__ == "__main__"`.
    Returns how many were compiled. RuntimeError lists those that failed, after all others are done.
    Without an NVIDIA driver, the kernels are for drivers of the newest CUDA that is installed.
    """
    missing = [c for c in dict.fromkeys(configs) if _found(_entry_name(c)) is None]
    if not missing:
        return 0
    try:
        where = cache.made_directory()
    except OSError as error:
        raise RuntimeError(f"kernels cannot be stored ({error}): {cache.ADVICE}") from error
    failures = []
    jobs = min(jobs or len(os.sched_getaffinity(0)), len(missing))
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, context, initializer=cache.use, initargs=(str(where),)) as pool:
        futures = {pool.submit(_failure, config): config for config in missing}
        _show_progress(0, len(missing))
        for done, future in enumerate(as_completed(futures), start=1):
            _show_progress(done, len(missing))
            failure = future.exception() or future.result()
            if failure:
                failures.append(f"{futures[future]}: {failure}")
    if failures:
        raise RuntimeError("\n".join([f"{len(failures)} kernels failed", *failures]))
    return len(missing)


def _failure(config: KernelConfig) -> str | None:
    """Compiles, and returns what went wrong as text: not all errors of `cutlass` can be pickled."""
    try:
        library(config)
    except cache.NotStored as error:
        return f"it cannot be stored ({error}): {cache.ADVICE}"
    except Exception as error:
        return f"{type(error).__name__}: {error}{_advice()}"
    return None


def _show_progress(done: int, total: int) -> None:
    bar = "#" * (40 * done // total)
    end = "\r" if sys.stderr.isatty() and done < total else "\n"
    print(f"compiling [{bar:.<40}] {done}/{total}", end=end, file=sys.stderr, flush=True)


# Forking while another thread compiles


def _before_fork() -> None:
    """A child lacks the thread that would end a compilation, and could not import what is half imported."""
    _one_thread.acquire(timeout=FORK_TIMEOUT)


def _after_fork() -> None:
    with contextlib.suppress(RuntimeError):  # it took too long
        _one_thread.release()


def _after_fork_in_child() -> None:
    global _one_thread
    _one_thread = threading.RLock()


if hasattr(os, "register_at_fork"):  # not on Windows
    os.register_at_fork(before=_before_fork, after_in_parent=_after_fork, after_in_child=_after_fork_in_child)
