"""Guesses of a draft model on a GPU: one proposal is a few CUDA graphs and one wait.

# R sequences, T rows (tokens), W blocks in a table
A proposal begins with the tokens that came since the last one: one, or two where all guesses were right, so a graph
takes one or two rows of each sequence. Each further guess is a decode step whose inputs the device makes itself. What
is missing beyond that, a prompt for instance, is computed before it, kernel by kernel.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch

from sempre.ipc.messages import NewRequest
from sempre.kernels.attention import PagedBatch
from sempre.kernels.decode_inputs import DraftRows, SampledGuesses, next_draft_rows
from sempre.workers.admission import StepLimits
from sempre.workers.gpu.decode_graphs import DecodeGraphs, context_bucket
from sempre.workers.gpu.staging import StepStaging
from sempre.workers.gpu.verification import verification_bucket
from sempre.workers.guessing import MOST_GUESSES, Continuation
from sempre.workers.input_batch import Int32, Int64
from sempre.workers.kv_cache import PagedKvCache
from sempre.workers.sampling import RowError, SamplingState
from sempre.workers.steps import OutputRows, StepInput

if TYPE_CHECKING:
    from sempre.kernels.sampling.gpu import Stages
    from sempre.workers.gpu.runner import StepMemory

# graphs up to these bounds are captured before the first request
_CAPTURED_REQUESTS = (1, 2, 4, 8)
_CAPTURED_CONTEXTS = (512, 1024)


class GuessShape(NamedTuple):
    """What a graph is captured for."""

    num_requests: int
    rows_per_request: int
    """1 or 2; a sequence may have fewer"""
    max_context_len: int
    stages: Stages


class GuessArrays(NamedTuple):
    """What a proposal sends; as tensors they are views of the staging buffer. Those of T rows come last."""

    starts: Int32
    """[R]: tokens known, the position of the first guess"""
    ends: Int32
    """[R]: the position of the last guess"""
    query_starts: Int32
    """[R + 1]"""
    last_rows: Int64
    """[R]: the row of each sequence's last known token"""
    block_tables: Int32
    """[R, W]"""
    token_ids: Int64
    positions: Int64
    slot_mapping: Int64

    @classmethod
    def empty(cls, num_requests: int, num_rows: int, width: int) -> GuessArrays:
        """Padding only; with one row for each request, row r belongs to request r."""
        one_each = num_rows == num_requests
        return cls(
            starts=np.zeros(num_requests, np.int32),
            ends=np.zeros(num_requests, np.int32),
            query_starts=np.arange(num_requests + 1, dtype=np.int32)
            if one_each
            else np.zeros(num_requests + 1, np.int32),
            last_rows=np.zeros(num_requests, np.int64),
            block_tables=np.zeros((num_requests, width), np.int32),
            token_ids=np.zeros(num_rows, np.int64),
            positions=np.zeros(num_rows, np.int64),
            slot_mapping=np.full(num_rows, -1, np.int64),
        )


@dataclass
class _Admitted:
    """A sequence as the device knows it."""

    slot: int
    guessed_at: int
    guesses: list[int] = field(default_factory=list)


class _Piece(NamedTuple):
    """Tokens [start, end) of a sequence, to be computed."""

    item: Continuation
    slot: int
    start: int
    end: int


class GpuGuesser:
    """Keeps sequences in the slots of a sampler of its own, and their block tables on the host."""

    def __init__(self, memory: StepMemory, cache: PagedKvCache, limits: StepLimits, *, graphs: bool) -> None:
        self.cache = cache
        self.max_model_len = limits.max_model_len
        self.max_num_batched_tokens = limits.max_num_batched_tokens
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
        largest = GuessArrays.empty(most, 2 * most, width)
        self._staging = StepStaging(device, sum(array.nbytes + 16 for array in largest))
        self._prefill_staging = StepStaging(device, 32 * limits.max_num_batched_tokens)
        self._rows = DraftRows(
            *(torch.zeros(most, dtype=torch.int32, device=device) for _ in range(2)),
            *(torch.zeros(most, dtype=torch.int64, device=device) for _ in range(3)),
        )
        self._row_starts = torch.arange(most + 1, dtype=torch.int32, device=device)
        self._guesses = torch.zeros(most, MOST_GUESSES, dtype=torch.int32, device=device)
        self._guesses_on_host = torch.empty(most, MOST_GUESSES, dtype=torch.int32, device="cpu", pin_memory=True)
        self._done = torch.cuda.Event()  # type: ignore[no-untyped-call]
        self._first: DecodeGraphs[GuessShape] = DecodeGraphs(self._launch_first, enabled=graphs)
        self._next: DecodeGraphs[GuessShape] = DecodeGraphs(self._launch_next, enabled=graphs)

    # Sequences come and go

    def admit(self, new: NewRequest) -> bool:
        slot = self._free_slots.pop()
        try:
            self._sampler.admit(slot, SamplingState(new.params, new.seed, new.token_ids, new.num_prompt_tokens))
        except RowError:  # the target says so to whom it concerns
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
    def guess(self, continuations: Sequence[Continuation]) -> list[list[int]]:
        states = [self._states[item.request_id] for item in continuations]
        for item, state in zip(continuations, states, strict=True):
            wrong = state.guesses[item.num_unchanged - state.guessed_at :]
            self._sampler.revise(state.slot, item.num_unchanged, wrong, item.token_ids[item.num_unchanged :])
            self._tables[state.slot, : len(item.block_ids)] = item.block_ids
        pieces = self._catch_up(
            [
                _Piece(item, state.slot, item.num_computed, len(item.token_ids))
                for item, state in zip(continuations, states, strict=True)
            ]
        )
        shape = self._stage(pieces)
        self._first.run(shape)
        next_shape = shape._replace(rows_per_request=1)
        for _ in range(max(item.count for item in continuations) - 1):
            self._next.run(next_shape)
        found = self._read_guesses(len(pieces))
        answers = []
        for item, state, row in zip(continuations, states, found, strict=True):
            tokens = row[: item.count]
            if -1 in tokens:
                tokens = tokens[: tokens.index(-1)]
            state.guessed_at, state.guesses = len(item.token_ids), tokens
            answers.append(tokens.copy())
        return answers

    def _read_guesses(self, count: int) -> list[list[int]]:
        """[R][MOST_GUESSES], what was not guessed now is what was there before; waits for the device."""
        on_host = self._guesses_on_host[:count]
        on_host.copy_(self._guesses[:count], non_blocking=True)
        self._done.record()
        self._done.synchronize()
        found: list[list[int]] = on_host.tolist()
        return found

    def _stage(self, pieces: list[_Piece]) -> GuessShape:
        """Send the arrays of a proposal's beginning, padded to the shape that is returned."""
        count, num_rows = len(pieces), sum(piece.end - piece.start for piece in pieces)
        num_requests = self._bucket(count)
        per_request = 1 if num_rows == count else 2
        starts = [len(piece.item.token_ids) for piece in pieces]
        ends = [len(piece.item.token_ids) + piece.item.count - 1 for piece in pieces]
        context_len = context_bucket(max(ends), self.max_model_len)
        arrays = GuessArrays.empty(num_requests, per_request * num_requests, self._table_blocks(context_len))
        arrays.starts[:count], arrays.ends[:count] = starts, ends
        rows = self._row_arrays(pieces)
        query_starts = rows.query_starts
        if per_request > 1:
            arrays.query_starts[: count + 1] = query_starts
            arrays.query_starts[count + 1 :] = num_rows
        arrays.last_rows[:count] = query_starts[1:] - 1
        arrays.block_tables[:count] = self._tables[[piece.slot for piece in pieces], : arrays.block_tables.shape[1]]
        arrays.token_ids[:num_rows] = rows.token_ids
        arrays.positions[:num_rows] = rows.positions
        arrays.slot_mapping[:num_rows] = rows.slot_mapping
        stages = self._sampler.prepare([piece.slot for piece in pieces] + [-1] * (num_requests - count))
        self._send(arrays)
        return GuessShape(num_requests, per_request, context_len, stages)

    def _send(self, arrays: GuessArrays) -> None:
        self._staging.begin()
        for array in arrays:
            self._staging.put(array)
        self._staging.send()

    def _bucket(self, count: int) -> int:
        # without graphs there is nothing to pad for
        return min(verification_bucket(count), self._most_requests) if self._first.enabled else count

    def _table_blocks(self, context_len: int) -> int:
        return -(-context_len // self.cache.block_size)

    # The kernels of a proposal, capturable

    def _launch_first(self, shape: GuessShape) -> None:
        """The last one or two known tokens of each sequence, and its first guess."""
        starts, _, query_starts, last_rows, tables, token_ids, positions, slot_mapping = self._views(shape)
        ones = self._row_starts[: shape.num_requests + 1]
        model_input = StepInput(
            token_ids=token_ids,
            positions=positions,
            slot_mapping=slot_mapping,
            batch=PagedBatch(tables, query_starts, starts, shape.rows_per_request, shape.max_context_len),
            outputs=None if shape.rows_per_request == 1 else OutputRows(last_rows, ones, 1),
        )
        slots = self._sampler.row_slots[: shape.num_requests]
        self._sample(self._model.forward(model_input, self.cache.layers), shape, slots, starts)

    def _launch_next(self, shape: GuessShape) -> None:
        """A decode step with the guess before; sequences that have all of theirs are padding."""
        rows = self._draft_rows(shape)
        model_input = StepInput(
            token_ids=rows.token_ids,
            positions=rows.positions,
            slot_mapping=rows.slot_mapping,
            batch=PagedBatch(
                block_tables=self._views(shape)[4],
                query_starts=self._row_starts[: shape.num_requests + 1],
                context_lens=rows.context_lens,
                max_query_len=1,
                max_context_len=shape.max_context_len,
            ),
        )
        self._sample(self._model.forward(model_input, self.cache.layers), shape, rows.slots, rows.context_lens)

    def _sample(
        self, hidden_RH: torch.Tensor, shape: GuessShape, slots: torch.Tensor, context_lens: torch.Tensor
    ) -> None:
        """Sample behind every row, keep the guesses, and make the rows of the next decode step."""
        count = shape.num_requests
        starts, ends, _, _, tables, *_ = self._views(shape)
        logits_RV = self._model.logits(hidden_RH, self._logits_RV[:count])
        tokens_R = self._sampler.sample(logits_RV, context_lens, shape.stages, row_slots=slots)
        sampled = SampledGuesses(tokens_R, self._sampler.head, starts, ends, self._guesses)
        next_draft_rows(slots, context_lens, sampled, tables, self.cache.block_size, self._draft_rows(shape))

    def _draft_rows(self, shape: GuessShape) -> DraftRows:
        return DraftRows(*(tensor[: shape.num_requests] for tensor in self._rows))

    def _views(self, shape: GuessShape) -> list[torch.Tensor]:
        num_rows = shape.rows_per_request * shape.num_requests
        width = self._table_blocks(shape.max_context_len)
        return self._staging.views(list(GuessArrays.empty(shape.num_requests, num_rows, width)))

    @torch.inference_mode()
    def prepare(self) -> None:
        """Run, and capture where graphs are on, proposals of few sequences with plain sampling, on padding."""
        for max_context_len in _CAPTURED_CONTEXTS if self._first.enabled else _CAPTURED_CONTEXTS[:1]:
            context_len = context_bucket(max_context_len, self.max_model_len)
            for count in _CAPTURED_REQUESTS:
                if count > self._most_requests:
                    break
                stages = self._sampler.prepare([-1] * count)
                for per_request in (1, 2):
                    if per_request * count <= self.max_num_batched_tokens:
                        shape = GuessShape(count, per_request, context_len, stages)
                        self._send(GuessArrays.empty(count, per_request * count, self._table_blocks(context_len)))
                        self._first.run(shape)
                self._next.run(GuessShape(count, 1, context_len, stages))
        torch.cuda.synchronize()

    # What is missing before that

    def _catch_up(self, pieces: list[_Piece]) -> list[_Piece]:
        """Compute all but the last tokens, which are returned: one or two of each sequence."""
        most = 2 if 2 * self._bucket(len(pieces)) <= self.max_num_batched_tokens else 1
        behind = [piece for piece in pieces if piece.end - piece.start > most]
        queue = [piece._replace(end=piece.end - 1) for piece in behind]
        while queue:
            step: list[_Piece] = []
            budget = self.max_num_batched_tokens
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
        rows = self._row_arrays(pieces)
        context_lens = np.asarray([piece.end for piece in pieces], np.int32)
        width = self._table_blocks(int(context_lens.max()))
        tables = np.ascontiguousarray(self._tables[[piece.slot for piece in pieces], :width])
        arrays = (*rows, tables, context_lens)
        staging = self._prefill_staging
        staging.begin(sum(array.nbytes + 16 for array in arrays))
        token_ids, positions, slot_mapping, query_starts, block_tables, lens = (staging.put(array) for array in arrays)
        staging.send()
        nothing = OutputRows(token_ids[:0], torch.zeros_like(query_starts), 0)
        model_input = StepInput(
            token_ids=token_ids,
            positions=positions,
            slot_mapping=slot_mapping,
            batch=PagedBatch(
                block_tables=block_tables,
                query_starts=query_starts,
                context_lens=lens,
                max_query_len=max(piece.end - piece.start for piece in pieces),
                max_context_len=int(context_lens.max()),
            ),
            outputs=nothing,
        )
        self._model.forward(model_input, self.cache.layers)

    def _row_arrays(self, pieces: list[_Piece]) -> _RowArrays:
        counts = np.asarray([piece.end - piece.start for piece in pieces])
        starts = np.asarray([piece.start for piece in pieces])
        query_starts: Int32 = np.zeros(len(pieces) + 1, np.int32)
        query_starts[1:] = np.cumsum(counts)
        positions = np.arange(query_starts[-1], dtype=np.int64) - np.repeat(query_starts[:-1] - starts, counts)
        slots = np.repeat([piece.slot for piece in pieces], counts)
        block_size = self.cache.block_size
        blocks = self._tables[slots, positions // block_size].astype(np.int64)
        token_ids = [token for piece in pieces for token in piece.item.token_ids[piece.start : piece.end]]
        return _RowArrays(
            np.asarray(token_ids, np.int64), positions, blocks * block_size + positions % block_size, query_starts
        )


class _RowArrays(NamedTuple):
    """Rows of several pieces, one after the other."""

    token_ids: Int64
    positions: Int64
    slot_mapping: Int64
    query_starts: Int32
