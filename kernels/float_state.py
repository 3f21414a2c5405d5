"""The floating-point control register of the CPU's threads."""

from __future__ import annotations

import platform

from llvmlite import ir
from numba import prange
from numba.core import cgutils

from sempre.kernels.jit import compiled
from sempre.kernels.vector_ir import I32, I64, address_intrinsic

# to nearest, subnormal numbers kept, no exception trapped
_MXCSR_DEFAULT = 0x1F80
IS_X86 = platform.machine() in ("x86_64", "AMD64")
IS_ARM = platform.machine() in ("aarch64", "arm64")


def _emit_settle(b: ir.IRBuilder, unused: ir.Value) -> None:
    if IS_X86:
        word = cgutils.alloca_once_value(b, I32(_MXCSR_DEFAULT))
        pointer = ir.IntType(8).as_pointer()
        kind = ir.FunctionType(ir.VoidType(), [pointer])
        function = cgutils.get_or_insert_function(b.module, kind, "llvm.x86.sse.ldmxcsr")
        b.call(function, [b.bitcast(word, pointer)])
    elif IS_ARM:
        b.asm(ir.FunctionType(ir.VoidType(), [I64]), "msr fpcr, $0", "r", [I64(0)], side_effect=True)


_settle = address_intrinsic(_emit_settle)


@compiled(parallel=True)
def settle_threads(count: int) -> None:
    """One iteration for each of `count` threads, which all share such a loop evenly."""
    for thread in prange(count):
        _settle(thread)
