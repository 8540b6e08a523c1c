"""Online softmax (Milakov and Gimelshein 2018, arXiv 1805.02867) that rescales only when it must."""

from dataclasses import dataclass

import cutlass
import cutlass.cute as cute
from cutlass import Float32, const_expr

from mini_flash_attention.kernels.parts.fragments import rescale, rows_cols

LN_2 = 0.6931471805599453
SLACK = 8.0  # log2: a row keeps its offset until its maximum passes it by this much; P stays below 2^8


@cute.jit
def local_max(row: cute.Tensor):
    """Maximum of this thread's part of a row, in 4 independent chains."""
    chain = [row[0], row[1], row[2], row[3]]
    for i in cutlass.range_constexpr(4, cute.size(row)):
        chain[i % 4] = cute.arch.fmax(chain[i % 4], row[i])
    return cute.arch.fmax(cute.arch.fmax(chain[0], chain[1]), cute.arch.fmax(chain[2], chain[3]))


@cute.jit
def with_sink(offset: Float32, total: Float32, sink: Float32, unit: cutlass.Constexpr = 1.0):
    """(offset, total, share) of a row with its sink, one more key, whose value is 0: O shrinks by the share.

    Whichever is larger, the offset or the sink, is the new offset: nothing overflows. unit: of both, in log2.
    """
    larger = cute.arch.fmax(offset, sink)
    base = Float32(0.0) if larger == -Float32.inf else larger  # neither a key nor a sink: not -inf - -inf
    share = cute.math.exp2((offset - base) * Float32(unit), fastmath=True)
    total = total * share + cute.math.exp2((sink - base) * Float32(unit), fastmath=True)
    return larger, total, share


@dataclass(frozen=True)
class OnlineSoftmax:
    """P = exp2(scale_log2 * S - offset), its sum for each row, and the rows' offsets.

    Any offset gives the same result as long as nothing overflows. The textbook takes the running
    maximum and rescales O in each block; here a row keeps its offset while its maximum, in log2, has
    not grown by more than SLACK. A warp votes whether any of its rows must be renewed.
    """

    offset: cute.Tensor  # (rows): log2 units
    row_sum: cute.Tensor  # (rows): of this thread's columns; summed over the quad at the end
    scale_log2: Float32

    @cute.jit
    def first(self, acc_S: cute.Tensor):
        """acc_S <- P of a tile's first key block, which may be masked."""
        S = rows_cols(acc_S)
        for r in cutlass.range_constexpr(cute.size(self.offset)):
            row_max = cute.arch.warp_reduction_max(local_max(S[r, None]), threads_in_group=4)
            self.offset[r] = row_max * self.scale_log2
        self.row_sum.fill(0.0)
        self.exponentials(S, self.row_sum, True)

    @cute.jit
    def exponentials(self, S: cute.Tensor, sums: cute.Tensor, masked: cutlass.Constexpr):
        """S <- P with the offsets as they are; the rows' sums (this thread's columns) are added to sums."""
        for r in cutlass.range_constexpr(cute.size(self.offset)):
            offset = self.offset[r]
            if const_expr(masked):  # a row that has seen no key: not -inf - -inf
                offset = Float32(0.0) if offset == -Float32.inf else offset
            for i in cutlass.range_constexpr(cute.size(S, mode=[1])):
                S[r, i] = cute.math.exp2(S[r, i] * self.scale_log2 - offset, fastmath=True)
            even, odd = sums[r] + S[r, 0], S[r, 1]
            for i in cutlass.range_constexpr(2, cute.size(S, mode=[1]), 2):
                even, odd = even + S[r, i], odd + S[r, i + 1]
            sums[r] = even + odd

    @cute.jit
    def renew(self, acc_S: cute.Tensor, acc_O: cute.Tensor, sums: cute.Tensor, masked: cutlass.Constexpr):
        """acc_S <- P where a row's maximum may have grown; no product into acc_O may be in flight."""
        S = rows_cols(acc_S)
        rows = cute.size(self.offset)
        row_max = [local_max(S[r, None]) * self.scale_log2 for r in range(rows)]
        growth = row_max[0] - self.offset[0]
        for r in cutlass.range_constexpr(1, rows):
            growth = cute.arch.fmax(growth, row_max[r] - self.offset[r])
        if cute.arch.vote_any_sync(growth > SLACK):
            alpha = cute.make_rmem_tensor(rows, Float32)
            for r in cutlass.range_constexpr(rows):
                old = self.offset[r]
                new = cute.arch.fmax(old, cute.arch.warp_reduction_max(row_max[r], threads_in_group=4))
                # each row for itself: its bits do not depend on the rows beside it, maybe another sequence's
                new = new if new - old > SLACK else old
                # equal offsets first: -inf - -inf is NaN
                alpha[r] = Float32(1.0) if old == new else cute.math.exp2(old - new, fastmath=True)
                self.row_sum[r] = self.row_sum[r] * alpha[r]
                self.offset[r] = new
            rescale(acc_O, alpha)
        self.exponentials(S, sums, masked)

    @cute.jit
    def finish(self, sink: Float32 | None):
        """row_sum <- 1 / total (0 for a row without keys), offset <- log-sum-exp, natural logarithm.

        sink: that of all rows, in log2 units, or None. It is in the total, and row_sum is what O is worth.
        """
        for r in cutlass.range_constexpr(cute.size(self.offset)):
            total = cute.arch.warp_reduction_sum(self.row_sum[r], threads_in_group=4)
            if const_expr(sink is not None):
                self.offset[r], total, share = with_sink(self.offset[r], total, sink)
            empty = total == 0.0
            lse = (self.offset[r] + cute.math.log2(total, fastmath=True)) * Float32(LN_2)
            self.offset[r] = Float32(-Float32.inf) if empty else lse
            self.row_sum[r] = Float32(0.0) if empty else cute.arch.rcp_approx(total)
            if const_expr(sink is not None):
                self.row_sum[r] = self.row_sum[r] * share
