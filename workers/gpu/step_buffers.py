"""What a GPU runner keeps on the device between steps, and the buffers that a step reads and writes.

# S slots (one per known request), W blocks in a table, R rows
Their addresses are fixed until slots are added: graphs refer to them.
"""

from __future__ import annotations

import numpy as np
import torch

from sempre.kernels.decode_inputs import DecodeInputs, decode_inputs, record_tokens
from sempre.workers.gpu.staging import StepStaging
from sempre.workers.input_batch import Int32, StepPlan, StepRows
from sempre.workers.models.decoder import StepInput

_ROW_FIELDS = 3  # slot, position, new block


class StepBuffers:
    """Block tables and last tokens by slot; the inputs of the step in hand."""

    def __init__(
        self, device: torch.device, *, num_slots: int, table_width: int, max_rows: int, max_tokens: int, block_size: int
    ) -> None:
        self._device = device
        self._block_size = block_size
        self._table_width = table_width
        self._max_rows = max_rows
        self._allocate_slots(num_slots)
        self._decode_staging = StepStaging(device, 4 * _ROW_FIELDS * max_rows)
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
            block_tables=inputs.block_tables,
            query_starts=self._row_starts[: num_rows + 1],
            context_lens=inputs.context_lens,
            max_query_len=1,
            max_context_len=max_context_len,
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
        staging.begin(sum(array.nbytes for array in arrays) + 64 * (len(plan.states) + len(new[0]) + 16))
        token_ids, positions, slot_mapping, block_tables = (staging.put(array) for array in arrays)
        query_starts, context_lens = staging.put(rows.query_starts), staging.put(rows.context_lens)
        slots = staging.put(plan.slots)
        sampling = np.flatnonzero(plan.samples)
        sampled = SampledRows(
            rows=staging.put(plan.last_rows[sampling]),
            slots=staging.put(plan.slots[sampling].astype(np.int32)),
            positions=staging.put(plan.context[sampling]),
        )
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
            block_tables=block_tables,
            query_starts=query_starts,
            context_lens=context_lens,
            max_query_len=int(plan.num_tokens.max()),
            max_context_len=int(plan.context.max()),
        )
        return model_input, sampled

    def record(self, slots: torch.Tensor, token_ids: torch.Tensor) -> None:
        """Keep the sampled tokens (int64 [R]) of `slots` (int32 [R]) for the next step; capturable."""
        record_tokens(slots, token_ids, self._last_tokens)


class SampledRows:
    """Where a step samples: rows of the hidden states int64, slots int32, positions int64; all [R'] on the device."""

    def __init__(self, rows: torch.Tensor, slots: torch.Tensor, positions: torch.Tensor) -> None:
        self.rows = rows
        self.slots = slots
        self.positions = positions
