"""Random mixtures of experts for tests of the GPU's kernels on any device. T rows, E experts, K experts a row."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import torch

from sempre.kernels.activation import Activation
from sempre.kernels.fp8 import Fp8Scheme, quantize_channels
from sempre.kernels.linear import GpuLinearWeight
from sempre.kernels.moe import (
    ExpertScratch,
    ExpertShape,
    ExpertWeights,
    GatedExperts,
    SigmoidScores,
    expert_scratch,
    route,
    stack_like,
)

ODD = ExpertShape(5, 3, 96, 48)
"""of 5 experts, 3"""


# rows, experts, experts a row, groups, kept groups
SCORED = [(1, 5, 3, 1, 1), (7, 8, 2, 4, 2), (33, 128, 8, 1, 1), (9, 60, 6, 6, 3), (3, 4, 4, 2, 2), (5, 10, 2, 5, 1)]


def scores_of(num_experts: int, groups: int, kept: int) -> SigmoidScores:
    bias = torch.randn(num_experts, generator=torch.Generator().manual_seed(num_experts)) * 0.3
    return SigmoidScores(bias, groups, kept, 2.5)


def expected_choice(
    logits: torch.Tensor, k: int, scores: SigmoidScores, *, renormalize: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Experts and weights in float64."""
    values = logits.double().sigmoid()
    wanted = values + scores.bias.double()
    groups = wanted.view(len(logits), scores.num_groups, -1)
    kept = groups.topk(min(2, groups.shape[2]), -1).values.sum(-1).topk(scores.kept_groups, -1).indices
    closed = torch.ones(groups.shape[:2], dtype=torch.bool).scatter(1, kept, False)
    experts = groups.masked_fill(closed[:, :, None], float("-inf")).flatten(1).topk(k).indices
    weights = values.gather(1, experts)
    if renormalize:
        weights = weights / weights.sum(-1, keepdim=True)
    return experts, weights * scores.scale


@dataclass
class Mixture:
    """Experts, a router's logits and rows of activations."""

    shape: ExpertShape
    dtype: torch.dtype
    device: str
    rows: int
    scheme: Fp8Scheme | None = None
    activation: Activation = Activation.SILU
    """clamped: the linear layers have biases"""

    def __post_init__(self) -> None:
        experts, _, hidden, inner = self.shape
        self.generator = torch.Generator(self.device).manual_seed(experts * 1000 + hidden)
        self.x = self._random(self.rows, hidden).to(self.dtype)
        self.logits = self._random(self.rows, experts) * 2.0
        # no row chooses the last expert
        self.logits[:, -1] -= 100.0
        self.gate_up = self._experts(2 * inner, hidden)
        self.down = self._experts(hidden, inner)
        self.experts = GatedExperts(self.gate_up, self.down, self.activation)
        self.scratch = self.scratch_for(self.rows)

    def _random(self, *shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=self.generator, device=self.device)

    def _experts(self, columns: int, depth: int) -> ExpertWeights:
        weights = [self._weight(self._random(columns, depth) * depth**-0.5) for _ in range(self.shape.num_experts)]
        stacked = stack_like(weights[0], len(weights))
        for expert, weight in enumerate(weights):
            stacked.put(expert, weight)
        return stacked

    def _weight(self, values: torch.Tensor) -> GpuLinearWeight:
        bias = None
        if self.activation is Activation.CLAMPED:
            # some of the activations are clamped
            bias = self._random(len(values)).to(self.dtype) * 5.0
        if self.scheme is None:
            return GpuLinearWeight(values.to(self.dtype), bias)
        quantized = quantize_channels(values)
        return GpuLinearWeight(quantized.values, bias, scale=quantized.scale, scheme=self.scheme)

    def scratch_for(self, rows: int) -> ExpertScratch:
        """Full of what may not be read."""

        def allocate(role: str, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
            return torch.full(shape, float("nan") if dtype.is_floating_point else -(1 << 20), dtype=dtype).to(
                self.device
            )

        return expert_scratch(allocate, self.shape, rows, self.dtype)

    def run(self, first: int, end: int, factors: torch.Tensor | None = None, **changes: Any) -> torch.Tensor:
        """Rows [first, end) in one step."""
        from sempre.kernels.moe import gpu

        values = {"x": self.x, "logits": self.logits} | changes
        x, logits = (values[name][first:end].contiguous() for name in ("x", "logits"))
        out = torch.full((end - first, self.shape.hidden_size), float("nan"), dtype=self.dtype, device=self.device)
        experts = self.experts._replace(factors=factors)
        return gpu.sparse_mlp(x, logits, experts, self.scratch, out, renormalize=True)

    def expert(self, weights: ExpertWeights, expert: int) -> GpuLinearWeight:
        """One of them as an ordinary weight."""
        scale = weights.scale[expert] if weights.scale is not None else None
        bias = weights.bias[expert] if weights.bias is not None else None
        return GpuLinearWeight(weights.weight[expert], bias, scale=scale, scheme=weights.scheme)

    def one_by_one(self) -> torch.Tensor:
        """The same by the ordinary kernels, each expert on its own rows."""
        from sempre.kernels.linear import gpu as linear_gpu
        from sempre.kernels.moe import gpu
        from sempre.kernels.moe.gpu_dispatch import dispatch

        dispatch(self.logits, self.scratch, 16, renormalize=True)
        experts, weights = self.scratch.experts[: self.rows], self.scratch.weights[: self.rows]
        parts = torch.full((*experts.shape, self.shape.hidden_size), float("nan"), device=self.device)
        for expert in range(self.shape.num_experts):
            row, rank = (experts == expert).nonzero(as_tuple=True)
            if len(row):
                gate_up, down = self.expert(self.gate_up, expert), self.expert(self.down, expert)
                both = torch.empty(len(row), gate_up.out_features, dtype=self.dtype, device=self.device)
                activated = torch.empty(len(row), down.in_features, dtype=self.dtype, device=self.device)
                linear_gpu.gated_linear(self.x[row].contiguous(), gate_up, both, activated, self.activation)
                out = torch.empty(len(row), down.out_features, device=self.device)
                parts[row, rank] = linear_gpu.linear(activated, down, out)
        return gpu.combine(parts, weights.contiguous(), torch.empty_like(self.x))


def dispatched(
    device: str, logits: torch.Tensor, k: int, rows_of_tile: int, *, renormalize: bool = True
) -> ExpertScratch:
    """What becomes of the logits; on the CPU."""
    from sempre.kernels.moe.gpu_dispatch import dispatch

    scratch = expert_scratch(
        lambda role, size, dtype: torch.full(size, -7, dtype=dtype, device=device),
        ExpertShape(logits.shape[1], k, 16, 16),
        logits.shape[0],
        torch.float32,
    )
    dispatch(logits.to(device), scratch, rows_of_tile, renormalize=renormalize)
    return ExpertScratch(*(getattr(scratch, field.name).cpu() for field in fields(scratch)))


def check_route(device: str) -> None:
    """Experts and weights are those of the CPU, ties and rows that are not finite included."""
    for rows, experts, k in ((1, 1, 1), (1, 5, 3), (33, 128, 8), (3, 4, 4), (9, 60, 6)):
        for renormalize in (True, False):
            logits = torch.randn(rows, experts, generator=torch.Generator().manual_seed(experts)) * 3.0
            logits[0, : experts // 2 + 1] = 1.5
            expected, expected_weights = route(logits, k, renormalize=renormalize)
            found = dispatched(device, logits, k, 16, renormalize=renormalize)
            assert torch.equal(found.experts.long(), expected)
            assert ((found.weights - expected_weights) / expected_weights).abs().max() < 1e-6
            alone = dispatched(device, logits[-1:], k, 16, renormalize=renormalize)
            assert torch.equal(alone.weights[0], found.weights[-1])
    for wrong in (float("nan"), float("inf"), float("-inf")):
        logits = torch.randn(3, 6, generator=torch.Generator().manual_seed(1))
        logits[1, 4] = wrong
        found = dispatched(device, logits, 2, 16)
        assert found.weights[1].isnan().all()
        assert found.weights[[0, 2]].isfinite().all()
        assert ((found.experts >= 0) & (found.experts < 6)).all()


def check_scores(device: str) -> None:
    """Experts and weights by sigmoid scores are those of the CPU; ties, and rows that are not finite."""
    from sempre.kernels.moe.gpu_dispatch import dispatch
    from sempre.kernels.moe.gpu_scores import preferences, weigh

    def found(logits: torch.Tensor, k: int, scores: SigmoidScores, renormalize: bool) -> list[torch.Tensor]:
        shape = ExpertShape(logits.shape[1], k, 16, 16)
        scratch = expert_scratch(
            lambda role, size, dtype: torch.full(size, -7, dtype=dtype, device=device),
            shape,
            len(logits),
            torch.float32,
        )
        on_device, moved = logits.to(device), scores._replace(bias=scores.bias.to(device))
        dispatch(preferences(on_device, moved), scratch, 16, renormalize=renormalize)
        weigh(on_device, scratch, moved, renormalize=renormalize)
        return [scratch.experts.cpu().long(), scratch.weights.cpu()]

    for rows, experts, k, groups, kept in SCORED:
        logits = torch.randn(rows, experts, generator=torch.Generator().manual_seed(experts)) * 3.0
        for scores in (scores_of(experts, groups, kept), SigmoidScores(torch.zeros(experts), groups, kept, 1.0)):
            for renormalize in (True, False):
                if not scores.bias.any():
                    logits[0] = 1.5
                expected, expected_weights = route(logits, k, renormalize=renormalize, scores=scores)
                chosen, weights = found(logits, k, scores, renormalize)
                assert torch.equal(chosen, expected)
                assert ((weights - expected_weights) / expected_weights).abs().max() < 1e-6
                alone = found(logits[-1:].clone(), k, scores, renormalize)
                assert torch.equal(alone[1][0], weights[-1])
    for wrong in (float("nan"), float("inf"), float("-inf")):
        logits = torch.randn(3, 6, generator=torch.Generator().manual_seed(1))
        logits[1, 4] = wrong
        chosen, weights = found(logits, 2, scores_of(6, 3, 2), True)
        assert weights[1].isnan().all()
        assert weights[[0, 2]].isfinite().all()
        assert ((chosen >= 0) & (chosen < 6)).all()


def check_factors(device: str) -> None:
    """Factors of the weights have the bits of experts whose results are as much larger."""
    mixture = Mixture(ODD, torch.float32, device, 9)
    factors = 2.0 ** (torch.arange(ODD.num_experts, device=device) % 3 - 1)
    plain, found = mixture.run(0, 9).clone(), mixture.run(0, 9, factors).clone()
    alone = [mixture.run(row, row + 1, factors)[0].clone() for row in range(9)]
    mixture.down.weight.mul_(factors[:, None, None])
    assert torch.equal(found, mixture.run(0, 9))
    assert not torch.equal(found, plain)
    torch.testing.assert_close(torch.stack(alone), found, rtol=0, atol=1e-4)


def check_shared(device: str) -> None:
    """Rows of the shared expert, with and without gates, are those of float64, and their own."""
    from sempre.kernels.moe.gpu_scores import add_shared

    for rows, width in ((1, 16), (5, 96), (3, 2064)):
        generator = torch.Generator().manual_seed(rows)
        out, shared = (torch.randn(rows, width, generator=generator).to(device) for _ in range(2))
        gate = (torch.randn(rows, 1, generator=generator) * 30.0).to(device)
        assert torch.equal(add_shared(out.clone(), shared, None), out + shared)
        together = add_shared(out.clone(), shared, gate)
        expected = out.double() + gate.double().sigmoid() * shared.double()
        assert (together - expected).norm() / expected.norm() < 1e-7
        assert torch.equal(add_shared(out[-1:].clone(), shared[-1:], gate[-1:])[0], together[-1])


def check_sort(device: str, cases: tuple[tuple[int, int, int, int], ...]) -> None:
    """(rows, experts, experts a row, pairs of a tile): the order is that of a stable sort, and the tiles cover it."""
    from sempre.kernels.moe.gpu_dispatch import most_tiles

    for rows, num_experts, k, rows_of_tile in cases:
        generator = torch.Generator().manual_seed(rows * num_experts)
        # the upper experts are rare, and nobody chooses the last one where there are others
        odds = torch.rand(rows, num_experts, generator=generator) * torch.linspace(1.0, 0.0, num_experts)
        found = dispatched(device, odds, k, rows_of_tile)
        flat = odds.topk(k).indices.view(-1)
        assert torch.equal(found.experts.view(-1).long(), flat)
        assert torch.equal(found.order.long(), flat.argsort(stable=True))
        most = most_tiles(rows * k, num_experts, rows_of_tile)
        tiles = found.tiles[: 3 * most].view(3, most)
        expected, start = [], 0
        for expert, count in enumerate(torch.bincount(flat, minlength=num_experts).tolist()):
            expected += [(expert, start + i, start + count) for i in range(0, count, rows_of_tile)]
            start += count
        assert [tuple(tile) for tile in tiles[:, : len(expected)].T.tolist()] == expected
        assert (tiles[0, len(expected) :] == -1).all()
