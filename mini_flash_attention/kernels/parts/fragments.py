"""Accumulators in registers: how to see them as rows and columns, as the next operand, and how to store them.

A tensor-core accumulator of one thread has the shape ((2, 2), M, N) for mma.sync and ((2, 2, V), M, N)
for wgmma: pairs of adjacent columns, two rows that lie 8 apart, and repetitions. In both, the 4 threads
of a quad share a row.
"""

import cutlass
import cutlass.cute as cute
from cutlass import BFloat16, Int32, const_expr


def rows_cols(acc: cute.Tensor) -> cute.Tensor:
    """View an accumulator as this thread's (rows, columns); column c lies 8 * (c // 2) + c % 2 right of 0."""
    shape, stride = acc.layout.shape, acc.layout.stride
    rows = (shape[0][1], shape[1]), (stride[0][1], stride[1])
    cols = (shape[0][0], *shape[0][2:], shape[2]), (stride[0][0], *stride[0][2:], stride[2])
    return cute.make_tensor(acc.iterator, cute.make_layout((rows[0], cols[0]), stride=(rows[1], cols[1])))


def as_operand_A(acc: cute.Tensor) -> cute.Tensor:
    """View an accumulator as the A operand, ((2, 2, 2), M, K), of the next product: P of P·V."""
    if const_expr(cute.rank(acc.layout.shape[0]) == 3):  # wgmma: V = 2 * K
        layout = cute.logical_divide(acc.layout, ((None, None, 2), None, None))
        s, d = layout.shape, layout.stride
        inner, outer = (s[0][2][0], d[0][2][0]), ((s[0][2][1], s[2]), (d[0][2][1], d[2]))
    else:  # mma.sync: N = 2 * K
        layout = cute.logical_divide(acc.layout, (None, None, 2))
        s, d = layout.shape, layout.stride
        inner, outer = (s[2][0], d[2][0]), (s[2][1], d[2][1])
    return cute.make_tensor(
        acc.iterator,
        cute.make_layout(
            ((s[0][0], s[0][1], inner[0]), s[1], outer[0]),
            stride=((d[0][0], d[0][1], inner[1]), d[1], outer[1]),
        ),
    )


def transposed(x: cute.Tensor) -> cute.Tensor:
    """The same memory, with the first two modes exchanged."""
    return cute.make_tensor(x.iterator, cute.select(x.layout, mode=[1, 0, *range(2, cute.rank(x))]))


def slice_of(x: cute.Tensor, k: int) -> cute.Tensor:
    """Slice k of an A operand, 16 columns: ((2, 2, 2), M, 1)."""
    s, d = x.layout.shape, x.layout.stride
    layout = cute.make_layout((s[0], s[1], 1), stride=(d[0], d[1], d[2]))
    return cute.make_tensor(x[None, None, k].iterator, layout)


@cute.jit
def convert(src: cute.Tensor, dst: cute.Tensor):
    """dst <- src (float32), in pairs: `.to()` may convert singly, which serialises the wgmmas around it."""
    pairs = cute.recast_tensor(dst, Int32)
    ptx = "cvt.rn.bf16x2.f32" if const_expr(dst.element_type is BFloat16) else "cvt.rn.f16x2.f32"
    for i in cutlass.range_constexpr(cute.size(pairs)):
        pairs[i] = cute.arch.inline_ptx(
            ptx + " {$w0}, {$r1}, {$r0};",
            write_only_types=[Int32],
            read_only_args=[src[2 * i], src[2 * i + 1]],
        )


@cute.jit
def rescale(acc: cute.Tensor, factor: cute.Tensor):
    """Multiply each row of an accumulator by its factor."""
    rows = rows_cols(acc)
    for r in cutlass.range_constexpr(cute.size(rows, mode=[0])):
        for c in cutlass.range_constexpr(cute.size(rows, mode=[1])):
            rows[r, c] = rows[r, c] * factor[r]


@cute.jit
def quad_transpose(words: cute.Tensor, q: Int32):
    """Transpose a quad's 4 x 4 words (4 in each thread q): exchange with q ^ 1, then with q ^ 2."""
    for x in (1, 2):
        for i in (0, 2) if x == 1 else (0, 1):
            high = (q & x) != 0
            got = cute.arch.shuffle_sync_bfly(words[i] if high else words[i + x], x)
            words[i], words[i + x] = (got if high else words[i]), (words[i + x] if high else got)


@cute.jit
def store_rows(acc: cute.Tensor, mO: cute.Tensor, rows: cute.Tensor, lane: Int32):
    """Store a 16-bit accumulator to mO (seqlen, head_dim) within its bounds; thread row r is rows[r].

    A quad holds a row's columns in pairs (one word each); after a transpose each of its threads has 8
    adjacent columns, and stores them as 16 bytes.
    """
    q = lane % 4
    words = rows_cols(cute.recast_tensor(acc, Int32))  # one word: 2 columns
    out = cute.make_rmem_tensor(4, Int32)
    for r in cutlass.range_constexpr(cute.size(words, mode=[0])):
        for g in cutlass.range_constexpr(cute.size(words, mode=[1]) // 4):
            for i in cutlass.range_constexpr(4):
                out[i] = words[r, 4 * g + i]
            quad_transpose(out, q)
            if rows[r] < mO.shape[0] and 8 * (4 * g + q) < mO.shape[1]:
                gO = cute.local_tile(mO[rows[r], None], (8,), (4 * g + q,))  # (8)
                cute.autovec_copy(cute.recast_tensor(out, acc.element_type), gO)


@cute.jit
def store_sequence(
    acc: cute.Tensor, mO: cute.Tensor, rows: cute.Tensor, start: Int32, seqlen: Int32, lane: Int32
):
    """store_rows for a sequence that starts at row `start` of mO and has `seqlen` rows."""
    for r in cutlass.range_constexpr(cute.size(rows)):
        rows[r] = start + rows[r] if rows[r] < seqlen else mO.shape[0]
    store_rows(acc, mO, rows, lane)
