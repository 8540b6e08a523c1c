"""The wheel of kernels: made, installed by pip, used without the compiler; and not where it does not fit."""

import base64
import hashlib
import importlib.util
import os
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

if importlib.util.find_spec("nvidia_cutlass_dsl") is None:
    pytest.skip("CuTe DSL is not installed", allow_module_level=True)

from tiny import TinyConfig, signature

from mini_flash_attention import __main__
from mini_flash_attention.gpu import cache, compile, config, wheel

CONFIG, OTHER = TinyConfig(), TinyConfig(dtype="Float16")


@pytest.fixture(autouse=True)
def directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The cache of this test; nothing is remembered of another's wheel."""
    monkeypatch.setenv("MINI_FLASH_ATTENTION_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(compile, "_loaded", {})
    cache._absolute.cache_clear()
    wheel.installed.cache_clear()
    yield tmp_path / "cache"
    wheel.installed.cache_clear()
    sys.modules.pop(wheel.NAME, None)


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where a wheel with the kernel of CONFIG is installed, by pip."""
    path = wheel.write(tmp_path / "wheels", [compile.library(CONFIG)], compile.made_for())
    site = tmp_path / "site"
    command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-index", "--target"]
    subprocess.run([*command, site, path], check=True)
    wheel.installed.cache_clear()
    monkeypatch.syspath_prepend(site)
    monkeypatch.setenv("MINI_FLASH_ATTENTION_CACHE_DIR", str(tmp_path / "empty"))
    return site


WITHOUT_COMPILER = """
import sys
sys.modules["cutlass"] = None  # to import it is an error
from tiny import TinyConfig, signature
from mini_flash_attention.gpu import compile
assert "float32" in signature(compile.get(TinyConfig()))
try:
    compile.get(TinyConfig(dtype="Float16"))
except ImportError:
    print("not there")
"""


def test_a_process_uses_it_without_the_compiler(site: Path, tmp_path: Path) -> None:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", WITHOUT_COMPILER]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.stdout == "not there\n", done.stderr
    assert not list(tmp_path.glob("empty/*.so"))


def test_the_cache_comes_first_and_the_wheel_counts_as_there(
    site: Path, directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert compile.library(CONFIG).parent == site / wheel.NAME
    assert compile.precompile([CONFIG]) == 0
    assert compile.precompile([CONFIG, OTHER], jobs=1) == 1
    monkeypatch.setenv("MINI_FLASH_ATTENTION_CACHE_DIR", str(directory))
    assert compile.library(CONFIG).parent == directory


@pytest.mark.parametrize("damage", [lambda code: code[:-1], lambda code: b"\x7fELF", lambda code: b""])
def test_a_damaged_entry_is_compiled(site: Path, damage) -> None:
    (entry,) = (site / wheel.NAME).glob("*.so")
    entry.write_bytes(damage(entry.read_bytes()))
    assert compile.library(CONFIG).parent != site / wheel.NAME
    assert "float32" in signature(compile.get(CONFIG))


@pytest.mark.parametrize(
    "made_for, said",
    [
        ('["0.0.1", "4.8.0.dev20260101", "0123456789abcdef"]', "0.0.1 4.8.0.dev20260101 0123456789ab,"),
        *((text, "something unknown") for text in ("{", "null", "3", "[]", '{"a": 1}', None)),
    ],
)
def test_one_that_does_not_fit_is_not_used(site: Path, made_for: str | None, said: str) -> None:
    """With one warning, however many kernels are asked for."""
    facts = site / wheel.NAME / wheel.MADE_FOR
    facts.unlink() if made_for is None else facts.write_text(made_for)
    with pytest.warns(RuntimeWarning, match=f"{wheel.NAME} is for {said}.*make it anew") as warned:
        for row in (CONFIG, OTHER):
            assert compile.library(row).parent != site / wheel.NAME
    assert len(warned) == 1


def test_without_one_nothing_is_said(recwarn: pytest.WarningsRecorder) -> None:
    assert wheel.installed(compile.made_for()) is None and not recwarn.list


def test_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of what the command line asks for; made twice it is the same file."""
    monkeypatch.setattr(config, "configs", lambda arch: iter([CONFIG, OTHER]))
    command = ["mini_flash_attention", "precompile", "--arch", "sm_90a", "--all", "--wheel"]
    for folder in ("one", "two"):
        monkeypatch.setattr(sys, "argv", [*command, str(tmp_path / folder)])
        __main__.main()
    assert "2 kernels compiled, 0 were in" in (printed := capsys.readouterr().out)
    assert "0 kernels compiled, 2 were in" in printed
    one, two = (next((tmp_path / folder).iterdir()) for folder in ("one", "two"))
    assert f"2 kernels in {one}" in printed and one.name == two.name
    assert one.read_bytes() == two.read_bytes()
    with zipfile.ZipFile(one) as archive:
        (record,) = (name for name in archive.namelist() if name.endswith("/RECORD"))
        rows = [line.split(",") for line in archive.read(record).decode().splitlines()]
        assert [name for name, *_ in rows] == archive.namelist() and rows.pop() == [record, "", ""]
        for name, digest, size in rows:
            content = archive.read(name)
            wanted = base64.urlsafe_b64decode(digest.removeprefix("sha256=") + "=")
            assert hashlib.sha256(content).digest() == wanted and len(content) == int(size)

    (tmp_path / "file").touch()
    monkeypatch.setattr(sys, "argv", [*command, str(tmp_path / "file")])
    with pytest.raises(SystemExit, match="file"):
        __main__.main()
