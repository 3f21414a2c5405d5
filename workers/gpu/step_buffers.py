"""What a GPU runner keeps on the device between steps, and the buffers that a step reads and writes.

# N slots (one per known request), W blocks in a table, R rows of a decode step
Their addresses are fixed until slots are added: graphs refer to them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch

from sempre.kernels.attention import PagedBatch, SharedPrefixes
from sempre.kernels.attention.gpu_tiles import SPLIT
from sempre.kernels.attention.shared_prefixes import PrefixArrays, most_shared_splits
from sempre.kernels.attention.shared_prefixes import array_sizes as prefix_sizes
from sempre.kernels.decode_inputs import DecodeInputs, decode_inputs, record_tokens
from sempre.kernels.sampling.gpu import DraftedRows
from sempre.kernels.states import StateBatch
from sempre.workers.gpu.decode_graphs import DecodeShape
from sempre.workers.gpu.staging import ArraySize, StepStaging, staged_bytes
from sempre.workers.input_batch import RequestState, StepPlan
from sempre.workers.step_validation import StepLimits
from sempre.workers.steps import (
    AnyArray,
    Int32,
    StepArrays,
    StepInput,
    StepShape,
    array_sizes,
    padded,
    step_adapters,
    step_input,
)

_ROW_FIELDS = 3  # slot, position, new block
_STATE_FIELDS = 2  # slots of the states before and after the row
_ADAPTER_FIELDS = 1  # slot of the row's adapter


class SampledRows(NamedTuple):
    """Where a step samples; all [S] on the device."""

    rows: torch.Tensor | None
    """int64, of the hidden states; None: all of them"""
    slots: torch.Tensor
    """int32"""
    positions: torch.Tensor
    """int64"""
    drafts: DraftedRows | None
    """None when nothing is verified"""


class StepBuffers:
    """Block tables and last tokens by slot; the inputs of the current step."""

    def __init__(
        self, device: torch.device, limits: StepLimits, *, num_slots: int, table_width: int, block_size: int
    ) -> None:
        max_rows = limits.max_num_seqs
        self._device = device
        self._block_size = block_size
        self._table_width = table_width
        self._allocate_slots(num_slots)
        self._has_states = limits.num_state_slots > 0
        self.num_row_fields = _ROW_FIELDS + (_STATE_FIELDS if self._has_states else 0)
        self.num_row_fields += _ADAPTER_FIELDS if limits.num_adapter_slots else 0
        """numbers that a row of a decode step sends; that of the adapter comes last"""
        self._decode_staging = StepStaging(device, staged_bytes([self._decode_rows(max_rows)]))
        # sent only when they change
        self._prefix_staging = StepStaging(device, staged_bytes(_prefix_arrays(max_rows)))
        largest = [*array_sizes(limits.largest_step, block_size), *_new_requests(max_rows)]
        self._staging = StepStaging(device, staged_bytes(largest))
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

    # A decode step: everything but a few numbers per row is already on the device

    def stage_decode(self, rows: Int32) -> None:
        """Send slot, position and new block, and those of states and adapter, of the rows of a decode step: int32
        [num_row_fields, R]; -1: padding, none."""
        self._decode_staging.stage([rows])

    def _decode_rows(self, count: int) -> ArraySize:
        return np.int32, (self.num_row_fields, count)

    def decode_slots(self, num_rows: int) -> torch.Tensor:
        """int32 [R], at a fixed address."""
        return self._decode_staging.views([self._decode_rows(num_rows)])[0][0]

    def stage_prefixes(self, arrays: PrefixArrays) -> None:
        """Send what the requests of steps share, until they share something else."""
        self._prefix_staging.stage(arrays)

    def _prefixes(self, num_requests: int, max_context_len: int) -> SharedPrefixes:
        requests, tiles, num_tiles, counts = self._prefix_staging.views(_prefix_arrays(num_requests))
        max_splits = most_shared_splits(num_requests, -(-max_context_len // SPLIT))
        return SharedPrefixes(requests, tiles, num_tiles, counts, max_splits)

    def decode_inputs(self, shape: DecodeShape) -> StepInput:
        """Queue the computation of the inputs from the staged arrays; capturable."""
        num_rows, max_context_len = shape.num_rows, shape.max_context_len
        inputs = DecodeInputs(*(tensor[:num_rows] for tensor in self._decode))
        (rows,) = self._decode_staging.views([self._decode_rows(num_rows)])
        row_starts = self._row_starts[: num_rows + 1]
        decode_inputs(rows[:_ROW_FIELDS], self._last_tokens, self._tables, self._block_size, inputs)
        return StepInput(
            token_ids=inputs.token_ids,
            positions=inputs.positions,
            slot_mapping=inputs.slot_mapping,
            batch=PagedBatch(
                block_tables=inputs.block_tables,
                query_starts=row_starts,
                context_lens=inputs.context_lens,
                max_query_len=1,
                max_context_len=max_context_len,
                prefixes=self._prefixes(num_rows, max_context_len) if shape.shares_prefixes else None,
            ),
            states=StateBatch(rows[3], rows[4], row_starts) if self._has_states else None,
            adapters=step_adapters(rows[-1], None) if shape.has_adapters else None,
        )

    # Any other step

    def stage(
        self, plan: StepPlan, arrays: StepArrays[AnyArray], shape: StepShape, new: Sequence[RequestState]
    ) -> None:
        """Send the arrays of a step, padded to `shape`; `new` are its new requests.

        Afterwards the block tables on the device match the host's for every request of the step.
        """
        # rows of decoding requests: their tokens may exist only on the device
        arrays.token_ids[plan.first_rows[plan.decodes]] = -1
        if shape != plan.shape:
            arrays = padded(arrays, shape, self._block_size)
        new_tokens = np.asarray([[state.slot, state.token_ids[-1]] for state in new], np.int64).reshape(-1, 2).T
        self._staging.stage([*arrays, *new_tokens])
        extends_tables = any(item.block_ids for item in plan.scheduled)
        if not extends_tables and not new:
            return
        count = len(plan.states)
        sizes = [*array_sizes(shape, self._block_size), *_new_requests(len(new))]
        *views, new_slots, new_last_tokens = self._staging.views(sizes)
        on_device = StepArrays(*views)
        if extends_tables:
            tables = on_device.block_tables[:count]
            self._tables[:, : tables.shape[1]].index_copy_(0, on_device.slots[:count], tables)
        if new:
            self._last_tokens.index_copy_(0, new_slots, new_last_tokens)

    def inputs(self, shape: StepShape, *, shares_prefixes: bool = False) -> tuple[StepInput, SampledRows]:
        """Queue the computation of the inputs from the staged arrays; capturable."""
        prefixes = self._prefixes(shape.num_requests, shape.max_context_len) if shares_prefixes else None
        arrays = StepArrays(*self._staging.views(array_sizes(shape, self._block_size)))
        last_tokens = self._last_tokens.index_select(0, arrays.row_slots)
        token_ids = torch.where(arrays.token_ids < 0, last_tokens, arrays.token_ids)
        rows = arrays.sampled_rows if shape.num_sampled < shape.num_rows else None
        drafts = None
        if shape.max_sampled > 1:
            inputs = token_ids if rows is None else token_ids.index_select(0, rows)
            drafts = DraftedRows(arrays.draft_offsets, inputs, self._last_tokens)
        sampled = SampledRows(rows, arrays.sampled_slots, arrays.sampled_positions, drafts)
        return step_input(arrays, shape, token_ids=token_ids, prefixes=prefixes), sampled

    def record(self, slots: torch.Tensor, token_ids: torch.Tensor) -> None:
        """Keep the sampled tokens (int64 [S]) of `slots` (int32 [S]) for the next step; capturable."""
        record_tokens(slots, token_ids, self._last_tokens)


def _prefix_arrays(num_requests: int) -> list[ArraySize]:
    return [(np.int32, size) for size in prefix_sizes(num_requests)]


def _new_requests(count: int) -> list[ArraySize]:
    """Slots and last tokens."""
    return [(np.int64, (count,))] * 2
