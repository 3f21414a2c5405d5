"""The noise of sampling: a pure function of (seed, position, vocabulary id). Its definition.

Words. Philox4x32-10 (Salmon, Moraes, Dror, Shaw 2011, "Parallel random numbers: as easy as 1, 2, 3") with

    key     = (seed mod 2**32, seed >> 32)
    counter = (c0, position, 0, 0)

gives four 32-bit words. The vocabulary is divided into tiles of 64 ids; 16 consecutive counters serve a tile:

    id v  <->  c0 = (v >> 6) * 16 + (v & 15),  output word number (v >> 4) & 3

so word number w of the counters of a tile holds the run of 16 ids [64 t + 16 w, 64 t + 16 w + 16), and 16 lanes
compute a tile without moving data between lanes. `position` is the absolute index, in the sequence, of the sampled
token.

Gumbel variate g of a word x, all in float32, `fma` is one rounding:

    u = fma(x, 2**-32, 2**-33)                    # (x + 1/2) / 2**32
    w = fma(2**32 - 1 - x, 2**-32, 2**-33)        # 1 - u, from the integer: exact relative precision near 0
    E = minus_log1m32(u)  if u < 1/4  else  -log32(w)
    g = -log32(E)

E, an exponential variate, is at least 2**-33, so g is finite: -3.14 <= g <= 22.88. A small u is resolved by its
own 2**-32 steps, which makes the upper tail of g, the one that decides an argmax, fine. Largest errors against float64
over 2**24 words: E 2.4 ulp; g 2.3 ulp where |g| >= 1, 2.1e-7 elsewhere.
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
