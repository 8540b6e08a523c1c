"""SM80 building blocks: cp.async loads with bounds, ldmatrix, mma.sync."""

from typing import NamedTuple

import cutlass
import cutlass.cute as cute
from cutlass import Boolean, Float32, Int32, const_expr
from cutlass._mlir.dialects import llvm
from cutlass.cute.nvgpu import LoadCacheMode, cpasync, warp
from cutlass.cutlass_dsl import dsl_user_op


def make_tiled_mma(dtype: type, warps: int, warps_n: int = 1) -> cute.TiledMma:
    """mma.sync.m16n8k16 with float32 accumulators; `warps` times 16 rows of A, `warps_n` times 16 of B.

    With one warp along B each warp has its own rows of A, and all share B.
    """
    op = warp.MmaF16BF16Op(dtype, Float32, (16, 8, 16))
    return cute.make_tiled_mma(op, (warps, warps_n, 1), permutation_mnk=(16 * warps, 16 * warps_n, 16))


def make_tiled_load(dtype: type, threads: int, head_dim: int) -> cute.TiledCopy:
    """cp.async of 16 bytes for each thread; neighbours take neighbouring chunks of a row."""
    op = cpasync.CopyG2SOp(cache_mode=LoadCacheMode.GLOBAL)
    atom = cute.make_copy_atom(op, dtype, num_bits_per_copy=128)
    chunks = 8 if head_dim % 64 == 0 else 4  # of a row, side by side
    return cute.make_tiled_copy_tv(
        atom,
        cute.make_layout((threads // chunks, chunks), stride=(chunks, 1)),
        cute.make_layout((1, 8)),
    )


@cute.jit
def opaque(x: Int32) -> Int32:
    """x, unknown to the compiler: what follows from it is worked out here, not kept in registers."""
    return cute.arch.inline_ptx("mov.b32 {$w0}, {$r0};", write_only_types=[Int32], read_only_args=[x])


@cute.jit
def load_tile(
    tiled_load: cute.TiledCopy,
    gX: cute.Tensor,
    sX: cute.Tensor,
    rows: Int32 | None,
    cols: Int32,
    tidx: Int32,
):
    """Start copying gX to sX; what lies beyond `rows` (None: the tile is whole) and `cols` becomes zero."""
    thr_load = tiled_load.get_slice(opaque(tidx))
    tXgX, tXsX = thr_load.partition_S(gX), thr_load.partition_D(sX)  # (8, M, K)
    tXcX = thr_load.partition_S(cute.make_identity_tensor(gX.shape))
    inside = cute.make_rmem_tensor((1, *tXcX.shape[1:]), Boolean)
    for m in cutlass.range_constexpr(cute.size(tXcX, mode=[1])):
        for k in cutlass.range_constexpr(cute.size(tXcX, mode=[2])):
            row, col = tXcX[0, m, k]
            inside[0, m, k] = col < cols
            if const_expr(rows is not None):
                inside[0, m, k] = row < rows and col < cols
    cute.copy(tiled_load, tXgX, tXsX, pred=inside)


@cute.jit
def load_pages(
    tiled_load: cute.TiledCopy,
    gX: cute.Tensor,
    table: cute.Tensor,
    start: Int32,
    sX: cute.Tensor,
    rows: Int32 | None,
    tidx: Int32,
):
    """Start copying a tile to sX, from pages: gX (num_pages, page_size, d), the sequence's token `start` on.

    table (max_pages): the sequence's pages. What lies beyond `rows` (None: the tile is whole; their pages are
    not looked up) and d becomes zero, as do pages that don't exist.
    """
    thr_load = tiled_load.get_slice(opaque(tidx))
    tXsX = thr_load.partition_D(sX)  # (8, M, K)
    tile = cute.size(sX, mode=[0]), cute.size(sX, mode=[1])
    tXcX = thr_load.partition_S(cute.make_identity_tensor(tile))
    _, page_size, cols = gX.shape
    inside = cute.make_rmem_tensor((1, 1, 1), Boolean)
    chunk = cute.make_layout(((8, 1), 1, 1))
    for m in cutlass.range_constexpr(cute.size(tXcX, mode=[1])):
        row = tXcX[0, m, 0][0]
        page, there = Int32(0), Boolean(True)
        if const_expr(rows is not None):
            there = row < rows
        if there:
            page = table[(start + row) // page_size]
        there = there & (page >= 0) & (page < gX.shape[0])
        page = page if there else 0
        gRow = gX[page, (start + row) % page_size, None]  # (d)
        for k in cutlass.range_constexpr(cute.size(tXcX, mode=[2])):
            col = tXcX[0, m, k][1]
            inside[0, 0, 0] = there & (col < cols)
            gChunk = cute.make_tensor(cute.local_tile(gRow, (8,), (col // 8,)).iterator, chunk)
            sChunk = cute.make_tensor(tXsX[None, m, k].iterator, chunk)
            cute.copy(tiled_load, gChunk, sChunk, pred=inside)


class Operand(NamedTuple):
    """One operand of a product: its registers and, unless computed there, where ldmatrix fetches them."""

    fragment: cute.Tensor  # (MMA, M or N, K)
    copy: cute.TiledCopy | None = None
    sX: cute.Tensor | None = None  # (M or N, K)
    chunk_bits: cutlass.Constexpr = 0  # the address bits that sX's swizzle changes


def operand(copy: cute.TiledCopy, fragment: cute.Tensor, sX: cute.Tensor, head_dim: int) -> Operand:
    bits = 0x70 if head_dim % 64 == 0 else 0x30 if head_dim % 32 == 0 else 0x10
    return Operand(fragment, copy, sX, bits)


def operand_A(tiled_mma: cute.TiledMma, sA: cute.Tensor, transpose: bool = False) -> Operand:
    """sA: (M, K); transpose: M is the contiguous mode."""
    atom = cute.make_copy_atom(warp.LdMatrix8x8x16bOp(transpose, 4), sA.element_type)
    thr_mma = tiled_mma.get_slice(0)
    fragment = thr_mma.make_fragment_A(thr_mma.partition_A(sA))
    row = cute.size(sA, mode=[0 if transpose else 1])
    return operand(cute.make_tiled_copy_A(atom, tiled_mma), fragment, sA, row)


def operand_B(tiled_mma: cute.TiledMma, sB: cute.Tensor, transpose: bool) -> Operand:
    """sB: (N, K); transpose: N is the contiguous mode (V)."""
    atom = cute.make_copy_atom(warp.LdMatrix8x8x16bOp(transpose, 4), sB.element_type)
    thr_mma = tiled_mma.get_slice(0)
    fragment = thr_mma.make_fragment_B(thr_mma.partition_B(sB))
    head_dim = cute.size(sB, mode=[0 if transpose else 1])
    return operand(cute.make_tiled_copy_B(atom, tiled_mma), fragment, sB, head_dim)


class Source(NamedTuple):
    """An operand in shared memory, as one lane reads it."""

    address: Int32  # of the lane's element (0, 0, 0), swizzled
    layout: cute.Layout  # (COPY, M or N, K) -> offset from it, before the swizzle
    target: cute.Tensor  # (COPY, M or N, K) in registers


@cute.jit
def source(x: Operand, tidx: Int32) -> Source:
    thr_copy = x.copy.get_slice(opaque(tidx))
    tXsX = thr_copy.partition_S(x.sX)
    start = tXsX.iterator.toint()
    address = start ^ ((start >> 3) & x.chunk_bits)
    return Source(address, tXsX.layout, thr_copy.retile(x.fragment))


def beside(address: Int32, offset: int, dtype: type, align: int) -> cute.Pointer:
    """A pointer to an element `offset` bytes behind a lane's first one, before the swizzle.

    The swizzle XORs bits 7-9 of an address into bits 4-6 (at 64-byte rows: 7-8 into 4-5). A lane's first
    address has zeros where the offsets of slices have those bits, so the low bits of an offset can be XORed
    to the swizzled address, the others added: one register serves all slices.
    """
    low = offset % 1024
    address = (address ^ low) + (offset - low)
    return cute.make_ptr(dtype, address, cute.AddressSpace.smem, assumed_align=align)


@cute.jit
def fetch(x: Operand, s: Source, k: cutlass.Constexpr):
    """Move slice k of an operand from shared memory to registers."""
    for i in cutlass.range_constexpr(cute.size(s.layout, mode=[1])):
        offset = 2 * cute.crd2idx((0, i, k), s.layout)  # bytes
        pointer = beside(s.address, offset, x.fragment.element_type, 16)
        rows = cute.make_tensor(pointer, cute.slice_(s.layout, (None, 0, 0)))
        cute.copy(x.copy, rows, s.target[None, i, k])


@cute.jit
def gemm(tiled_mma: cute.TiledMma, acc: cute.Tensor, a: Operand, b: Operand, tidx: Int32):
    """acc += A·B in slices of 16; the compiler moves the fetches up as far as registers allow."""
    if const_expr(a.copy is not None):
        source_a = source(a, tidx)
    source_b = source(b, tidx)
    for k in cutlass.range_constexpr(cute.size(a.fragment, mode=[2])):
        if const_expr(a.copy is not None):
            fetch(a, source_a, k)
        fetch(b, source_b, k)
        cute.gemm(tiled_mma, acc, a.fragment[None, None, k], b.fragment[None, None, k], acc)


class Destination(NamedTuple):
    """An A operand in shared memory, as one lane computes it."""

    address: Int32  # of the lane's element (0, 0, 0), swizzled
    layout: cute.Layout  # ((2, 2, 2), M, K) -> offset from it, before the swizzle


@cute.jit
def destination(tiled_mma: cute.TiledMma, x: Operand, tidx: Int32) -> Destination:
    tXsX = tiled_mma.get_slice(opaque(tidx)).partition_A(x.sX)
    start = tXsX.iterator.toint()
    return Destination(start ^ ((start >> 3) & x.chunk_bits), tXsX.layout)


@cute.jit
def put(d: Destination, values: cute.Tensor, k: cutlass.Constexpr):
    """Store slice k of an A operand, ((2, 2, 2), M, 1), from where `fetch` can move it to registers."""
    words = cute.recast_tensor(values, Int32)
    for i in cutlass.range_constexpr(cute.size(words)):
        offset = 2 * cute.crd2idx(2 * (k * cute.size(words) + i), d.layout)  # bytes
        cute.make_tensor(beside(d.address, offset, Int32, 4), cute.make_layout(1))[0] = words[i]


@dsl_user_op
def add_to_global(pointer: cute.Pointer, values: list[Float32], *, loc=None, ip=None):
    """pointer[i] += values[i], atomically for each i: one value, or (SM90 on) four."""
    names = ", ".join(f"${i + 1}" for i in range(len(values)))
    ptx = f"red.relaxed.gpu.global.add.f32 [$0], {names};"
    if len(values) > 1:
        ptx = f"red.relaxed.gpu.global.add.v{len(values)}.f32 [$0], {{{names}}};"
    arguments = [x.ir_value(loc=loc, ip=ip) for x in (pointer.toint(loc=loc, ip=ip), *values)]
    constraints = "l" + ",f" * len(values)
    llvm.inline_asm(None, arguments, ptx, constraints, has_side_effects=True, loc=loc, ip=ip)
