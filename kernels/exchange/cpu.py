"""Lines on a CPU: sequentially consistent words, and the system's futex to sleep on them.

A line has two words of 32 bits: the number that its process has published last, and how many others sleep until it
changes. A sleeper counts itself before it sleeps, and the kernel checks the number once more; a process that publishes
writes the number before it looks for sleepers. So one of the two always sees the other.
"""

from __future__ import annotations

import platform

import numpy as np
import torch
from llvmlite import ir
from numba import types
from numba.core import cgutils

from sempre.kernels.exchange import LINE
from sempre.kernels.jit import address_of, compiled, keep
from sempre.kernels.vector_ir import I32, I64, address_intrinsic

_ORDER = "seq_cst"
_SLEEPERS, _TAKEN = 4, 8
# the number of the system call; that of newer machines is the same
_FUTEX = {"x86_64": 202}.get(platform.machine(), 98)
_WAIT, _WAKE, _EVERYONE = 0, 1, 2**31 - 1


def _word(b: ir.IRBuilder, at: ir.Value) -> ir.Value:
    return b.inttoptr(at, I32.as_pointer())


def _emit_load(b: ir.IRBuilder, at: ir.Value) -> ir.Value:
    return b.zext(b.load_atomic(_word(b, at), _ORDER, 4), I64)


def _emit_store(b: ir.IRBuilder, at: ir.Value, value: ir.Value) -> None:
    b.store_atomic(b.trunc(value, I32), _word(b, at), _ORDER, 4)


def _emit_add(b: ir.IRBuilder, at: ir.Value, value: ir.Value) -> ir.Value:
    return b.zext(b.atomic_rmw("add", _word(b, at), b.trunc(value, I32), _ORDER), I64)


def _emit_futex(b: ir.IRBuilder, at: ir.Value, operation: ir.Value, value: ir.Value, timeout: ir.Value) -> None:
    syscall = cgutils.get_or_insert_function(b.module, ir.FunctionType(I64, [I64], var_arg=True), "syscall")
    b.call(syscall, [I64(_FUTEX), at, operation, value, timeout, I64(0), I64(0)])


_load = address_intrinsic(_emit_load, returns=types.int64)
_store = address_intrinsic(_emit_store)
_add = address_intrinsic(_emit_add, returns=types.int64)
_futex = address_intrinsic(_emit_futex)


@compiled()
def _enter(line: int) -> int:
    before: int = _add(line + _TAKEN, 1)
    return before


@compiled()
def _publish(line: int, number: int) -> None:
    _store(line, number)
    if _load(line + _SLEEPERS) != 0:
        _futex(line, _WAKE, _EVERYONE, 0)


@compiled()
def _await_change(line: int, before: int, spins: int, wait_ns: int) -> int:
    looked = 0
    while looked < spins and _load(line) == before:
        looked += 1
    if _load(line) == before and wait_ns > 0:
        timeout = np.empty(2, np.int64)
        timeout[0], timeout[1] = wait_ns // 1_000_000_000, wait_ns % 1_000_000_000
        _add(line + _SLEEPERS, 1)
        _futex(line, _WAIT, before, address_of(timeout))
        _add(line + _SLEEPERS, -1)
        keep(timeout)
    now: int = _load(line)
    return now


@compiled()
def _meet(lines: int, processes: int, index: int, number: int, spins: int, wait_ns: int) -> int:
    _publish(lines + index * LINE, number)
    before = (number - 1) & 0xFFFFFFFF
    missing = -1
    for other in range(processes):
        if _await_change(lines + other * LINE, before, spins, wait_ns) == before:
            missing = other
            break
    return missing


def enter(lines: torch.Tensor, index: int) -> bool:
    """See the facade."""
    return int(_enter(lines.data_ptr() + index * LINE)) == 0


def meet(lines: torch.Tensor, index: int, number: int, *, spins: int, wait_s: float) -> int | None:
    """See the facade."""
    missing = int(_meet(lines.data_ptr(), lines.numel() // LINE, index, number & 0xFFFFFFFF, spins, int(wait_s * 1e9)))
    return None if missing < 0 else missing


def publish(line: torch.Tensor, number: int) -> None:
    """See the facade."""
    _publish(line.data_ptr(), number & 0xFFFFFFFF)


def await_change(line: torch.Tensor, before: int, *, spins: int, wait_s: float) -> int:
    """See the facade."""
    return int(_await_change(line.data_ptr(), before & 0xFFFFFFFF, spins, int(wait_s * 1e9)))
