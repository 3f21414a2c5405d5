"""The worker's own copy of every request it knows, and the arrays of one step built from it.

# T tokens in the step, R requests in the step, B block size, S slots (one per known request)

    tokens of a request:   [0 ............ num_computed) [num_computed ... + num_tokens) [... known)
                            keys, values in the cache     computed in this step          later chunks

The step samples a token for a request exactly when it computes the request's last known token. A request's draft
tokens, if a step has any, come after that one; the step samples after each of them, too.
"""

from __future__ import annotations

from collections.abc import KeysView, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from sempre.ipc.errors import MessageMalformed
from sempre.ipc.messages import AdapterSpec, ErrorInfo, NewRequest, PoolingSpec, ScheduledRequest
from sempre.workers.models.pooling import Pooling
from sempre.workers.sampling import GrammarCompiler, SamplingState
from sempre.workers.steps import AnyArray, Int32, Int64, SampledRows, StepArrays, StepShape, step_arrays


@dataclass(eq=False)
class RequestState:
    """One request as the worker sees it."""

    request_id: str
    token_ids: list[int]
    """prompt and output tokens known so far"""
    num_prompt_tokens: int
    sampling: SamplingState
    """reads `token_ids`"""
    slot: int
    """row in the batch's persistent arrays"""
    error: ErrorInfo | None
    """why the request cannot continue; only it fails, and again whenever it is scheduled"""
    pooling: PoolingSpec | None = None
    """its prompt is pooled, and nothing sampled"""
    reads_all_rows: bool = False
    """whether final hidden states of all its prompt's rows are needed"""
    adapter: AdapterSpec | None = None
    adapter_slot: int = -1
    """of its adapter in the current step; -1: without one"""


@dataclass(frozen=True)
class StepPlan:
    """What each request of a step computes, and where its rows are; arrays [R]."""

    scheduled: list[ScheduledRequest]
    states: list[RequestState]
    slots: Int64
    computed: Int64
    """tokens in the cache before the step"""
    num_tokens: Int64
    context: Int64
    """tokens of each request after the step, drafts included"""
    num_drafts: Int64
    """draft tokens at the end of each request's"""
    samples: npt.NDArray[np.bool_]
    """whether the request samples a token in this step, plus one for each draft token"""
    first_rows: Int64
    ends: Int64
    """one past the last row"""
    has_states: bool = False
    """whether layers of the model keep states"""
    grown: Sequence[int] = ()
    """requests, by index, whose block tables were extended for this step"""

    @property
    def has_drafts(self) -> bool:
        return bool(self.num_drafts.any())

    @property
    def only_verifies(self) -> bool:
        """Whether it has drafts, and every request computes only its last known token and its drafts."""
        return self.has_drafts and bool((self.samples & (self.num_tokens == self.num_drafts + 1)).all())

    @cached_property
    def decodes(self) -> npt.NDArray[np.bool_]:
        """Which requests compute only their last known token."""
        decodes: npt.NDArray[np.bool_] = self.samples & (self.num_tokens == 1)
        return decodes

    @cached_property
    def shape(self) -> StepShape:
        return StepShape(
            num_requests=len(self.states),
            num_rows=int(self.ends[-1]),
            num_sampled=self.sampled_rows.rows.size,
            max_query_len=int(self.num_tokens.max()),
            max_context_len=int(self.context.max()),
            max_sampled=1 + int(self.num_drafts.max()),
            reads_all_rows=self.reads_all_rows,
            has_states=self.has_states,
            has_adapters=self.has_adapters,
        )

    @cached_property
    def has_adapters(self) -> bool:
        """Whether any request has an adapter."""
        return any(state.adapter is not None for state in self.states)

    @property
    def adapter_slots(self) -> Int32:
        """[R]"""
        return np.fromiter((state.adapter_slot for state in self.states), np.int32, len(self.states))

    @property
    def state_reads(self) -> Int32:
        """[R]: where the states before each request's first row are."""
        return np.fromiter((item.state_read for item in self.scheduled), np.int32, len(self.scheduled))

    @property
    def state_writes(self) -> Int32:
        """[T]: where the states after rows go."""
        writes: Int32 = np.full(self.ends[-1], -1, np.int32)
        for item, first in zip(self.scheduled, self.first_rows.tolist(), strict=True):
            for offset, slot in item.state_writes:
                writes[first + offset] = slot
        return writes

    @property
    def reads_all_rows(self) -> bool:
        """Whether final hidden states of all rows are needed, or all rows are sampled anyway."""
        return self.sampled_rows.rows.size == self.ends[-1] or any(state.reads_all_rows for state in self.states)

    @cached_property
    def sampled_rows(self) -> SampledRows:
        """The sampled rows: each request's last one, and with drafts those before it."""
        requests = np.flatnonzero(self.samples)
        counts = 1 + self.num_drafts[requests]
        each = np.repeat(requests, counts)
        # 0 for the last row of a request, 1 for the one before it, …
        back = np.repeat(np.cumsum(counts), counts) - 1 - np.arange(each.size)
        offsets = self.num_drafts[each] - back
        return SampledRows(each, self.ends[each] - 1 - back, self.context[each] - back, offsets)


class InputBatch:
    """Known requests by id, in order of arrival, with their block tables in one persistent array."""

    def __init__(
        self,
        *,
        num_blocks: int,
        block_size: int,
        max_model_len: int,
        num_slots: int,
        grammars: GrammarCompiler,
        has_states: bool = False,
        pooling: Pooling | None = None,
    ) -> None:
        self.pooling = pooling
        self._grammars = grammars
        self._has_states = has_states
        self._num_blocks = num_blocks
        self._block_size = block_size
        self._requests: dict[str, RequestState] = {}
        self._free_slots = list(range(num_slots - 1, -1, -1))
        self._block_tables: Int32 = np.zeros((num_slots, -(-max_model_len // block_size)), np.int32)
        self._table_lens: Int64 = np.zeros(num_slots, np.int64)
        self._num_tokens: Int64 = np.zeros(num_slots, np.int64)
        self._last_tokens: Int64 = np.zeros(num_slots, np.int64)

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._requests

    def __len__(self) -> int:
        return len(self._requests)

    def add(self, new: NewRequest, error: ErrorInfo | None = None) -> RequestState:
        """Add a request; `error` marks one that is known but can never be computed."""
        slot = self._take_slot()
        token_ids = list(new.token_ids)
        params, grammar = new.params, None
        if params.depends_on_output:
            grammar = self._grammars.start(params, token_ids, new.num_prompt_tokens)
        sampling = SamplingState(params, new.seed, token_ids, new.num_prompt_tokens, grammar)
        reads_all = params.first_scored_token is not None
        if new.pooling is not None:
            reads_all = self.pooling is not None and self.pooling.reads_all_rows
        state = RequestState(
            new.request_id,
            token_ids,
            new.num_prompt_tokens,
            sampling,
            slot,
            error,
            new.pooling,
            reads_all,
            new.adapter,
        )
        self._table_lens[slot] = 0
        self._num_tokens[slot] = len(token_ids)
        self._last_tokens[slot] = token_ids[-1]
        self._requests[new.request_id] = state
        return state

    def remove(self, request_id: str) -> RequestState | None:
        """Forget a request; None when it was not known."""
        state = self._requests.pop(request_id, None)
        if state is not None:
            self._free_slots.append(state.slot)
        return state

    def ids(self) -> KeysView[str]:
        """Of the known requests."""
        return self._requests.keys()

    def get(self, request_id: str) -> RequestState:
        return self._requests[request_id]

    def revise(self, state: RequestState, start: int, token_ids: list[int]) -> None:
        """Replace the request's tokens from `start` on."""
        state.sampling.rewind(start)
        state.token_ids[start:] = token_ids
        self._num_tokens[state.slot] = len(state.token_ids)
        self._last_tokens[state.slot] = state.token_ids[-1]

    def expect(self, slots: Int64) -> None:
        """Count one token, being sampled and recorded later, for each slot."""
        self._num_tokens[slots] += 1

    def record(self, state: RequestState, token_ids: list[int]) -> None:
        """Append the expected token and those that came with it; none where sampling failed. The request may have been
        removed in the meantime."""
        state.token_ids += token_ids
        if self._requests.get(state.request_id) is state:
            if len(token_ids) != 1:
                self._num_tokens[state.slot] += len(token_ids) - 1
            self._last_tokens[state.slot] = state.token_ids[-1]

    @property
    def num_slots(self) -> int:
        """Current number of slots; `add` doubles it when all are taken."""
        return len(self._num_tokens)

    @property
    def table_width(self) -> int:
        """Blocks in a table."""
        return int(self._block_tables.shape[1])

    def block_table(self, slot: int) -> Int32:
        """A request's blocks; do not modify."""
        table: Int32 = self._block_tables[slot]
        return table

    def plan(self, scheduled: list[ScheduledRequest]) -> StepPlan:
        """Apply the step's block tables; every scheduled request must be known. Raises MessageMalformed when a
        request's numbers do not match its known state."""
        count = len(scheduled)
        states = [self._requests[item.request_id] for item in scheduled]
        slots = np.fromiter([state.slot for state in states], np.int64, count)
        computed = np.fromiter([item.num_computed_tokens for item in scheduled], np.int64, count)
        num_tokens = np.fromiter([item.num_tokens for item in scheduled], np.int64, count)
        grown = [index for index, item in enumerate(scheduled) if item.block_ids]
        for index in grown:
            self._extend_table(scheduled[index], states[index].slot)
        context = computed + num_tokens
        num_drafts = np.fromiter([len(item.draft_token_ids) for item in scheduled], np.int64, count)
        known = self._num_tokens[slots]
        self._check_reach(scheduled, slots, context, known + num_drafts)
        ends = np.cumsum(num_tokens)
        samples = context - num_drafts == known
        _check_drafts(scheduled, num_drafts, samples & (num_tokens > num_drafts))
        return StepPlan(
            scheduled,
            states,
            slots,
            computed,
            num_tokens,
            context,
            num_drafts,
            samples,
            ends - num_tokens,
            ends,
            self._has_states,
            grown,
        )

    def arrays(self, plan: StepPlan) -> StepArrays[AnyArray]:
        """The step's arrays, in its own shape. A decoding request's token is undefined while its last token is not
        recorded."""
        ends, slots, sampled = plan.ends, plan.slots, plan.sampled_rows
        token_ids: Int64 = np.empty(ends[-1], np.int64)
        # the last known token of a decoding request is stored; prompts are copied piece by piece
        token_ids[plan.first_rows[plan.decodes]] = self._last_tokens[slots[plan.decodes]]
        for index in np.flatnonzero(~plan.decodes).tolist():
            known_end = plan.context[index] - plan.num_drafts[index]
            piece = plan.states[index].token_ids[plan.computed[index] : known_end]
            token_ids[plan.first_rows[index] : ends[index]] = piece + plan.scheduled[index].draft_token_ids
        width = -(-int(plan.context.max()) // self._block_size)
        tables = np.ascontiguousarray(self._block_tables[slots, :width])
        arrays = step_arrays(slots, plan.computed, plan.num_tokens, tables, self._block_size, token_ids, sampled)
        if plan.has_states:
            arrays = arrays._replace(state_reads=plan.state_reads, state_writes=plan.state_writes)
        if plan.has_adapters:
            arrays = arrays._replace(row_adapters=np.repeat(plan.adapter_slots, plan.num_tokens))
        return arrays

    def _take_slot(self) -> int:
        if not self._free_slots:
            # preempted requests stay known, so more may be known than fit in one step
            old = len(self._num_tokens)
            self._block_tables = np.concatenate([self._block_tables, np.zeros_like(self._block_tables)])
            self._table_lens = np.concatenate([self._table_lens, np.zeros_like(self._table_lens)])
            self._num_tokens = np.concatenate([self._num_tokens, np.zeros_like(self._num_tokens)])
            self._last_tokens = np.concatenate([self._last_tokens, np.zeros_like(self._last_tokens)])
            self._free_slots.extend(range(2 * old - 1, old - 1, -1))
        return self._free_slots.pop()

    def _extend_table(self, item: ScheduledRequest, slot: int) -> None:
        start, end = item.block_table_start, item.block_table_start + len(item.block_ids)
        if start > self._table_lens[slot] or end > self._block_tables.shape[1]:
            raise _malformed(
                item,
                "block_table_start",
                f"at most {self._table_lens[slot]}, with room for {self._block_tables.shape[1]} blocks in all",
                f"{start} with {len(item.block_ids)} blocks",
            )
        if max(item.block_ids) >= self._num_blocks:
            raise _malformed(item, "block_ids", f"ids less than {self._num_blocks}", str(max(item.block_ids)))
        self._block_tables[slot, start:end] = item.block_ids
        self._table_lens[slot] = end

    def _check_reach(self, scheduled: list[ScheduledRequest], slots: Int64, context: Int64, known: Int64) -> None:
        beyond_known = context > known
        if beyond_known.any():
            index = int(np.argmax(beyond_known))
            raise _malformed(
                scheduled[index], "num_tokens", f"an end within {known[index]} tokens", str(context[index])
            )
        beyond_table = context > self._table_lens[slots] * self._block_size
        if beyond_table.any():
            index = int(np.argmax(beyond_table))
            held = self._table_lens[slots[index]] * self._block_size
            raise _malformed(scheduled[index], "block_ids", f"blocks for {context[index]} tokens", f"room for {held}")


def _check_drafts(scheduled: list[ScheduledRequest], num_drafts: Int64, fits: npt.NDArray[np.bool_]) -> None:
    wrong = np.flatnonzero((num_drafts > 0) & ~fits)
    if wrong.size:
        item = scheduled[int(wrong[0])]
        found = (
            f"{item.num_tokens} tokens from {item.num_computed_tokens} on, {len(item.draft_token_ids)} of them drafts"
        )
        raise _malformed(item, "draft_token_ids", "the last known token and drafts after it", found)


def _malformed(item: ScheduledRequest, name: str, expected: str, found: str) -> MessageMalformed:
    return MessageMalformed(
        f"ExecuteStep: scheduled request {item.request_id!r}: {name}: expected {expected}, found {found}.",
        field=f"scheduled.{name}",
    )
