"""GPU norms, activation and embedding: against float64, and bitwise alone or among others."""

from __future__ import annotations

import kernel_reference as reference
import pytest
import torch

from sempre.kernels.activation import clamped_and_mul, gelu_and_mul, silu_and_mul, soft_cap
from sempre.kernels.embedding import embed
from sempre.kernels.norms import add_rms_norm, rms_norm

pytestmark = pytest.mark.gpu

WIDTHS = [16, 100, 576, 1024, 4096, 5120, 12288]
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
ROUNDING = {torch.float32: 1e-6, torch.float16: 4e-4, torch.bfloat16: 3e-3}


def _random(*shape: int, dtype: torch.dtype, scale: float = 1.0) -> torch.Tensor:
    generator = torch.Generator("cuda").manual_seed(sum(shape))
    return (torch.randn(*shape, generator=generator, device="cuda") * scale).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", WIDTHS)
def test_norms(width: int, dtype: torch.dtype) -> None:
    x, residual, weight = (_random(*shape, dtype=dtype, scale=2.0) for shape in ((300, width), (301, width), (width,)))
    residual = residual[:300].contiguous()
    out = rms_norm(x, weight, 1e-5, torch.full_like(x, float("nan")))
    expected = reference.rms_norm(x, weight, 1e-5)
    assert (out - expected).norm() / expected.norm() < ROUNDING[dtype]
    total = residual.clone()
    added = add_rms_norm(x, total, weight, 1e-5, torch.full_like(x, float("nan")))
    assert torch.equal(total, (residual.float() + x.float()).to(dtype))
    assert torch.equal(added, rms_norm(total, weight, 1e-5, torch.empty_like(x)))
    for i in (0, 7, 299):
        assert torch.equal(rms_norm(x[i : i + 1], weight, 1e-5, torch.empty_like(x[:1]))[0], out[i])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", WIDTHS)
def test_silu_and_mul(width: int, dtype: torch.dtype) -> None:
    gate_up = _random(70, 2 * width, dtype=dtype, scale=12.0)
    gate_up[0, :4] = torch.tensor([0.0, -1e4, 1e4, -88.5])
    gate_up[0, width : width + 4] = torch.tensor([1.0, 2.0, 0.5, -3.0])
    out = silu_and_mul(gate_up, torch.full((70, width), float("nan"), device="cuda", dtype=dtype))
    expected = reference.silu_and_mul(gate_up)
    assert torch.isfinite(out).all()
    assert (out - expected).norm() / expected.norm() < ROUNDING[dtype]
    for i in (0, 69):
        assert torch.equal(silu_and_mul(gate_up[i : i + 1], torch.empty_like(out[:1]))[0], out[i])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_embedding(dtype: torch.dtype) -> None:
    table = _random(1000, 1536, dtype=dtype)
    ids = torch.tensor([999, 0, 5, 5, 1000, -1], device="cuda")
    out = embed(ids, table, torch.empty(6, 1536, device="cuda", dtype=dtype))
    assert torch.equal(out[:4], table[ids[:4]])
    assert out[4:].isnan().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", WIDTHS)
def test_gelu_and_mul(width: int, dtype: torch.dtype) -> None:
    gate_up = _random(70, 2 * width, dtype=dtype, scale=3.0)
    gate_up[0, :4] = torch.tensor([0.0, -100.0, 100.0, 1e-4])
    gate_up[0, width : width + 4] = torch.tensor([1.0, 2.0, 0.5, -3.0])
    out = gelu_and_mul(gate_up, torch.full((70, width), float("nan"), device="cuda", dtype=dtype))
    gate, up = gate_up.double().chunk(2, dim=-1)
    expected = torch.nn.functional.gelu(gate, approximate="tanh") * up
    assert torch.isfinite(out).all()
    assert (out - expected).norm() / expected.norm() < ROUNDING[dtype]
    for i in (0, 69):
        assert torch.equal(gelu_and_mul(gate_up[i : i + 1], torch.empty_like(out[:1]))[0], out[i])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", WIDTHS)
def test_clamped_and_mul(width: int, dtype: torch.dtype) -> None:
    gate_up = _random(70, 2 * width, dtype=dtype, scale=6.0)
    gate_up[0, :4] = torch.tensor([0.0, -100.0, 100.0, 1e-4])
    out = clamped_and_mul(gate_up, torch.full((70, width), float("nan"), device="cuda", dtype=dtype))
    expected = reference.clamped_and_mul(gate_up)
    assert torch.isfinite(out).all()
    assert (out - expected).norm() / expected.norm() < ROUNDING[dtype]
    for i in (0, 69):
        assert torch.equal(clamped_and_mul(gate_up[i : i + 1], torch.empty_like(out[:1]))[0], out[i])
    gate_up[1, 0], gate_up[2, width] = float("nan"), float("nan")
    assert clamped_and_mul(gate_up, out).isnan().nonzero().tolist() == [[1, 0], [2, 0]]


@pytest.mark.parametrize("cap", [1.0, 30.0])
@pytest.mark.parametrize("width", WIDTHS)
def test_soft_cap(width: int, cap: float) -> None:
    """Also relative to each element: near 0 the cap changes nothing."""
    x = torch.cat(
        [_random(40, width, dtype=torch.float32, scale=3.0 * cap), _random(30, width, dtype=torch.float32) * 1e-6]
    )
    x[0, :3] = torch.tensor([0.0, 1e30, -1e30])
    expected = cap * torch.tanh(x.double() / cap)
    out = soft_cap(x.clone(), cap)
    assert (out - expected).norm() / expected.norm() < 1e-6
    assert torch.equal(out == 0, x == 0)
    nonzero = x != 0
    assert ((out[nonzero] - expected[nonzero]) / expected[nonzero]).abs().max() < 1e-6
    for i in (0, 69):
        assert torch.equal(soft_cap(x[i : i + 1].clone(), cap)[0], out[i])
    x[1, 0] = float("nan")
    assert soft_cap(x, cap).isnan().sum() == 1
