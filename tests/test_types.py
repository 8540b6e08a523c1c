"""Type checkers: they know in a user's script what a function returns, and find no error in the host side."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from tests.stub import STUB, stub

SCRIPT = """
from torch import Tensor

from mini_flash_attention import (
    flash_attn_func,
    flash_attn_qkvpacked_func,
    flash_attn_varlen_func,
    flash_attn_with_kvcache,
    pad_input,
    unpad_input,
)


def attend(q: Tensor, k: Tensor, v: Tensor, cu: Tensor, flag: bool) -> None:
    out: Tensor = flash_attn_func(q, k, v, causal=True, window_size=(5, -1))
    out, lse, dropped = flash_attn_func(q, k, v, 0.1, return_attn_probs=True)
    lse_of_all: Tensor = lse
    mask: Tensor | None = dropped
    either: Tensor | tuple[Tensor, Tensor, Tensor | None] = flash_attn_func(q, k, v, return_attn_probs=flag)
    packed: Tensor = flash_attn_qkvpacked_func(q, window_size=[1, 2])
    varlen: Tensor = flash_attn_varlen_func(q, k, v, cu, cu, 5, cu[0], out=out)
    varlen, lse, dropped = flash_attn_varlen_func(q, k, v, cu, None, 5, 5, return_attn_probs=True, out=out)
    decoded: Tensor = flash_attn_with_kvcache(q, k, v, cache_seqlens=3)
    decoded, lse = flash_attn_with_kvcache(q, k, v, cache_seqlens=cu, return_softmax_lse=True)
    tokens, indices, starts, longest, used = unpad_input(q, cu)
    padded: Tensor = pad_input(tokens, indices, 2, longest)
    print(out, lse_of_all, mask, either, packed, varlen, decoded, starts, used, padded)
"""
WRONG = """
from torch import Tensor

from mini_flash_attention import flash_attn_func


def attend(q: Tensor) -> Tensor:
    return flash_attn_func(q, q, q, return_attn_probs=True)
"""
WRONG_CALL = """

def wrong(x: Tensor) -> Tensor:
    return gradient(x, x, x, x)
"""
ROOT = STUB.parent.parent


def test_the_stub_is_that_of_the_functions() -> None:
    """python -m tests.stub makes it anew."""
    written, made = (ast.dump(ast.parse(text)) for text in (STUB.read_text(), stub()))
    assert written == made


@pytest.mark.full
@pytest.mark.timeout(600)
@pytest.mark.parametrize("checker", ["mypy", "basedpyright"])
def test_a_users_script(checker: str, tmp_path: Path) -> None:
    pytest.importorskip(checker)
    command = [sys.executable, "-m", checker]
    if checker == "mypy":
        command += ["--strict", "--follow-imports=silent"]
    else:
        (tmp_path / "pyrightconfig.json").write_text(
            f'{{"typeCheckingMode": "strict", "extraPaths": ["{ROOT}"]}}'
        )
        command += ["--project", str(tmp_path), "--pythonpath", sys.executable]
    environment = {"PATH": "", "HOME": str(tmp_path), "MYPYPATH": str(ROOT)}
    for text, status in ((SCRIPT, 0), (WRONG, 1)):
        script = tmp_path / "script.py"
        script.write_text(text)
        # In the folder of the script: what is checked is what a user imports.
        run = subprocess.run(
            [*command, str(script)], cwd=tmp_path, env=environment, capture_output=True, text=True
        )
        assert run.returncode == status, run.stdout + run.stderr


@pytest.mark.full
@pytest.mark.timeout(600)
def test_the_host_side(request: pytest.FixtureRequest, tmp_path: Path) -> None:
    """By mypy, as pyproject.toml has it: no error; and one if there is a wrong call."""
    pytest.importorskip("mypy")
    known = request.config.cache.mkdir("mypy")  # kept from run to run: 3 seconds, the first takes 15 to 40
    command = [sys.executable, "-m", "mypy", "--cache-dir", str(known)]
    module = Path("mini_flash_attention", "sinks.py")
    wrong = tmp_path / "wrong.py"
    wrong.write_text((ROOT / module).read_text() + WRONG_CALL)
    for shadows, status in (([], 0), (["--shadow-file", str(module), str(wrong)], 1)):
        run = subprocess.run([*command, *shadows], cwd=ROOT, capture_output=True, text=True)
        assert run.returncode == status, run.stdout + run.stderr
    assert run.stdout.count("error:") == 1 and "sinks.py" in run.stdout, run.stdout
