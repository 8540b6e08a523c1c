"""The random numbers of dropout: known answers, statistics, independence of the tiles."""

import pytest
import torch

from mini_flash_attention.philox import keep_mask, keep_threshold, philox


@pytest.mark.parametrize(  # the known-answer test of Random123, philox4x32 with 10 rounds
    ("counter", "key", "words"),
    [
        ("00000000 00000000 00000000 00000000", "00000000 00000000",
         "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff",
         "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0",
         "d16cfe09 94fdcceb 5001e420 24126ea1"),
    ],
)  # fmt: skip
def test_known_answers(counter: str, key: str, words: str) -> None:
    counter, key, words = ([int(x, 16) for x in text.split()] for text in (counter, key, words))
    got = philox(tuple(torch.tensor([c]) for c in counter), tuple(key))
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
        assert abs(x.mean().item()) < 5 * deviation / x.numel() ** 0.5

    assert_near_zero(keep, variance**0.5)
    other_seed = mask(8, dropout_p, range(8), range(128), range(512)).double() - (1 - dropout_p)
    for neighbour in (*(keep.roll(1, dim) for dim in range(3)), other_seed):
        assert_near_zero(keep * neighbour, variance)


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


def test_the_threshold_fits_32_bits() -> None:
    assert keep_threshold(0.5) == 2**31
    assert keep_threshold(1e-12) == 2**32 - 1
    assert keep_threshold(1.0) == 0
