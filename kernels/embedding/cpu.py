"""CPU embedding look-up. T tokens, V rows, H width."""

from __future__ import annotations

import numpy as np
import torch

from sempre.kernels.jit import compiled
from sempre.kernels.storage import ELEMENT_SIZE, storage_code, widen


@compiled()
def _embed(token_ids: np.ndarray, rows: int, table: int, width: int, storage: int, out: int) -> None:
    for t in range(rows):
        source = table + token_ids[t] * width * ELEMENT_SIZE[storage]
        widen(source, out + t * width * 4, width, storage)


def embed(token_ids: torch.Tensor, table: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """token_ids int64 [T], table [V, H] -> out [T, H] float32. IndexError when an id is outside the table."""
    ids: np.ndarray = token_ids.numpy()
    if len(ids) and (ids.min() < 0 or ids.max() >= table.shape[0]):
        raise IndexError(f"embed: token ids {ids.min()}..{ids.max()} are outside a table of {table.shape[0]} rows")
    _embed(ids, len(ids), table.data_ptr(), table.shape[1], storage_code(table.dtype), out.data_ptr())
    return out
