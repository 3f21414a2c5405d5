"""Embedding: out[t] = table[token_ids[t]], widened exactly. On CPU the width must be a multiple of 16."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from sempre.kernels.checks import check_index, check_rows
from sempre.kernels.lazy_module import LazyModule

if TYPE_CHECKING:
    from sempre.kernels.embedding import cpu as _cpu
    from sempre.kernels.embedding import gpu as _gpu
else:
    _cpu = LazyModule(__name__, "cpu")
    _gpu = LazyModule(__name__, "gpu")

__all__ = ["embed"]


def embed(token_ids: torch.Tensor, table: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """token_ids int64 [T], table [V, H] -> out [T, H], float32 on CPU, the table's dtype on a GPU.

    An id outside the table raises IndexError on CPU and gives a row of NaN on a GPU, which is not waited for.
    """
    check_index("embed", "token_ids", token_ids, torch.int64)
    check_rows("embed", out, out)
    if not table.is_contiguous() or out.shape[0] != token_ids.shape[0] or out.shape[1] != table.shape[1]:
        raise ValueError(
            f"embed: out {tuple(out.shape)} does not fit {token_ids.shape[0]} rows of {tuple(table.shape)}"
        )
    if not out.shape[0]:
        return out
    if not table.is_cuda:
        low, high = (int(id) for id in torch.aminmax(token_ids))
        if low < 0 or high >= table.shape[0]:
            raise IndexError(f"embed: token ids {low}..{high} are outside a table of {table.shape[0]} rows")
        return _cpu.embed(token_ids, table, out)
    return _gpu.embed(token_ids, table, out)
