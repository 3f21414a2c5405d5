"""The float32 constants of exp and log, for every implementation of them, and log itself in plain numpy."""

from __future__ import annotations

from typing import Any

import numpy as np

from sempre.kernels.sampling.rng import Float32Array


def _float32(*hexadecimal: str) -> tuple[np.float32, ...]:
    return tuple(np.float32(float.fromhex(text)) for text in hexadecimal)


# e**r = 1 + r + r**2 * (EXP[0] + EXP[1] r + …) on |r| <= log(2)/2, relative error of the polynomial 2**-28
EXP = _float32("0x1.0000000p-1", "0x1.55548ep-3", "0x1.55545ep-5", "0x1.123b4ap-7", "0x1.6db414p-10")
# log(1+f) = f - f**2/2 + f**3 * (LOG[0] + LOG[1] f + …) on [sqrt(1/2)-1, sqrt(2)-1], relative error 2**-27
LOG = _float32(
    "0x1.55554ap-2",
    "-0x1.000220p-2",
    "0x1.99a596p-3",
    "-0x1.54788ap-3",
    "0x1.226e50p-3",
    "-0x1.0ce08ep-3",
    "0x1.07d0ccp-3",
    "-0x1.41ed50p-4",
)
# -log(1-u) = u + u**2 * (LOG1P[0] + LOG1P[1] u + …) on [0, 1/4], relative error 2**-28
LOG1P = _float32("0x1.ffffd4p-2", "0x1.556224p-2", "0x1.fd8496p-3", "0x1.b58658p-3", "0x1.765fe0p-4", "0x1.53a84ap-2")
# log(2) in two parts: the first has 10 trailing zero bits, so that multiplying it by an exponent is exact
LN2_HIGH, LN2_LOW = _float32("0x1.62e400p-1", "0x1.7f7d1cp-20")
LOG2_E = np.float32(1.4426950408889634)
# adding it rounds to an integer, which is then in the low bits
ROUND_MAGIC = np.float32(1.5 * 2**23)
# below it exp32 is 0: its result would be subnormal
EXP_LOWEST = np.float32(-87.0)
SQRT_HALF_BITS = np.uint32(0x3F3504F3)
MANTISSA_MASK = np.uint32(0x007FFFFF)


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
