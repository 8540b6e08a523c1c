"""Random numbers for dropout: Philox4x32-7.

Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"; 7 rounds are the fewest that pass its
tests. A number is a function of the seed and of its place (batch and head, query row, key column) alone, so
the forward pass, the backward pass, every tile shape and every backend drop the same elements, and nothing
has to be stored.

An element takes 15 bits of one half of a word, so 8 elements share a counter: rows i and i + 8, keys j,
j + 1, j + 8 and j + 9. One thread of a tensor-core accumulator holds them all (kernels/parts/dropout.py).
"""

import torch
from torch import Tensor

MASK32 = 0xFFFFFFFF
MULTIPLIERS = 0xD2511F53, 0xCD9E8D57
KEY_INCREMENTS = 0x9E3779B9, 0xBB67AE85
ROUNDS = 7
RANDOM_BITS = 15  # of an element: the dropout probability is rounded to a multiple of 2^-15


def philox(
    counter: tuple[Tensor, ...], key: tuple[int | Tensor, int | Tensor], rounds: int = ROUNDS
) -> tuple[Tensor, ...]:
    """Four random words from four words of counter and two of key, all unsigned 32-bit.

    The counter's words are int64 tensors that broadcast, and so are the results.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(rounds):
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


def key_of(seed: int | Tensor) -> tuple[int | Tensor, int | Tensor]:
    """The key's two words."""
    return seed & MASK32, seed >> 32 & MASK32


def keep_threshold(dropout_p: float) -> int:
    """An element is kept when its random bits are below this."""
    return round((1 - dropout_p) * 2**RANDOM_BITS)


def keep_mask(seed: int | Tensor, dropout_p: float, batch_heads: Tensor, rows: Tensor, keys: range) -> Tensor:
    """Which elements dropout keeps.

    Args:
        seed: of 64 bits; a tensor is (1) int64, on the device of the result, and is not waited for.
        dropout_p: probability of dropping an element.
        batch_heads: batch * heads_q + head; int64, any shape that broadcasts with `rows`.
        rows: query rows; int64.
        keys: key columns, in steps of 1.

    Returns:
        bool, (*broadcast shape of batch_heads and rows, len(keys)).
    """
    batch_heads, rows = batch_heads.unsqueeze(-1), rows.unsqueeze(-1)
    # 16 keys take four counters: those of keys 0, 2, 4 and 6.
    first = torch.arange(keys.start // 16, -(-keys.stop // 16), device=rows.device) * 16
    first = (first[:, None] + torch.arange(0, 8, 2, device=rows.device)).flatten()
    words = philox((rows & ~8, first, batch_heads, torch.zeros_like(first)), key_of(seed))
    lower_rows = (rows & 8) != 0
    words = tuple(torch.where(lower_rows, words[2 + right], words[right]) for right in (0, 1))
    halves = [word >> shift & 2**RANDOM_BITS - 1 for word in words for shift in (0, 16)]
    keep = torch.stack(halves, dim=-1) < keep_threshold(dropout_p)
    keep = keep.unflatten(-2, (-1, 4)).unflatten(-1, (2, 2))  # (..., 16 keys each, j // 2 % 4, j // 8, j % 2)
    keep = keep.transpose(-3, -2).flatten(-4)
    return keep[..., keys.start % 16 :][..., : len(keys)]
