"""Merging the splits of a decode by their log-sum-exp (Dao et al. 2023, "Flash-Decoding")."""

from typing import NamedTuple

import cutlass
import cutlass.cute as cute
from cutlass import Boolean, Float32, Int32, Int64, const_expr
from cutlass.cute.nvgpu import LoadCacheMode, cpasync
from cutlass.memory import SmemAllocator

from mini_flash_attention.config import ELEMENTS
from mini_flash_attention.kernels.fragments import convert
from mini_flash_attention.kernels.scores import LOG2_E
from mini_flash_attention.kernels.seqlen import CU_SEQLENS_Q, Ragged
from mini_flash_attention.kernels.softmax import LN_2

WARPS = 4  # of a thread block, which has one row of O: they share its splits
BATCH = 8  # splits of a warp whose O is on the way at a time
MAX_SPLITS = 128


class Partial(NamedTuple):
    """The results of the splits; a row is a query of a head, rows are numbered as in a contiguous q."""

    O: cute.Tensor  # (splits, rows, d) float32; not written where LSE is -inf
    LSE: cute.Tensor  # (splits, rows) float32


def partial(workspace: cute.Tensor, splits: Int32, mO: cute.Tensor) -> Partial:
    """Views of the workspace: (splits * rows * (d + 1)) float32."""
    batch, seqlen, heads, head_dim = mO.shape
    rows = batch * seqlen * heads
    of_row = cute.assume(Int64(head_dim), divby=ELEMENTS)
    of_splits = cute.assume(rows * of_row, divby=ELEMENTS)
    O = cute.make_layout((splits, rows, head_dim), stride=(of_splits, of_row, 1))
    LSE = cute.make_layout((splits, rows), stride=(Int64(rows), 1))
    return Partial(
        cute.make_tensor(workspace.iterator, O),
        cute.make_tensor(workspace.iterator + splits * of_splits, LSE),
    )


def row_of(mO: cute.Tensor, batch: Int32, token: Int32, head: Int32) -> Int32:
    return (batch * mO.shape[1] + token) * mO.shape[2] + head


@cute.jit
def weigh(x: Partial, num_splits: Int32, row: Int32, sShare: cute.Tensor, lane: Int32):
    """sShare <- what each split counts in O; by a whole warp. Returns the row's log-sum-exp."""
    lse = cute.make_rmem_tensor(MAX_SPLITS // 32, Float32)  # of the splits lane, lane + 32, ...
    lse.fill(-Float32.inf)
    largest = -Float32.inf
    for i in cutlass.range_constexpr(MAX_SPLITS // 32):
        if lane + 32 * i < num_splits:
            lse[i] = x.LSE[lane + 32 * i, row]
        largest = cute.arch.fmax(largest, lse[i])
    largest = cute.arch.warp_reduction_max(largest)
    base = Float32(0.0) if largest == -Float32.inf else largest  # no keys: not -inf - -inf
    total = Float32(0.0)
    for i in cutlass.range_constexpr(MAX_SPLITS // 32):
        lse[i] = cute.math.exp2((lse[i] - base) * Float32(LOG2_E), fastmath=True)
        total += lse[i]
    total = cute.arch.warp_reduction_sum(total)
    scale = Float32(0.0) if total == 0.0 else cute.arch.rcp_approx(total)
    for i in cutlass.range_constexpr(MAX_SPLITS // 32):
        sShare[lane + 32 * i] = lse[i] * scale
    return -Float32.inf if total == 0.0 else largest + cute.math.log2(total, fastmath=True) * Float32(LN_2)


@cute.jit
def add_splits(
    x: Partial,
    num_splits: Int32,
    row: Int32,
    sShare: cute.Tensor,
    sPart: cute.Tensor,
    acc: cute.Tensor,
    warp: Int32,
    lane: Int32,
):
    """acc += this warp's splits, every WARPS-th one.

    acc (4, d / 128): the lane's columns. sPart (d, BATCH, WARPS): loads to registers would be put off until
    they are needed, one after the other; copies to shared memory are on the way at once.
    """
    atom = cute.make_copy_atom(
        cpasync.CopyG2SOp(cache_mode=LoadCacheMode.GLOBAL), Float32, num_bits_per_copy=128
    )
    vector, counts = cute.make_layout(((4, 1),)), cute.make_rmem_tensor(1, Boolean)
    first = warp
    while first < num_splits:
        for i in cutlass.range_constexpr(BATCH):
            split = first + WARPS * i
            for v in cutlass.range_constexpr(cute.size(acc, mode=[1])):
                col = 4 * lane + 128 * v
                counts[0] = Boolean(False)
                if split < num_splits and col < x.O.shape[2]:
                    counts[0] = sShare[split] > 0.0
                gO = cute.local_tile(x.O[split, row, None], (4,), (col // 4,))
                sO = cute.local_tile(sPart[None, i, warp], (4,), (col // 4,))
                source, target = (cute.make_tensor(t.iterator, vector) for t in (gO, sO))
                cute.copy(atom, source, target, pred=counts)
        cute.arch.cp_async_commit_group()
        cute.arch.cp_async_wait_group(0)  # a lane reads what it copied itself
        for i in cutlass.range_constexpr(BATCH):
            split = first + WARPS * i
            if split < num_splits:
                for v in cutlass.range_constexpr(cute.size(acc, mode=[1])):
                    for c in cutlass.range_constexpr(4):
                        acc[c, v] += sShare[split] * sPart[4 * lane + 128 * v + c, i, warp]
        first += WARPS * BATCH


@cute.kernel
def kernel(
    config: cutlass.Constexpr,
    x: Partial,
    num_splits: Int32,
    mO: cute.Tensor,
    mLSE: cute.Tensor,
    ragged: Ragged,
):
    tidx, _, _ = cute.arch.thread_idx()
    row, _, _ = cute.arch.block_idx()
    warp, lane = cute.arch.make_warp_uniform(tidx // 32), tidx % 32
    _, seqlen, heads, _ = mO.shape
    head, token = row % heads, row // heads
    batch, token = token // seqlen, token % seqlen
    smem = SmemAllocator()
    sShare = smem.allocate_tensor(Float32, cute.make_layout(MAX_SPLITS), 16)
    vectors = (config.head_dim + 127) // 128
    sPart = smem.allocate_tensor(Float32, cute.make_layout((128 * vectors, BATCH, WARPS)), 16)
    sO = sPart[None, 0, None]  # (d, WARPS): a warp's sum takes the place of its first split
    acc = cute.make_rmem_tensor((4, vectors), Float32)
    acc.fill(0.0)
    if const_expr(config.pdl):
        cute.arch.griddepcontrol_wait()  # the splits are there
    lse = Float32(0.0)
    if warp == 0:
        lse = weigh(x, num_splits, row, sShare, lane)
    cute.arch.barrier()
    add_splits(x, num_splits, row, sShare, sPart, acc, warp, lane)
    for v in cutlass.range_constexpr(vectors):
        cute.autovec_copy(acc[None, v], cute.local_tile(sO[None, warp], (4,), (lane + 32 * v,)))
    cute.arch.barrier()
    mine = is_mine(ragged, token)
    if 4 * tidx < mO.shape[3] and mine:
        out = cute.make_rmem_tensor(4, mO.element_type)
        total = cute.make_rmem_tensor(4, Float32)
        total.fill(0.0)
        for i in cutlass.range_constexpr(WARPS):
            for c in cutlass.range_constexpr(4):
                total[c] += sO[4 * tidx + c, i]
        convert(total, out)
        cute.autovec_copy(out, cute.local_tile(mO[batch, token, head, None], (4,), (tidx,)))
        if tidx == 0:
            mLSE[batch, head, token] = lse


@cute.jit
def is_mine(ragged: Ragged, token: Int32):
    """Whether the token is a sequence's: packed q may have more rows than its sequences."""
    mine = Boolean(True)
    if ragged.given & CU_SEQLENS_Q:
        mine = ragged.cu_seqlens_q[0] <= token and token < ragged.cu_seqlens_q[ragged.batch]
    return mine


kernel.set_name_prefix("mfa_combine", remove_cutlass_symbol=True)


@cute.jit
def launch(
    config: cutlass.Constexpr,
    x: Partial,
    num_splits: Int32,
    mO: cute.Tensor,
    mLSE: cute.Tensor,
    ragged: Ragged,
    stream,
):
    kernel(config, x, num_splits, mO, mLSE, ragged).launch(
        grid=(x.LSE.shape[1], 1, 1), block=(32 * WARPS, 1, 1), stream=stream, use_pdl=config.pdl
    )
