"""FlashAttention forward for Hopper: one producer warp, 2 or 3 consumer warpgroups (WGs).

One persistent thread block runs on each SM. A tile is tile_m query rows of one head; each WG owns 64 of them
and walks the keys from the tile's last block to its first. The design is FlashAttention-3's (Shah et al.
2024, arXiv 2407.08608), its softmax is not: blocks without a mask compute no maximum (sm90_consume.step).

This file launches and hands out the roles. sm90_records.py: what they share and own; sm90_produce.py,
sm90_consume.py: the roles; sm90_store.py: the consumers' last step; README.md: the picture.
"""

import cutlass
import cutlass.cute as cute
import cutlass.utils.hopper_helpers as hopper
from cutlass import Float32, const_expr
from cutlass.cute.nvgpu import OperandMajorMode, cpasync, warpgroup

from mini_flash_attention.kernels.calls import Forward
from mini_flash_attention.kernels.forward.sm90_consume import consume
from mini_flash_attention.kernels.forward.sm90_produce import produce
from mini_flash_attention.kernels.forward.sm90_records import Setup, make_shared
from mini_flash_attention.kernels.parts import arguments
from mini_flash_attention.kernels.parts.rest import clear_rest
from mini_flash_attention.kernels.parts.scheduler import num_tiles
from mini_flash_attention.kernels.parts.seqlen import sizes_of
from mini_flash_attention.kernels.parts.sm90 import init_rings, make_tma
from mini_flash_attention.kernels.parts.tiles import tile_layout


@cute.jit
def launch(call: Forward, config: cutlass.Constexpr, stream):
    """Picks the library's tiles for the longest sequence, as ForwardSm90.at does."""
    longest = call.mQ.shape[1] if const_expr(call.ragged is None) else call.ragged.longest
    if const_expr(config.short is None):
        launch_tiles(call, config, stream)
    elif longest <= config.short_seqlen:
        launch(call, config.short, stream)
    else:
        launch_tiles(call, config, stream)


@cute.jit
def launch_tiles(call: Forward, config: cutlass.Constexpr, stream):
    setup = make_setup(config, call)
    kernel(config, call, setup).launch(
        grid=(cutlass.min(call.num_sms, num_tiles(config, call, setup.sizes)), 1, 1),
        block=(128 + 128 * config.wgs, 1, 1),
        min_blocks_per_mp=1,
        stream=stream,
    )


def make_setup(config, call: Forward) -> Setup:
    dtype, d = call.mQ.element_type, config.head_dim
    K, MN = OperandMajorMode.K, OperandMajorMode.MN
    RMEM, SMEM = warpgroup.OperandSource.RMEM, warpgroup.OperandSource.SMEM
    wgs, q_source = (config.wgs, 1, 1), RMEM if config.q_regs else SMEM
    qk = hopper.make_trivial_tiled_mma(dtype, dtype, K, K, Float32, wgs, (64, config.tile_n), q_source)
    pv = hopper.make_trivial_tiled_mma(dtype, dtype, K, MN, Float32, wgs, (64, d), RMEM)
    g2s, s2g = cpasync.CopyBulkTensorTileG2SOp(), cpasync.CopyBulkTensorTileS2GOp()
    sQ_layout = tile_layout(dtype, config.tile_m, d, config.q_stages)
    sPiece_layout = tile_layout(dtype, config.piece, d)
    return Setup(
        sizes=sizes_of(config, call),
        q=make_tma(g2s, call.mQ, sQ_layout, (config.tile_m, d)),
        k=make_tma(g2s, call.mK, sPiece_layout, (config.piece, d)),
        v=make_tma(g2s, call.mV, sPiece_layout, (config.piece, d)),
        o=make_tma(s2g, call.mO, tile_layout(dtype, 16, d), (16, d)),
        qk=qk,
        pv=pv,
        sQ_layout=sQ_layout,
        sKV_layout=tile_layout(dtype, config.tile_n, d, config.stages),
    )


@cute.kernel
def kernel(config: cutlass.Constexpr, call: Forward, setup: Setup):
    """Warp 0 is the producer; 1 to 3 are there because registers are handed out by WG. The others consume.

    In a ragged batch 1 to 3 write the rows behind the last sequence, which no tile has: no wait.
    """
    warp_idx = cute.arch.make_warp_uniform(cute.arch.warp_idx())
    s = make_shared(config, call, setup)
    if warp_idx == 0:
        with cute.arch.elect_one():
            init_rings(s.rings, config.tile_m // 16)  # consumer warps: each releases a slot once
        for x in (setup.q, setup.k, setup.v, setup.o):
            cpasync.prefetch_descriptor(x.atom)
    cute.arch.barrier()  # the mbarriers are there: all may wait and arrive at them
    if warp_idx < 4:
        cute.arch.setmaxregister_decrease(config.registers[0])  # given up by the whole WG, for the consumers
        if warp_idx == 0:
            produce(config, call, setup, s)
        elif const_expr(config.ragged):
            thread = cute.arch.thread_idx()[0] - 32 + 96 * cute.arch.block_idx()[0]
            clear_rest(call, thread, 96 * cute.arch.grid_dim()[0])
    else:
        cute.arch.setmaxregister_increase(config.registers[1])  # waits until they are free
        consume(config, call, setup, s)


kernel.set_name_prefix("mfa_fwd_sm90", remove_cutlass_symbol=True)


def fake_call(config) -> Forward:
    return arguments.forward(config)
