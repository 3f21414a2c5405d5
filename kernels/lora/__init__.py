"""Low-rank adapters: out[t] = round(base[t] + (x[t] A^T) B^T), every row with its own adapter or with none.

Hu et al. 2021, arXiv 2106.09685. B includes the adapter's scale. A layer may have several parts, projections side by
side whose columns have an A and a B of their own.

Contract: x A^T is float32, over ascending K like `linear`; on a GPU in sums of SPLIT terms, which are added in
ascending order. Its product with B is one chain of fused multiply-adds over the ascending rank, from 0, on a CPU in
chains of 64 terms. It is added to the float32 base, and the sum is rounded once. So a row depends on x, the base and
its own adapter alone: not on the adapters of other rows, their number, or where the adapter's memory is. A row without
an adapter is the rounded base: the bits that the linear layer itself stores.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch

from sempre.kernels.checks import check_index, check_rows
from sempre.kernels.lora.rows import AdapterRows, adapter_rows

__all__ = ["AdapterRows", "AdapterWeight", "LoraShape", "LoraSlots", "adapter_rows", "add_adapters", "make_slots"]

RANK_MULTIPLE = 16
MOST_PARTS = 4


@dataclass(frozen=True)
class LoraShape:
    """A layer [N, K] that adapters may change: `widths` are the numbers of columns of its parts, N in all."""

    in_features: int
    widths: tuple[int, ...]
    num_slots: int
    """adapters at a time"""
    max_rank: int

    def __post_init__(self) -> None:
        if not 1 <= len(self.widths) <= MOST_PARTS or self.num_slots < 1 or self.max_rank < 1:
            raise ValueError(f"lora: expected 1 to {MOST_PARTS} parts, and at least one slot and rank, found {self}")

    @property
    def out_features(self) -> int:
        return sum(self.widths)

    @property
    def padded_rank(self) -> int:
        return -(-self.max_rank // RANK_MULTIPLE) * RANK_MULTIPLE


@dataclass(frozen=True)
class AdapterWeight:
    """One part of one adapter: `a` [r, K] and `b` [N of the part, r], times its scale, both float32."""

    a: torch.Tensor
    b: torch.Tensor


ScratchTensor = Callable[[str, tuple[int, ...], torch.dtype], torch.Tensor]
"""memory for a role, shape and dtype that layers share, as they run one after the other"""


class LoraSlots(Protocol):
    """The adapters of one layer, by slot, in the layout of a device's kernels."""

    @property
    def shape(self) -> LoraShape: ...

    @property
    def nbytes(self) -> int: ...

    def allocate(self, scratch: ScratchTensor, max_rows: int) -> None:
        """Prepare for steps of at most `max_rows` rows."""

    def put(self, slot: int, parts: tuple[AdapterWeight | None, ...]) -> None:
        """Replace the adapter of a slot; None: it does not change that part. Steps in flight keep the former one."""

    def add(self, x: torch.Tensor, base: torch.Tensor, rows: AdapterRows, out: torch.Tensor) -> torch.Tensor:
        """See `add_adapters`."""


def make_slots(shape: LoraShape, dtype: torch.dtype, device: torch.device) -> LoraSlots:
    """Slots without adapters. A GPU keeps A and B in `dtype`, that of x, a CPU in float32."""
    if device.type == "cpu":
        from sempre.kernels.lora.cpu import CpuLoraSlots

        return CpuLoraSlots(shape)
    from sempre.kernels.lora.gpu import GpuLoraSlots

    return GpuLoraSlots(shape, dtype, device)


def add_adapters(
    x: torch.Tensor, base: torch.Tensor, slots: LoraSlots, rows: AdapterRows, out: torch.Tensor
) -> torch.Tensor:
    """Add each row's adapter to base, float32 [T, N], into out [T, N] of x's dtype, which may be `base` where that is
    float32. x is [T, K]. Returns `out`."""
    shape = slots.shape
    check_rows("add_adapters", x, base)
    check_rows("add_adapters", x, out)
    check_index("add_adapters", "rows.slots", rows.slots, torch.int32)
    expected = (x.shape[0], shape.out_features)
    if (
        x.shape[1] != shape.in_features
        or tuple(base.shape) != expected
        or base.shape != out.shape
        or rows.slots.shape[0] != x.shape[0]
        or base.dtype != torch.float32
        or out.dtype != x.dtype
    ):
        raise ValueError(
            f"add_adapters: x {x.dtype} {tuple(x.shape)}, base {base.dtype} {tuple(base.shape)}, out {out.dtype}"
            f" {tuple(out.shape)} and {rows.slots.shape[0]} rows do not fit {shape}"
        )
    return slots.add(x, base, rows, out) if x.shape[0] else out
