"""What all of sm80.py's threads share and own: set-up, shared memory, work, how far the walk has come."""

from typing import NamedTuple

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, const_expr
from cutlass.memory import SmemAllocator

from mini_flash_attention.kernels.backward.schedule import Block, Order, Sequence
from mini_flash_attention.kernels.calls import Backward
from mini_flash_attention.kernels.parts import tiles
from mini_flash_attention.kernels.parts.fragments import as_operand_A, rows_cols
from mini_flash_attention.kernels.parts.seqlen import Keys, Queries, Sizes
from mini_flash_attention.kernels.parts.sm80 import opaque

ZEROS = 4  # where smem.stats has them
PAIR = 1  # + pair: the named barrier of its 64 threads


class Setup(NamedTuple):
    """What `launch` makes for the kernel."""

    sizes: Sizes
    order: Order
    scale_log2: Float32  # of plain scores
    mma: cute.TiledMma  # of a side: the pairs of warps, one below the other, keys as rows
    mma_dQ: cute.TiledMma  # of all warps
    load: cute.TiledCopy
    layouts: tuple[cute.ComposedLayout, ...]  # of Smem's first three


class Smem(NamedTuple):
    KV: cute.Tensor  # (tile_n, d, 2): K, V. Side 0 multiplies K and Q, side 1 V and dO
    QdO: cute.Tensor  # (tile_m, d, 4): Q, dO of the first slot, Q, dO of the second
    dS: cute.Tensor  # (tile_n, tile_m, 2): a slot's Pᵀ (or the factor Fᵀ), which dSᵀ then overwrites
    stats: cute.Tensor  # (tile_m, config.stats) float32: -LSE / scale, -delta of a slot, of the other; zeros
    block: cute.Tensor  # (config.block_numbers) int32

    @cute.jit
    def keep_block(self, block: Block):
        numbers, x = block[:7], block.sequence
        if const_expr(x is not None):
            numbers = *numbers, *x.q, x.first_block, *x.k, x.room, x.first_key_block
        for i in cutlass.range_constexpr(cute.size(self.block)):
            self.block[i] = numbers[i] if const_expr(i < len(numbers)) else Int32(0)

    @cute.jit
    def find_block(self) -> Block:
        """What the thread block works on, asked for anew: the products leave no registers for it."""
        x, sequence = self.block, None
        if const_expr(cute.size(x) > 8):  # a ragged batch
            sequence = Sequence(Queries(x[7], x[8], x[9]), x[10], Keys(x[11], x[12], x[13]), x[14], x[15])
        return Block(x[0], x[1], x[2], x[3], x[4], x[5], x[6], sequence)


@cute.jit
def make_smem(config: cutlass.Constexpr, call: Backward, setup: Setup, block: Block) -> Smem:
    """With all in it that does not come from global memory: the first `arrive` lets others read it."""
    tidx, _, _ = cute.arch.thread_idx()
    allocator = SmemAllocator()
    KV, QdO, dS = (tiles.allocate(allocator, call.mQ.element_type, layout) for layout in setup.layouts)
    stats = allocator.allocate_tensor(Float32, cute.make_layout((config.tile_m, config.stats)), 128)
    if const_expr(config.stats > ZEROS):
        if tidx < config.tile_m:
            stats[tidx, ZEROS] = Float32(0.0)
    numbers = allocator.allocate_tensor(Int32, cute.make_layout(config.block_numbers))
    smem = Smem(KV, QdO, dS, stats, numbers)
    smem.keep_block(block)
    return smem


class Work(NamedTuple):
    """What one thread computes with. Its methods work out anew what they return: registers are full."""

    call: Backward
    setup: Setup
    smem: Smem
    tidx: Int32
    acc_S: cute.Tensor  # ((2, 2), tile_n / (8 * warps), tile_m / 8): Sᵀ or dPᵀ
    acc: cute.Tensor  # ((2, 2), tile_n / (8 * warps), d / 8): dV or dK
    acc_dQ: cute.Tensor  # ((2, 2), tile_m / (16 * warps_m), d / (8 * warps / warps_m))
    P: cute.Tensor  # ((2, 2, 2), tile_n / (8 * warps), tile_m / 16): Pᵀ or dSᵀ, 16 bits

    def in_side(self, config) -> Int32:
        """The number of the thread in its side."""
        return opaque(self.tidx) % (16 * config.warps)

    def coords(self, config) -> cute.Tensor:
        """(key, query) of each element of acc_S, as rows and columns."""
        tile = cute.make_identity_tensor((config.tile_n, config.tile_m))
        return rows_cols(self.setup.mma.get_slice(self.in_side(config)).partition_C(tile))

    def keys(self, config) -> list[Int32]:
        """The keys of this thread's rows."""
        rc, n_block = self.coords(config), self.smem.find_block().n_block
        return [n_block * config.tile_n + rc[r, 0][0] for r in range(cute.size(rc, mode=[0]))]

    def sizes(self) -> Sizes:
        """Those of the sequence."""
        block, sizes = self.smem.find_block(), self.setup.sizes
        if block.sequence is None:
            return sizes.of(opaque(sizes.seqlen_q), opaque(sizes.seqlen_k))
        return block.sizes(sizes)


def make_work(config, call: Backward, setup: Setup, smem: Smem) -> Work:
    tidx, _, _ = cute.arch.thread_idx()
    thr_mma = setup.mma.get_slice(tidx % (16 * config.warps))
    acc_S, acc = (
        cute.make_rmem_tensor(thr_mma.partition_shape_C((config.tile_n, columns)), Float32)
        for columns in (config.tile_m, config.head_dim)
    )
    acc_dQ = setup.mma_dQ.get_slice(0).partition_shape_C((config.tile_m, config.head_dim))
    acc_dQ = cute.make_rmem_tensor(acc_dQ, Float32)
    P = cute.make_rmem_tensor(as_operand_A(acc_S).shape, smem.QdO.element_type)
    return Work(call, setup, smem, tidx, acc_S, acc, acc_dQ, P)


# `at` = 2 * slot + side: the tile of Smem.QdO that a side multiplies first. at ^ 1: the one for its second
# product. at ^ 2: the first in the other slot, for the next query block.


def side_of(at: Int32) -> Int32:
    return at & 1


def slot_of(at: Int32) -> Int32:
    return at >> 1


class Place(NamedTuple):
    """How far the walk over the query blocks of all its query heads has come."""

    left: Int32  # query heads still to come, this one included; 0: the walk is over
    m_block: Int32

    def head(self, w: Work) -> Int32:
        block = w.smem.find_block()
        return block.head + block.heads - self.left


@cute.jit
def following(smem: Smem, x: Place, steps: cutlass.Constexpr) -> Place:
    """The query block so many steps later, of the next head after the last one."""
    block, (left, m_block) = smem.find_block(), x
    for _ in cutlass.range_constexpr(steps):
        end = m_block + 1 == block.last
        left, m_block = left - 1 if end else left, block.first if end else m_block + 1
    return Place(left, m_block)
