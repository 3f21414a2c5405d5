"""Element formats of weights and KV cache, and exact widening to float32.

An element of 16 or 8 bits widens to float32 without loss, so kernels always compute in float32.
"""

from __future__ import annotations

from typing import Any

import torch
from llvmlite import ir

from sempre.kernels.jit import compiled
from sempre.kernels.vector_ir import (
    ELEMENT_BYTES,
    I64,
    LANES,
    WEIGHT_STORAGES,
    address_intrinsic,
    load_widened,
    loop,
    store,
)

CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
FP8_CODE = 3  # float8_e4m3fn, which only the weights of matrix products are stored in
ELEMENT_SIZE = (4, 2, 2, 1)


def storage_code(dtype: torch.dtype) -> int:
    """0 float32, 1 bfloat16, 2 float16; TypeError for anything else."""
    if dtype not in CODES:
        raise TypeError(f"dtype must be one of {[str(d) for d in CODES]}, got {dtype}")
    return CODES[dtype]


def _widen(storage: str) -> Any:
    def emit(b: ir.IRBuilder, source: ir.Value, target: ir.Value, count: ir.Value) -> None:
        def body(b: ir.IRBuilder, i: ir.Value, carried: list[ir.Value]) -> list[ir.Value]:
            value = load_widened(b, b.add(source, b.mul(i, I64(ELEMENT_BYTES[storage]))), storage)
            store(b, value, b.add(target, b.mul(i, I64(4))))
            return carried

        loop(b, I64(0), count, LANES, [], body)

    return address_intrinsic(emit)


_widen_float32, _widen_bfloat16, _widen_float16, _widen_fp8 = (_widen(name) for name in WEIGHT_STORAGES)


@compiled()
def widen(source: int, target: int, count: int, storage: int) -> None:
    """Widen `count` elements (a multiple of 16) at address `source` to float32 at address `target`."""
    if storage == 0:
        _widen_float32(source, target, count)
    elif storage == 1:
        _widen_bfloat16(source, target, count)
    elif storage == 2:
        _widen_float16(source, target, count)
    else:
        _widen_fp8(source, target, count)
