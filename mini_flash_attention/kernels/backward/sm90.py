"""FlashAttention backward for Hopper: a thread block for 128 keys (wide: 64), four warpgroups (WGs).

q, o, do, dq (B, Sq, Hq, D); k, v, dk, dv (B, Sk, Hkv, D); lse (B, Hq, Sq) float32; float16 or bfloat16, any
strides with a unit last one. Three kernels: delta prepares the rows' statistics, this one does the work,
convert rounds dQ.

A thread block keeps its keys' dK and dV in registers and walks the query blocks that see them, for all query
heads of the group, or for some: shared_keys.py. Two consumer WGs own 64 keys each: Sᵀ = K·Qᵀ and dPᵀ = V·dOᵀ
are (keys, queries) tiles, so that Pᵀ and dSᵀ are born in registers as the A operands of dV += Pᵀ·dO and
dK += dSᵀ·Q. dS goes through shared memory to the third WG, which computes dQ = dS·K and adds it to dq_acc in
global memory. The fourth loads. The consumers wait for each other at the end of a tile alone: they drift
apart until the exponentials of one run under the products of the other. Where registers do not hold dK and
dV of 64 keys (config.wide), both WGs have the same 64: one S, P and dV, the other dP, dS and dK; it waits
for each P.

This file launches and hands out the roles: sm90_produce.py; sm90_consume.py or, wide, sm90_consume_wide.py;
sm90_dq.py. sm90_records.py: what they share; README.md: the picture.
"""

import cutlass
import cutlass.cute as cute
import cutlass.utils.hopper_helpers as hopper
from cutlass import Boolean, Float32, const_expr
from cutlass.cute.nvgpu import OperandMajorMode, cpasync, warpgroup

from mini_flash_attention.kernels.backward import convert, delta, sm90_dq_transposed
from mini_flash_attention.kernels.backward.schedule import Block, find_block, find_order, num_blocks
from mini_flash_attention.kernels.backward.sm90_consume import consume
from mini_flash_attention.kernels.backward.sm90_consume_wide import consume_wide
from mini_flash_attention.kernels.backward.sm90_dq import compute_dq
from mini_flash_attention.kernels.backward.sm90_produce import produce
from mini_flash_attention.kernels.backward.sm90_records import (
    DQ_WARP,
    LOAD_WARP,
    START,
    THREADS,
    Setup,
    Shared,
    init_mbarriers,
    make_shared,
)
from mini_flash_attention.kernels.calls import Backward
from mini_flash_attention.kernels.parts import arguments
from mini_flash_attention.kernels.parts.scores import scale_log2
from mini_flash_attention.kernels.parts.seqlen import sizes_of
from mini_flash_attention.kernels.parts.sm90 import make_tma
from mini_flash_attention.kernels.parts.tiles import tile_layout


@cute.jit
def launch(call: Backward, config: cutlass.Constexpr, stream):
    """All three kernels. Batch, heads and lengths are not 0."""
    delta.launch(call, config, stream)
    setup = make_setup(config, call)
    grid = setup.num_tiles
    if const_expr(config.persistent):
        grid = cutlass.min(grid, call.num_sms)
    kernel(config, setup, call).launch(
        grid=(grid, 1, 1), block=(THREADS, 1, 1), min_blocks_per_mp=1, stream=stream, use_pdl=config.pdl
    )
    convert.launch(call, config, stream)


def make_setup(config, call: Backward) -> Setup:
    sizes = sizes_of(config, call)
    order = find_order(config, sizes, call)
    dtype, m, n, d = call.mQ.element_type, config.tile_m, config.tile_n, config.head_dim
    sQ, sdO = (tile_layout(dtype, m, d, stages) for stages in (config.stages, config.do_stages))
    sK, sdSt = tile_layout(dtype, n, d, config.kv_stages), tile_layout(dtype, n, m, 2)
    K, MN, make_mma = OperandMajorMode.K, OperandMajorMode.MN, hopper.make_trivial_tiled_mma
    wgs, RMEM = (n // 64, 1, 1), warpgroup.OperandSource.RMEM
    if config.dq_transposed:
        dq_mma = sm90_dq_transposed.make_mma(config, dtype)
    else:
        dq_mma = make_mma(dtype, dtype, MN, MN, Float32, (1, 1, 1), (64, config.dq_piece[1]))
    g2s, s2g = cpasync.CopyBulkTensorTileG2SOp(), cpasync.CopyBulkTensorTileS2GOp()
    return Setup(
        sizes=sizes,
        order=order,
        num_tiles=num_blocks(config, sizes, call.ragged, order),
        scale_log2=scale_log2(config, call.score),
        q=make_tma(g2s, call.mQ, sQ, (m, d)),
        k=make_tma(g2s, call.mK, sK, (n, d)),
        v=make_tma(g2s, call.mV, sK, (n, d)),
        do=make_tma(g2s, call.mdO, sdO, (m, d)),
        dk=make_tma(s2g, call.mdK, sK, (n, d)),
        dv=make_tma(s2g, call.mdV, sK, (n, d)),
        sdp=make_mma(dtype, dtype, K, K, Float32, wgs, (64, m)),
        # 256 columns in one instruction take more registers than 512 threads start with.
        dkv=make_mma(dtype, dtype, K, MN, Float32, wgs, (64, d if d < 256 else 128), RMEM),
        dq=dq_mma,
        layouts=(sQ, sdO, sK, sK, sdSt),
    )


@cute.kernel
def kernel(config: cutlass.Constexpr, setup: Setup, call: Backward):
    warp_idx = cute.arch.make_warp_uniform(cute.arch.warp_idx())
    s = make_shared(config, setup)
    if warp_idx == LOAD_WARP:  # it goes on at once, to load K and Q
        for x in (setup.k, setup.q):
            cpasync.prefetch_descriptor(x.atom)
        with cute.arch.elect_one():
            init_mbarriers(config, s)
        cute.arch.sync_warp()  # the mbarriers are there for all lanes
        cute.arch.barrier_arrive(barrier_id=START, number_of_threads=THREADS)  # and for the other warps
    if warp_idx == 0:
        for x in (setup.v, setup.do, setup.dk, setup.dv):
            cpasync.prefetch_descriptor(x.atom)
    block = find_block(config, call, setup, cute.arch.block_idx()[0])
    if warp_idx != LOAD_WARP:
        cute.arch.barrier(barrier_id=START, number_of_threads=THREADS)  # the mbarriers are there
    cute.arch.griddepcontrol_launch_dependents()  # convert may start: it waits for the end of this kernel
    there = block.n_block >= 0 if const_expr(config.ragged) else Boolean(True)
    if there:
        run_role(config, call, setup, s, block)
    else:
        cute.arch.griddepcontrol_wait()  # convert waits for this kernel alone, but needs delta's zeros


kernel.set_name_prefix("mfa_bwd_sm90", remove_cutlass_symbol=True)


@cute.jit
def run_role(config: cutlass.Constexpr, call: Backward, setup: Setup, s: Shared, block: Block):
    """What this warp does, from the tile `block` on: the only one, unless config.persistent."""
    warp_idx = cute.arch.make_warp_uniform(cute.arch.warp_idx())
    consumer, dq, loader = config.registers
    if warp_idx >= LOAD_WARP:
        cute.arch.setmaxregister_decrease(loader)  # given up by the whole WG, for the consumers
        if warp_idx == LOAD_WARP:
            produce(config, call, setup, s, block)
    elif warp_idx >= DQ_WARP:
        cute.arch.setmaxregister_decrease(dq)
        compute_dq(config, call, setup, s, block)
    else:
        cute.arch.setmaxregister_increase(consumer)  # waits until they are free
        if const_expr(config.wide):
            consume_wide(config, call, setup, s, block)
        else:
            consume(config, call, setup, s, block)


def fake_call(config) -> Backward:
    return arguments.backward(config)
