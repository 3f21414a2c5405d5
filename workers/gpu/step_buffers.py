"""What a GPU runner keeps on the device between steps, and the buffers that a step reads and writes.

# S slots (one per known request), W blocks in a table, R rows
Their addresses are fixed until slots are added: graphs refer to them.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch

from sempre.kernels.attention import PagedBatch
from sempre.kernels.decode_inputs import DecodeInputs, decode_inputs, record_tokens
from sempre.kernels.sampling.gpu import DraftedRows
from sempre.workers.gpu.staging import StepStaging
from sempre.workers.gpu.verification import VerificationArrays, VerificationShape, VerificationStaging
from sempre.workers.input_batch import Int32, StepPlan, StepRows
from sempre.workers.steps import OutputRows, StepInput

_ROW_FIELDS = 3  # slot, position, new block


class StepBuffers:
    """Block tables and last tokens by slot; the inputs of the step in hand."""

    def __init__(
        self,
        device: torch.device,
        *,
        num_slots: int,
        table_width: int,
        max_rows: int,
        max_sampled_rows: int,
        max_tokens: int,
        block_size: int,
    ) -> None:
        self._device = device
        self._block_size = block_size
        self._table_width = table_width
        self._allocate_slots(num_slots)
        self._decode_staging = StepStaging(device, 4 * _ROW_FIELDS * max_rows)
        self._verification = VerificationStaging(
            device, max_requests=max_rows, max_rows=max_sampled_rows, table_width=table_width
        )
        self._staging = StepStaging(device, 32 * max_tokens + 64 * max_rows)
        self._decode = DecodeInputs(
            token_ids=torch.zeros(max_rows, dtype=torch.int64, device=device),
            positions=torch.zeros(max_rows, dtype=torch.int64, device=device),
            slot_mapping=torch.full((max_rows,), -1, dtype=torch.int64, device=device),
            context_lens=torch.zeros(max_rows, dtype=torch.int32, device=device),
            block_tables=torch.zeros(max_rows, table_width, dtype=torch.int32, device=device),
        )
        self._row_starts = torch.arange(max_rows + 1, dtype=torch.int32, device=device)

    @property
    def num_slots(self) -> int:
        return int(self._last_tokens.shape[0])

    def grow_slots(self, num_slots: int) -> None:
        """Make room for more known requests; addresses change."""
        last_tokens, tables = self._last_tokens, self._tables
        self._allocate_slots(num_slots)
        self._last_tokens[: last_tokens.shape[0]] = last_tokens
        self._tables[: tables.shape[0]] = tables

    def _allocate_slots(self, num_slots: int) -> None:
        self._last_tokens = torch.zeros(num_slots, dtype=torch.int64, device=self._device)
        self._tables = torch.zeros(num_slots, self._table_width, dtype=torch.int32, device=self._device)

    # A decode step: everything but three numbers per row is on the device already

    def stage_decode(self, rows: Int32) -> None:
        """Send slot, position and new block (int32 [3, R]; -1: padding, none) of the rows of a decode step."""
        self._decode_staging.begin()
        self._decode_staging.put(rows)
        self._decode_staging.send()

    def decode_slots(self, num_rows: int) -> torch.Tensor:
        """int32 [R], at a fixed address."""
        return self._decode_rows(num_rows)[0]

    def launch_decode_inputs(self, num_rows: int, max_context_len: int) -> StepInput:
        """Queue the making of the inputs from what was staged; capturable."""
        inputs = DecodeInputs(*(tensor[:num_rows] for tensor in self._decode))
        decode_inputs(self._decode_rows(num_rows), self._last_tokens, self._tables, self._block_size, inputs)
        return StepInput(
            token_ids=inputs.token_ids,
            positions=inputs.positions,
            slot_mapping=inputs.slot_mapping,
            batch=PagedBatch(
                block_tables=inputs.block_tables,
                query_starts=self._row_starts[: num_rows + 1],
                context_lens=inputs.context_lens,
                max_query_len=1,
                max_context_len=max_context_len,
            ),
        )

    def _decode_rows(self, num_rows: int) -> torch.Tensor:
        return self._decode_staging.first((_ROW_FIELDS, num_rows), torch.int32)

    # Any other step

    def stage(self, plan: StepPlan, rows: StepRows, new: tuple[list[int], list[int]]) -> tuple[StepInput, SampledRows]:
        """Send the arrays of a step; `new` are slots and last tokens of the requests it brings.

        Afterwards the block tables on the device are those of the host for every request of the step.
        """
        arrays = (rows.token_ids, rows.positions, rows.slot_mapping, rows.block_tables)
        staging = self._staging
        num_items = len(plan.states) + len(new[0]) + int(plan.num_drafts.sum()) + 16
        staging.begin(sum(array.nbytes for array in arrays) + 64 * num_items)
        token_ids, positions, slot_mapping, block_tables = (staging.put(array) for array in arrays)
        query_starts, context_lens = staging.put(rows.query_starts), staging.put(rows.context_lens)
        slots = staging.put(plan.slots)
        places = plan.sampled_rows
        sampled_rows, sampled_starts = staging.put(places.rows), staging.put(places.starts(len(plan.states)))
        sampled_slots = staging.put(plan.slots[places.requests].astype(np.int32))
        sampled_positions, offsets = staging.put(places.positions), staging.put(places.offsets.astype(np.int32))
        new_slots, new_tokens = (staging.put(np.asarray(part, np.int64)) for part in new)
        # rows of decoding requests: their tokens may exist on the device only
        decodes = np.flatnonzero(plan.samples & (plan.num_tokens == 1))
        decode_rows, decode_slots = staging.put(plan.last_rows[decodes]), staging.put(plan.slots[decodes])
        staging.send()
        self._tables[:, : block_tables.shape[1]].index_copy_(0, slots, block_tables)
        if new_slots.numel():
            self._last_tokens.index_copy_(0, new_slots, new_tokens)
        if decode_rows.numel():
            token_ids.index_copy_(0, decode_rows, self._last_tokens.index_select(0, decode_slots))
        model_input = StepInput(
            token_ids=token_ids,
            positions=positions,
            slot_mapping=slot_mapping,
            batch=PagedBatch(
                block_tables=block_tables,
                query_starts=query_starts,
                context_lens=context_lens,
                max_query_len=int(plan.num_tokens.max()),
                max_context_len=int(plan.context.max()),
            ),
            outputs=None
            if plan.reads_all_rows
            else OutputRows(sampled_rows, sampled_starts, 1 + int(plan.num_drafts.max())),
        )
        inputs = token_ids.index_select(0, sampled_rows)
        drafts = DraftedRows(offsets, inputs, self._last_tokens) if plan.has_drafts else None
        return model_input, SampledRows(sampled_rows, sampled_slots, sampled_positions, drafts)

    # A step that verifies drafted tokens beside decoding, and computes nothing else

    def stage_verification(self, plan: StepPlan, rows: StepRows, shape: VerificationShape) -> None:
        """Send the arrays of a step, padded to `shape`; block tables on the device are brought up to date."""
        width = self._table_blocks(shape)
        arrays = VerificationArrays.empty(shape.num_requests, shape.num_rows, width)
        arrays.fill(plan, rows)
        self._verification.send(arrays)
        if any(item.block_ids for item in plan.scheduled):
            count = len(plan.states)
            *_, block_tables, slots = self._verification.views(shape.num_requests, shape.num_rows, width)
            self._tables[:, :width].index_copy_(0, slots[:count], block_tables[:count])

    def launch_verification_inputs(self, shape: VerificationShape) -> tuple[StepInput, torch.Tensor, DraftedRows]:
        """Queue the making of the inputs from what was staged, capturable: also positions of the sampled tokens."""
        views = self._verification.views(shape.num_requests, shape.num_rows, self._table_blocks(shape))
        tokens, positions, slot_mapping, sampled_positions, row_slots, offsets, starts, lens, block_tables, _ = views
        token_ids = torch.where(tokens < 0, self._last_tokens.index_select(0, row_slots), tokens)
        model_input = StepInput(
            token_ids=token_ids,
            positions=positions,
            slot_mapping=slot_mapping,
            batch=PagedBatch(block_tables, starts, lens, shape.max_query_len, shape.max_context_len),
        )
        return model_input, sampled_positions, DraftedRows(offsets, token_ids, self._last_tokens)

    def _table_blocks(self, shape: VerificationShape) -> int:
        return -(-shape.max_context_len // self._block_size)

    def record(self, slots: torch.Tensor, token_ids: torch.Tensor) -> None:
        """Keep the sampled tokens (int64 [R]) of `slots` (int32 [R]) for the next step; capturable."""
        record_tokens(slots, token_ids, self._last_tokens)


class SampledRows(NamedTuple):
    """Where a step samples: rows of the hidden states int64, slots int32, positions int64; all [R'] on the device."""

    rows: torch.Tensor
    slots: torch.Tensor
    positions: torch.Tensor
    drafts: DraftedRows | None
    """None when nothing is verified"""
