"""Programs that import flash_attn, where flash_attn is not installed.

    from mini_flash_attention.integrations.flash_attn import install_as_flash_attn
    install_as_flash_attn()                # before the others
    from flash_attn import flash_attn_func

It makes modules in this process alone: nothing is installed under that name, and a real flash_attn is never
replaced. Beside the public functions there are `bert_padding` and the private functions that other packages
import.
"""

import importlib.machinery
import importlib.util
import sys
import types
from typing import Any

from torch import Tensor

import mini_flash_attention as mini
from mini_flash_attention import ops

VERSION = "2.8.3"  # whose functions these are


def install_as_flash_attn() -> None:
    """Make `import flash_attn` find this package, in this process.

    Raises:
        RuntimeError: flash_attn is installed.
    """
    installed = sys.modules.get("flash_attn")
    if installed is not None and getattr(installed, "of_mini_flash_attention", False):
        return
    if installed is not None or importlib.util.find_spec("flash_attn") is not None:
        raise RuntimeError("flash_attn is installed, and is not replaced")
    functions = {name: getattr(mini, name) for name in mini.__all__ if name.startswith("flash_attn")}
    padding = dict(pad_input=mini.pad_input, unpad_input=mini.unpad_input)
    padding |= dict(index_first_axis=index_first_axis, index_put_first_axis=index_put_first_axis)
    contents = {
        "flash_attn": functions | {"__version__": VERSION, "__path__": [], "of_mini_flash_attention": True},
        "flash_attn.flash_attn_interface": functions | PRIVATE,
        "flash_attn.bert_padding": padding,
    }
    for name, members in contents.items():
        module = types.ModuleType(name, __doc__)
        module.__spec__ = importlib.machinery.ModuleSpec(name, None, is_package="." not in name)
        vars(module).update(members)
        sys.modules[name] = module
        parent, _, child = name.rpartition(".")
        if parent:
            setattr(sys.modules[parent], child, module)


# flash_attn's private functions. Their argument lists are its own; what they return is out, LSE, S_dmask,
# random state.


def _flash_attn_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float,
    softmax_scale: float | None,
    causal: bool,
    window_size_left: int,
    window_size_right: int,
    softcap: float,
    alibi_slopes: Tensor | None,
    return_softmax: bool,
) -> tuple[Tensor, Tensor, None, None]:
    score = softmax_scale, causal, window_size_left, window_size_right, softcap
    return *ops.forward(q, k, v, *ops.DENSE, *_options(alibi_slopes, dropout_p, score)), None, None


def _flash_attn_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    softmax_lse: Tensor,
    dq: Tensor | None,
    dk: Tensor | None,
    dv: Tensor | None,
    dropout_p: float,
    softmax_scale: float | None,
    causal: bool,
    window_size_left: int,
    window_size_right: int,
    softcap: float,
    alibi_slopes: Tensor | None,
    deterministic: bool,
    rng_state: Tensor | None = None,
) -> None:
    score = softmax_scale, causal, window_size_left, window_size_right, softcap
    options = _options(alibi_slopes, dropout_p, score, deterministic)
    _write((dq, dk, dv), ops.backward(dout, None, q, k, v, out, softmax_lse, *ops.DENSE, *options))


def _flash_attn_varlen_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float,
    softmax_scale: float | None,
    causal: bool,
    window_size_left: int = -1,
    window_size_right: int = -1,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    return_softmax: bool = False,
    block_table: Tensor | None = None,
    leftpad_k: Tensor | None = None,
    seqused_k: Tensor | None = None,
    zero_tensors: bool = False,
) -> tuple[Tensor, Tensor, None, None]:
    if leftpad_k is not None:
        raise NotImplementedError("leftpad_k: packed sequences have no left padding")
    score = softmax_scale, causal, window_size_left, window_size_right, softcap
    layout = cu_seqlens_q, cu_seqlens_k, seqused_k, block_table, max_seqlen_q
    return *ops.forward(q, k, v, *layout, *_options(alibi_slopes, dropout_p, score)), None, None


def _flash_attn_varlen_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    softmax_lse: Tensor,
    dq: Tensor | None,
    dk: Tensor | None,
    dv: Tensor | None,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float,
    softmax_scale: float | None,
    causal: bool,
    window_size_left: int,
    window_size_right: int,
    softcap: float,
    alibi_slopes: Tensor | None,
    deterministic: bool,
    rng_state: Tensor | None = None,
    zero_tensors: bool = False,
) -> None:
    score = softmax_scale, causal, window_size_left, window_size_right, softcap
    layout = cu_seqlens_q, cu_seqlens_k, None, None, max_seqlen_q
    options = _options(alibi_slopes, dropout_p, score, deterministic)
    _write((dq, dk, dv), ops.backward(dout, None, q, k, v, out, softmax_lse, *layout, *options))


PRIVATE = {
    function.__name__: function
    for function in (
        _flash_attn_forward,
        _flash_attn_backward,
        _flash_attn_varlen_forward,
        _flash_attn_varlen_backward,
    )
}


def _options(
    alibi_slopes: Tensor | None, dropout_p: float, score: tuple[Any, ...], deterministic: bool = False
) -> tuple[Any, ...]:
    if dropout_p:
        raise NotImplementedError("dropout_p: flash_attn's private functions hand on its own random state")
    return alibi_slopes, None, None, 0.0, *score, deterministic, 0


def _write(places: tuple[Tensor | None, ...], gradients: tuple[Tensor, ...]) -> None:
    for place, gradient in zip(places, gradients, strict=True):
        if place is not None:
            place.copy_(gradient)


def index_first_axis(x: Tensor, indices: Tensor) -> Tensor:
    """Rows of x."""
    return x.index_select(0, indices)


def index_put_first_axis(values: Tensor, indices: Tensor, first_axis_dim: int) -> Tensor:
    """Zeros of `first_axis_dim` rows, with the values in some of them."""
    return values.new_zeros(first_axis_dim, *values.shape[1:]).index_copy(0, indices, values)
