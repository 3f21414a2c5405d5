"""A draft model on a GPU: one proposal is a few CUDA graphs and one wait.

# R sequences, T rows (tokens), W blocks in a table
A proposal begins with the tokens that came since the last one: one, or two where all drafts were right, so a graph
takes one or two rows of each sequence. Each further draft token is a decode step whose inputs the device prepares
itself. Anything else that is missing, a prompt for instance, is computed first, kernel by kernel.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch

from sempre.ipc.messages import NewRequest
from sempre.kernels.attention import PagedBatch
from sempre.kernels.decode_inputs import DraftRows, SampledDrafts, next_draft_rows
from sempre.workers.drafters.base import MAX_DRAFT_TOKENS, DraftTask
from sempre.workers.gpu.decode_graphs import DecodeGraphs, context_bucket, size_bucket
from sempre.workers.gpu.staging import StepStaging, staged_bytes
from sempre.workers.kv_cache import PagedKvCache
from sempre.workers.sampling import RowError, SamplingState
from sempre.workers.step_validation import StepLimits
from sempre.workers.steps import (
    AnyArray,
    Int32,
    SampledRows,
    StepArrays,
    StepInput,
    StepShape,
    array_sizes,
    padded,
    padding,
    step_arrays,
    step_input,
)

if TYPE_CHECKING:
    from sempre.kernels.sampling.gpu import Stages
    from sempre.workers.gpu.runner import StepMemory

# graphs up to these bounds are captured before the first request
_CAPTURED_REQUESTS = (1, 2, 4, 8)
_CAPTURED_CONTEXTS = (512, 1024)


class DraftShape(NamedTuple):
    """What a graph is captured for."""

    num_requests: int
    rows_per_request: int
    """1 or 2; a sequence may have fewer"""
    max_context_len: int
    stages: Stages

    @property
    def step(self) -> StepShape:
        """Every request samples after its last row."""
        return StepShape(
            num_requests=self.num_requests,
            num_rows=self.rows_per_request * self.num_requests,
            num_sampled=self.num_requests,
            max_query_len=self.rows_per_request,
            max_context_len=self.max_context_len,
            max_sampled=1,
            reads_all_rows=self.rows_per_request == 1,
        )


@dataclass
class _Admitted:
    """A sequence as the device sees it."""

    slot: int
    drafted_at: int
    drafts: list[int] = field(default_factory=list)


class _Piece(NamedTuple):
    """Tokens [start, end) of a sequence, to be computed."""

    task: DraftTask
    slot: int
    start: int
    end: int


class GpuDraftModelRunner:
    """Keeps sequences in the slots of a sampler of its own, and their block tables on the host."""

    def __init__(self, memory: StepMemory, cache: PagedKvCache, limits: StepLimits, *, graphs: bool) -> None:
        self.cache = cache
        self.limits = limits
        self._model = memory.model
        self._sampler = memory.sampler
        self._logits_RV = memory.logits_RV
        # a step has no more rows than tokens
        self._most_requests = most = min(limits.max_num_seqs, limits.max_num_batched_tokens)
        self._states: dict[str, _Admitted] = {}
        self._free_slots = list(range(most - 1, -1, -1))
        width = -(-limits.max_model_len // cache.block_size)
        self._tables: Int32 = np.zeros((most, width), np.int32)
        device = memory.logits_RV.device
        self._staging = StepStaging(device, staged_bytes(array_sizes(limits.largest_step, cache.block_size)))
        self._rows = DraftRows(
            *(torch.zeros(most, dtype=torch.int32, device=device) for _ in range(2)),
            *(torch.zeros(most, dtype=torch.int64, device=device) for _ in range(3)),
        )
        self._row_starts = torch.arange(most + 1, dtype=torch.int32, device=device)
        self._drafts = torch.zeros(most, MAX_DRAFT_TOKENS, dtype=torch.int32, device=device)
        self._drafts_on_host = torch.empty(most, MAX_DRAFT_TOKENS, dtype=torch.int32, device="cpu", pin_memory=True)
        self._done = torch.cuda.Event()  # type: ignore[no-untyped-call]
        self._first: DecodeGraphs[DraftShape] = DecodeGraphs(self._launch_first, enabled=graphs)
        self._next: DecodeGraphs[DraftShape] = DecodeGraphs(self._launch_next, enabled=graphs)

    # Sequences come and go

    def admit(self, new: NewRequest) -> bool:
        slot = self._free_slots.pop()
        try:
            self._sampler.admit(slot, SamplingState(new.params, new.seed, new.token_ids, new.num_prompt_tokens))
        except RowError:  # the target reports it
            self._free_slots.append(slot)
            return False
        self._states[new.request_id] = _Admitted(slot, len(new.token_ids))
        return True

    def release(self, request_id: str) -> None:
        slot = self._states.pop(request_id).slot
        self._sampler.release(slot)
        self._free_slots.append(slot)

    # A proposal

    @torch.inference_mode()
    def draft(self, tasks: Sequence[DraftTask]) -> list[list[int]]:
        states = [self._states[task.request_id] for task in tasks]
        for task, state in zip(tasks, states, strict=True):
            wrong = state.drafts[task.num_unchanged - state.drafted_at :]
            self._sampler.revise(state.slot, task.num_unchanged, wrong, task.token_ids[task.num_unchanged :])
            self._tables[state.slot, : len(task.block_ids)] = task.block_ids
        pieces = self._catch_up(
            [
                _Piece(task, state.slot, task.num_computed, len(task.token_ids))
                for task, state in zip(tasks, states, strict=True)
            ]
        )
        shape = self._stage(pieces)
        self._first.run(shape)
        next_shape = shape._replace(rows_per_request=1)
        for _ in range(max(task.count for task in tasks) - 1):
            self._next.run(next_shape)
        found = self._read_drafts(len(pieces))
        answers = []
        for task, state, row in zip(tasks, states, found, strict=True):
            tokens = row[: task.count]
            if -1 in tokens:
                tokens = tokens[: tokens.index(-1)]
            state.drafted_at, state.drafts = len(task.token_ids), tokens
            answers.append(tokens.copy())
        return answers

    def _read_drafts(self, count: int) -> list[list[int]]:
        """[R][MAX_DRAFT_TOKENS]; entries not drafted now keep their old values. Waits for the device."""
        on_host = self._drafts_on_host[:count]
        on_host.copy_(self._drafts[:count], non_blocking=True)
        self._done.record()
        self._done.synchronize()
        found: list[list[int]] = on_host.tolist()
        return found

    def _stage(self, pieces: list[_Piece]) -> DraftShape:
        """Send the arrays of a proposal's first step, padded to the returned shape."""
        num_rows = sum(piece.end - piece.start for piece in pieces)
        num_requests = self._bucket(len(pieces))
        ends = [piece.end + piece.task.count - 1 for piece in pieces]
        context_len = context_bucket(max(ends), self.limits.max_model_len)
        stages = self._sampler.prepare([piece.slot for piece in pieces] + [-1] * (num_requests - len(pieces)))
        shape = DraftShape(num_requests, 1 if num_rows == len(pieces) else 2, context_len, stages)
        arrays = self._arrays(pieces, context_len, samples=True)._replace(draft_ends=np.asarray(ends, np.int32))
        self._staging.stage(padded(arrays, shape.step, self.cache.block_size))
        return shape

    def _bucket(self, count: int) -> int:
        # without graphs there is nothing to pad for
        return min(size_bucket(count), self._most_requests) if self._first.enabled else count

    # The kernels of a proposal, capturable

    def _launch_first(self, shape: DraftShape) -> None:
        """The last one or two known tokens of each sequence, and its first draft token."""
        arrays = self._views(shape)
        slots = self._sampler.row_slots[: shape.num_requests]
        hidden_RH = self._model.forward(step_input(arrays, shape.step), self.cache.layers)
        self._sample(hidden_RH, shape, slots, arrays.context_lens)

    def _launch_next(self, shape: DraftShape) -> None:
        """A decode step with the previous draft token; sequences that have all of theirs are padding."""
        rows = self._draft_rows(shape)
        model_input = StepInput(
            token_ids=rows.token_ids,
            positions=rows.positions,
            slot_mapping=rows.slot_mapping,
            batch=PagedBatch(
                block_tables=self._views(shape).block_tables,
                query_starts=self._row_starts[: shape.num_requests + 1],
                context_lens=rows.context_lens,
                max_query_len=1,
                max_context_len=shape.max_context_len,
            ),
        )
        self._sample(self._model.forward(model_input, self.cache.layers), shape, rows.slots, rows.context_lens)

    def _sample(
        self, hidden_RH: torch.Tensor, shape: DraftShape, slots: torch.Tensor, context_lens: torch.Tensor
    ) -> None:
        """Sample after every row, keep the draft tokens, and prepare the rows of the next decode step."""
        arrays = self._views(shape)
        logits_RV = self._model.logits(hidden_RH, self._logits_RV[: shape.num_requests])
        tokens_R = self._sampler.sample(logits_RV, context_lens, shape.stages, row_slots=slots)
        sampled = SampledDrafts(tokens_R, self._sampler.head, arrays.context_lens, arrays.draft_ends, self._drafts)
        block_size = self.cache.block_size
        next_draft_rows(slots, context_lens, sampled, arrays.block_tables, block_size, self._draft_rows(shape))

    def _draft_rows(self, shape: DraftShape) -> DraftRows:
        return DraftRows(*(tensor[: shape.num_requests] for tensor in self._rows))

    def _views(self, shape: DraftShape) -> StepArrays[torch.Tensor]:
        return StepArrays(*self._staging.views(array_sizes(shape.step, self.cache.block_size)))

    @torch.inference_mode()
    def prepare(self) -> None:
        """Run, and capture where graphs are on, proposals of few sequences with plain sampling, on padding."""
        for max_context_len in _CAPTURED_CONTEXTS if self._first.enabled else _CAPTURED_CONTEXTS[:1]:
            context_len = context_bucket(max_context_len, self.limits.max_model_len)
            for count in _CAPTURED_REQUESTS:
                if count > self._most_requests:
                    break
                stages = self._sampler.prepare([-1] * count)
                for per_request in (1, 2):
                    if per_request * count <= self.limits.max_num_batched_tokens:
                        shape = DraftShape(count, per_request, context_len, stages)
                        self._staging.stage(padding(shape.step, self.cache.block_size))
                        self._first.run(shape)
                self._next.run(DraftShape(count, 1, context_len, stages))
        torch.cuda.synchronize()

    # What is missing before that

    def _catch_up(self, pieces: list[_Piece]) -> list[_Piece]:
        """Compute all but the last tokens, which are returned: one or two per sequence."""
        most = 2 if 2 * self._bucket(len(pieces)) <= self.limits.max_num_batched_tokens else 1
        behind = [piece for piece in pieces if piece.end - piece.start > most]
        queue = [piece._replace(end=piece.end - 1) for piece in behind]
        while queue:
            step: list[_Piece] = []
            budget = self.limits.max_num_batched_tokens
            while queue and budget:
                piece = queue.pop(0)
                part = piece._replace(end=min(piece.end, piece.start + budget))
                step.append(part)
                budget -= part.end - part.start
                if part.end < piece.end:
                    queue.insert(0, piece._replace(start=part.end))
            self._prefill(step)
        return [piece._replace(start=piece.end - 1) if piece.end - piece.start > most else piece for piece in pieces]

    def _prefill(self, pieces: list[_Piece]) -> None:
        """Write keys and values, and nothing else."""
        context_len = max(piece.end for piece in pieces)
        shape = StepShape(
            num_requests=len(pieces),
            num_rows=sum(piece.end - piece.start for piece in pieces),
            num_sampled=0,
            max_query_len=max(piece.end - piece.start for piece in pieces),
            max_context_len=context_len,
            max_sampled=0,
        )
        self._staging.stage(self._arrays(pieces, context_len, samples=False))
        views = StepArrays(*self._staging.views(array_sizes(shape, self.cache.block_size)))
        self._model.forward(step_input(views, shape), self.cache.layers)

    def _arrays(self, pieces: list[_Piece], context_len: int, *, samples: bool) -> StepArrays[AnyArray]:
        """`samples`: after the last row of each piece."""
        slots, starts, ends = (
            np.asarray(numbers, np.int64) for numbers in zip(*((p.slot, p.start, p.end) for p in pieces), strict=True)
        )
        tables = np.ascontiguousarray(self._tables[slots, : -(-context_len // self.cache.block_size)])
        token_ids = [token for piece in pieces for token in piece.task.token_ids[piece.start : piece.end]]
        requests = np.arange(len(pieces) if samples else 0)
        last_rows = np.cumsum(ends - starts)[requests] - 1
        sampled = SampledRows(requests, last_rows, ends[requests], np.zeros_like(requests))
        block_size = self.cache.block_size
        return step_arrays(slots, starts, ends - starts, tables, block_size, np.asarray(token_ids, np.int64), sampled)
