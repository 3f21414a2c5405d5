"""Numbers of a packed weight in registers: eight of 4 bits, or four of 8 bits, of each word. N out, K in.

Each step is one of IEEE 754's on the dtype it names, so the instructions of a GPU and the plain operations of the
interpreter give equal bits. The instructions work on two numbers at a time.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from sempre.kernels.gpu_jit import jit
from sempre.kernels.packed import PackedScheme, PackedWeight

INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))

_INT4 = PackedScheme.INT4, 8
_SHORT = {torch.float16: "f16", torch.bfloat16: "bf16"}


def _converted(source: str, target: str) -> str:
    """Two numbers in `a`, rounded to nearest even."""
    if source == target:
        return ""
    if source == "f16":
        widened = "mov.b32 {l, h}, a; cvt.f32.f16 f, l; cvt.f32.f16 g, h;"
    else:
        widened = "shl.b32 m, a, 16; mov.b32 f, m; and.b32 m, a, 0xffff0000; mov.b32 g, m;"
    return f"{widened} cvt.rn.{target}x2.f32 a, g, f;"


def _assembly(numbers: int, steps: list[str]) -> str:
    """`steps` each leave two numbers in `a`; operand $numbers is the word `w`, the next the pair of scale and zero."""
    stored = [f"{step} mov.b32 {{${2 * i}, ${2 * i + 1}}}, a;" for i, step in enumerate(steps)]
    return "\n".join(
        [
            "{ .reg .b32 a, m, w, s, z, y; .reg .b16 l, h; .reg .f32 f, g;",
            f"mov.b32 w, ${numbers}; prmt.b32 s, ${numbers + 1}, 0, 0x1010; prmt.b32 z, ${numbers + 1}, 0, 0x3232;",
            *stored,
            "}",
        ]
    )


def _int4(scale: str, target: str) -> str:
    finish = f"mul.rn.{scale}x2 a, a, s; {_converted(scale, target)}"
    if scale == "bf16":
        # 128 + code, as 128.0 has room for one
        shifted = ["mov.b32 m, w;", *(f"shr.u32 m, w, {4 * place};" for place in range(1, 4))]
        near = "lop3.b32 a, m, 0x000f000f, 0x43004300, 0xea; sub.rn.bf16x2 a, a, z;"
        return _assembly(8, [f"{shift} {near} {finish}" for shift in shifted])
    # 1024 + code and 1024 + 16 code; the latter is divided by 16 while 64 + zero is subtracted
    low = "lop3.b32 a, w, 0x000f000f, 0x64006400, 0xea; sub.rn.f16x2 a, a, z;"
    high = "lop3.b32 a, w, 0x00f000f0, 0x64006400, 0xea; fma.rn.f16x2 a, a, m, y;"
    folded = "mov.b32 y, 0x63806380; sub.rn.f16x2 y, y, z;"
    sixteenth = "mov.b32 m, 0x2c002c00;"
    first = [f"{low} {finish}", f"{folded} {sixteenth} {high} {finish}"]
    return _assembly(8, [*first, f"shr.u32 w, w, 8; {first[0]}", f"{sixteenth} {high} {finish}"])


def _int8(scale: str, target: str) -> str:
    near = "lop3.b32 a, w, 0x00ff00ff, 0x64006400, 0xea; sub.rn.f16x2 a, a, z;"
    # a difference of bytes is exact in either dtype
    step = f"{near} {_converted('f16', scale)} mul.rn.{scale}x2 a, a, s; {_converted(scale, target)}"
    return _assembly(4, [step, f"shr.u32 w, w, 8; {step}"])


def _mxfp4() -> str:
    # sign, and exponent and mantissa where bfloat16 has them: the number times 2 ** -126
    step = "and.b32 a, m, 0x80008000; shr.u32 m, m, 6; lop3.b32 a, m, 0x01c001c0, a, 0xea; mul.rn.bf16x2 a, a, s;"
    shifts = [f"shl.b32 m, w, {12 - 4 * place};" for place in range(3)]
    return _assembly(8, [f"{shift} {step}" for shift in (*shifts, "mov.b32 m, w;")])


INT4_F16_F16, INT4_F16_BF16 = (tl.constexpr(_int4("f16", target)) for target in ("f16", "bf16"))
INT4_BF16_F16, INT4_BF16_BF16 = (tl.constexpr(_int4("bf16", target)) for target in ("f16", "bf16"))
INT8_F16_F16, INT8_F16_BF16 = (tl.constexpr(_int8("f16", target)) for target in ("f16", "bf16"))
INT8_BF16_F16, INT8_BF16_BF16 = (tl.constexpr(_int8("bf16", target)) for target in ("f16", "bf16"))
MXFP4 = tl.constexpr(_mxfp4())


def kind_of(w: PackedWeight) -> str:
    """The numbers, the dtype of scales, and that of the matrix, as the kernels name them."""
    name = w.scheme.name.lower()
    return name if w.scheme is PackedScheme.MXFP4 else f"{name}_{_SHORT[w.scale_dtype]}_{_SHORT[w.dtype]}"


@jit()
def _plain(
    words: Any, pairs: Any, PLACE: tl.constexpr, SECOND: tl.constexpr, BITS: tl.constexpr, KIND: tl.constexpr
) -> Any:
    """One number of each word, in float32, as the operations on the dtype of scales round it."""
    codes = (words >> (BITS * PLACE + 16 * SECOND)) & ((1 << BITS) - 1)
    low = (pairs & 0xFFFF).to(tl.int16)
    if KIND == "mxfp4":
        power = ((codes & 7) >> 1).to(tl.float32)
        tail = (codes & 1).to(tl.float32)
        magnitude = tl.where(power == 0.0, tail * 0.5, (2.0 + tail) * tl.exp2(power) * 0.25)
        number = tl.where(codes >= 8, -magnitude, magnitude)
        # 2 ** -126, and 2 ** (scale - 1)
        return number * 1.1754943508222875e-38 * low.to(tl.bfloat16, bitcast=True).to(tl.float32)
    ONES: tl.constexpr = 0x4300 if "int4_bf16" in KIND else 0x6400
    number = (codes - ((pairs >> 16) - ONES)).to(tl.float32)
    if "_bf16_" in KIND:
        return (number * low.to(tl.bfloat16, bitcast=True).to(tl.float32)).to(tl.bfloat16).to(tl.float32)
    return (number * low.to(tl.float16, bitcast=True).to(tl.float32)).to(tl.float16).to(tl.float32)


@jit()
def _eight_halves(words: Any, pairs: Any, ASM: tl.constexpr) -> Any:
    f = tl.float16
    return tl.inline_asm_elementwise(
        ASM, "=h,=h,=h,=h,=h,=h,=h,=h,r,r", [words, pairs], dtype=(f, f, f, f, f, f, f, f), is_pure=True, pack=1
    )


@jit()
def _eight(words: Any, pairs: Any, ASM: tl.constexpr) -> Any:
    f = tl.bfloat16
    return tl.inline_asm_elementwise(
        ASM, "=h,=h,=h,=h,=h,=h,=h,=h,r,r", [words, pairs], dtype=(f, f, f, f, f, f, f, f), is_pure=True, pack=1
    )


@jit()
def _four_halves(words: Any, pairs: Any, ASM: tl.constexpr) -> Any:
    f = tl.float16
    return tl.inline_asm_elementwise(ASM, "=h,=h,=h,=h,r,r", [words, pairs], dtype=(f, f, f, f), is_pure=True, pack=1)


@jit()
def _four(words: Any, pairs: Any, ASM: tl.constexpr) -> Any:
    f = tl.bfloat16
    return tl.inline_asm_elementwise(ASM, "=h,=h,=h,=h,r,r", [words, pairs], dtype=(f, f, f, f), is_pure=True, pack=1)


@jit()
def _eight_of(words: Any, pairs: Any, KIND: tl.constexpr) -> Any:
    if KIND == "int4_f16_f16":
        numbers = _eight_halves(words, pairs, INT4_F16_F16)
    elif KIND == "int4_f16_bf16":
        numbers = _eight(words, pairs, INT4_F16_BF16)
    elif KIND == "int4_bf16_f16":
        numbers = _eight_halves(words, pairs, INT4_BF16_F16)
    elif KIND == "int4_bf16_bf16":
        numbers = _eight(words, pairs, INT4_BF16_BF16)
    else:
        numbers = _eight(words, pairs, MXFP4)
    return numbers


@jit()
def _four_of(words: Any, pairs: Any, KIND: tl.constexpr) -> Any:
    if KIND == "int8_f16_f16":
        numbers = _four_halves(words, pairs, INT8_F16_F16)
    elif KIND == "int8_f16_bf16":
        numbers = _four(words, pairs, INT8_F16_BF16)
    elif KIND == "int8_bf16_f16":
        numbers = _four_halves(words, pairs, INT8_BF16_F16)
    else:
        numbers = _four(words, pairs, INT8_BF16_BF16)
    return numbers


@jit()
def _numbers(words: Any, pairs: Any, BITS: tl.constexpr, KIND: tl.constexpr, T: tl.constexpr) -> Any:
    """Of words [B, U, g, c, row, half]: [B, U, g, c, row, half, pair, place] (`packing`)."""
    if INTERPRETED:
        # the first index last: joined dimensions are last
        first = tl.join(_plain(words, pairs, 0, 0, BITS, KIND), _plain(words, pairs, 0, 1, BITS, KIND))
        second = tl.join(_plain(words, pairs, 1, 0, BITS, KIND), _plain(words, pairs, 1, 1, BITS, KIND))
        both = tl.join(first, second)
        if BITS == 4:
            third = tl.join(_plain(words, pairs, 2, 0, BITS, KIND), _plain(words, pairs, 2, 1, BITS, KIND))
            fourth = tl.join(_plain(words, pairs, 3, 0, BITS, KIND), _plain(words, pairs, 3, 1, BITS, KIND))
            both = tl.join(both, tl.join(third, fourth))
        numbers = both.to(T)
    elif BITS == 4:
        n = _eight_of(words, pairs, KIND)
        low = tl.join(tl.join(n[0], n[1]), tl.join(n[2], n[3]))
        numbers = tl.join(low, tl.join(tl.join(n[4], n[5]), tl.join(n[6], n[7])))
    else:
        n = _four_of(words, pairs, KIND)
        numbers = tl.join(tl.join(n[0], n[1]), tl.join(n[2], n[3]))
    return numbers


@jit()
def _pairs_of_words(pairs: Any, BN: tl.constexpr, BK: tl.constexpr, UNIT: tl.constexpr, GROUP: tl.constexpr) -> Any:
    """pairs [groups of the tile, BN] as those of words [B, U, g, c, row, half]."""
    BLOCKS: tl.constexpr = BN // 16
    UNITS: tl.constexpr = BK // UNIT
    if GROUP < UNIT:
        halves = tl.permute(tl.reshape(pairs, [UNITS, 2, BLOCKS, 2, 8]), [2, 0, 4, 3, 1])
        spread = tl.reshape(halves, [BLOCKS, UNITS, 8, 1, 2, 2])
    else:
        GROUPS: tl.constexpr = BK // GROUP if BK > GROUP else 1
        each = tl.permute(tl.reshape(pairs, [GROUPS, BLOCKS, 2, 8]), [1, 0, 3, 2])
        each = tl.reshape(each, [BLOCKS, GROUPS, 1, 8, 1, 2, 1])
        wide = tl.broadcast_to(each, [BLOCKS, GROUPS, UNITS // GROUPS, 8, 1, 2, 1])
        spread = tl.reshape(wide, [BLOCKS, UNITS, 8, 1, 2, 1])
    return tl.broadcast_to(spread, [BLOCKS, UNITS, 8, 4, 2, 2])


@jit()
def unpacked(
    words: Any,
    pairs: Any,
    BN: tl.constexpr,
    BK: tl.constexpr,
    GROUP: tl.constexpr,
    BITS: tl.constexpr,
    KIND: tl.constexpr,
    T: tl.constexpr,
) -> Any:
    """A tile [BN, BK] of the matrix in dtype T from its words [BN / 16, BK * bits / 2] and the pairs of its groups."""
    UNIT: tl.constexpr = 256 // BITS
    split = tl.reshape(words, [BN // 16, BK // UNIT, 8, 4, 2, 2])
    numbers = _numbers(split, _pairs_of_words(pairs, BN, BK, UNIT, GROUP), BITS, KIND, T)
    # dimensions: block 0, unit 1, g 2, c 3, row 4, half 5, number of the pair 6, then place: 7, or 8 (16s) and 7 (8s)
    if BITS == 4:
        ordered = tl.permute(numbers, [0, 4, 2, 1, 5, 8, 7, 3, 6])
    else:
        ordered = tl.permute(numbers, [0, 4, 2, 1, 5, 7, 3, 6])
    return tl.reshape(ordered, [BN, BK])
