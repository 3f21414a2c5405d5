"""What the runners of all devices share: known requests, the checks of a step, its results, and the queue of steps
accepted but not yet answered."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import torch
from msgspec.structs import replace

from sempre.ipc.messages import NOT_READY, ErrorInfo, ExecuteStep, SampledTokens
from sempre.workers.adapters.store import AdapterStore
from sempre.workers.input_batch import InputBatch, StepPlan
from sempre.workers.kv_cache import PagedKvCache
from sempre.workers.models.base import CausalLM
from sempre.workers.prompt_logprobs import PromptLogprobs, PromptScorer
from sempre.workers.sampling import GrammarCompiler, RowResult
from sempre.workers.step_validation import StepLimits, StepValidation, ValidStep
from sempre.workers.verification import verified


@dataclass
class StepInFlight:
    """A step that has no result yet."""

    step: ExecuteStep
    errors: dict[str, ErrorInfo]
    """results of scheduled requests that are not computed, by id"""
    plan: StepPlan | None = None
    """of those that are; None without any"""
    prompt_results: dict[str, SampledTokens] = field(default_factory=dict)


class ComputedStep(NamedTuple):
    """One result per scheduled request, in order."""

    step: ExecuteStep
    sampled: list[SampledTokens]


class StepQueue(Protocol):
    """Steps that a worker has accepted but not yet answered, oldest first."""

    @property
    def steps_in_flight(self) -> int: ...

    def submit(self, step: ExecuteStep) -> None:
        """Start a step. Raises MessageMalformed when it is wrong."""

    def step_done(self) -> bool:
        """Whether `collect` would not wait; there is a step in flight."""

    def collect(self) -> ComputedStep:
        """Wait for the oldest step; its results."""


class ModelRunner(ABC):
    """One replica's model, cache, sampler, and the requests it knows. The limits also apply to the warm-up."""

    adapters: AdapterStore | None = None
    """those that requests may have"""

    def __init__(
        self,
        model: CausalLM,
        cache: PagedKvCache,
        grammars: GrammarCompiler,
        limits: StepLimits,
        scorer: tuple[PromptScorer, torch.Tensor] | None,
        rank: int,
    ) -> None:
        """`scorer` computes log-probabilities of prompts, with its scratch for logits (float32 [rows, V]); None: the
        model pools."""
        self.cache = cache
        self.limits = limits
        self._model = model
        self._grammars = grammars
        self._rank = rank
        self._batch = InputBatch(
            num_blocks=cache.num_blocks,
            block_size=cache.block_size,
            max_model_len=limits.max_model_len,
            num_slots=limits.max_num_seqs,
            grammars=grammars,
            has_states=limits.num_state_slots > 0,
            pooling=model.spec.pooling,
        )
        self._validation = StepValidation(self._batch, limits, rank)
        self._prompt_logprobs = None if scorer is None else PromptLogprobs(model, *scorer, rank)
        self._in_flight: deque[StepInFlight] = deque()

    @property
    def pools(self) -> bool:
        """Whether prompts are pooled, and nothing is sampled."""
        return self._model.spec.pooling is not None

    @property
    def steps_in_flight(self) -> int:
        """Steps submitted and not collected."""
        return len(self._in_flight)

    def submit(self, step: ExecuteStep) -> None:
        """Start a step without waiting for an asynchronous device.

        Raises MessageMalformed when the step itself is wrong; a request that cannot be computed has its error in the
        result.
        """
        valid = self._validation.admit(step)
        self._prepare_adapters(step, valid.errors)
        self._update_requests(step, valid)
        healthy = step.scheduled
        if valid.errors:
            healthy = [item for item in step.scheduled if item.request_id not in valid.errors]
        plan = self._batch.plan(healthy) if healthy else None
        if plan is not None:
            self._batch.expect(plan.slots[plan.samples])
        self._in_flight.append(self._start(step, plan, valid))

    def _prepare_adapters(self, step: ExecuteStep, errors: dict[str, ErrorInfo]) -> None:
        """Put the adapters of a step into slots; requests whose adapter cannot be loaded fail."""
        if self.adapters is not None:
            states = [self._batch.get(item.request_id) for item in step.scheduled]
            self.adapters.prepare([state for state in states if state.error is None], errors)

    @abstractmethod
    def step_done(self) -> bool:
        """Whether `collect` would not wait; there is a step in flight."""

    def collect(self) -> ComputedStep:
        """Wait for the oldest step in flight; its results."""
        flight = self._in_flight.popleft()
        results = {} if flight.plan is None else self._results(flight, flight.plan)
        sampled = [
            SampledTokens(request_id=item.request_id, error=flight.errors[item.request_id])
            if item.request_id in flight.errors
            else results[item.request_id]
            for item in flight.step.scheduled
        ]
        return ComputedStep(flight.step, sampled)

    def execute(self, step: ExecuteStep) -> list[SampledTokens]:
        """Run a step to completion, while none is in flight. Raises as `submit`."""
        self.submit(step)
        return self.collect().sampled

    @abstractmethod
    def _update_requests(self, step: ExecuteStep, valid: ValidStep) -> None:
        """Tell the device about new and removed requests; enter what it refuses into `valid.errors`."""

    @abstractmethod
    def _start(self, step: ExecuteStep, plan: StepPlan | None, valid: ValidStep) -> StepInFlight:
        """Compute the planned requests, or have the device compute them."""

    @abstractmethod
    def _outcomes(self, flight: StepInFlight) -> Sequence[RowResult]:
        """One for each sampled row of the plan."""

    def _score_prompts(self, flight: StepInFlight, plan: StepPlan, hidden: torch.Tensor) -> None:
        """Log-probabilities of prompt tokens; `hidden` [T, H] has all rows when any are requested."""
        assert self._prompt_logprobs is not None, "a model that pools has no log-probabilities"
        for index, (item, state) in enumerate(zip(plan.scheduled, plan.states, strict=True)):
            if state.sampling.params.first_scored_token is not None:
                first_row = int(plan.first_rows[index])
                flight.prompt_results[item.request_id] = self._prompt_logprobs.score(item, state, first_row, hidden)

    def _results(self, flight: StepInFlight, plan: StepPlan) -> dict[str, SampledTokens]:
        """Results by request id; the tokens are appended to the sequences."""
        rows: list[list[RowResult]] = [[] for _ in plan.states]
        for index, outcome in zip(plan.sampled_rows.requests.tolist(), self._outcomes(flight), strict=False):
            rows[index].append(outcome)
        results = {}
        is_plain = not (flight.prompt_results or plan.has_drafts)
        for index, state in enumerate(plan.states):
            row = rows[index][0] if rows[index] else None
            if is_plain and state.error is None and row is not None and row.token_id is not None:
                # as below, in short: one token
                sampled = SampledTokens(request_id=state.request_id, token_ids=[row.token_id], logprobs=row.logprobs)
                self._batch.record(state, sampled.token_ids)
                results[state.request_id] = sampled
                continue
            empty = SampledTokens(request_id=state.request_id)
            result = flight.prompt_results.get(state.request_id, empty)
            if state.error is not None:  # it failed in the previous step, when this one was already queued
                result = replace(empty, error=state.error)
            elif result.error is None and rows[index]:
                drafts = plan.scheduled[index].draft_token_ids
                sampled = verified(state.request_id, drafts, rows[index], self._rank)
                self._batch.record(state, sampled.token_ids)
                result = sampled if sampled.error else replace(sampled, prompt_logprobs=result.prompt_logprobs)
            # a failed request stays failed: another step for it may be queued already
            if result.error is None or result.error.type != NOT_READY:
                state.error = result.error
            results[state.request_id] = result
        return results
