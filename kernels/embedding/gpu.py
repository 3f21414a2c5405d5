"""GPU embedding look-up. T tokens, V rows, H width."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from sempre.kernels.gpu_jit import CHAINED, jit, wait_for_previous

BLOCK = 1024


@jit(runtime=("vocabulary",))
def _embed(
    token_ids: Any,
    table: Any,
    out: Any,
    vocabulary: Any,
    width: Any,
    BLOCK: tl.constexpr,
) -> None:
    wait_for_previous()
    row = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    token = tl.load(token_ids + row)
    known = (token >= 0) & (token < vocabulary)
    value = tl.load(table + tl.where(known, token, 0) * width + i, mask=i < width)
    tl.store(out + row * width + i, tl.where(known, value, float("nan")), mask=i < width)


def embed(token_ids: torch.Tensor, table: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """See the facade: an exception for an id outside the table would have to wait for the device."""
    rows, width = out.shape
    grid = (rows, triton.cdiv(width, BLOCK))
    _embed[grid](token_ids, table, out, table.shape[0], width, BLOCK=BLOCK, num_warps=4, **CHAINED)
    return out
