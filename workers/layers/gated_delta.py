"""A gated delta layer, with its projections (`kernels.gated_delta`).

# T tokens, S rows that are read, H hidden size, V value heads, C channels of the convolution
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

from sempre.kernels.gated_delta import DeltaHeads, DeltaWeights, gated_delta
from sempre.kernels.states import LayerState
from sempre.workers.layers.linear import HeadsLinear, Linear, Use
from sempre.workers.layers.module import Build, Module, RowBuffer, Scratch, Tensors
from sempre.workers.quantization.plain import NotQuantized
from sempre.workers.steps import StepInput
from sempre.workers.tensor_source import Parameter


@dataclass(frozen=True)
class DeltaShape:
    """What may differ between two layers."""

    hidden_size: int
    heads: DeltaHeads
    eps: float
    """of the norm of each head's result"""
    grouped: bool = False
    """whether the checkpoint has the projections of a key head, and of its value heads, side by side"""


class GatedDelta(Module):
    """Updates the states of the step's requests; returns only the rows that are read."""

    weights: DeltaWeights

    def __init__(self, build: Build, shape: DeltaShape) -> None:
        heads = shape.heads
        self._shape = shape
        qkvz = {"in_proj_qkv": heads.channels, "in_proj_z": heads.values}
        ba = {"in_proj_b": heads.num_value_heads, "in_proj_a": heads.num_value_heads}
        if shape.grouped:
            qkvz, ba = {"in_proj_qkvz": sum(qkvz.values())}, {"in_proj_ba": sum(ba.values())}
        self.in_proj_qkvz = HeadsLinear(build, qkvz, shape.hidden_size, role="delta")
        # they are small and their errors add up over a sequence: floats only, with float32 results
        floats = replace(build, quantization=NotQuantized())
        self.in_proj_ba = HeadsLinear(floats, ba, shape.hidden_size, use=Use.ROUTER)
        if shape.grouped:
            group = heads.num_value_heads // heads.num_key_heads
            values = group * heads.value_dim
            _ungroup(self.in_proj_qkvz, heads.num_key_heads, (heads.key_dim, heads.key_dim, values, values))
            _ungroup(self.in_proj_ba, heads.num_key_heads, (group, group))
        self.out_proj = Linear(build, {"out_proj": shape.hidden_size}, heads.values)

    def own_parameters(self, path: str) -> Iterator[tuple[str, Parameter]]:
        heads = self._shape.heads
        yield path + ".conv1d.weight", Parameter((heads.channels, 1, heads.conv_width))
        yield path + ".A_log", Parameter((heads.num_value_heads,))
        yield path + ".dt_bias", Parameter((heads.num_value_heads,), initial="ones")
        yield path + ".norm.weight", Parameter((heads.value_dim,), initial="ones")

    def load(self, path: str, tensors: Tensors) -> None:
        conv, a_log, offset, norm = (
            tensors.read(f"{path}.{name}") for name in ("conv1d.weight", "A_log", "dt_bias", "norm.weight")
        )
        self.weights = DeltaWeights(
            self._shape.heads,
            conv=conv[:, 0].float().t().contiguous(),
            rate=-a_log.double().exp().float(),
            offset=offset.to(torch.float32, copy=True),
            norm=norm.to(torch.float32, copy=True),
            eps=self._shape.eps,
        )

    def own_tensors(self) -> Iterator[torch.Tensor]:
        weights = self.weights
        yield from (weights.conv, weights.rate, weights.offset, weights.norm)

    def allocate(self, scratch: Scratch) -> None:
        heads = self._shape.heads
        ba = scratch.tensor("delta ba", (scratch.max_tokens, 2 * heads.num_value_heads), torch.float32)
        self._ba = RowBuffer(ba)
        self._mixed = scratch.rows("mixed", heads.channels)
        self._out = scratch.rows("attended", heads.values)

    def shape(self) -> tuple[object, ...]:
        return (self._shape,)

    def __call__(self, x: torch.Tensor, step: StepInput, state: LayerState) -> torch.Tensor:
        """[T, H] → [S, H]"""
        assert step.states is not None
        count = x.shape[0]
        ba = self.in_proj_ba.into(x, self._ba.first(count))
        rows, mixed, out = self.in_proj_qkvz(x), self._mixed.first(count), self._out.first(count)
        gated_delta(rows, ba, self.weights, state, step.states, mixed, out)
        return self.out_proj(out if step.outputs is None else out.index_select(0, step.outputs.rows))


def _ungroup(linear: HeadsLinear, num_groups: int, sizes: tuple[int, ...]) -> None:
    """Read the one part of a layer that has, group by group, so many rows of each kind: kind by kind."""
    [part] = linear.parts
    rows = torch.arange(linear.out_features, dtype=torch.int64, device="cpu").view(num_groups, sum(sizes))
    kinds = [kind.reshape(-1) for kind in torch.split_with_sizes(rows, list(sizes), dim=1)]
    linear.take(part, torch.cat(kinds), of=linear.out_features)
