"""For every test: uninitialised memory is NaN, and random numbers repeat."""

from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch

from mini_flash_attention import backend
from mini_flash_attention.gpu import config, fast, memory

UNUSED = torch.zeros(2, dtype=torch.int32)


def pytest_addoption(parser: pytest.Parser) -> None:
    help = "every test, with every kernel compiled for every architecture; without: 6 minutes of CPU time"
    parser.addoption("--full", action="store_true", help=help)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Without --full, tests marked so are left out; --full shows which test runs, as some take minutes."""
    if not config.getoption("--full"):
        left_out = [item for item in items if item.get_closest_marker("full")]
        items[:] = [item for item in items if not item.get_closest_marker("full")]
        config.hook.pytest_deselected(items=left_out)


@pytest.fixture(autouse=True)
def poisoned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fill what torch.empty and its kin return with NaN, so that no code reads it unnoticed."""
    for owner, names in (
        (torch, ("empty", "empty_like", "empty_strided")),
        (torch.Tensor, ("new_empty", "new_empty_strided")),
        (fast, ("allocate",)),
    ):
        for name in names:
            monkeypatch.setattr(owner, name, _poisoned(getattr(owner, name)))


def _poisoned(allocate: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    def allocate_nan(*args: object, **kwargs: object) -> torch.Tensor:
        tensor = allocate(*args, **kwargs)
        with torch.no_grad():
            return tensor.fill_(float("nan")) if tensor.is_floating_point() else tensor

    return allocate_nan


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(params=["cpu", "sm80", "sm90"])
def any_path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> torch.device:
    """Each path that runs on this machine, forced; the device of its tensors."""
    monkeypatch.setenv("MINI_FLASH_ATTENTION_BACKEND", request.param)
    if request.param == "cpu":
        return torch.device("cpu")
    device = request.getfixturevalue("gpu")
    skip_unless_it_runs(request.param, device)
    return device


@pytest.fixture(params=["sm80", "sm90"])
def path(request: pytest.FixtureRequest, gpu: torch.device, monkeypatch: pytest.MonkeyPatch) -> str:
    """Each path that runs on this GPU, forced."""
    skip_unless_it_runs(request.param, gpu)
    monkeypatch.setenv("MINI_FLASH_ATTENTION_BACKEND", request.param)
    return request.param


def skip_unless_it_runs(path: str, device: torch.device) -> None:
    arch = config.gpu_arch(torch.cuda.get_device_capability(device))
    if path not in config.paths(arch):
        pytest.skip(f"{path} does not run on {arch}")


class Properties(NamedTuple):
    major: int = 9
    minor: int = 0
    multi_processor_count: int = 4


@pytest.fixture
def pretended_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """An H100 with 4 SMs whose memory is the CPU's, where no backend is forced; plans are not remembered."""
    monkeypatch.setattr(backend, "choose", lambda device, forced: "cpu" if forced == "cpu" else "sm90")
    for name in ("attention_plan", "backward_plan", "append_plan"):
        monkeypatch.setattr(backend, name, getattr(backend, name).__wrapped__)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: Properties())
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(fast, "current_device", lambda: None)
    monkeypatch.setattr(fast, "is_capturing", lambda: False)
    monkeypatch.setattr(fast, "current_stream", lambda device: 0)
    monkeypatch.setattr(fast, "allocate", lambda shape, strides, dtype: torch.empty(shape, dtype=dtype))
    monkeypatch.setattr(memory, "argument", lambda tensor: tensor)
    monkeypatch.setattr(memory, "_floats", lambda device, size: torch.empty(size))
    monkeypatch.setattr(memory, "_zeros", lambda device, count: torch.zeros(count, dtype=torch.int32))
    devices = None, 0, 1
    monkeypatch.setattr(memory, "_stock", {i: torch.zeros(64, dtype=torch.int32) for i in devices})
    monkeypatch.setattr(memory, "_unread", {i: torch.empty(memory.UNREAD) for i in devices})
    monkeypatch.setattr(memory, "unused", lambda device: UNUSED)
    monkeypatch.setattr(memory, "not_given", lambda device: (UNUSED, UNUSED.unsqueeze(0), torch.empty(1)))


@pytest.fixture
def gpu() -> torch.device:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA GPU")
    return torch.device("cuda", torch.cuda.current_device())
