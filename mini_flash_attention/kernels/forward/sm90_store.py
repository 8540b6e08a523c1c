"""A consumer warp's last step in sm90.py: O and the log-sum-exp go to global memory."""

import cutlass
import cutlass.cute as cute
from cutlass import Int32, const_expr
from cutlass.block import block_copy
from cutlass.cute.nvgpu import warp

from mini_flash_attention.kernels.forward.common import normalise
from mini_flash_attention.kernels.forward.sm90_records import Job, Work
from mini_flash_attention.kernels.parts.fragments import store_sequence


@cute.jit
def store(config: cutlass.Constexpr, w: Work, job: Job):
    """Normalise O and store it and the log-sum-exp; softmax.finish() has run."""
    tile, seqlen_q = job.tile, job.sizes.seqlen_q
    batch, start = tile.q_rows
    O = normalise(config, w)
    rows = cute.make_rmem_tensor(2, Int32)
    for r in cutlass.range_constexpr(2):
        rows[r] = tile.m_block * config.tile_m + w.coords[0][0] + 8 * r
        if w.lane % 4 == 0 and rows[r] < seqlen_q:
            w.call.mLSE[batch, tile.head, start + rows[r]] = w.softmax.offset[r]
    row_block = tile.m_block * (config.tile_m // 16) + cute.arch.make_warp_uniform(w.tidx // 32)
    mO = w.call.mO[batch, None, tile.head, None]  # (sq, d)
    if const_expr(config.q_stages == 1):
        store_sequence(O, mO, rows, start, seqlen_q, w.lane)
    elif const_expr(tile.q is None):  # noqa: SIM114, only one of the conditions is known to the compiler
        store_bulk(config, w, job, O, row_block)
    elif 16 * row_block + 16 <= seqlen_q:
        store_bulk(config, w, job, O, row_block)
    else:  # the next sequence's rows follow
        store_sequence(O, mO, rows, start, seqlen_q, w.lane)


@cute.jit
def store_bulk(config: cutlass.Constexpr, w: Work, job: Job, O: cute.Tensor, row_block: Int32):
    """Store this warp's 16 rows of O by TMA, through shared memory.

    They go over its rows of Q: its products alone read those, and it has waited for them.
    """
    (batch, start), warp_idx = job.tile.q_rows, cute.arch.make_warp_uniform(w.tidx // 32)
    sO = w.s.sQ[None, None, w.s.q_ring.slot(job.t)]  # (tile_m, d)
    atom = cute.make_copy_atom(warp.StMatrix8x8x16bOp(False, 4), O.element_type)
    thr_store = cute.make_tiled_copy_C(atom, w.setup.pv).get_slice(w.tidx)
    cute.copy(atom, thr_store.retile(O), thr_store.partition_D(sO))
    cute.arch.fence_view_async_shared()  # this lane's stores come before what the TMA unit does next
    cute.arch.sync_warp()  # all lanes have stored and fenced: lane 0 may start the TMA store of their rows
    block = (16, config.head_dim)
    gO = cute.domain_offset((start, 0), w.setup.o.tensor[None, None, job.tile.head, batch])  # (S, D)
    gO = cute.local_tile(gO, block, (row_block, 0))  # (16, d)
    sO = cute.local_tile(sO, block, (warp_idx, 0))  # (16, d)
    if w.lane == 0:
        block_copy(w.setup.o.atom, cute.group_modes(sO, 0, 2), cute.group_modes(gO, 0, 2))
        cute.arch.cp_async_bulk_commit_group()  # the group for which wait_for_O waits
