"""The ordinary matrix product of the library, which does not keep the guarantee.

It exists so that tests of invariance can show that they are able to fail.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class ControlLinear:
    """A weight [N, K] and bias [N], float32 on CPU, as they are on a GPU."""

    weight: torch.Tensor
    bias: torch.Tensor | None

    @property
    def in_features(self) -> int:
        return int(self.weight.shape[1])

    @property
    def out_features(self) -> int:
        return int(self.weight.shape[0])

    @property
    def nbytes(self) -> int:
        return int(self.weight.nbytes + (self.bias.nbytes if self.bias is not None else 0))


def control_pack(weight: torch.Tensor, bias: torch.Tensor | None = None) -> ControlLinear:
    if weight.is_cuda:
        return ControlLinear(weight, bias)
    return ControlLinear(weight.float(), bias.float() if bias is not None else None)


def control_linear(x: torch.Tensor, w: ControlLinear, out: torch.Tensor) -> torch.Tensor:
    """As `linear`, by `torch.nn.functional.linear`."""
    out.copy_(torch.nn.functional.linear(x, w.weight, w.bias))
    return out
