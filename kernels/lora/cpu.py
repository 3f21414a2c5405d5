"""CPU adapters: the rows of one adapter are gathered, multiplied by register tiles, and added to their places.

# K in features, r rank, P = ceil(columns / 32) panels
"""

from __future__ import annotations

import numpy as np
import torch
from llvmlite import ir
from numba import prange

from sempre.kernels.dtypes import dtype_code
from sempre.kernels.jit import address_of, compiled, keep
from sempre.kernels.linear.cpu import multiply_panel, to_panels
from sempre.kernels.linear.cpu_tiles import PANEL, TILES, VECTORS, add_rows
from sempre.kernels.lora import AdapterRows, AdapterWeight, LoraShape, ScratchTensor
from sempre.kernels.vector_ir import F32, I64, LANES, address_intrinsic, load, store, vec

# of panels: address, bytes of an element, and the table of tiles for their dtype
_PANEL_FIELDS = 3


def _emit_add_panel(b: ir.IRBuilder, source: ir.Value, target: ir.Value) -> None:
    """Add a panel's width of float32 at `source` to those at `target`."""
    for index in range(VECTORS):
        source_at, target_at = (b.add(place, I64(4 * LANES * index)) for place in (source, target))
        store(b, b.fadd(load(b, target_at, vec(F32)), load(b, source_at, vec(F32))), target_at)


_add_panel = address_intrinsic(_emit_add_panel)


class CpuLoraSlots:
    """By slot: panels of the parts' A, one below the other [sum of ranks, K], and of each part's B [N, r].

    What bfloat16 holds exactly is stored so: the bits are the same, and a step reads half as much.
    """

    def __init__(self, shape: LoraShape) -> None:
        self.shape = shape
        num_parts = len(shape.widths)
        # and the rank, and the part's first column of x A^T
        self._parts = np.zeros((shape.num_slots, num_parts, _PANEL_FIELDS + 2), np.int64)
        # and the number of panels
        self._inner = np.zeros((shape.num_slots, _PANEL_FIELDS + 1), np.int64)
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
        self._parts[slot] = self._inner[slot] = 0
        given = [(index, part) for index, part in enumerate(parts) if part is not None]
        if not given:
            return
        inner = to_panels(_narrowed(torch.cat([part.a for _, part in given])))
        self._panels[slot].append(inner)
        self._inner[slot] = *_facts(inner), inner.shape[0]
        first = 0
        for index, part in given:
            panels, rank = to_panels(_narrowed(part.b)), part.a.shape[0]
            self._panels[slot].append(panels)
            self._parts[slot, index] = *_facts(panels), rank, first
            first += rank

    def add(self, x: torch.Tensor, base: torch.Tensor, rows: AdapterRows, out: torch.Tensor) -> torch.Tensor:
        """See the facade."""
        assert rows.order is not None
        assert rows.groups is not None
        if out.data_ptr() != base.data_ptr():
            out.copy_(base)
        _add(
            x.numpy(),
            rows.order.numpy(),
            rows.groups.numpy(),
            self._inner,
            self._parts,
            self._columns,
            out.data_ptr(),
            out.shape[1],
        )
        return out


def _narrowed(matrix: torch.Tensor) -> torch.Tensor:
    narrow = matrix.bfloat16()
    return narrow if torch.equal(narrow.float(), matrix) else matrix


def _facts(panels: torch.Tensor) -> tuple[int, int, int]:
    return panels.data_ptr(), panels.itemsize, TILES[dtype_code(panels.dtype)].table


@compiled(parallel=True)
def _add(
    x: np.ndarray,
    order: np.ndarray,
    groups: np.ndarray,
    inner_panels: np.ndarray,
    parts: np.ndarray,
    columns: np.ndarray,
    out: int,
    width: int,
) -> None:
    depth = x.shape[1]
    for group in prange(groups.shape[0]):
        slot, first, count = groups[group, 0], groups[group, 1], groups[group, 2]
        a, a_bytes, a_tiles, num_panels = inner_panels[slot]
        if num_panels > 0:
            own = np.empty((count, depth), np.float32)
            own_at = address_of(own)
            for i in range(count):
                row = order[first + i]
                for k in range(depth):
                    own[i, k] = x[row, k]
            inner = np.empty((count, num_panels * PANEL), np.float32)
            inner_at, inner_row = address_of(inner), num_panels * PANEL * 4
            for p in range(num_panels):
                panel = a + p * depth * PANEL * a_bytes
                multiply_panel(a_tiles, own_at, depth * 4, count, depth, panel, inner_at + p * PANEL * 4, inner_row)
            change = np.empty((count, PANEL), np.float32)
            change_at = address_of(change)
            for part in range(parts.shape[1]):
                b, b_bytes, b_tiles, rank, first_inner = parts[slot, part]
                part_at = inner_at + first_inner * 4
                start, end = columns[0, part], columns[1, part]
                num_columns = end - start if rank > 0 else 0
                for p in range((num_columns + PANEL - 1) // PANEL):
                    panel = b + p * rank * PANEL * b_bytes
                    multiply_panel(b_tiles, part_at, inner_row, count, rank, panel, change_at, PANEL * 4)
                    column = start + p * PANEL
                    kept = min(PANEL, end - column)
                    for i in range(count):
                        target = out + (order[first + i] * width + column) * 4
                        if kept == PANEL:
                            _add_panel(change_at + i * PANEL * 4, target)
                        else:
                            add_rows(change_at + i * PANEL * 4, 0, target, 0, 1, kept)
            keep(own)
            keep(inner)
            keep(change)
