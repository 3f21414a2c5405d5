"""Philox4x32-10 against the known-answer vectors of its authors, and the kernel against the numpy reference."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numba import njit
from sampling_reference import noise_words, philox4x32

from sempre.kernels.sampling.noise import fill_words, philox
from sempre.kernels.sampling.rng import TILE

ALL_ONES = 0xFFFFFFFF
KNOWN_ANSWERS = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((ALL_ONES,) * 4, (ALL_ONES,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@njit
def _philox_arrays(counters: Any, key_0: Any, key_1: Any, out: Any) -> None:
    for i in range(counters.shape[1]):
        words = philox(counters[0, i], counters[1, i], counters[2, i], counters[3, i], key_0, key_1)
        out[0, i], out[1, i], out[2, i], out[3, i] = words


@njit
def _tile_words(words: Any, tile: Any, position: Any, key_0: Any, key_1: Any) -> None:
    fill_words(words, tile, position, key_0, key_1)


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN_ANSWERS)
def test_reference_gives_the_known_answers(
    counter: tuple[int, ...], key: tuple[int, int], expected: tuple[int, ...]
) -> None:
    c0, c1, c2, c3 = (np.array([word], np.uint32) for word in counter)
    assert tuple(int(word[0]) for word in philox4x32((c0, c1, c2, c3), key)) == expected


def test_kernel_equals_reference() -> None:
    generator = np.random.default_rng(0)
    counters = generator.integers(0, 2**32, (4, 1000), dtype=np.uint32)
    counters[:, :3] = np.array([answer[0] for answer in KNOWN_ANSWERS], np.uint32).T
    for key_0, key_1 in [(0, 0), (ALL_ONES, ALL_ONES), (0xA4093822, 0x299F31D0)]:
        out = np.empty_like(counters)
        _philox_arrays(counters, np.uint32(key_0), np.uint32(key_1), out)
        c0, c1, c2, c3 = counters
        assert np.array_equal(out, np.stack(philox4x32((c0, c1, c2, c3), (key_0, key_1))))


def test_ids_map_to_counters_and_words_as_documented() -> None:
    seed, position, vocab_size = (5 << 32) | 7, 2**32 - 1, 300
    words = noise_words(seed, position, vocab_size)
    zero = np.zeros(1, np.uint32)
    for token_id in range(vocab_size):
        counter = np.array([(token_id >> 6) * 16 + (token_id & 15)], np.uint32)
        block = philox4x32((counter, np.array([position], np.uint32), zero, zero), (7, 5))
        assert words[token_id] == block[(token_id >> 4) & 3][0]


def test_tile_kernel_equals_reference() -> None:
    seed, position = 0xFEDCBA9876543210, 123_456
    expected = noise_words(seed, position, 40 * TILE)
    words = np.empty(TILE, np.uint32)
    for tile in (0, 1, 39):
        _tile_words(words, tile, np.uint32(position), np.uint32(seed & ALL_ONES), np.uint32(seed >> 32))
        assert np.array_equal(words, expected[tile * TILE : (tile + 1) * TILE])
