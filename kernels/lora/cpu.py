"""CPU adapters: the rows of one adapter are gathered, multiplied by register tiles, and added to their places.

# K in features, r rank, P = ceil(columns / 32) panels
"""

from __future__ import annotations

import numpy as np
import torch
from numba import prange

from sempre.kernels.jit import address_of, compiled, keep
from sempre.kernels.linear.cpu import multiply_panel, to_panels
from sempre.kernels.linear.cpu_tiles import PANEL, TILES, add_rows, copy_rows
from sempre.kernels.lora import AdapterRows, AdapterWeight, LoraShape, ScratchTensor

# of an entry of the table: addresses of the panels of A and B, and the rank
_FIELDS = 3


class CpuLoraSlots:
    """Panels of A [r, K] and B [N, r] by slot and part."""

    def __init__(self, shape: LoraShape) -> None:
        self.shape = shape
        num_parts = len(shape.widths)
        self._table = np.zeros((shape.num_slots, num_parts, _FIELDS), np.int64)
        self._panels: list[list[torch.Tensor]] = [[] for _ in range(shape.num_slots)]
        ends = np.cumsum(shape.widths)
        self._columns = np.stack([ends - shape.widths, ends]).astype(np.int64)

    @property
    def nbytes(self) -> int:
        return sum(panels.nbytes for slot in self._panels for panels in slot)

    def allocate(self, scratch: ScratchTensor, max_rows: int) -> None:
        """It needs no memory beforehand."""

    def put(self, slot: int, parts: tuple[AdapterWeight | None, ...]) -> None:
        """See the protocol."""
        self._panels[slot] = []
        self._table[slot] = 0
        for index, part in enumerate(parts):
            if part is not None:
                panels = [to_panels(part.a), to_panels(part.b)]
                self._panels[slot] += panels
                self._table[slot, index] = (*(each.data_ptr() for each in panels), part.a.shape[0])

    def add(self, x: torch.Tensor, base: torch.Tensor, rows: AdapterRows, out: torch.Tensor) -> torch.Tensor:
        """See the facade."""
        assert rows.order is not None
        assert rows.groups is not None
        if out.data_ptr() != base.data_ptr():
            out.copy_(base)
        _add(
            TILES[0].table,
            x.data_ptr(),
            x.shape[1],
            rows.order.numpy(),
            rows.groups.numpy(),
            self._table,
            self._columns,
            out.data_ptr(),
            out.shape[1],
        )
        return out


@compiled(parallel=True)
def _add(
    tiles: int,
    x: int,
    depth: int,
    order: np.ndarray,
    groups: np.ndarray,
    table: np.ndarray,
    columns: np.ndarray,
    out: int,
    width: int,
) -> None:
    num_parts = table.shape[1]
    for unit in prange(groups.shape[0] * num_parts):
        group, part = unit // num_parts, unit % num_parts
        slot, first, count = groups[group, 0], groups[group, 1], groups[group, 2]
        a, b, rank = table[slot, part, 0], table[slot, part, 1], table[slot, part, 2]
        if rank > 0:
            own = np.empty((count, depth), np.float32)
            own_at = address_of(own)
            for i in range(count):
                copy_rows(x + order[first + i] * depth * 4, 0, own_at + i * depth * 4, 0, 1, depth)
            num_panels = (rank + PANEL - 1) // PANEL
            inner = np.empty((count, num_panels * PANEL), np.float32)
            inner_at, inner_row = address_of(inner), num_panels * PANEL * 4
            for p in range(num_panels):
                panel = a + p * depth * PANEL * 4
                multiply_panel(tiles, own_at, depth * 4, count, depth, panel, inner_at + p * PANEL * 4, inner_row)
            change = np.empty((count, PANEL), np.float32)
            change_at = address_of(change)
            start, end = columns[0, part], columns[1, part]
            for p in range((end - start + PANEL - 1) // PANEL):
                multiply_panel(tiles, inner_at, inner_row, count, rank, b + p * rank * PANEL * 4, change_at, PANEL * 4)
                column = start + p * PANEL
                kept = min(PANEL, end - column)
                for i in range(count):
                    target = out + (order[first + i] * width + column) * 4
                    add_rows(change_at + i * PANEL * 4, 0, target, 0, 1, kept)
            keep(own)
            keep(inner)
            keep(change)
