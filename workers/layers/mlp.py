"""Feed-forward branches."""

from __future__ import annotations

import torch

from sempre.kernels.activation import Activation
from sempre.workers.layers.linear import Linear
from sempre.workers.layers.module import Build, Module, Scratch


class GatedMLP(Module):
    """down(activation(gate(x)) * up(x)) (Shazeer 2020, arXiv 2002.05202); gate and up are one matmul."""

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
        width = intermediate_size
        parts = {"gate_up_proj": 2 * width} if fused else {"gate_proj": width, "up_proj": width}
        self.gate_up_proj = Linear(build, parts, hidden_size, bias=bias, role="gate_up", activation=activation)
        self.down_proj = Linear(build, {"down_proj": hidden_size}, width, bias=bias, role=role)

    def allocate(self, scratch: Scratch) -> None:
        self._activated = scratch.rows("activated", self.down_proj.in_features)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """[T, H] → [T, H]"""
        return self.down_proj(self.gate_up_proj.gated(x, self._activated.first(x.shape[0])))
