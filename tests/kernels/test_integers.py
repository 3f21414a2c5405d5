"""The integer matmul: its contract in wide arithmetic, rows that keep their bits, and equal bits on every CPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import integer_cases
import numpy as np
import pytest
import torch
from integer_cases import INPUTS, LAYOUTS, OUTPUTS, activations, digests, fractions, matrix, multiply

from sempre.kernels.integers import (
    BLOCK,
    GroupedIntegers,
    IntegerScheme,
    IntegerWeight,
    integer_linear,
    pack_integer_linear,
    pack_integers,
    partial_integer_linear,
    sum_integer_partials,
)
from sempre.kernels.integers.tiles import DOTS, dot_kind, machine_features
from sempre.kernels.threads import get_num_threads, set_num_threads

GOLDEN = Path(__file__).with_name("integers_golden.json")


def rounded(value: Fraction) -> np.float32:
    """The nearest float32, ties to even."""
    near = np.float32(float(value))
    around = [near, np.nextafter(near, np.float32(np.inf)), np.nextafter(near, np.float32(-np.inf))]
    errors = [abs(Fraction(float(each)) - value) for each in around]
    best = [each for each, error in zip(around, errors, strict=True) if error == min(errors)]
    return next((each for each in best if not each.view(np.uint32) & 1), best[0])


def contract(case: GroupedIntegers, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """The contract's operations, one by one, in exact rational numbers that are rounded once each."""
    out = np.empty((x.shape[0], case.codes.shape[0]), np.float32)
    group = case.group
    for t, row in enumerate(x.numpy()):
        quantized, scales = [], []
        for block in row.reshape(-1, BLOCK):
            scale = np.abs(block).max() / np.float32(127)
            scales.append(scale)
            each = np.zeros(BLOCK) if scale == 0 else np.rint((block / scale).astype(np.float32))
            quantized += np.clip(each, -127, 127).astype(int).tolist()
        for n, codes in enumerate(case.codes.tolist()):
            total = np.float32(0)
            for g in range(len(codes) // group):
                span = slice(g * group, (g + 1) * group)
                dot = sum(a * b for a, b in zip(codes[span], quantized[span], strict=True))
                factor = scales[g * group // BLOCK]
                product = factor * case.scale[n, g].numpy()
                total = rounded(dot * Fraction(float(product)) + Fraction(float(total)))
                if case.minimum is not None:
                    lowered = factor * case.minimum[n, g].numpy()
                    total = rounded(-sum(quantized[span]) * Fraction(float(lowered)) + Fraction(float(total)))
            out[t, n] = total if bias is None else total + bias[n].numpy()
    return torch.from_numpy(out)


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_operation_is_the_contracts(name: str) -> None:
    case, x, bias = matrix(*LAYOUTS[name], outputs=35), activations(4), fractions((35,), 20, 5)
    expected = contract(case, x, bias)
    assert torch.equal(multiply(case, x, bias), expected)
    codes = case.codes.clone()
    codes[5, 100] ^= 1
    assert not torch.equal(multiply(GroupedIntegers(codes, case.scale, case.minimum), x, bias), expected)


def test_golden_digests() -> None:
    assert digests() == json.loads(GOLDEN.read_text())


BASE = "+sse,+sse2,+sse3,+ssse3,+sse4.1,+sse4.2,+popcnt,+cx8,+avx,+fma,+f16c"
# name → what LLVM is told of the CPU, and the instructions that must then multiply the integers
MACHINES = {
    "vnni of 256 bits": ("alderlake", BASE + ",+avx2,+bmi,+bmi2,+avxvnni", "vnni256"),
    "avx2": ("haswell", BASE + ",+avx2,+bmi,+bmi2", "avx2"),
    "plain vectors of 256 bits": ("x86-64", BASE, "plain"),
    "plain vectors of 128 bits": ("x86-64", BASE + ",+prefer-128-bit", "plain"),
    "512 bits without vnni": ("skylake-avx512", BASE + ",+avx2,+avx512f,+avx512vl,+avx512bw,+avx512dq", "avx2"),
}


def run_as(cpu: str, features: str, **more: str) -> dict[str, object]:
    environment = {**os.environ, "NUMBA_CPU_NAME": cpu, "NUMBA_CPU_FEATURES": features, **more}
    environment["PYTHONPATH"] = os.pathsep.join(sys.path)
    command = [sys.executable, integer_cases.__file__]
    found = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return dict(json.loads(found.stdout))


@pytest.mark.skipif(sys.platform != "linux" or os.uname().machine != "x86_64", reason="names of x86-64 CPUs")
@pytest.mark.parametrize(
    "machine",
    [pytest.param(name, marks=() if name == "avx2" else pytest.mark.product) for name in MACHINES],
)
def test_bits_are_those_of_every_other_cpu(machine: str) -> None:
    cpu, features, kind = MACHINES[machine]
    supported = machine_features()
    if not {name.strip("+") for name in features.split(",") if "prefer" not in name} <= supported:
        pytest.skip("this CPU lacks what the other one has")
    without_numpy = "AVX2 FMA3 AVX512F AVX512CD AVX512_SKX" if machine == "avx2" else ""
    found = run_as(cpu, features, NPY_DISABLE_CPU_FEATURES=without_numpy)
    assert found == {"kind": kind, "digests": json.loads(GOLDEN.read_text())}


@pytest.mark.skipif(os.uname().machine != "x86_64", reason="names of x86-64 CPUs")
def test_a_cpu_without_fused_multiply_adds_is_refused() -> None:
    found = run_as("nehalem", "+sse,+sse2,+sse3,+ssse3,+sse4.1,+sse4.2")
    assert found == {"refused": "integers: expected a CPU with fused multiply-adds (FMA), found none"}


def test_kinds_of_instructions() -> None:
    assert dot_kind(frozenset({"fma", "avx2", "avxvnni", "avx512f", "avx512vnni"})) == "vnni512"
    assert dot_kind(frozenset({"fma", "avx2", "avxvnni"})) == "vnni256"
    assert dot_kind(frozenset({"fma", "avx2", "avx512f"})) == "avx2"
    assert dot_kind(frozenset({"neon"})) == "plain"
    assert set(DOTS) == {"vnni512", "vnni256", "avx2", "plain"}


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_row_keeps_its_bits_among_others_and_with_any_threads(name: str) -> None:
    case, x = matrix(*LAYOUTS[name]), activations(263)
    threads = get_num_threads()
    try:
        set_num_threads(1)
        together = multiply(case, x)
    finally:
        set_num_threads(threads)
    assert torch.equal(multiply(case, x), together)
    for count in (1, 2, 3, 4, 5, 8, 31, 64, 241):
        start = count % 7
        assert torch.equal(multiply(case, x[start : start + count].contiguous()), together[start : start + count])


def test_values_are_near_float64() -> None:
    for layout in LAYOUTS.values():
        case, x = matrix(*layout), fractions((9, INPUTS), 19, 7)
        expected = x.double() @ case.values().double().t()
        error = (multiply(case, x).double() - expected).norm() / expected.norm()
        assert float(error) < 0.01


def test_parts_of_other_layouts_are_one_weight() -> None:
    cases = [matrix(*LAYOUTS[name], outputs=count) for name, count in zip(LAYOUTS, (5, 32, 33, 64, 7), strict=True)]
    bias = fractions((sum(case.codes.shape[0] for case in cases),), 20, 8)
    w = IntegerWeight(tuple(map(pack_integers, cases)), bias, INPUTS, IntegerScheme.STORED)
    x = activations(6)
    found = integer_linear(x, w, torch.empty(6, w.out_features))
    starts = np.cumsum([0, *(case.codes.shape[0] for case in cases)])
    for case, start, stop in zip(cases, starts, starts[1:], strict=False):
        assert torch.equal(found[:, start:stop], multiply(case, x, bias[start:stop].clone()))
    assert w.nbytes == sum(int(tensor.nbytes) for tensor in w.tensors)


def four_times_as_wide(rows: torch.Tensor) -> torch.Tensor:
    return torch.cat([rows, rows.flip(0), rows.roll(2, 0), rows.roll(5, 0)], 1)


@pytest.mark.parametrize("name", LAYOUTS)
def test_leaves_are_added_as_a_tree_by_however_many_workers(name: str) -> None:
    case, x, bias = matrix(*LAYOUTS[name]), four_times_as_wide(activations()), fractions((OUTPUTS,), 20, 9)
    minimum = None if case.minimum is None else four_times_as_wide(case.minimum)
    case = GroupedIntegers(four_times_as_wide(case.codes), four_times_as_wide(case.scale), minimum)
    depth = x.shape[1]

    def packed(own: range, leaves: int) -> IntegerWeight:
        return pack_integer_linear([case.inputs(own)], bias, IntegerScheme.STORED, leaves)

    def partial(own: range, leaves: int) -> torch.Tensor:
        part = x[:, own.start : own.stop].contiguous()
        return partial_integer_linear(part, packed(own, leaves), torch.empty(len(x), OUTPUTS))

    def shares(count: int) -> list[range]:
        return [range(start, start + depth // count) for start in range(0, depth, depth // count)]

    whole = packed(range(depth), 8)
    assert whole.out_features == OUTPUTS
    found = integer_linear(x, whole, torch.empty(len(x), OUTPUTS))
    a, b, c, d, e, f, g, h = (partial(own, 1) for own in shares(8))
    assert torch.equal(found, ((a + b) + (c + d)) + ((e + f) + (g + h)) + bias)
    for workers in (1, 2, 4, 8):
        partials = torch.stack([partial(own, 8 // workers) for own in shares(workers)])
        assert torch.equal(sum_integer_partials(partials, whole, torch.empty_like(found)), found), workers
    assert not torch.equal(integer_linear(x, packed(range(depth), 1), torch.empty_like(found)), found)  # control
    with pytest.raises(ValueError, match="leaves of a multiple of 32, found 4 of K = 192"):
        packed(range(INPUTS), 4)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_value_that_is_not_finite_spoils_its_own_row(value: float) -> None:
    case, x = matrix(*LAYOUTS["4 bits, minima"]), activations()
    clean = multiply(case, x)
    x[2, 77] = value
    found = multiply(case, x)
    assert bool(found[2].isnan().all())
    assert torch.equal(found[[0, 1, 3, 4, 5, 6]], clean[[0, 1, 3, 4, 5, 6]])


@pytest.mark.parametrize("exponent", range(-149, -140))
def test_the_smallest_floats_do_not_overflow(exponent: int) -> None:
    """Their scale is rounded to a multiple of the smallest, so that a quotient may be beyond 127."""
    case, x = matrix(*LAYOUTS["8 bits, groups of 32"], outputs=32), torch.zeros(1, INPUTS)
    x[0, :32] = torch.linspace(-190, 190, 32).round() * 2.0**-149 * 2.0 ** (exponent + 149)
    assert torch.equal(multiply(case, x), contract(case, x))


def test_four_bits_are_used_where_the_codes_allow() -> None:
    def bits(least: int, most: int) -> tuple[int, int]:
        codes = torch.tensor([[least, most] * 16], dtype=torch.int8)
        part = pack_integers(GroupedIntegers(codes, torch.ones(1, 1)))
        return part.layout.bits, part.layout.offset

    assert [bits(0, 15), bits(-8, 7), bits(-9, 7), bits(-1, 8), bits(0, 16)] == [
        (4, 0), (4, 8), (8, 128), (8, 128), (8, 128)
    ]  # fmt: skip


def test_sizes_that_do_not_fit_are_named() -> None:
    codes = torch.zeros((4, 48), dtype=torch.int8)
    with pytest.raises(ValueError, match=r"groups of \(16, 32\) in blocks of 32, found 16 of 48"):
        pack_integers(GroupedIntegers(codes, torch.ones(4, 3)))
    w = IntegerWeight((pack_integers(matrix(*LAYOUTS["4 bits, signed"])),), None, INPUTS, IntegerScheme.STORED)
    with pytest.raises(ValueError, match=rf"do not fit a weight of {OUTPUTS} x {INPUTS}"):
        integer_linear(torch.zeros(2, 32), w, torch.zeros(2, OUTPUTS))
