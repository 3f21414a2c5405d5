"""Functions that LLVM compiles by themselves: what they compute, and that they are kept on disk."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from llvmlite import ir

from sempre.kernels.jit import address_of, compiled, keep
from sempre.kernels.native import Native, NativeGroup, call_native, call_native_float
from sempre.kernels.vector_ir import F32, fma, load, store, vec

PROBE = """
from sempre.kernels.linear.cpu_tiles import TILES
import sempre.kernels.native as native
compiled = []
inner = native._compile
native._compile = lambda module, *machine: compiled.append(module.name) or inner(module, *machine)
print(TILES[1].table != 0, compiled)
"""


def _emit_fma(b: ir.IRBuilder, x: ir.Value, y: ir.Value, out: ir.Value) -> None:
    store(b, fma(b, *(load(b, address, vec(F32)) for address in (x, y, out))), out)


def _emit_first_times(b: ir.IRBuilder, x: ir.Value, factor: ir.Value) -> ir.Value:
    return b.fmul(load(b, x, F32), factor)


GROUP = NativeGroup(
    "test", {"fma": Native(_emit_fma, "iii"), "first_times": Native(_emit_first_times, "if", returns_float=True)}
)


@compiled()
def _call(table: int, x: np.ndarray, y: np.ndarray, factor: float) -> np.ndarray:
    out = np.full(17, -1, np.float32)
    call_native(table, 0, address_of(x), address_of(y), address_of(out))
    out[16] = call_native_float(table, 1, address_of(x), factor)
    keep(out)
    return out


def test_a_function_is_called_by_its_place_and_rounds_once() -> None:
    x = np.full(16, 1 + 2.0**-12, np.float32)
    y = x.copy()
    y[3] = np.nan
    found = _call(GROUP.table, x, y, 0.5)
    once = np.float32(np.float64(x[0]) * np.float64(y[0]) - 1.0)
    twice = x[0] * y[0] - np.float32(1)
    assert once != twice, "the control: rounding the product too gives another number"
    assert np.isnan(found[3])
    assert (np.delete(found[:16], 3) == once).all()
    assert found[16] == x[0] * np.float32(0.5)


def _probe(cache: Path) -> str:
    done = subprocess.run(
        [sys.executable, "-c", PROBE], capture_output=True, text=True, env=os.environ | {"SEMPRE_CACHE": str(cache)}
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.parametrize("damage", [False, True])
def test_object_code_is_kept_and_compiled_again_only_when_damaged(tmp_path: Path, damage: bool) -> None:
    assert _probe(tmp_path) == "True ['linear.bfloat16']"
    (kept,) = tmp_path.rglob("native.linear.bfloat16.*.kernel")
    if damage:
        kept.write_bytes(kept.read_bytes()[:-1])
    assert _probe(tmp_path) == ("True ['linear.bfloat16']" if damage else "True []")
