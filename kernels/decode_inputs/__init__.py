"""The inputs of a decode step on a GPU, built from state that stays there, and the recording of its tokens.

Contract of `decode_inputs`: for each row r of a step, with slot s = slots[r] of the persistent state,
token_ids[r] = last_tokens[s]; positions[r] is copied; a new block, if the row brings one (>= 0), is entered at index
position // B of the slot's block table; slot_mapping[r] is where that position is in the cache; context_lens[r] =
position + 1; and the first ceil(context / B) entries of the table are copied to block_tables[r]. A row with slot -1 is
padding: it gets token 0, position 0, slot_mapping -1 and context 0.

Contract of `next_draft_rows`: for each row r with slots[r] >= 0 a token was sampled at position p = context_lens[r].
drafts[r, p - starts[r]] becomes that token, or -1 for a row in error. If there is a token and p < ends[r], row r
continues with it: token, position p, its place in block_tables[r], context p + 1, the same slot. Any other row becomes
padding as above, with slot -1. Slots and contexts may be updated in place.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch

from sempre.kernels.lazy_module import LazyModule

if TYPE_CHECKING:
    from sempre.kernels.decode_inputs import gpu as _gpu
else:
    _gpu = LazyModule(__name__, "gpu")


class DecodeInputs(NamedTuple):
    """Outputs, R rows: int64 [R], int64 [R], int64 [R], int32 [R], int32 [R, W]."""

    token_ids: torch.Tensor
    positions: torch.Tensor
    slot_mapping: torch.Tensor
    context_lens: torch.Tensor
    block_tables: torch.Tensor


def decode_inputs(
    rows: torch.Tensor, last_tokens: torch.Tensor, tables: torch.Tensor, block_size: int, out: DecodeInputs
) -> None:
    """`rows` int32 [3, R]: slots, positions, new blocks; `last_tokens` int64 [S]; `tables` int32 [S, W], updated.

    No slot may appear in two rows. All on one GPU, contiguous.
    """
    _gpu.decode_inputs(rows, last_tokens, tables, block_size, out)


class SampledDrafts(NamedTuple):
    """What was sampled for R rows, and where it belongs."""

    token_ids: torch.Tensor
    """int64 [R]"""
    head: torch.Tensor
    """int32 [R, HEAD] of the sampler: token id, flags, …"""
    starts: torch.Tensor
    """int32 [R]: position of the first draft token"""
    ends: torch.Tensor
    """int32 [R]: position of the last draft token, which is not computed"""
    drafts: torch.Tensor
    """int32 [R, most drafts]"""


class DraftRows(NamedTuple):
    """Outputs, R rows: int32 [R], int32 [R], int64 [R], int64 [R], int64 [R]."""

    slots: torch.Tensor
    context_lens: torch.Tensor
    token_ids: torch.Tensor
    positions: torch.Tensor
    slot_mapping: torch.Tensor


def next_draft_rows(
    slots: torch.Tensor,
    context_lens: torch.Tensor,
    sampled: SampledDrafts,
    block_tables: torch.Tensor,
    block_size: int,
    out: DraftRows,
) -> None:
    """`slots`, `context_lens` int32 [R], `block_tables` int32 [R, W]. All on one GPU, contiguous."""
    _gpu.next_draft_rows(slots, context_lens, sampled, block_tables, block_size, out)


def record_tokens(slots: torch.Tensor, token_ids: torch.Tensor, last_tokens: torch.Tensor) -> None:
    """last_tokens[slots[r]] = token_ids[r] for each row r with a slot >= 0; int32 [R], int64 [R], int64 [S]."""
    _gpu.record_tokens(slots, token_ids, last_tokens)
