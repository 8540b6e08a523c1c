"""Stand-ins for a kernel's arguments: what compilation may know of them. Numbers stay symbols."""

import math

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32
from cutlass.cute.runtime import make_fake_compact_tensor, make_fake_stream, make_fake_tensor

from mini_flash_attention.gpu.config import ELEMENTS
from mini_flash_attention.kernels.calls import (
    Append,
    Backward,
    Decode,
    Dropout,
    Forward,
    Ragged,
    Rotary,
    Score,
)


def element_type(config) -> type:
    return getattr(cutlass, {"float16": "Float16", "bfloat16": "BFloat16"}[config.dtype])


def attention_tensor(dtype: type, batch, seqlen, heads, head_dim) -> cute.Tensor:
    """(batch, seqlen, heads, head_dim), 16-byte aligned, any strides but a unit last one."""
    strides = (*(cute.sym_int64(divisibility=ELEMENTS) for _ in range(3)), 1)
    return make_fake_tensor(dtype, (batch, seqlen, heads, head_dim), stride=strides, assumed_align=16)


def forward(config) -> Forward:
    """Of forward/sm80.py and forward/sm90.py."""
    tensors = attention(config)
    numbers = (
        score(config),
        Int32(1),
        Int32(1),
        ragged() if config.ragged else None,
        dropout(config),
        Int32(1),
    )
    persistent = (Int32(1), counters()) if config.kernel == "forward.sm90" else (None, None)
    return Forward(*tensors, *numbers, *persistent)


def backward(config) -> Backward:
    """Of backward/sm80.py and backward/sm90.py."""
    dtype = element_type(config)
    batch, seqlen_q, seqlen_k, heads_q, heads_k, m_blocks = (cute.sym_int() for _ in range(6))
    head_dim = cute.sym_int(divisibility=ELEMENTS)
    batch_k = cute.sym_int() if config.ragged else batch
    q, o, do, dq = (attention_tensor(dtype, batch, seqlen_q, heads_q, head_dim) for _ in range(4))
    k, v, dk, dv = (attention_tensor(dtype, batch_k, seqlen_k, heads_k, head_dim) for _ in range(4))
    rows, order = (batch, heads_q, seqlen_q), (2, 1, 0)
    lse, dlse = (make_fake_compact_tensor(Float32, rows, stride_order=order) for _ in range(2))
    stats = blocks((batch, heads_q, m_blocks), 2, config.tile_m)
    dq_acc = blocks((batch, heads_q, m_blocks), config.tile_m * config.head_dim)
    turns = make_fake_compact_tensor(Int32, tuple(cute.sym_int() for _ in range(3)), stride_order=order)
    tensors = q, k, v, o, do, lse, dlse, stats, dq_acc, dq, dk, dv
    numbers = score(config), Int32(1), Int32(1), Int32(1), ragged() if config.ragged else None
    num_sms = Int32(1) if config.kernel == "backward.sm90" else None
    return Backward(*tensors, *numbers, dropout(config), turns, num_sms)


def decode(config) -> Decode:
    """Of decode/attend.py."""
    numbers = score(config), Int32(1), Int32(1), ragged(), Int32(1), Int32(1)
    return Decode(*attention(config), workspace(), *numbers, counters())


def append(config) -> Append:
    """Of decode/append.py."""
    dtype = element_type(config)
    batch, rows, seqlen_new, seqlen_q, seqlen_k, heads_q, heads_k = (cute.sym_int() for _ in range(7))
    head_dim = cute.sym_int(divisibility=ELEMENTS)
    new = (attention_tensor(dtype, batch, seqlen_new, heads_k, head_dim) for _ in range(2))
    cache = (attention_tensor(dtype, rows, seqlen_k, heads_k, head_dim) for _ in range(2))
    q, q_out, rotary = None, None, None
    if config.rotary != "none":
        q, q_out = (attention_tensor(dtype, batch, seqlen_q, heads_q, head_dim) for _ in range(2))
        rotary = Rotary(*rotary_tables(dtype))
    return Append(*new, *cache, q, q_out, rotary, Int32(1), ragged())


def attention(config) -> tuple[cute.Tensor, ...]:
    """q, k, v, o and lse."""
    dtype = element_type(config)
    batch, seqlen_q, seqlen_k, heads_q, heads_k = (cute.sym_int() for _ in range(5))
    head_dim = cute.sym_int(divisibility=ELEMENTS)
    batch_k = cute.sym_int() if config.ragged else batch
    q, o = (attention_tensor(dtype, batch, seqlen_q, heads_q, head_dim) for _ in range(2))
    k, v = (attention_tensor(dtype, batch_k, seqlen_k, heads_k, head_dim) for _ in range(2))
    lse = make_fake_compact_tensor(Float32, (batch, heads_q, seqlen_q), stride_order=(2, 1, 0))
    return q, k, v, o, lse


def blocks(count: tuple, *block: int) -> cute.Tensor:
    """(batch, heads, m_blocks, *block) float32, contiguous, with 64-bit strides."""
    batch, head = (cute.sym_int64(divisibility=ELEMENTS) for _ in range(2))
    inner = tuple(math.prod(block[i:]) for i in range(len(block) + 1))  # strides
    return make_fake_tensor(Float32, (*count, *block), stride=(batch, head, *inner), assumed_align=16)


def score(config) -> Score:
    softcap = Float32(1) if "softcap" in config.score else None
    slopes = None
    if "alibi" in config.score:
        strides = cute.sym_int64(), cute.sym_int64()
        slopes = make_fake_tensor(Float32, (cute.sym_int(), cute.sym_int()), stride=strides, assumed_align=4)
    return Score(Float32(1), softcap, slopes)


def dropout(config) -> Dropout | None:
    return Dropout(Int32(1), Int32(1), Int32(1), Float32(1)) if config.dropout else None


def ragged() -> Ragged:
    def numbers(*stride) -> cute.Tensor:
        shape = tuple(cute.sym_int() for _ in stride)
        return make_fake_tensor(Int32, shape, stride=stride, assumed_align=4)

    of_sequences = (numbers(1) for _ in range(5))
    block_table = numbers(cute.sym_int64(), 1)
    return Ragged(*of_sequences, block_table, *(Int32(1) for _ in range(5)))


def rotary_tables(dtype: type) -> tuple[cute.Tensor, cute.Tensor]:
    """cos and sin: (positions, rotary_dim / 2)."""
    shape = cute.sym_int(), cute.sym_int(divisibility=ELEMENTS)
    strides = cute.sym_int64(divisibility=ELEMENTS), 1
    return tuple(make_fake_tensor(dtype, shape, stride=strides, assumed_align=16) for _ in range(2))


def workspace() -> cute.Tensor:
    """(n) float32."""
    return make_fake_compact_tensor(Float32, (cute.sym_int64(),), assumed_align=16)


def counters() -> cute.Tensor:
    """(n) int32, zero before and after a launch: ../../gpu/memory.py."""
    return make_fake_compact_tensor(Int32, (cute.sym_int(),))


def stream():
    """The caller's current stream."""
    return make_fake_stream(use_tvm_ffi_env_stream=True)
