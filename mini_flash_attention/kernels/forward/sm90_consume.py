"""The consumer warps of sm90.py: S = Q·Kᵀ, softmax, O += P·V.

`it` counts key blocks and `t` tiles so far: they number the uses of the rings, as the producer counts them.
"""

import cutlass
import cutlass.cute as cute
from cutlass import Boolean, Float32, Int32, const_expr
from cutlass.cute.nvgpu import warp, warpgroup

from mini_flash_attention.kernels.calls import Forward
from mini_flash_attention.kernels.forward.common import drop, key_block, mask, sink_of, to_scores
from mini_flash_attention.kernels.forward.sm90_produce import read_tile, walk_of
from mini_flash_attention.kernels.forward.sm90_records import TURN, WG, Job, Setup, Shared, Work, make_work
from mini_flash_attention.kernels.forward.sm90_store import store
from mini_flash_attention.kernels.parts import sparse
from mini_flash_attention.kernels.parts.fragments import as_operand_A, convert, rows_cols
from mini_flash_attention.kernels.parts.scheduler import Tile
from mini_flash_attention.kernels.parts.seqlen import Sizes
from mini_flash_attention.kernels.parts.sm90 import all_true, release, wgmma, zero_rows


@cute.jit
def consume(config: cutlass.Constexpr, call: Forward, setup: Setup, s: Shared):
    """A consumer warp. With two Q buffers, a tile's first S is issued with the previous tile's last P·V."""
    w = make_work(config, call, setup, s)
    if const_expr(config.ordered):
        if w.wg == config.wgs - 1:
            cute.arch.barrier_arrive(barrier_id=TURN, number_of_threads=256)  # WG 0 begins
    t, it = Int32(0), Int32(0)
    tile = read_tile(s, call.ragged, t, w.lane)
    skipped = skipped_blocks(config, setup.sizes, w, tile)
    if const_expr(config.q_stages == 2):
        first_S(config, w, tile, t, it, skipped)
    while tile.m_block >= 0:
        if const_expr(config.q_stages == 1):
            first_S(config, w, tile, t, it, skipped)
        job = make_job(config, setup.sizes, w, tile, t)
        first_P(config, w, job)
        it = skip_values(config, w, it, skipped)
        if const_expr(call.ragged is not None):
            clear_beyond(config, w, job, it)
        if const_expr(config.q_stages == 2):
            if t > 0:
                wait_for_O(w)
                release(w.s.q_ring, t - 1, w.lane)  # O has left the slot: Q of tile t + 1 may come
        it = later_blocks(config, w, job, it)
        if const_expr(config.q_stages == 1):
            release(w.s.q_ring, t, w.lane)  # all S of the tile are there: the next Q may come
        tile_next = read_tile(s, call.ragged, t + 1, w.lane)
        skipped = skipped_blocks(config, setup.sizes, w, tile_next)
        last_O(config, w, job, tile_next, it, skipped)
        store(config, w, job)
        t += 1
        it += 1
        tile = tile_next
    wait_for_O(w)  # else shared memory would be gone before the last O has left it


@cute.jit
def make_job(config: cutlass.Constexpr, all_sizes: Sizes, w: Work, tile: Tile, t: Int32) -> Job:
    sizes = tile.sizes(all_sizes)
    walk = walk_of(config, all_sizes, tile)
    if const_expr(config.sparse):
        sizes = sizes.of(sizes.seqlen_q, sparse.keys_of(tile.visits, sizes.seqlen_k))
    elif const_expr(config.staggered):
        walk = sizes.walk_of_wg(config, tile.m_block, w.wg)
    return Job(t, tile, sizes, walk)


@cute.jit
def first_S(config: cutlass.Constexpr, w: Work, tile: Tile, t: Int32, it: Int32, skipped: Int32):
    """S of a tile's first block, where no other product can be issued with it."""
    if const_expr(tile.q is None):  # noqa: SIM114, only one of the conditions is known to the compiler
        it = wait_for_operands(config, w, t, it, skipped)
    elif tile.m_block >= 0:  # a ragged batch may have fewer tiles than there are thread blocks
        it = wait_for_operands(config, w, t, it, skipped)
    load_Q(config, w, t)
    issue_S(config, w, t, it)
    warpgroup.wait_group(0)  # S is there: it may be read
    release(w.s.k_ring, it, w.lane)  # and K overwritten


@cute.jit
def first_P(config: cutlass.Constexpr, w: Work, job: Job):
    """S of a tile's first block becomes P, with the rows' first offsets."""
    tile, start = job.tile, job.walk.start
    if const_expr(config.dropout):
        w.batch_head[0] = tile.batch * job.sizes.heads + tile.head
    n_block = key_block(config, w.call, tile, start)
    if const_expr(not config.sparse):
        to_scores(config, w, job.sizes, tile, tile.m_block, n_block)
    if start >= job.walk.free_end:  # else every row sees it whole
        if const_expr(config.sparse):
            to_scores(config, w, job.sizes, tile, tile.m_block, n_block)
        mask(config, w, job.sizes, tile.m_block, n_block)
    elif const_expr(config.sparse):
        to_scores(config, w, job.sizes, tile, tile.m_block, n_block, False)
    w.softmax.first(w.acc_S)
    if const_expr(config.ragged):  # rows beyond the sequence, maybe another's queries: out of its way
        rows = job.sizes.seqlen_q - tile.m_block * config.tile_m - rows_cols(w.coords)[0, 0][0]
        for r in cutlass.range_constexpr(2):
            w.softmax.offset[r] = w.softmax.offset[r] if 8 * r < rows else Float32.inf
    to_operand(config, w, job, n_block)
    w.acc_O.fill(0.0)


@cute.jit
def later_blocks(config: cutlass.Constexpr, w: Work, job: Job, it: Int32) -> Int32:
    """All steps of a tile after its first block, in at most two rounds. Returns the ring use reached."""
    start, free_end, free_first, first = job.walk
    n_block, masked_end = start - 1, free_end
    while n_block >= first:
        while n_block >= masked_end:
            step(config, w, job, it, n_block, True)
            it += 1
            n_block -= 1
        steady = Boolean(True)
        while (n_block >= free_first) & steady:
            steady = step(config, w, job, it, n_block, False)
            it += 1
            n_block -= 1
        masked_end = first  # the left edge, or scores that grow: the rest as if it were masked
    return it


@cute.jit
def step(config: cutlass.Constexpr, w: Work, job: Job, it: Int32, n_block: Int32, masked: cutlass.Constexpr):
    """S of the next block (ring use it + 1) under O += P·V of the one before (use it); then S becomes P.

    n_block: its position in the walk.

    A block without a mask takes no maximum: the rows keep their offsets, and the block's sums tell
    whether P stayed in range. Where it did not, for any of the WG's 64 rows, S is computed once more,
    the offsets are renewed, and False is returned: the caller then stops trusting this tile's offsets.
    """
    n_block = key_block(config, w.call, job.tile, n_block)
    with_masks = const_expr(masked or not config.sparse)
    w.s.k_ring.wait_full(it + 1)  # K has arrived: S reads it
    my_turn(config, w.wg)
    issue_S(config, w, job.t, it + 1)
    w.s.v_ring.wait_full(it)  # V has arrived: P·V reads it
    issue_O(w, it)
    next_turn(config, w.wg)
    warpgroup.wait_group(1)  # S is there: it may be read; P·V runs on
    to_scores(config, w, job.sizes, job.tile, job.tile.m_block, n_block, with_masks)
    w.sums.fill(0.0)
    ok = Boolean(True)
    if const_expr(masked):
        release(w.s.k_ring, it + 1, w.lane)  # K may be overwritten
        mask(config, w, job.sizes, job.tile.m_block, n_block)
        warpgroup.wait_group(0)  # P·V is done: P and acc_O may be written
        w.softmax.renew(w.acc_S, w.acc_O, w.sums, True)
    else:
        w.softmax.exponentials(rows_cols(w.acc_S), w.sums, config.score.hides)
        ok = in_range(config, w)
        warpgroup.wait_group(0)  # P·V is done: P and acc_O may be written
        if not ok:
            issue_S(config, w, job.t, it + 1)
            warpgroup.wait_group(0)  # S is there once more: it may be read
            to_scores(config, w, job.sizes, job.tile, job.tile.m_block, n_block, with_masks)
            w.sums.fill(0.0)
            w.softmax.renew(w.acc_S, w.acc_O, w.sums, config.score.hides)
        release(w.s.k_ring, it + 1, w.lane)  # K may be overwritten; not earlier: S needed it once more
    for r in cutlass.range_constexpr(cute.size(w.sums)):
        w.softmax.row_sum[r] = w.softmax.row_sum[r] + w.sums[r]
    release(w.s.v_ring, it, w.lane)  # V may be overwritten
    to_operand(config, w, job, n_block)
    return ok


@cute.jit
def last_O(config: cutlass.Constexpr, w: Work, job: Job, tile_next: Tile, it: Int32, skipped: Int32):
    """A tile's last P·V (ring use it), with the first S of the next tile if there are two Q buffers.

    skipped: of the next tile. After the last tile there is no Q or K to wait for (nor before the first, if
    there is none): S is made of what lies in the slots, nobody reads it, and the release of K has no load
    before it, since the producer has finished.
    """
    t, it_next = job.t, it + 1
    if const_expr(config.q_stages == 2):
        if tile_next.m_block >= 0:
            it_next = wait_for_operands(config, w, t + 1, it_next, skipped)
        load_Q(config, w, t + 1)
    sink = sink_of(w.call, job.tile.head)
    w.s.v_ring.wait_full(it)  # V has arrived: P·V reads it
    my_turn(config, w.wg)
    if const_expr(config.q_stages == 2):
        issue_S(config, w, t + 1, it_next)
    issue_O(w, it)
    next_turn(config, w.wg)
    w.softmax.finish(sink)
    warpgroup.wait_group(0)  # O is complete and the next S there: they may be read
    release(w.s.v_ring, it, w.lane)  # V may be overwritten
    if const_expr(config.q_stages == 2):
        release(w.s.k_ring, it_next, w.lane)  # and K


@cute.jit
def issue_S(config: cutlass.Constexpr, w: Work, t: Int32, it: Int32):
    """S = Q·Kᵀ, with Q of tile t and the K of ring use it."""
    tSrQ = w.tSrQ if const_expr(config.q_regs) else w.tSrQ[None, None, None, w.s.q_ring.slot(t)]
    wgmma(w.setup.qk, w.acc_S, tSrQ, w.tSrK[None, None, None, w.s.k_ring.slot(it)], False)


@cute.jit
def issue_O(w: Work, it: Int32):
    """O += P·V, with the V of ring use it."""
    wgmma(w.setup.pv, w.acc_O, w.P, w.tOrV[None, None, None, w.s.v_ring.slot(it)], True)


@cute.jit
def my_turn(config: cutlass.Constexpr, wg: Int32):
    """Wait until the WG before this one has issued its products.

    For speed alone: one WG's products run under another's softmax. All WGs must take equally many turns, or
    one would wait for ever for the one before it. So a turn goes with each P·V, one for each key block of a
    tile: skip_values takes those of the blocks that a WG skips. An S without a P·V (first_S, S once more)
    takes none: it may run at any time. The arrivals of the last turn are left over.
    """
    if const_expr(config.ordered):  # 256: the WG that waits and the one before, that arrives
        cute.arch.barrier(barrier_id=TURN + wg, number_of_threads=256)  # protects no data


@cute.jit
def next_turn(config: cutlass.Constexpr, wg: Int32):
    """Let the WG after this one issue its products."""
    if const_expr(config.ordered):
        following = 1 - wg if const_expr(config.wgs == 2) else (wg + 1) % config.wgs
        cute.arch.barrier_arrive(barrier_id=TURN + following, number_of_threads=256)  # as in my_turn


@cute.jit
def load_Q(config: cutlass.Constexpr, w: Work, t: Int32):
    """Q's rows of this warp, from shared memory to registers, if they live there."""
    if const_expr(config.q_regs):
        sQ = w.s.sQ[None, None, w.s.q_ring.slot(t)]
        atom = cute.make_copy_atom(warp.LdMatrix8x8x16bOp(False, 4), sQ.element_type)
        thr_load = cute.make_tiled_copy_A(atom, w.setup.qk).get_slice(w.tidx)
        cute.copy(atom, thr_load.partition_S(sQ), thr_load.retile(w.tSrQ))


@cute.jit
def in_range(config: cutlass.Constexpr, w: Work):
    """Whether all sums of the WG, so all of its P, are far from overflow in P's dtype; not if one is NaN.

    Nor where a row has no offset yet, as a function has hidden all its keys: this block may bring the first.
    Rows beyond the sequence, whose offset is inf, have no say.
    """
    limit = 2.0**60 if const_expr(config.dtype == "bfloat16") else 2.0**15
    if const_expr(config.score.hides):
        for r in cutlass.range_constexpr(2):
            w.sums[r] = Float32.inf if w.softmax.offset[r] == -Float32.inf else w.sums[r]
    if const_expr(config.ragged):
        for r in cutlass.range_constexpr(2):
            w.sums[r] = Float32(0.0) if w.softmax.offset[r] == Float32.inf else w.sums[r]
    # The barrier: the WG must agree, since it can only compute S again as a whole.
    return all_true(cute.arch.fmax(w.sums[0], w.sums[1], nan=True) < limit, WG + w.wg)


@cute.jit
def to_operand(config: cutlass.Constexpr, w: Work, job: Job, n_block: Int32):
    """P, from float32 to 16 bits, without what dropout drops; its sums have been taken."""
    convert(as_operand_A(w.acc_S), w.P)
    if const_expr(config.dropout):
        drop(config, w, w.P, w.batch_head[0], job.tile.m_block, n_block)


@cute.jit
def wait_for_operands(config: cutlass.Constexpr, w: Work, t: Int32, it: Int32, skipped: Int32) -> Int32:
    """The Q of tile t and the K of this WG's first block are there; returns that block's ring use.

    it: the ring use of the tile's first block. A slot that is skipped is not released before it was filled:
    rounds of the ring do not overtake each other. Nor is it read: only TMA's writes are waited for.
    """
    if const_expr(config.staggered):
        for _ in cutlass.range(skipped, unroll=1):
            w.s.k_ring.wait_full(it)  # K has arrived, unread
            release(w.s.k_ring, it, w.lane)  # it may be overwritten
            it += 1
    w.s.q_ring.wait_full(t)  # Q has arrived: load_Q or S reads it
    w.s.k_ring.wait_full(it)  # K has arrived: S reads it
    return it


@cute.jit
def skipped_blocks(config: cutlass.Constexpr, all_sizes: Sizes, w: Work, tile: Tile) -> Int32:
    """How many of a tile's blocks come before this WG's first: none of its rows sees those."""
    skipped = Int32(0)
    if const_expr(config.staggered):
        sizes = tile.sizes(all_sizes)
        if tile.m_block >= 0:
            start = sizes.walk(config, tile.m_block).start
            skipped = start - sizes.walk_of_wg(config, tile.m_block, w.wg).start
    return skipped


@cute.jit
def skip_values(config: cutlass.Constexpr, w: Work, it: Int32, skipped: Int32) -> Int32:
    """Pass over the values of the blocks that this WG skips, and their turns; returns its first's ring use.

    As with keys, a slot is not released before it was filled.
    """
    if const_expr(config.staggered):
        for _ in cutlass.range(skipped, unroll=1):
            w.s.v_ring.wait_full(it)  # V has arrived, unread
            release(w.s.v_ring, it, w.lane)  # it may be overwritten
            my_turn(config, w.wg)  # the turn of the P·V that this WG does not compute
            next_turn(config, w.wg)
            it += 1
    return it


@cute.jit
def clear_beyond(config: cutlass.Constexpr, w: Work, job: Job, it: Int32):
    """Zero the values beyond the sequence: other sequences' or nobody's, perhaps NaN, and 0 · NaN is NaN.

    Each WG for itself, though all write the same zeros.
    """
    valid = job.sizes.seqlen_k - job.walk.start * config.tile_n
    if valid < config.tile_n:
        w.s.v_ring.wait_full(it)  # V has arrived: TMA won't overwrite the zeros
        # The fence and the barrier in it: all zeros of the WG are there before any of its P·V.
        zero_rows(w.s.sV[None, None, w.s.v_ring.slot(it)], valid, w.tidx % 128, WG + w.wg)


@cute.jit
def wait_for_O(w: Work):
    """Until the TMA unit has read this warp's rows of the O that was stored last, if that left by TMA."""
    if w.lane == 0:  # which has asked for the store: the group is its own
        cute.arch.cp_async_bulk_wait_group(0, read=True)  # the rows' shared memory may be overwritten
