"""What becomes of Q·Kᵀ before the softmax: the functions of config.score (../../scores), inlined.

With none, a score is Q·Kᵀ times the softmax scale, which is folded into the exponentials. What a function of
ours or of a user's may do: ../README.md, section 8.
"""

from typing import NamedTuple

import cutlass.cute as cute
from cutlass import Float32, Int32

from mini_flash_attention.kernels.calls import Score
from mini_flash_attention.kernels.parts.numbers import KERNEL_OPS, LOG2_E, Captured, Index, Scaled, index
from mini_flash_attention.scores.capture import Place
from mini_flash_attention.scores.numbers import Number, is_one


def scale_log2(config, score: Score) -> Float32:
    """The softmax's factor: functions leave scores in natural units."""
    return Float32(LOG2_E) if config.score else score.scale * Float32(LOG2_E)


def gradient_scale(config, score: Score) -> Float32:
    """The factor of dQ and dK: the softmax scale, times the functions' derivative if that is one number."""
    if not config.score or config.score.factored:
        return score.scale
    zero = Int32(0)
    at = Corner(zero, (zero,), (index(zero),), zero, zero, zero)
    s = Number(KERNEL_OPS, Scaled(Float32(0.0), score.scale), 1.0)
    slope = config.score.apply(KERNEL_OPS, _captured(score), s, at.place(0, 0), masked=False).dx
    return score.scale if is_one(slope) else score.scale * KERNEL_OPS.floating(slope)


def _captured(score: Score) -> list:
    return [x if isinstance(x, cute.Tensor) else Captured(x) for x in score.captured or ()]


class Corner(NamedTuple):
    """Where a thread's part of a tile of scores lies in its sequence, as transform takes it."""

    batch: Int32
    heads: tuple[Int32, ...]  # of each row: query heads
    rows: tuple[Index, ...]  # queries; in a transposed tile keys
    column: Int32  # the first key; in a transposed tile query
    seqlen_q: Int32
    seqlen_k: Int32
    transposed: bool = False

    def place(self, r: int, c: int) -> Place:
        """Of element (r, c), see fragments.rows_cols."""
        row, column = self.rows[r], index(self.column, (c // 2) * 8 + c % 2)
        q_idx, kv_idx = (column, row) if self.transposed else (row, column)
        return Place(self.batch, self.heads[r], q_idx, kv_idx, self.seqlen_q, self.seqlen_k)


def transform(
    config,
    score: Score,
    S: cute.Tensor,
    at: Corner,
    derivatives: cute.Tensor | None = None,
    masked: bool = True,
) -> None:
    """S <- scores, from Q·Kᵀ; before the window. derivatives, if given, <- theirs with respect to S · scale.

    masked: False where no mask_mod hides any. S: this thread's (rows, columns), see fragments.rows_cols.
    """
    captured = _captured(score)
    for r in range(cute.size(S, mode=[0])):
        for c in range(cute.size(S, mode=[1])):
            s = Number(KERNEL_OPS, Scaled(S[r, c], score.scale), None if derivatives is None else 1.0)
            s = config.score.apply(KERNEL_OPS, captured, s, at.place(r, c), masked)
            S[r, c] = KERNEL_OPS.floating(s.x)
            if derivatives is not None:
                derivatives[r, c] = KERNEL_OPS.floating(0.0 if s.dx is None else s.dx)
