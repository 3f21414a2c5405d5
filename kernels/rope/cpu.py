"""CPU: optional per-head RMSNorm of q, k and v, rope, and cache write, in one pass over the fused qkv rows.

# T tokens, Hq query heads, Hkv key heads, D head dim, B block size
Keys are stored transposed, [block, Hkv, D, B], so that one vector holds one dimension of 16 keys; values are stored
[block, Hkv, B, D].
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from llvmlite import ir
from numba import prange, types
from numba.core import cgutils

from sempre.kernels.attention.contract import HeadLayout, HeadNorms, KvCache
from sempre.kernels.dtypes import ELEMENT_SIZE, FP8_CODE, cache_dtype_code
from sempre.kernels.fp8.cpu import quantize_to_bytes
from sempre.kernels.jit import address_of, compiled, compiled_twice, keep
from sempre.kernels.norms.cpu import emit_rms_norm, emit_unweighted_rms_norm
from sempre.kernels.vector_ir import (
    ELEMENT_BYTES,
    F32,
    I8,
    I16,
    I32,
    I64,
    address_intrinsic,
    branch_on_dtype,
    fma,
    load,
    loop,
    store,
    store_rounded,
    vec,
)

LANES_8 = 8  # half a head may be a multiple of 8 only (D = 80)
PARALLEL_ROWS = 8


def _emit_rotate(b: ir.IRBuilder, x: ir.Value, angles: ir.Value, head_dim: ir.Value) -> None:
    half = b.mul(head_dim, I64(2))  # bytes of D/2 float32

    def body(b: ir.IRBuilder, i: ir.Value, carried: list[ir.Value]) -> list[ir.Value]:
        first = b.add(x, b.mul(i, I64(4)))
        second = b.add(first, half)
        at = b.add(angles, b.mul(i, I64(4)))
        cosine, sine = load(b, at, vec(F32, LANES_8)), load(b, b.add(at, half), vec(F32, LANES_8))
        low, high = load(b, first, vec(F32, LANES_8)), load(b, second, vec(F32, LANES_8))
        store(b, fma(b, low, cosine, b.fneg(b.fmul(high, sine))), first)
        store(b, fma(b, high, cosine, b.fmul(low, sine)), second)
        return carried

    loop(b, I64(0), b.sdiv(head_dim, I64(2)), LANES_8, [], body)


# a finite element never has all of these bits set
EXPONENTS = {"float32": (I32, 0x7F800000), "bfloat16": (I16, 0x7F80), "float16": (I16, 0x7C00)}


def _emit_narrow(b: ir.IRBuilder, source: ir.Value, target: ir.Value, count: ir.Value, dtype: ir.Value) -> ir.Value:
    """Round `count` float32 to `dtype`; 1 if all results are finite, else 0."""
    flags = vec(ir.IntType(1), LANES_8)
    finite = cgutils.alloca_once(b, I64)

    def narrow_to(name: str) -> None:
        element, exponent = EXPONENTS[name]
        mask = ir.Constant(vec(element, LANES_8), [exponent] * LANES_8)

        def body(b: ir.IRBuilder, i: ir.Value, carried: list[ir.Value]) -> list[ir.Value]:
            at = b.add(target, b.mul(i, I64(ELEMENT_BYTES[name])))
            store_rounded(b, load(b, b.add(source, b.mul(i, I64(4))), vec(F32, LANES_8)), at, name)
            return [b.or_(carried[0], b.icmp_unsigned("==", b.and_(load(b, at, mask.type), mask), mask))]

        (found,) = loop(b, I64(0), count, LANES_8, [ir.Constant(flags, [0] * LANES_8)], body)
        none = b.icmp_unsigned("==", b.bitcast(found, ir.IntType(LANES_8)), ir.IntType(LANES_8)(0))
        b.store(b.zext(none, I64), finite)

    branch_on_dtype(b, dtype, narrow_to, EXPONENTS)
    return b.load(finite)


def _scatter(kind: ir.IntType) -> Any:
    size = kind.width // 8

    def emit(b: ir.IRBuilder, source: ir.Value, target: ir.Value, count: ir.Value, target_step: ir.Value) -> None:
        def body(b: ir.IRBuilder, i: ir.Value, carried: list[ir.Value]) -> list[ir.Value]:
            store(b, load(b, b.add(source, b.mul(i, I64(size))), kind), b.add(target, b.mul(i, target_step)))
            return carried

        loop(b, I64(0), count, 1, [], body)

    return address_intrinsic(emit)


def _emit_store_zero(b: ir.IRBuilder, target: ir.Value) -> None:
    store(b, I32(0), target)


def _emit_store_nan(b: ir.IRBuilder, target: ir.Value) -> None:
    store(b, I32(0x7FC00000), target)


_rotate = address_intrinsic(_emit_rotate)
_store_zero, _store_nan = address_intrinsic(_emit_store_zero), address_intrinsic(_emit_store_nan)
_norm_row = address_intrinsic(emit_rms_norm)
_norm_row_only = address_intrinsic(emit_unweighted_rms_norm)
_narrow = address_intrinsic(_emit_narrow, returns=types.int64)
_scatter_32, _scatter_16, _scatter_8 = _scatter(I32), _scatter(I16), _scatter(I8)


@compiled()
def _clear_row(target: int, size: int) -> None:
    """Zero `size` bytes, a multiple of 16."""
    for at in range(target, target + size, 4):
        _store_zero(at)


@compiled()
def _store_row(row: int, target: int, scale: int, dim: int, dtype: int) -> int:
    """Store a row of `dim` float32 in the cache's dtype; 1 if what is read of it will be finite."""
    if dtype == FP8_CODE:
        return int(quantize_to_bytes(row, dim, target, scale))
    return int(_narrow(row, target, dim, dtype))


@compiled()
def _token(
    row: int,
    angles: int,
    slot: int,
    keys: int,
    values: int,
    k_scales: int,
    v_scales: int,
    dtype: int,
    heads: int,
    kv_heads: int,
    first_value: int,
    dim: int,
    block: int,
    q_norm: int,
    k_norm: int,
    v_norm: bool,
    eps: float,
) -> None:
    """`first_value`: the first value head's number in the row; the first key head's where keys are values too."""
    size = ELEMENT_SIZE[dtype]
    block_id, offset = slot // block, slot % block
    for h in range(heads):
        head = row + h * dim * 4
        if q_norm != 0:
            _norm_row(head, q_norm, dim, eps, head)
        _rotate(head, angles, dim)
    rounded = np.empty(dim * 4, np.uint8)
    for h in range(kv_heads):
        first_slot = (block_id * kv_heads + h) * block
        base = first_slot * dim * size
        # of no meaning without scales
        k_scale, v_scale = k_scales + (first_slot + offset) * 4, v_scales + (first_slot + offset) * 4
        key, value_slot = row + (heads + h) * dim * 4, values + base + offset * dim * size
        # the value comes first: it may be the key as it is before norm and rope
        value = row + (first_value + h) * dim * 4
        if v_norm:
            _norm_row_only(value, dim, eps, address_of(rounded))
            value = address_of(rounded)
        finite_value = _store_row(value, value_slot, v_scale, dim, dtype)
        if k_norm != 0:
            _norm_row(key, k_norm, dim, eps, key)
        _rotate(key, angles, dim)
        finite_key = _store_row(key, address_of(rounded), k_scale, dim, dtype)
        if finite_key == 0 or finite_value == 0:
            # all ones are a NaN in every format; with scales, only those are
            rounded[:] = 255
            _clear_row(value_slot, dim * size)
            if dtype == FP8_CODE:
                _store_nan(k_scale)
                _store_zero(v_scale)
        if size == 1:
            _scatter_8(address_of(rounded), keys + base + offset, dim, block)
        elif size == 4:
            _scatter_32(address_of(rounded), keys + base + offset * 4, dim, block * 4)
        else:
            _scatter_16(address_of(rounded), keys + base + offset * 2, dim, block * 2)
    keep(rounded)


@compiled()
def _first_outside(positions: np.ndarray, num_positions: int, slots: np.ndarray, num_slots: int) -> int:
    """The first row whose position or slot does not exist; -1 if all do."""
    for t in range(len(positions)):
        if not (0 <= positions[t] < num_positions and 0 <= slots[t] < num_slots):
            return t
    return -1


@compiled_twice
def _rope(
    qkv: int,
    positions: np.ndarray,
    table: int,
    slots: np.ndarray,
    keys: int,
    values: int,
    k_scales: int,
    v_scales: int,
    dtype: int,
    heads: int,
    kv_heads: int,
    first_value: int,
    row_heads: int,
    dim: int,
    block: int,
    q_norm: int,
    k_norm: int,
    v_norm: bool,
    eps: float,
) -> None:
    row_bytes = row_heads * dim * 4
    for t in prange(len(positions)):
        _token(
            qkv + t * row_bytes,
            table + positions[t] * dim * 4,
            slots[t],
            keys,
            values,
            k_scales,
            v_scales,
            dtype,
            heads,
            kv_heads,
            first_value,
            dim,
            block,
            q_norm,
            k_norm,
            v_norm,
            eps,
        )


def first_outside(positions: torch.Tensor, num_positions: int, slots: torch.Tensor, num_slots: int) -> int:
    """The first row whose position or slot does not exist; -1 if all do."""
    return int(_first_outside(positions.numpy(), num_positions, slots.numpy(), num_slots))


def rope_and_cache_write(
    qkv: torch.Tensor,
    positions: torch.Tensor,
    table: torch.Tensor,
    slot_mapping: torch.Tensor,
    cache: KvCache,
    heads: HeadLayout,
    norms: HeadNorms | None = None,
) -> None:
    """See the facade; positions and slots must exist. k in qkv is rotated too."""
    run = _rope.parallel if positions.shape[0] >= PARALLEL_ROWS else _rope.serial
    kv_heads = heads.num_kv_heads if heads.kv_parts else 0
    run(
        qkv.data_ptr(),
        positions.numpy(),
        table.data_ptr(),
        slot_mapping.numpy(),
        cache.k.data_ptr(),
        cache.v.data_ptr(),
        *cache.scale_addresses,
        cache_dtype_code(cache.k.dtype),
        heads.num_heads,
        kv_heads,
        heads.num_heads + (kv_heads if heads.kv_parts == 2 else 0),
        heads.qkv_width // heads.head_dim,
        heads.head_dim,
        cache.k.shape[3],
        norms.q.data_ptr() if norms is not None else 0,
        norms.k.data_ptr() if norms is not None and norms.k is not None else 0,
        norms is not None and norms.values,
        norms.eps if norms is not None else 0.0,
    )
