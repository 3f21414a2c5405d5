"""Norms, activation and embedding: one row at a time, against float64, and bitwise alone or among others."""

from __future__ import annotations

import kernel_reference as reference
import pytest
import torch

from sempre.kernels.activation import silu_and_mul
from sempre.kernels.dtypes import dtype_code, widen
from sempre.kernels.embedding import embed
from sempre.kernels.norms import add_rms_norm, rms_norm, rms_norm_of_parts

WIDTHS = [16, 64, 576, 4096]


def _random(*shape: int, scale: float = 1.0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape))) * scale


@pytest.mark.parametrize("width", WIDTHS)
def test_rms_norm(width: int) -> None:
    x, weight = _random(300, width, scale=3.0), _random(width)
    out = rms_norm(x, weight, 1e-5, torch.full_like(x, float("nan")))
    expected = reference.rms_norm(x, weight, 1e-5)
    assert (out - expected).norm() / expected.norm() < 2e-7
    for i in (0, 7, 299):
        assert torch.equal(rms_norm(x[i : i + 1], weight, 1e-5, torch.empty(1, width))[0], out[i])


@pytest.mark.parametrize("width", WIDTHS)
def test_add_rms_norm(width: int) -> None:
    x, residual, weight = _random(300, width), _random(300, width, scale=2.0), _random(width)
    total = residual.clone()
    out = add_rms_norm(x, total, weight, 1e-6, torch.full_like(x, float("nan")))
    assert torch.equal(total, residual + x)
    assert torch.equal(out, rms_norm(total, weight, 1e-6, torch.empty_like(x)))


@pytest.mark.parametrize("widths", [(64, 16, 16), (576, 192, 192), (4096, 4096, 0)])
def test_rms_norm_of_parts(widths: tuple[int, int, int]) -> None:
    rows = _random(300, sum(widths), scale=3.0)
    parts, (first, second) = rows.split(widths, dim=1), [_random(width) for width in widths[:2]]
    expected = [
        rms_norm(part.contiguous(), weight, 1e-5, torch.empty(300, len(weight)))
        for part, weight in zip(parts, (first, second), strict=False)
    ]
    lone = rms_norm_of_parts(rows[299:].clone(), first, second, 1e-5)
    found = rms_norm_of_parts(rows.clone(), first, second, 1e-5)
    assert torch.equal(found, torch.cat([*expected, parts[2]], dim=1))
    assert torch.equal(found[299:], lone)
    with pytest.raises(ValueError, match="do not fit rows"):
        rms_norm_of_parts(rows[:, :32].contiguous(), first, second, 1e-5)


@pytest.mark.parametrize("width", WIDTHS)
def test_silu_and_mul(width: int) -> None:
    gate_up = _random(70, 2 * width, scale=12.0)
    gate_up[0, :4] = torch.tensor([0.0, -1e4, 1e4, -88.5])
    out = silu_and_mul(gate_up, torch.full((70, width), float("nan")))
    expected = reference.silu_and_mul(gate_up)
    assert torch.isfinite(out).all()
    assert (out - expected).norm() / expected.norm() < 2e-7
    for i in (0, 69):
        assert torch.equal(silu_and_mul(gate_up[i : i + 1], torch.empty(1, width))[0], out[i])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_embedding_widens_exactly(dtype: torch.dtype) -> None:
    table = _random(100, 64).to(dtype)
    ids = torch.tensor([99, 0, 5, 5])
    assert torch.equal(embed(ids, table, torch.empty(4, 64)), table[ids].float())
    with pytest.raises(IndexError, match=r"token ids 0\.\.100 are outside a table of 100 rows"):
        embed(torch.tensor([0, 100]), table, torch.empty(2, 64))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_widening_keeps_every_bit_pattern(dtype: torch.dtype) -> None:
    patterns = torch.arange(65536, dtype=torch.int32).to(torch.int16)
    values = patterns.view(dtype)
    out = torch.empty(65536)
    widen(values.data_ptr(), out.data_ptr(), 65536, dtype_code(dtype))
    numbers = ~values.isnan()
    assert torch.equal(out[numbers], values[numbers].float())
    assert out[~numbers].isnan().all()
