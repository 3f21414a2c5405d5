"""Mixture of experts.

# T rows, E experts, K experts a row, H hidden size
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch

from sempre.ipc.errors import ConfigError, ModelError
from sempre.kernels.activation import Activation
from sempre.kernels.moe import (
    ExpertRows,
    ExpertScratch,
    ExpertShape,
    GatedExperts,
    GroupedExperts,
    SigmoidScores,
    combine,
    expert_parts,
    expert_scratch,
    route,
    scale_weights,
    sparse_mlp,
)
from sempre.workers.layers.expert_linear import ExpertLinear, StackedExpertLinear
from sempre.workers.layers.linear import Linear, Use
from sempre.workers.layers.module import Build, Module, RowBuffer, Scratch, Tensors
from sempre.workers.parallel import Exchange, WrittenRows, pieces
from sempre.workers.quantization.plain import NotQuantized
from sempre.workers.tensor_source import Parameter


class ExpertNames(NamedTuple):
    """Names of an expert's linear layers in the checkpoint."""

    gate: str = "gate_proj"
    up: str = "up_proj"
    down: str = "down_proj"


USUAL_NAMES = ExpertNames()


class Experts(Module):
    """Gated feed-forward branches of one shape, side by side."""

    def __init__(self, gate_up: ExpertLinear, down: ExpertLinear, experts_per_row: int) -> None:
        self.gate_up_proj = gate_up
        self.down_proj = down
        self.down_proj.rows_of_token = experts_per_row

    def allocate(self, scratch: Scratch) -> None:
        gate_up, down = self.gate_up_proj, self.down_proj
        if not self.are_grouped:
            self._activated = scratch.rows("activated", down.in_features)
            return
        k = down.rows_of_token
        self._gate_up_rows = scratch.rows("experts' gate_up", k * gate_up.out_features)
        self._activated_rows = scratch.rows("experts' activated", k * down.in_features)

    @property
    def are_grouped(self) -> bool:
        """Whether one call computes all, on a CPU; known once the linear layers are allocated."""
        return self.gate_up_proj.group is not None and self.down_proj.group is not None

    @property
    def stacked(self) -> GatedExperts:
        """The layout on a GPU."""
        gate_up, down = self.gate_up_proj.stacked, self.down_proj.stacked
        assert gate_up is not None
        assert down is not None
        assert self.gate_up_proj.activation is not None
        return GatedExperts(gate_up, down, self.gate_up_proj.activation)

    @property
    def own(self) -> range:
        """The experts that this rank has."""
        return self.down_proj.own

    @property
    def multiplications(self) -> int:
        """For one row of hidden states, in all of its experts."""
        expert = self.gate_up_proj.multiplications + self.down_proj.multiplications
        return expert * self.down_proj.rows_of_token

    def parts(self, x: torch.Tensor, experts: torch.Tensor, parts: torch.Tensor) -> None:
        """Into parts [T, K, H]: for rows x [T, H] the branches of those of their `experts` [T, K] that this rank has;
        on a CPU, where they are grouped."""
        gate_up, down = self.gate_up_proj.group, self.down_proj.group
        assert gate_up is not None
        assert down is not None
        assert self.gate_up_proj.activation is not None
        count, pairs = x.shape[0], experts.numel()
        rows = ExpertRows(
            self._gate_up_rows.first(count).view(pairs, gate_up.out_features),
            self._activated_rows.first(count).view(pairs, down.in_features),
        )
        grouped = GroupedExperts(gate_up, down, self.gate_up_proj.activation, self.own.start)
        expert_parts(x, experts, grouped, rows, parts)

    def of(self, expert: int, x: torch.Tensor) -> torch.Tensor:
        """One expert's branch for rows [T, H] on a CPU."""
        activated = self.gate_up_proj.gated_of(expert, x, self._activated.first(x.shape[0]))
        return self.down_proj.of(expert, activated)


def experts_by_name(
    build: Build, shape: ExpertShape, names: ExpertNames = USUAL_NAMES, activation: Activation = Activation.SILU
) -> Experts:
    """Each with tensors of its own."""
    count, hidden, inner = shape.num_experts, shape.hidden_size, shape.intermediate_size
    parts = {names.gate: inner, names.up: inner}
    gate_up = ExpertLinear(build, count, parts, hidden, role="gate_up", activation=activation)
    return Experts(gate_up, ExpertLinear(build, count, {names.down: hidden}, inner), shape.experts_per_row)


def stacked_experts(build: Build, shape: ExpertShape, activation: Activation) -> Experts:
    """All in the same tensors, with biases; outputs of gates and of the other half take turns."""
    count, hidden, inner = shape.num_experts, shape.hidden_size, shape.intermediate_size
    halves = (*range(0, 2 * inner, 2), *range(1, 2 * inner, 2))
    gate_up = StackedExpertLinear(build, count, "gate_up_proj", halves, hidden, role="gate_up", activation=activation)
    down = StackedExpertLinear(build, count, "down_proj", range(hidden), inner)
    return Experts(gate_up, down, shape.experts_per_row)


@dataclass(frozen=True)
class ExpertChoice:
    """By which scores a row's experts are chosen, other than softmax (`kernels.moe.SigmoidScores`)."""

    num_groups: int
    kept_groups: int
    scale: float


class Router(Linear):
    """Decides on experts, by float32 logits. It is small and its errors matter: floats only."""

    def __init__(self, build: Build, name: str, num_experts: int, hidden_size: int, *, bias: bool = False) -> None:
        unquantized = replace(build, quantization=NotQuantized())
        super().__init__(unquantized, {name: num_experts}, hidden_size, bias=bias, use=Use.ROUTER)

    def allocate(self, scratch: Scratch) -> None:
        logits = scratch.tensor("router", (scratch.max_tokens, self.out_features), torch.float32)
        self._out = RowBuffer(logits)


class CorrectedRouter(Router):
    """With a bias that corrects the choice."""

    correction: torch.Tensor
    """float32 [E]"""

    def own_parameters(self, path: str) -> Iterator[tuple[str, Parameter]]:
        yield from super().own_parameters(path)
        yield path + ".e_score_correction_bias", Parameter((self.out_features,), initial="zeros")

    def load(self, path: str, tensors: Tensors) -> None:
        super().load(path, tensors)
        self.correction = tensors.read(path + ".e_score_correction_bias").to(torch.float32, copy=True)

    def own_tensors(self) -> Iterator[torch.Tensor]:
        yield from super().own_tensors()
        yield self.correction


class SparseMLP(Module):
    """The experts with each row's largest router logits, weighted and added in the router's order (`kernels.moe`).

    Rows of an expert are computed in the order of the tokens; every linear works on one row at a time, so a row's bits
    do not depend on who shares its experts. No expert has a capacity, and no row is dropped.
    """

    factors: torch.Tensor | None = None
    """float32 [E]: of the weights of the experts, beyond those by their logits"""

    def __init__(
        self,
        build: Build,
        shape: ExpertShape,
        *,
        renormalize: bool,
        names: ExpertNames = USUAL_NAMES,
        choice: ExpertChoice | None = None,
        parts: tuple[Router, Experts] | None = None,
    ) -> None:
        """`parts`: of a family that stores them otherwise."""
        if parts is None:
            router = Router if choice is None else CorrectedRouter
            gate = router(build, "gate", shape.num_experts, shape.hidden_size)
            parts = gate, experts_by_name(build, shape, names)
        self.gate, self.experts = parts
        self._exchange = build.parallel.exchange
        if build.parallel.devices is not None:
            raise ConfigError(
                f"tensor_parallel_size: expected 1 on GPUs for a model with experts, found {build.parallel.size}."
                " Use data_parallel_size, or device='cpu'.",
                parameter="tensor_parallel_size",
                value=build.parallel.size,
            )
        self.sizes = shape
        self.renormalize = renormalize
        self.choice = choice
        self._scratch: ExpertScratch | None = None

    def allocate(self, scratch: Scratch) -> None:
        """Raises ModelError for more experts than a GPU's kernels support."""
        shape, rows = self.sizes, scratch.max_tokens
        self._out = scratch.rows("branch", shape.hidden_size)
        if self.experts.down_proj.stacked is not None:
            try:
                self._scratch = expert_scratch(scratch.tensor, shape, rows, scratch.activations)
            except ValueError as error:
                raise ModelError(f"config.json: num_experts_per_tok: {error}.") from error
        else:
            self._parts = scratch.rows("expert parts", shape.experts_per_row * shape.hidden_size)

    def shape(self) -> tuple[object, ...]:
        return (self.sizes, self.renormalize, self.choice)

    @property
    def _scores(self) -> SigmoidScores | None:
        if self.choice is None or not isinstance(self.gate, CorrectedRouter):
            return None
        return SigmoidScores(self.gate.correction, self.choice.num_groups, self.choice.kept_groups, self.choice.scale)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """[T, H] → [T, H]"""
        return self.mix(x, self.gate(x))

    def mix(self, x: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        """The same, with experts by these logits [T, E]."""
        out = self._out.first(x.shape[0])
        if self._scratch is None:
            return self._on_cpu(x, logits, out)
        return sparse_mlp(
            x,
            logits,
            self.experts.stacked._replace(factors=self.factors),
            self._scratch,
            out,
            renormalize=self.renormalize,
            scores=self._scores,
        )

    def _on_cpu(self, x: torch.Tensor, logits: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        (count, width), k = x.shape, self.sizes.experts_per_row
        experts, weights = route(logits, k, renormalize=self.renormalize, scores=self._scores)
        if self.factors is not None:
            scale_weights(weights, experts, self.factors)
        parts = self._parts.first(count).view(count, k, width)
        if self.experts.are_grouped:
            self.experts.parts(x, experts, parts)
        else:
            self._one_by_one(x, experts, parts.view(count * k, width))
        if self._exchange is not None:
            return self._combine_over_ranks(self._exchange, parts, experts, weights, out)
        return combine(parts, weights, out)

    def _one_by_one(self, x: torch.Tensor, experts: torch.Tensor, parts: torch.Tensor) -> None:
        """Expert by expert, into parts [T K, H]: weights that are not all alike, of integers, or the control's."""
        # pairs are ordered by token; the sort is stable, so each expert's rows stay in that order
        places = experts.view(-1).argsort(stable=True)
        tokens = places // experts.shape[1]
        start = 0
        for expert, num_rows in enumerate(torch.bincount(experts.view(-1), minlength=self.sizes.num_experts).tolist()):
            if num_rows and expert in self.experts.own:
                own = slice(start, start + num_rows)
                parts.index_copy_(0, places[own], self.experts.of(expert, x.index_select(0, tokens[own])))
            start += num_rows

    def _combine_over_ranks(
        self,
        exchange: Exchange,
        parts: torch.Tensor,
        experts: torch.Tensor,
        weights: torch.Tensor,
        out: torch.Tensor,
    ) -> torch.Tensor:
        """Of `parts` [T, K, H] each rank has the rows of its own experts; all get all of them."""
        count, k, width = parts.shape
        own = self.experts.own
        for rows in pieces(exchange, count, k * width):
            shared = exchange.slots(rows.stop - rows.start, k * width)[0].view(-1, width)
            chosen = experts[rows].reshape(-1)
            places = ((chosen >= own.start) & (chosen < own.stop)).nonzero().view(-1)
            shared.index_copy_(0, places, parts[rows].reshape(-1, width).index_select(0, places))
            exchange.wait(WrittenRows(shared, places))
            combine(shared.view(-1, k, width), weights[rows], out[rows])
        return out
