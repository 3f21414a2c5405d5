"""Runs steps on a GPU, two at a time: the host plans and queues a step while the device computes the previous one.

# R requests in the step, T tokens, V vocabulary, H hidden size

A sampled token stays on the device for the next step. Steps in which every request computes one token, or verifies
drafts, run as CUDA graphs; prompts, and steps that mix prompts with decoding, run kernel by kernel.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from msgspec.structs import replace

from sempre.ipc.messages import ExecuteStep
from sempre.workers.gpu.decode_graphs import DecodeGraphs, DecodeShape, context_bucket, row_buckets, size_bucket
from sempre.workers.gpu.queued_step import QueuedRunner, QueuedStep
from sempre.workers.gpu.shared_splits import SharedSplits
from sempre.workers.gpu.step_buffers import SampledRows, StepBuffers
from sempre.workers.input_batch import RequestState, StepPlan
from sempre.workers.kv_cache import PagedKvCache
from sempre.workers.models.base import CausalLM
from sempre.workers.runner import StepInFlight
from sempre.workers.sampling import GrammarCompiler, RowError, RowResult, SamplingState
from sempre.workers.sampling.gpu_sampler import GpuSampler, PendingSample
from sempre.workers.step_validation import StepLimits, ValidStep
from sempre.workers.steps import Int32, StepShape

if TYPE_CHECKING:
    from sempre.kernels.sampling.gpu import Stages


@dataclass
class _Queued(QueuedStep):
    """A step whose tokens are not on the host yet."""

    pending: PendingSample | None = None


class _VerificationShape(NamedTuple):
    """What a graph is captured for."""

    step: StepShape
    stages: Stages


@dataclass(frozen=True)
class StepMemory:
    """What steps need besides the cache, which gets the rest."""

    model: CausalLM
    sampler: GpuSampler
    rows_RH: torch.Tensor
    """model dtype: the final hidden states of the rows that sample"""
    logits_RV: torch.Tensor
    """float32"""


class GpuModelRunner(QueuedRunner):
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
        super().__init__(memory.model, cache, grammars, limits, (memory.sampler, memory.logits_RV), rank)
        self.memory = memory
        self._sampler = memory.sampler
        self._logits_RV = memory.logits_RV
        # a step has no more rows than tokens
        self._buckets = row_buckets(min(limits.max_num_seqs, limits.max_num_batched_tokens))
        self._buffers = StepBuffers(
            self._logits_RV.device,
            limits,
            num_slots=self._batch.num_slots,
            table_width=self._batch.table_width,
            block_size=cache.block_size,
        )
        self._shared_splits = SharedSplits(
            num_slots=self._batch.num_slots, table_width=self._batch.table_width, block_size=cache.block_size
        )
        self.graphs: DecodeGraphs[DecodeShape] = DecodeGraphs(self.launch_decode, enabled=graphs)
        self._verification_graphs: DecodeGraphs[_VerificationShape] = DecodeGraphs(
            self._launch_verification, enabled=graphs
        )

    # Requests come and go

    @torch.inference_mode()
    def _update_requests(self, step: ExecuteStep, valid: ValidStep) -> None:
        """Tell the sampler; what it refuses is refused at once."""
        if self._batch.num_slots > self._buffers.num_slots:
            self._buffers.grow_slots(self._batch.num_slots)
            self._sampler.grow_slots(self._batch.num_slots)
            self.graphs.clear()
            self._verification_graphs.clear()
        for state in valid.removed:
            self._sampler.release(state.slot)
            self._shared_splits.remove(state.slot)
        for state in valid.added:
            if state.error is not None:
                continue
            try:
                self._sampler.admit(state.slot, state.sampling)
            except RowError as error:
                state.error = replace(error.info(), rank=self._rank)
                valid.errors[state.request_id] = state.error

    @torch.inference_mode()
    def _start(self, step: ExecuteStep, plan: StepPlan | None, valid: ValidStep) -> StepInFlight:
        flight = _Queued(step, valid.errors, plan)
        if plan is not None:
            for index in plan.grown:
                item, slot = plan.scheduled[index], plan.states[index].slot
                end = item.block_table_start + len(item.block_ids)
                self._shared_splits.extend(slot, self._batch.block_table(slot), item.block_table_start, end)
            rows = None if step.new_requests else self._decode_rows(plan)
            if rows is not None:
                self._run_decode(flight, plan, rows)
            elif not step.new_requests and plan.only_verifies and self._verification_graphs.enabled:
                self._run_verification(flight, plan)
            else:
                self._run_mixed(flight, plan, [state for state in valid.added if state.error is None])
        flight.done.record()
        return flight

    def _outcomes(self, flight: StepInFlight) -> Sequence[RowResult]:
        assert isinstance(flight, _Queued)
        return [] if flight.pending is None else self._sampler.collect(flight.pending)

    # A step of single tokens

    def _decode_rows(self, plan: StepPlan) -> Int32 | None:
        """int32 [3 to 6, R]: slot, position, new block, of a model with states the slots of the states before and after
        the row, and where adapters are served the slot of the row's; None when the step is not one token for each
        request."""
        count = len(plan.states)
        if count > self._buckets[-1] or not plan.decodes.all():
            return None
        rows: Int32 = np.empty((self._buffers.num_row_fields, count), np.int32)
        rows[0] = plan.slots
        rows[1] = plan.computed
        rows[2] = -1
        for index in plan.grown:
            item = plan.scheduled[index]
            if len(item.block_ids) > 1 or item.block_table_start != item.num_computed_tokens // self.cache.block_size:
                return None
            rows[2, index] = item.block_ids[0]
        if plan.has_states:
            rows[3], rows[4] = plan.state_reads, plan.state_writes
        if self.limits.num_adapter_slots:
            rows[-1] = plan.adapter_slots
        return rows

    def _run_decode(self, flight: _Queued, plan: StepPlan, rows: Int32) -> None:
        count = len(plan.states)
        # without graphs there is nothing to pad for
        num_rows = next(b for b in self._buckets if b >= count) if self.graphs.enabled else count
        padded: Int32 = np.full((len(rows), num_rows), -1, np.int32)
        padded[:, :count] = rows
        stages = self._sampler.prepare(padded[0].tolist())
        self._buffers.stage_decode(padded)
        context_len = context_bucket(int(plan.context.max()), self.limits.max_model_len)
        shares = self._stage_prefixes(plan, num_rows, context_len)
        self.graphs.run(DecodeShape(num_rows, context_len, stages, shares, plan.has_adapters))
        states = [state.sampling for state in plan.states]
        padding = [None] * (num_rows - count)
        flight.pending = self._sampler.start_copy(self._logits_RV[:num_rows], stages, [*states, *padding])

    def _stage_prefixes(self, plan: StepPlan, num_requests: int, max_context_len: int) -> bool:
        """Send which keys decoding requests share; False if they share too few."""
        if not self._shared_splits.has_shared:
            return False
        contexts = np.where(plan.decodes, plan.context, 0)
        prefixes = self._shared_splits.of_step(plan.slots, contexts, num_requests, max_context_len)
        if prefixes is not None and prefixes.is_new:
            self._buffers.stage_prefixes(prefixes.arrays)
        return prefixes is not None

    def launch_decode(self, shape: DecodeShape) -> None:
        """Queue the kernels of a decode step whose rows are staged; capturable."""
        model_input = self._buffers.decode_inputs(shape)
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
        self._buffers.stage_decode(np.full((self._buffers.num_row_fields, num_rows), -1, np.int32))
        stages = self._sampler.prepare([-1] * num_rows)
        self.graphs.run(DecodeShape(num_rows, context_bucket(max_context_len, self.limits.max_model_len), stages))

    # A step that only decodes and verifies drafts

    def _run_verification(self, flight: _Queued, plan: StepPlan) -> None:
        """Run as a graph, with a row for every draft token, padded."""
        shape = self._verification_shape(plan.shape)
        states, slots = self._sampled(plan, shape.num_sampled)
        stages = self._sampler.prepare(slots)
        self._buffers.stage(plan, self._batch.arrays(plan), shape, [])
        self._verification_graphs.run(_VerificationShape(shape, stages))
        flight.pending = self._sampler.start_copy(self._logits_RV[: shape.num_sampled], stages, states)

    def _verification_shape(self, shape: StepShape) -> StepShape:
        limits = self.limits
        max_rows = min(limits.max_num_seqs + limits.max_draft_tokens, limits.max_num_batched_tokens)
        num_rows = min(size_bucket(shape.num_rows), max_rows)
        longest = size_bucket(shape.max_query_len)
        return StepShape(
            num_requests=min(size_bucket(shape.num_requests), limits.max_num_seqs),
            num_rows=num_rows,
            num_sampled=num_rows,
            max_query_len=longest,
            max_context_len=context_bucket(shape.max_context_len, limits.max_model_len),
            max_sampled=longest,
            reads_all_rows=True,
            has_states=shape.has_states,
            has_adapters=shape.has_adapters,
        )

    def _launch_verification(self, shape: _VerificationShape) -> None:
        hidden_TH, sampled = self._forward(shape.step)
        self._sample(hidden_TH, sampled, shape.stages)

    # Any other step

    def _run_mixed(self, flight: _Queued, plan: StepPlan, new: Sequence[RequestState]) -> None:
        shape = plan.shape
        self._buffers.stage(plan, self._batch.arrays(plan), shape, new)
        shares = self._stage_prefixes(plan, shape.num_requests, shape.max_context_len)
        hidden, sampled = self._forward(shape, shares_prefixes=shares)
        if shape.num_sampled:
            # after the forward pass has been queued: grammar masks are computed while it runs
            states, slots = self._sampled(plan, shape.num_sampled)
            stages = self._sampler.prepare(slots)
            # [S, H] already, unless all rows were requested
            logits_RV = self._sample(hidden, sampled if shape.reads_all_rows else sampled._replace(rows=None), stages)
            flight.pending = self._sampler.start_copy(logits_RV, stages, states)
        self._score_prompts(flight, plan, hidden)

    def _sampled(self, plan: StepPlan, num_rows: int) -> tuple[list[SamplingState | None], list[int]]:
        """State and slot of each row that samples; None and -1 for padding up to `num_rows`."""
        requests = plan.sampled_rows.requests
        states: list[SamplingState | None] = [plan.states[index].sampling for index in requests.tolist()]
        missing = num_rows - len(states)
        return [*states, *[None] * missing], [*plan.slots[requests].tolist(), *[-1] * missing]

    def _forward(self, shape: StepShape, *, shares_prefixes: bool = False) -> tuple[torch.Tensor, SampledRows]:
        """Queue the forward pass of the staged step; final hidden states, of all rows or of those that sample."""
        model_input, sampled = self._buffers.inputs(shape, shares_prefixes=shares_prefixes)
        return self._model.forward(model_input, self.cache.layers), sampled

    def _sample(self, hidden: torch.Tensor, sampled: SampledRows, stages: Stages) -> torch.Tensor:
        """Queue the sampling from hidden states; the logits, float32 [S, V]."""
        count = sampled.slots.shape[0]
        if sampled.rows is not None:
            hidden = torch.index_select(hidden, 0, sampled.rows, out=self.memory.rows_RH[:count])
        logits_RV = self._model.logits(hidden, self._logits_RV[:count])
        tokens_R = self._sampler.sample(logits_RV, sampled.positions, stages, sampled.drafts)
        if sampled.drafts is None:
            self._buffers.record(sampled.slots, tokens_R)
        return logits_RV
