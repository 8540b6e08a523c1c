"""Appending to a KV cache: new keys and values go behind those of each sequence; rotary embedding.

Rotary embedding (Su et al. 2021, arXiv 2104.09864) turns the new keys and the queries. k_new and v_new
(b, sn, hk, d), k and v (rows, sk, hk, d) or pages (num_blocks, page_size, hk, d), q and q_out (b, sq, h, d),
cos and sin (positions, rotary_dim / 2); float16 or bfloat16. A thread moves 16 bytes.
"""

from typing import NamedTuple

import cutlass
import cutlass.cute as cute
from cutlass import Boolean, Float32, Int32, const_expr

from mini_flash_attention.gpu.config import ELEMENTS
from mini_flash_attention.kernels.calls import BATCH_IDX, SEQUSED_K, Append, Ragged, Rotary
from mini_flash_attention.kernels.parts import arguments
from mini_flash_attention.kernels.parts.fragments import convert
from mini_flash_attention.kernels.parts.seqlen import clamp

THREADS = 128


class Vector(NamedTuple):
    """Which 16 bytes of a tensor (b, s, h, d) a thread moves."""

    batch: Int32
    token: Int32
    head: Int32
    piece: Int32


def vector(i: Int32, mX: cute.Tensor) -> Vector:
    _, seqlen, heads, head_dim = mX.shape
    pieces = head_dim // ELEMENTS
    row, piece = i // pieces, i % pieces
    token, head = row // heads, row % heads
    return Vector(token // seqlen, token % seqlen, head, piece)


def vectors(mX: cute.Tensor) -> Int32:
    batch, seqlen, heads, head_dim = mX.shape
    return batch * seqlen * heads * (head_dim // ELEMENTS)


@cute.jit
def load(gX: cute.Tensor, piece: Int32, count: cutlass.Constexpr):
    """`count` adjacent elements in float32."""
    x = cute.make_rmem_tensor(count, gX.element_type)
    cute.autovec_copy(cute.local_tile(gX, (count,), (piece,)), x)
    return x.load().to(Float32)


@cute.jit
def rotate(config: cutlass.Constexpr, gX: cute.Tensor, piece: Int32, rotary: Rotary, position: Int32):
    """A piece of row gX (d), rotated; the elements from rotary_dim on stay as they are."""
    x = cute.make_rmem_tensor(ELEMENTS, Float32)
    x.store(load(gX, piece, ELEMENTS))
    half = rotary.cos.shape[1] // ELEMENTS  # pieces
    if piece < 2 * half:
        position = clamp(position, Int32(0), rotary.cos.shape[0] - 1)
        gCos, gSin = rotary.cos[position, None], rotary.sin[position, None]
        if const_expr(config.rotary == "interleaved"):
            pairs = ELEMENTS // 2
            cos, sin = load(gCos, piece, pairs), load(gSin, piece, pairs)
            for i in cutlass.range_constexpr(pairs):
                a, b = x[2 * i], x[2 * i + 1]
                x[2 * i], x[2 * i + 1] = a * cos[i] - b * sin[i], a * sin[i] + b * cos[i]
        else:
            first = piece < half
            cos, sin = (load(g, piece if first else piece - half, ELEMENTS) for g in (gCos, gSin))
            other = load(gX, piece + half if first else piece - half, ELEMENTS)
            sign = Float32(-1.0) if first else Float32(1.0)
            for i in cutlass.range_constexpr(ELEMENTS):
                x[i] = x[i] * cos[i] + sign * other[i] * sin[i]
    out = cute.make_rmem_tensor(ELEMENTS, gX.element_type)
    convert(x, out)
    return out


@cute.jit
def seqlen_before(ragged: Ragged, b: Int32):
    """The keys of sequence b before the append, left padding included: the new ones' first place."""
    seqlen = ragged.keys
    if ragged.given & SEQUSED_K:
        seqlen = ragged.seqused_k[b]
    return seqlen


@cute.jit
def place(
    config: cutlass.Constexpr,
    ragged: Ragged,
    mX: cute.Tensor,
    page_size: cute.FastDivmodDivisorV2 | None,
    b: Int32,
    token: Int32,
):
    """(index into mX's first mode, into its second, whether that exists) of a token of sequence b."""
    row = b
    if ragged.given & BATCH_IDX:
        row = ragged.batch_idx[b]
    if const_expr(config.page):
        index, offset = Int32(0), Int32(0)
        exists = Boolean(False)
        if token >= 0 and row >= 0 and row < ragged.block_table.shape[0]:
            index, offset = divmod(token, page_size)
            exists = index < ragged.block_table.shape[1]
        if exists:
            row = ragged.block_table[row, index]
        token = offset
    else:
        exists = token >= 0 and token < mX.shape[1]
    return row, token, exists and row >= 0 and row < mX.shape[0]


@cute.jit
def append(
    config: cutlass.Constexpr,
    ragged: Ragged,
    page_size: cute.FastDivmodDivisorV2 | None,
    mNew: cute.Tensor,
    mX: cute.Tensor,
    rotary: Rotary | None,
    i: Int32,
):
    """Vector i of mNew goes to its place in mX."""
    if i < vectors(mNew):
        v = vector(i, mNew)
        token = seqlen_before(ragged, v.batch) + v.token
        gNew = mNew[v.batch, v.token, v.head, None]  # (d)
        x = cute.make_rmem_tensor(ELEMENTS, mNew.element_type)
        if const_expr(rotary is None):
            cute.autovec_copy(cute.local_tile(gNew, (ELEMENTS,), (v.piece,)), x)
        else:
            x = rotate(config, gNew, v.piece, rotary, token)
        row, offset, exists = place(config, ragged, mX, page_size, v.batch, token)
        if exists:
            cute.autovec_copy(x, cute.local_tile(mX[row, offset, v.head, None], (ELEMENTS,), (v.piece,)))


@cute.jit
def rotate_Q(
    config: cutlass.Constexpr,
    ragged: Ragged,
    mQ: cute.Tensor,
    mQ_out: cute.Tensor,
    rotary: Rotary,
    advance: Int32,
    i: Int32,
):
    if i < vectors(mQ):
        v = vector(i, mQ)
        position = seqlen_before(ragged, v.batch) + v.token * advance
        x = rotate(config, mQ[v.batch, v.token, v.head, None], v.piece, rotary, position)
        cute.autovec_copy(x, cute.local_tile(mQ_out[v.batch, v.token, v.head, None], (ELEMENTS,), (v.piece,)))


@cute.kernel
def kernel(
    config: cutlass.Constexpr,
    ragged: Ragged,
    page_size: cute.FastDivmodDivisorV2 | None,
    mK_new: cute.Tensor,
    mV_new: cute.Tensor,
    mK: cute.Tensor,
    mV: cute.Tensor,
    mQ: cute.Tensor | None,
    mQ_out: cute.Tensor | None,
    rotary: Rotary | None,
    advance: Int32,
):
    if const_expr(config.pdl):
        cute.arch.griddepcontrol_launch_dependents()  # the next kernel's blocks may come, and wait
        cute.arch.griddepcontrol_wait()  # all that is read is there
    tidx, _, _ = cute.arch.thread_idx()
    block, kind, _ = cute.arch.block_idx()
    i = block * THREADS + tidx
    if kind == 0:
        append(config, ragged, page_size, mK_new, mK, rotary, i)
    elif kind == 1:
        append(config, ragged, page_size, mV_new, mV, None, i)
    else:
        if const_expr(rotary is not None):
            rotate_Q(config, ragged, mQ, mQ_out, rotary, advance, i)


kernel.set_name_prefix("mfa_kv_append", remove_cutlass_symbol=True)


@cute.jit
def launch(call: Append, config: cutlass.Constexpr, stream):
    """The tensors are as in the module's first lines; without rotary embedding, mQ, mQ_out, rotary are None.

    advance: 1 if query i is rotated to the position of new key i, 0 if all are to that of the first one.
    """
    mK_new, mV_new, mK, mV, mQ, mQ_out, rotary, advance, ragged = call
    most, kinds = vectors(mK_new), 2
    if const_expr(rotary is not None):
        most, kinds = cutlass.max(most, vectors(mQ)), 3
    kernel(
        config,
        ragged,
        cute.fast_divmod_create_divisor_v2(mK.shape[1]) if const_expr(config.page) else None,
        mK_new,
        mV_new,
        mK,
        mV,
        mQ,
        mQ_out,
        rotary,
        advance,
    ).launch(
        grid=(cute.ceil_div(most, THREADS), kinds, 1),
        block=(THREADS, 1, 1),
        stream=stream,
        use_pdl=config.pdl,
    )


def fake_call(config) -> Append:
    return arguments.append(config)
