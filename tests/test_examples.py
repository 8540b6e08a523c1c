"""The examples, at a size for a CPU."""

from pathlib import Path

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
