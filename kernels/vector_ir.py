"""Building blocks of the CPU kernels: numba intrinsics that emit LLVM vector code with explicit fused multiply-adds.

Why not ordinary loops: a compiler may fuse, unroll and vectorise a loop differently for each shape, and then a row's
bits depend on its neighbours. Here every operation of every lane is explicit, so IEEE 754 alone decides the result; it
depends neither on the number of rows, nor on threads, nor on the width of the machine's vectors. Memory is addressed by
integers (`tensor.data_ptr()`), which keeps calls from Python cheap.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

LANES = 16  # float32 lanes of one vector; narrower machines split it, with equal bits

F32 = ir.FloatType()
F16 = ir.HalfType()
I8 = ir.IntType(8)
I16 = ir.IntType(16)
I32 = ir.IntType(32)
I64 = ir.IntType(64)
# dtypes a matrix may be stored in; kernels identify a dtype by its place in this order
ELEMENT_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "float8_e4m3fn": 1}


def vec(element: ir.Type, lanes: int = LANES) -> ir.VectorType:
    return ir.VectorType(element, lanes)


def splat(b: ir.IRBuilder, scalar: ir.Value, lanes: int = LANES) -> ir.Value:
    """A vector with `scalar` in every lane."""
    kind = vec(scalar.type, lanes)
    one = b.insert_element(ir.Constant(kind, ir.Undefined), scalar, I32(0))
    return b.shuffle_vector(one, ir.Constant(kind, ir.Undefined), ir.Constant(vec(I32, lanes), [0] * lanes))


def constant(value: float, lanes: int = LANES) -> ir.Constant:
    """A float32 vector constant; `value` must be a float32 value exactly."""
    return ir.Constant(vec(F32, lanes), [value] * lanes)


def int_constant(value: int, lanes: int = LANES) -> ir.Constant:
    return ir.Constant(vec(I32, lanes), [value] * lanes)


def _llvm(b: ir.IRBuilder, operation: str, *operands: ir.Value) -> ir.Value:
    """Call an LLVM intrinsic whose operands and result are all float32 vectors of one length."""
    kind = operands[0].type
    name = f"llvm.{operation}.v{kind.count}f32"
    function = cgutils.get_or_insert_function(b.module, ir.FunctionType(kind, [kind] * len(operands)), name)
    return b.call(function, operands)


def fma(b: ir.IRBuilder, x: ir.Value, y: ir.Value, z: ir.Value) -> ir.Value:
    """x * y + z, rounded once."""
    return _llvm(b, "fma", x, y, z)


def llvm_rint(b: ir.IRBuilder, x: ir.Value) -> ir.Value:
    """Each lane rounded to an integer, ties to even."""
    return _llvm(b, "rint", x)


def llvm_sqrt(b: ir.IRBuilder, scalar: ir.Value) -> ir.Value:
    """Square root of one float32, correctly rounded."""
    function = cgutils.get_or_insert_function(b.module, ir.FunctionType(F32, [F32]), "llvm.sqrt.f32")
    return b.call(function, [scalar])


def address(b: ir.IRBuilder, base: ir.Value, offset_bytes: ir.Value | int) -> ir.Value:
    offset = I64(offset_bytes) if isinstance(offset_bytes, int) else offset_bytes
    return b.add(base, offset)


def load(b: ir.IRBuilder, addr: ir.Value, kind: ir.Type) -> ir.Value:
    """Load `kind` from the integer address; alignment 1 element, so that a row may start anywhere."""
    pointer = b.inttoptr(addr, kind.as_pointer())
    value = b.load(pointer)
    value.align = 2
    return value


def store(b: ir.IRBuilder, value: ir.Value, addr: ir.Value) -> None:
    pointer = b.inttoptr(addr, value.type.as_pointer())
    instruction = b.store(value, pointer)
    instruction.align = 2


def load_widened(b: ir.IRBuilder, addr: ir.Value, dtype: str, lanes: int = LANES) -> ir.Value:
    """`lanes` elements of `dtype`, widened exactly to float32."""
    if dtype == "float32":
        return load(b, addr, vec(F32, lanes))
    if dtype == "bfloat16":
        wide = b.zext(load(b, addr, vec(I16, lanes)), vec(I32, lanes))
        return b.bitcast(b.shl(wide, int_constant(16, lanes)), vec(F32, lanes))
    if dtype == "float8_e4m3fn":
        return _load_fp8(b, addr, lanes)
    return b.fpext(load(b, addr, vec(F16, lanes)), vec(F32, lanes))


def _load_fp8(b: ir.IRBuilder, addr: ir.Value, lanes: int) -> ir.Value:
    """float8_e4m3fn without NaN: the bits are placed in a float16, whose exponent is biased by 8 more, times 2**8."""

    def each(value: int) -> ir.Constant:
        return ir.Constant(vec(I16, lanes), [value] * lanes)

    wide = b.zext(load(b, addr, vec(I8, lanes)), vec(I16, lanes))
    sign = b.shl(b.and_(wide, each(0x80)), each(8))
    half = b.or_(sign, b.shl(b.and_(wide, each(0x7F)), each(7)))
    return b.fmul(b.fpext(b.bitcast(half, vec(F16, lanes)), vec(F32, lanes)), constant(256.0, lanes))


def bfloat16_bits(b: ir.IRBuilder, value: ir.Value) -> ir.Value:
    """A float32 vector rounded to bfloat16, to nearest, ties to even, in the upper halves of int32 lanes, whose lower
    halves mean nothing; NaN stays NaN."""
    lanes = value.type.count
    bits = b.bitcast(value, vec(I32, lanes))
    odd = b.and_(b.lshr(bits, int_constant(16, lanes)), int_constant(1, lanes))
    rounded = b.add(bits, b.add(odd, int_constant(0x7FFF, lanes)))
    is_nan = b.fcmp_unordered("uno", value, value)
    return b.select(is_nan, b.or_(bits, int_constant(0x400000, lanes)), rounded)


def store_rounded(b: ir.IRBuilder, value: ir.Value, addr: ir.Value, dtype: str) -> None:
    """Store a float32 vector as `dtype`, rounded to nearest, ties to even; NaN stays NaN."""
    lanes = value.type.count
    if dtype == "float32":
        store(b, value, addr)
    elif dtype == "bfloat16":
        bits = b.lshr(bfloat16_bits(b, value), int_constant(16, lanes))
        store(b, b.trunc(bits, vec(I16, lanes)), addr)
    else:
        store(b, b.fptrunc(value, vec(F16, lanes)), addr)


def loop(
    b: ir.IRBuilder,
    start: ir.Value,
    stop: ir.Value,
    step: int,
    carried: list[ir.Value],
    body: Callable[[ir.IRBuilder, ir.Value, list[ir.Value]], list[ir.Value]],
) -> list[ir.Value]:
    """`for i in range(start, stop, step)` with loop-carried values; returns their last values."""
    before = b.block
    head, inside, after = (b.append_basic_block(name) for name in ("head", "inside", "after"))
    b.branch(head)
    b.position_at_end(head)
    index = b.phi(I64)
    index.add_incoming(start, before)
    phis = []
    for value in carried:
        phi = b.phi(value.type)
        phi.add_incoming(value, before)
        phis.append(phi)
    b.cbranch(b.icmp_signed("<", index, stop), inside, after)
    b.position_at_end(inside)
    results = body(b, index, phis)
    following = b.add(index, I64(step))
    index.add_incoming(following, b.block)
    for phi, value in zip(phis, results, strict=True):
        phi.add_incoming(value, b.block)
    b.branch(head)
    b.position_at_end(after)
    return phis


def unrolled_loop(
    b: ir.IRBuilder,
    count: ir.Value,
    unroll: int,
    carried: list[ir.Value],
    body: Callable[[ir.IRBuilder, ir.Value, list[ir.Value]], list[ir.Value]],
) -> list[ir.Value]:
    """`for i in range(count)`, `unroll` iterations at a time, in ascending order."""

    def several(b: ir.IRBuilder, index: ir.Value, values: list[ir.Value]) -> list[ir.Value]:
        for u in range(unroll):
            values = body(b, b.add(index, I64(u)), values)
        return values

    whole = b.sub(count, b.srem(count, I64(unroll)))
    carried = loop(b, I64(0), whole, unroll, carried, several)
    return loop(b, whole, count, 1, carried, body)


def tree_sum(b: ir.IRBuilder, value: ir.Value) -> ir.Value:
    """Sum of the lanes of a vector in a fixed tree: halves are added until one lane is left."""
    lanes = value.type.count
    while lanes > 1:
        lanes //= 2
        undefined = ir.Constant(value.type, ir.Undefined)
        low = b.shuffle_vector(value, undefined, ir.Constant(vec(I32, lanes), list(range(lanes))))
        high = b.shuffle_vector(value, undefined, ir.Constant(vec(I32, lanes), list(range(lanes, 2 * lanes))))
        value = b.fadd(low, high)
    return b.extract_element(value, I32(0))


def tree_max(b: ir.IRBuilder, value: ir.Value) -> ir.Value:
    """Largest lane of a vector without NaN."""
    lanes = value.type.count
    while lanes > 1:
        lanes //= 2
        undefined = ir.Constant(value.type, ir.Undefined)
        low = b.shuffle_vector(value, undefined, ir.Constant(vec(I32, lanes), list(range(lanes))))
        high = b.shuffle_vector(value, undefined, ir.Constant(vec(I32, lanes), list(range(lanes, 2 * lanes))))
        value = b.select(b.fcmp_ordered(">", high, low), high, low)
    return b.extract_element(value, I32(0))


# exp(x) = 2^n * exp(r), n = round(x / ln 2), |r| <= ln(2)/2: Cody-Waite reduction with ln 2 in two float32 parts, then
# a minimax polynomial of degree 7 (the coefficients of Moshier's Cephes expf); within 2 ulp, and exp(0) = 1 exactly.
EXP_LOWEST = -87.0
_LOG2E, _LN2_HIGH, _LN2_LOW = 1.44269504088896341, 0.693359375, -2.12194440e-4
_EXP_COEFFICIENTS = (
    1.9875691500e-4,
    1.3981999507e-3,
    8.3334519073e-3,
    4.1665795894e-2,
    1.6666665459e-1,
    5.0000001201e-1,
)


def _rounded(value: float) -> ir.Constant:
    """A float32 vector constant nearest to `value`."""
    return constant(struct.unpack("<f", struct.pack("<f", value))[0])


def exp(b: ir.IRBuilder, x: ir.Value) -> ir.Value:
    """exp of each of LANES lanes for x <= 88; below EXP_LOWEST the result is 0 exactly (also for -inf)."""
    tiny = b.fcmp_ordered("<", x, constant(EXP_LOWEST))
    safe = b.select(tiny, constant(0.0), x)
    n = _llvm(b, "rint", b.fmul(safe, _rounded(_LOG2E)))
    r = fma(b, n, _rounded(-_LN2_HIGH), safe)
    r = fma(b, n, _rounded(-_LN2_LOW), r)
    p: ir.Value = _rounded(_EXP_COEFFICIENTS[0])
    for coefficient in _EXP_COEFFICIENTS[1:]:
        p = fma(b, p, r, _rounded(coefficient))
    y = b.fadd(fma(b, p, b.fmul(r, r), r), constant(1.0))
    exponent = b.shl(b.add(b.fptosi(n, vec(I32)), int_constant(127)), int_constant(23))
    scaled = b.fmul(y, b.bitcast(exponent, vec(F32)))
    return b.select(tiny, constant(0.0), scaled)


# tanh(x) = x + x^3 * P(x^2) below 0.625, a minimax polynomial (the coefficients of Moshier's Cephes tanhf); above it
# 1 - 2 / (exp(2 x) + 1), which is 1 from 9 on.
_TANH_SMALL, _TANH_LARGEST = 0.625, 44.0
_TANH_COEFFICIENTS = (-5.70498872745e-3, 2.06390887954e-2, -5.37397155531e-2, 1.33314422036e-1, -3.33332819422e-1)


def tanh(b: ir.IRBuilder, x: ir.Value) -> ir.Value:
    """tanh of each of LANES lanes; NaN stays NaN."""
    magnitude = _llvm(b, "fabs", x)
    capped = b.select(b.fcmp_ordered(">", magnitude, constant(_TANH_LARGEST)), constant(_TANH_LARGEST), magnitude)
    exponential = exp(b, b.fadd(capped, capped))
    large = b.fsub(constant(1.0), b.fdiv(constant(2.0), b.fadd(exponential, constant(1.0))))
    square = b.fmul(x, x)
    p: ir.Value = _rounded(_TANH_COEFFICIENTS[0])
    for coefficient in _TANH_COEFFICIENTS[1:]:
        p = fma(b, p, square, _rounded(coefficient))
    small = fma(b, b.fmul(p, square), x, x)
    is_small = b.fcmp_ordered("<", magnitude, constant(_TANH_SMALL))
    return b.select(is_small, small, _llvm(b, "copysign", large, x))


def branch_on_dtype(
    b: ir.IRBuilder, dtype: ir.Value, emit: Callable[[str], None], names: Iterable[str] = ELEMENT_BYTES
) -> None:
    """The code `emit` generates for each named dtype; the one with code `dtype` runs."""
    for code, name in enumerate(names):
        with b.if_then(b.icmp_signed("==", dtype, I64(code))):
            emit(name)


def address_intrinsic(emit: Callable[..., ir.Value | None], *, returns: Any = types.void) -> Any:
    """A numba intrinsic whose code is generated by `emit(builder, *arguments)`.

    Integer arguments (addresses, counts, strides) arrive as int64, floating ones as float32.
    """

    def typing(typing_context: Any, *arguments: Any) -> Any:
        signature = returns(types.StarArgTuple.from_types(arguments))

        def codegen(context: Any, builder: ir.IRBuilder, sig: Any, packed: tuple[ir.Value, ...]) -> ir.Value:
            values = [_as_operand(builder, value) for value in cgutils.unpack_tuple(builder, packed[0])]
            result = emit(builder, *values)
            return context.get_dummy_value() if result is None else result

        return signature, codegen

    return intrinsic(typing)


def _as_operand(b: ir.IRBuilder, value: ir.Value) -> ir.Value:
    if isinstance(value.type, ir.DoubleType):
        return b.fptrunc(value, F32)
    if isinstance(value.type, ir.IntType) and value.type.width < 64:
        return b.sext(value, I64)
    return value
