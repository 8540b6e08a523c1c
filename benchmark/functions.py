"""The variants of the suites scores and masks: functions, sinks, and what is built in that does the same."""

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from benchmark.cases import DTYPES, Case
from mini_flash_attention import masks

BLOCK = 128  # queries, and keys, of a block
_DOCUMENTS = 8
_WINDOW = 1024  # keys that a row sees, its own among them
_PAIRS = 2**26  # of query and key that are counted at once


@dataclass(frozen=True)
class Functions:
    """What a variant does to scores, and which pairs of query and key it leaves."""

    score_mod: Callable[..., Tensor] | None = None
    mask_mod: Callable[..., Tensor] | None = None
    heads: int | None = None  # of a mask that differs in them
    full: Tensor | None = None  # the blocks that mask_mod shows, (1, 1, MB, NB), where they are all it says
    s_aux: Tensor | None = None  # sinks
    # How ours does the same without functions, as keywords of flash_attn_func or as packed sequences.
    builtin: Mapping[str, object] = field(default_factory=dict)
    cu_seqlens: Tensor | None = None
    ours_alone: bool = False  # no peer is timed

    def exactly(self, heads: int) -> dict[str, object]:
        """What the oracle takes, for the first heads."""
        s_aux = None if self.s_aux is None else self.s_aux[:heads]
        return {"score_mod": self.score_mod, "mask_mod": self.mask_mod, "s_aux": s_aux}


def of(case: Case, variant: str, device: str) -> Functions:
    """The functions of a variant, over captured tensors that are the same ones each time."""
    if variant == "plain":
        return Functions(ours_alone=case.suite == "masks")
    return (_scores if case.suite == "scores" else _masks)(case, variant, device)


def _scores(case: Case, variant: str, device: str) -> Functions:
    heads, seqlen = case.heads_q, case.seqlen_k
    number = torch.Generator().manual_seed(1)
    table = torch.randn(heads, 2 * seqlen, generator=number).to(device)
    temperatures = (0.5 + torch.rand(heads, generator=number)).to(device)
    slopes = (2.0 ** (-8 * torch.arange(1, heads + 1) / heads)).to(device)
    factor, summand, cap = 0.9, 0.1, 30.0

    def identity(score, batch, head, q_idx, kv_idx):
        return score

    def scale_bias(score, batch, head, q_idx, kv_idx):
        return score * factor + summand

    def softcap(score, batch, head, q_idx, kv_idx):
        return cap * torch.tanh(score / cap)

    def alibi(score, batch, head, q_idx, kv_idx):
        return score - slopes[head] * abs(q_idx - kv_idx)

    def relative_bias(score, batch, head, q_idx, kv_idx):
        return score + table[head, q_idx - kv_idx + seqlen]

    def temperature(score, batch, head, q_idx, kv_idx):
        return score * temperatures[head]

    s_aux = torch.randn(heads, generator=number).to(device, DTYPES[case.dtype])
    return {
        "identity": Functions(identity, ours_alone=True),
        "scale-bias": Functions(scale_bias, ours_alone=True),
        "softcap": Functions(softcap),
        "softcap-builtin": Functions(softcap, builtin={"softcap": cap}, ours_alone=True),
        "alibi": Functions(alibi),
        "alibi-builtin": Functions(alibi, builtin={"alibi_slopes": slopes}, ours_alone=True),
        "relative-bias": Functions(relative_bias),
        "temperature": Functions(temperature),
        "sinks": Functions(s_aux=s_aux),
    }[variant]


def _masks(case: Case, variant: str, device: str) -> Functions:
    seqlen = case.seqlen_q
    window = masks.sliding_window(_WINDOW - 1, 0)
    if variant.startswith("documents"):
        return _documents(variant, seqlen, device)
    if variant == "per-head-windows":
        return Functions(mask_mod=_windows_of_heads(case.heads_q, device), heads=case.heads_q)
    if variant == "blocks10":
        full = tenth_of_blocks(seqlen).to(device)
        return Functions(mask_mod=_listed(full), full=full)
    return {
        "prefix": Functions(mask_mod=masks.prefix_lm(seqlen // 4)),
        "window1024": Functions(mask_mod=window),
        "window1024-builtin": Functions(
            mask_mod=window, builtin={"window_size": (_WINDOW - 1, 0)}, ours_alone=True
        ),
        "sink-window": Functions(mask_mod=_with_sinks(window)),
        "dilated": Functions(mask_mod=masks.dilated(4)),
    }[variant]


def _documents(variant: str, seqlen: int, device: str) -> Functions:
    """The documents of a sequence, by a mask, or as sequences of their own."""
    starts = torch.tensor(document_starts(seqlen), dtype=torch.int32, device=device)
    causal, packed = "causal" in variant, variant.endswith("-varlen")
    mask = masks.documents(cu_seqlens=starts)
    mask = masks.and_masks(masks.causal(), mask) if causal else mask
    if not packed:
        return Functions(mask_mod=mask)
    return Functions(mask_mod=mask, cu_seqlens=starts, builtin={"causal": causal}, ours_alone=True)


def document_starts(seqlen: int) -> list[int]:
    """Where the documents start, and the end: of random lengths, the same ones each time."""
    return [0, *sorted(random.Random(0).sample(range(1, seqlen), _DOCUMENTS - 1)), seqlen]


def tenth_of_blocks(seqlen: int) -> Tensor:
    """A tenth of the key blocks, at random, for each query block, the same ones each time."""
    blocks = -(-seqlen // BLOCK)
    order = torch.rand(blocks, blocks, generator=torch.Generator().manual_seed(0)).argsort(-1).argsort(-1)
    return (order < max(1, round(blocks / 10)))[None, None]


def _listed(full: Tensor) -> Callable[..., Tensor]:
    def listed(batch, head, q_idx, kv_idx):
        return full[0, 0, q_idx // BLOCK, kv_idx // BLOCK]

    return listed


def _windows_of_heads(heads: int, device: str) -> Callable[..., Tensor]:
    """256, 512, 1024 and 2048 keys, for four heads in turn."""
    windows = (256 << torch.arange(heads) % 4).int().to(device)

    def window_of_head(batch, head, q_idx, kv_idx):
        return (kv_idx <= q_idx) & (kv_idx > q_idx - windows[head])

    return window_of_head


def _with_sinks(window: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A causal window, and the first four keys."""

    def first_four(batch, head, q_idx, kv_idx):
        return kv_idx < 4

    return masks.and_masks(masks.causal(), masks.or_masks(window, first_four))


def visible(functions: Functions, case: Case, device: str) -> float:
    """The share of pairs that the mask shows, counted some rows at a time."""
    if functions.mask_mod is None:
        return 1.0
    heads, queries, keys = functions.heads or 1, case.seqlen_q, case.seqlen_k
    h, q, k = (torch.arange(size, dtype=torch.int32, device=device) for size in (heads, queries, keys))
    seen, batch = torch.zeros((), dtype=torch.int64, device=device), torch.zeros_like(h[0])
    for rows in q.split(max(1, _PAIRS // (heads * keys))):
        pairs = functions.mask_mod(batch, h.view(-1, 1, 1), rows.view(-1, 1), k)
        seen += pairs.expand(heads, len(rows), keys).sum()
    return seen.item() / (heads * queries * keys)
