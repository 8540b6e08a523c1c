"""MINI_FLASH_ATTENTION_CHECK: values on the device that a call must not be given."""

from typing import Any

import pytest
import torch
from torch import Tensor

from mini_flash_attention import flash_attn_varlen_func, flash_attn_with_kvcache

INT_MAX = 2**31 - 1


@pytest.fixture(autouse=True)
def switch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MINI_FLASH_ATTENTION_CHECK", "1")


def int32(values: list, device: torch.device) -> Tensor:
    return torch.tensor(values, dtype=torch.int32, device=device)


def on_device(arguments: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """Lists become int32 tensors."""
    return {name: int32(x, device) if isinstance(x, list) else x for name, x in arguments.items()}


def varlen(device: torch.device, form: str, **changes: Any) -> Tensor:
    """Three sequences: 3, 0 and 7 queries; 4, 2 and 6 keys. 12 rows of q; keys in one of three forms."""
    q = torch.randn(12, 2, 64, device=device, dtype=torch.float16)
    k_shape = {"packed": (12, 2, 64), "rows": (3, 8, 2, 64), "paged": (5, 4, 2, 64)}[form]
    k = torch.randn(k_shape, device=device, dtype=torch.float16)
    arguments: dict[str, Any] = {"cu_seqlens_q": [0, 3, 3, 10], "cu_seqlens_k": [0, 4, 6, 12]}
    arguments |= {"max_seqlen_q": 7, "max_seqlen_k": 6}
    if form == "rows":
        arguments |= {"cu_seqlens_k": None, "seqused_k": [4, 2, 6]}
    if form == "paged":
        arguments["block_table"] = [[4, INT_MAX], [0, -1], [2, 1]]
    return flash_attn_varlen_func(q, k, k, **on_device(arguments | changes, device))


VARLEN = [
    ("packed", {"cu_seqlens_q": [1, 3, 3, 10]}, "cu_seqlens_q must start at 0, not 1"),
    ("packed", {"cu_seqlens_q": [0, 3, 2, 9]}, "cu_seqlens_q: sequence 1 ends at 2, before its start at 3"),
    ("packed", {"cu_seqlens_q": [0, 6, 6, 13]}, "cu_seqlens_q: sequence 2 ends at 13, but there are 12"),
    ("packed", {"max_seqlen_q": 6}, "cu_seqlens_q: sequence 2 has 7 tokens, but max_seqlen_q is 6"),
    ("packed", {"max_seqlen_q": torch.tensor(2)}, "sequence 0 has 3 tokens, but max_seqlen_q is 2"),
    ("packed", {"cu_seqlens_k": [0, 4, 13, 12]}, "cu_seqlens_k: sequence 1 ends at 13, but there are 12"),
    ("packed", {"cu_seqlens_k": [0, -1, 6, 12]}, "cu_seqlens_k: sequence 0 ends at -1, before its start"),
    ("packed", {"max_seqlen_k": 5}, "cu_seqlens_k: sequence 2 has 6 tokens, but max_seqlen_k is 5"),
    ("packed", {"seqused_k": [4, 3, 6]}, "seqused_k of sequence 1 must be in 0 to 2, not 3"),
    ("packed", {"seqused_k": [4, 2, -1]}, "seqused_k of sequence 2 must be in 0 to 6, not -1"),
    ("rows", {"seqused_k": [4, 2, 9]}, "seqused_k of sequence 2 must be in 0 to 8, not 9"),
    ("rows", {"seqused_k": [7, 2, 6]}, "seqused_k: sequence 0 has 7 tokens, but max_seqlen_k is 6"),
    ("paged", {"cu_seqlens_k": [0, 4, 6, 15]}, "cu_seqlens_k: sequence 2 has 9 tokens"),
    ("paged", {"cu_seqlens_k": [0, 4, 6, 15], "max_seqlen_k": 9}, "cu_seqlens_k of sequence 2 .* not 9"),
    ("paged", {"cu_seqlens_k": [0, 5, 7, 13]}, r"block_table\[0, 1\], a page of sequence 0, .* not 21474"),
    ("paged", {"block_table": [[4, 0], [0, -1], [2, 5]]}, r"block_table\[2, 1\], .* sequence 2, .* not 5"),
    ("paged", {"seqused_k": [5, 2, 6]}, r"block_table\[0, 1\], a page of sequence 0, .* not 21474"),
]  # fmt: skip


@pytest.mark.parametrize(("form", "changes", "message"), VARLEN, ids=[case[2] for case in VARLEN])
def test_varlen(any_path: torch.device, form: str, changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        varlen(any_path, form, **changes)


def with_cache(device: torch.device, paged: bool = False, **changes: Any) -> Tensor:
    """Two sequences of 5 and 14 keys in a cache of three rows of 16, two queries, one new key."""
    q, k = (torch.randn(2, n, 2, 64, device=device, dtype=torch.float16) for n in (2, 1))
    k_cache = torch.randn((7, 4) if paged else (3, 16), dtype=torch.float16).to(device)
    k_cache = k_cache[..., None, None].repeat(1, 1, 2, 64)
    cos = torch.ones(changes.pop("seqlen_ro", 16), 8, device=device, dtype=torch.float16)
    arguments: dict[str, Any] = {"k": k, "v": k, "rotary_cos": cos, "rotary_sin": cos}
    arguments |= {"cache_seqlens": [5, 14], "cache_batch_idx": [2, 0], "cache_leftpad": [2, 0]}
    if paged:
        arguments["block_table"] = [[0, 1, 2, 3], [INT_MAX] * 4, [INT_MAX, 6, -1, -1]]
        arguments["cache_leftpad"] = [4, 0]
    return flash_attn_with_kvcache(q, k_cache, k_cache.clone(), **on_device(arguments | changes, device))


CACHE = [
    ({"cache_seqlens": [5, 16]}, "cache_seqlens of sequence 1 must be in 0 to 15, not 16"),
    ({"cache_seqlens": [-1, 14]}, "cache_seqlens of sequence 0 must be in 0 to 15, not -1"),
    ({"cache_leftpad": [7, 0]}, "cache_leftpad of sequence 0 must be in 0 to 6, not 7"),
    ({"cache_leftpad": [2, -3]}, "cache_leftpad of sequence 1 must be in 0 to 15, not -3"),
    ({"cache_batch_idx": [2, 3]}, "cache_batch_idx of sequence 1 must be in 0 to 2, not 3"),
    ({"cache_batch_idx": [2, 2]}, "cache_batch_idx: k and v are appended to one sequence twice"),
    ({"cache_batch_idx": [-1, 0]}, "cache_batch_idx of sequence 0 must be in 0 to 2, not -1"),
    ({"seqlen_ro": 14}, "rotary_cos has 14 rows, but sequence 1 needs 15"),
    ({"seqlen_ro": 15, "causal": True}, "rotary_cos has 15 rows, but sequence 1 needs 16"),
    ({"paged": True, "cache_leftpad": [3, 0]}, r"block_table\[2, 0\], a page of sequence 0, .* not 21474"),
    ({"paged": True, "cache_seqlens": [8, 14]}, r"block_table\[2, 2\], a page of sequence 0, .* not -1"),
    ({"paged": True, "cache_batch_idx": [1, 0]}, r"block_table\[1, 1\], a page of sequence 0"),
    ({"paged": True, "cache_batch_idx": [3, 0]}, "cache_batch_idx of sequence 0 must be in 0 to 2, not 3"),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "message"), CACHE, ids=[case[1] for case in CACHE])
def test_cache(any_path: torch.device, changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        with_cache(any_path, **changes)


def test_what_is_right_passes(any_path: torch.device) -> None:
    for form in ("packed", "rows", "paged"):
        varlen(any_path, form)
    varlen(any_path, "packed", seqused_k=[0, 2, 6])
    varlen(any_path, "packed", max_seqlen_q=torch.tensor(7, device=any_path))
    varlen(any_path, "paged", seqused_k=[4, 5, 6])  # sequence 1 has no queries: its pages need not exist
    for paged in (False, True):
        with_cache(any_path, paged)
    with_cache(any_path, cache_seqlens=14)
    with_cache(any_path, k=None, v=None, rotary_cos=None, rotary_sin=None, cache_seqlens=None)


def test_the_cpu_is_always_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    """There nothing waits. A longest length is a hint all the same."""
    for value in (None, ""):
        monkeypatch.delenv("MINI_FLASH_ATTENTION_CHECK")
        if value is not None:
            monkeypatch.setenv("MINI_FLASH_ATTENTION_CHECK", value)
        with pytest.raises(ValueError, match=r"block_table\[2, 1\], .* sequence 2, .* not 5"):
            varlen(torch.device("cpu"), "paged", block_table=[[4, 0], [0, -1], [2, 5]])
        with pytest.raises(ValueError, match="cu_seqlens_q: sequence 2 ends at 13, but there are 12"):
            varlen(torch.device("cpu"), "packed", cu_seqlens_q=[0, 6, 6, 13])
        with pytest.raises(ValueError, match="rotary_cos has 14 rows"):
            with_cache(torch.device("cpu"), seqlen_ro=14)
        varlen(torch.device("cpu"), "packed", max_seqlen_q=6)
        monkeypatch.setenv("MINI_FLASH_ATTENTION_CHECK", "")


def test_it_waits_for_no_gpu(gpu: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MINI_FLASH_ATTENTION_CHECK")
    with_cache(gpu, seqlen_ro=14)


@pytest.mark.parametrize("value", ["0", "false", "No", "off"])
def test_off(any_path: torch.device, value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MINI_FLASH_ATTENTION_CHECK", value)
    varlen(any_path, "packed", max_seqlen_q=6)
    with_cache(any_path, seqlen_ro=14)
