"""Adapters of a layer with parts, rows that use them in every mixture, and float64 to compare with."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from sempre.kernels.lora import AdapterWeight, LoraShape, LoraSlots, adapter_rows, add_adapters, make_slots

NONE = -1


@dataclass(frozen=True)
class LoraCase:
    """A layer, its adapters by slot, x, and the float32 base."""

    shape: LoraShape
    adapters: list[tuple[AdapterWeight | None, ...]]
    x: torch.Tensor
    base: torch.Tensor
    slots: LoraSlots

    def run(self, rows: list[int], owners: list[int]) -> torch.Tensor:
        """These rows of x together, each with an adapter, or NONE."""
        x, base = self.x[rows], self.base[rows]
        owner = torch.tensor(owners, dtype=torch.int32)
        return add_adapters(x, base.clone(), self.slots, adapter_rows(owner), torch.empty_like(base, dtype=x.dtype))

    def expected(self, row: int, owner: int) -> torch.Tensor:
        """In float64."""
        y = self.base[row].double()
        start = 0
        for part, width in zip(self.adapters[owner], self.shape.widths, strict=True):
            if part is not None:
                y[start : start + width] += part.b.double() @ (part.a.double() @ self.x[row].double())
            start += width
        return y


def lora_case(
    in_features: int,
    widths: tuple[int, ...],
    ranks: list[tuple[int, ...]],
    dtype: torch.dtype,
    num_rows: int,
    stored: torch.dtype = torch.float32,
) -> LoraCase:
    """One adapter for each of `ranks`, which has a rank for each part; 0: none for that part. `stored`: holds A and B
    exactly."""
    generator = torch.Generator().manual_seed(in_features)
    shape = LoraShape(in_features, widths, len(ranks), max(max(each) for each in ranks))
    slots = make_slots(shape, dtype, torch.device("cpu"))

    def normal(*size: int) -> torch.Tensor:
        return torch.randn(*size, generator=generator).to(dtype).float()

    adapters: list[tuple[AdapterWeight | None, ...]] = []
    for slot, each in enumerate(ranks):
        adapters.append(
            tuple(
                AdapterWeight(
                    (normal(rank, in_features) * in_features**-0.5).to(stored).float(),
                    normal(width, rank).to(stored).float(),
                )
                if rank
                else None
                for rank, width in zip(each, widths, strict=True)
            )
        )
        slots.put(slot, adapters[-1])
    x = torch.randn(num_rows, in_features, generator=generator).to(dtype)
    return LoraCase(shape, adapters, x, torch.randn(num_rows, sum(widths), generator=generator), slots)
