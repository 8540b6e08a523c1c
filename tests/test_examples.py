"""The examples, at a size for a CPU."""

import argparse
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from examples import generate, train_gpt


@pytest.fixture(autouse=True)
def cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generate, "DEVICE", "cpu")
    monkeypatch.setattr(generate, "DTYPE", torch.float32)
    monkeypatch.setattr(train_gpt, "DEVICE", "cpu")


def test_generation_matches_recomputation(capsys: pytest.CaptureFixture[str]) -> None:
    """More requests than may run at once, and too few pages for all that may."""
    options = ["--requests", "5", "--batch", "3", "--pages", "5", "--longest", "40"]
    assert generate.main(options) == 0
    shown = capsys.readouterr().out
    assert all(f"request {name} is done" in shown for name in range(5))
    assert "0 running,     0 tokens in    0 pages,    5 free" in shown


@torch.inference_mode()
def test_a_token_that_is_not_the_likeliest_is_noticed() -> None:
    model = generate.Transformer()
    request = generate.Request(0, tokens=[1, 2, 3, 4], prompt=2, total=4)
    logits = model(torch.tensor([[1, 2, 3]]), generate.plain_attention)[0, 1:]
    request.tokens[2] = logits[0].argmax().item()
    assert generate.check(model, request) > 1e-2
    logits = model(torch.tensor([request.tokens[:3]]), generate.plain_attention)[0, 1:]
    request.tokens[3] = logits[1].argmax().item()
    assert generate.check(model, request) == 0


def test_training_is_the_same_with_both_attentions(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    plot = tmp_path / "losses.png"
    assert train_gpt.main(["--size", "tiny", "--steps", "20", "--plot", str(plot)]) == 0
    assert plot.read_bytes().startswith(b"\x89PNG")


def test_training_that_differs_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Attention that passes v on, without a look at other tokens."""
    monkeypatch.setattr(train_gpt, "ours", lambda q, k, v: 3 * v)
    assert train_gpt.main(["--size", "tiny", "--steps", "40"]) == 1


@pytest.mark.parametrize(
    "example, arguments, sentence",
    [
        (generate, "--requests 0", "--requests must be 1 or more, not 0"),
        (generate, "--batch -1", "--batch must be 1 or more, not -1"),
        (generate, "--pages 0", "--pages must be 1 or more, not 0"),
        (generate, "--longest 15", "--longest must be 16 to 256, not 15"),
        (generate, "--longest 257", "--longest must be 16 to 256, not 257"),
        (generate, "--longest 40 --pages 2", "40 tokens, but --pages 2 have room for 32 alone"),
        (generate, "--batch many", "--batch: invalid int value: 'many'"),
        (train_gpt, "--steps 0", "--steps must be 1 or more, not 0"),
        (train_gpt, "--size huge", "--size: invalid choice: 'huge'"),
        (train_gpt, "--plot nowhere/losses.png", "in a folder that exists, not nowhere/losses.png"),
        (train_gpt, "--plot losses", "--plot must be a .png in a folder that exists, not losses"),
    ],
)
def test_bad_numbers_get_a_sentence(
    example: ModuleType, arguments: str, sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    if "--plot" in arguments:
        pytest.importorskip("matplotlib")
    with pytest.raises(SystemExit) as stopped:
        example.main(arguments.split())
    assert stopped.value.code == 2 and sentence in capsys.readouterr().err


def test_losses_are_drawn_only_with_matplotlib(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(train_gpt.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit):
        train_gpt.main(["--plot", "losses.png"])
    assert "--plot needs matplotlib" in capsys.readouterr().err


@pytest.mark.parametrize("example", [generate, train_gpt])
def test_each_option_has_a_help_text(example: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    options: dict[str, str | None] = {}
    add = argparse.ArgumentParser.add_argument

    def noted(parser: argparse.ArgumentParser, *names: str, **settings: Any) -> argparse.Action:
        options[names[-1]] = settings.get("help")
        return add(parser, *names, **settings)

    monkeypatch.setattr(argparse.ArgumentParser, "add_argument", noted)
    with pytest.raises(SystemExit):
        example.main(["--help"])
    assert len(options) > 3 and all(options.values()), options
