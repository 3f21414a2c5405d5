"""Feed-forward branches."""

from __future__ import annotations

import torch

from sempre.kernels.activation import gelu_and_mul
from sempre.workers.layers.linear import Linear, Use
from sempre.workers.layers.module import Build, Module, Scratch


class GatedMLP(Module):
    """down(silu(gate(x)) * up(x)) (Shazeer 2020, arXiv 2002.05202); gate and up are one matmul."""

    use = Use.GATED
    """of the gate and up matmul"""

    def __init__(self, build: Build, hidden_size: int, intermediate_size: int, *, bias: bool = False) -> None:
        width = intermediate_size
        self.gate_up_proj = Linear(
            build, {"gate_proj": width, "up_proj": width}, hidden_size, bias=bias, use=self.use, role="gate_up"
        )
        self.down_proj = Linear(build, {"down_proj": hidden_size}, width, bias=bias)

    def allocate(self, scratch: Scratch) -> None:
        self._activated = scratch.rows("activated", self.down_proj.in_features)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """[T, H] → [T, H]"""
        return self.down_proj(self.gate_up_proj.gated(x, self._activated[: x.shape[0]]))


class GeluMLP(GatedMLP):
    """The same with tanh-approximated gelu (`kernels.activation`)."""

    use = Use.PLAIN

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """[T, H] → [T, H]"""
        return self.down_proj(gelu_and_mul(self.gate_up_proj(x), self._activated[: x.shape[0]]))
