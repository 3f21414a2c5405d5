"""Writes a safetensors file in bfloat16, piece by piece, without torch.

The format is a little-endian uint64 header length, a JSON header and the raw tensors in order. The library is not
used because it needs all tensors in memory at once and numpy has no bfloat16.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt

from sempre.ipc.errors import ModelError

_ALIGNMENT = 8


def bfloat16_bits(values: npt.NDArray[np.float32]) -> npt.NDArray[np.uint16]:
    """Round float32 values to the nearest bfloat16, ties to even; return their bits in the same shape.

    Raises ValueError when a value is NaN or infinite, or becomes infinite by rounding.
    """
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    # Half a unit of the last kept bit, minus one if the kept part is even: carries exactly when rounding up.
    rounded = ((bits + np.uint32(0x7FFF) + ((bits >> 16) & np.uint32(1))) >> 16).astype(np.uint16)
    # A NaN whose upper bits are all set wraps to zero in the sum, so the input is checked as well.
    if not np.isfinite(values).all() or ((rounded & 0x7F80) == 0x7F80).any():
        raise ValueError("a value is not finite in bfloat16")
    return rounded


def write_bfloat16(
    path: Path,
    shapes: Mapping[str, tuple[int, ...]],
    pieces: Callable[[str], Iterable[npt.NDArray[np.float32]]],
) -> None:
    """Write the tensors named in `shapes` to `path`, in that order.

    `pieces(name)` yields the tensor's values as consecutive row blocks; only one block is in memory at a time.
    Raises ModelError if a tensor has a non-finite value or a number of values that does not match its shape.
    """
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, shape in shapes.items():
        end = offset + 2 * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % _ALIGNMENT)
    with open(path, "wb") as file:
        file.write(len(encoded).to_bytes(8, "little"))
        file.write(encoded)
        for name, shape in shapes.items():
            num_values = 0
            for piece in pieces(name):
                try:
                    file.write(bfloat16_bits(piece).astype("<u2", copy=False).tobytes())
                except ValueError as error:
                    raise ModelError(f"tensor {name!r}: {error}; the source file is damaged.") from error
                num_values += piece.size
            if num_values != math.prod(shape):
                raise ModelError(
                    f"tensor {name!r}: expected {math.prod(shape)} values for {shape}, found {num_values}."
                )
