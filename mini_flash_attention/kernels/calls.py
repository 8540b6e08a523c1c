"""What crosses a launch: one record for each kind of kernel, the same on the host and on the GPU.

On the host a record holds PyTorch tensors and Python numbers. In a kernel the same fields are CuTe tensors,
Int32 and Float32. A field is None where a call does without, and its kernel is compiled for that. This file
imports no compiler, which a process that finds its kernels on disk never does.

Shapes: b batch, sq and sk query and key tokens, h query heads, hk key heads, d head dim. Packed sequences lie
in a batch of one. Pages are (num_blocks, page_size, hk, d) in the place of (b, sk, hk, d). Elements are
float16 or bfloat16 with a unit last stride, unless another type is given.
"""

from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    import cutlass
    import torch
    from cutlass import cute

    Tensor = torch.Tensor | cute.Tensor
    Int32 = int | cutlass.Int32
    Float32 = float | cutlass.Float32
else:
    Tensor = Int32 = Float32 = Any


# record(Forward, (q, k, ...)): what Forward(q, k, ...) makes, in half the time.
record = tuple.__new__


class Score(NamedTuple):
    """What becomes of Q·Kᵀ before the softmax: parts/scores.py."""

    scale: Float32  # softmax_scale, > 0
    # By the functions of config.score; tensors of any strides but a unit last one.
    captured: tuple[Float32 | Int32 | Tensor, ...] | None = None


class Dropout(NamedTuple):
    """Which probabilities are dropped: parts/dropout.py, ../philox.py."""

    seed: Tensor  # (2) int32: drawn on the device, so that a captured graph drops anew in each replay
    threshold: Int32  # in both halves: an element is dropped if its 15 random bits reach it
    rescale: Float32  # 1 / (1 - dropout_p)


class Blocks(NamedTuple):
    """Which blocks of 128 queries and keys meet: parts/sparse.py. int32, any strides but a unit last one.

    n: blocks of the rows, m: of what they visit. In the backward pass rows are keys.
    """

    partial: Tensor  # (b, h, n): how many need the mask
    partial_indices: Tensor  # (b, h, n, m): which
    full: Tensor  # (b, h, n): how many do not
    full_indices: Tensor  # (b, h, n, m)


# Bits of Ragged.given: which of its tensors the caller gave.
CU_SEQLENS_Q, CU_SEQLENS_K, SEQUSED_K, LEFTPAD_K, BATCH_IDX = (1 << i for i in range(5))


class Ragged(NamedTuple):
    """Where each sequence lies: int32 tensors, as in problem.Layout.

    `given` has a bit for each tensor that is there. One that is not is any int32 tensor of its rank, never
    read: one kernel serves all combinations.
    """

    cu_seqlens_q: Tensor  # (batch + 1)
    cu_seqlens_k: Tensor  # (batch + 1)
    seqused_k: Tensor  # (batch)
    leftpad_k: Tensor  # (batch)
    batch_idx: Tensor  # (batch)
    block_table: Tensor  # (rows, max_pages); read by paged kernels only
    given: Int32
    keys: Int32  # of every sequence, where neither cu_seqlens_k nor seqused_k tells
    added: Int32  # keys that this call appends to each sequence
    batch: Int32  # how many sequences
    longest: Int32  # the most queries of a sequence, as the caller says: for the choice of tiles alone


class Forward(NamedTuple):
    """forward/sm80.py and forward/sm90.py."""

    mQ: Tensor  # (b, sq, h, d)
    mK: Tensor  # (b, sk, hk, d)
    mV: Tensor  # (b, sk, hk, d)
    mO: Tensor  # (b, sq, h, d)
    mLSE: Tensor  # (b, h, sq) float32
    score: Score
    window_left: Int32  # read only where the mask kind limits that side
    window_right: Int32
    ragged: Ragged | None
    dropout: Dropout | None
    sinks: Tensor | None  # (h) float32: natural logarithms, each a score of its head's rows without a value
    swath: Int32  # heads walked together: parts/scheduler.py
    blocks: Blocks | None = None  # sm90
    num_sms: Int32 | None = None  # sm90: thread blocks that run at once
    counter: Tensor | None = None  # sm90, (2) int32: from which they draw their tiles


class Backward(NamedTuple):
    """backward/sm80.py and backward/sm90.py, each three kernels.

    m_blocks: query blocks of a head; n_blocks: key blocks of one. In ragged batches they are numbered through
    all sequences, and b is 1: backward/schedule.py.
    """

    mQ: Tensor  # (b, sq, h, d)
    mK: Tensor  # (b, sk, hk, d)
    mV: Tensor  # (b, sk, hk, d)
    mO: Tensor  # (b, sq, h, d)
    mdO: Tensor  # (b, sq, h, d)
    mLSE: Tensor  # (b, h, sq) float32
    mdLSE: Tensor  # (b, h, sq) float32; not read unless has_dlse
    mStats: Tensor  # (b, h, m_blocks, 2, tile_m) float32: backward/delta.py
    mdQacc: Tensor  # (b, h, m_blocks, tile_m * d) float32
    mdQ: Tensor  # (b, sq, h, d)
    mdK: Tensor  # (b, sk, hk, d)
    mdV: Tensor  # (b, sk, hk, d)
    score: Score
    has_dlse: Int32
    window_left: Int32
    window_right: Int32
    ragged: Ragged | None
    dropout: Dropout | None
    mTurns: Tensor  # (b, h, m_blocks) int32 if deterministic, else (1, 1, 1): sm90, persistent: tiles drawn
    heads_per_tile: Int32  # query heads that a thread block walks: all of a group, or some
    mdKVacc: Tensor  # (2, b, hk, n_blocks, tile_n * d) float32: dK, dV; no heads if no tiles share a group
    mKeyTurns: Tensor  # (b, hk, n_blocks) int32 if deterministic, else (1, 1, 1)
    blocks: Blocks | None = None  # sm90
    num_sms: Int32 | None = None  # sm90: thread blocks that run at once


class Decode(NamedTuple):
    """decode/attend.py and decode/combine.py."""

    mQ: Tensor  # (b, sq, h, d)
    mK: Tensor  # (b, sk, hk, d)
    mV: Tensor  # (b, sk, hk, d)
    mO: Tensor  # (b, sq, h, d)
    mLSE: Tensor  # (b, h, sq) float32
    workspace: Tensor  # (n) float32: as combine.partial cuts it up, if there are splits
    score: Score
    window_left: Int32
    window_right: Int32
    ragged: Ragged
    sinks: Tensor | None  # (h) float32: as in Forward
    num_splits: Int32
    fused: Int32  # 1: the last of a tile's thread blocks merges its splits; 0: the combine kernel does
    counters: Tensor  # (tiles) int32, fused: how many of its splits are done


class Rotary(NamedTuple):
    """Rotary tables, in the dtype of q."""

    cos: Tensor  # (positions, rotary_dim / 2)
    sin: Tensor


class Append(NamedTuple):
    """decode/append.py. sn: new tokens of each sequence."""

    mK_new: Tensor  # (b, sn, hk, d)
    mV_new: Tensor  # (b, sn, hk, d)
    mK: Tensor  # (rows, sk, hk, d)
    mV: Tensor  # (rows, sk, hk, d)
    mQ: Tensor | None  # (b, sq, h, d): None without rotary embedding, as the next two
    mQ_out: Tensor | None  # (b, sq, h, d)
    rotary: Rotary | None
    advance: Int32  # 1: query i is rotated to the position of new key i; 0: all to that of the first one
    ragged: Ragged
