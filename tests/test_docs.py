"""The README and the pages of docs/: their code runs, their commands parse, their links lead somewhere."""

import os
import re
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import pytest
import torch

from mini_flash_attention import __main__

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted(DOCS.glob("*.md"))]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
OPTIONAL = ["transformers"]
AS_TORCHRUN = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
COMMAND = "python -m mini_flash_attention "


def name(page: Path) -> str:
    return str(page.relative_to(ROOT))


def blocks(page: Path, language: str) -> Iterator[tuple[int, str]]:
    """The fenced blocks of a language, each with the number of the line above its first one."""
    text = page.read_text(encoding="utf-8")
    for block in FENCE.finditer(text):
        if block[1] == language:
            yield text.count("\n", 0, block.start(2)), block[2]


def commands() -> list[str]:
    """Every command line of this package that a page gives."""
    lines = [line for page in PAGES for _, block in blocks(page, "") for line in block.splitlines()]
    return sorted({line.partition(COMMAND)[2].partition("#")[0].strip() for line in lines if COMMAND in line})


@pytest.mark.parametrize("page", [page for page in PAGES if any(blocks(page, "python"))], ids=name)
def test_code_runs(page: Path) -> None:
    """A page's blocks in order, in one namespace; what they say of a GPU, where there is one."""
    text = page.read_text(encoding="utf-8")
    for library in OPTIONAL:
        if re.search(rf"^from {library}\b", text, re.MULTILINE):
            pytest.importorskip(library)
    namespace = {"__name__": "docs"}
    with mock.patch.dict(os.environ, AS_TORCHRUN):
        for line, block in blocks(page, "python"):
            exec(compile("\n" * line + block, str(page), "exec"), namespace)


@pytest.mark.parametrize("command", commands())
def test_commands_are_understood(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is compiled for it."""
    asked_for = []
    monkeypatch.setattr(sys, "argv", ["mini_flash_attention", *shlex.split(command)])
    precompile = "mini_flash_attention.gpu.compile.precompile"
    monkeypatch.setattr(precompile, lambda configs, jobs: asked_for.extend(configs) or 0)
    monkeypatch.setattr("mini_flash_attention.gpu.compile.library", lambda config: config)
    monkeypatch.setattr("mini_flash_attention.gpu.wheel.write", lambda folder, entries, made_for: folder)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    __main__.main()
    assert bool(asked_for) == command.startswith("precompile")


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_lead_somewhere(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    links = [link for link in re.findall(r"\]\(([^)]+)\)", text) if not link.startswith("http")]
    broken = [link for link in links if not (page.parent / link.partition("#")[0]).exists()]
    assert not broken


def test_index_has_every_page() -> None:
    index = (DOCS / "README.md").read_text(encoding="utf-8")
    missing = [page.name for page in DOCS.glob("*.md") if f"({page.name})" not in index]
    assert missing == ["README.md"]


def test_house_has_every_file() -> None:
    """Each module of the package is told of, and nothing is told of that is gone."""
    _, picture = next(blocks(DOCS / "house.md", ""))
    package, told = ROOT / "mini_flash_attention", {}
    for pattern in re.findall(r"[\w/*]+\.py\b", picture):
        told[pattern] = set(package.glob(pattern))
    assert [pattern for pattern, files in told.items() if not files] == []
    files = {file for file in package.glob("**/*.py") if file.stat().st_size}
    assert files.difference(*told.values()) == set()


def test_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 160
