"""The dQ warpgroup of sm90.py: dQ = dS·K in pieces, each added to dq_acc by the TMA unit."""

from typing import NamedTuple

import cutlass
import cutlass.cute as cute
from cutlass import Boolean, Int32, const_expr
from cutlass.cute.nvgpu import warpgroup

from mini_flash_attention.kernels.backward import sm90_dq_transposed
from mini_flash_attention.kernels.backward.schedule import (
    Block,
    pass_turn,
    query_block,
    turn,
    visits,
    wait_turn,
)
from mini_flash_attention.kernels.backward.sm90_produce import next_tile
from mini_flash_attention.kernels.backward.sm90_records import (
    DQ_WARP,
    DQ_WG,
    Setup,
    Shared,
    accumulator,
    clear_beyond,
)
from mini_flash_attention.kernels.calls import Backward
from mini_flash_attention.kernels.parts.fragments import transposed
from mini_flash_attention.kernels.parts.sm90 import reduce_add, release, wgmma


class Work(NamedTuple):
    """What one warp computes with."""

    call: Backward
    setup: Setup
    s: Shared
    tidx: Int32  # in the WG
    first_warp: Boolean  # it starts the reductions, always by the same lane, which alone can wait for them
    acc_dQ: cute.Tensor  # of a piece: ((2, 2, cols / 8), 1, 1); transposed: ((2, 2, rows / 8), 1, 1)
    dS: list[cute.Tensor]  # of each piece: descriptors (MMA, 1, tile_n / 16, 2)
    K: list[cute.Tensor]  # of each piece: descriptors (MMA, 1, tile_n / 16, kv_stages); transposed: registers


@cute.jit
def compute_dq(config: cutlass.Constexpr, call: Backward, setup: Setup, s: Shared, block: Block):
    """A warp of the dQ WG. n, it: as in sm90_produce."""
    w = make_work(config, call, setup, s)
    n, it, more = Int32(0), Int32(0), Boolean(True)
    while more:
        it = add_tile(config, w, block, n, it)
        if const_expr(config.persistent):
            if const_expr(config.dq_transposed):
                cute.arch.sync_warp()  # all lanes have K in registers: no query block may have shown it
            # Else the last wgmma that reads K has been waited for.
            release(s.k_ring, n, cute.arch.lane_idx())
        block, more = next_tile(config, w, block, n)
        n += 1
    if w.first_warp:
        cute.arch.cp_async_bulk_wait_group(0, read=True)  # sdQ must outlive the reads of the last pieces


@cute.jit
def add_tile(config: cutlass.Constexpr, w: Work, block: Block, n: Int32, it: Int32) -> Int32:
    """dQ of all query blocks of the n-th tile. Returns the next tile's `it`."""
    sizes, k_slot = block.sizes(w.setup.sizes), w.s.k_ring.slot(n)
    cute.arch.griddepcontrol_wait()  # delta is done: dq_acc and turns are zero
    w.s.k_ring.wait_full(n)  # K is there: load_Kt or dQ's products read it
    if const_expr(config.dq_transposed):
        sK = w.s.sK[None, None, k_slot]
        if const_expr(config.ragged):
            # Here before any dS. Otherwise the consumers' zeros serve: dS[it] is committed behind them.
            clear_beyond(sK, sizes.seqlen_k, block.n_block * config.tile_n, DQ_WG)
        sm90_dq_transposed.load_Kt(w.setup.dq, sK, w.K[0], w.tidx)
    before = w.call.mTurns.iterator  # the turns of the tile of dq_acc that was added to last
    for head in cutlass.range(block.head, block.head + block.heads, unroll=1):
        x = visits(config, w.call, block, head)
        for position in cutlass.range(x.first, x.last, unroll=1):
            m_block = query_block(config, w.call, block, head, x, position)
            before = add_block(config, w, block, head, m_block, k_slot, it, before)
            it += 1
    if const_expr(config.deterministic):
        if w.first_warp:
            cute.arch.cp_async_bulk_wait_group(0)  # the last tile has been added: its turn may be passed on
            if it > 0:
                pass_turn(before)
    return it


@cute.jit
def add_block(
    config: cutlass.Constexpr,
    w: Work,
    block: Block,
    head: Int32,
    m_block: Int32,
    k_slot: Int32,
    it: Int32,
    before: cute.Pointer,
) -> cute.Pointer:
    """dq_acc += dS·K of one query block. Returns its turns, which become the next `before`."""
    s, (rows, cols) = w.s, config.dq_piece
    batch, number = block.place(m_block)
    turns = cute.local_tile(w.call.mTurns[batch, head, None], (1,), (number,)).iterator
    s.ds_ring.wait_full(it)  # all consumers have handed over their keys' dS
    pieces = len(w.dS)
    for p in cutlass.range_constexpr(pieces):
        issue_dQ(config, w, p, s.ds_ring.slot(it), k_slot)
        buffer = p % 2 if const_expr(pieces % 2 == 0) else (it + p) % 2
        if w.first_warp:
            if const_expr(config.deterministic and p == 0):
                cute.arch.cp_async_bulk_wait_group(0)  # the tile before has been added
                if it > 0:
                    pass_turn(before)  # by the lane that has waited
            else:
                cute.arch.cp_async_bulk_wait_group(1, read=True)  # the piece before the last was read
        cute.arch.barrier(barrier_id=DQ_WG, number_of_threads=128)  # so its buffer may be overwritten
        warpgroup.wait_group(0)  # dQ is in acc_dQ; dS and K have been read
        if const_expr(p == pieces - 1):
            release(s.ds_ring, it, cute.arch.lane_idx())
        store_piece(config, w, s.sdQ[None, buffer])
        cute.arch.fence_view_async_shared()  # generic writes of dQ, read by the bulk reduction
        cute.arch.barrier(barrier_id=DQ_WG, number_of_threads=128)  # all threads' part of the piece is there
        if w.first_warp:
            if const_expr(config.deterministic and p == 0):
                # All key blocks to the right have added theirs: the order is fixed.
                wait_turn(turns, turn(config, block.sizes(w.setup.sizes), block.n_block, m_block))
            gdQ = cute.local_tile(w.call.mdQacc[batch, head, number, None], (rows * cols,), (p,))
            with cute.arch.elect_one():
                reduce_add(s.sdQ[None, buffer], gdQ)
            cute.arch.cp_async_bulk_commit_group()  # a group for each piece: the waits above count them
    return turns


@cute.jit
def issue_dQ(config: cutlass.Constexpr, w: Work, p: cutlass.Constexpr, ds_slot: Int32, k_slot: Int32):
    """acc_dQ = piece p of dQ."""
    dS = w.dS[p][None, None, None, ds_slot]
    if const_expr(config.dq_transposed):
        wgmma(w.setup.dq, w.acc_dQ, w.K[0], dS, False)
    else:
        wgmma(w.setup.dq, w.acc_dQ, dS, w.K[p][None, None, None, k_slot], False)


@cute.jit
def store_piece(config: cutlass.Constexpr, w: Work, sPiece: cute.Tensor):
    """acc_dQ to shared memory, in the order of convert.offset: no two banks conflict."""
    if const_expr(config.dq_transposed):
        sm90_dq_transposed.store_piece(config, w.acc_dQ, sPiece, w.tidx)
    else:
        _, cols = config.dq_piece
        row = w.tidx // 32 * 16 + w.tidx % 32 // 4  # this thread's rows: row, row + 8
        pairs = cute.make_layout((2, 2), stride=(1, 8 * cols))
        for g in cutlass.range_constexpr(cols // 8):
            at = cols * row + 2 * (w.tidx % 4) + 8 * (g % 4 ^ row % 4) + g // 4 * 32
            src = cute.make_tensor(w.acc_dQ.iterator + 4 * g, cute.make_layout((2, 2)))
            cute.autovec_copy(src, cute.make_tensor(sPiece.iterator + at, pairs))


def make_work(config, call: Backward, setup: Setup, s: Shared) -> Work:
    rows, cols = config.dq_piece
    count, wg_mma = config.tile_m * config.head_dim // (rows * cols), setup.dq.get_slice(0)
    pieces = [divmod(p, config.head_dim // cols) for p in range(count)]
    sdS, sKt = transposed(s.sdSt), transposed(s.sK)  # (tile_m, tile_n, 2), (d, tile_n, kv_stages)
    dS = [cute.local_tile(sdS, (rows, config.tile_n, 2), (row, 0, 0)) for row, _ in pieces]
    K = [cute.local_tile(sKt, (cols, config.tile_n, config.kv_stages), (col, 0, 0)) for _, col in pieces]
    if config.dq_transposed:
        acc_dQ, K = accumulator(wg_mma, cols, rows), [sm90_dq_transposed.make_Kt(config, setup.dq)]
        dS = [wg_mma.make_fragment_B(wg_mma.partition_B(x)) for x in dS]
    else:
        acc_dQ, K = (
            accumulator(wg_mma, rows, cols),
            [wg_mma.make_fragment_B(wg_mma.partition_B(x)) for x in K],
        )
        dS = [wg_mma.make_fragment_A(wg_mma.partition_A(x)) for x in dS]
    tidx, first = (
        cute.arch.thread_idx()[0] % 128,
        cute.arch.make_warp_uniform(cute.arch.warp_idx()) == DQ_WARP,
    )
    return Work(call, setup, s, tidx, first, acc_dQ, dS, K)
