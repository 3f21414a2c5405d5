"""The matrix product a worker uses: the invariant one, or the ordinary one that tests of the guarantee need to fail."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, Protocol

import torch

from sempre.ipc.errors import ConfigError
from sempre.kernels.linear import control_linear, control_pack, linear, pack_linear


class Packed(Protocol):
    """A weight [out_features, in_features] in the form its product wants."""

    @property
    def in_features(self) -> int: ...

    @property
    def out_features(self) -> int: ...

    @property
    def nbytes(self) -> int: ...


class LinearKernel(NamedTuple):
    """`pack(weight [N, K], bias [N] or None)`, and `apply(x [T, K], packed, out [T, N])`, which returns `out`."""

    pack: Callable[[torch.Tensor, torch.Tensor | None], Packed]
    apply: Callable[..., torch.Tensor]


INVARIANT = LinearKernel(pack_linear, linear)
CONTROL = LinearKernel(control_pack, control_linear)


def linear_kernel(numerics: str) -> LinearKernel:
    """The product for the setting `numerics`; raises ConfigError for an unknown one."""
    kernels = {"invariant": INVARIANT, "control": CONTROL}
    if numerics not in kernels:
        raise ConfigError(
            f"numerics: expected one of {', '.join(kernels)}, found {numerics!r}.", parameter="numerics", value=numerics
        )
    return kernels[numerics]
