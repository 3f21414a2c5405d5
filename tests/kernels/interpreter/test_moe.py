"""The kernels of a mixture of experts in Triton's interpreter."""

from __future__ import annotations

import pytest
import torch
from moe_cases import ODD, Mixture, check_factors, check_route, check_scores, check_shared, check_sort

from sempre.kernels.activation import Activation
from sempre.kernels.fp8 import FP8, Fp8Scheme
from sempre.kernels.moe import ExpertShape, combine

# rounding of the activations between the two matmuls
ROUNDING = {torch.float32: 1e-6, torch.float16: 1e-3}


def test_route() -> None:
    check_route("cpu")


def test_sigmoid_scores() -> None:
    check_scores("cpu")


def test_factors_of_weights() -> None:
    check_factors("cpu")


def test_shared_expert() -> None:
    check_shared("cpu")


def test_sort() -> None:
    check_sort("cpu", ((1, 5, 3, 16), (7, 5, 3, 16), (40, 128, 8, 16), (100, 6, 6, 64), (33, 300, 2, 8)))


def test_parts_are_added_as_on_a_cpu() -> None:
    """With equal bits."""
    from sempre.kernels.moe import gpu

    generator = torch.Generator().manual_seed(2)
    parts, weights = torch.randn(7, 5, 1100, generator=generator), torch.rand(7, 5, generator=generator)
    assert torch.equal(gpu.combine(parts, weights, torch.empty(7, 1100)), combine(parts, weights, torch.empty(7, 1100)))


@pytest.mark.parametrize("activation", list(Activation), ids=str)
@pytest.mark.parametrize("scheme", [None, *Fp8Scheme], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_experts_are_those_of_the_ordinary_matmuls(
    dtype: torch.dtype, scheme: Fp8Scheme | None, activation: Activation, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sempre.kernels.fp8 import gpu as fp8_gpu
    from sempre.kernels.linear import gpu as linear_gpu
    from sempre.kernels.moe import gpu as moe_gpu

    def quantize_rows(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return fp8_gpu.quantize_rows(x, torch.empty_like(x, dtype=FP8), torch.empty(x.shape[0]))

    for module in (linear_gpu, moe_gpu):
        monkeypatch.setattr(module, "quantize_rows", quantize_rows)
    mixture = Mixture(ODD, dtype, "cpu", 21, scheme, activation)
    expected = mixture.one_by_one().float()
    found = mixture.run(0, 21).float()
    # where the previous matmuls round differently, an fp8 value may be its neighbour
    allowed = 0.05 if scheme is Fp8Scheme.WEIGHTS_AND_ACTIVATIONS else ROUNDING[dtype]
    assert (found - expected).norm() / expected.norm() < allowed
    assert not torch.equal(found, mixture.run(0, 21, logits=mixture.logits.flip(1)).float())


def test_an_expert_that_nobody_chooses_is_not_read() -> None:
    mixture = Mixture(ODD, torch.float32, "cpu", 4)
    expected = mixture.run(0, 4).clone()
    mixture.gate_up.weight[-1] = float("nan")
    mixture.down.weight[-1] = float("nan")
    assert torch.equal(mixture.run(0, 4), expected)
    assert torch.isfinite(expected).all()


def test_one_row_and_many_experts() -> None:
    mixture = Mixture(ExpertShape(40, 8, 64, 32), torch.float32, "cpu", 9)
    together = mixture.run(0, 9).clone()
    for row in (0, 8):
        torch.testing.assert_close(mixture.run(row, row + 1)[0], together[row], rtol=0, atol=1e-5)
