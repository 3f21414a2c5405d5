"""Reading an fp8 cache: four blocks of a key head as float32, each element times the scale of its key or value.

# D head dim, B = 16 keys per block
"""

from __future__ import annotations

from llvmlite import ir

from sempre.kernels.jit import compiled
from sempre.kernels.vector_ir import F32, I64, LANES, address_intrinsic, load, load_widened, loop, splat, store, vec

FP8 = "float8_e4m3fn"
BLOCK = 16
SCALES_BYTES = BLOCK * 4


def _emit_keys(b: ir.IRBuilder, keys: ir.Value, scales: ir.Value, dim: ir.Value, target: ir.Value) -> None:
    """keys [D, B] times scales [B]"""
    factors = load(b, scales, vec(F32))

    def body(b: ir.IRBuilder, d: ir.Value, carried: list[ir.Value]) -> list[ir.Value]:
        value = load_widened(b, b.add(keys, b.mul(d, I64(BLOCK))), FP8)
        store(b, b.fmul(value, factors), b.add(target, b.mul(d, I64(4 * BLOCK))))
        return carried

    loop(b, I64(0), dim, 1, [], body)


def _emit_values(b: ir.IRBuilder, values: ir.Value, scales: ir.Value, dim: ir.Value, target: ir.Value) -> None:
    """values [B, D] times scales [B, 1]"""

    def row(b: ir.IRBuilder, key: ir.Value, carried: list[ir.Value]) -> list[ir.Value]:
        factor = splat(b, load(b, b.add(scales, b.mul(key, I64(4))), F32))
        start = b.mul(key, dim)

        def body(b: ir.IRBuilder, d: ir.Value, carried: list[ir.Value]) -> list[ir.Value]:
            at = b.add(start, d)
            value = b.fmul(load_widened(b, b.add(values, at), FP8), factor)
            store(b, value, b.add(target, b.mul(at, I64(4))))
            return carried

        loop(b, I64(0), dim, LANES, [], body)
        return carried

    loop(b, I64(0), I64(BLOCK), 1, [], row)


_keys = address_intrinsic(_emit_keys)
_values = address_intrinsic(_emit_values)


@compiled()
def scaled_keys(
    keys: int, scales: int, n0: int, n1: int, n2: int, n3: int, dim: int, target: int
) -> tuple[int, int, int, int]:
    """Those of the blocks numbered n0…n3 (block * Hkv + head) in scratch memory at `target`; their addresses there."""
    size = BLOCK * dim
    t0, t1, t2, t3 = target, target + 4 * size, target + 8 * size, target + 12 * size
    _keys(keys + n0 * size, scales + n0 * SCALES_BYTES, dim, t0)
    _keys(keys + n1 * size, scales + n1 * SCALES_BYTES, dim, t1)
    _keys(keys + n2 * size, scales + n2 * SCALES_BYTES, dim, t2)
    _keys(keys + n3 * size, scales + n3 * SCALES_BYTES, dim, t3)
    return t0, t1, t2, t3


@compiled()
def scaled_values(
    values: int, scales: int, n0: int, n1: int, n2: int, n3: int, dim: int, target: int
) -> tuple[int, int, int, int]:
    """The same of values."""
    size = BLOCK * dim
    t0, t1, t2, t3 = target, target + 4 * size, target + 8 * size, target + 12 * size
    _values(values + n0 * size, scales + n0 * SCALES_BYTES, dim, t0)
    _values(values + n1 * size, scales + n1 * SCALES_BYTES, dim, t1)
    _values(values + n2 * size, scales + n2 * SCALES_BYTES, dim, t2)
    _values(values + n3 * size, scales + n3 * SCALES_BYTES, dim, t3)
    return t0, t1, t2, t3
