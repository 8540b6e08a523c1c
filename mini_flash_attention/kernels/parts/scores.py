"""The score function: what becomes of Q·Kᵀ before the softmax, inlined into the kernels that ask for it.

config.score is "plain" (the softmax scale alone, folded into the exponentials), "softcap" (Gemma 2,
arXiv 2408.00118), "alibi" (Press et al. 2022, arXiv 2108.12409) or "softcap_alibi". What else a new one
touches: ../README.md, section 8.
"""

import cutlass
import cutlass.cute as cute
from cutlass import Float32, const_expr

from mini_flash_attention.kernels.calls import Score

LOG2_E = 1.4426950408889634


def scale_log2(config, score: Score) -> Float32:
    """The softmax's factor: transform leaves all but plain scores in their own units."""
    return score.scale * Float32(LOG2_E) if config.score == "plain" else Float32(LOG2_E)


def in_log2(config, score: Score) -> Score:
    """The score function times log2(e), which is linear in all it has but the slopes, and in those."""
    softcap = score.softcap * Float32(LOG2_E) if "softcap" in config.score else None
    return Score(score.scale * Float32(LOG2_E), softcap, score.slopes)


@cute.jit
def tanh(x: Float32) -> Float32:
    """To float32's precision near 1, where tanh.approx has 11 bits: 1 - 2 / (e^2x + 1)."""
    return 1.0 - 2.0 * cute.arch.rcp_approx(cute.math.exp2(x * Float32(2 * LOG2_E), fastmath=True) + 1.0)


@cute.jit
def transform(
    config: cutlass.Constexpr, score: Score, S: cute.Tensor, slopes: cute.Tensor, distances: cute.Tensor
):
    """S <- scores, from Q·Kᵀ; before the mask.

    S: this thread's (rows, columns), see fragments.rows_cols. slopes: (rows). distances: (rows) int32, how
    far left of the row's diagonal the thread's first column lies.
    """
    if const_expr(config.score != "plain"):
        inverse_cap = Float32(1.0)
        if const_expr("softcap" in config.score):
            inverse_cap = cute.arch.rcp_approx(score.softcap)
        for r in cutlass.range_constexpr(cute.size(S, mode=[0])):
            first = Float32(distances[r]) if const_expr("alibi" in config.score) else Float32(0.0)
            for c in cutlass.range_constexpr(cute.size(S, mode=[1])):
                s = S[r, c] * score.scale
                if const_expr("softcap" in config.score):
                    s = score.softcap * tanh(S[r, c] * (score.scale * inverse_cap))
                if const_expr("alibi" in config.score):
                    distance = first - Float32((c // 2) * 8 + c % 2)
                    s = s - slopes[r] * cute.arch.fmax(distance, -distance)
                S[r, c] = s


@cute.jit
def derivative(score: Score, s: Float32, bias: Float32) -> Float32:
    """That of the softcap, where the score is s (masked, -inf: 0); bias: what ALiBi has taken from it."""
    capped = cute.arch.fmax(s + bias, -score.softcap)
    tanh = capped * cute.arch.rcp_approx(score.softcap)
    return 1.0 - tanh * tanh
