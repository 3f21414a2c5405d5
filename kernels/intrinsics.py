"""Scalar building blocks of the CPU kernels.

The bits of a kernel must not depend on how a compiler vectorises it. So a fused multiply-add is used exactly where
`fma` is written; fast-math, which would also reorder sums, is off everywhere (see `jit.py`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, cast

from numba import njit, types
from numba.extending import intrinsic

Function = TypeVar("Function", bound=Callable[..., Any])


def inlined(function: Function) -> Function:
    """A helper of kernels that is always inlined, so that the loop around its call can be vectorised."""
    return cast(Function, njit(fastmath=False, error_model="numpy", forceinline=True)(function))


@intrinsic  # type: ignore[untyped-decorator, unused-ignore]
def fma(typing_context: Any, a: Any, b: Any, c: Any) -> Any:
    """float32 a * b + c with a single rounding (LLVM's llvm.fma.f32)."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.fma(*args)

    return types.float32(types.float32, types.float32, types.float32), generate


@intrinsic  # type: ignore[untyped-decorator, unused-ignore]
def float32_bits(typing_context: Any, value: Any) -> Any:
    """The bits of a float32 as uint32."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.bitcast(args[0], context.get_value_type(types.uint32))

    return types.uint32(types.float32), generate


@intrinsic  # type: ignore[untyped-decorator, unused-ignore]
def float32_from_bits(typing_context: Any, bits: Any) -> Any:
    """The float32 with these uint32 bits."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.bitcast(args[0], context.get_value_type(types.float32))

    return types.float32(types.uint32), generate
