"""A step's arrays, described once: on the host, on the device, and as the model reads them.

# R requests in the step, T rows (tokens), S sampled rows, W blocks in a table, B block size A step is a shape and its
arrays. Decode, verification of drafts, proposals of a draft model and mixed steps are shapes. A graph is captured for a
shape: smaller steps are padded to it, and its arrays always lie at the same addresses.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Generic, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt
import torch

from sempre.kernels.attention import PagedBatch, SharedPrefixes
from sempre.kernels.lora import adapter_rows
from sempre.kernels.states import StateBatch
from sempre.workers.layers.lora import StepAdapters

Int64 = npt.NDArray[np.int64]
Int32 = npt.NDArray[np.int32]
AnyArray = npt.NDArray[np.signedinteger]
Array = TypeVar("Array")


class StepShape(NamedTuple):
    """Sizes of a step, and bounds that choose grids on a GPU and do not affect the result."""

    num_requests: int
    num_rows: int
    num_sampled: int
    """rows after which a token is sampled"""
    max_query_len: int
    """no request has more rows; 1: row r belongs to request r"""
    max_context_len: int
    """no context is longer"""
    max_sampled: int
    """no request has more sampled rows"""
    reads_all_rows: bool = False
    """whether final hidden states are needed of all rows, not only of the sampled ones"""
    has_states: bool = False
    """whether layers of the model keep states"""
    has_adapters: bool = False
    """whether any row has an adapter"""

    def size(self, dimension: str, block_size: int) -> int:
        """The size of a dimension in `FIELDS`."""
        match dimension:
            case "R":
                return self.num_requests
            case "R + 1":
                return self.num_requests + 1
            case "T":
                return self.num_rows
            case "S":
                return self.num_sampled
            case _:
                return -(-self.max_context_len // block_size)


class Field(NamedTuple):
    """One array of a step."""

    dtype: type[np.signedinteger]
    dimensions: tuple[str, ...]
    padding: int = 0
    of_states: bool = False
    """empty unless layers of the model keep states"""
    of_adapters: bool = False
    """empty unless a row of the step has an adapter"""

    def is_empty(self, shape: StepShape) -> bool:
        """Whether steps of this shape have none of it."""
        return (self.of_states and not shape.has_states) or (self.of_adapters and not shape.has_adapters)


class StepArrays(NamedTuple, Generic[Array]):
    """The arrays of a step, on the host or on a device; dtypes, dimensions and padding are those of `FIELDS`."""

    query_starts: Array
    """rows [query_starts[r], query_starts[r + 1]) belong to request r"""
    context_lens: Array
    """keys visible to the last row of the request"""
    block_tables: Array
    """entries past a request's context are not read"""
    slots: Array
    """of the request"""
    draft_ends: Array
    """of a proposal: the position of the request's last draft token"""
    state_reads: Array
    """slot of the state before the request's first row; -1: of no token"""
    sampled_starts: Array
    """sampled rows [sampled_starts[r], sampled_starts[r + 1]) belong to request r"""
    sampled_rows: Array
    """those of a request are adjacent, ascending"""
    sampled_slots: Array
    """of the sampled row's request"""
    sampled_positions: Array
    """of the sampled token in its sequence"""
    draft_offsets: Array
    """draft tokens between the request's last known token and the sampled one"""
    token_ids: Array
    """-1: the last token of the row's slot, which exists only on the device"""
    positions: Array
    """absolute in the sequence"""
    slot_mapping: Array
    """block id * B + offset, where the row's keys and values are written; -1: nowhere"""
    row_slots: Array
    """of the row's request"""
    state_writes: Array
    """slot for the state after the row; -1: none"""
    row_adapters: Array
    """slot of the row's adapter; -1: none"""


# those of T rows come last: steps that differ only in T have the others at the same addresses
FIELDS = StepArrays(
    query_starts=Field(np.int32, ("R + 1",)),
    context_lens=Field(np.int32, ("R",)),
    block_tables=Field(np.int32, ("R", "W")),
    slots=Field(np.int64, ("R",)),
    draft_ends=Field(np.int32, ("R",)),
    state_reads=Field(np.int32, ("R",), -1, of_states=True),
    sampled_starts=Field(np.int32, ("R + 1",)),
    sampled_rows=Field(np.int64, ("S",)),
    sampled_slots=Field(np.int32, ("S",)),
    sampled_positions=Field(np.int64, ("S",)),
    draft_offsets=Field(np.int32, ("S",)),
    token_ids=Field(np.int64, ("T",)),
    positions=Field(np.int64, ("T",)),
    slot_mapping=Field(np.int64, ("T",), -1),
    row_slots=Field(np.int64, ("T",)),
    state_writes=Field(np.int32, ("T",), -1, of_states=True),
    row_adapters=Field(np.int32, ("T",), -1, of_adapters=True),
)
# of a step of a model without states, or without adapters
EMPTY: Int32 = np.empty(0, np.int32)


def array_sizes(shape: StepShape, block_size: int) -> list[tuple[type[np.signedinteger], tuple[int, ...]]]:
    """Dtype and sizes of each array of a step, in the order of `StepArrays`."""
    sizes = []
    for field in FIELDS:
        size = tuple(shape.size(name, block_size) for name in field.dimensions)
        sizes.append((field.dtype, (0,) if field.is_empty(shape) else size))
    return sizes


def padding(shape: StepShape, block_size: int) -> StepArrays[AnyArray]:
    """A step of padding only; with one row per request, row r still belongs to request r."""
    sizes = array_sizes(shape, block_size)
    arrays = StepArrays(*(np.full(size, f.padding, dtype) for f, (dtype, size) in zip(FIELDS, sizes, strict=True)))
    if shape.max_query_len == 1:
        arrays.query_starts[:] = np.arange(shape.num_requests + 1)
    return arrays


def padded(arrays: StepArrays[AnyArray], shape: StepShape, block_size: int) -> StepArrays[AnyArray]:
    """The arrays, padded at the end to a larger shape."""
    out = padding(shape, block_size)
    for larger, array in zip(out, arrays, strict=True):
        larger[tuple(slice(size) for size in array.shape)] = array
    if shape.max_query_len > 1:
        out.query_starts[arrays.query_starts.size :] = arrays.query_starts[-1]
    out.sampled_starts[arrays.sampled_starts.size :] = arrays.sampled_starts[-1]
    return out


class RowPlaces(NamedTuple):
    """Where the rows of a step are; [T] except `query_starts` [R + 1]."""

    positions: Int64
    slot_mapping: Int64
    requests: Int64
    """index within the step"""
    query_starts: Int32


def row_places(starts: Int64, counts: Int64, block_tables: Int32, block_size: int) -> RowPlaces:
    """The places of tokens [starts[r], starts[r] + counts[r]) of each request r, one request after the other."""
    query_starts: Int32 = np.zeros(counts.size + 1, np.int32)
    np.cumsum(counts, out=query_starts[1:])
    requests, positions = np.arange(counts.size), starts
    if query_starts[-1] > counts.size:
        requests = np.repeat(requests, counts)
        positions = np.arange(query_starts[-1], dtype=np.int64) - np.repeat(query_starts[:-1] - starts, counts)
    blocks = block_tables[requests, positions // block_size].astype(np.int64)
    return RowPlaces(positions, blocks * block_size + positions % block_size, requests, query_starts)


class SampledRows(NamedTuple):
    """Where a step samples; arrays [M], the rows of one request adjacent and ascending."""

    requests: Int64
    """index within the step"""
    rows: Int64
    positions: Int64
    """positions of the sampled tokens in their sequences"""
    offsets: Int64
    """draft tokens between the request's last known one and the sampled one"""

    def starts(self, num_requests: int) -> Int32:
        """[R + 1]: the rows of request r of the step are entries [starts[r], starts[r + 1])."""
        return np.searchsorted(self.requests, np.arange(num_requests + 1)).astype(np.int32)


def step_arrays(
    slots: Int64,
    starts: Int64,
    counts: Int64,
    block_tables: Int32,
    block_size: int,
    token_ids: Int64,
    sampled: SampledRows,
) -> StepArrays[AnyArray]:
    """The arrays of a step that computes tokens [starts[r], starts[r] + counts[r]) of each request r, which `token_ids`
    [T] has one request after the other; without states and adapters."""
    places = row_places(starts, counts, block_tables, block_size)
    return StepArrays(
        query_starts=places.query_starts,
        context_lens=(starts + counts).astype(np.int32),
        block_tables=block_tables,
        slots=slots,
        draft_ends=np.zeros(slots.size, np.int32),
        state_reads=EMPTY,
        state_writes=EMPTY,
        sampled_starts=sampled.starts(slots.size),
        sampled_rows=sampled.rows,
        sampled_slots=slots[sampled.requests].astype(np.int32),
        sampled_positions=sampled.positions,
        draft_offsets=sampled.offsets.astype(np.int32),
        token_ids=token_ids,
        positions=places.positions,
        slot_mapping=places.slot_mapping,
        row_slots=slots[places.requests],
        row_adapters=EMPTY,
    )


@dataclass(frozen=True)
class OutputRows:
    """The rows whose final hidden states are needed: S of a step's T, the last ones of each request, in order."""

    rows: torch.Tensor
    """int64 [S]"""
    starts: torch.Tensor
    """int32 [R + 1]: entries [starts[r], starts[r + 1]) belong to request r, which may have none"""
    max_per_request: int


@dataclass(frozen=True)
class StepInput:
    """What the model reads of a step; rows of one request are adjacent, requests in the step's order."""

    token_ids: torch.Tensor
    """int64 [T]"""
    positions: torch.Tensor
    """int64 [T], absolute in the sequence"""
    slot_mapping: torch.Tensor
    """int64 [T]: block id * block_size + offset, where the token's keys and values are written"""
    batch: PagedBatch
    """the requests"""
    outputs: OutputRows | None = None
    """None: all rows"""
    states: StateBatch | None = None
    """of a model whose layers keep states"""
    adapters: StepAdapters | None = None
    """None: no row has one"""


def rows_read(rows: torch.Tensor, step: StepInput) -> torch.Tensor:
    """The rows of [T, H] that are read [S, H]."""
    return rows if step.outputs is None else rows.index_select(0, step.outputs.rows)


def of_rows_read(step: StepInput) -> StepInput:
    """The same step of the rows that are read, for layers that write no keys and values."""
    if step.outputs is None:
        return step
    read = step.outputs
    return replace(
        step,
        token_ids=step.token_ids.index_select(0, read.rows),
        positions=step.positions.index_select(0, read.rows),
        slot_mapping=step.slot_mapping.index_select(0, read.rows),
        batch=batch_of_rows_read(step.batch, read),
        outputs=None,
    )


def batch_of_rows_read(batch: PagedBatch, read: OutputRows) -> PagedBatch:
    """The requests of a step, with these of their rows."""
    return PagedBatch(batch.block_tables, read.starts, batch.context_lens, read.max_per_request, batch.max_context_len)


def step_input(
    arrays: StepArrays[torch.Tensor],
    shape: StepShape,
    *,
    token_ids: torch.Tensor | None = None,
    prefixes: SharedPrefixes | None = None,
) -> StepInput:
    """What the model reads of these arrays, with `token_ids` (int64 [T]) instead of theirs, where some were missing."""
    outputs = states = None
    if shape.has_states:
        states = StateBatch(arrays.state_reads, arrays.state_writes, arrays.query_starts)
    if not shape.reads_all_rows:
        outputs = OutputRows(arrays.sampled_rows, arrays.sampled_starts, shape.max_sampled)
    adapters = step_adapters(arrays.row_adapters, outputs) if shape.has_adapters else None
    return StepInput(
        token_ids=arrays.token_ids if token_ids is None else token_ids,
        positions=arrays.positions,
        slot_mapping=arrays.slot_mapping,
        batch=PagedBatch(
            block_tables=arrays.block_tables,
            query_starts=arrays.query_starts,
            context_lens=arrays.context_lens,
            max_query_len=shape.max_query_len,
            max_context_len=shape.max_context_len,
            prefixes=prefixes,
        ),
        outputs=outputs,
        states=states,
        adapters=adapters,
    )


def step_adapters(row_adapters: torch.Tensor, outputs: OutputRows | None) -> StepAdapters:
    """The slots of all rows, int32 [T], and of those that are read."""
    read = None if outputs is None else adapter_rows(row_adapters.index_select(0, outputs.rows))
    return StepAdapters(adapter_rows(row_adapters), read)
