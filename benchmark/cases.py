"""The problems that are timed: what a case is, what it costs, and the suites made of cases."""

import random
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

from benchmark.models import SHAPES

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
CREATE = "create"  # the variant that makes a block mask, and attends to nothing
PRODUCT = "matmul8192"  # the variant of a matrix product of that size, beside which the others can be read
# Work of a direction: the forward pass is two matrix products, the backward pass five.
_PASSES = {"fwd": 1.0, "bwd": 2.5, "fwdbwd": 3.5}


@dataclass(frozen=True)
class Case:
    """One problem, named as in the columns of the result files. Lengths are tokens a sequence."""

    suite: str  # one of results.SUITES; accuracy for cases that are not timed
    direction: str  # fwd, bwd or fwdbwd
    dtype: str  # a key of DTYPES
    batch: int
    seqlen_q: int
    seqlen_k: int
    heads_q: int
    heads_k: int
    head_dim: int
    causal: bool
    variant: str = "plain"
    window: int | None = None  # of a causal case: keys that a row sees beside its own
    lengths: tuple[int, ...] = ()  # of sequences packed one behind the other; seqlen_* is the longest
    beside: tuple[str, ...] = ()  # of scores and masks: variants that are timed in turn with this one
    ours_alone: bool = False  # of scores and masks: no peer is timed
    visible: float = 1.0  # of masks: the share of pairs that the variant leaves

    @property
    def flops(self) -> float:
        """Floating-point operations of the matrix products, of the scores that the mask leaves.

        These are areas between lines: a causal square is half, exactly. Of a mask function pairs are counted.
        """
        if self.variant == PRODUCT:
            return 2.0 * self.seqlen_q * self.seqlen_k * self.head_dim
        lengths = [(n, n) for n in self.lengths] or [(self.seqlen_q, self.seqlen_k)] * self.batch
        scores = sum(self._seen(*pair) for pair in lengths)
        return 4.0 * self.heads_q * scores * self.visible * self.head_dim * _PASSES[self.direction]

    def _seen(self, seqlen_q: int, seqlen_k: int) -> float:
        seen = _below(seqlen_q, seqlen_k, 0) if self.causal else seqlen_q * seqlen_k
        return seen if self.window is None else seen - _below(seqlen_q, seqlen_k, -self.window)

    @property
    def kv_bytes(self) -> int:
        """Bytes of K and V, each read once."""
        tokens = sum(self.lengths) or self.batch * self.seqlen_k
        return 2 * tokens * self.heads_k * self.head_dim * DTYPES[self.dtype].itemsize

    def inputs(self, device: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """q, k and v, normally distributed, seeded: (batch, seqlen, heads, head_dim), packed (tokens, …)."""
        torch.manual_seed(0)
        tokens_q, tokens_k = ((sum(self.lengths),),) * 2 if self.lengths else self._tokens()
        shape_q = (*tokens_q, self.heads_q, self.head_dim)
        shape_k = (*tokens_k, self.heads_k, self.head_dim)
        gradients = self.direction != "fwd"
        options = dict(device=device, dtype=DTYPES[self.dtype], requires_grad=gradients)
        q, k, v = (torch.randn(shape, **options) for shape in (shape_q, shape_k, shape_k))
        return q, k, v

    def _tokens(self) -> tuple[tuple[int, int], tuple[int, int]]:
        return (self.batch, self.seqlen_q), (self.batch, self.seqlen_k)

    def __str__(self) -> str:
        lengths, heads = pair(self.seqlen_q, self.seqlen_k), pair(self.heads_q, self.heads_k)
        shape = f"B={self.batch} S={lengths} H={heads} D={self.head_dim}"
        kind = "" if self.variant == "plain" else f" {self.variant}"
        return f"{self.direction} {self.dtype} {shape} {'causal' if self.causal else 'full'}{kind}"


def _below(seqlen_q: int, seqlen_k: int, shift: int) -> float:
    """The area of a rectangle below its diagonal, from the lower right corner, moved right."""
    start, stop = seqlen_k - seqlen_q + shift, seqlen_k + shift  # where it meets the first and the last row

    def integral(x: float) -> float:
        x = max(x, 0)
        return x * x / 2 if x <= seqlen_k else seqlen_k * (x - seqlen_k / 2)

    return integral(stop) - integral(start)


def pair(queries: int, keys: int) -> str:
    """A number of the queries and of the keys, once where they are equal."""
    return str(queries) if queries == keys else f"{queries}/{keys}"


def square(suite: str, direction: str, dtype: str, shape: tuple[int, ...], causal: bool) -> Case:
    """A case with as many keys as queries; shape is (batch, seqlen, heads, head_dim)."""
    batch, seqlen, heads, head_dim = shape
    return Case(suite, direction, dtype, batch, seqlen, seqlen, heads, heads, head_dim, causal)


def classic(device: str) -> list[Case]:
    """The case that FlashAttention's readers know, without and with the causal mask."""
    kind, shape = ("prefill", "fwd", "fp16"), (10, 4096, 28, 128)
    if device == "cpu":
        kind, shape = ("cpu", "fwd", "fp32"), (2, 1024, 12, 64)
    return [square(*kind, shape, causal) for causal in (False, True)]


def sweep(device: str) -> Iterator[Case]:
    """Head dims, masks and lengths: 16k tokens and hidden size 2048 on a GPU, less on a CPU."""
    if device == "cpu":
        for direction in ("fwd", "fwdbwd"):
            for causal in (False, True):
                for seqlen in (512, 1024, 4096):
                    yield square("cpu", direction, "fp32", (1, seqlen, 8, 64), causal)
        return
    yield from _prefill("fwd", (512, 1024, 2048, 4096, 8192, 16384))


def backward(device: str) -> Iterator[Case]:
    """The gradients alone and with the forward pass. On a CPU the sweep has them."""
    if device != "cpu":
        for direction in ("bwd", "fwdbwd"):
            yield from _prefill(direction, (1024, 4096, 16384))


def _prefill(direction: str, lengths: tuple[int, ...]) -> Iterator[Case]:
    for head_dim in (64, 128, 256):
        for causal in (False, True):
            for seqlen in lengths:
                shape = (16384 // seqlen, seqlen, 2048 // head_dim, head_dim)
                yield square("prefill", direction, "bf16", shape, causal)


def varlen(device: str) -> Iterator[Case]:
    """32k packed tokens, forward and backward: eight equal sequences, and a long-tailed batch."""
    if device != "cpu":
        for direction in ("fwd", "bwd"):
            yield _packed(direction, "plain", (4096,) * 8)
            yield _packed(direction, "longtail", longtail(tokens=32768, longest=16384))


def _packed(direction: str, variant: str, lengths: tuple[int, ...]) -> Case:
    batch, longest = len(lengths), max(lengths)
    shape = (batch, longest, longest, 16, 16, 128)
    return Case("varlen", direction, "bf16", *shape, causal=True, variant=variant, lengths=lengths)


def longtail(tokens: int, longest: int) -> tuple[int, ...]:
    """Log-normal lengths, the same ones each time: a median near 400, and a few of many thousands."""
    draw = random.Random(0)
    lengths = []
    while left := tokens - sum(lengths):
        lengths.append(min(left, longest, 1 + int(draw.lognormvariate(6, 1.5))))
    return tuple(lengths)


def decode(device: str) -> Iterator[Case]:
    """One new token a sequence: multi-head, grouped and multi-query attention over caches; one eager."""
    if device == "cpu":
        return
    for batch, heads_q, heads_k, seqlen_k in (
        (24, 24, 24, 512),
        (24, 24, 24, 2048),
        (24, 24, 24, 8192),
        (1, 32, 8, 8192),
        (1, 32, 8, 131072),
        (16, 32, 8, 4096),
        (64, 32, 8, 8192),
        (128, 16, 1, 8192),
    ):
        yield Case("decode", "fwd", "bf16", batch, 1, seqlen_k, heads_q, heads_k, 128, False)
    yield Case("decode", "fwd", "bf16", 1, 1, 8192, 32, 8, 128, False, variant="eager")


def models(device: str) -> list[Case]:
    """Shapes of real models; their names and sources are in models.py."""
    return [] if device == "cpu" else [Case("models", *shape) for shape in SHAPES]


_SCORES = ("identity", "scale-bias", "softcap", "softcap-builtin", "alibi", "alibi-builtin")
_SCORES += ("relative-bias", "temperature", "sinks")
_CAUSAL_SCORES = ("softcap", "softcap-builtin", "relative-bias")
_MASKS = ("documents", "documents-varlen", "documents-causal", "documents-causal-varlen", "prefix")
_MASKS += ("window1024", "window1024-builtin", "sink-window", "dilated", "per-head-windows", "blocks10")


def scores(device: str) -> Iterator[Case]:
    """Functions of the scores beside the plain kernel. Beside peers, who compile each shape, at 4k alone."""
    for shape in _of_functions("scores", device):
        for causal, beside in ((False, _SCORES), (True, _CAUSAL_SCORES)):
            yield replace(shape, causal=causal, beside=beside, ours_alone=shape.seqlen_q != 4096)


def masks(device: str) -> Iterator[Case]:
    """Masks beside attention to everything; beside peers at 16k alone. A mask's own making, too."""
    for shape in _of_functions("masks", device):
        yield replace(shape, beside=_MASKS, ours_alone=shape.seqlen_q != 16384)
        if shape.seqlen_q == 16384:
            yield replace(shape, seqlen_q=32768, seqlen_k=32768, beside=("blocks10",), ours_alone=True)
    if device != "cpu":
        yield Case("masks", "fwd", "bf16", 1, 32768, 32768, 1, 1, 0, False, variant=CREATE)


def _of_functions(suite: str, device: str) -> Iterator[Case]:
    """16k tokens and hidden size 2048, as in the sweep."""
    if device != "cpu":
        for direction in ("fwd", "bwd"):
            for head_dim in (64, 128):
                for seqlen in (4096, 16384):
                    shape = (16384 // seqlen, seqlen, 2048 // head_dim, head_dim)
                    yield square(suite, direction, "bf16", shape, causal=False)


def product() -> Case:
    """The 8192³ matrix product, whose rate says what the chip of a run can do."""
    return Case("overhead", "fwd", "bf16", 1, 8192, 8192, 1, 1, 8192, False, variant=PRODUCT)


def overhead(device: str) -> list[Case]:
    """A problem so small that the time of a call is what the host spends on it."""
    dtype = "fp32" if device == "cpu" else "bf16"
    return [square("overhead", "fwd", dtype, (1, 128, 4, 64), False)]
