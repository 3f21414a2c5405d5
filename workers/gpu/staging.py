"""Bytes on their way to the GPU, through pinned memory.

The numbers of one step are packed and sent in one copy. Several pinned buffers take turns, so that the host may pack a
step while the copies of the ones before it are queued. The device buffer is one: the stream orders its uses.
Weights come from memory-mapped files: while one piece is on its way to the device, the next is read from the file.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

_TURNS = 3
_ALIGNMENT = 16
PIECE_BYTES = 32 << 20


class StepStaging:
    """Arrays put in one after the other; each becomes valid on the device with `send`."""

    def __init__(self, device: torch.device, capacity_bytes: int) -> None:
        self._device = device
        self._copied = [torch.cuda.Event() for _ in range(_TURNS)]  # type: ignore[no-untyped-call]
        self._turn = 0
        self._used = 0
        self._allocate(capacity_bytes)

    def begin(self, needed_bytes: int = 0) -> None:
        """Start a step that puts at most `needed_bytes`; views of the former step's arrays are valid no more."""
        self._turn = (self._turn + 1) % _TURNS
        self._copied[self._turn].synchronize()
        self._used = 0
        if needed_bytes > self._buffer.numel():
            torch.cuda.current_stream(self._device).synchronize()
            self._allocate(2 * needed_bytes)

    def put(self, array: npt.NDArray[Any]) -> torch.Tensor:
        """Where `array` will be on the device. The first array of a step always lies at the same address."""
        start = self._used
        end = start + array.nbytes
        self._used = -(-end // _ALIGNMENT) * _ALIGNMENT
        host = self._hosts[self._turn][start:end]
        np.copyto(host.view(array.dtype).reshape(array.shape), array)
        dtype = torch.from_numpy(np.empty(0, array.dtype)).dtype
        return self._buffer[start:end].view(dtype).view(array.shape)

    def send(self) -> None:
        self._buffer[: self._used].copy_(self._pinned[self._turn][: self._used], non_blocking=True)
        self._copied[self._turn].record()

    def first(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """The view that `put` gives for the first array of a step."""
        size = int(np.prod(shape)) * dtype.itemsize
        return self._buffer[:size].view(dtype).view(shape)

    def views(self, arrays: Sequence[npt.NDArray[Any]]) -> list[torch.Tensor]:
        """Where arrays of these shapes lie when a step puts them, and nothing before them."""
        views, start = [], 0
        for array in arrays:
            dtype = torch.from_numpy(np.empty(0, array.dtype)).dtype
            views.append(self._buffer[start : start + array.nbytes].view(dtype).view(array.shape))
            start = -(-(start + array.nbytes) // _ALIGNMENT) * _ALIGNMENT
        return views

    def _allocate(self, capacity_bytes: int) -> None:
        capacity = -(-capacity_bytes // _ALIGNMENT) * _ALIGNMENT
        self._pinned = [torch.empty(capacity, dtype=torch.uint8, device="cpu", pin_memory=True) for _ in range(_TURNS)]
        self._hosts: list[npt.NDArray[np.uint8]] = [pinned.numpy() for pinned in self._pinned]
        self._buffer = torch.empty(capacity, dtype=torch.uint8, device=self._device)


class Uploader:
    """Copies whole tensors; the copies are ordered with the work on the current stream."""

    def __init__(self, device: torch.device, piece_bytes: int = PIECE_BYTES) -> None:
        self._device = device
        self._pieces = [torch.empty(piece_bytes, dtype=torch.uint8, device="cpu", pin_memory=True) for _ in range(2)]
        self._copied = [torch.cuda.Event() for _ in range(2)]  # type: ignore[no-untyped-call]
        self._next = 0

    def __call__(self, tensor: torch.Tensor) -> torch.Tensor:
        """The tensor on the device; one that is there already is returned as it is."""
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
