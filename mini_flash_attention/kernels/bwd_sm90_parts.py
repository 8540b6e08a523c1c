"""Parts of the Hopper backward: shared memory, the load warp, the dQ warpgroup, what consumers do to S."""

from typing import NamedTuple

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, const_expr
from cutlass.cute.nvgpu import cpasync, warpgroup

from mini_flash_attention.kernels.bwd_schedule import Block, pass_turn, turn, wait_turn
from mini_flash_attention.kernels.fragments import rows_cols
from mini_flash_attention.kernels.seqlen import Sizes
from mini_flash_attention.kernels.sm90 import Ring, Tma, commit, load, reduce_add, release, wgmma

CONSUMER_WGS = 2
DQ_WARP, LOAD_WARP = 8, 12  # the first warps of the dQ WG and of the load WG
THREADS = 512
CONSUMERS, DQ_WG = 1, 2  # named barriers; 3 + wg: of one consumer WG


class Mmas(NamedTuple):
    sdp: cute.TiledMma  # Sᵀ = K·Qᵀ and dPᵀ = V·dOᵀ    (n, m, d)
    dkv: cute.TiledMma  # dV += Pᵀ·dO and dK += dSᵀ·Q  (n, d, m), A in registers
    dq: cute.TiledMma  # dQ = dS·K                     (m, d, n)


class Shared(NamedTuple):
    """Shared memory and the rings that guard it."""

    sQ: cute.Tensor  # (tile_m, d, stages), at the end dK
    sdO: cute.Tensor  # (tile_m, d, do_stages)
    sK: cute.Tensor  # (tile_n, d, 1)
    sV: cute.Tensor  # (tile_n, d, 1), at the end dV
    sdSt: cute.Tensor  # (tile_n, tile_m, 2)
    sdQ: cute.Tensor  # (rows * cols, 2) float32: pieces of dQ, in the order of bwd_convert.offset
    sStats: cute.Tensor  # (2 * tile_m, stages) float32: -LSE / scale, then -delta
    q_ring: Ring  # Q and stats
    do_ring: Ring
    k_ring: Ring  # one use
    v_ring: Ring  # one use
    ds_ring: Ring  # filled by the consumers, emptied by the dQ WG
    sP: cute.Tensor | None  # (8, tile_m / 16, 128, 2), if config.wide: the registers of each thread
    p_ring: Ring | None


def transposed(sX: cute.Tensor) -> cute.Tensor:
    """The same memory, with the first two modes exchanged."""
    return cute.make_tensor(sX.iterator, cute.select(sX.layout, mode=[1, 0, *range(2, cute.rank(sX))]))


@cute.jit
def produce(
    config: cutlass.Constexpr,
    sizes: Sizes,
    block: Block,
    q: Tma,
    k: Tma,
    v: Tma,
    do: Tma,
    mStats: cute.Tensor,
    s: Shared,
):
    """The load warp. K and Q come first: the first product needs only them."""
    copy_stats = cute.make_copy_atom(cpasync.CopyBulkG2SOp(), Float32)
    n_block, batch = block.n_block, block.batch
    load(k, Int32(0), n_block, block.head_kv, batch, s.sK, s.k_ring, Int32(0))
    it = Int32(0)
    for g in cutlass.range(sizes.group, unroll=1):
        head = block.head_kv * sizes.group + g
        for m_block in cutlass.range(block.first, block.last, unroll=1):
            load(q, Int32(0), m_block, head, batch, s.sQ, s.q_ring, it, more=8 * config.tile_m)
            if it == 0:
                load(v, Int32(0), n_block, block.head_kv, batch, s.sV, s.v_ring, Int32(0))
                cute.arch.griddepcontrol_wait()  # stats are bwd_delta's
            slot = s.q_ring.slot(it)
            gStats = mStats[batch, head, m_block, None, None]  # (tile_m, 2)
            gStats = cute.make_tensor(gStats.iterator, cute.make_layout(2 * config.tile_m))
            with cute.arch.elect_one():
                cute.copy(copy_stats, gStats, s.sStats[None, slot], mbar_ptr=s.q_ring.full + slot)
            load(do, Int32(0), m_block, head, batch, s.sdO, s.do_ring, it)
            it += 1
    if it == 0:  # no query sees these keys; the consumers wait for V all the same
        load(v, Int32(0), n_block, block.head_kv, batch, s.sV, s.v_ring, Int32(0))


@cute.jit
def compute_dq(
    config: cutlass.Constexpr,
    sizes: Sizes,
    block: Block,
    tiled_mma: cute.TiledMma,
    mdQacc: cute.Tensor,
    mTurns: cute.Tensor,
    s: Shared,
):
    """A warp of the dQ WG: dQ = dS·K piece by piece, each added to dq_acc."""
    tidx = cute.arch.thread_idx()[0] % 128
    lane = cute.arch.lane_idx()
    first_warp = cute.arch.make_warp_uniform(cute.arch.warp_idx()) == DQ_WARP
    rows, cols = config.dq_piece
    pieces = config.tile_m * config.head_dim // (rows * cols)
    tdQrdS, tdQrK = dq_operands(config, tiled_mma, s)
    acc_dQ = cute.make_rmem_tensor(tiled_mma.get_slice(0).partition_shape_C((rows, cols)), Float32)
    cute.arch.griddepcontrol_wait()  # bwd_delta has zeroed dq_acc and turns
    s.k_ring.wait_full(Int32(0))
    it = Int32(0)
    before = mTurns.iterator  # of the tile of dq_acc that was added to last
    for g in cutlass.range(sizes.group, unroll=1):
        head = block.head_kv * sizes.group + g
        for m_block in cutlass.range(block.first, block.last, unroll=1):
            s.ds_ring.wait_full(it)
            slot = s.ds_ring.slot(it)
            for p in cutlass.range_constexpr(pieces):
                wgmma(tiled_mma, acc_dQ, tdQrdS[p][None, None, None, slot], tdQrK[p], False)
                buffer = p % 2 if const_expr(pieces % 2 == 0) else (it + p) % 2
                if first_warp:
                    if const_expr(config.deterministic and p == 0):
                        cute.arch.cp_async_bulk_wait_group(0)  # the tile before has been added
                        if it > 0:
                            pass_turn(before)
                    else:
                        cute.arch.cp_async_bulk_wait_group(1, read=True)  # the piece before the last was read
                cute.arch.barrier(barrier_id=DQ_WG, number_of_threads=128)  # its buffer may be overwritten
                warpgroup.wait_group(0)  # dQ
                if const_expr(p == pieces - 1):
                    release(s.ds_ring, it, lane)
                sPiece = s.sdQ[None, buffer]
                store_dq(config, acc_dQ, sPiece, tidx)
                cute.arch.fence_view_async_shared()  # dQ: generic writes, read by the bulk reduction
                cute.arch.barrier(barrier_id=DQ_WG, number_of_threads=128)  # the piece is complete
                if first_warp:
                    if const_expr(config.deterministic and p == 0):
                        turns = cute.local_tile(mTurns[block.batch, head, None], (1,), (m_block,))
                        before = turns.iterator
                        wait_turn(before, turn(config, sizes, block.n_block, m_block))
                    gdQ = cute.local_tile(mdQacc[block.batch, head, m_block, None], (rows * cols,), (p,))
                    with cute.arch.elect_one():
                        reduce_add(sPiece, gdQ)
                    cute.arch.cp_async_bulk_commit_group()
            it += 1
    if first_warp:
        cute.arch.cp_async_bulk_wait_group(0)  # all has been added; shared memory is no longer read
        if const_expr(config.deterministic):
            if it > 0:
                pass_turn(before)


def dq_operands(config, tiled_mma: cute.TiledMma, s: Shared) -> tuple[list[cute.Tensor], list[cute.Tensor]]:
    """A, of dS (MMA, 1, tile_n / 16, 2), and B, of K (MMA, 1, tile_n / 16), of each piece of dQ."""
    rows, cols = config.dq_piece
    wg_mma = tiled_mma.get_slice(0)
    sdS, sKt = transposed(s.sdSt), transposed(s.sK)[None, None, 0]  # (tile_m, tile_n, 2), (d, tile_n)
    tdQrdS, tdQrK = [], []
    for p in range(config.tile_m * config.head_dim // (rows * cols)):
        row, col = divmod(p, config.head_dim // cols)
        A = cute.local_tile(sdS, (rows, config.tile_n, 2), (row, 0, 0))
        B = cute.local_tile(sKt, (cols, config.tile_n), (col, 0))
        tdQrdS.append(wg_mma.make_fragment_A(wg_mma.partition_A(A)))
        tdQrK.append(wg_mma.make_fragment_B(wg_mma.partition_B(B)))
    return tdQrdS, tdQrK


@cute.jit
def store_dq(config: cutlass.Constexpr, acc_dQ: cute.Tensor, sPiece: cute.Tensor, tidx: Int32):
    """A piece of dQ to shared memory, in the order of bwd_convert.offset: no two banks conflict."""
    _, cols = config.dq_piece
    row = tidx // 32 * 16 + tidx % 32 // 4  # this thread's rows: row, row + 8
    pairs = cute.make_layout((2, 2), stride=(1, 8 * cols))
    for g in cutlass.range_constexpr(cols // 8):
        at = cols * row + 2 * (tidx % 4) + 8 * (g % 4 ^ row % 4) + g // 4 * 32
        src = cute.make_tensor(acc_dQ.iterator + 4 * g, cute.make_layout((2, 2)))
        cute.autovec_copy(src, cute.make_tensor(sPiece.iterator + at, pairs))


def thread_stats(config, s: Shared, lane: Int32) -> cute.Tensor:
    """This thread's columns of sStats: ((2, tile_m / 8), 2, stages)."""
    shape, m = ((2, config.tile_m // 8), 2, config.stages), config.tile_m
    return cute.make_tensor(
        s.sStats.iterator + 2 * (lane % 4), cute.make_layout(shape, stride=((1, 8), m, 2 * m))
    )


@cute.jit
def seed(acc: cute.Tensor, stat: cute.Tensor):
    """acc[row, col] = stat[col]: the product comes out with the statistic of its query subtracted."""
    X = rows_cols(acc)
    values = cute.make_rmem_tensor(stat.shape, Float32)
    cute.autovec_copy(stat, values)
    for c in cutlass.range_constexpr(cute.size(X, mode=[1])):
        for r in cutlass.range_constexpr(cute.size(X, mode=[0])):
            X[r, c] = values[c]


@cute.jit
def mask(config: cutlass.Constexpr, sizes: Sizes, acc_S: cute.Tensor, key: Int32, query: Int32):
    """acc_S <- -inf where a query may not see a key; key, query: this thread's first row and column.

    Keys from seqlen_k on are zeros, whose P = exp(-LSE) may be infinite.
    """
    S = rows_cols(acc_S)
    left, right = sizes.window(config.mask)
    for r in cutlass.range_constexpr(cute.size(S, mode=[0])):
        key_r = key + 8 * r
        # The column on whose diagonal the key lies.
        diagonal = key_r + sizes.seqlen_q - sizes.seqlen_k - query
        begin = Int32(0) if const_expr(right is None) else diagonal - right
        begin = begin if key_r < sizes.seqlen_k else Int32(config.tile_m)
        for c in cutlass.range_constexpr(cute.size(S, mode=[1])):
            S[r, c] = S[r, c] if (c // 2) * 8 + c % 2 >= begin else -Float32.inf
        if const_expr(left is not None):
            for c in cutlass.range_constexpr(cute.size(S, mode=[1])):
                S[r, c] = S[r, c] if (c // 2) * 8 + c % 2 <= diagonal + left else -Float32.inf


@cute.jit
def exponentials(acc_S: cute.Tensor, scale_log2: Float32):
    """acc_S <- P."""
    for i in cutlass.range_constexpr(cute.size(acc_S)):
        acc_S[i] = cute.math.exp2(acc_S[i] * scale_log2, fastmath=True)


@cute.jit
def hand_over(s: Shared, w, it: Int32, dS: cute.Tensor):
    """This warp's 16 keys of dS, to the dQ WG; w.store_dS and w.tdSsdS say where."""
    cute.copy(w.store_dS, w.store_dS.retile(dS), w.tdSsdS[None, None, None, s.ds_ring.slot(it)])
    cute.arch.fence_view_async_shared()  # generic writes, read by wgmma
    cute.arch.sync_warp()  # all lanes have done so
    commit(s.ds_ring, it, w.lane)
