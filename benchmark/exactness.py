"""How far an implementation is from the oracle.

The rule: at most twice as far as plain PyTorch operations in the same data type, plus 1e-5.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import Tensor

from benchmark.cases import Case
from benchmark.peers import Implementations
from mini_flash_attention import reference

_ROWS = 1024  # query rows that the oracle computes at a time, so that 16k keys need 64 MB a head
_WRONG = 0.05  # of the largest element


def cases(device: str) -> Iterable[Case]:
    """Full tiles and ragged ones, more and fewer keys than queries, GQA groups of 1, 3 and 6."""
    names, head_dims = (("fp32", "bf16"), (64,)) if device == "cpu" else (("bf16",), (64, 128, 256))
    kinds = [(name, head_dim) for name in names for head_dim in head_dims]
    if device != "cpu":
        kinds.append(("fp16", 128))
    for dtype, head_dim in kinds:
        for causal in (False, True):
            for seqlen_q, seqlen_k, heads_k in ((512, 512, 6), (113, 203, 2), (1023, 511, 1)):
                shape = (2, seqlen_q, seqlen_k, 6, heads_k, head_dim)
                yield Case("accuracy", "fwd", dtype, *shape, causal)


def check(device: str, implementations: Implementations) -> bool:
    """Prints the largest error of ours over all cases; False if one breaks the rule."""
    ours = {name: impl for name, impl in implementations.items() if name.startswith("mini")}
    worst = dict.fromkeys(ours, (0.0, "none"))  # (error / allowed, where)
    for case in cases(device):
        q, k, v = case.inputs(device)
        exact = oracle(q, k, v, case.causal)
        plain, _ = reference.attention(q, k, v, window_right=0 if case.causal else None)
        allowed = 2 * distance(plain, exact) + 1e-5
        for name, impl in ours.items():
            with impl.scope():
                error = distance(impl.call(q, k, v, case.causal), exact)
            entry = (error / allowed, f"{case}: {error:.2e} of {allowed:.2e} allowed")
            worst[name] = max(worst[name], entry)
    for name, (ratio, where) in worst.items():
        print(f"  {name:10s} {'ok   ' if ratio <= 1 else 'WRONG'} nearest to the limit: {where}")
    return all(ratio <= 1 for ratio, _ in worst.values())


def oracle(
    q: Tensor, k: Tensor, v: Tensor, causal: bool, window: int | None = None, **functions: object
) -> Tensor:
    """The output in fp32 (fp64 for fp32 inputs), a block of query rows at a time.

    `functions`: score_mod, mask_mod and s_aux, as in the reference.
    Causal rows are aligned at the bottom right, so the rows up to `stop` see exactly what they
    would see if the keys ended where the last of them stops.
    """
    dtype = torch.float64 if q.dtype == torch.float32 else torch.float32
    seqlen_q, seqlen_k = q.shape[1], k.shape[1]
    blocks = []
    for start in range(0, seqlen_q, _ROWS):
        stop = min(start + _ROWS, seqlen_q)
        keys = max(0, stop + seqlen_k - seqlen_q) if causal else seqlen_k
        right = 0 if causal else None
        block = (q[:, start:stop], k[:, :keys], v[:, :keys])
        options = {"window_left": window, "window_right": right, **_of_rows(start, **functions)}
        blocks.append(reference.attention(*block, dtype=dtype, **options)[0])
    return torch.cat(blocks, dim=1)


def _of_rows(
    start: int,
    score_mod: Callable[..., Tensor] | None = None,
    mask_mod: Callable[..., Tensor] | None = None,
    s_aux: Tensor | None = None,
) -> dict[str, object]:
    """The same for query rows of which the first is row `start` of all."""
    options: dict[str, object] = {"s_aux": s_aux}
    if score_mod is not None:
        options["score_mod"] = lambda score, b, h, q, k: score_mod(score, b, h, q + start, k)
    if mask_mod is not None:
        options["mask_mod"] = lambda b, h, q, k: mask_mod(b, h, q + start, k)
    return options


def oracle_gradients(
    inputs: Sequence[Tensor], dout: Tensor, causal: bool, window: int | None = None, **functions: object
) -> tuple[Tensor, ...]:
    """dq, dk and dv in the oracle's type, a block of query rows at a time: the blocks' dk and dv add up."""
    q, k, v = (tensor.detach() for tensor in inputs)
    seqlen_q, seqlen_k = q.shape[1], k.shape[1]
    dtype = torch.float64 if q.dtype == torch.float32 else torch.float32
    dq, dk, dv = (torch.zeros_like(tensor, dtype=dtype) for tensor in (q, k, v))
    for start in range(0, seqlen_q, _ROWS):
        rows = slice(start, min(start + _ROWS, seqlen_q))
        keys = slice(0, max(0, rows.stop + seqlen_k - seqlen_q) if causal else seqlen_k)
        leaves = [x.to(dtype).requires_grad_() for x in (q[:, rows], k[:, keys], v[:, keys])]
        options = {"window_left": window, "window_right": 0 if causal else None}
        with torch.enable_grad():
            out, _ = reference.attention(*leaves, **options, **_of_rows(rows.start, **functions))
        block = torch.autograd.grad(out, leaves, dout[:, rows].to(dtype))
        dq[:, rows] = block[0]
        dk[:, keys] += block[1]
        dv[:, keys] += block[2]
    return dq, dk, dv


def one_group(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The first key head of the first sequence and its query heads: enough for an error, at any size."""
    return q[:1, :, : q.shape[2] // k.shape[2]], k[:1, :, :1], v[:1, :, :1]


class Wrong(Exception):
    """A result that no rounding explains."""


def check_close(named: Mapping[str, tuple[Tensor, Tensor]]) -> float:
    """The largest error of results beside what is exact; Wrong if one is too far off.

    Rounding to bf16 gives errors near 0.5 % of the largest element, a wrong kernel 100 %.
    """
    largest = 0.0
    for name, (result, exact) in named.items():
        error, size = distance(result, exact), exact.abs().max().item()
        if error > _WRONG * size:
            raise Wrong(f"the largest error of {name} is {error:.2g}, its largest element {size:.2g}")
        largest = max(largest, error)
    return largest


def distance(out: Tensor, exact: Tensor) -> float:
    """The largest absolute difference; NaN counts as infinite."""
    difference = (out.to(exact.dtype) - exact).abs().max().item()
    return difference if difference == difference else float("inf")
