"""From a kernel's config to a function that can be called: the only file that compiles.

Every kernel goes the same way, whether it was compiled a second ago or by another process last
week: compile, export an object file, link a shared library, store it on disk, load it. A process
that finds its kernels on disk never imports the compiler (`cutlass`, up to 3 seconds).

The name under which it is stored holds a hash of all that the compiled code depends on, so it never
goes stale. Debugging switches of CuTe DSL (CUTE_DSL_LINEINFO and the like) are not among that: use
an empty cache directory with them.
"""

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

from mini_flash_attention.gpu import cache
from mini_flash_attention.version import __version__

SYMBOL = "mini_flash_attention"  # the function in every library: each is loaded on its own
RUNTIME = "cu[0-9]*/lib/libcute_dsl_runtime.so"
INSTALL = (
    "GPU kernels need Linux and: pip install 'nvidia-cutlass-dsl[cu13]' apache-tvm-ffi (without "
    "them there is the CPU backend: MINI_FLASH_ATTENTION_BACKEND=cpu)"
)


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

    It takes what its module's `launch` takes first, a record of kernels/calls.py with PyTorch tensors
    and numbers, or a tuple of the same. It runs on PyTorch's current stream. ImportError says what is
    not installed.
    """
    function = _loaded.get(config)
    return _load(config) if function is None else function


def _load(config: KernelConfig) -> Callable:
    with _one_thread:
        if config not in _loaded:
            path = library(config)
            try:
                _loaded[config] = _open(path)
            except Exception as error:
                _loaded[config] = _open_privately(config, path, error)
        return _loaded[config]


def _open_privately(config: KernelConfig, path: Path, error: Exception) -> Callable:
    """Opens a copy of the entry, which may be where nothing can be loaded from, or a new one."""
    try:
        return _open(cache.store_privately(path.stem, path.suffix, path.read_bytes(), error))
    except Exception:
        return _open(cache.store_privately(path.stem, *_compile(config), error))


def library(config: KernelConfig) -> Path:
    """Returns the file with the kernel of `config`, compiled now if the cache doesn't have it."""
    name = _entry_name(config)
    found = cache.find(name)
    if found is None:
        with _one_thread, cache.lock(name):
            found = cache.find(name) or cache.store(name, *_compile(config))
    return found


# Naming an entry


def _entry_name(config: KernelConfig) -> str:
    facts = repr((config, _versions(), _sources()))
    return f"{config.kernel}-{config.arch}-{hashlib.sha256(facts.encode()).hexdigest()[:32]}"


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
    folders = (sorted(package.glob(f"{folder}/**/*.py")) for folder in ("gpu/config", "kernels"))
    files = [Path(__file__), package / "philox.py", *itertools.chain(*folders)]
    return hashlib.sha256(b"\0".join(file.read_bytes() for file in files)).hexdigest()


# Compiling and linking


def _compile(config: KernelConfig) -> tuple[str, bytes]:
    """Returns (".so", a shared library), or (".o", an object file) where there is no linker."""
    import cutlass.cute as cute

    from mini_flash_attention.kernels.parts.arguments import stream

    kernel = importlib.import_module(f"mini_flash_attention.kernels.{config.kernel}")
    options = f"--enable-tvm-ffi --gpu-arch {config.arch}"
    compiled = cute.compile(kernel.launch, kernel.fake_call(config), config, stream(), options=options)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernel.o")
        compiled.export_to_c(str(path), SYMBOL)
        path = _link(path)
        return path.suffix, path.read_bytes()


def _link(path: Path) -> Path:
    for linker in filter(shutil.which, ("ld", "cc")):
        command = [linker, "-shared", "-o", path.with_suffix(".so"), path]
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
    folders = importlib.util.find_spec("nvidia_cutlass_dsl").submodule_search_locations
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
    missing = [c for c in dict.fromkeys(configs) if cache.find(_entry_name(c)) is None]
    if not missing:
        return 0
    failures = []
    jobs = min(jobs or len(os.sched_getaffinity(0)), len(missing))
    with ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn")) as pool:
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
        path = library(config)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    if cache.is_private(path):  # which goes with this worker
        return "cannot be stored: let MINI_FLASH_ATTENTION_CACHE_DIR name a directory to write files in"
    return None


def _show_progress(done: int, total: int) -> None:
    bar = "#" * (40 * done // total)
    end = "\r" if sys.stderr.isatty() and done < total else "\n"
    print(f"compiling [{bar:.<40}] {done}/{total}", end=end, file=sys.stderr, flush=True)
