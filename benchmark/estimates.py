"""What FlashAttention-3 would do where it isn't installed: an estimate from measured ratios.

FA3 has to be built from source, so most runs lack it. Once, all were timed in turn on an H100 80GB
HBM3 (bf16, forward, 16,384 tokens, hidden size 2048; PyTorch 2.11.0, cuDNN 9.19, FA3 built from
source, FA4 4.0.0b36). The estimate is the larger of the two that these ratios give.
"""

from collections.abc import Mapping, Sequence

from benchmark.results import Row

# (head dim, causal): {length: (FA3 / cuDNN, FA3 / FA4)}
_RATIOS = {
    (128, 0): {
        512: (0.96, 1.14),
        1024: (1.05, 1.11),
        2048: (1.06, 1.05),
        4096: (1.09, 1.02),
        8192: (1.11, 1.02),
        16384: (1.10, 1.01),
    },
    (128, 1): {
        512: (0.80, 1.12),
        1024: (1.04, 1.16),
        2048: (1.21, 1.14),
        4096: (1.27, 1.11),
        8192: (1.28, 1.10),
        16384: (1.27, 1.07),
    },
    (64, 0): {1024: (0.86, 0.94), 4096: (1.11, 1.00), 16384: (1.21, 1.00)},
    (64, 1): {1024: (0.85, 1.12), 4096: (1.11, 1.05), 16384: (1.21, 0.99)},
    (256, 0): {1024: (1.11, 1.01), 4096: (1.13, 1.00), 16384: (1.14, 0.98)},
    (256, 1): {1024: (1.02, 1.06), 4096: (1.28, 1.03), 16384: (1.34, 1.00)},
}


def fa3_tflops(rows: Mapping[str, Row]) -> float | None:
    """TFLOP/s for one case, given its rows by implementation; None where no ratio was measured."""
    case = next(iter(rows.values()))
    if not _was_measured(case):
        return None
    ratios = _RATIOS.get((case.head_dim, case.causal), {}).get(case.seqlen_k)
    return _larger(rows, ratios) if ratios else None


def _was_measured(case: Row) -> bool:
    tokens, hidden = case.batch * case.seqlen_q, case.heads_q * case.head_dim
    kind = (case.suite, case.direction, case.variant, case.dtype)
    shape = (tokens, hidden, case.seqlen_q, case.heads_q)
    same_shape = shape == (16384, 2048, case.seqlen_k, case.heads_k)
    return kind == ("prefill", "fwd", "plain", "bf16") and same_shape and "H100" in case.gpu


def _larger(rows: Mapping[str, Row], ratios: Sequence[float]) -> float | None:
    peers = zip(("sdpa-cudnn", "fa4"), ratios, strict=True)
    return max((rows[peer].tflops * ratio for peer, ratio in peers if peer in rows), default=None)
