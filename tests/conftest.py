"""For every test: uninitialised memory is NaN, and random numbers repeat."""

from collections.abc import Callable

import pytest
import torch

from mini_flash_attention import counters, decode, dispatch, plans, workspace
from mini_flash_attention.gpu import config


@pytest.fixture(autouse=True)
def poisoned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fill what torch.empty and its kin return with NaN, so that no code reads it unnoticed."""
    for owner, names in (
        (torch, ("empty", "empty_like", "empty_strided")),
        (torch.Tensor, ("new_empty", "new_empty_strided")),
        (plans, ("allocate",)),
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


@pytest.fixture
def memory_of_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """What plans keep on a GPU is on the CPU, for tests that pretend to have one."""
    for module in (decode, dispatch, plans):
        monkeypatch.setattr(module, "argument", lambda tensor: tensor)
    monkeypatch.setattr(plans, "allocate", lambda shape, strides, dtype: torch.empty(shape, dtype=dtype))
    monkeypatch.setattr(counters, "_zeros", lambda device, count: torch.zeros(count, dtype=torch.int32))
    monkeypatch.setattr(workspace, "_empty", lambda size, device: torch.empty(size))
    monkeypatch.setattr(plans, "_unread_memory", lambda device: torch.empty(plans.UNREAD))


@pytest.fixture
def gpu() -> torch.device:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA GPU")
    return torch.device("cuda", torch.cuda.current_device())
