"""Weights from memory-mapped files to the GPU through two pinned buffers.

While one buffer's bytes are on their way to the device, the next piece is read from the file into the other.
"""

from __future__ import annotations

import torch

PIECE_BYTES = 32 << 20


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
