"""Checkpoints that hold all experts of a layer in one tensor."""

from __future__ import annotations

from typing import NamedTuple

import torch

from sempre.workers.tensor_source import TensorSource


class _Slice(NamedTuple):
    """Rows of one expert in a tensor of all."""

    stored: str
    expert: int
    rows: slice


class SeparateExperts:
    """A checkpoint whose tensors `….experts.gate_up_proj` [E, 2I, H] and `….experts.down_proj` [E, H, I] hold all
    experts of a layer, as if each had its own; others are as they are."""

    def __init__(self, source: TensorSource) -> None:
        self._source = source
        self._slices: dict[str, _Slice] = {}
        self._whole: list[str] = []
        for name in source.names():
            base, _, kind = name.rpartition(".")
            if base.endswith(".experts") and kind in ("gate_up_proj", "down_proj") and len(source.shape(name)) == 3:
                self._separate(name, base, source.shape(name))
            else:
                self._whole.append(name)

    def _separate(self, name: str, base: str, shape: tuple[int, ...]) -> None:
        parts = {"down_proj": slice(0, shape[1])}
        if name.endswith("gate_up_proj"):
            half = shape[1] // 2
            parts = {"gate_proj": slice(0, half), "up_proj": slice(half, shape[1])}
        for expert in range(shape[0]):
            for part, rows in parts.items():
                self._slices[f"{base}.{expert}.{part}.weight"] = _Slice(name, expert, rows)

    def names(self) -> list[str]:
        return [*self._whole, *self._slices]

    def shape(self, name: str) -> tuple[int, ...]:
        if name not in self._slices:
            return self._source.shape(name)
        stored, _, rows = self._slices[name]
        return (rows.stop - rows.start, self._source.shape(stored)[2])

    def dtype_name(self, name: str) -> str:
        return self._source.dtype_name(self._slices[name].stored if name in self._slices else name)

    def read(self, name: str) -> torch.Tensor:
        if name not in self._slices:
            return self._source.read(name)
        stored, expert, rows = self._slices[name]
        return self._source.read(stored)[expert, rows]

    def digest(self, name: str, tensor: torch.Tensor) -> bytes:
        return self._source.digest(name, tensor)
