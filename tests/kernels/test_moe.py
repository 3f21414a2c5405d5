"""Routing and combining: values against float64, ties, rows alone and among others, and what cannot be computed."""

from __future__ import annotations

import pytest
import torch

from sempre.kernels.moe import combine, route

SHAPES = [(1, 1, 1), (1, 5, 3), (7, 8, 2), (33, 128, 8), (3, 4, 4)]


def logits_of(rows: int, experts: int) -> torch.Tensor:
    return torch.randn(rows, experts, generator=torch.Generator().manual_seed(experts)) * 3.0


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("renormalize", [True, False])
def test_weights_are_those_of_float64(shape: tuple[int, int, int], renormalize: bool) -> None:
    rows, num_experts, k = shape
    logits = logits_of(rows, num_experts)
    experts, weights = route(logits, k, renormalize=renormalize)
    best = logits.double().softmax(-1).topk(k)
    expected = best.values / best.values.sum(-1, keepdim=True) if renormalize else best.values
    assert torch.equal(experts, best.indices)
    assert ((weights - expected) / expected).abs().max() < 1e-6


def test_ties_go_to_the_lower_expert() -> None:
    experts, weights = route(torch.tensor([[1.0, 2.0, 2.0, 2.0, 0.0], [0.0, 0.0, 0.0, 0.0, 0.0]]), 3, renormalize=True)
    assert experts.tolist() == [[1, 2, 3], [0, 1, 2]]
    assert (weights == weights[:, :1]).all()


@pytest.mark.parametrize("shape", SHAPES)
def test_a_row_alone_has_its_bits(shape: tuple[int, int, int]) -> None:
    rows, num_experts, k = shape
    logits = logits_of(rows, num_experts)
    experts, weights = route(logits, k, renormalize=True)
    parts = torch.randn(rows, k, 600, generator=torch.Generator().manual_seed(1))
    together = combine(parts, weights, torch.empty(rows, 600))
    for row in range(rows):
        lone = route(logits[row : row + 1].clone(), k, renormalize=True)
        assert torch.equal(lone[0][0], experts[row])
        assert torch.equal(lone[1][0], weights[row])
        alone = combine(parts[row : row + 1].clone(), weights[row : row + 1].clone(), torch.empty(1, 600))
        assert torch.equal(alone[0], together[row])


def test_parts_are_added_in_rank_order() -> None:
    parts = torch.randn(40, 8, 64, generator=torch.Generator().manual_seed(2))
    weights = torch.rand(40, 8, generator=torch.Generator().manual_seed(3))
    expected = parts[:, 0] * weights[:, :1]
    for k in range(1, 8):
        expected = expected + parts[:, k] * weights[:, k : k + 1]
    assert torch.equal(combine(parts, weights, torch.empty(40, 64)), expected)
    backwards = combine(parts.flip(1).contiguous(), weights.flip(1).contiguous(), torch.empty(40, 64))
    assert not torch.equal(backwards, expected)


@pytest.mark.parametrize("wrong", [float("nan"), float("inf"), float("-inf")])
def test_a_row_that_is_not_finite_spoils_itself_alone(wrong: float) -> None:
    logits = logits_of(3, 6)
    expected = route(logits, 2, renormalize=True)[1]
    logits[1, 4] = wrong
    experts, weights = route(logits, 2, renormalize=True)
    assert weights[1].isnan().all()
    assert torch.equal(weights[[0, 2]], expected[[0, 2]])
    assert ((experts >= 0) & (experts < 6)).all()


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="route: expected 1 to 4 experts a row, found 5"):
        route(logits_of(2, 4), 5, renormalize=True)
    with pytest.raises(ValueError, match="do not fit parts"):
        combine(torch.zeros(2, 3, 16), torch.zeros(2, 2), torch.empty(2, 16))
