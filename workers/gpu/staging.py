"""Copies to the GPU, through pinned memory.

The numbers of one step are packed and sent in one copy. Several pinned buffers take turns, so that the host may pack a
step while copies of earlier ones are queued. There is one device buffer: the stream orders its uses. Weights come from
memory-mapped files: while one piece is being copied to the device, the next is read from the file.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

_TURNS = 3
_ALIGNMENT = 16
PIECE_BYTES = 32 << 20
_DTYPES: dict[type[np.generic], torch.dtype] = {np.int32: torch.int32, np.int64: torch.int64}
ArraySize = tuple[type[np.generic], tuple[int, ...]]


def staged_bytes(sizes: Sequence[ArraySize]) -> int:
    """Bytes that arrays of these dtypes and sizes take, one after the other."""
    return sum(math.prod(size) * np.dtype(dtype).itemsize + _ALIGNMENT for dtype, size in sizes)


class StepStaging:
    """The arrays of a step, one after the other; the buffer on the device never moves."""

    def __init__(self, device: torch.device, capacity_bytes: int) -> None:
        self._copied = [torch.cuda.Event() for _ in range(_TURNS)]  # type: ignore[no-untyped-call]
        self._turn = 0
        self._used = 0
        capacity = -(-capacity_bytes // _ALIGNMENT) * _ALIGNMENT
        self._pinned = [torch.empty(capacity, dtype=torch.uint8, device="cpu", pin_memory=True) for _ in range(_TURNS)]
        self._hosts: list[npt.NDArray[np.uint8]] = [pinned.numpy() for pinned in self._pinned]
        self._buffer = torch.empty(capacity, dtype=torch.uint8, device=device)

    def stage(self, arrays: Sequence[npt.NDArray[Any]]) -> None:
        """Send the arrays of a step; views of the previous step's arrays are no longer valid."""
        self._turn = (self._turn + 1) % _TURNS
        self._copied[self._turn].synchronize()
        self._used = 0
        for array in arrays:
            self._put(array)
        self._buffer[: self._used].copy_(self._pinned[self._turn][: self._used], non_blocking=True)
        self._copied[self._turn].record()

    def _put(self, array: npt.NDArray[Any]) -> None:
        """Append an array to those of this step; `views` says where it will be on the device."""
        start = self._used
        end = start + array.nbytes
        self._used = -(-end // _ALIGNMENT) * _ALIGNMENT
        np.copyto(self._hosts[self._turn][start:end].view(array.dtype).reshape(array.shape), array)

    def views(self, sizes: Sequence[ArraySize]) -> list[torch.Tensor]:
        """Where arrays of these dtypes and sizes are when a step has them first."""
        views, start = [], 0
        for dtype, size in sizes:
            end = start + math.prod(size) * np.dtype(dtype).itemsize
            views.append(self._buffer[start:end].view(_DTYPES[dtype]).view(size))
            start = -(-end // _ALIGNMENT) * _ALIGNMENT
        return views


class Uploader:
    """Copies whole tensors; the copies are ordered with the work on the current stream."""

    def __init__(self, device: torch.device, piece_bytes: int = PIECE_BYTES) -> None:
        self._device = device
        self._pieces = [torch.empty(piece_bytes, dtype=torch.uint8, device="cpu", pin_memory=True) for _ in range(2)]
        self._copied = [torch.cuda.Event() for _ in range(2)]  # type: ignore[no-untyped-call]
        self._next = 0

    def __call__(self, tensor: torch.Tensor) -> torch.Tensor:
        """The tensor on the device; one that is already there is returned unchanged."""
        if tensor.device == self._device:
            return tensor
        source = tensor.contiguous().view(-1).view(torch.uint8)
        out = torch.empty(tensor.shape, dtype=tensor.dtype, device=self._device)
        target = out.view(-1).view(torch.uint8)
        size = self._pieces[0].numel()
        for start in range(0, source.numel(), size):
            part = source[start : start + size]
            piece = self._pieces[self._next][: part.numel()]
            self._copied[self._next].synchronize()
            piece.copy_(part)
            target[start : start + size].copy_(piece, non_blocking=True)
            self._copied[self._next].record()
            self._next = 1 - self._next
        return out
