"""A step in which some requests verify drafted tokens and the others decode: its shape, and its arrays padded to it.

# R requests, T rows (tokens), W blocks in a table
A shape is captured as a graph once; its arrays lie at the same addresses in every step of that shape.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch

from sempre.workers.gpu.staging import StepStaging
from sempre.workers.input_batch import Int32, Int64, StepPlan, StepRows

if TYPE_CHECKING:
    from sempre.kernels.sampling.gpu import Stages


class VerificationShape(NamedTuple):
    """What a graph is captured for."""

    num_requests: int
    num_rows: int
    max_query_len: int
    max_context_len: int
    stages: Stages


def verification_bucket(count: int) -> int:
    """The number to pad to: 1, 2, 3, 4, 6, 8, 12, 16, 24, …"""
    power = 1 << (count - 1).bit_length()
    return power * 3 // 4 if count <= power * 3 // 4 else power


class VerificationArrays(NamedTuple):
    """The arrays of a step; as tensors they are views of the staging buffer."""

    token_ids: Int64
    """[T]; -1: the slot's last token, which may exist on the device only"""
    positions: Int64
    slot_mapping: Int64
    sampled_positions: Int64
    """[T]: of the token that is sampled behind the row"""
    row_slots: Int64
    """[T]; 0 for padding"""
    offsets: Int32
    """[T], see DraftedRows"""
    query_starts: Int32
    """[R + 1]"""
    context_lens: Int32
    """[R]"""
    block_tables: Int32
    """[R, W]"""
    slots: Int64
    """[R]; 0 for padding"""

    @classmethod
    def empty(cls, num_requests: int, num_rows: int, width: int) -> VerificationArrays:
        """Padding only."""
        return cls(
            token_ids=np.zeros(num_rows, np.int64),
            positions=np.zeros(num_rows, np.int64),
            slot_mapping=np.full(num_rows, -1, np.int64),
            sampled_positions=np.zeros(num_rows, np.int64),
            row_slots=np.zeros(num_rows, np.int64),
            offsets=np.zeros(num_rows, np.int32),
            query_starts=np.zeros(num_requests + 1, np.int32),
            context_lens=np.zeros(num_requests, np.int32),
            block_tables=np.zeros((num_requests, width), np.int32),
            slots=np.zeros(num_requests, np.int64),
        )

    def fill(self, plan: StepPlan, rows: StepRows) -> None:
        """Put the step in front of the padding; every row of it samples."""
        count, num_rows = len(plan.states), rows.token_ids.size
        sampled = plan.sampled_rows
        self.token_ids[:num_rows] = rows.token_ids
        self.token_ids[plan.first_rows[plan.num_tokens == 1]] = -1
        self.positions[:num_rows] = rows.positions
        self.slot_mapping[:num_rows] = rows.slot_mapping
        self.sampled_positions[:num_rows] = sampled.positions
        self.row_slots[:num_rows] = plan.slots[sampled.requests]
        self.offsets[:num_rows] = sampled.offsets
        self.query_starts[: count + 1] = rows.query_starts
        self.query_starts[count + 1 :] = num_rows
        self.context_lens[:count] = rows.context_lens
        self.block_tables[:count, : rows.block_tables.shape[1]] = rows.block_tables
        self.slots[:count] = plan.slots


class VerificationStaging:
    """Sends the arrays of such steps; the buffer is large enough for all of them and never moves."""

    def __init__(self, device: torch.device, *, max_requests: int, max_rows: int, table_width: int) -> None:
        largest = VerificationArrays.empty(max_requests, max_rows, table_width)
        self._staging = StepStaging(device, sum(array.nbytes + 16 for array in largest))

    def send(self, arrays: VerificationArrays) -> None:
        self._staging.begin()
        for array in arrays:
            self._staging.put(array)
        self._staging.send()

    def views(self, num_requests: int, num_rows: int, width: int) -> list[torch.Tensor]:
        """Where the arrays of these sizes lie on the device, in the order of VerificationArrays."""
        return self._staging.views(list(VerificationArrays.empty(num_requests, num_rows, width)))
