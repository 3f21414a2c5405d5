"""One program per row. R rows, S slots, W blocks in a table, B tokens in a block."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import triton.language as tl

from sempre.kernels.gpu_jit import CHAINED, jit, wait_for_previous
from sempre.kernels.sampling.gpu_noise import HEAD

if TYPE_CHECKING:
    from sempre.kernels.decode_inputs import DecodeInputs, DraftRows, SampledDrafts

_CHUNK = 256
_HEAD = tl.constexpr(HEAD)


@jit(runtime=("num_rows", "width"))
def _decode_inputs_kernel(
    rows: Any,
    last_tokens: Any,
    tables: Any,
    token_ids: Any,
    positions: Any,
    slot_mapping: Any,
    context_lens: Any,
    block_tables: Any,
    num_rows: Any,
    width: Any,
    BLOCK_SIZE: tl.constexpr,
    CHUNK: tl.constexpr,
) -> None:
    wait_for_previous()
    row = tl.program_id(0)
    slot = tl.load(rows + row)
    if slot < 0:
        tl.store(token_ids + row, tl.zeros((), tl.int64))
        tl.store(positions + row, tl.zeros((), tl.int64))
        tl.store(slot_mapping + row, tl.full((), -1, tl.int64))
        tl.store(context_lens + row, 0)
    else:
        position = tl.load(rows + num_rows + row)
        new_block = tl.load(rows + 2 * num_rows + row)
        table = tables + slot.to(tl.int64) * width
        gathered = block_tables + row.to(tl.int64) * width
        index = position // BLOCK_SIZE
        if new_block >= 0:
            tl.store(table + index, new_block)
        # the table's other entries were written by earlier launches; this one is taken from the register
        block = new_block
        if new_block < 0:
            block = tl.load(table + index)
        for start in range(0, index + 1, CHUNK):
            at = start + tl.arange(0, CHUNK)
            inside = at <= index
            old = tl.load(table + at, mask=inside & (at != index), other=0)
            tl.store(gathered + at, tl.where(at == index, block, old), mask=inside)
        tl.store(token_ids + row, tl.load(last_tokens + slot))
        tl.store(positions + row, position.to(tl.int64))
        tl.store(slot_mapping + row, block.to(tl.int64) * BLOCK_SIZE + position % BLOCK_SIZE)
        tl.store(context_lens + row, position + 1)


def decode_inputs(
    rows: torch.Tensor, last_tokens: torch.Tensor, tables: torch.Tensor, block_size: int, out: DecodeInputs
) -> None:
    """See the package."""
    num_rows = rows.shape[1]
    _decode_inputs_kernel[(num_rows,)](
        rows,
        last_tokens,
        tables,
        *out,
        num_rows,
        tables.shape[1],
        BLOCK_SIZE=block_size,
        CHUNK=_CHUNK,
        num_warps=2,
        **CHAINED,
    )


@jit(runtime=("num_rows",))
def _record_tokens_kernel(slots: Any, token_ids: Any, last_tokens: Any, num_rows: Any, ROWS: tl.constexpr) -> None:
    wait_for_previous()
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    slot = tl.load(slots + row, mask=row < num_rows, other=-1)
    token = tl.load(token_ids + row, mask=slot >= 0, other=0)
    tl.store(last_tokens + slot, token, mask=slot >= 0)


def record_tokens(slots: torch.Tensor, token_ids: torch.Tensor, last_tokens: torch.Tensor) -> None:
    """See the package."""
    num_rows = slots.shape[0]
    grid = (-(-num_rows // _CHUNK),)
    _record_tokens_kernel[grid](slots, token_ids, last_tokens, num_rows, ROWS=_CHUNK, num_warps=2, **CHAINED)


@jit(runtime=("width",))
def _next_draft_rows_kernel(
    slots: Any,
    context_lens: Any,
    sampled: Any,
    head: Any,
    starts: Any,
    ends: Any,
    block_tables: Any,
    drafts: Any,
    next_slots: Any,
    next_context_lens: Any,
    token_ids: Any,
    positions: Any,
    slot_mapping: Any,
    width: Any,
    BLOCK_SIZE: tl.constexpr,
    MOST: tl.constexpr,
) -> None:
    wait_for_previous()
    row = tl.program_id(0)
    slot, position = tl.load(slots + row), tl.load(context_lens + row)
    samples = slot >= 0
    is_token = tl.load(head + row * _HEAD + 1) == 0
    token = tl.load(sampled + row)
    draft = tl.where(is_token, token.to(tl.int32), -1)
    tl.store(drafts + row * MOST + position - tl.load(starts + row), draft, mask=samples)
    goes_on = samples & is_token & (position < tl.load(ends + row))
    tl.store(next_slots + row, tl.where(goes_on, slot, -1))
    tl.store(next_context_lens + row, tl.where(goes_on, position + 1, 0))
    tl.store(token_ids + row, tl.where(goes_on, token, 0))
    tl.store(positions + row, tl.where(goes_on, position, 0).to(tl.int64))
    block = tl.load(block_tables + row.to(tl.int64) * width + position // BLOCK_SIZE, mask=goes_on, other=0)
    place = block.to(tl.int64) * BLOCK_SIZE + position % BLOCK_SIZE
    tl.store(slot_mapping + row, tl.where(goes_on, place, -1))


def next_draft_rows(
    slots: torch.Tensor,
    context_lens: torch.Tensor,
    sampled: SampledDrafts,
    block_tables: torch.Tensor,
    block_size: int,
    out: DraftRows,
) -> None:
    """See the package."""
    _next_draft_rows_kernel[(slots.shape[0],)](
        slots,
        context_lens,
        sampled.token_ids,
        sampled.head,
        sampled.starts,
        sampled.ends,
        block_tables,
        sampled.drafts,
        *out,
        block_tables.shape[1],
        BLOCK_SIZE=block_size,
        MOST=sampled.drafts.shape[1],
        num_warps=1,
        **CHAINED,
    )
