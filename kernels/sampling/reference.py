"""The sampling operations in plain numpy, for tests.

Two kinds: the elementary functions restated operation by operation, equal to the kernels bit for bit; and truncation,
penalties and log-probabilities in float64 by full sorts, which say what the kernels mean.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from sempre.kernels.sampling.coefficients import (
    EXP,
    EXP_LOWEST,
    LN2_HIGH,
    LN2_LOW,
    LOG,
    LOG1P,
    LOG2_E,
    MANTISSA_MASK,
    ROUND_MAGIC,
    SQRT_HALF_BITS,
)
from sempre.kernels.sampling.rng import HALF_UNIT, QUARTER, UNIT, Float32Array, Uint32Array, noise_words

Float64Array = npt.NDArray[np.float64]
BoolArray = npt.NDArray[np.bool_]


def fma(a: Any, b: Any, c: Any) -> Float32Array:
    """float32 a * b + c with one rounding: a float64 sum rounded to odd, which survives the second rounding."""
    product = np.asarray(a, np.float64) * np.asarray(b, np.float64)  # exact: 48 of 53 bits
    addend = np.asarray(c, np.float64)
    total = product + addend
    virtual = total - product
    error = (product - (total - virtual)) + (addend - virtual)
    is_even = (total.view(np.int64) & 1) == 0
    towards_error = np.nextafter(total, np.where(error > 0, np.inf, -np.inf))
    odd = np.where((error != 0) & is_even, towards_error, total)
    return odd.astype(np.float32)


def horner(coefficients: tuple[np.float32, ...], x: Float32Array) -> Float32Array:
    """The polynomial with these coefficients, lowest first, by fused multiply-adds."""
    value = np.full_like(x, coefficients[-1])
    for coefficient in reversed(coefficients[:-1]):
        value = fma(value, x, coefficient)
    return value


def exp32(x: Float32Array) -> Float32Array:
    """`elementary.exp32`."""
    safe = np.maximum(x, EXP_LOWEST)
    shifted = fma(safe, LOG2_E, ROUND_MAGIC)
    n = shifted - ROUND_MAGIC
    r = fma(n, -LN2_LOW, fma(n, -LN2_HIGH, safe))
    p = fma(r * r, horner(EXP, r), r) + np.float32(1)
    bits = p.view(np.uint32) + (shifted.view(np.uint32) << np.uint32(23))
    return np.where(x >= EXP_LOWEST, bits.view(np.float32), np.float32(0))


def log32(x: Float32Array) -> Float32Array:
    """`elementary.log32`."""
    offset = x.view(np.uint32) - SQRT_HALF_BITS
    exponent = (offset.view(np.int32) >> 23).astype(np.float32)
    f = ((offset & MANTISSA_MASK) + SQRT_HALF_BITS).view(np.float32) - np.float32(1)
    square = f * f
    y = (f * square) * horner(LOG, f)
    y = fma(exponent, LN2_LOW, y)
    y = fma(np.float32(-0.5), square, y)
    return fma(exponent, LN2_HIGH, f + y)


def exponential(words: Uint32Array) -> Float32Array:
    """The exponential variate E of `rng.py`."""
    u = fma(words.astype(np.float32), UNIT, HALF_UNIT)
    w = fma((~words).astype(np.float32), UNIT, HALF_UNIT)
    near_zero = fma(u * u, horner(LOG1P, u), u)
    return np.where(u < QUARTER, near_zero, -log32(w))


def gumbel(words: Uint32Array) -> Float32Array:
    """The Gumbel variate g of `rng.py`."""
    return -log32(exponential(words))


def gumbel_noise(seed: int, position: int, vocab_size: int) -> Float32Array:
    """The noise of ids 0 … vocab_size - 1."""
    return gumbel(noise_words(seed, position, vocab_size))


def truncated(x: Float32Array, *, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0) -> BoolArray:
    """Which tokens survive, by a full sort and float64 probabilities; x are the logits divided by the temperature."""
    order = np.lexsort((np.arange(x.size), -x.astype(np.float64)))
    probability = np.exp(x[order].astype(np.float64) - float(x.max()))
    count = int(np.isfinite(x).sum())
    if min_p > 0:
        count = int((probability[:count] >= min_p).sum())
    if top_k > 0:
        count = min(count, top_k)
    if top_p < 1.0:
        cumulative = np.cumsum(probability[:count])
        count = min(count, int(np.searchsorted(cumulative, top_p * cumulative[-1])) + 1)
    keep = np.zeros(x.size, np.bool_)
    keep[order[: max(count, 1)]] = True
    return keep


def log_softmax(x: Float32Array) -> Float64Array:
    """log_softmax of one row in float64."""
    wide = x.astype(np.float64)
    shifted: Float64Array = wide - wide.max()
    log_sum: np.float64 = np.log(np.exp(shifted).sum())
    return shifted - log_sum


def penalised(
    x: Float32Array, prompt: list[int], output: list[int], *, repetition: float, frequency: float, presence: float
) -> Float64Array:
    """Penalties token by token in float64."""
    y = x.astype(np.float64)
    for token in {*prompt, *output}:
        y[token] = y[token] / repetition if y[token] > 0 else y[token] * repetition
        y[token] -= frequency * output.count(token)
        y[token] -= presence if token in output else 0.0
    return y


def sample(x: Float32Array, seed: int, position: int, keep: BoolArray) -> int:
    """argmax over the kept tokens of x + noise, float32, the lowest id among equals."""
    return int(np.argmax(np.where(keep, x + gumbel_noise(seed, position, x.size), np.float32(-np.inf))))
