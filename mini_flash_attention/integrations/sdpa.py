"""PyTorch's own attention by our kernels: F.scaled_dot_product_attention and all that is built on it.

    from mini_flash_attention.integrations import sdpa
    sdpa.activate()  # or: sdpa.register(), later torch.nn.attention.activate_flash_attention_impl("MINI")
    sdpa.restore()

Served are F.scaled_dot_product_attention, torch.nn.attention.varlen, nested tensors, torch.compile of these
and PyTorch's context_parallel. What we cannot serve runs by the kernel that was there before. Needs PyTorch
2.11.
"""

import warnings
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from mini_flash_attention import backend, ops

NAME = "MINI"


def register() -> None:
    """Make "MINI" known to torch.nn.attention.activate_flash_attention_impl. Nothing else changes."""
    try:
        from torch.nn.attention import register_flash_attention_impl, restore_flash_attention_impl  # noqa: F401
    except ImportError as error:
        raise ImportError(f"integrations.sdpa needs PyTorch 2.11, not {torch.__version__}") from error
    register_flash_attention_impl(NAME, register_fn=Hook)


def activate() -> "Hook":
    """Run PyTorch's attention by our kernels from now on.

    PyTorch prefers cuDNN's attention on a Hopper GPU, so that few calls would ask for a flash kernel: while
    this is active, cuDNN's is switched off (torch.backends.cuda.enable_cudnn_sdp; sdpa_kernel switches it on
    where a user asks for it), and `restore` puts back what was there.

    Returns:
        hook: what is active; its `calls` counts the calls that our kernels served, by operator.
    """
    register()
    from torch.nn.attention import _registry, activate_flash_attention_impl

    if torch.cuda.is_available():  # what is missing is missed here, not in the first call
        backend.choose(torch.device("cuda"), backend.forced_backend())
    activate_flash_attention_impl(NAME)
    active: Any = _registry._FLASH_ATTENTION_ACTIVE  # its name, and what register_fn returned
    return active[1]


def restore() -> None:
    """PyTorch's attention by its own kernels again. Not between a forward pass and its backward."""
    from torch.nn.attention import restore_flash_attention_impl

    restore_flash_attention_impl()


class Hook:
    """Our kernels in the place of PyTorch's, until `remove`. key: the dispatch key that they serve."""

    def __init__(self, key: str = "CUDA") -> None:
        self.calls: Counter[str] = Counter()
        self.library = torch.library.Library("aten", "IMPL", key)
        for name, kernel in KERNELS.items():
            if hasattr(torch.ops.aten, name):
                with warnings.catch_warnings():
                    # "Overriding a previously registered kernel": that is the point
                    warnings.simplefilter("ignore")
                    self.library.impl(name, self.served(name, kernel, key), key, with_keyset=True)
        self.cudnn = torch.backends.cuda.cudnn_sdp_enabled()
        torch.backends.cuda.enable_cudnn_sdp(False)

    def served(self, name: str, kernel: Callable[..., Any], key: str) -> Callable[..., Any]:
        """The kernel, and where it refuses the one that was there before."""
        try:
            original = torch.library.get_kernel(f"aten::{name}", key)
        except RuntimeError:  # there is none, as on the CPU
            original = None

        def run(keys: Any, *arguments: Any, **options: Any) -> Any:
            try:
                result = kernel(*arguments, **options)
            except NotImplementedError:
                if original is None:
                    raise
                return original.call_boxed(keys, *arguments, **options)
            self.calls[name] += 1
            return result

        return run

    def remove(self) -> None:
        self.library._destroy()
        torch.backends.cuda.enable_cudnn_sdp(self.cudnn)


# The kernels, with the arguments of PyTorch's operators


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_q: Tensor | None,
    cu_k: Tensor | None,
    max_q: int,
    max_k: int,
    dropout_p: float,
    causal: bool,
    debug_mask: bool,
    *,
    scale: float | None = None,
    window_size_left: int | None = None,
    window_size_right: int | None = None,
    seqused_k: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    block_table: Tensor | None = None,
    num_splits: int | None = None,
    out: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """_flash_attention_forward, of (batch, seqlen, heads, head_dim) or of packed sequences."""
    splits_dense = num_splits and cu_q is None
    if dropout_p and (debug_mask or splits_dense):  # PyTorch's kernel would run, and our backward draw anew
        raise ValueError("dropout_p: not with debug_mask or num_splits while integrations.sdpa is active")
    if alibi_slopes is not None and torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v)):
        raise ValueError("alibi_slopes: PyTorch's backward does not get them; call flash_attn_varlen_func")
    if debug_mask:
        raise NotImplementedError("debug_mask: S_dmask is not in the form that PyTorch means")
    if splits_dense:
        raise NotImplementedError("num_splits: of packed sequences alone")
    seed = ops.draw_seed(q.device) if dropout_p else None
    score = scale, causal, _side(window_size_left), _side(window_size_right), 0.0
    layout = cu_q, cu_k, seqused_k, block_table, None if cu_q is None else max_q
    options = *layout, alibi_slopes, None, seed, dropout_p, *score, False, num_splits or 0
    if out is None:
        out, lse = ops.forward(q, k, v, *options)
    else:
        lse = ops.forward_into(q, k, v, out, *options)
    # PyTorch's two numbers of a generator's state: ours is one, the seed.
    state = q.new_zeros(2, dtype=torch.int64)
    if seed is not None:
        state[:1] = seed
    state = state.view(torch.uint64)
    return out, lse, state, state[0], q.new_empty(0)


def forward_into(out: Tensor, *arguments: Any, **options: Any) -> Tensor:
    """_flash_attention_forward_no_dropout_inplace, of PyTorch 2.12 and newer."""
    return forward(*arguments, **options, out=out)[1]


def backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_q: Tensor | None,
    cu_k: Tensor | None,
    max_q: int,
    max_k: int,
    dropout_p: float,
    causal: bool,
    state: Tensor,
    unused: Tensor,
    *,
    scale: float | None = None,
    window_size_left: int | None = None,
    window_size_right: int | None = None,
) -> tuple[Tensor, ...]:
    """_flash_attention_backward."""
    # Autograd saves None as an empty tensor.
    cu_q, cu_k = (None if x is None or not x.numel() else x for x in (cu_q, cu_k))
    layout = cu_q, cu_k, None, None, None if cu_q is None else max_q
    seed = state.view(torch.int64)[:1] if dropout_p else None
    score = scale, causal, _side(window_size_left), _side(window_size_right), 0.0
    gradients = ops.backward(
        dout, None, q, k, v, out, lse, *layout, None, None, seed, dropout_p, *score, False, 0
    )
    return tuple(map(ops.like, (q, k, v), gradients))


def sdpa_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float = 0.0,
    causal: bool = False,
    debug_mask: bool = False,
    *,
    scale: float | None = None,
) -> tuple[Any, ...]:
    """_scaled_dot_product_flash_attention, of (batch, heads, seqlen, head_dim).

    Its causal is bottom-right, as ours: F.scaled_dot_product_attention, whose own is top-left, asks for it
    only with as many queries as keys.
    """
    lengths = q.shape[2], k.shape[2]
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    out, lse, *others = forward(q, k, v, None, None, *lengths, dropout_p, causal, debug_mask, scale=scale)
    return out.transpose(1, 2), lse, None, None, *lengths, *others


def sdpa_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    *others: Any,
    scale: float | None = None,
) -> tuple[Tensor, ...]:
    """_scaled_dot_product_flash_attention_backward."""
    dout, q, k, v, out = (x.transpose(1, 2) for x in (dout, q, k, v, out))
    gradients = backward(dout, q, k, v, out, lse, None, None, *others[2:], scale=scale)
    return tuple(x.transpose(1, 2) for x in gradients)


def _side(limit: int | None) -> int:
    return -1 if limit is None else limit


KERNELS: dict[str, Callable[..., Any]] = {
    "_flash_attention_forward": forward,
    "_flash_attention_forward_no_dropout_inplace": forward_into,
    "_flash_attention_backward": backward,
    "_scaled_dot_product_flash_attention": sdpa_forward,
    "_scaled_dot_product_flash_attention_backward": sdpa_backward,
}
