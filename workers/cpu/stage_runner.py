"""Runs steps on a CPU with the layers of one stage.

A step is cut by requests into as many parts as there are stages, each of which computes another part:

    first stage  | step 1, part 0 | step 1, part 1 | step 2, part 0 | step 2, part 1 | …
    last stage                    | step 1, part 0 | step 1, part 1 | step 2, part 0 | …

The last one samples, and reports the tokens of each part to the others, which wait for those of the requests that they
are to continue. All stages cut alike, and a request's bits depend neither on the parts nor on who shares its part.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

import msgspec

from sempre.ipc.errors import ProtocolError
from sempre.ipc.messages import NOT_READY, ErrorInfo, ExecuteStep, RequestOutcome, SampledTokens, ScheduledRequest
from sempre.kernels.sampling import RAW_LOGPROBS, Reports
from sempre.workers.cpu.runner import ComputedRows, CpuModelRunner, row_digests, with_digests
from sempre.workers.input_batch import StepPlan
from sempre.workers.kv_cache import PagedKvCache
from sempre.workers.models.base import CausalLM
from sempre.workers.runner import ComputedStep, StepInFlight
from sempre.workers.sampling import GrammarCompiler
from sempre.workers.stages import StageLink
from sempre.workers.step_validation import StepLimits

# the loop around a worker with a step in flight also looks for commands
_LOOK_S = 0.2e-3
_ENCODER = msgspec.msgpack.Encoder()
_DECODER = msgspec.msgpack.Decoder(list[RequestOutcome])


@dataclass
class _StagedStep(StepInFlight):
    sampled: list[SampledTokens] = field(default_factory=list)
    """of the parts that are done, in order"""
    num_unreported: int = 0
    """parts that the last stage has not reported"""


@dataclass
class _Part(ComputedRows):
    """`step` has only the requests of this part."""

    awaited: frozenset[str] = frozenset()
    """requests that the last stage samples for, or may find an error in"""


class CpuStageRunner(CpuModelRunner):
    """One stage's layers and cache, and the requests it knows."""

    def __init__(
        self,
        model: CausalLM,
        cache: PagedKvCache,
        grammars: GrammarCompiler,
        limits: StepLimits,
        *,
        rank: int,
        reports: Reports = RAW_LOGPROBS,
    ) -> None:
        super().__init__(model, cache, grammars, limits, rank=rank, reports=reports)
        self._stage = model.parallel.stage
        self._passed_on: deque[tuple[_StagedStep, _Part]] = deque()
        """parts that the last stage has not reported"""

    def submit(self, step: ExecuteStep) -> None:
        # whether a request has failed is decided for each part, when what it depends on has been reported
        self._validation.admit(step)
        # every stage reads the whole file, so that all of them find the same fault in it
        self._prepare_adapters(step, {})
        staged = _StagedStep(step, {})
        self._in_flight.append(staged)
        for scheduled in parts_of(step.scheduled, self._stage.count):
            part = self._compute_part(ExecuteStep(step_id=step.step_id, scheduled=scheduled))
            if self._stage.is_last:
                staged.sampled += self._report(part)
            else:
                staged.num_unreported += 1
                self._passed_on.append((staged, part))

    def step_done(self) -> bool:
        staged = self._in_flight[0]
        assert isinstance(staged, _StagedStep)
        while staged.num_unreported and self._link.has_report(_LOOK_S):
            self._take_report()
        return not staged.num_unreported

    def collect(self) -> ComputedStep:
        staged = self._in_flight[0]
        assert isinstance(staged, _StagedStep)
        while staged.num_unreported:
            self._take_report()
        self._in_flight.popleft()
        return ComputedStep(staged.step, staged.sampled)

    @property
    def _link(self) -> StageLink:
        assert self._stage.link is not None
        return self._stage.link

    def _compute_part(self, step: ExecuteStep) -> _Part:
        """Compute this stage's layers, and sample if it is the last one."""
        ids = {item.request_id for item in step.scheduled}
        while any(not part.awaited.isdisjoint(ids) for _, part in self._passed_on):
            self._take_report()
        errors = {name: error for name in ids if (error := self._batch.get(name).error) is not None}
        healthy = [item for item in step.scheduled if item.request_id not in errors]
        part = _Part(step, errors)
        if healthy:
            part.plan = plan = self._batch.plan(healthy)
            self._batch.expect(plan.slots[plan.samples])
            self._compute(part, plan)
            samples = zip(plan.states, plan.samples.tolist(), strict=True)
            part.awaited = frozenset(state.request_id for state, does in samples if does or state.reads_all_rows)
        return part

    def _compute(self, flight: ComputedRows, plan: StepPlan) -> None:
        if self._stage.is_last:
            super()._compute(flight, plan)
        else:
            flight.hidden_digests = row_digests(self._sampled(plan, self._forward(plan)))
        source = self._model.model.input
        if source is not None:
            flight.received_digests = row_digests(self._sampled(plan, source.received))

    def _report(self, part: _Part) -> list[SampledTokens]:
        """The results of the last stage, which the others are told."""
        results = {} if part.plan is None else self._results(part, part.plan)
        sampled = [_failed(item, part) or results[item.request_id] for item in part.step.scheduled]
        outcomes = [
            RequestOutcome(token_ids=result.token_ids, error_type=result.error.type if result.error else "")
            for result in sampled
        ]
        self._link.report(_ENCODER.encode(outcomes))
        return sampled

    def _take_report(self) -> None:
        """What the last stage sampled for the oldest part that was passed on. Raises ProtocolError."""
        outcomes = _DECODER.decode(self._link.next_report())
        staged, part = self._passed_on.popleft()
        if len(outcomes) != len(part.step.scheduled):
            raise ProtocolError(
                f"rank {self._rank}: step {part.step.step_id}: expected a report of {len(part.step.scheduled)}"
                f" requests, found {len(outcomes)}."
            )
        results = {
            item.request_id: _result(item, outcome) for item, outcome in zip(part.step.scheduled, outcomes, strict=True)
        }
        if part.plan is not None:
            results = with_digests(results, part, part.plan)
            for state, samples in zip(part.plan.states, part.plan.samples.tolist(), strict=True):
                result = results[state.request_id]
                if samples:
                    self._batch.record(state, result.token_ids)
                if result.error is not None and result.error.type != NOT_READY:
                    state.error = result.error
        staged.sampled += [_failed(item, part) or results[item.request_id] for item in part.step.scheduled]
        staged.num_unreported -= 1


def parts_of(scheduled: Sequence[ScheduledRequest], count: int) -> list[list[ScheduledRequest]]:
    """Up to `count` parts of adjacent requests, about equal in tokens."""
    total = sum(item.num_tokens for item in scheduled)
    parts: list[list[ScheduledRequest]] = [[] for _ in range(count)]
    before = 0
    for item in scheduled:
        # where the middle of its tokens lies
        parts[(2 * before + item.num_tokens) * count // (2 * total)].append(item)
        before += item.num_tokens
    return [part for part in parts if part]


def _failed(item: ScheduledRequest, part: _Part) -> SampledTokens | None:
    error = part.errors.get(item.request_id)
    return None if error is None else SampledTokens(request_id=item.request_id, error=error)


def _result(item: ScheduledRequest, outcome: RequestOutcome) -> SampledTokens:
    """What another stage than the last one answers."""
    error = ErrorInfo(type=outcome.error_type, message="found by the last stage") if outcome.error_type else None
    return SampledTokens(request_id=item.request_id, token_ids=outcome.token_ids, error=error)
