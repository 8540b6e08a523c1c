"""Functions of scores that people want, those of docs/masks.md, and awkward ones; with what they capture."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Functions = dict[str, Callable[..., Any]]


def functions(
    name: str,
    batch: int,
    heads: int,
    seqlen: int,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Functions:
    """score_mod, mask_mod or both.

    seqlen: the longer of queries and keys. dtype: of captured tensors of float32, for an oracle.
    """
    generator = torch.Generator().manual_seed(7)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float32).to(device, dtype)

    def integers(high: int, *shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
        return torch.randint(high, shape, generator=generator).to(device, dtype)

    table, slopes = random(heads, 2 * seqlen), random(heads).abs() / 8
    cap, temperature, scale = 3.0, 0.7, random()
    ids = integers(4, batch, seqlen).sort(-1).values
    prefix, windows = integers(seqlen, batch), integers(80, heads, dtype=torch.int64) + 5
    parents = torch.rand(seqlen, seqlen, generator=generator).to(device) < 0.5
    step, sinks, window = 3, 4, 60

    def relative_bias(score, batch, head, q_idx, kv_idx):
        return score + table[head, q_idx - kv_idx + seqlen]

    def alibi(score, batch, head, q_idx, kv_idx):
        return score - slopes[head] * abs(q_idx - kv_idx)

    def softcap(score, batch, head, q_idx, kv_idx):
        return cap * torch.tanh(score / cap)

    def logit_temperature(score, batch, head, q_idx, kv_idx):
        return score * temperature

    def awkward(score, batch, head, q_idx, kv_idx):
        bent = torch.where((q_idx - kv_idx) % 3 == 0, score * score / 4, torch.sigmoid(score) + 1)
        bent = torch.maximum(bent, score * scale) - torch.exp(-score.abs())
        return torch.where((q_idx + kv_idx) // 7 % 5 != 1, bent, float("-inf"))

    def documents(batch, head, q_idx, kv_idx):
        return ids[batch, q_idx] == ids[batch, kv_idx]

    def prefix_lm(batch, head, q_idx, kv_idx):
        return (kv_idx <= q_idx) | (kv_idx < prefix[batch])

    def tree(batch, head, q_idx, kv_idx):
        return parents[q_idx, kv_idx]

    def sink_window(batch, head, q_idx, kv_idx):
        return (kv_idx <= q_idx) & ((q_idx - kv_idx < window) | (kv_idx < sinks))

    def dilated(batch, head, q_idx, kv_idx):
        return (q_idx - kv_idx) % step == 0

    def per_head_window(batch, head, q_idx, kv_idx):
        return abs(q_idx - kv_idx) < windows[head]

    def late(batch, head, q_idx, kv_idx):
        """Rows that see nothing, or nothing in the blocks that are walked first."""
        return (kv_idx < 20) & (q_idx % 5 != 2)

    found = locals()[name]
    role = "score_mod" if found.__code__.co_argcount == 5 else "mask_mod"
    if name == "awkward":
        return {"score_mod": awkward, "mask_mod": documents}
    return {role: found}


# Those that another process can import, as the one that compiles ahead of time does.

BIAS, IDS, SCALE = torch.zeros(4, 64), torch.zeros(2, 32, dtype=torch.int32), 0.5


def scaled_and_biased(score, batch, head, q_idx, kv_idx):
    return score * SCALE + BIAS[head, q_idx - kv_idx + 32]


def same_document(batch, head, q_idx, kv_idx):
    return IDS[batch, q_idx] == IDS[batch, kv_idx]


SCORES = ("relative_bias", "alibi", "softcap", "logit_temperature", "awkward")
MASKS = ("documents", "prefix_lm", "tree", "sink_window", "dilated", "per_head_window", "late")
