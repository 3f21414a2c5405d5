"""CPU kernels: Philox4x32-10, Gumbel noise, and the argmax over noisy logits (see `rng.py` for the definitions)."""

# M rows, V vocabulary, C chunks of a row

from __future__ import annotations

from typing import Any

import numpy as np
from numba import prange

from sempre.kernels.intrinsics import fma, inlined
from sempre.kernels.jit import compiled
from sempre.kernels.sampling.elementary import divided, log32, minus_log1m32
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
)

# ids per unit of parallel work; a multiple of TILE, does not affect the result
CHUNK = 8192

_MINUS_INFINITY = np.float32(-np.inf)
_INFINITY = np.float32(np.inf)
_ZERO = np.float32(0.0)
_LOW_32 = np.uint64(0xFFFFFFFF)
_SHIFT_32 = np.uint64(32)


@inlined
def philox(c0: Any, c1: Any, c2: Any, c3: Any, k0: Any, k1: Any) -> Any:
    """Philox4x32-10 of one counter: four uint32 words."""
    for _ in range(ROUNDS):
        product_0 = np.uint64(c0) * np.uint64(MULTIPLIER_0)
        product_1 = np.uint64(c2) * np.uint64(MULTIPLIER_1)
        c0 = np.uint32(np.uint32(product_1 >> _SHIFT_32) ^ c1 ^ k0)
        c1 = np.uint32(product_1 & _LOW_32)
        c2 = np.uint32(np.uint32(product_0 >> _SHIFT_32) ^ c3 ^ k1)
        c3 = np.uint32(product_0 & _LOW_32)
        k0 = np.uint32(k0 + WEYL_0)
        k1 = np.uint32(k1 + WEYL_1)
    return c0, c1, c2, c3


@inlined
def gumbel(word: Any) -> Any:
    """The Gumbel variate of one uint32 word (float32, finite)."""
    u = fma(np.float32(word), UNIT, HALF_UNIT)
    w = fma(np.float32(np.uint32(~word)), UNIT, HALF_UNIT)
    near_zero = minus_log1m32(u)
    elsewhere = -log32(w)
    return -log32(near_zero if u < QUARTER else elsewhere)


@inlined
def fill_words(words: Any, tile: Any, position: Any, key_0: Any, key_1: Any) -> None:
    """The 64 words of the ids [64 * tile, 64 * tile + 64)."""
    for lane in range(TILE // 4):
        counter = np.uint32(tile * (TILE // 4) + lane)
        w0, w1, w2, w3 = philox(counter, position, np.uint32(0), np.uint32(0), key_0, key_1)
        words[lane] = w0
        words[TILE // 4 + lane] = w1
        words[2 * (TILE // 4) + lane] = w2
        words[3 * (TILE // 4) + lane] = w3


@compiled()
def gumbel_noise(seed: Any, position: Any, noise: Any) -> None:
    """Fill noise (float32 [V], V a multiple of 64) with the noise of ids 0 … V-1."""
    words = np.empty(TILE, np.uint32)
    key_0, key_1 = np.uint32(seed & _LOW_32), np.uint32(seed >> _SHIFT_32)
    for tile in range(noise.size // TILE):
        fill_words(words, tile, np.uint32(position), key_0, key_1)
        out = noise[tile * TILE : tile * TILE + TILE]
        for lane in range(TILE):
            out[lane] = gumbel(words[lane])


@inlined
def _keep_best(value: Any, tile: Any, lane: Any, best: Any, best_tile: Any) -> None:
    """NaN and +inf win every comparison as +inf, so that the caller sees them."""
    value = value if value < _INFINITY else _INFINITY
    better = value > best[lane]
    best[lane] = value if better else best[lane]
    best_tile[lane] = np.int32(tile) if better else best_tile[lane]


@compiled()
def _best_of_chunk(logits: Any, first: Any, temperature: Any, seed: Any, position: Any) -> Any:
    """(value, id) of the greatest temperature-scaled, noisy logit of logits[first : first + CHUNK]."""
    vocabulary = logits.size
    key_0, key_1 = np.uint32(seed & _LOW_32), np.uint32(seed >> _SHIFT_32)
    words = np.empty(TILE, np.uint32)
    padded, best = np.empty(TILE, np.float32), np.empty(TILE, np.float32)
    best_tile = np.zeros(TILE, np.int32)
    for lane in range(TILE):
        best[lane] = _MINUS_INFINITY
    for tile in range(first // TILE, (min(first + CHUNK, vocabulary) + TILE - 1) // TILE):
        start = tile * TILE
        x = logits[start : start + TILE]
        if x.size < TILE:
            for lane in range(TILE):
                padded[lane] = x[lane] if lane < x.size else _MINUS_INFINITY
            x = padded
        if temperature == _ZERO:
            for lane in range(TILE):
                _keep_best(x[lane], tile, lane, best, best_tile)
            continue
        allowed = 0
        for lane in range(TILE):
            allowed |= x[lane] != _MINUS_INFINITY
        if allowed:
            fill_words(words, tile, position, key_0, key_1)
            for lane in range(TILE):
                _keep_best(divided(x[lane], temperature) + gumbel(words[lane]), tile, lane, best, best_tile)
    value, token_id = best[0], best_tile[0] * TILE
    for lane in range(1, TILE):
        candidate = best_tile[lane] * TILE + lane
        if best[lane] > value or (best[lane] == value and candidate < token_id):
            value, token_id = best[lane], candidate
    return value, token_id


@compiled(parallel=True)
def best_of_chunks(logits: Any, temperature: Any, seeds: Any, positions: Any, best_value: Any, best_id: Any) -> None:
    """Fill best_value (float32) and best_id (int32), both [M, C], from logits [M, V]; one work item per entry."""
    rows, chunks = best_value.shape
    for item in prange(rows * chunks):
        row, chunk = item // chunks, item % chunks
        value, token_id = _best_of_chunk(
            logits[row], chunk * CHUNK, temperature[row], seeds[row], np.uint32(positions[row])
        )
        best_value[row, chunk] = value
        best_id[row, chunk] = token_id
