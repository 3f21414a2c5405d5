"""Routing and combining: values against float64, ties, rows alone and among others, and what cannot be computed."""

from __future__ import annotations

import pytest
import torch
from moe_cases import SCORED, expected_choice, scores_of

from sempre.kernels.moe import add_shared, combine, route

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


@pytest.mark.parametrize("case", SCORED)
@pytest.mark.parametrize("renormalize", [True, False])
def test_sigmoid_scores_are_those_of_float64(case: tuple[int, int, int, int, int], renormalize: bool) -> None:
    rows, num_experts, k, groups, kept = case
    logits, scores = logits_of(rows, num_experts), scores_of(num_experts, groups, kept)
    experts, weights = route(logits, k, renormalize=renormalize, scores=scores)
    expected, expected_weights = expected_choice(logits, k, scores, renormalize=renormalize)
    assert torch.equal(experts, expected)
    assert ((weights - expected_weights) / expected_weights).abs().max() < 1e-6
    alone = route(logits[-1:].clone(), k, renormalize=renormalize, scores=scores)
    assert torch.equal(alone[0][0], experts[-1])
    assert torch.equal(alone[1][0], weights[-1])


def test_of_equal_scores_and_groups_the_lower_is_first() -> None:
    scores = scores_of(8, 4, 2)._replace(bias=torch.zeros(8))
    assert route(torch.zeros(1, 8), 3, renormalize=True, scores=scores)[0].tolist() == [[0, 1, 2]]
    later = torch.tensor([[0.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 2.0]])
    assert route(later, 3, renormalize=True, scores=scores)[0].tolist() == [[7, 4, 5]]


def test_the_bias_chooses_and_does_not_weigh() -> None:
    scores = scores_of(4, 1, 1)._replace(bias=torch.tensor([0.0, 5.0, 0.0, -5.0]), scale=1.0)
    experts, weights = route(torch.tensor([[1.0, -1.0, 0.0, 9.0]]), 2, renormalize=False, scores=scores)
    assert experts.tolist() == [[1, 0]]
    torch.testing.assert_close(weights, torch.tensor([[-1.0, 1.0]]).sigmoid())


@pytest.mark.parametrize("wrong", [float("nan"), float("inf"), float("-inf")])
def test_scores_of_a_row_that_is_not_finite_spoil_it_alone(wrong: float) -> None:
    logits, scores = logits_of(3, 6), scores_of(6, 3, 2)
    expected = route(logits, 2, renormalize=True, scores=scores)[1]
    logits[1, 4] = wrong
    experts, weights = route(logits, 2, renormalize=True, scores=scores)
    assert weights[1].isnan().all()
    assert torch.equal(weights[[0, 2]], expected[[0, 2]])
    assert ((experts >= 0) & (experts < 6)).all()


@pytest.mark.parametrize("rows", [1, 7, 40])
def test_the_expert_of_every_row(rows: int) -> None:
    generator = torch.Generator().manual_seed(6)
    out, shared = torch.randn(rows, 600, generator=generator), torch.randn(rows, 600, generator=generator)
    gate = torch.randn(rows, 1, generator=generator) * 30.0
    assert torch.equal(add_shared(out.clone(), shared), out + shared)
    together = add_shared(out.clone(), shared, gate)
    expected = out.double() + gate.double().sigmoid() * shared.double()
    assert (together - expected).norm() / expected.norm() < 1e-7
    alone = add_shared(out[-1:].clone(), shared[-1:].clone(), gate[-1:].clone())
    assert torch.equal(alone[0], together[-1])


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="route: expected 1 to 4 experts a row, found 5"):
        route(logits_of(2, 8), 5, renormalize=True, scores=scores_of(8, 4, 2))
    with pytest.raises(ValueError, match="add_shared"):
        add_shared(torch.zeros(2, 16), torch.zeros(2, 16), torch.zeros(2, 2))
    with pytest.raises(ValueError, match="route: expected 1 to 4 experts a row, found 5"):
        route(logits_of(2, 4), 5, renormalize=True)
    with pytest.raises(ValueError, match="do not fit parts"):
        combine(torch.zeros(2, 3, 16), torch.zeros(2, 2), torch.empty(2, 16))
