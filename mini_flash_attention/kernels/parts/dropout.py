"""Dropout: ../philox.py, generated wherever a kernel has P, so that no mask is ever stored.

A counter gives the random bits of 8 elements: query rows i and i + 8, keys j, j + 1, j + 8 and j + 9, each in
half j % 2 of word 2 * (i // 8 % 2) + j // 8 % 2. In a tile whose rows are queries one thread holds all of
them. In a transposed one (the backward's: rows are keys) it holds i and i + 1, but only j or j + 1: it
generates the words of one of its queries, and exchanges halves with lane ^ 4, which holds the other key and
generates those of the other query.
"""

from collections.abc import Callable

import cutlass
import cutlass.cute as cute
from cutlass import BFloat16, Int32, Uint32, Uint64, const_expr

from mini_flash_attention.kernels.calls import Dropout
from mini_flash_attention.kernels.parts.fragments import rows_cols
from mini_flash_attention.kernels.parts.sm80 import opaque
from mini_flash_attention.philox import KEY_INCREMENTS, MULTIPLIERS, ROUNDS

SIGNS = 0x80008000 - (1 << 32)  # of two 16-bit values


def counter(row: Int32, key: Int32) -> tuple[Int32, Int32]:
    """The first words of an element's counter: its place without the bits that choose among 8 elements."""
    return row & ~8, key & ~9


def read_seed(dropout: Dropout) -> tuple[Uint32, Uint32]:
    """Its two words. For each tile anew: kept, they would take registers that spill."""
    return Uint32(dropout.seed[0]), Uint32(dropout.seed[1])


@cute.jit
def random_words(seed: tuple, row: Int32, key: Int32, batch_head: Int32) -> tuple:
    """philox.philox of an element's counter: four words. seed: what read_seed gives."""
    c0, c1 = (Uint32(c) for c in counter(row, key))
    c2, c3 = Uint32(batch_head), Uint32(0)
    k0, k1 = seed
    for _ in cutlass.range_constexpr(ROUNDS):
        product0 = Uint64(c0) * Uint64(MULTIPLIERS[0])
        product1 = Uint64(c2) * Uint64(MULTIPLIERS[1])
        c0, c1 = Uint32(product1 >> 32) ^ c1 ^ k0, Uint32(product1)
        c2, c3 = Uint32(product0 >> 32) ^ c3 ^ k1, Uint32(product0)
        k0, k1 = k0 + Uint32(KEY_INCREMENTS[0]), k1 + Uint32(KEY_INCREMENTS[1])
    return tuple(Int32(c) for c in (c0, c1, c2, c3))


@cute.jit
def marked(dropout: Dropout, pair: Int32, bits: Int32) -> Int32:
    """Two adjacent P, in 16 bits each and not negative; those to be dropped become negative.

    0x8000 + bits - threshold has its highest bit if the bits reach the threshold; no half borrows.
    """
    return pair | ((bits | Int32(SIGNS)) - dropout.threshold) & Int32(SIGNS)


@cute.jit
def mark(dropout: Dropout, P: cute.Tensor, rows: tuple, key: Int32, batch_head: Int32):
    """P <- -P where dropped, in a tile of (queries, keys).

    P: 16 bits, not negative, the fragment of an accumulator or of an A operand. rows: the thread's first row
    of every 16. key: its first column. Both count from the start of the sequence. batch_head: batch * heads_q
    + head.
    """
    pairs, seed = rows_cols(cute.recast_tensor(P, Int32)), read_seed(dropout)
    for m in cutlass.range_constexpr(len(rows)):
        for c in cutlass.range_constexpr(0, cute.size(pairs, mode=[1]), 2):
            words = random_words(seed, rows[m], key + 8 * c, batch_head)
            for i in cutlass.range_constexpr(4):
                r, right = 2 * m + i // 2, c + i % 2
                pairs[r, right] = marked(dropout, pairs[r, right], words[i])


@cute.jit
def mark_transposed(dropout: Dropout, P: cute.Tensor, keys: tuple, query: Int32, batch_head: Int32):
    """P <- -P where dropped, in a tile of (keys, queries). The whole warp must call it.

    P: as in `mark`. keys: the thread's first row of every 16. query: its first column. batch_head: batch *
    heads_q + head.
    """
    pairs, seed = rows_cols(cute.recast_tensor(P, Int32)), read_seed(dropout)
    odd = keys[0] & 1
    for m in cutlass.range_constexpr(len(keys)):
        for c in cutlass.range_constexpr(0, cute.size(pairs, mode=[1]), 2):
            own = random_words(seed, query + 8 * c + odd, keys[m], batch_head)
            got = [cute.arch.shuffle_sync_bfly(x, 4) for x in to_send(permute, own, odd)]
            words = of_pairs(permute, own, got, odd)
            for i in cutlass.range_constexpr(4):
                r, below = 2 * m + i % 2, c + i // 2
                pairs[r, below] = marked(dropout, pairs[r, below], words[i])


def to_send(permute: Callable, own: tuple, odd: Int32) -> list[Int32]:
    """The halves that are of the other lane's key: two words of them. odd: this key % 2."""
    selector = 0x7632 - odd * (0x7632 - 0x5410)  # both upper halves, both lower halves
    return [permute(own[i], own[i + 1], selector) for i in (0, 2)]


def of_pairs(permute: Callable, own: tuple, got: list[Int32], odd: Int32) -> list[Int32]:
    """Four words for this key: an even query's half below an odd query's."""
    first, second = 0x5410 + odd * (0x3254 - 0x5410), 0x7610 + odd * (0x3276 - 0x7610)
    return [permute(own[i], got[i // 2], second if i % 2 else first) for i in range(4)]


def permute(a: Int32, b: Int32, selector: Int32) -> Int32:
    """Four of the bytes of a (0 to 3) and b (4 to 7), chosen by the selector's hexadecimal digits."""
    return Int32(cute.arch.prmt(a, b, selector))


@cute.jit
def keep(P: cute.Tensor, kept: cute.Tensor):
    """kept <- P without what is marked. NaN stays."""
    dtype = "bf16x2" if const_expr(P.element_type is BFloat16) else "f16x2"
    src, dst = cute.recast_tensor(P, Int32), cute.recast_tensor(kept, Int32)
    zero = opaque(Int32(0))  # the instruction takes no immediate
    for i in cutlass.range_constexpr(cute.size(src)):
        dst[i] = cute.arch.inline_ptx(
            f"max.NaN.{dtype} {{$w0}}, {{$r0}}, {{$r1}};",
            write_only_types=[Int32],
            read_only_args=[src[i], zero],
        )


@cute.jit
def rescale_sums(dropout: Dropout, inverse_sums: cute.Tensor):
    """What scales O: once for all of P."""
    for r in cutlass.range_constexpr(cute.size(inverse_sums)):
        inverse_sums[r] = inverse_sums[r] * dropout.rescale
