"""The cache of compiled kernels: threads, processes, damaged entries, unusable directories."""

import errno
import importlib.metadata
import importlib.util
import os
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

if importlib.util.find_spec("nvidia_cutlass_dsl") is None:
    pytest.skip("CuTe DSL is not installed", allow_module_level=True)

import torch
from tiny import TinyConfig, signature

import mini_flash_attention
from mini_flash_attention.gpu import cache, compile

CONFIG, OTHER = TinyConfig(), TinyConfig(dtype="Float16")


@pytest.fixture(autouse=True)
def directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The cache of this test, empty in memory and on disk."""
    path = tmp_path / "cache"
    monkeypatch.setenv("MINI_FLASH_ATTENTION_CACHE_DIR", str(path))
    monkeypatch.setattr(compile, "_loaded", {})
    monkeypatch.setattr(cache, "_private", {})
    return path


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> list[TinyConfig]:
    """What this process has compiled."""
    configs, original = [], compile._compile

    def compile_and_count(config: TinyConfig) -> tuple[str, bytes]:
        configs.append(config)
        return original(config)

    monkeypatch.setattr(compile, "_compile", compile_and_count)
    return configs


def assert_right(function: Callable, dtype: str = "float32") -> None:
    assert f"mX: Tensor([n0], {dtype})" in signature(function)


def start(script: str) -> subprocess.Popen:
    """Starts a process that finds the same modules and speaks through pipes."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", script]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    return subprocess.Popen(command, text=True, env=environment, **pipes)


# Forked, which spares 16 imports of torch, but before anything of the cache is used.
SIXTEEN_PROCESSES = """
import multiprocessing, sys, torch
import torch
from tiny import TinyConfig, signature
from mini_flash_attention.gpu import compile

def get(_):
    barrier.wait()
    assert "float32" in signature(compile.get(TinyConfig()))
    return "cutlass" in sys.modules

fork = multiprocessing.get_context("fork")
barrier = fork.Barrier(16)
with fork.Pool(16) as pool:
    print(sum(pool.map(get, range(16), chunksize=1)))
"""


def test_sixteen_processes_compile_once() -> None:
    assert start(SIXTEEN_PROCESSES).communicate()[0] == "1\n"


def test_a_process_served_from_disk_does_not_import_the_compiler() -> None:
    compile.library(CONFIG)
    assert start(SIXTEEN_PROCESSES.replace("16", "1")).communicate()[0] == "0\n"


FIRST_CALL = """
import sys, time, torch
torch.zeros(1, device="cuda")
began = time.perf_counter()
from mini_flash_attention import flash_attn_func
q = torch.ones(1, 128, 1, 64, dtype=torch.float16, device="cuda")
flash_attn_func(q, q, q)
torch.cuda.synchronize()
print(time.perf_counter() - began, "cutlass" in sys.modules)
"""


def test_first_call_of_a_process_is_quick(gpu: torch.device) -> None:
    start(FIRST_CALL).communicate()
    seconds, compiler_imported = start(FIRST_CALL).communicate()[0].split()
    assert compiler_imported == "False"
    assert float(seconds) < 0.5


def test_eight_threads_compile_once(compiled: list[TinyConfig]) -> None:
    barrier = threading.Barrier(8)

    def get(i: int) -> Callable:
        barrier.wait()
        return compile.get((CONFIG, OTHER)[i % 2])

    with ThreadPoolExecutor(8) as pool:
        functions = list(pool.map(get, range(8)))
    assert sorted(compiled, key=repr) == [OTHER, CONFIG]
    assert len(set(map(id, functions))) == 2


def test_kernels_loaded_together_do_not_meet() -> None:
    functions = {name: compile.get(TinyConfig(dtype=name)) for name in ("Float32", "Float16")}
    for name, function in functions.items():
        assert_right(function, name.lower())


DAMAGE = {
    "truncated at 10 %": lambda content: content[: len(content) // 10],
    "truncated at 50 %": lambda content: content[: len(content) // 2],
    "truncated at 95 %": lambda content: content[: len(content) * 95 // 100],
    "without the last byte": lambda content: content[:-1],
    "empty": lambda content: b"",
    "foreign": lambda content: b"#!/bin/sh\n",
    "one wrong byte": lambda content: content[:5000] + b"\x5a" + content[5001:],
    "another kernel's": lambda content: compile.library(OTHER).read_bytes(),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_damaged_entry_is_compiled_again(
    damage: Callable[[bytes], bytes], compiled: list[TinyConfig]
) -> None:
    path = compile.library(CONFIG)
    path.write_bytes(damage(path.read_bytes()))
    compiled.clear()
    assert_right(compile.get(CONFIG))
    assert compiled == [CONFIG]
    assert cache.find(path.stem) == path


def _under_a_file(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory.write_text("a file where the directory should be")


def _in_proc(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MINI_FLASH_ATTENTION_CACHE_DIR", "/proc/cache")


def _full(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = Path.write_bytes

    def write_bytes(path: Path, content: bytes) -> int:
        if path.parent == directory:
            original(path, content[:100])
            raise OSError(errno.ENOSPC, "No space left on device")
        return original(path, content)

    monkeypatch.setattr(Path, "write_bytes", write_bytes)


def _read_only(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if os.geteuid() == 0:
        pytest.skip("root writes to read-only directories")
    directory.mkdir(exist_ok=True)
    directory.chmod(0o500)


def _entry_is_a_directory(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for config in (CONFIG, OTHER):
        (directory / f"{compile._entry_name(config)}.so" / "x").mkdir(parents=True)


def _no_home(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def expanduser(path: Path) -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "expanduser", expanduser)


def _nothing_can_be_loaded(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = compile._open

    def load(path: Path) -> Callable:
        if path.parent == directory:
            raise RuntimeError("failed to map segment from shared object")
        return original(path)

    monkeypatch.setattr(compile, "_open", load)


def _verified_garbage(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for config in (CONFIG, OTHER):
        cache.store(compile._entry_name(config), ".so", b"garbage")


SPOILED = [
    _under_a_file,
    _in_proc,
    _full,
    _read_only,
    _entry_is_a_directory,
    _no_home,
    _nothing_can_be_loaded,
    _verified_garbage,
]


@pytest.mark.parametrize("spoil", SPOILED)
def test_unusable_directory_costs_one_warning(
    spoil: Callable, directory: Path, monkeypatch: pytest.MonkeyPatch, compiled: list[TinyConfig]
) -> None:
    spoil(directory, monkeypatch)
    with pytest.warns(RuntimeWarning, match="MINI_FLASH_ATTENTION_CACHE_DIR") as warned:
        assert_right(compile.get(CONFIG))
        assert_right(compile.get(OTHER), "float16")
    assert len(warned) == 1
    assert compiled == [CONFIG, OTHER]
    assert not list(directory.glob("*.tmp"))


def test_what_cannot_be_loaded_anywhere_is_an_error(
    monkeypatch: pytest.MonkeyPatch, compiled: list[TinyConfig]
) -> None:
    def load(path: Path) -> Callable:
        raise RuntimeError("undefined symbol")

    monkeypatch.setattr(compile, "_open", load)
    with pytest.warns(RuntimeWarning), pytest.raises(RuntimeError, match="undefined symbol"):
        compile.get(CONFIG)
    assert compiled == [CONFIG, CONFIG]


FORK = """
import os, sys
from pathlib import Path
from mini_flash_attention.gpu import cache

first = cache.store("kernel", ".so", b"code")
child = os.fork()
second = cache.store("kernel", ".so", b"code")
assert (first == second) == (child != 0)
if child:
    os.waitpid(child, 0)
    print(first.exists(), first.parent)
else:
    print(second.parent, flush=True)
"""


def test_each_process_removes_its_own_private_directory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MINI_FLASH_ATTENTION_CACHE_DIR", "/proc/cache")
    childs, exists, parents = start(FORK).communicate()[0].split()
    assert exists == "True"
    assert not Path(childs).exists() and not Path(parents).exists()


def test_eight_threads_share_a_private_directory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MINI_FLASH_ATTENTION_CACHE_DIR", "/proc/cache")
    original, barrier = cache.tempfile.mkdtemp, threading.Barrier(8)

    def slow_mkdtemp(**options: str) -> str:
        time.sleep(0.1)
        return original(**options)

    def store(i: int) -> Path:
        barrier.wait()
        return cache.store(str(i), ".so", b"code").parent

    monkeypatch.setattr(cache.tempfile, "mkdtemp", slow_mkdtemp)
    with pytest.warns(RuntimeWarning) as warned, ThreadPoolExecutor(8) as pool:
        assert len(set(pool.map(store, range(8)))) == 1
    assert len(warned) == 1


def test_read_only_directory_serves_what_it_has(
    directory: Path, monkeypatch: pytest.MonkeyPatch, compiled: list[TinyConfig]
) -> None:
    compile.library(CONFIG)
    compiled.clear()
    _read_only(directory, monkeypatch)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert_right(compile.get(CONFIG))
    assert compiled == []


def test_lock_of_a_killed_process_is_free(directory: Path) -> None:
    holder = start(
        "import time; from mini_flash_attention import cache\n"
        f"with cache.lock({compile._entry_name(CONFIG)!r}): print('held', flush=True); input()"
    )
    assert holder.stdout.readline() == "held\n"
    holder.kill()
    holder.wait()
    began = time.monotonic()
    assert_right(compile.get(CONFIG))
    assert time.monotonic() - began < cache.LOCK_TIMEOUT / 4


def test_lock_that_stays_held_is_given_up(
    monkeypatch: pytest.MonkeyPatch, compiled: list[TinyConfig]
) -> None:
    monkeypatch.setattr(cache, "LOCK_TIMEOUT", 0.2)
    with cache.lock(compile._entry_name(CONFIG)):
        assert_right(compile.get(CONFIG))
    assert compiled == [CONFIG]


def test_without_a_linker_object_files_are_cached(
    monkeypatch: pytest.MonkeyPatch, compiled: list[TinyConfig]
) -> None:
    monkeypatch.setattr(compile.shutil, "which", lambda name: None)
    assert_right(compile.get(CONFIG))
    compile._loaded.clear()
    assert_right(compile.get(CONFIG))
    assert compile.library(CONFIG).suffix == ".o"
    assert compiled == [CONFIG]


@pytest.fixture
def fresh_name() -> Iterator[Callable[[], str]]:
    """Names CONFIG's entry anew, as a new process would."""

    def name() -> str:
        compile._versions.cache_clear()
        compile._sources.cache_clear()
        return compile._entry_name(CONFIG)

    yield name
    compile._versions.cache_clear()
    compile._sources.cache_clear()


def test_every_version_changes_the_name(
    fresh_name: Callable[[], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    version = importlib.metadata.version
    changes = [
        (mini_flash_attention, "__version__", "999"),
        (importlib.metadata, "version", lambda p: "999" if p.startswith("nv") else version(p)),
        (importlib.metadata, "version", lambda p: "999" if p.startswith("ap") else version(p)),
        (compile, "_runtime_library", lambda: Path("cu11/lib/libcute_dsl_runtime.so")),
        (compile.platform, "machine", lambda: "riscv64"),
        (Path, "read_bytes", lambda path: b"other source code"),
    ]
    names = [fresh_name()]
    for change in changes:
        with monkeypatch.context() as patch:
            patch.setattr(*change)
            names.append(fresh_name())
    assert len(set(names)) == len(changes) + 1
    assert fresh_name() == names[0]


@pytest.mark.parametrize(
    ("driver", "flavour"), [((12, 8), "cu12"), ((13, 0), "cu13"), ((14, 1), "cu13"), (None, "cu13")]
)
def test_the_driver_decides_the_cuda_version(
    driver: tuple[int, int] | None, flavour: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    installed = importlib.util.find_spec("nvidia_cutlass_dsl").submodule_search_locations[0]
    if not (Path(installed) / flavour).exists():
        pytest.skip(f"CuTe DSL is installed without {flavour}")
    monkeypatch.setattr(compile, "driver_cuda_version", lambda: driver)
    assert flavour in compile._runtime_library.__wrapped__().parts


def test_what_is_not_installed_is_named(
    fresh_name: Callable[[], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compile, "driver_cuda_version", lambda: (11, 8))
    with pytest.raises(ImportError, match=r"supports \(11, 8\)"):
        compile._runtime_library.__wrapped__()

    def version(package: str) -> str:
        raise importlib.metadata.PackageNotFoundError(package)

    monkeypatch.setattr(importlib.metadata, "version", version)
    with pytest.raises(ImportError, match="pip install 'nvidia-cutlass-dsl"):
        fresh_name()


def test_precompile(compiled: list[TinyConfig]) -> None:
    configs = [CONFIG, OTHER, TinyConfig(arch="sm_80"), CONFIG]
    assert compile.precompile(configs, jobs=2) == 3
    assert compile.precompile(configs) == 0
    assert_right(compile.get(CONFIG))
    assert compiled == []


def test_precompile_tells_what_failed(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RuntimeError, match="1 kernels failed\n.*dtype='Float1'.*AttributeError"):
        compile.precompile([TinyConfig(dtype="Float1"), CONFIG])
    assert cache.find(compile._entry_name(CONFIG))
    monkeypatch.setenv("MINI_FLASH_ATTENTION_CACHE_DIR", "/proc/cache")
    with pytest.raises(RuntimeError, match="cannot be stored"):
        compile.precompile([CONFIG])


def test_precompile_without_a_home_fails(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _no_home(directory, monkeypatch)
    with pytest.warns(RuntimeWarning):
        assert "cannot be stored" in compile._failure(CONFIG)  # what the workers run
