"""exp, log and the Gumbel noise: bits equal to the numpy reference, error bounds against float64, distribution."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import numpy as np
import numpy.typing as npt
import sampling_reference as reference
from numba import njit
from scipy import stats

from sempre.kernels.sampling import elementary, noise

Float64Array = npt.NDArray[np.float64]


@njit
def _elementwise(words: Any, negative: Any, positive: Any, out: Any) -> None:
    for i in range(words.size):
        out[0, i] = noise.gumbel(words[i])
        out[1, i] = elementary.exp32(negative[i])
        out[2, i] = elementary.log32(positive[i])


def _words() -> npt.NDArray[np.uint32]:
    """All magnitudes of u and of 1 - u, and both ends."""
    generator = np.random.default_rng(0)
    words = generator.integers(0, 2**32, 1 << 18, dtype=np.uint32)
    small = words >> generator.integers(0, 32, words.size, dtype=np.uint32)
    ends = np.array([0, 1, 2, 2**30 - 1, 2**30, 2**31, 2**32 - 2, 2**32 - 1], np.uint32)
    return np.concatenate([ends, words, small, ~small])


def _ulps(found: npt.NDArray[np.float32], exact: Float64Array) -> Float64Array:
    spacing = np.spacing(np.abs(exact).astype(np.float32)).astype(np.float64)
    error: Float64Array = np.abs(found.astype(np.float64) - exact) / spacing
    return error


def test_kernels_equal_the_reference_bit_for_bit() -> None:
    words = _words()
    generator = np.random.default_rng(1)
    negative = -(generator.random(words.size) * 100 * 10.0 ** -generator.integers(0, 9, words.size)).astype(np.float32)
    negative[:4] = [0.0, -0.0, -np.inf, -87.0]
    positive = np.exp2(generator.uniform(-64, 64, words.size)).astype(np.float32)
    positive[:2] = [1.0, 2.0]
    out = np.empty((3, words.size), np.float32)
    _elementwise(words, negative, positive, out)
    expected = np.stack([reference.gumbel(words), reference.exp32(negative), reference.log32(positive)])
    assert np.array_equal(out.view(np.uint32), expected.view(np.uint32))


def test_noise_of_a_vocabulary_equals_the_reference() -> None:
    for seed, position in [(0, 0), (2**64 - 1, 2**32 - 1), (3 << 32, 17)]:
        found = np.empty(4096, np.float32)
        noise.gumbel_noise(np.uint64(seed), np.int64(position), found)
        expected = reference.gumbel_noise(seed, position, found.size)
        assert np.array_equal(found.view(np.uint32), expected.view(np.uint32))


def test_reference_fma_rounds_once() -> None:
    # 1 + 2**-24 + 2**-60 is just above the midpoint of two float32 numbers: rounding twice would lose the last part
    a = np.float32(1.0 + 2.0**-12)
    cases = [(a, a, np.float32(2.0**-60)), (a, -a, np.float32(1.0)), (np.float32(2.0**-30), a, np.float32(1.0))]
    for x, y, z in cases:
        exact = Fraction(float(x)) * Fraction(float(y)) + Fraction(float(z))
        found = reference.fma(np.array([x]), y, z)[0]
        neighbours = (np.nextafter(found, np.float32(-np.inf)), np.nextafter(found, np.float32(np.inf)))
        distance = abs(Fraction(float(found)) - exact)
        assert all(distance <= abs(Fraction(float(other)) - exact) for other in neighbours)


def test_errors_against_float64() -> None:
    words = _words()
    exact_exponential = -np.log1p(-(words.astype(np.float64) + 0.5) * 2.0**-32)
    assert _ulps(reference.exponential(words), exact_exponential).max() < 2.5
    found, exact = reference.gumbel(words), -np.log(exact_exponential)
    far = np.abs(exact) >= 1
    assert _ulps(found[far], exact[far]).max() < 2.5
    assert np.abs(found[~far] - exact[~far]).max() < 2.2e-7

    generator = np.random.default_rng(2)
    x = generator.uniform(-87, 0, 1 << 18).astype(np.float32)
    assert _ulps(reference.exp32(x), np.exp(x.astype(np.float64))).max() < 1.1
    y = np.concatenate([np.exp2(generator.uniform(-64, 64, 1 << 18)), generator.uniform(0.5, 2, 1 << 18)])
    y32 = y.astype(np.float32)
    y32 = y32[y32 != 1]
    assert _ulps(reference.log32(y32), np.log(y32.astype(np.float64))).max() < 1.0
    assert reference.log32(np.ones(1, np.float32))[0] == 0.0


def test_noise_is_finite_and_decreases_with_the_word() -> None:
    words = np.sort(_words())
    found = reference.gumbel(words)
    assert np.isfinite(found).all()
    assert -3.14 < found.min() < -3.12
    assert 22.87 < found.max() < 22.88
    assert (np.diff(found.astype(np.float64)) <= 4e-7).all()


def test_noise_has_the_gumbel_distribution_over_each_coordinate() -> None:
    over_ids = reference.gumbel_noise(11, 5, 50_000)
    over_positions = np.array([reference.gumbel_noise(11, position, 64)[0] for position in range(1500)])
    over_seeds = np.array([reference.gumbel_noise(seed << 20, 5, 64)[33] for seed in range(1500)])
    for sample in (over_ids, over_positions, over_seeds):
        assert stats.kstest(sample, "gumbel_r").pvalue > 1e-3
    # control: the test notices a scale that is 5 % off
    assert stats.kstest(over_ids * np.float32(1.05), "gumbel_r").pvalue < 1e-6
