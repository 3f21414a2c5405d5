"""The noise of sampling: a pure function of (seed, position, vocabulary id). Definitions, and their numpy reference.

Words. Philox4x32-10 (Salmon, Moraes, Dror, Shaw 2011, "Parallel random numbers: as easy as 1, 2, 3") with

    key     = (seed mod 2**32, seed >> 32)
    counter = (c0, position, 0, 0)

gives four 32-bit words. The vocabulary is cut into tiles of 64 ids; 16 consecutive counters serve a tile:

    id v  <->  c0 = (v >> 6) * 16 + (v & 15),  output word number (v >> 4) & 3

so word number w of the counters of a tile holds the run of 16 ids [64 t + 16 w, 64 t + 16 w + 16), and 16 lanes
compute a tile without moving data between lanes. `position` is the absolute index, in the sequence, of the token
that is sampled.

Gumbel variate g of a word x, all in float32, `fma` is one rounding:

    u = fma(x, 2**-32, 2**-33)                    # (x + 1/2) / 2**32
    w = fma(2**32 - 1 - x, 2**-32, 2**-33)        # 1 - u, from the integer: exact relative precision near 0
    E = minus_log1m32(u)  if u < 1/4  else  -log32(w)
    g = -log32(E)

E, an exponential variate, is at least 2**-33, so g is finite: -3.14 <= g <= 22.88. A small u is resolved by its
own 2**-32 steps, which makes the upper tail of g, the one that decides an argmax, fine. Greatest errors against
float64 over 2**24 words: E 2.4 ulp; g 2.3 ulp where |g| >= 1, 2.1e-7 elsewhere.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Uint32Array = npt.NDArray[np.uint32]
Float32Array = npt.NDArray[np.float32]

ROUNDS = 10
MULTIPLIER_0, MULTIPLIER_1 = np.uint32(0xD2511F53), np.uint32(0xCD9E8D57)
WEYL_0, WEYL_1 = np.uint32(0x9E3779B9), np.uint32(0xBB67AE85)

TILE = 64
UNIT, HALF_UNIT = np.float32(2.0**-32), np.float32(2.0**-33)
QUARTER = np.float32(0.25)


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
