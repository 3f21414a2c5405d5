"""Quantisation to fp8 and matmuls with fp8 weights: the documented rule, accuracy, invariance, and a control."""

from __future__ import annotations

import kernel_reference as reference
import pytest
import torch
from matmul_order import product_in_order

from sempre.kernels.fp8 import FP8, SMALLEST_SCALE, Fp8Scheme, quantize_channels, quantize_rows
from sempre.kernels.linear import control_linear, control_pack_fp8, gated_linear, linear, pack_fp8_linear

SCHEMES = list(Fp8Scheme)
SHAPES = [(64, 64), (576, 960), (112, 33), (16, 1)]  # (K, N)
ROWS = [1, 2, 3, 4, 5, 8, 12, 13, 23, 24, 33, 100, 239, 240, 241, 300]


def rows_of_every_size(count: int, width: int) -> torch.Tensor:
    """Activations whose rows differ in size by many orders of magnitude, with zeros, and tiny elements beside large."""
    generator = torch.Generator().manual_seed(count + width)
    x = torch.randn(count, width, generator=generator) * torch.logspace(-20, 20, count)[:, None]
    x[1::7] *= torch.logspace(-6, 0, width)
    x[::5, ::3] = 0.0
    return x


def by_torch(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The documented rule with the library's conversion, values widened."""
    scale = (x.abs().amax(1) / 448.0).clamp_min(SMALLEST_SCALE)
    return (x / scale[:, None]).to(FP8).float(), scale


def case(depth: int, columns: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(depth * 1000 + columns)
    x = torch.randn(300, depth, generator=generator) * torch.logspace(-2, 2, 300)[:, None]
    weight = torch.randn(columns, depth, generator=generator) * torch.logspace(-3, 0, columns)[:, None]
    quantized = quantize_channels(weight)
    return x, quantized.values, quantized.scale, torch.randn(columns, generator=generator)


def product(x: torch.Tensor, packed: object) -> torch.Tensor:
    return linear(x, packed, torch.full((x.shape[0], packed.out_features), float("nan")))


def test_rows_follow_the_documented_rule() -> None:
    x = rows_of_every_size(200, 576)
    x[9] = 0.0
    values, scale = quantize_rows(x)
    expected_values, expected_scale = by_torch(x)
    assert torch.equal(scale, expected_scale)
    assert torch.equal(values, expected_values)
    assert scale[9] == SMALLEST_SCALE
    assert (values.abs().amax(1)[100:] == 448.0).all()


def test_every_tie_goes_to_even_and_every_value_stays() -> None:
    """All fp8 values, the midpoints between neighbours, and the float32 values beside those."""
    finite = torch.arange(0, 0x7F, dtype=torch.uint8).view(FP8).float()
    middle = (finite[1:] + finite[:-1]) / 2
    up, down = (torch.nextafter(middle, torch.tensor(limit)) for limit in (1e9, -1e9))
    x = torch.cat([finite, middle, up, down])
    x = torch.cat([x, -x, torch.zeros(-2 * x.numel() % 16)])
    x = x[None].contiguous()
    values, scale = quantize_rows(x)
    assert scale.item() == 1.0
    assert torch.equal(values[0], x[0].to(FP8).float())


def test_a_row_is_quantized_alike_in_every_batch() -> None:
    x = rows_of_every_size(100, 512)
    values, scale = quantize_rows(x)
    for row in (0, 1, 50, 99):
        alone, alone_scale = quantize_rows(x[row : row + 1])
        assert torch.equal(alone[0], values[row])
        assert torch.equal(alone_scale[0], scale[row])


def test_control_one_scale_for_the_batch_changes_rows() -> None:
    """The check above can fail: with one scale for the whole batch, a row's values depend on its neighbours."""
    x = case(576, 1)[0]
    quantized, scale = quantize_rows(x)
    whole = x.abs().amax() / 448.0
    assert not torch.equal((x / whole).to(FP8).float() * whole, quantized * scale[:, None])


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_a_bad_row_stays_alone(poison: float) -> None:
    x, values, scale, _ = case(64, 64)
    packed = pack_fp8_linear(values, scale, None, Fp8Scheme.WEIGHTS_AND_ACTIVATIONS)
    good = product(x, packed)
    x[7, 3] = poison
    found = product(x, packed)
    assert found[7].isnan().all()
    others = torch.arange(300) != 7
    assert torch.equal(found[others], good[others])


def test_row_lengths_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="multiple of 16, found 20"):
        quantize_rows(torch.ones(2, 20))


def test_channels_have_scales_of_their_own() -> None:
    weight = rows_of_every_size(90, 64)
    values, scale = quantize_channels(weight)
    expected_values, expected_scale = by_torch(weight)
    assert values.dtype == FP8
    assert torch.equal(values.float(), expected_values)
    assert torch.equal(scale, expected_scale)


@pytest.mark.parametrize("scheme", SCHEMES, ids=lambda scheme: scheme.value)
@pytest.mark.parametrize(("depth", "columns"), SHAPES)
def test_rows_do_not_depend_on_their_number_or_place(depth: int, columns: int, scheme: Fp8Scheme) -> None:
    x, values, scale, bias = case(depth, columns)
    packed = pack_fp8_linear(values, scale, bias, scheme)
    alone = torch.cat([product(x[i : i + 1], packed) for i in range(300)])
    for rows in ROWS:
        for start in {0, 1, (300 - rows) // 2, 300 - rows}:
            if start + rows <= 300:
                assert torch.equal(product(x[start : start + rows], packed), alone[start : start + rows])


@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize("scheme", SCHEMES, ids=lambda scheme: scheme.value)
@pytest.mark.parametrize(("depth", "columns"), SHAPES)
def test_accuracy_against_float64(depth: int, columns: int, scheme: Fp8Scheme, bias: bool) -> None:
    x, values, scale, vector = case(depth, columns)
    packed = pack_fp8_linear(values, scale, vector if bias else None, scheme)
    taken = x.double()
    if scheme is Fp8Scheme.WEIGHTS_AND_ACTIVATIONS:
        rows, row_scale = by_torch(x)
        taken = rows.double() * row_scale.double()[:, None]
    expected = reference.linear(taken, values.double() * scale.double()[:, None], vector if bias else None)
    assert (product(x, packed) - expected).norm() / expected.norm() < 1e-6


def test_order_of_operations() -> None:
    """Chains of fused multiply-adds, then the row's scale, then the channel's, then the bias, bit for bit."""
    x, values, scale, bias = case(112, 33)
    rows, row_scale = by_torch(x)
    total = product_in_order(rows.numpy(), values.float().numpy())
    expected = (torch.from_numpy(total) * row_scale[:, None]) * scale + bias
    assert torch.equal(product(x, pack_fp8_linear(values, scale, bias, Fp8Scheme.WEIGHTS_AND_ACTIVATIONS)), expected)


def test_every_fp8_value_is_widened_exactly() -> None:
    """Each finite fp8 value as a weight, picked out by a row of the identity."""
    codes = torch.arange(256, dtype=torch.uint8)
    finite = codes[(codes & 0x7F) != 0x7F].view(FP8)
    values = torch.zeros(16, 256).to(FP8)
    values[3, : finite.numel()] = finite
    packed = pack_fp8_linear(values, torch.ones(16), None, Fp8Scheme.WEIGHTS)
    for rows in (1, 2, 4, 8, 12, 256):
        found = product(torch.eye(256)[:rows].contiguous(), packed)
        assert torch.equal(found[:, 3], values[3, :rows].float())
    assert packed.nbytes == 32 * 256 + 16 * 4


@pytest.mark.parametrize("scheme", SCHEMES, ids=lambda scheme: scheme.value)
def test_matmul_then_activation(scheme: Fp8Scheme) -> None:
    x, values, scale, _ = case(64, 64)
    packed = pack_fp8_linear(values, scale, None, scheme)
    out = gated_linear(x, packed, torch.empty(300, 64), torch.empty(300, 32))
    expected = reference.silu_and_mul(product(x, packed))
    assert (out - expected).norm() / expected.norm() < 1e-6


def test_control_the_ordinary_matmul_depends_on_the_number_of_rows() -> None:
    differing = 0
    for scheme in SCHEMES:
        x, values, scale, _ = case(576, 960)
        packed = control_pack_fp8(values, scale, None, scheme)
        full = control_linear(x, packed, torch.empty(300, 960))
        differing += sum(int((control_linear(x[:n], packed, torch.empty(n, 960)) != full[:n]).sum()) for n in (1, 2, 4))
    assert differing > 0
