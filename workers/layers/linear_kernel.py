"""The matmul a worker uses: the invariant one, or the ordinary one, with which tests of the guarantee must fail."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import torch

from sempre.ipc.config import Numerics
from sempre.kernels.activation import Activation
from sempre.kernels.fp8 import Fp8Scheme
from sempre.kernels.integers import (
    GroupedIntegers,
    IntegerScheme,
    IntegerWeight,
    integer_linear,
    pack_integer_linear,
)
from sempre.kernels.linear import (
    control_linear,
    control_pack,
    control_pack_fp8,
    gated_linear,
    linear,
    pack_bfloat16_linear,
    pack_fp8_linear,
    pack_linear,
)
from sempre.kernels.packed import Codes, PackedScheme, PackedWeight, pack_codes, packed_linear


class LinearWeight(Protocol):
    """A weight [out_features, in_features] in the layout its kernels need."""

    @property
    def in_features(self) -> int: ...

    @property
    def out_features(self) -> int: ...

    @property
    def nbytes(self) -> int: ...

    @property
    def scheme(self) -> Fp8Scheme | IntegerScheme | PackedScheme | None:
        """None: floats"""

    @property
    def leaves(self) -> int:
        """parts in which K is summed"""


class LinearKernel(NamedTuple):
    """`pack(weight [N, K], bias [N] or None)`; `linear(x [T, K], weight, out [T, N])`, which returns `out`; and
    `gated_linear(x [T, K], weight [2I, K], scratch [T, 2I], out [T, I], activation)`: that of the first half, times the
    second, which returns `out` too.
    `pack_fp8(weight [N, K] fp8, scale [N], bias [N] or None, scheme)` packs a quantised weight, and
    `pack_integers(matrices, bias [N] or None, scheme)` one of integers, for a CPU. Where K
    has leaves, their number follows. `pack_codes(matrices, bias [N] or None, dtype)` keeps a weight packed on a GPU.
    """

    pack: Callable[..., LinearWeight]
    linear: Callable[..., torch.Tensor]
    gated_linear: Callable[..., torch.Tensor]
    pack_fp8: Callable[..., LinearWeight]
    pack_integers: Callable[..., LinearWeight]
    pack_codes: Callable[..., LinearWeight]


def _linear(x: torch.Tensor, weight: Any, out: torch.Tensor) -> torch.Tensor:
    match weight:
        case IntegerWeight():
            return integer_linear(x, weight, out)
        case PackedWeight():
            return packed_linear(x, weight, out)
        case _:
            return linear(x, weight, out)


def _gated_linear(
    x: torch.Tensor, weight: Any, gate_up: torch.Tensor, out: torch.Tensor, activation: Activation
) -> torch.Tensor:
    if isinstance(weight, IntegerWeight | PackedWeight):
        return activation.and_mul(_linear(x, weight, gate_up), out)
    return gated_linear(x, weight, gate_up, out, activation)


def _control_pack_integers(
    matrices: Sequence[GroupedIntegers], bias: torch.Tensor | None, scheme: IntegerScheme
) -> LinearWeight:
    return control_pack(torch.cat([matrix.values() for matrix in matrices]), bias)


def _control_pack_codes(matrices: Sequence[Codes], bias: torch.Tensor | None, dtype: torch.dtype) -> LinearWeight:
    return control_pack(torch.cat([matrix.values().to(dtype) for matrix in matrices]), bias)


def _control_gated_linear(
    x: torch.Tensor, weight: Any, gate_up: torch.Tensor, out: torch.Tensor, activation: Activation
) -> torch.Tensor:
    return activation.and_mul(control_linear(x, weight, gate_up), out)


INVARIANT = LinearKernel(pack_linear, _linear, _gated_linear, pack_fp8_linear, pack_integer_linear, pack_codes)
CONTROL = LinearKernel(
    control_pack, control_linear, _control_gated_linear, control_pack_fp8, _control_pack_integers, _control_pack_codes
)


def linear_kernel(numerics: Numerics) -> LinearKernel:
    """The kernels for the setting `numerics`."""
    return {"invariant": INVARIANT, "control": CONTROL}[numerics]


def with_inputs(kernel: LinearKernel, dtype: torch.dtype) -> LinearKernel:
    """`kernel` for an engine's `dtype` on a CPU: with bfloat16, inputs of the invariant matmul are rounded to it."""
    if kernel is INVARIANT and dtype is torch.bfloat16:
        return kernel._replace(pack=pack_bfloat16_linear)
    return kernel
