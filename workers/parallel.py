"""Tensor parallelism: which part of each layer is a rank's own, and how the ranks' parts come together.

A stage's ranks run the same steps. Heads, the width of feed-forward branches and the vocabulary are cut; an expert
never is, whole ones lie on the ranks. Nothing that ranks pass to each other changes bits: rows are moved as they are,
and partial sums are added in the order of the ranks, on the tree of leaves that one worker would use
(`kernels.linear`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple, Protocol

import torch

from sempre.ipc.config import NumericsProfile
from sempre.ipc.errors import ConfigError
from sempre.kernels.attention import HeadLayout
from sempre.kernels.exchange.contract import Cut, Norm
from sempre.kernels.linear import MAX_LEAVES, GpuLinearWeight
from sempre.workers.stages import ALL_LAYERS, Stage

# a leaf's inputs are a multiple of this
LEAF_UNIT = 16


class WrittenRows(NamedTuple):
    """Which rows of the first slot a rank has written, where ranks do not write a slot each."""

    rows: torch.Tensor
    """float32 [R, W], a view of the first slot"""
    places: torch.Tensor
    """int64, the indices of those written"""


class Exchange(Protocol):
    """Memory that the ranks of a stage share. Every rank calls the same in the same order."""

    def most_rows(self, width: int) -> int:
        """How many rows of `width` float32 one call of `slots` has room for."""

    def slots(self, rows: int, width: int) -> torch.Tensor:
        """float32 [ranks, rows, width], to be written by each rank in its own part, or rows of the first part.

        What the last call gave may be read until the next `wait`.
        """

    def wait(self, written: WrittenRows | None = None) -> None:
        """Until every rank has written to what `slots` gave: its own part, or what each says."""


# inputs, and where the results go
Multiply = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


class DeviceExchange(Protocol):
    """Memory of GPUs that the ranks of a replica share. Every rank calls the same in the same order; nothing waits for
    the device."""

    def begin(self) -> None:
        """Once before a sequence of sums: until all ranks are past the sequence before."""

    def sum(self, x: torch.Tensor, weight: GpuLinearWeight, out: torch.Tensor) -> torch.Tensor:
        """The matmul of a row-parallel layer: x [T, own inputs] → out [T, N], the sum of all ranks."""

    def sum_and_norm(self, x: torch.Tensor, weight: GpuLinearWeight, norm: Norm, out: torch.Tensor) -> torch.Tensor:
        """The same, then `kernels.norms.add_rms_norm`."""

    def embed(self, token_ids: torch.Tensor, table: torch.Tensor, cut: Cut, out: torch.Tensor) -> torch.Tensor:
        """Rows of a table that is `cut`; this rank has `table`. A sequence begins."""

    def gather(self, multiply: Multiply, x: torch.Tensor, cut: Cut, out: torch.Tensor) -> torch.Tensor:
        """x [T, K] → out float32 [T, N], where each rank has some of the N columns, which `multiply` writes. A sequence
        begins."""

    def smallest(self, number: int) -> int:
        """The smallest of what the ranks say; waits for them."""

    def check(self) -> None:
        """After a wait for the device. Raises EngineUnhealthy, naming a rank that did not come."""


class OwnHeads(NamedTuple):
    """A rank's heads, as ranges of the model's."""

    layout: HeadLayout
    queries: range
    keys: range


@dataclass(frozen=True)
class Parallel:
    """A worker's rank among the `size` workers of its stage, the stage, and the most leaves of a sum."""

    rank: int = 0
    size: int = 1
    most_leaves: int = 1
    exchange: Exchange | None = None
    """between CPUs; None: the worker has the whole stage, or a GPU"""
    devices: DeviceExchange | None = None
    """between GPUs"""
    stage: Stage = ALL_LAYERS
    leaf_unit: int = LEAF_UNIT
    """a leaf has a multiple of so many inputs"""

    @property
    def is_alone(self) -> bool:
        """Whether the worker has the whole model."""
        return self.size == 1 and self.stage.count == 1

    @property
    def whole(self) -> Parallel:
        """For a layer that every rank computes whole."""
        return replace(self, rank=0, size=1, exchange=None, devices=None)

    def leaves(self, depth: int, unit: int = LEAF_UNIT) -> int:
        """The leaves of a sum over `depth` inputs, of all ranks: the most, up to `most_leaves`, that are a multiple of
        `unit` inputs each, and of `leaf_unit`."""
        leaves, unit = self.most_leaves, math.lcm(unit, self.leaf_unit)
        while depth % (leaves * unit):
            leaves //= 2
        return max(1, leaves)

    def own_inputs(self, name: str, depth: int, unit: int = LEAF_UNIT) -> range:
        """This rank's inputs of a layer that sums over `depth` of them: whole leaves. Raises ConfigError."""
        leaves = self.leaves(depth, unit)
        if leaves % self.size:
            raise self._refused(f"a divisor of the {leaves} leaves in which {name} sums its {depth} inputs")
        count = depth // self.size
        return range(self.rank * count, (self.rank + 1) * count)

    def own_heads(self, heads: HeadLayout) -> OwnHeads:
        """This rank's heads; where there are fewer key heads than ranks, several ranks have the same. Raises
        ConfigError."""
        size, rank = self.size, self.rank
        queries, keys = heads.num_heads, heads.num_kv_heads
        if queries % size:
            raise self._refused(f"a divisor of num_attention_heads={queries}")
        if max(keys, size) % min(keys, size):
            raise self._refused(f"a divisor or a multiple of num_key_value_heads={keys}")
        own = range(rank * queries // size, (rank + 1) * queries // size)
        first, count = rank * keys // size, max(1, keys // size)
        layout = replace(heads, num_heads=len(own), num_kv_heads=count)
        return OwnHeads(layout, own, range(first, first + count))

    def own_rows(self, count: int, rank: int | None = None) -> range:
        """A rank's (by default this one's) share of `count` things that are never cut; the first may have one more."""
        rank = self.rank if rank is None else rank
        each, more = divmod(count, self.size)
        first = rank * each + min(rank, more)
        return range(first, first + each + (rank < more))

    def cut(self, count: int) -> Cut:
        """How `own_rows` cuts `count` rows."""
        return Cut(count, *divmod(count, self.size))

    def own_experts(self, count: int) -> range:
        """This rank's experts, at least one. Raises ConfigError."""
        if count < self.size:
            raise self._refused(f"at most the {count} experts, which are never cut")
        return self.own_rows(count)

    def _refused(self, expected: str) -> ConfigError:
        return ConfigError(
            f"tensor_parallel_size: rank {self.rank}: expected {expected}, found {self.size}.",
            parameter="tensor_parallel_size",
            value=self.size,
        )


ALONE = Parallel()
"""One worker that sums in one chain."""


def parallel_of(
    profile: NumericsProfile,
    rank: int = 0,
    size: int = 1,
    exchange: Exchange | None = None,
    devices: DeviceExchange | None = None,
    stage: Stage = ALL_LAYERS,
) -> Parallel:
    """The place of rank `rank` of `size` of a stage, under a profile."""
    return Parallel(rank, size, MAX_LEAVES if profile == "tree8" else 1, exchange, devices, stage)


def pieces(exchange: Exchange, rows: int, width: int) -> Iterator[slice]:
    """Rows of `width`, as many at a time as the exchange has room for."""
    most = exchange.most_rows(width)
    for start in range(0, rows, most):
        yield slice(start, min(start + most, rows))
