"""Which backend serves which device, and the limits that tiles must respect; no GPU is needed."""

import pytest
import torch

from mini_flash_attention import config, dispatch, flash_attn_func
from mini_flash_attention.problem import Problem

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)


@pytest.fixture(autouse=True)
def fresh() -> None:
    dispatch.choose.cache_clear()


def pretend(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int]) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "Pretended GPU")


@pytest.mark.parametrize(
    ("capability", "path"),
    [
        ((8, 0), "sm80"),
        ((8, 6), "sm80"),
        ((8, 9), "sm80"),
        ((9, 0), "sm90"),
        ((10, 0), "sm80"),
        ((12, 0), "sm80"),
    ],
)
def test_the_device_chooses(capability: tuple[int, int], path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, capability)
    assert dispatch.choose(CUDA, None) == path
    assert dispatch.choose(CUDA, "sm80") == "sm80"
    assert dispatch.choose(CUDA, "cpu") == "cpu"
    assert dispatch.choose(CPU, None) == "cpu"


@pytest.mark.parametrize("capability", [(7, 5), (13, 0)])
def test_gpus_that_no_kernel_runs_on_are_told(
    capability: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend(monkeypatch, capability)
    with pytest.raises(RuntimeError, match="Pretended GPU.*MINI_FLASH_ATTENTION_BACKEND=cpu"):
        dispatch.choose(CUDA, None)


def test_what_is_forced_must_be_possible(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, (8, 0))
    with pytest.raises(RuntimeError, match="sm90 does not run"):
        dispatch.choose(CUDA, "sm90")
    q = torch.randn(1, 3, 1, 8)
    for forced, message in (("sm80", "needs CUDA tensors"), ("gpu", "must be cpu, sm80 or sm90")):
        monkeypatch.setenv("MINI_FLASH_ATTENTION_BACKEND", forced)
        with pytest.raises(ValueError, match=message):
            flash_attn_func(q, q, q)


@pytest.mark.parametrize("arch", config.SHARED_MEMORY)
def test_tiles_fit_shared_memory(arch: str) -> None:
    barriers = 1024
    for row in config.forward_configs(arch):
        for tiles in row.variants:
            assert tiles.shared_memory + barriers <= config.SHARED_MEMORY[arch], tiles


def problem(seqlen: int, heads: int, head_dim: int) -> Problem:
    return Problem(torch.bfloat16, CUDA, 1, seqlen, seqlen, heads, heads, head_dim, 1.0)


def test_swaths_are_of_nearly_one_size() -> None:
    row = config.forward("sm90", "sm_90a", "bfloat16", 128, "causal")
    for seqlen in (1, 100, 512, 4096, 65536):
        for heads in (1, 2, 15, 16, 17, 31, 100, 4096):
            size = dispatch.swath(row.at(seqlen), problem(seqlen, heads, 128), 132)
            swaths = -(-heads // size)
            assert 1 <= size <= min(heads, 48)
            assert size * swaths - heads < swaths  # the last one lacks less than one head for each
