"""The cache of compiled kernels: threads, processes, damaged entries, unusable directories."""

import errno
import importlib.metadata
import importlib.util
import os
import re
import stat
import subprocess
import sys
import tempfile
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

from mini_flash_attention import __main__
from mini_flash_attention.gpu import cache, compile

CONFIG, OTHER = TinyConfig(), TinyConfig(dtype="Float16")


@pytest.fixture(autouse=True)
def directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The cache of this test, empty in memory and on disk."""
    path = tmp_path / "cache"
    monkeypatch.setenv("MINI_FLASH_ATTENTION_CACHE_DIR", str(path))
    monkeypatch.setattr(compile, "_loaded", {})
    monkeypatch.setattr(cache, "_warned", False)
    cache._absolute.cache_clear()
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


@pytest.fixture
def temporary(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where this process and those that it starts make their temporary files.

    Not in tmp_path: a forkserver's socket lies there, whose name may have 107 characters.
    """
    with tempfile.TemporaryDirectory() as path:
        monkeypatch.setenv("TMPDIR", path)
        monkeypatch.setattr(tempfile, "tempdir", None)
        yield Path(path)


def left_in(temporary: Path) -> list[Path]:
    return list(temporary.glob("mini_flash_attention_*"))


def give_away(path: Path, monkeypatch: pytest.MonkeyPatch, owner: int = 12345) -> None:
    """To another user: truly, or for this process alone if it may not."""
    try:
        os.chown(path, owner, -1, follow_symlinks=False)
    except PermissionError:
        given, require_trusted = path.lstat().st_ino, cache._require_trusted

        def require(path: Path, status: os.stat_result) -> None:
            uid = owner if status.st_ino == given else status.st_uid
            require_trusted(path, os.stat_result((*status[:4], uid, *status[5:])))

        monkeypatch.setattr(cache, "_require_trusted", require)


def assert_right(function: Callable, dtype: str = "float32") -> None:
    assert f"Tensor([n0], {dtype})" in signature(function)


def start(script: str | Path) -> subprocess.Popen:
    """Starts a process, of a file or of its text, that finds the same modules and speaks through pipes."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, script] if isinstance(script, Path) else [sys.executable, "-c", script]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    return subprocess.Popen(command, text=True, env=environment, **pipes)


# Forked, which spares 16 imports of torch, but before anything of the cache is used.
SIXTEEN_PROCESSES = """
import multiprocessing, sys, torch
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


def _others_may_write(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory.mkdir()
    directory.chmod(0o757)


def _group_may_write(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory.mkdir()
    directory.chmod(0o770)


def _of_another_user(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory.mkdir()
    give_away(directory, monkeypatch)


def _link_of_another_user(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = directory.with_name("target")
    target.mkdir(mode=0o700)
    directory.symlink_to(target)
    give_away(directory, monkeypatch)


def _entry_of_another_user(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for config in (CONFIG, OTHER):
        give_away(compile.library(config), monkeypatch)


def _others_may_write_to_entries(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for config in (CONFIG, OTHER):
        compile.library(config).chmod(0o666)


def _lock_of_another_user(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory.mkdir(mode=0o700)
    for config in (CONFIG, OTHER):
        path = directory / f"{compile._entry_name(config)}.lock"
        path.touch(mode=0o600)
        give_away(path, monkeypatch)


SPOILED = [
    _under_a_file,
    _in_proc,
    _full,
    _read_only,
    _entry_is_a_directory,
    _no_home,
    _nothing_can_be_loaded,
    _verified_garbage,
    _others_may_write,
    _group_may_write,
    _of_another_user,
    _link_of_another_user,
    _entry_of_another_user,
    _others_may_write_to_entries,
    _lock_of_another_user,
]


@pytest.mark.parametrize("spoil", SPOILED)
def test_unusable_directory_costs_one_warning(
    spoil: Callable,
    directory: Path,
    temporary: Path,
    monkeypatch: pytest.MonkeyPatch,
    compiled: list[TinyConfig],
) -> None:
    spoil(directory, monkeypatch)
    compiled.clear()
    with pytest.warns(RuntimeWarning, match="MINI_FLASH_ATTENTION_CACHE_DIR") as warned:
        assert_right(compile.get(CONFIG))
        assert_right(compile.get(OTHER), "float16")
    assert len(warned) == 1
    assert compiled == [CONFIG, OTHER]
    assert not list(directory.glob("*.tmp"))
    assert not left_in(temporary)


def test_what_cannot_be_loaded_anywhere_is_an_error(
    monkeypatch: pytest.MonkeyPatch, compiled: list[TinyConfig]
) -> None:
    def load(path: Path) -> Callable:
        raise RuntimeError("undefined symbol")

    monkeypatch.setattr(compile, "_open", load)
    with pytest.warns(RuntimeWarning), pytest.raises(RuntimeError, match="undefined symbol"):
        compile.get(CONFIG)
    assert compiled == [CONFIG, CONFIG]


# None of these comes to what Python does at exit.
ENDINGS = {
    "a child that is forked": "start('fork')",
    "a child of a forkserver": "start('forkserver')",
    "SIGTERM": "os.kill(os.getpid(), signal.SIGTERM)",
}
ENDING = """
import multiprocessing, os, signal
from tiny import TinyConfig, signature
from mini_flash_attention.gpu import compile

compile._compile = lambda config: (".so", open(CODE, "rb").read())  # the compiler takes seconds to import

def get():
    print("float32" in signature(compile.get(TinyConfig(live=os.getpid()))), flush=True)

def start(method):
    process = multiprocessing.get_context(method).Process(target=get)
    process.start()
    process.join()

if __name__ == "__main__":
    get()
    ENDING
"""


@pytest.mark.parametrize("ending", ENDINGS.values(), ids=ENDINGS)
def test_no_private_directory_is_left(
    ending: str, temporary: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = str(compile.library(CONFIG))
    script = tmp_path / "script.py"  # a file, as children of multiprocessing import it
    script.write_text(ENDING.replace("ENDING", ending).replace("CODE", repr(code)))
    monkeypatch.setenv("MINI_FLASH_ATTENTION_CACHE_DIR", "/proc/cache")
    assert start(script).communicate()[0].split() == ["True"] * (2 if "start" in ending else 1)
    assert not left_in(temporary)


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
        "import time; from mini_flash_attention.gpu import cache\n"
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


def test_lock_follows_no_link_and_empties_no_file(directory: Path, compiled: list[TinyConfig]) -> None:
    directory.mkdir(mode=0o700)
    precious = directory.with_name("precious")
    precious.write_text("what a user has written")
    path = directory / f"{compile._entry_name(CONFIG)}.lock"
    path.symlink_to(precious)
    assert_right(compile.get(CONFIG))
    path.unlink()
    path.write_text("a file of the user")
    path.chmod(0o600)
    with cache.lock(path.stem):
        assert path.read_text() == "a file of the user"
    assert precious.read_text() == "what a user has written"


def test_a_pipe_holds_nobody_up(directory: Path) -> None:
    directory.mkdir(mode=0o700)
    for suffix in (".lock", ".so", ".o"):
        os.mkfifo(directory / f"{compile._entry_name(CONFIG)}{suffix}", 0o600)
    assert_right(compile.get(CONFIG))


@pytest.mark.parametrize("umask", [0o000, 0o002, 0o077, 0o377])
def test_what_is_made_is_for_this_user_alone(
    umask: int, directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MINI_FLASH_ATTENTION_CACHE_DIR", str(directory / "of" / "mine"))
    before = os.umask(umask)
    try:
        with cache.lock("kernel"):
            path = cache.store("kernel", ".so", b"code")
    finally:
        os.umask(before)
    assert cache.find("kernel") == path
    modes = {path: stat.S_IMODE(path.lstat().st_mode) for path in tmp_path.rglob("*")}
    assert len(modes) == 5
    assert all(mode == (0o700 if path.is_dir() else 0o600) for path, mode in modes.items())


def test_a_link_of_our_own_is_followed(directory: Path, compiled: list[TinyConfig]) -> None:
    target = directory.with_name("target")
    target.mkdir(mode=0o700)
    directory.symlink_to(target)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert_right(compile.get(CONFIG))
    assert len(list(target.glob("*.so"))) == 1


def test_a_read_only_cache_of_root_serves_everybody(
    directory: Path, monkeypatch: pytest.MonkeyPatch, compiled: list[TinyConfig]
) -> None:
    path = compile.library(CONFIG)
    compiled.clear()
    path.chmod(0o444)
    directory.chmod(0o555)
    give_away(directory, monkeypatch, owner=0)
    give_away(path, monkeypatch, owner=0)
    monkeypatch.setattr(os, "geteuid", lambda: 12345)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert_right(compile.get(CONFIG))
    assert compiled == []


def test_nothing_of_unix_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "geteuid")
    monkeypatch.setitem(sys.modules, "fcntl", None)
    with cache.lock("kernel"):
        assert cache.find("kernel") is None
        path = cache.store("kernel", ".so", b"code")
        assert cache.find("kernel") == path


# Where the cache is


def test_the_directory_follows_xdg(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/user")
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    monkeypatch.setenv("MINI_FLASH_ATTENTION_CACHE_DIR", "~/named")
    assert cache.directory() == Path("/home/user/named")
    monkeypatch.setenv("MINI_FLASH_ATTENTION_CACHE_DIR", "")
    assert cache.directory() == Path("/xdg/mini_flash_attention")
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")  # which its specification says to ignore
    assert cache.directory() == Path("/home/user/.cache/mini_flash_attention")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache.directory() == Path("/home/user/.cache/mini_flash_attention")


def test_a_relative_directory_stays_where_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, compiled: list[TinyConfig]
) -> None:
    """Also for the processes that precompile."""
    monkeypatch.setenv("MINI_FLASH_ATTENTION_CACHE_DIR", "relative")
    monkeypatch.chdir(tmp_path)
    assert cache.directory() == tmp_path / "relative"
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert compile.precompile([CONFIG]) == 1
    assert cache.entries() == [compile.library(CONFIG)] == list((tmp_path / "relative").glob("*.so"))
    assert compiled == []


# Forks while another thread compiles

FORK = """
import os, signal, sys, threading, time
from tiny import TinyConfig, signature
from mini_flash_attention.gpu import compile

thread = threading.Thread(target=compile.get, args=(TinyConfig(),))
thread.start()
while "cutlass" not in sys.modules:  # it takes seconds to import
    time.sleep(0.001)
assert thread.is_alive()
child = os.fork()
if not child:
    signal.alarm(60)
    assert "float16" in signature(compile.get(TinyConfig(dtype="Float16")))
    os._exit(0)
print(os.waitpid(child, 0)[1])
thread.join()
"""


def test_a_child_can_compile_what_its_parent_was_compiling() -> None:
    assert start(FORK).communicate()[0] == "0\n"


FORK_THAT_DOES_NOT_WAIT = """
import os, threading, time
from mini_flash_attention.gpu import cache, compile

compile.FORK_TIMEOUT = 0.1
cache.LOCK_TIMEOUT = 20

def compile_for_long():
    with compile._one_thread, cache.lock("kernel"):
        begun.set()
        end.wait()

begun, end = threading.Event(), threading.Event()
thread = threading.Thread(target=compile_for_long)
thread.start()
begun.wait()
reading, writing = os.pipe()
child = os.fork()
if not child:
    os.close(writing)
    got_it = compile._one_thread.acquire(timeout=10)
    os.read(reading, 1)  # returns when the parent is done
    os._exit(not got_it)
end.set()
thread.join()
began = time.monotonic()
with compile._one_thread, cache.lock("kernel"):
    print(time.monotonic() - began < 10)
os.close(writing)
print(os.waitpid(child, 0)[1])
"""


def test_a_child_holds_no_lock_of_its_parent() -> None:
    assert start(FORK_THAT_DOES_NOT_WAIT).communicate()[0] == "True\n0\n"


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
        (compile, "__version__", "999"),
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
    with monkeypatch.context() as patch:  # its files are gone, which pip does not know
        patch.setattr(importlib.util, "find_spec", lambda name: None)
        with pytest.raises(ImportError, match=r"for CUDA \[\].*pip install"):
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


@pytest.mark.full
@pytest.mark.timeout(600)  # 14 kernels
def test_the_command_compiles_once(directory: Path) -> None:
    """What one process has compiled the next one finds: each kernel of a small selection, twice."""
    selection = ("--arch", "sm_80", "--head-dim", "64", "--dtype", "float16", "--mask", "full")
    command = [sys.executable, "-m", "mini_flash_attention", "precompile", *selection]
    first, second = (
        subprocess.run(command, check=True, capture_output=True, text=True).stdout for _ in range(2)
    )
    assert re.match(r"[1-9]\d* ", first), first
    assert second.startswith("0 "), second


def test_precompile_tells_what_failed(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RuntimeError, match="1 kernels failed\n.*dtype='Float1'.*AttributeError"):
        compile.precompile([TinyConfig(dtype="Float1"), CONFIG])
    assert cache.find(compile._entry_name(CONFIG))
    monkeypatch.setenv("MINI_FLASH_ATTENTION_CACHE_DIR", "/proc/cache")
    with pytest.raises(RuntimeError, match="cannot be stored"):
        compile.precompile([CONFIG])


@pytest.mark.parametrize("spoil", [_no_home, _others_may_write])
def test_precompile_needs_a_directory(
    spoil: Callable, directory: Path, monkeypatch: pytest.MonkeyPatch, compiled: list[TinyConfig]
) -> None:
    spoil(directory, monkeypatch)
    with pytest.raises(RuntimeError, match="cannot be stored .*MINI_FLASH_ATTENTION_CACHE_DIR"):
        compile.precompile([CONFIG])
    assert compiled == []


@pytest.mark.parametrize(
    ("asked", "meant"),
    [
        ("sm_90", ": did you mean sm_90a[?]"),
        ("9.0", ": did you mean sm_90a[?]"),
        ("sm100", ": did you mean sm_100a[?]"),
        ("sm_80a", ": did you mean sm_80[?]"),
        ("sm_75", ""),
        ("hopper", ""),
    ],
)
def test_precompile_names_the_arch_that_was_meant(
    asked: str, meant: str, monkeypatch: pytest.MonkeyPatch, compiled: list[TinyConfig]
) -> None:
    monkeypatch.setattr(sys, "argv", ["mini_flash_attention", "precompile", "--arch", "sm_80", asked])
    with pytest.raises(SystemExit, match=f"^--arch is one of sm_80, .*, not {asked}{meant}$"):
        __main__.main()
    assert compiled == []


def test_env_tells_why_a_cache_is_not_used(
    directory: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(sys, "argv", ["mini_flash_attention", "env"])
    cache.store("kernel", ".so", bytes(10**6))
    __main__.main()
    assert f"{directory}: 1 kernels, 1.0 MB" in capsys.readouterr().out
    directory.chmod(0o777)
    __main__.main()
    assert f"others may write to {directory}" in capsys.readouterr().out


def test_packages_newer_than_tested_are_named_where_they_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(config: TinyConfig) -> tuple[str, bytes]:
        raise AttributeError("module 'cutlass' has no attribute 'jit'")

    monkeypatch.setattr(compile, "_compile", fail)
    with pytest.raises(AttributeError, match="^module 'cutlass' has no attribute 'jit'$"):
        compile.get(CONFIG)
    version, newer = importlib.metadata.version, "nvidia-cutlass-dsl"
    monkeypatch.setattr(importlib.metadata, "version", lambda p: "4.10.0" if p == newer else version(p))
    named = r"no attribute 'jit'.* nvidia-cutlass-dsl 4.10.0, .* pip install 'nvidia-cutlass-dsl==4.8.\*'$"
    with pytest.raises(RuntimeError, match=named):
        compile.get(CONFIG)
    assert re.search(named, compile._failure(CONFIG))
