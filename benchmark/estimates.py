"""What FlashAttention-3 would do where it isn't installed: an estimate from measured ratios.

FA3 has to be built from source, so most runs lack it. Once, all ran on an H100 80GB HBM3 (bf16,
forward; PyTorch 2.11.0, cuDNN 9.19, FA3 built from source, FA4 4.0.0b36): prefill in turn, 16,384
tokens and hidden size 2048; decoding one query token a sequence of head dim 128. The estimate is the
fastest that the ratios of a case give.
"""

from collections.abc import Mapping
from dataclasses import replace

from benchmark.results import Row

NAME = "fa3 (est.)"
# Ratios of speeds. (head dim, causal): {length: (FA3 / cuDNN, FA3 / FA4)}
_PREFILL = {
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

# (batch, query heads, key heads, length): FA3 / cuDNN, of times of 71.9 and 67.2 µs, and so on
_DECODE = {
    (24, 24, 24, 512): 67.2 / 71.9,
    (24, 24, 24, 2048): 213.4 / 236.5,
    (24, 24, 24, 8192): 794.1 / 841.2,
    (1, 32, 8, 8192): 26.8 / 30.0,
    (1, 32, 8, 131072): 193.1 / 205.7,
    (16, 32, 8, 4096): 101.9 / 111.8,
    (64, 32, 8, 8192): 706.8 / 728.9,
    (128, 16, 1, 8192): 190.0 / 201.7,
}


def fa3(rows: Mapping[str, Row]) -> Row | None:
    """The row of FA3 for one case, given those of the implementations; None where no ratio was measured."""
    estimates = [_faster(rows[peer], ratio) for peer, ratio in _ratios(rows).items() if peer in rows]
    return min(estimates, key=lambda row: row.ms, default=None)


def _ratios(rows: Mapping[str, Row]) -> dict[str, float]:
    case = next(iter(rows.values()))
    if "H100" not in case.gpu or (case.direction, case.dtype) != ("fwd", "bf16"):
        return {}
    if case.suite == "decode" and (case.seqlen_q, case.head_dim, case.variant) == (1, 128, "plain"):
        ratio = _DECODE.get((case.batch, case.heads_q, case.heads_k, case.seqlen_k))
        return {"sdpa-cudnn": ratio} if ratio else {}
    shape = (case.batch * case.seqlen_q, case.heads_q * case.head_dim, case.seqlen_q, case.heads_q)
    if case.suite != "prefill" or shape != (16384, 2048, case.seqlen_k, case.heads_k):
        return {}
    ratios = _PREFILL.get((case.head_dim, case.causal), {}).get(case.seqlen_k, ())
    return dict(zip(("sdpa-cudnn", "fa4"), ratios, strict=False))


def _faster(row: Row, ratio: float) -> Row:
    rates = {"tflops": row.tflops * ratio, "gbps": row.gbps * ratio}
    return replace(row, impl=NAME, ms=row.ms / ratio, **rates)
