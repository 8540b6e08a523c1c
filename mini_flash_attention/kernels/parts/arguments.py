"""Stand-ins for a kernel's arguments: what compilation may know of them. Numbers stay symbols."""

import math

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32
from cutlass.cute.runtime import make_fake_compact_tensor, make_fake_stream, make_fake_tensor

from mini_flash_attention.gpu.config import ELEMENTS
from mini_flash_attention.kernels import calls
from mini_flash_attention.kernels.calls import Blocks, Dropout, Ragged, Rotary, Score

NUMBER = Int32(1)  # any int32
CAPTURED = {
    "float32": "Float32",
    "float16": "Float16",
    "bfloat16": "BFloat16",
    "int32": "Int32",
    "int64": "Int64",
    "bool": "Uint8",
}


def element_type(config) -> type:
    return getattr(cutlass, {"float16": "Float16", "bfloat16": "BFloat16"}[config.dtype])


def attention_tensor(dtype: type, batch, seqlen, heads, head_dim) -> cute.Tensor:
    """(batch, seqlen, heads, head_dim), 16-byte aligned, any strides but a unit last one."""
    strides = (*(cute.sym_int64(divisibility=ELEMENTS) for _ in range(3)), 1)
    return make_fake_tensor(dtype, (batch, seqlen, heads, head_dim), stride=strides, assumed_align=16)


def attention(config, queries: int, keys: int, rows: int) -> list[cute.Tensor]:
    """As many tensors in the shape of q, of k, and of lse, of one call."""
    dtype = element_type(config)
    batch, seqlen_q, seqlen_k, heads_q, heads_k = (cute.sym_int() for _ in range(5))
    head_dim = cute.sym_int(divisibility=ELEMENTS)
    batch_k = cute.sym_int() if config.ragged else batch
    shape_q, shape_k = (batch, seqlen_q, heads_q, head_dim), (batch_k, seqlen_k, heads_k, head_dim)
    tensors = [attention_tensor(dtype, *shape) for shape in (shape_q,) * queries + (shape_k,) * keys]
    shape = batch, heads_q, seqlen_q
    return tensors + [make_fake_compact_tensor(Float32, shape, stride_order=(2, 1, 0)) for _ in range(rows)]


def forward(config) -> calls.Forward:
    """Of forward/sm80.py and forward/sm90.py."""
    q, o, k, v, lse = attention(config, 2, 2, 1)
    ragged = fake_ragged() if config.ragged else None
    persistent = (NUMBER, counters()) if config.kernel == "forward.sm90" else ()
    numbers = fake_score(config), NUMBER, NUMBER, ragged, fake_dropout(config), fake_sinks(config), NUMBER
    numbers = *numbers, fake_blocks(config)
    return calls.Forward(q, k, v, o, lse, *numbers, *persistent)


def backward(config) -> calls.Backward:
    """Of backward/sm80.py and backward/sm90.py."""
    q, o, do, dq, k, v, dk, dv, lse, dlse = attention(config, 4, 4, 2)
    batch, _, heads, _ = q.shape
    m_blocks = cute.sym_int()
    stats = blocks((batch, heads, m_blocks), 2, config.tile_m)
    dq_acc = blocks((batch, heads, m_blocks), config.tile_m * config.head_dim)
    turns, key_turns = (
        make_fake_compact_tensor(Int32, tuple(cute.sym_int() for _ in range(3)), stride_order=(2, 1, 0))
        for _ in range(2)
    )
    tensors = q, k, v, o, do, lse, dlse, stats, dq_acc, dq, dk, dv
    ragged = fake_ragged() if config.ragged else None
    numbers = fake_score(config), NUMBER, NUMBER, NUMBER, ragged, fake_dropout(config)
    count = tuple(cute.sym_int() for _ in range(3))
    dkv_acc = blocks((2, *count), config.tile_n * config.head_dim)
    persistent = (NUMBER,) if config.kernel == "backward.sm90" else ()
    shared = turns, NUMBER, dkv_acc, key_turns, fake_blocks(config)
    return calls.Backward(*tensors, *numbers, *shared, *persistent)


def decode(config) -> calls.Decode:
    """Of decode/attend.py."""
    q, o, k, v, lse = attention(config, 2, 2, 1)
    numbers = fake_score(config), NUMBER, NUMBER, fake_ragged(), fake_sinks(config), NUMBER, NUMBER
    return calls.Decode(q, k, v, o, lse, workspace(), *numbers, counters())


def append(config) -> calls.Append:
    """Of decode/append.py."""
    dtype = element_type(config)
    batch, rows, seqlen_new, seqlen_q, seqlen_k, heads_q, heads_k = (cute.sym_int() for _ in range(7))
    head_dim = cute.sym_int(divisibility=ELEMENTS)
    new = (attention_tensor(dtype, batch, seqlen_new, heads_k, head_dim) for _ in range(2))
    cache = (attention_tensor(dtype, rows, seqlen_k, heads_k, head_dim) for _ in range(2))
    q, q_out, rotary = None, None, None
    if config.rotary != "none":
        q, q_out = (attention_tensor(dtype, batch, seqlen_q, heads_q, head_dim) for _ in range(2))
        rotary = rotary_tables(dtype)
    return calls.Append(*new, *cache, q, q_out, rotary, NUMBER, fake_ragged())


def blocks(count: tuple, *block: int) -> cute.Tensor:
    """(*count, *block) float32, contiguous, with 64-bit strides; the last of count is how many of a head."""
    outer = (cute.sym_int64(divisibility=ELEMENTS) for _ in count[1:])
    inner = tuple(math.prod(block[i:]) for i in range(len(block) + 1))  # strides
    return make_fake_tensor(Float32, (*count, *block), stride=(*outer, *inner), assumed_align=16)


def fake_score(config) -> Score:
    return Score(Float32(1), tuple(map(fake_captured, config.score.kinds)) or None)


def fake_captured(kind: str) -> Float32 | Int32 | cute.Tensor:
    """kind: as in scores.capture."""
    name, _, ndim = kind.partition(" ")
    if not ndim:
        return Float32(1) if name == "float" else NUMBER
    dtype = getattr(cutlass, CAPTURED[name.partition(":")[2]])
    rank = max(int(ndim), 1)
    shape = tuple(cute.sym_int() for _ in range(rank))
    strides = (*(cute.sym_int64() for _ in range(rank - 1)), 1)
    return make_fake_tensor(dtype, shape, stride=strides, assumed_align=dtype.width // 8)


def fake_dropout(config) -> Dropout | None:
    if not config.dropout:
        return None
    return Dropout(make_fake_compact_tensor(Int32, (2,)), NUMBER, Float32(1))


def fake_sinks(config) -> cute.Tensor | None:
    """(h) float32."""
    return make_fake_compact_tensor(Float32, (cute.sym_int(),)) if config.sinks else None


def fake_blocks(config) -> Blocks | None:
    """Of configs that have no sparse, too."""
    if not getattr(config, "sparse", False):
        return None
    count, indices = (
        make_fake_tensor(Int32, tuple(cute.sym_int() for _ in range(rank)), stride=stride, assumed_align=4)
        for rank, stride in (
            (3, (cute.sym_int64(), cute.sym_int64(), 1)),
            (4, (*(cute.sym_int64() for _ in range(3)), 1)),
        )
    )
    return Blocks(count, indices, count, indices)


def fake_ragged() -> Ragged:
    def numbers(*stride) -> cute.Tensor:
        shape = tuple(cute.sym_int() for _ in stride)
        return make_fake_tensor(Int32, shape, stride=stride, assumed_align=4)

    of_sequences = (numbers(1) for _ in range(5))
    block_table = numbers(cute.sym_int64(), 1)
    return Ragged(*of_sequences, block_table, *(NUMBER,) * 5)


def rotary_tables(dtype: type) -> Rotary:
    """(positions, rotary_dim / 2) each."""
    shape = cute.sym_int(), cute.sym_int(divisibility=ELEMENTS)
    strides = cute.sym_int64(divisibility=ELEMENTS), 1
    return Rotary(*(make_fake_tensor(dtype, shape, stride=strides, assumed_align=16) for _ in range(2)))


def workspace() -> cute.Tensor:
    """(n) float32."""
    return make_fake_compact_tensor(Float32, (cute.sym_int64(),), assumed_align=16)


def counters() -> cute.Tensor:
    """(n) int32, zero before and after a launch: ../../gpu/memory.py."""
    return make_fake_compact_tensor(Int32, (cute.sym_int(),))


def stream():
    """The caller's current stream."""
    return make_fake_stream(use_tvm_ffi_env_stream=True)
