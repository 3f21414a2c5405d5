"""Activations, soft caps: values against float64, a row alone and among others, ragged widths, NaN and infinities."""

from __future__ import annotations

import math

import kernel_reference as reference
import pytest
import torch

from sempre.kernels.activation import clamped_and_mul, gate, gelu_and_mul, gelu_mul, soft_cap


def spread(*shape: int) -> torch.Tensor:
    """Values over many magnitudes, of both signs."""
    generator = torch.Generator().manual_seed(sum(shape))
    exponents = torch.rand(shape, generator=generator) * 12 - 9
    return torch.randn(shape, generator=generator).sign() * 10.0**exponents


@pytest.mark.parametrize(("rows", "width"), [(1, 16), (7, 48), (300, 112)])
def test_gelu_is_that_of_float64(rows: int, width: int) -> None:
    gate_up = spread(rows, 2 * width)
    found = gelu_and_mul(gate_up, torch.empty(rows, width)).double()
    gate, up = gate_up.double().chunk(2, -1)
    expected = torch.nn.functional.gelu(gate, approximate="tanh") * up
    # 1 + tanh cancels for negative gates: the error is one of the gate, not of the result
    assert ((found - expected).abs() <= 4e-7 * (gate * up).abs() + 1e-37).all()
    for row in range(0, rows, 29):
        alone = gelu_and_mul(gate_up[row : row + 1].clone(), torch.empty(1, width))
        assert torch.equal(alone[0].double(), found[row])


@pytest.mark.parametrize(("rows", "width"), [(1, 16), (7, 48), (300, 112)])
def test_clamped_is_that_of_float64(rows: int, width: int) -> None:
    gate_up = torch.cat([spread(rows, width), torch.randn(rows, width, generator=torch.Generator().manual_seed(1)) * 6])
    gate_up = gate_up.view(rows, 2 * width)
    found = clamped_and_mul(gate_up, torch.empty(rows, width)).double()
    expected = reference.clamped_and_mul(gate_up)
    # up + 1 is rounded once
    assert ((found - expected).abs() <= 4e-7 * expected.abs() + 1e-7 * gate_up[:, :width].abs().clamp(max=7.0)).all()
    for row in range(0, rows, 29):
        alone = clamped_and_mul(gate_up[row : row + 1].clone(), torch.empty(1, width))
        assert torch.equal(alone[0].double(), found[row])


@pytest.mark.parametrize(("rows", "width"), [(1, 1), (3, 15), (5, 16), (4, 33), (70, 320)])
@pytest.mark.parametrize("cap", [1.0, 3.0, 50.0])
def test_soft_cap_is_that_of_float64(rows: int, width: int, cap: float) -> None:
    x = spread(rows, width)
    found = soft_cap(x.clone(), cap)
    expected = cap * torch.tanh(x.double() / cap)
    assert ((found - expected).abs() <= 4e-7 * expected.abs()).all()
    # the same bits at another place of another row
    shifted = torch.cat([x.new_zeros(rows, 5), x], dim=1)
    assert torch.equal(soft_cap(shifted, cap)[:, 5:], found)


def test_what_is_not_finite() -> None:
    x = torch.tensor([[float("nan"), float("inf"), float("-inf"), 0.0, -0.0, 1e30, -1e30]])
    found = soft_cap(x.clone(), 2.0)
    assert found[0, 0].isnan()
    assert found[0, 1:].tolist() == [2.0, -2.0, 0.0, -0.0, 2.0, -2.0]
    gate_up = torch.ones(1, 32)
    gate_up[0, 3] = float("nan")
    activated = gelu_and_mul(gate_up, torch.empty(1, 16))
    assert activated.isnan()[0].tolist() == [index == 3 for index in range(16)]
    gate_up[0, 16], gate_up[0, 17:20] = float("nan"), torch.tensor([float("inf"), float("-inf"), 1e30])
    gate_up[0, 4] = float("inf")
    clamped = clamped_and_mul(gate_up, torch.empty(1, 16))[0]
    assert clamped.isnan().nonzero().view(-1).tolist() == [0, 3]
    assert clamped[4] == pytest.approx(14.0 / (1.0 + math.exp(-7.0 * 1.702)), rel=1e-6)


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="a cap above 0, found 0"):
        soft_cap(torch.zeros(1, 4), 0.0)
    with pytest.raises(ValueError, match="gelu_and_mul: expected a width that is a multiple of 16, found 8"):
        gelu_and_mul(torch.zeros(1, 16), torch.empty(1, 8))
    with pytest.raises(ValueError, match="clamped_and_mul: expected a width that is a multiple of 16, found 8"):
        clamped_and_mul(torch.zeros(1, 16), torch.empty(1, 8))
    with pytest.raises(ValueError, match="does not fit an output"):
        gelu_and_mul(torch.zeros(1, 16), torch.empty(1, 16))


def test_gelu_of_two_tensors_has_the_bits_of_one() -> None:
    gate_up, wide = rows_of(9, 96) * 3.0, rows_of(9, 160)
    gate, up = gate_up.chunk(2, dim=1)
    wide[:, 64:112] = up
    expected = gelu_and_mul(gate_up, torch.empty(9, 48))
    found = gelu_mul(gate.contiguous(), wide[:, 64:112], torch.empty(9, 48))
    assert torch.equal(found, expected)
    alone = gelu_mul(gate[4:5].contiguous(), wide[4:5, 64:112], torch.empty(1, 48))
    assert torch.equal(alone[0], found[4])
    assert not torch.equal(gelu_mul(gate.contiguous(), wide[:, 48:96], torch.empty(9, 48)), expected)
    with pytest.raises(ValueError, match=r"gelu_mul: gate .* do not fit an output"):
        gelu_mul(torch.zeros(1, 16), torch.zeros(1, 32), torch.empty(1, 16))
    with pytest.raises(ValueError, match="gelu_mul: expected a width that is a multiple of 16, found 8"):
        gelu_mul(torch.zeros(1, 8), torch.zeros(1, 8), torch.empty(1, 8))


def rows_of(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


@pytest.mark.parametrize(("rows", "width"), [(1, 16), (7, 48), (300, 112)])
def test_gate_is_that_of_float64(rows: int, width: int) -> None:
    x, gates = torch.randn(rows, width, generator=torch.Generator().manual_seed(2)), spread(rows, width)
    found = gate(x.clone(), gates)
    expected = x.double() * gates.double().sigmoid()
    assert ((found - expected).abs() <= 4e-7 * expected.abs() + 1e-37).all()
    for row in range(0, rows, 29):
        assert torch.equal(gate(x[row : row + 1].clone(), gates[row : row + 1].clone())[0], found[row])


def test_a_gate_that_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="gate: expected a width that is a multiple of 16, found 24"):
        gate(torch.zeros(2, 24), torch.zeros(2, 24))
    with pytest.raises(ValueError, match=r"gate: gates \(2, 16\) do not fit x \(2, 32\)"):
        gate(torch.zeros(2, 32), torch.zeros(2, 16))
