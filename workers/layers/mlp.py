"""Feed-forward branches."""

from __future__ import annotations

import torch

from sempre.kernels.activation import Activation
from sempre.workers.layers.linear import Linear
from sempre.workers.layers.module import Build, Module, Scratch
from sempre.workers.layers.row_parallel import RowParallelLinear, Unsummed


class GatedMLP(Module):
    """down(activation(gate(x)) * up(x)) (Shazeer 2020, arXiv 2002.05202); gate and up are one matmul.

    A rank has the outputs of gate and up that its inputs of down are made of.
    """

    def __init__(
        self,
        build: Build,
        hidden_size: int,
        intermediate_size: int,
        *,
        bias: bool = False,
        activation: Activation = Activation.SILU,
        fused: bool = False,
        role: str = "branch",
    ) -> None:
        """`fused`: gate and up are one tensor of the checkpoint; `role` is that of the results' buffer."""
        own = build.parallel.own_inputs("down_proj", intermediate_size)
        width = len(own)
        parts = {"gate_up_proj": 2 * width} if fused else {"gate_proj": width, "up_proj": width}
        self.gate_up_proj = Linear(build, parts, hidden_size, bias=bias, role="gate_up", activation=activation)
        if width < intermediate_size:
            rows = torch.arange(own.start, own.stop, dtype=torch.int64, device="cpu")
            halves = torch.cat([rows, rows + intermediate_size]) if fused else rows
            for part in parts:
                self.gate_up_proj.take(part, halves, of=intermediate_size * (1 + fused))
        down = {"down_proj": hidden_size}
        self.down_proj = RowParallelLinear(build, down, intermediate_size, bias=bias, role=role)

    def allocate(self, scratch: Scratch) -> None:
        self._activated = scratch.rows("activated", self.down_proj.in_features)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """[T, H] → [T, H]"""
        return self.down_proj(self._inner(x))

    def unsummed(self, x: torch.Tensor) -> torch.Tensor | Unsummed:
        """The same, for the norm that is next."""
        return self.down_proj.unsummed(self._inner(x))

    def _inner(self, x: torch.Tensor) -> torch.Tensor:
        return self.gate_up_proj.gated(x, self._activated.first(x.shape[0]))
