"""Random numbers for dropout: Philox4x32-10.

Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3". A number is a function of the
seed and of its place (batch and head, query row, key column) alone, so the forward pass, the
backward pass and every tile shape drop the same elements, and nothing has to be stored.
"""

import torch
from torch import Tensor

MASK32 = 0xFFFFFFFF
MULTIPLIERS = 0xD2511F53, 0xCD9E8D57
KEY_INCREMENTS = 0x9E3779B9, 0xBB67AE85
ROUNDS = 10


def philox(counter: tuple[Tensor, ...], key: tuple[int, int]) -> tuple[Tensor, ...]:
    """Four random words from four words of counter and two of key, all unsigned 32-bit.

    The counter's words are int64 tensors that broadcast, and so are the results.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(ROUNDS):
        product0 = c0 * MULTIPLIERS[0]  # all 64 bits, though int64 reads the highest one as a sign
        product1 = c2 * MULTIPLIERS[1]
        c0, c1, c2, c3 = (
            (product1 >> 32 & MASK32) ^ c1 ^ k0,
            product1 & MASK32,
            (product0 >> 32 & MASK32) ^ c3 ^ k1,
            product0 & MASK32,
        )
        k0, k1 = k0 + KEY_INCREMENTS[0] & MASK32, k1 + KEY_INCREMENTS[1] & MASK32
    return c0, c1, c2, c3


def keep_threshold(dropout_p: float) -> int:
    """An element is kept when its random word is below this."""
    return min(round((1 - dropout_p) * 2**32), MASK32)


def keep_mask(seed: int, dropout_p: float, batch_heads: Tensor, rows: Tensor, keys: range) -> Tensor:
    """Which elements dropout keeps.

    Args:
        seed: of 64 bits.
        dropout_p: probability of dropping an element.
        batch_heads: batch * heads_q + head; int64, any shape that broadcasts with `rows`.
        rows: query rows; int64.
        keys: key columns, in steps of 1.

    Returns:
        bool, (*broadcast shape of batch_heads and rows, len(keys)).
    """
    batch_heads, rows = batch_heads.unsqueeze(-1), rows.unsqueeze(-1)
    # One counter gives the words of four neighbouring keys.
    quads = torch.arange(keys.start // 4, -(-keys.stop // 4), device=rows.device)
    key = seed & MASK32, seed >> 32 & MASK32
    words = philox((quads, rows, batch_heads, torch.zeros_like(quads)), key)
    threshold = keep_threshold(dropout_p)
    keep = torch.stack([word < threshold for word in words], dim=-1).flatten(-2)
    return keep[..., keys.start % 4 :][..., : len(keys)]
