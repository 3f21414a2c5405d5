"""The dtypes of weights and KV cache, and exact widening to float32.

An element of 16 or 8 bits widens to float32 without loss, so kernels always compute in float32.
"""

from __future__ import annotations

import torch
from llvmlite import ir

from sempre.kernels.jit import compiled
from sempre.kernels.vector_ir import (
    ELEMENT_BYTES,
    I64,
    LANES,
    address_intrinsic,
    branch_on_dtype,
    load_widened,
    loop,
    store,
)

# in the order of ELEMENT_BYTES
CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
FP8_CODE = 3  # float8_e4m3fn, of matrices and of a KV cache with scales
ELEMENT_SIZE = tuple(ELEMENT_BYTES.values())


def dtype_code(dtype: torch.dtype) -> int:
    """0 float32, 1 bfloat16, 2 float16; TypeError for anything else."""
    if dtype not in CODES:
        raise TypeError(f"dtype must be one of {[str(d) for d in CODES]}, got {dtype}")
    return CODES[dtype]


def cache_dtype_code(dtype: torch.dtype) -> int:
    """The same of a KV cache, which may also be 3, fp8."""
    return FP8_CODE if dtype is torch.float8_e4m3fn else dtype_code(dtype)


def _emit_widen(b: ir.IRBuilder, source: ir.Value, target: ir.Value, count: ir.Value, dtype: ir.Value) -> None:
    def widen_from(name: str) -> None:
        def body(b: ir.IRBuilder, i: ir.Value, carried: list[ir.Value]) -> list[ir.Value]:
            value = load_widened(b, b.add(source, b.mul(i, I64(ELEMENT_BYTES[name]))), name)
            store(b, value, b.add(target, b.mul(i, I64(4))))
            return carried

        loop(b, I64(0), count, LANES, [], body)

    branch_on_dtype(b, dtype, widen_from)


_widen = address_intrinsic(_emit_widen)


@compiled()
def widen(source: int, target: int, count: int, dtype: int) -> None:
    """Widen `count` elements (a multiple of 16) at address `source` to float32 at address `target`."""
    _widen(source, target, count, dtype)
