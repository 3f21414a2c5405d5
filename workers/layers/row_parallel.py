"""The linear layer whose inputs ranks share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch

from sempre.kernels.exchange.contract import Norm
from sempre.kernels.fp8 import Fp8Scheme
from sempre.kernels.integers import (
    GroupedIntegers,
    IntegerScheme,
    IntegerWeight,
    partial_integer_linear,
    sum_integer_partials,
)
from sempre.kernels.linear import CpuLinearWeight, GpuLinearWeight, partial_linear, sum_partials
from sempre.kernels.lora import AdapterRows, adapter_rows, add_adapters
from sempre.kernels.packed import Codes
from sempre.workers.layers.linear import Linear
from sempre.workers.layers.linear_kernel import LinearKernel, LinearWeight
from sempre.workers.layers.module import Build
from sempre.workers.parallel import LEAF_UNIT, Exchange, pieces


class Unsummed(NamedTuple):
    """The result of a row-parallel layer that the ranks have not added yet, so that the norm after it can be part of
    the sum. `x` must not change until then."""

    layer: RowParallelLinear
    x: torch.Tensor

    def add_and_norm(self, norm: Norm, out: torch.Tensor) -> torch.Tensor:
        """Add to the residual in place; the norm of that, into `out`."""
        devices = self.layer.parallel.devices
        assert devices is not None
        assert isinstance(self.layer.weight, GpuLinearWeight)
        return devices.sum_and_norm(self.x, self.layer.weight, norm, out)


class RowParallelLinear(Linear):
    """x [T, K] → [T, N], summed over K in leaves (`kernels.linear`). A rank's x [T, K / ranks] has its own inputs; the
    result is the whole sum, on every rank."""

    def __init__(
        self,
        build: Build,
        parts: Mapping[str, int],
        in_features: int,
        *,
        bias: bool = False,
        role: str = "branch",
        unit: int = LEAF_UNIT,
    ) -> None:
        """A leaf has a multiple of `unit` inputs. Raises ConfigError where ranks cannot share them."""
        self.parallel = parallel = build.parallel
        self._own = parallel.own_inputs(" and ".join(parts), in_features, unit)
        self._leaves = parallel.leaves(in_features, unit) // parallel.size
        super().__init__(build, parts, len(self._own), bias=bias, role=role)
        self._stored_inputs = in_features

    @property
    def stored_inputs(self) -> int:
        return self._stored_inputs

    @property
    def _packing(self) -> LinearKernel:
        kernel, own, leaves = self.kernel, self._own, self._leaves
        if leaves == 1 and len(own) == self._stored_inputs:
            return kernel

        def pack(weight: torch.Tensor, bias: torch.Tensor | None) -> LinearWeight:
            return kernel.pack(weight[:, own.start : own.stop], bias, leaves)

        def pack_fp8(
            weight: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None, scheme: Fp8Scheme
        ) -> LinearWeight:
            # quantised as a whole before: the scale of a channel does not depend on the cut
            return kernel.pack_fp8(weight[:, own.start : own.stop], scale, bias, scheme, leaves)

        def pack_integers(
            matrices: Sequence[GroupedIntegers], bias: torch.Tensor | None, scheme: IntegerScheme
        ) -> LinearWeight:
            return kernel.pack_integers([matrix.inputs(own) for matrix in matrices], bias, scheme, leaves)

        def pack_codes(matrices: Sequence[Codes], bias: torch.Tensor | None, dtype: torch.dtype) -> LinearWeight:
            # no kernel sums a packed weight in leaves
            return pack(torch.cat([matrix.values().to(dtype) for matrix in matrices]), bias)

        return kernel._replace(pack=pack, pack_fp8=pack_fp8, pack_integers=pack_integers, pack_codes=pack_codes)

    @property
    def stores_float32(self) -> bool:
        return self.parallel.devices is not None

    def unsummed(self, x: torch.Tensor) -> torch.Tensor | Unsummed:
        """[T, N], or what becomes of it with the norm that is next."""
        return self(x) if self.parallel.devices is None else Unsummed(self, x)

    def into(self, x: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        exchange, devices = self.parallel.exchange, self.parallel.devices
        if devices is not None:
            assert isinstance(self.weight, GpuLinearWeight)
            return devices.sum(x, self.weight, out)
        if exchange is None:
            return super().into(x, out)
        for rows in pieces(exchange, x.shape[0], self.out_features):
            slots = exchange.slots(rows.stop - rows.start, self.out_features)
            self._partial(x[rows], slots[self.parallel.rank])
            exchange.wait()
            self._sum(slots, out[rows])
        adapters = self._adapter_rows(x)
        return out if adapters is None else self._add_adapters(x, adapters, exchange, out)

    def _add_adapters(
        self, x: torch.Tensor, adapters: AdapterRows, exchange: Exchange, out: torch.Tensor
    ) -> torch.Tensor:
        """Every rank gets all inputs: their product with an adapter's A is one chain, which is not cut into leaves."""
        assert self.adapters is not None
        assert x.dtype == out.dtype == torch.float32, "ranks that share memory are CPUs"
        for rows in pieces(exchange, x.shape[0], self.in_features):
            count = rows.stop - rows.start
            slots = exchange.slots(count, self.in_features)
            slots[self.parallel.rank] = x[rows]
            exchange.wait()
            whole = slots.transpose(0, 1).reshape(count, self.stored_inputs)
            own = adapters if count == x.shape[0] else adapter_rows(adapters.slots[rows])
            add_adapters(whole, out[rows], self.adapters, own, out[rows])
        return out

    def _partial(self, x: torch.Tensor, out: torch.Tensor) -> None:
        """This rank's share of the sum."""
        if isinstance(self.weight, IntegerWeight):
            partial_integer_linear(x, self.weight, out)
            return
        assert isinstance(self.weight, CpuLinearWeight), "ranks of one model compute on devices of one kind"
        partial_linear(x, self.weight, out)

    def _sum(self, partials: torch.Tensor, out: torch.Tensor) -> None:
        if isinstance(self.weight, IntegerWeight):
            sum_integer_partials(partials, self.weight, out)
            return
        assert isinstance(self.weight, CpuLinearWeight)
        sum_partials(partials, self.weight, out)
