"""Random mixtures of experts for tests of the GPU's kernels on any device. T rows, E experts, K experts a row."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from sempre.kernels.fp8 import Fp8Scheme, quantize_channels
from sempre.kernels.linear import GpuLinearWeight
from sempre.kernels.moe import (
    ExpertScratch,
    ExpertShape,
    ExpertWeights,
    GatedExperts,
    expert_scratch,
    route,
    stack_like,
)

ODD = ExpertShape(5, 3, 96, 48)
"""of 5 experts, 3"""


@dataclass
class Mixture:
    """Experts, a router's logits and rows of activations."""

    shape: ExpertShape
    dtype: torch.dtype
    device: str
    rows: int
    scheme: Fp8Scheme | None = None

    def __post_init__(self) -> None:
        experts, _, hidden, inner = self.shape
        self.generator = torch.Generator(self.device).manual_seed(experts * 1000 + hidden)
        self.x = self._random(self.rows, hidden).to(self.dtype)
        self.logits = self._random(self.rows, experts) * 2.0
        # the last expert is nobody's
        self.logits[:, -1] -= 100.0
        self.gate_up = self._experts(2 * inner, hidden)
        self.down = self._experts(hidden, inner)
        self.experts = GatedExperts(self.gate_up, self.down)
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
        if self.scheme is None:
            return GpuLinearWeight(values.to(self.dtype), None)
        quantized = quantize_channels(values)
        return GpuLinearWeight(quantized.values, None, scale=quantized.scale, scheme=self.scheme)

    def scratch_for(self, rows: int) -> ExpertScratch:
        """Full of what may not be read."""

        def allocate(role: str, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
            return torch.full(shape, float("nan") if dtype.is_floating_point else -(1 << 20), dtype=dtype).to(
                self.device
            )

        return expert_scratch(allocate, self.shape, rows, self.dtype)

    def run(self, first: int, end: int, **changes: Any) -> torch.Tensor:
        """Rows [first, end) in one step."""
        from sempre.kernels.moe import gpu

        values = {"x": self.x, "logits": self.logits} | changes
        x, logits = (values[name][first:end].contiguous() for name in ("x", "logits"))
        out = torch.full((end - first, self.shape.hidden_size), float("nan"), dtype=self.dtype, device=self.device)
        return gpu.sparse_mlp(x, logits, self.experts, self.scratch, out, renormalize=True)

    def expert(self, weights: ExpertWeights, expert: int) -> GpuLinearWeight:
        """One of them as an ordinary weight."""
        scale = weights.scale[expert] if weights.scale is not None else None
        return GpuLinearWeight(weights.weight[expert], None, scale=scale, scheme=weights.scheme)

    def one_by_one(self) -> torch.Tensor:
        """The same by the ordinary kernels, each expert on its own rows."""
        from sempre.kernels.linear import gpu as linear_gpu
        from sempre.kernels.moe import gpu

        experts, weights = self.scratch.experts[: self.rows], self.scratch.weights[: self.rows]
        gpu.route(self.logits, experts, weights, renormalize=True)
        parts = torch.full((*experts.shape, self.shape.hidden_size), float("nan"), device=self.device)
        for expert in range(self.shape.num_experts):
            row, rank = (experts == expert).nonzero(as_tuple=True)
            if len(row):
                gate_up, down = self.expert(self.gate_up, expert), self.expert(self.down, expert)
                both = torch.empty(len(row), gate_up.out_features, dtype=self.dtype, device=self.device)
                activated = torch.empty(len(row), down.in_features, dtype=self.dtype, device=self.device)
                linear_gpu.linear_silu_and_mul(self.x[row].contiguous(), gate_up, both, activated)
                out = torch.empty(len(row), down.out_features, device=self.device)
                parts[row, rank] = linear_gpu.linear(activated, down, out)
        return gpu.combine(parts, weights.contiguous(), torch.empty_like(self.x))


def check_route(device: str) -> None:
    """Experts and weights are those of the CPU, ties and rows that are not finite included."""
    from sempre.kernels.moe import gpu

    for rows, experts, k in ((1, 1, 1), (1, 5, 3), (33, 128, 8), (3, 4, 4), (9, 60, 6)):
        for renormalize in (True, False):
            logits = torch.randn(rows, experts, generator=torch.Generator().manual_seed(experts)) * 3.0
            logits[0, : experts // 2 + 1] = 1.5
            expected, expected_weights = route(logits, k, renormalize=renormalize)
            chosen = torch.empty(rows, k, dtype=torch.int32, device=device)
            weights = torch.empty(rows, k, device=device)
            gpu.route(logits.to(device), chosen, weights, renormalize=renormalize)
            assert torch.equal(chosen.cpu().long(), expected)
            assert ((weights.cpu() - expected_weights) / expected_weights).abs().max() < 1e-6
            alone = torch.empty(1, k, device=device)
            gpu.route(logits[-1:].to(device), torch.empty_like(chosen[:1]), alone, renormalize=renormalize)
            assert torch.equal(alone[0], weights[-1])
    for wrong in (float("nan"), float("inf"), float("-inf")):
        logits = torch.randn(3, 6, generator=torch.Generator().manual_seed(1))
        logits[1, 4] = wrong
        chosen, weights = torch.empty(3, 2, dtype=torch.int32, device=device), torch.empty(3, 2, device=device)
        gpu.route(logits.to(device), chosen, weights, renormalize=True)
        assert weights[1].isnan().all()
        assert weights[[0, 2]].isfinite().all()
        assert ((chosen >= 0) & (chosen < 6)).all()


def check_sort(device: str, cases: tuple[tuple[int, int, int, int], ...]) -> None:
    """(rows, experts, experts a row, pairs of a tile): the order is that of a stable sort, and the tiles cover it."""
    from sempre.kernels.moe import gpu

    for rows, num_experts, k, rows_of_tile in cases:
        generator = torch.Generator().manual_seed(rows * num_experts)
        # the upper experts are rare, the last is nobody's
        odds = torch.rand(rows, num_experts, generator=generator) * torch.linspace(1.0, 0.0, num_experts)
        experts = odds.topk(k).indices.to(torch.int32)
        shape = ExpertShape(num_experts, k, 16, 16)
        mixture_scratch = expert_scratch(
            lambda role, size, dtype: torch.full(size, -7, dtype=dtype, device=device), shape, rows, torch.float32
        )
        most = gpu.sort_pairs(experts.to(device), num_experts, mixture_scratch, rows_of_tile)
        flat = experts.view(-1)
        assert torch.equal(mixture_scratch.order.cpu().long(), flat.argsort(stable=True))
        tiles = mixture_scratch.tiles.cpu()[: 3 * most].view(3, most)
        counts = torch.bincount(flat, minlength=num_experts).tolist()
        expected, start = [], 0
        for expert, count in enumerate(counts):
            expected += [(expert, start + i, start + count) for i in range(0, count, rows_of_tile)]
            start += count
        assert [tuple(tile) for tile in tiles[:, : len(expected)].T.tolist()] == expected
        assert (tiles[0, len(expected) :] == -1).all()
