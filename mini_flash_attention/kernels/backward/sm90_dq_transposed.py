"""dQᵀ = Kᵀ·dSᵀ, a variant of sm90_dq.py (config.dq_transposed): wgmma reads dS alone from shared memory.

A tile's Kᵀ is the A operand, in registers, for all its query blocks. A piece of dQ is whole rows.
"""

import cutlass
import cutlass.cute as cute
import cutlass.utils.hopper_helpers as hopper
from cutlass import Float32, Int32
from cutlass.cute.nvgpu import OperandMajorMode, warp, warpgroup

from mini_flash_attention.kernels.parts.fragments import transposed


def make_mma(config, dtype: type) -> cute.TiledMma:
    """(d, rows of a piece, tile_n)."""
    K, MN, RMEM = OperandMajorMode.K, OperandMajorMode.MN, warpgroup.OperandSource.RMEM
    tile = 64, config.dq_piece[0]
    return hopper.make_trivial_tiled_mma(dtype, dtype, K, MN, Float32, (1, 1, 1), tile, RMEM)


def make_Kt(config, tiled_mma: cute.TiledMma) -> cute.Tensor:
    """Registers for Kᵀ: (MMA, 1, tile_n / 16)."""
    shape = tiled_mma.get_slice(0).partition_shape_A((config.head_dim, config.tile_n))
    return tiled_mma.make_fragment_A(shape)


@cute.jit
def load_Kt(tiled_mma: cute.TiledMma, sK: cute.Tensor, tdQrKt: cute.Tensor, tidx: Int32):
    """Kᵀ from shared memory, sK (tile_n, d), to registers."""
    atom = cute.make_copy_atom(warp.LdMatrix8x8x16bOp(True, 4), sK.element_type)
    thr_load = cute.make_tiled_copy_A(atom, tiled_mma).get_slice(tidx)
    cute.copy(atom, thr_load.partition_S(transposed(sK)), thr_load.retile(tdQrKt))


@cute.jit
def store_piece(config: cutlass.Constexpr, acc_dQ: cute.Tensor, sPiece: cute.Tensor, tidx: Int32):
    """A piece of dQᵀ to shared memory, as dQ in the order of convert.offset: no two banks conflict.

    A thread has one column of each of two chunks, and of eight rows a pair.
    """
    rows, cols = config.dq_piece
    pair = tidx % 4
    for h in cutlass.range_constexpr(2):
        chunk = (tidx // 32 * 2 + h) ^ pair
        at = sPiece.iterator + (2 * cols * pair + 8 * chunk + tidx % 32 // 4)
        src = cute.make_tensor(acc_dQ.iterator + 2 * h, cute.make_layout((2, rows // 8), stride=(1, 4)))
        dst = cute.make_tensor(at, cute.make_layout((2, rows // 8), stride=(cols, 8 * cols)))
        cute.autovec_copy(src, dst)
