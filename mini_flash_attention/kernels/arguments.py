"""Stand-ins for a kernel's arguments: what compilation may know of them. Numbers stay symbols."""

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32
from cutlass.cute.runtime import make_fake_compact_tensor, make_fake_stream, make_fake_tensor

from mini_flash_attention.config import ELEMENTS


def attention_tensor(dtype: type, batch, seqlen, heads, head_dim) -> cute.Tensor:
    """(batch, seqlen, heads, head_dim), 16-byte aligned, any strides but a unit last one."""
    strides = (*(cute.sym_int64(divisibility=ELEMENTS) for _ in range(3)), 1)
    return make_fake_tensor(dtype, (batch, seqlen, heads, head_dim), stride=strides, assumed_align=16)


def forward(config) -> tuple:
    """(q, k, v, o, lse, scale, window_left, window_right)."""
    dtype = getattr(cutlass, {"float16": "Float16", "bfloat16": "BFloat16"}[config.dtype])
    batch, seqlen_q, seqlen_k, heads_q, heads_k = (cute.sym_int() for _ in range(5))
    head_dim = cute.sym_int(divisibility=ELEMENTS)
    q, o = (attention_tensor(dtype, batch, seqlen_q, heads_q, head_dim) for _ in range(2))
    k, v = (attention_tensor(dtype, batch, seqlen_k, heads_k, head_dim) for _ in range(2))
    lse = make_fake_compact_tensor(Float32, (batch, heads_q, seqlen_q), stride_order=(2, 1, 0))
    return q, k, v, o, lse, Float32(1), Int32(1), Int32(1)


def counter() -> cute.Tensor:
    """(2,) int32: the state of a dynamic schedule."""
    return make_fake_compact_tensor(Int32, (2,))


def stream():
    """The caller's current stream."""
    return make_fake_stream(use_tvm_ffi_env_stream=True)
