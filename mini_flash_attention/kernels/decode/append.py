"""Appending to a KV cache: new keys and values go behind those of each sequence; rotary embedding.

Rotary embedding (Su et al. 2021, arXiv 2104.09864) turns the new keys and the queries. A thread moves 16
bytes.
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
K, V, Q = range(3)  # what a thread block moves


class Vector(NamedTuple):
    """Which 16 bytes of a tensor (b, s, h, d) a thread moves."""

    batch: Int32
    token: Int32
    head: Int32
    piece: Int32


@cute.jit
def launch(call: Append, config: cutlass.Constexpr, stream):
    """Without rotary embedding q stays where it is."""
    most, kinds = vectors(call.mK_new), 2
    if const_expr(call.rotary is not None):
        most, kinds = cutlass.max(most, vectors(call.mQ)), 3
    page_size = cute.fast_divmod_create_divisor_v2(call.mK.shape[1]) if const_expr(config.page) else None
    kernel(config, call, page_size).launch(
        grid=(cute.ceil_div(most, THREADS), kinds, 1),
        block=(THREADS, 1, 1),
        stream=stream,
        use_pdl=config.pdl,
    )


def fake_call(config) -> Append:
    return arguments.append(config)


@cute.kernel
def kernel(config: cutlass.Constexpr, call: Append, page_size: cute.FastDivmodDivisorV2 | None):
    if const_expr(config.pdl):
        cute.arch.griddepcontrol_launch_dependents()  # the next kernel's thread blocks may come, and wait
        cute.arch.griddepcontrol_wait()  # all that is read is there, all that is overwritten has been read
    tidx, _, _ = cute.arch.thread_idx()
    block, kind, _ = cute.arch.block_idx()
    i = block * THREADS + tidx
    if kind == K:
        append(config, call, page_size, K, i)
    elif kind == V:
        append(config, call, page_size, V, i)
    else:
        if const_expr(call.rotary is not None):
            rotate_Q(config, call, i)


kernel.set_name_prefix("mfa_kv_append", remove_cutlass_symbol=True)


@cute.jit
def append(
    config: cutlass.Constexpr,
    call: Append,
    page_size: cute.FastDivmodDivisorV2 | None,
    kind: cutlass.Constexpr,
    i: Int32,
):
    """Vector i of the new keys or values goes to its place in the cache; keys are rotated."""
    mNew, mX = (call.mK_new, call.mK) if const_expr(kind == K) else (call.mV_new, call.mV)
    if i < vectors(mNew):
        v = vector(i, mNew)
        token = seqlen_before(call.ragged, v.batch) + v.token
        gNew = mNew[v.batch, v.token, v.head, None]  # (d)
        x = cute.make_rmem_tensor(ELEMENTS, mNew.element_type)
        if const_expr(kind == K and call.rotary is not None):
            x = rotate(config, gNew, v.piece, call.rotary, token)
        else:
            cute.autovec_copy(cute.local_tile(gNew, (ELEMENTS,), (v.piece,)), x)
        row, offset, exists = place(config, call.ragged, mX, page_size, v.batch, token)
        if exists:
            cute.autovec_copy(x, cute.local_tile(mX[row, offset, v.head, None], (ELEMENTS,), (v.piece,)))


@cute.jit
def rotate_Q(config: cutlass.Constexpr, call: Append, i: Int32):
    """Vector i of q, rotated, goes to q_out."""
    if i < vectors(call.mQ):
        v = vector(i, call.mQ)
        position = seqlen_before(call.ragged, v.batch) + v.token * call.advance
        x = rotate(config, call.mQ[v.batch, v.token, v.head, None], v.piece, call.rotary, position)
        gOut = call.mQ_out[v.batch, v.token, v.head, None]  # (d)
        cute.autovec_copy(x, cute.local_tile(gOut, (ELEMENTS,), (v.piece,)))


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
def load(gX: cute.Tensor, piece: Int32, count: cutlass.Constexpr):
    """`count` adjacent elements in float32."""
    x = cute.make_rmem_tensor(count, gX.element_type)
    cute.autovec_copy(cute.local_tile(gX, (count,), (piece,)), x)
    return x.load().to(Float32)


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
def seqlen_before(ragged: Ragged, b: Int32):
    """The keys of sequence b before the append, left padding included: the new ones' first place."""
    seqlen = ragged.keys
    if ragged.given & SEQUSED_K:
        seqlen = ragged.seqused_k[b]
    return seqlen


def vector(i: Int32, mX: cute.Tensor) -> Vector:
    _, seqlen, heads, head_dim = mX.shape
    pieces = head_dim // ELEMENTS
    row, piece = i // pieces, i % pieces
    token, head = row // heads, row % heads
    return Vector(token // seqlen, token % seqlen, head, piece)


def vectors(mX: cute.Tensor) -> Int32:
    """How many 16 bytes a tensor has."""
    batch, seqlen, heads, head_dim = mX.shape
    return batch * seqlen * heads * (head_dim // ELEMENTS)
