"""The implementations that are compared, each behind the same signatures."""

import functools
import importlib
import importlib.util
import os
import shutil
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from types import ModuleType
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention import flex_attention as flex
from torch.nn.attention.bias import causal_lower_right

import mini_flash_attention
from benchmark.functions import Functions
from mini_flash_attention import BlockMask, create_block_mask, masks

NAMES = ("mini", "mini-sm80", "sdpa-flash", "sdpa-cudnn", "flex", "fa2", "fa3", "fa4")
_PACKAGES = {"fa2": "flash_attn", "fa4": "flash_attn.cute"}
BACKEND = "MINI_FLASH_ATTENTION_BACKEND"


class Implementation(NamedTuple):
    """Functions that take and return (batch, seqlen, heads, head_dim) tensors, None where it has none.

    `call(q, k, v, causal, window)`: attention; with a window, which is causal, a row sees that many keys
    before its own. Ours takes flash_attn's other keywords too.
    `varlen(q, k, v, cu_seqlens, longest)`: causal self-attention of packed (tokens, heads, head_dim)
    sequences; sequence i is cu_seqlens[i] to cu_seqlens[i + 1].
    `decode(q, k, v, seqlens)`: k and v are a cache; ours takes flash_attn's other keywords too.
    `functions(q, k, v, causal, functions)`: prepares attention with functions.Functions, which is then called
    without arguments.
    `create_block_mask(mask_mod, batch, heads, seqlen_q, seqlen_k, device)`: makes a block mask.
    `scope()` is entered around many calls, so that choosing a backend is not timed with them.
    """

    call: Callable[..., Tensor] | None = None
    scope: Callable[[], AbstractContextManager] = nullcontext
    varlen: Callable[[Tensor, Tensor, Tensor, Tensor, int], Tensor] | None = None
    decode: Callable[..., Tensor] | None = None
    functions: Callable[[Tensor, Tensor, Tensor, bool, Functions], Callable[[], Tensor]] | None = None
    create_block_mask: Callable[..., object] | None = None


Implementations = Mapping[str, Implementation]


def available(device: str) -> tuple[dict[str, Implementation], dict[str, str]]:
    """The implementations that run here, and for each of the others why it does not."""
    found, absent = {}, {}
    for name in NAMES:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of others' packages, at their import
                found[name] = _make(name, device)
        except Exception as reason:  # a broken installation must not stop the comparison
            absent[name] = str(reason).split("\n")[0]
    return found, absent


def _make(name: str, device: str) -> Implementation:
    if name == "mini":
        suites = {"varlen": _mini_varlen, "decode": _mini_decode, "functions": _mini_functions}
        return Implementation(_mini, **suites, create_block_mask=create_block_mask)
    if name == "sdpa-flash":
        return _pytorch(SDPBackend.FLASH_ATTENTION)
    if device == "cpu":
        raise RuntimeError("needs a GPU")
    if name == "sdpa-cudnn":
        return _pytorch(SDPBackend.CUDNN_ATTENTION)
    if name == "flex":
        return _flex()
    if name == "mini-sm80":
        if torch.cuda.get_device_capability() != (9, 0):
            raise RuntimeError("is what mini runs on this GPU")
        # It has no decode: that kernel is the same one on every GPU.
        return Implementation(_mini, forced_sm80, _mini_varlen)
    return _official(_fa3() if name == "fa3" else importlib.import_module(_PACKAGES[name]))


def _fa3() -> ModuleType:
    """FlashAttention-3, built from source or the wheel `fa3-fwd`: bf16 forward, no windows or pages."""
    if importlib.util.find_spec("flash_attn_interface") is not None:
        return importlib.import_module("flash_attn_interface")
    # The wheel's interface imports its build flags under the name that they have in the source.
    sys.modules.setdefault("flash_attn_config", importlib.import_module("fa3_fwd_config"))
    return importlib.import_module("fa3_fwd_interface")


def _mini(
    q: Tensor, k: Tensor, v: Tensor, causal: bool, window: int | None = None, **options: object
) -> Tensor:
    if window is not None:
        options["window_size"] = (window, 0)
    return mini_flash_attention.flash_attn_func(q, k, v, causal=causal, **options)


def _mini_functions(
    q: Tensor, k: Tensor, v: Tensor, causal: bool, functions: Functions
) -> Callable[[], Tensor]:
    if functions.cu_seqlens is not None:
        return _mini_documents(q, k, v, functions.cu_seqlens, functions.builtin)
    options = functions.builtin or {
        "score_mod": functions.score_mod,
        "s_aux": functions.s_aux,
        "block_mask": _mini_block_mask(functions, q.shape[1], q.device),
    }
    return functools.partial(_mini, q, k, v, causal, **options)


def _mini_documents(
    q: Tensor, k: Tensor, v: Tensor, starts: Tensor, options: Mapping[str, object]
) -> Callable[[], Tensor]:
    """The documents of each sequence of a batch as sequences of their own."""
    batch, seqlen = q.shape[:2]
    cu_seqlens = torch.cat([starts[:1], *(starts[1:] + i * seqlen for i in range(batch))])
    longest = int(starts.diff().max())

    def attention() -> Tensor:
        packed = (x.flatten(0, 1) for x in (q, k, v))
        lengths = (cu_seqlens, cu_seqlens, longest, longest)
        out = mini_flash_attention.flash_attn_varlen_func(*packed, *lengths, **options)
        return out.unflatten(0, (batch, seqlen))

    return attention


def _mini_block_mask(functions: Functions, seqlen: int, device: torch.device) -> BlockMask | None:
    if functions.full is not None:
        return BlockMask.from_blocks(torch.zeros_like(functions.full), functions.full, seqlen, seqlen)
    if functions.mask_mod is None:
        return None
    return create_block_mask(functions.mask_mod, None, functions.heads, seqlen, seqlen, device)


def _mini_varlen(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, longest: int) -> Tensor:
    lengths = (cu_seqlens, cu_seqlens, longest, longest)
    return mini_flash_attention.flash_attn_varlen_func(q, k, v, *lengths, causal=True)


def _mini_decode(q: Tensor, k_cache: Tensor, v_cache: Tensor, seqlens: Tensor, **options: Tensor) -> Tensor:
    return mini_flash_attention.flash_attn_with_kvcache(q, k_cache, v_cache, cache_seqlens=seqlens, **options)


@contextmanager
def forced_sm80() -> Iterator[None]:
    before = os.environ.get(BACKEND)
    os.environ[BACKEND] = "sm80"
    try:
        yield
    finally:
        os.environ.pop(BACKEND) if before is None else os.environ.update({BACKEND: before})


def _pytorch(backend: SDPBackend) -> Implementation:
    return Implementation(_sdpa, lambda: sdpa_kernel(backend), decode=_whole_cache(_sdpa))


def _sdpa(q: Tensor, k: Tensor, v: Tensor, causal: bool, window: int | None = None) -> Tensor:
    if window is not None:
        raise NotImplementedError("it has no windows")
    options = {"is_causal": causal, "enable_gqa": q.shape[2] != k.shape[2]}
    if causal and q.shape[1] != k.shape[1]:  # is_causal would align the mask at the top left
        options |= {"is_causal": False, "attn_mask": causal_lower_right(q.shape[1], k.shape[1])}
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    return F.scaled_dot_product_attention(q, k, v, **options).transpose(1, 2)


def _flex() -> Implementation:
    importlib.import_module("triton")
    compilers = (os.environ.get("CC", "cc"), "gcc", "clang")
    if not any(map(shutil.which, compilers)):
        raise RuntimeError("needs a C compiler")
    create = torch.compile(flex.create_block_mask)
    return Implementation(scope=_many_compilations, functions=_flex_functions, create_block_mask=create)


@contextmanager
def _many_compilations() -> Iterator[None]:
    """Each variant of a case compiles the same code anew; one forward pass is for many backward passes."""
    from torch._dynamo import config as dynamo
    from torch._functorch import config as autograd

    with dynamo.patch(recompile_limit=256), autograd.patch(donated_buffer=False):
        yield


def _flex_functions(
    q: Tensor, k: Tensor, v: Tensor, causal: bool, functions: Functions
) -> Callable[[], Tensor]:
    """FlexAttention, compiled; sinks, which it does not have, as Transformers adds them, from the LSE."""
    block_mask, sinks = _flex_block_mask(functions, causal, q.shape[1], q.device), functions.s_aux
    aux = None if sinks is None else flex.AuxRequest(lse=True)

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        out = flex.flex_attention(q, k, v, functions.score_mod, block_mask, return_aux=aux)
        if sinks is not None:
            out, more = out
            out = (out * torch.sigmoid(more.lse - sinks.view(-1, 1)).unsqueeze(-1)).to(q.dtype)
        return out.transpose(1, 2)

    # fullgraph: an error where it would not compile and run by single operations, 25 times as slow.
    return functools.partial(_compiled(attention), q, k, v)


_compiled = functools.partial(torch.compile, dynamic=False, fullgraph=True)


def _flex_block_mask(
    functions: Functions, causal: bool, seqlen: int, device: torch.device
) -> flex.BlockMask | None:
    if functions.full is not None:
        ours = _mini_block_mask(functions, seqlen, device)
        partial, full = (ours.kv_num_blocks, ours.kv_indices), (ours.full_kv_num_blocks, ours.full_kv_indices)
        return flex.BlockMask.from_kv_blocks(*partial, *full, seq_lengths=(seqlen, seqlen))
    mask_mod = masks.causal() if causal else functions.mask_mod
    if mask_mod is None:
        return None
    return flex.create_block_mask(mask_mod, None, functions.heads, seqlen, seqlen, device)


def _whole_cache(attention: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Decoding without a cache's function: the timed caches are full, so it is plain attention."""
    return lambda q, k, v, seqlens: attention(q, k, v, False)


def _official(package: ModuleType) -> Implementation:
    def attention(q: Tensor, k: Tensor, v: Tensor, causal: bool, window: int | None = None) -> Tensor:
        options = {} if window is None else {"window_size": (window, 0)}
        return _out(package.flash_attn_func(q, k, v, causal=causal, **options))

    def varlen(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, longest: int) -> Tensor:
        lengths = dict.fromkeys(("cu_seqlens_q", "cu_seqlens_k"), cu_seqlens)
        lengths |= dict.fromkeys(("max_seqlen_q", "max_seqlen_k"), longest)
        return _out(package.flash_attn_varlen_func(q, k, v, **lengths, causal=True))

    def decode(q: Tensor, k: Tensor, v: Tensor, seqlens: Tensor) -> Tensor:
        return _out(package.flash_attn_with_kvcache(q, k, v, cache_seqlens=seqlens))

    has_cache = hasattr(package, "flash_attn_with_kvcache")
    return Implementation(attention, varlen=varlen, decode=decode if has_cache else _whole_cache(attention))


def _out(result: Tensor | tuple[Tensor, ...]) -> Tensor:
    """Some versions return `out`, some `(out, lse)`."""
    return result[0] if isinstance(result, tuple) else result
