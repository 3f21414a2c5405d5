"""Triton building blocks: the float functions of `elementary.py`, the noise of `rng.py`, order keys and masses.

Equal to the CPU kernels bit for bit: the same IEEE operations in the same order, fused exactly where `tl.fma` is
written. Every kernel that calls them is launched with `enable_fp_fusion=False`.
"""

from __future__ import annotations

from typing import Any

import triton.language as tl

from sempre.kernels.gpu_jit import jit
from sempre.kernels.sampling import coefficients, rng

_E0, _E1, _E2, _E3, _E4 = (tl.constexpr(float(value)) for value in coefficients.EXP)
_L0, _L1, _L2, _L3, _L4, _L5, _L6, _L7 = (tl.constexpr(float(value)) for value in coefficients.LOG)
_U0, _U1, _U2, _U3, _U4, _U5 = (tl.constexpr(float(value)) for value in coefficients.LOG1P)
_LN2_HIGH = tl.constexpr(float(coefficients.LN2_HIGH))
_LN2_LOW = tl.constexpr(float(coefficients.LN2_LOW))
_MINUS_LN2_HIGH = tl.constexpr(-float(coefficients.LN2_HIGH))
_MINUS_LN2_LOW = tl.constexpr(-float(coefficients.LN2_LOW))
_LOG2_E = tl.constexpr(float(coefficients.LOG2_E))
_ROUND_MAGIC = tl.constexpr(float(coefficients.ROUND_MAGIC))
_EXP_LOWEST = tl.constexpr(float(coefficients.EXP_LOWEST))
_SQRT_HALF_BITS = tl.constexpr(int(coefficients.SQRT_HALF_BITS))
_MANTISSA_MASK = tl.constexpr(int(coefficients.MANTISSA_MASK))
_MASS_ONE = tl.constexpr(2.0**40)
_MASS_UNIT = tl.constexpr(2.0**-40)

_ROUNDS = tl.constexpr(rng.ROUNDS)
_MULTIPLIER_0, _MULTIPLIER_1 = tl.constexpr(int(rng.MULTIPLIER_0)), tl.constexpr(int(rng.MULTIPLIER_1))
_WEYL_0, _WEYL_1 = tl.constexpr(int(rng.WEYL_0)), tl.constexpr(int(rng.WEYL_1))
_UNIT, _HALF_UNIT = tl.constexpr(float(rng.UNIT)), tl.constexpr(float(rng.HALF_UNIT))
_QUARTER = tl.constexpr(float(rng.QUARTER))
_LARGEST = tl.constexpr((2.0 - 2.0**-23) * 2.0**127)
_ALL_BITS = tl.constexpr(0xFFFFFFFF)
# as a float, an integer n below 2**22 in magnitude has the bits of 1.5 * 2**23, plus n
_INTEGER_BITS = tl.constexpr(0x4B400000)

KEY_PADDING = tl.constexpr(-(2**31))
KEY_OF_MINUS_INFINITY = tl.constexpr(-2139095041)
_KEY_MASK = tl.constexpr(0x7FFFFFFF)


@jit()
def fused(a: Any, b: Any, c: Any) -> Any:
    """float32 a * b + c with one rounding; b and c may be constants."""
    return tl.fma(a, tl.zeros_like(a) + b, tl.zeros_like(a) + c)


@jit()
def exp32(x: Any) -> Any:
    """`elementary.exp32`."""
    shifted = fused(x, _LOG2_E, _ROUND_MAGIC)
    n = shifted - _ROUND_MAGIC
    r = fused(n, _MINUS_LN2_HIGH, x)
    r = fused(n, _MINUS_LN2_LOW, r)
    p = fused(fused(fused(fused(r, _E4, _E3), r, _E2), r, _E1), r, _E0)
    p = fused(r * r, p, r) + 1.0
    bits = p.to(tl.uint32, bitcast=True) + (shifted.to(tl.uint32, bitcast=True) << 23)
    return tl.where(x >= _EXP_LOWEST, bits.to(tl.float32, bitcast=True), 0.0)


@jit()
def log32(x: Any) -> Any:
    """`elementary.log32`."""
    offset = x.to(tl.uint32, bitcast=True) - _SQRT_HALF_BITS
    exponent_bits = (offset.to(tl.int32, bitcast=True) >> 23) + _INTEGER_BITS
    exponent = exponent_bits.to(tl.float32, bitcast=True) - _ROUND_MAGIC  # exact
    f = ((offset & _MANTISSA_MASK) + _SQRT_HALF_BITS).to(tl.float32, bitcast=True) - 1.0
    p = fused(fused(fused(fused(f, _L7, _L6), f, _L5), f, _L4), f, _L3)
    p = fused(fused(fused(p, f, _L2), f, _L1), f, _L0)
    square = f * f
    y = (f * square) * p
    y = fused(exponent, _LN2_LOW, y)
    y = fused(square, -0.5, y)
    return fused(exponent, _LN2_HIGH, f + y)


@jit()
def saturated(y: Any, x: Any) -> Any:
    """y, the changed x, kept finite if x is finite: beyond float32 it is the largest number."""
    return tl.where(tl.abs(x) < float("inf"), tl.minimum(tl.maximum(y, -_LARGEST), _LARGEST), y)


@jit()
def divided(x: Any, temperature: Any) -> Any:
    """`elementary.divided`."""
    return saturated(tl.div_rn(x, temperature), x)


@jit()
def minus_log1m32(u: Any) -> Any:
    """`elementary.minus_log1m32`."""
    p = fused(fused(fused(fused(fused(u, _U5, _U4), u, _U3), u, _U2), u, _U1), u, _U0)
    return fused(u * u, p, u)


@jit()
def sigmoid32(x: Any) -> Any:
    """`elementary.sigmoid32`."""
    smaller = exp32(-tl.abs(x))
    value = tl.div_rn(tl.where(x >= 0.0, 1.0, smaller), 1.0 + smaller)
    return tl.where(x == x, value, float("nan"))


@jit()
def softplus32(x: Any) -> Any:
    """`elementary.softplus32`."""
    u = exp32(-tl.abs(x))
    rounded = u + 1.0
    y = tl.where(x > 0.0, x, 0.0) + (log32(rounded) + tl.div_rn(u - (rounded - 1.0), rounded))
    return tl.where(x == x, y, float("nan"))


@jit()
def philox(c0: Any, position: Any, k0: Any, k1: Any) -> Any:
    """Four uint32 words of the counters (c0, position, 0, 0)."""
    c1 = tl.zeros_like(c0) + position
    c2 = tl.zeros_like(c0)
    c3 = tl.zeros_like(c0)
    for _ in tl.static_range(_ROUNDS):
        high_0, low_0 = tl.umulhi(c0, tl.zeros_like(c0) + _MULTIPLIER_0), c0 * _MULTIPLIER_0
        high_1, low_1 = tl.umulhi(c2, tl.zeros_like(c2) + _MULTIPLIER_1), c2 * _MULTIPLIER_1
        c0 = high_1 ^ c1 ^ k0
        c1 = low_1
        c2 = high_0 ^ c3 ^ k1
        c3 = low_0
        k0 = k0 + _WEYL_0
        k1 = k1 + _WEYL_1
    return c0, c1, c2, c3


@jit()
def gumbel(word: Any) -> Any:
    """The Gumbel variate of uint32 words (float32, finite)."""
    u = fused(word.to(tl.float32), _UNIT, _HALF_UNIT)
    w = fused((word ^ _ALL_BITS).to(tl.float32), _UNIT, _HALF_UNIT)
    return -log32(tl.where(u < _QUARTER, minus_log1m32(u), -log32(w)))


@jit()
def order_key(x: Any) -> Any:
    """int32 with the order of the float32 x; both zeros have one key. `key_value` is its inverse."""
    bits = (x + 0.0).to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & _KEY_MASK)


@jit()
def key_value(key: Any) -> Any:
    """The float32 with this order key (int32)."""
    return (key ^ ((key >> 31) & _KEY_MASK)).to(tl.float32, bitcast=True)


@jit()
def mass(difference: Any) -> Any:
    """floor(exp(difference) * 2**40) as int64, for a logit's difference to the greatest one (<= 0)."""
    return (exp32(difference) * _MASS_ONE).to(tl.int64)


@jit()
def log_of_mass(total: Any) -> Any:
    """log(total * 2**-40) of an int64 sum of masses, float32."""
    return log32(total.to(tl.float32) * _MASS_UNIT)


@jit()
def error_visible(x: Any) -> Any:
    """x, with NaN made +inf, so that a maximum shows it."""
    return tl.where(x < float("inf"), x, float("inf"))


@jit()
def load_logits(logits: Any, edited: Any, is_edited: Any, ids: Any, vocabulary: Any, EDITS: tl.constexpr) -> Any:
    """float32 logits of one row, from `edited` if it holds this row; -inf beyond the vocabulary."""
    if EDITS:
        # a load without lanes moves no data
        raw = tl.load(logits + ids, mask=ids < tl.where(is_edited != 0, 0, vocabulary), other=float("-inf"))
        new = tl.load(edited + ids, mask=ids < tl.where(is_edited != 0, vocabulary, 0), other=float("-inf"))
        x = tl.where(is_edited != 0, new, raw.to(tl.float32))
    else:
        x = tl.load(logits + ids, mask=ids < vocabulary, other=float("-inf")).to(tl.float32)
    return x
