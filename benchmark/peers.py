"""The implementations that are compared, each behind one signature."""

import importlib
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from mini_flash_attention import flash_attn_func

NAMES = ("mini", "mini-sm80", "sdpa-flash", "sdpa-cudnn", "fa2", "fa3", "fa4")
_PACKAGES = {"fa2": "flash_attn", "fa3": "flash_attn_interface", "fa4": "flash_attn.cute"}
BACKEND = "MINI_FLASH_ATTENTION_BACKEND"


class Implementation(NamedTuple):
    """`call(q, k, v, causal)` takes and returns (batch, seqlen, heads, head_dim) tensors.

    `scope()` is entered around many calls, so that choosing a backend is not timed with them.
    """

    call: Callable[[Tensor, Tensor, Tensor, bool], Tensor]
    scope: Callable[[], AbstractContextManager] = nullcontext


Implementations = Mapping[str, Implementation]


def available(device: str) -> tuple[dict[str, Implementation], dict[str, str]]:
    """The implementations that run here, and for each of the others why it does not."""
    found, absent = {}, {}
    for name in NAMES:
        try:
            found[name] = _make(name, device)
        except Exception as reason:  # a broken installation must not stop the comparison
            absent[name] = str(reason).split("\n")[0]
    return found, absent


def _make(name: str, device: str) -> Implementation:
    if name == "mini":
        return Implementation(_mini)
    if name == "sdpa-flash":
        return Implementation(_sdpa, lambda: sdpa_kernel(SDPBackend.FLASH_ATTENTION))
    if device == "cpu":
        raise RuntimeError("needs a GPU")
    if name == "sdpa-cudnn":
        return Implementation(_sdpa, lambda: sdpa_kernel(SDPBackend.CUDNN_ATTENTION))
    if name == "mini-sm80":
        if torch.cuda.get_device_capability() != (9, 0):
            raise RuntimeError("is what mini runs on this GPU")
        return Implementation(_mini, forced_sm80)
    return _official(importlib.import_module(_PACKAGES[name]).flash_attn_func)


def _mini(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
    return flash_attn_func(q, k, v, causal=causal)


@contextmanager
def forced_sm80() -> Iterator[None]:
    before = os.environ.get(BACKEND)
    os.environ[BACKEND] = "sm80"
    try:
        yield
    finally:
        os.environ.pop(BACKEND) if before is None else os.environ.update({BACKEND: before})


def _sdpa(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    return F.scaled_dot_product_attention(q, k, v, is_causal=causal).transpose(1, 2)


def _official(function: Callable) -> Implementation:
    """Some versions return `out`, some `(out, lse)`."""

    def call(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
        out = function(q, k, v, causal=causal)
        return out[0] if isinstance(out, tuple) else out

    return Implementation(call)
