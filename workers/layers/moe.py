"""Mixture of experts.

# T rows, E experts, K experts a row, H hidden size
"""

from __future__ import annotations

from dataclasses import replace

import torch

from sempre.kernels.moe import combine, route
from sempre.workers.layers.linear import Linear
from sempre.workers.layers.mlp import GatedMLP
from sempre.workers.layers.module import Build, Module, Scratch, require_cpu
from sempre.workers.quantization.plain import NotQuantized


class SparseMLP(Module):
    """The experts of each row's greatest router logits, weighted and added in the router's order (`kernels.moe`).

    Rows of an expert are computed in the order of the tokens; every linear works on one row at a time, so a row's bits
    do not depend on who shares its experts. No expert has a capacity, and no row is dropped.
    """

    def __init__(
        self,
        build: Build,
        hidden_size: int,
        intermediate_size: int,
        *,
        num_experts: int,
        experts_per_token: int,
        renormalize: bool,
    ) -> None:
        # the router is small and decides much: no format but floats
        unquantized = replace(build, quantization=NotQuantized())
        self.gate = Linear(unquantized, {"gate": num_experts}, hidden_size, role="router")
        self.experts = [GatedMLP(build, hidden_size, intermediate_size) for _ in range(num_experts)]
        self._width = hidden_size
        self._experts_per_token = experts_per_token
        self._renormalize = renormalize

    def allocate(self, scratch: Scratch) -> None:
        """Raises ModelError where it cannot be computed."""
        require_cpu(scratch, "num_experts", "a mixture of experts")
        self._out = scratch.rows("branch", self._width)
        self._parts = scratch.rows("expert_rows", self._experts_per_token * self._width)

    def shape(self) -> tuple[object, ...]:
        return (len(self.experts), self._experts_per_token, self._renormalize)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """[T, H] → [T, H]"""
        count, k = x.shape[0], self._experts_per_token
        out = self._out[:count]
        if not count:
            return out
        experts, weights = route(self.gate(x), k, renormalize=self._renormalize)
        parts = self._parts[:count].view(count * k, self._width)
        # places are token by token; the sort is stable, so each expert's stay in that order
        places = experts.view(-1).argsort(stable=True)
        start = 0
        for expert, num_rows in enumerate(torch.bincount(experts.view(-1), minlength=len(self.experts)).tolist()):
            if num_rows:
                own = places[start : start + num_rows]
                parts.index_copy_(0, own, self.experts[expert](x.index_select(0, own // k)))
                start += num_rows
        return combine(parts.view(count, k, self._width), weights, out)
