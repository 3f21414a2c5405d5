"""Runs steps on a GPU, two at a time: the host plans and queues a step while the device computes the one before it.

# R requests in the step, T tokens, V vocabulary, H hidden size

A sampled token stays on the device on its way to the next step. Steps in which every request computes one token run as
CUDA graphs; prompts, and steps that mix prompts with decoding, run kernel by kernel.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from msgspec.structs import replace

from sempre.ipc.messages import ErrorInfo, ExecuteStep, SampledTokens
from sempre.workers.admission import Admission, Admitted, StepLimits
from sempre.workers.gpu.decode_graphs import DecodeGraphs, DecodeShape, context_bucket, row_buckets
from sempre.workers.gpu.step_buffers import StepBuffers
from sempre.workers.gpu.verification import VerificationShape, verification_bucket
from sempre.workers.input_batch import InputBatch, Int32, RequestState, StepPlan
from sempre.workers.kv_cache import PagedKvCache
from sempre.workers.models.base import CausalLM
from sempre.workers.prompt_logprobs import PromptLogprobs
from sempre.workers.sampling import GrammarCompiler, RowError, RowResult, SamplingState
from sempre.workers.sampling.gpu_sampler import PLAIN, GpuSampler, PendingSample
from sempre.workers.verification import verified


@dataclass
class _StepInFlight:
    """A step whose tokens are not on the host yet."""

    step: ExecuteStep
    errors: dict[str, ErrorInfo]
    plan: StepPlan | None
    sampling: list[int]
    """for each row of `pending` the request of the plan that samples there"""
    pending: PendingSample | None
    done: torch.cuda.Event
    prompt_results: dict[str, SampledTokens] = field(default_factory=dict)


@dataclass(frozen=True)
class StepMemory:
    """What steps need besides the cache, which gets what is left."""

    model: CausalLM
    sampler: GpuSampler
    rows_RH: torch.Tensor
    """model dtype: the final hidden states of the rows that sample"""
    logits_RV: torch.Tensor
    """float32"""


class GpuModelRunner:
    """One replica's model, cache, sampler, and the requests it knows."""

    def __init__(
        self,
        memory: StepMemory,
        cache: PagedKvCache,
        grammars: GrammarCompiler,
        limits: StepLimits,
        *,
        rank: int,
        graphs: bool,
    ) -> None:
        self.memory = memory
        self.limits = limits
        self.cache = cache
        self.max_model_len = limits.max_model_len
        self.max_num_batched_tokens = limits.max_num_batched_tokens
        self._model = memory.model
        self._sampler = memory.sampler
        self._rows_RH = memory.rows_RH
        self._logits_RV = memory.logits_RV
        self._rank = rank
        self._batch = InputBatch(
            num_blocks=cache.num_blocks,
            block_size=cache.block_size,
            max_model_len=limits.max_model_len,
            num_slots=limits.max_num_seqs,
            grammars=grammars,
        )
        self._admission = Admission(self._batch, limits, rank)
        # a step has no more rows than tokens
        self._buckets = row_buckets(min(limits.max_num_seqs, limits.max_num_batched_tokens))
        self._buffers = StepBuffers(
            self._logits_RV.device,
            num_slots=self._batch.num_slots,
            table_width=self._batch.table_width,
            max_rows=limits.max_num_seqs,
            max_sampled_rows=limits.max_num_seqs + limits.max_draft_tokens,
            max_tokens=limits.max_num_batched_tokens,
            block_size=cache.block_size,
        )
        self._prompt_logprobs = PromptLogprobs(self._model, self._sampler, self._logits_RV, rank)
        self.graphs: DecodeGraphs[DecodeShape] = DecodeGraphs(self.launch_decode, enabled=graphs)
        self._verification_graphs: DecodeGraphs[VerificationShape] = DecodeGraphs(
            self._launch_verification, enabled=graphs
        )
        self._max_requests = limits.max_num_seqs
        self._max_sampled_rows = limits.max_num_seqs + limits.max_draft_tokens
        self._in_flight: deque[_StepInFlight] = deque()

    def execute(self, step: ExecuteStep) -> list[SampledTokens]:
        """One result per scheduled request, in order. Raises MessageMalformed when the step itself is wrong."""
        self.submit(step)
        return self.collect()

    @torch.inference_mode()
    def submit(self, step: ExecuteStep) -> None:
        """Queue a step. Raises MessageMalformed."""
        admitted = self._admission.admit(step)
        self._update_slots(step, admitted)
        healthy = [item for item in admitted.healthy if item.request_id not in admitted.errors]
        flight = _StepInFlight(step, admitted.errors, None, [], None, _event())
        if healthy:
            plan = self._batch.plan(healthy)
            flight.plan = plan
            flight.sampling = plan.sampled_rows.requests.tolist()
            self._batch.expect(plan.slots[plan.samples])
            rows = None if step.new_requests else self._decode_rows(plan)
            if not step.new_requests and plan.only_verifies:
                self._run_verification(flight, plan)
            elif rows is None:
                self._run_mixed(flight, plan, [state for state in admitted.added if state.error is None])
            else:
                self._run_decode(flight, plan, rows)
        flight.done.record()
        self._in_flight.append(flight)

    def step_done(self) -> bool:
        """Whether `collect` would not wait."""
        return bool(self._in_flight[0].done.query())  # type: ignore[no-untyped-call]

    def collect(self) -> list[SampledTokens]:
        """The results of the oldest step in flight."""
        flight = self._in_flight.popleft()
        results = self._results(flight) if flight.plan is not None else {}
        return [
            SampledTokens(request_id=item.request_id, error=flight.errors[item.request_id])
            if item.request_id in flight.errors
            else results[item.request_id]
            for item in flight.step.scheduled
        ]

    # Requests come and go

    def _update_slots(self, step: ExecuteStep, admitted: Admitted) -> None:
        """Tell the sampler, and refuse at once what it refuses."""
        if self._batch.num_slots > self._buffers.num_slots:
            self._buffers.grow_slots(self._batch.num_slots)
            self._sampler.grow_slots(self._batch.num_slots)
            self.graphs.clear()
            self._verification_graphs.clear()
        for state in admitted.removed:
            self._sampler.release(state.slot)
        for state in admitted.added:
            if state.error is not None:
                continue
            try:
                self._sampler.admit(state.slot, state.sampling)
            except RowError as error:
                state.error = replace(error.info(), rank=self._rank)
                admitted.errors[state.request_id] = state.error

    # A step of single tokens

    def _decode_rows(self, plan: StepPlan) -> Int32 | None:
        """int32 [3, R]: slot, position, new block; None when the step is not one token for each request."""
        count = len(plan.states)
        if count > self._buckets[-1] or not (plan.samples & (plan.num_tokens == 1)).all():
            return None
        rows: Int32 = np.empty((3, count), np.int32)
        rows[0] = plan.slots
        rows[1] = plan.computed
        rows[2] = -1
        for index, item in enumerate(plan.scheduled):
            if item.block_ids:
                if (
                    len(item.block_ids) > 1
                    or item.block_table_start != item.num_computed_tokens // self.cache.block_size
                ):
                    return None
                rows[2, index] = item.block_ids[0]
        return rows

    def _run_decode(self, flight: _StepInFlight, plan: StepPlan, rows: Int32) -> None:
        count = len(plan.states)
        # without graphs there is nothing to pad for
        num_rows = next(b for b in self._buckets if b >= count) if self.graphs.enabled else count
        padded: Int32 = np.full((3, num_rows), -1, np.int32)
        padded[:, :count] = rows
        stages = self._sampler.prepare(padded[0].tolist())
        self._buffers.stage_decode(padded)
        self.graphs.run(DecodeShape(num_rows, context_bucket(int(plan.context.max()), self.max_model_len), stages))
        states = [state.sampling for state in plan.states]
        padding = [None] * (num_rows - count)
        flight.pending = self._sampler.start_copy(self._logits_RV[:num_rows], stages, [*states, *padding])

    def launch_decode(self, shape: DecodeShape) -> None:
        """Queue the kernels of a decode step whose rows are staged; capturable."""
        model_input = self._buffers.launch_decode_inputs(shape.num_rows, shape.max_context_len)
        hidden_RH = self._model.forward(model_input, self.cache.layers)
        logits_RV = self._model.logits(hidden_RH, self._logits_RV[: shape.num_rows])
        tokens_R = self._sampler.sample(logits_RV, model_input.batch.context_lens, shape.stages)
        self._buffers.record(self._buffers.decode_slots(shape.num_rows), tokens_R)

    def capture_decode(self, max_rows: int, max_context_len: int) -> None:
        """Capture for plain sampling and the given bounds, on rows of padding, the buckets that are powers of two,
        largest first. The others are captured when a batch first needs them."""
        for num_rows in reversed(self._buckets):
            if self.graphs.enabled and num_rows <= max_rows and num_rows.bit_count() == 1:
                self._capture_padding(num_rows, max_context_len)

    @torch.inference_mode()
    def _capture_padding(self, num_rows: int, max_context_len: int) -> None:
        self._buffers.stage_decode(np.full((3, num_rows), -1, np.int32))
        stages = self._sampler.prepare([-1] * num_rows)
        self.graphs.run(DecodeShape(num_rows, context_bucket(max_context_len, self.max_model_len), stages))

    # A step of single tokens and of drafted ones behind them

    def _run_verification(self, flight: _StepInFlight, plan: StepPlan) -> None:
        """As `_run_decode`, with a row for every drafted token."""
        shape = self._verification_shape(plan)
        slots = np.full(shape.num_rows, -1, np.int64)
        slots[: plan.ends[-1]] = plan.slots[flight.sampling]
        stages = self._sampler.prepare(slots.tolist())
        shape = shape._replace(stages=stages)
        self._buffers.stage_verification(plan, self._batch.rows(plan), shape)
        self._verification_graphs.run(shape)
        states: list[SamplingState | None] = [plan.states[index].sampling for index in flight.sampling]
        states += [None] * (shape.num_rows - len(states))
        flight.pending = self._sampler.start_copy(self._logits_RV[: shape.num_rows], stages, states)

    def _verification_shape(self, plan: StepPlan) -> VerificationShape:
        count, num_rows, longest = len(plan.states), int(plan.ends[-1]), int(plan.num_tokens.max())
        context_len = context_bucket(int(plan.context.max()), self.max_model_len)
        if self._verification_graphs.enabled:
            count = min(verification_bucket(count), self._max_requests)
            num_rows = min(verification_bucket(num_rows), self._max_sampled_rows, self.max_num_batched_tokens)
            longest = verification_bucket(longest)
        return VerificationShape(count, num_rows, longest, context_len, PLAIN)

    def _launch_verification(self, shape: VerificationShape) -> None:
        model_input, positions, drafts = self._buffers.launch_verification_inputs(shape)
        hidden_TH = self._model.forward(model_input, self.cache.layers)
        logits_RV = self._model.logits(hidden_TH, self._logits_RV[: shape.num_rows])
        self._sampler.sample(logits_RV, positions, shape.stages, drafts)

    # Any other step

    def _run_mixed(self, flight: _StepInFlight, plan: StepPlan, added: Sequence[RequestState]) -> None:
        new = ([state.slot for state in added], [state.token_ids[-1] for state in added])
        model_input, sampled = self._buffers.stage(plan, self._batch.rows(plan), new)
        hidden = self._model.forward(model_input, self.cache.layers)
        count = len(flight.sampling)
        if count:
            hidden_RH = hidden
            if model_input.outputs is None:
                hidden_RH = torch.index_select(hidden, 0, sampled.rows, out=self._rows_RH[:count])
            logits_RV = self._model.logits(hidden_RH, self._logits_RV[:count])
            stages = self._sampler.prepare(plan.slots[flight.sampling].tolist())
            tokens_R = self._sampler.sample(logits_RV, sampled.positions, stages, sampled.drafts)
            if sampled.drafts is None:
                self._buffers.record(sampled.slots, tokens_R)
            states = [plan.states[index].sampling for index in flight.sampling]
            flight.pending = self._sampler.start_copy(logits_RV, stages, states)
        for index, (item, state) in enumerate(zip(plan.scheduled, plan.states, strict=True)):
            if state.sampling.params.prompt_logprobs is not None:
                empty = SampledTokens(request_id=item.request_id)
                first_row = int(plan.first_rows[index])
                scored = self._prompt_logprobs.add(empty, item, state, first_row, hidden)
                flight.prompt_results[item.request_id] = scored

    # Results

    def _results(self, flight: _StepInFlight) -> dict[str, SampledTokens]:
        """By request id; the tokens are appended to the sequences."""
        plan = flight.plan
        assert plan is not None
        outcomes = self._sampler.collect(flight.pending) if flight.pending is not None else []
        by_request: dict[int, list[RowResult]] = {}
        for index, outcome in zip(flight.sampling, outcomes, strict=False):
            by_request.setdefault(index, []).append(outcome)
        results: dict[str, SampledTokens] = {}
        for index, state in enumerate(plan.states):
            drafts = plan.scheduled[index].draft_token_ids
            prompt_result = flight.prompt_results.get(state.request_id)
            result = self._result(state, by_request.get(index), drafts, prompt_result)
            # a failed request stays failed: a step for it may be on its way already
            state.error = result.error
            results[state.request_id] = result
        return results

    def _result(
        self,
        state: RequestState,
        outcomes: list[RowResult] | None,
        drafts: Sequence[int],
        prompt_result: SampledTokens | None,
    ) -> SampledTokens:
        if state.error is not None:  # it failed in the step before, when this one was queued already
            return SampledTokens(request_id=state.request_id, error=state.error)
        if prompt_result is not None and prompt_result.error is not None:
            return prompt_result
        prompt_logprobs = prompt_result.prompt_logprobs if prompt_result is not None else None
        if outcomes is None:
            return SampledTokens(request_id=state.request_id, prompt_logprobs=prompt_logprobs)
        result = verified(state.request_id, drafts, outcomes, self._rank)
        if result.error is not None:
            return result
        self._batch.record(state, result.token_ids)
        return replace(result, prompt_logprobs=prompt_logprobs) if prompt_logprobs is not None else result


def _event() -> torch.cuda.Event:
    return torch.cuda.Event()  # type: ignore[no-untyped-call]
