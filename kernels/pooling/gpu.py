"""GPU row sums: a program owns some columns of one request and walks its rows. R requests, T rows, H width."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from sempre.kernels.gpu_jit import CHAINED, jit, wait_for_previous
from sempre.kernels.pooling import RowSpans

BLOCK = 128
# rows that are loaded before the first of them is added
AT_ONCE = 8


@jit(runtime=("width",))
def _add_rows(
    hidden: Any,
    first: Any,
    end: Any,
    slots: Any,
    begins: Any,
    sums: Any,
    width: Any,
    BLOCK: tl.constexpr,
    AT_ONCE: tl.constexpr,
) -> None:
    wait_for_previous()
    request = tl.program_id(0)
    i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = i < width
    at = sums + tl.load(slots + request) * width + i
    total = tl.where(tl.load(begins + request) != 0, 0.0, tl.load(at, mask=inside, other=0.0))
    last = tl.load(end + request)
    for start in range(tl.load(first + request), last, AT_ONCE):
        # a sum is never -0, so adding 0 for rows past the end changes nothing
        for ahead in tl.static_range(AT_ONCE):
            row = start + ahead
            value = tl.load(hidden + row * width + i, mask=i < tl.where(row < last, width, 0), other=0.0)
            total += value.to(tl.float64)
    tl.store(at, total, mask=inside)


def add_rows(hidden: torch.Tensor, spans: RowSpans, sums: torch.Tensor) -> torch.Tensor:
    """See the facade."""
    width = hidden.shape[1]
    grid = (len(spans.slots), triton.cdiv(width, BLOCK))
    _add_rows[grid](hidden, *spans, sums, width, BLOCK=BLOCK, AT_ONCE=AT_ONCE, num_warps=4, **CHAINED)
    return sums
