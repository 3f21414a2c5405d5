"""The arrays of a step and their padding, against their definition."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from sempre.workers.gpu.decode_graphs import size_bucket
from sempre.workers.steps import (
    EMPTY,
    FIELDS,
    StepArrays,
    StepShape,
    array_sizes,
    padded,
    padding,
    row_places,
    step_input,
)

BLOCK = 16


def step(counts: list[int], starts: list[int]) -> tuple[StepArrays, StepShape]:
    """Requests that compute `counts` tokens from `starts` on, and sample after the last of them."""
    lengths, first = np.asarray(counts), np.asarray(starts)
    context = first + lengths
    width = -(-int(context.max()) // BLOCK)
    tables = np.arange(1, len(counts) * width + 1, dtype=np.int32).reshape(len(counts), width)
    places = row_places(first, lengths, tables, BLOCK)
    slots = np.arange(7, 7 + len(counts))
    arrays = StepArrays(
        query_starts=places.query_starts,
        context_lens=context.astype(np.int32),
        block_tables=tables,
        slots=slots,
        draft_ends=context.astype(np.int32) + 3,
        state_reads=EMPTY,
        state_writes=EMPTY,
        sampled_starts=np.arange(len(counts) + 1, dtype=np.int32),
        sampled_rows=places.query_starts[1:].astype(np.int64) - 1,
        sampled_slots=slots.astype(np.int32),
        sampled_positions=context,
        draft_offsets=np.zeros(len(counts), np.int32),
        token_ids=np.arange(100, 100 + lengths.sum()),
        positions=places.positions,
        slot_mapping=places.slot_mapping,
        row_slots=slots[places.requests],
        row_adapters=EMPTY,
    )
    shape = StepShape(len(counts), int(lengths.sum()), len(counts), int(lengths.max()), int(context.max()), 1)
    return arrays, shape


def test_rows_are_in_the_blocks_of_their_own_request() -> None:
    arrays, _ = step([3, 1], [14, 40])
    assert arrays.positions.tolist() == [14, 15, 16, 40]
    assert arrays.slot_mapping.tolist() == [16 + 14, 16 + 15, 32 + 0, 6 * 16 + 8]
    assert arrays.row_slots.tolist() == [7, 7, 7, 8]
    assert arrays.query_starts.tolist() == [0, 3, 4]


@pytest.mark.parametrize("counts", [[1, 1, 1], [2, 1, 2], [5]])
def test_a_padded_step_is_the_step_and_unused_rows(counts: list[int]) -> None:
    arrays, shape = step(counts, [30, 2, 9][: len(counts)])
    larger = shape._replace(
        num_requests=shape.num_requests + 2,
        num_rows=shape.num_rows + (2 if shape.max_query_len == 1 else 5),
        num_sampled=shape.num_sampled + 2,
        max_context_len=100,
    )
    found = padded(arrays, larger, BLOCK)
    for name, array, field, (dtype, size) in zip(
        StepArrays._fields, found, FIELDS, array_sizes(larger, BLOCK), strict=True
    ):
        assert (array.dtype, array.shape) == (dtype, size), name
        expected = getattr(arrays, name)
        begin = tuple(slice(length) for length in expected.shape)
        assert (array[begin] == expected).all(), name
        if name not in ("query_starts", "sampled_starts"):
            rest = array.copy()
            rest[begin] = field.padding
            assert (rest == field.padding).all(), name
    # padding belongs to no request, or, where each has one row, to requests of no context
    ends = found.query_starts[shape.num_requests :].tolist()
    assert ends == ([3, 4, 5] if shape.max_query_len == 1 else [shape.num_rows] * 3)
    assert found.sampled_starts[shape.num_requests :].tolist() == [shape.num_sampled] * 3


def test_steps_that_differ_only_in_rows_have_the_other_arrays_at_the_same_places() -> None:
    one = StepShape(4, 4, 4, 1, 50, 1)
    sizes = [array_sizes(shape, BLOCK) for shape in (one, one._replace(num_rows=8, max_query_len=2))]
    per_row = [index for index, field in enumerate(FIELDS) if "T" in field.dimensions]
    assert per_row == list(range(per_row[0], len(FIELDS)))
    assert sizes[0][: per_row[0]] == sizes[1][: per_row[0]]
    assert sizes[0] != sizes[1]


def test_the_model_reads_all_rows_or_those_that_sample() -> None:
    arrays, shape = step([3, 1], [0, 4])
    tensors = StepArrays(*map(torch.from_numpy, arrays))
    some = step_input(tensors, shape)
    assert some.outputs is not None
    assert some.outputs.rows.tolist() == [2, 3]
    assert step_input(tensors, shape._replace(reads_all_rows=True)).outputs is None
    known = torch.tensor([9, 9, 9, 9])
    assert step_input(tensors, shape, token_ids=known).token_ids.tolist() == [9, 9, 9, 9]


def test_a_step_of_only_padding_writes_nowhere() -> None:
    shape = StepShape(2, 2, 2, 1, 10, 1)
    empty = padding(shape, BLOCK)
    assert empty.slot_mapping.tolist() == [-1, -1]
    assert empty.context_lens.tolist() == [0, 0]
    assert empty.query_starts.tolist() == [0, 1, 2]


def test_sizes_to_pad_to() -> None:
    assert [size_bucket(count) for count in range(1, 10)] == [1, 2, 3, 4, 6, 6, 8, 8, 12]


def test_a_model_without_states_sends_none_and_one_with_states_pads_them_with_none() -> None:
    arrays, shape = step([2, 1], [0, 4])
    tensors = StepArrays(*map(torch.from_numpy, arrays))
    assert step_input(tensors, shape).states is None
    with_states = shape._replace(has_states=True, num_requests=3, num_rows=4)
    arrays = arrays._replace(state_reads=np.asarray([-1, 5], np.int32), state_writes=np.asarray([-1, 6, 5], np.int32))
    larger = padded(arrays, with_states, BLOCK)
    states = step_input(StepArrays(*map(torch.from_numpy, larger)), with_states).states
    assert states is not None
    assert states.reads.tolist() == [-1, 5, -1]
    assert states.writes.tolist() == [-1, 6, 5, -1]
