"""GPU kernel: which of the tokens sampled after draft tokens are accepted (see `DraftedRows`)."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton.language as tl

from sempre.kernels.gpu_jit import jit
from sempre.kernels.sampling import gpu_noise, gpu_table

_WORDS = tl.constexpr(gpu_table.WORDS)
_COUNTS, _HISTORY = tl.constexpr(gpu_table.COUNTS), tl.constexpr(gpu_table.HISTORY)
_HEAD = tl.constexpr(gpu_noise.HEAD)


class DraftedRows(NamedTuple):
    """Rows that verify draft tokens: those of a request are adjacent, in the order of their positions."""

    offsets: torch.Tensor
    """int32 [R]: how many tokens before the row's are drafts; 0 for a request's first row, and for padding"""
    inputs: torch.Tensor
    """int64 [R]: the token that the row computed, after which it samples"""
    last_tokens: torch.Tensor
    """int64 [slots]: receives the last accepted token of each slot"""


@jit(runtime=("num_rows",))
def keep_tokens(
    row_slots: Any,
    offsets: Any,
    inputs: Any,
    positions: Any,
    addresses: Any,
    token_ids: Any,
    head: Any,
    last_tokens: Any,
    num_rows: Any,
    EDITS: tl.constexpr,
) -> None:
    """One program per row; the first row of a request walks its rows while the next one's draft token was sampled.

    last_tokens[slot] (int64) becomes the last accepted token; accepted tokens are added to counts and history. A row in
    error ends the walk. One warp: its stores to one address are in order.
    """
    row = tl.program_id(0)
    slot = tl.load(row_slots + row)
    if (slot < 0) | (tl.load(offsets + row) != 0):
        return
    tensors = addresses + slot.to(tl.int64) * (_WORDS // 2)
    accepted = tl.load(head + row * _HEAD + 1) == 0
    while accepted:
        token = tl.load(token_ids + row)
        tl.store(last_tokens + slot, token)
        if EDITS:
            counts, history = tl.load(tensors + _COUNTS), tl.load(tensors + _HISTORY)
            if counts != 0:
                tl.atomic_add(counts.to(tl.pointer_type(tl.int32)) + token, 1)
            if history != 0:
                tl.store(history.to(tl.pointer_type(tl.int32)) + tl.load(positions + row), token.to(tl.int32))
        row += 1
        exists = row < num_rows
        follows = tl.load(offsets + row, mask=exists, other=0) > 0
        drafted = tl.load(inputs + row, mask=follows, other=-1)
        accepted = follows & (drafted == token) & (tl.load(head + row * _HEAD + 1, mask=follows, other=1) == 0)
