"""The random numbers of dropout: known answers, statistics, independence of the tiles, the kernels' side."""

import importlib.util
import itertools

import pytest
import torch

from mini_flash_attention.gpu.inputs import dropout as dropout_of
from mini_flash_attention.philox import (
    RANDOM_BITS,
    keep_mask,
    keep_threshold,
    key_of,
    philox,
)


@pytest.mark.parametrize(  # the known-answer tests of Random123, philox4x32
    ("rounds", "counter", "key", "words"),
    [
        (7, "00000000 00000000 00000000 00000000", "00000000 00000000",
         "5f6fb709 0d893f64 4f121f81 4f730a48"),
        (7, "ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff",
         "5207ddc2 45165e59 4d8ee751 8c52f662"),
        (7, "243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0",
         "4dfccaba 190a87f0 c47362ba b6b5242a"),
        (10, "00000000 00000000 00000000 00000000", "00000000 00000000",
         "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        (10, "ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff",
         "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        (10, "243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0",
         "d16cfe09 94fdcceb 5001e420 24126ea1"),
    ],
)  # fmt: skip
def test_known_answers(rounds: int, counter: str, key: str, words: str) -> None:
    counter, key, words = ([int(x, 16) for x in text.split()] for text in (counter, key, words))
    got = philox(tuple(torch.tensor([c]) for c in counter), tuple(key), rounds)
    assert [word.item() for word in got] == words


def mask(seed: int, dropout_p: float, heads: range, rows: range, keys: range) -> torch.Tensor:
    return keep_mask(
        seed, dropout_p, torch.tensor(heads)[:, None], torch.tensor(rows), keys
    )  # (heads, rows, keys)


@pytest.mark.parametrize("dropout_p", [0.001, 0.1, 0.5, 0.9])
def test_keeps_the_right_fraction_and_nothing_is_correlated(dropout_p: float) -> None:
    keep = mask(7, dropout_p, range(8), range(128), range(512)).double() - (1 - dropout_p)
    variance = dropout_p * (1 - dropout_p)

    def assert_near_zero(x: torch.Tensor, deviation: float) -> None:
        assert abs(x.mean().item()) < 5 * deviation / x.numel() ** 0.5 + 2**-RANDOM_BITS

    assert_near_zero(keep, variance**0.5)
    for dim in range(3):
        assert_near_zero(keep.mean(dim), (variance / keep.shape[dim]) ** 0.5)
    for seed in (8, 7 + 2**32):
        other = mask(seed, dropout_p, range(8), range(128), range(512)).double() - (1 - dropout_p)
        assert_near_zero(keep * other, variance)
    # Other heads, rows and keys; rows 8 apart and keys 1 and 8 apart share a counter.
    for distance in ((1, 0, 0), (0, 1, 0), (0, 8, 0), (0, 16, 0), (0, 0, 1), (0, 0, 2), (0, 0, 8), (0, 0, 16),
                     (0, 8, 8), (0, 8, 1), (0, 1, 1), (1, 1, 1)):  # fmt: skip
        assert_near_zero(keep * keep.roll(distance, (0, 1, 2)), variance)


def test_all_outcomes_of_a_patch_are_equally_likely() -> None:
    """Chi-squared over the 256 masks of the 8 elements that share a counter."""
    keep = mask(3, 0.5, range(16), range(256), range(256))
    patches = keep.unflatten(1, (-1, 2, 8)).unflatten(4, (-1, 2, 4, 2))
    # (heads, rows / 16, i // 8, i % 8, keys / 16, j // 8, j // 2 % 4, j % 2)
    patches = patches.permute(0, 1, 3, 4, 6, 2, 5, 7).flatten(0, 4).flatten(1)
    outcomes = (patches.long() * 2 ** torch.arange(8)).sum(-1).bincount(minlength=256).double()
    expected = len(patches) / 256
    chi_squared = ((outcomes - expected) ** 2 / expected).sum().item()
    assert abs(chi_squared - 255) < 5 * (2 * 255) ** 0.5


def test_any_part_of_the_mask_can_be_made_alone() -> None:
    whole = mask(2**40 + 1, 0.5, range(6), range(50), range(70))
    part = mask(2**40 + 1, 0.5, range(2, 5), range(7, 50), range(13, 42))
    assert torch.equal(part, whole[2:5, 7:50, 13:42])
    assert mask(0, 0.5, range(2), range(3), range(5, 5)).shape == (2, 3, 0)


def test_all_64_bits_of_the_seed_matter() -> None:
    seeds = [0, 1, 2**32, 2**63, 2**64 - 1, -(2**63)]
    masks = [mask(seed, 0.5, range(1), range(16), range(16)) for seed in seeds]
    equal = [[torch.equal(a, b) for b in masks] for a in masks]
    # 2^63 and -2^63 are the same 64 bits.
    assert equal == [[a % 2**64 == b % 2**64 for b in seeds] for a in seeds]


def test_the_threshold_counts_random_values() -> None:
    assert keep_threshold(0.5) == 2**14
    assert keep_threshold(1e-12) == 2**15  # nothing is dropped
    assert keep_threshold(1.0) == 0


@pytest.mark.parametrize("dropout_p", [0.0, 1e-5, 0.1, 0.5, 0.99, 1 - 2**-20])
def test_kernels_take_signed_words(dropout_p: float) -> None:
    seed = torch.tensor([SEED])
    words, threshold, rescale = dropout_of(seed, dropout_p)
    assert words.dtype == torch.int32 and [word % 2**32 for word in words.tolist()] == list(key_of(SEED))
    assert -(2**31) <= threshold < 2**31
    assert divmod(threshold % 2**32, 2**16) == (keep_threshold(dropout_p),) * 2
    assert rescale == 1 / (1 - dropout_p)


def test_a_seed_on_the_device_is_the_same_seed() -> None:
    """A tensor of 64 bits, whose highest is a sign, and Python's integer."""
    place = torch.arange(2).view(2, 1), torch.arange(40), range(3, 50)
    for seed in (0, 1, 2**32, 2**63 - 1):
        assert torch.equal(keep_mask(torch.tensor([seed]), 0.3, *place), keep_mask(seed, 0.3, *place))
    assert torch.equal(keep_mask(torch.tensor([-5]), 0.3, *place), keep_mask(2**64 - 5, 0.3, *place))


# kernels/parts/dropout.py, with Python's integers

needs_cutlass = pytest.mark.skipif(
    importlib.util.find_spec("nvidia_cutlass_dsl") is None, reason="CuTe DSL is not installed"
)
SEED, HEAD, SIZE = 2**35 + 5, 3, 64


def words_of(row: int, key: int) -> list[int]:
    """As dropout.random_words."""
    from mini_flash_attention.kernels.parts.dropout import counter

    words = philox(tuple(torch.tensor(c) for c in (*counter(row, key), HEAD, 0)), key_of(SEED))
    return [word.item() for word in words]


def kept_pairs(words: list[int], dropout_p: float) -> list[tuple[bool, bool]]:
    """As dropout.marked, for each word: the lower and the upper half."""
    threshold = dropout_of(torch.zeros(1, dtype=torch.int64), dropout_p).threshold
    signs = [(word | 0x80008000) - threshold & 0x80008000 for word in words]
    return [(not sign & 0x8000, not sign & 0x80000000) for sign in signs]


def prmt(a: int, b: int, selector: int) -> int:
    source = a.to_bytes(4, "little") + b.to_bytes(4, "little")
    return int.from_bytes((source[selector >> 4 * i & 7] for i in range(4)), "little")


@needs_cutlass
@pytest.mark.parametrize("dropout_p", [0.1, 0.5, 0.0, 1 - 2**-20])
def test_every_element_has_a_half_of_a_word(dropout_p: float) -> None:
    keep = mask(SEED, dropout_p, range(HEAD, HEAD + 1), range(SIZE), range(SIZE))[0]
    for row, key in itertools.product(range(SIZE), repeat=2):
        word = row // 8 % 2 * 2 + key // 8 % 2
        assert kept_pairs(words_of(row, key), dropout_p)[word][key % 2] == keep[row, key]


@needs_cutlass
def test_a_thread_finds_its_elements() -> None:
    """A tile of (queries, keys), as in dropout.mark: first row lane // 4, first column 2 * (lane % 4)."""
    keep = mask(SEED, 0.4, range(HEAD, HEAD + 1), range(SIZE), range(SIZE))[0].tolist()
    for start, lane, c in itertools.product(range(0, SIZE, 16), range(32), range(0, SIZE // 8, 2)):
        row, key = start + lane // 4, 8 * c + 2 * (lane % 4)
        pairs = kept_pairs(words_of(row, key), 0.4)
        for i in range(4):
            r, k = row + 8 * (i // 2), key + 8 * (i % 2)
            assert pairs[i] == tuple(keep[r][k : k + 2])


@needs_cutlass
def test_a_thread_of_a_transposed_tile_finds_its_elements() -> None:
    """A tile of (keys, queries), as in dropout.mark_transposed."""
    from mini_flash_attention.kernels.parts.dropout import of_pairs, to_send

    keep = mask(SEED, 0.4, range(HEAD, HEAD + 1), range(SIZE), range(SIZE))[0].T.tolist()
    for start, c in itertools.product(range(0, SIZE, 16), range(0, SIZE // 8, 2)):
        places = [(start + lane // 4, 8 * c + 2 * (lane % 4)) for lane in range(32)]
        own = [words_of(query + key % 2, key) for key, query in places]
        sent = [to_send(prmt, words, key % 2) for words, (key, _) in zip(own, places, strict=True)]
        for lane, (key, query) in enumerate(places):
            words = of_pairs(prmt, own[lane], sent[lane ^ 4], key % 2)
            for i, pair in enumerate(kept_pairs(words, 0.4)):
                k, r = key + 8 * (i % 2), query + 8 * (i // 2)
                assert pair == tuple(keep[k][r : r + 2])


@needs_cutlass
def test_the_kernels_generator_on_the_cpu() -> None:
    """The compiler makes code for the CPU too, where a function needs nothing of a GPU."""
    import cutlass
    import cutlass.cute as cute
    from cutlass import Float32, Int32, Uint32
    from cutlass.cute.runtime import from_dlpack

    from mini_flash_attention.kernels.parts import dropout

    @cute.jit
    def generate(
        out: cute.Tensor, key0: Int32, key1: Int32, threshold: Int32, row: Int32, key: Int32, head: Int32
    ):
        numbers = dropout.Dropout(None, threshold, Float32(1))
        words = dropout.random_words((Uint32(key0), Uint32(key1)), row, key, head)
        for i in cutlass.range_constexpr(4):
            out[i] = words[i]
            out[4 + i] = dropout.marked(numbers, Int32(0), words[i])

    out = torch.empty(8, dtype=torch.int32)
    words, threshold, _ = dropout_of(torch.tensor([SEED]), 0.4)
    numbers = *words.tolist(), threshold
    compiled = cute.compile(generate, from_dlpack(out), *map(Int32, (*numbers, 1, 1, 1)))
    for row, key in ((0, 0), (12345, 777), (8, 9), (2**31 - 1, 2**31 - 3)):
        compiled(from_dlpack(out), *map(Int32, (*numbers, row, key, HEAD)))
        words, marks = ([x % 2**32 for x in half] for half in (out[:4].tolist(), out[4:].tolist()))
        assert words == words_of(row, key)
        kept = [(not mark & 0x8000, not mark & 0x80000000) for mark in marks]
        assert kept == kept_pairs(words, 0.4)
