"""The sampling operations in plain numpy.

Two kinds: the elementary functions restated operation by operation, equal to the kernels bit for bit; and truncation,
penalties and log-probabilities in float64 by full sorts, which say what the kernels mean.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from sempre.kernels.sampling.coefficients import (
    EXP,
    EXP_LOWEST,
    LN2_HIGH,
    LN2_LOW,
    LOG1P,
    LOG2_E,
    ROUND_MAGIC,
    fma,
    horner,
    log32,
)
from sempre.kernels.sampling.rng import (
    HALF_UNIT,
    MULTIPLIER_0,
    MULTIPLIER_1,
    QUARTER,
    ROUNDS,
    TILE,
    UNIT,
    WEYL_0,
    WEYL_1,
    Float32Array,
    Uint32Array,
)

Float64Array = npt.NDArray[np.float64]
BoolArray = npt.NDArray[np.bool_]


def philox4x32(
    counter: tuple[Uint32Array, Uint32Array, Uint32Array, Uint32Array], key: tuple[int, int]
) -> tuple[Uint32Array, Uint32Array, Uint32Array, Uint32Array]:
    """Philox4x32-10 of arrays of counters (uint32, one shape) under one key: four words each."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    low = np.uint64(0xFFFFFFFF)
    for _ in range(ROUNDS):
        product_0 = c0.astype(np.uint64) * np.uint64(MULTIPLIER_0)
        product_1 = c2.astype(np.uint64) * np.uint64(MULTIPLIER_1)
        high_0, low_0 = (product_0 >> np.uint64(32)).astype(np.uint32), (product_0 & low).astype(np.uint32)
        high_1, low_1 = (product_1 >> np.uint64(32)).astype(np.uint32), (product_1 & low).astype(np.uint32)
        c0, c1, c2, c3 = high_1 ^ c1 ^ np.uint32(k0), low_1, high_0 ^ c3 ^ np.uint32(k1), low_0
        k0, k1 = (k0 + int(WEYL_0)) & 0xFFFFFFFF, (k1 + int(WEYL_1)) & 0xFFFFFFFF
    return c0, c1, c2, c3


def noise_words(seed: int, position: int, vocab_size: int) -> Uint32Array:
    """The words of ids 0 … vocab_size - 1, uint32 [vocab_size]."""
    num_tiles = -(-vocab_size // TILE)
    c0 = np.arange(num_tiles * TILE // 4, dtype=np.uint32)
    zero = np.zeros_like(c0)
    words = philox4x32((c0, np.full_like(c0, position), zero, zero), (seed & 0xFFFFFFFF, seed >> 32))
    tiles = np.stack([word.reshape(num_tiles, TILE // 4) for word in words], axis=1)  # [tile, word number, lane]
    return tiles.reshape(-1)[:vocab_size]


def exp32(x: Float32Array) -> Float32Array:
    """`elementary.exp32`."""
    safe = np.maximum(x, EXP_LOWEST)
    shifted = fma(safe, LOG2_E, ROUND_MAGIC)
    n = shifted - ROUND_MAGIC
    r = fma(n, -LN2_LOW, fma(n, -LN2_HIGH, safe))
    p = fma(r * r, horner(EXP, r), r) + np.float32(1)
    bits = p.view(np.uint32) + (shifted.view(np.uint32) << np.uint32(23))
    return np.where(x >= EXP_LOWEST, bits.view(np.float32), np.float32(0))


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
