"""The scheduler against a scripted worker that simulates the KV cache.

The worker's next token is a pure function of (seed, all tokens before), so the right output of a request is known
without any scheduler. Its KV cache holds, per slot, a digest of the whole prefix that was computed there; whenever a
token is computed, every slot that it would attend to must hold the request's own prefix. Any wrong block table, early
reuse, or false prefix hit shows at once. A slot of states holds the digest of the tokens folded into it, one after the
other, so a state of other tokens, or of one token twice, shows as well.
"""

from __future__ import annotations

import hashlib
import os
import struct
import subprocess
import sys
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

import msgspec
import pytest
from cache_mirror import CacheMirror, findable_blocks
from hypothesis import given, settings
from hypothesis import strategies as st

from sempre.engine.scheduling import Limits, Scheduler
from sempre.engine.scheduling.kv_events import KVEvents
from sempre.engine.scheduling.prefix_cache import BlockKey
from sempre.engine.speculation import SpeculationPlan
from sempre.ipc.config import SchedulingPolicy, SpeculativeConfig
from sempre.ipc.messages import (
    NOT_READY,
    ErrorInfo,
    ExecuteStep,
    LogprobRows,
    NewRequest,
    PromptCandidates,
    RequestSpec,
    SampledTokens,
    SamplingSpec,
    ScheduledRequest,
    StepCosts,
    StepResult,
)

MASK = 2**64 - 1
NUM_TOKEN_IDS = 6
COSTS = StepCosts(step=1.0, row=0.05, result=0.2, draft=0.1)


def extend(prefix: int, token_id: int) -> int:
    """Digest of a prefix with one more token."""
    mixed = ((prefix ^ (token_id + 1)) * 0x9E3779B97F4A7C15 + 0xD1B54A32D192ED03) & MASK
    return mixed ^ (mixed >> 29)


def next_token(seed: int, prefix: int) -> int:
    return extend(prefix, seed + 1000) % NUM_TOKEN_IDS


@dataclass
class WorkerRequest:
    """A request as the worker sees it; `prefixes[i]` is the digest of tokens [0, i]."""

    new: NewRequest
    token_ids: list[int] = field(default_factory=list)
    prefixes: list[int] = field(default_factory=list)
    block_table: list[int] = field(default_factory=list)
    failed: bool = False
    not_ready_at: int = 0
    """length at which its grammar was last not ready"""

    def append(self, token_id: int) -> None:
        self.token_ids.append(token_id)
        self.prefixes.append(extend(self.prefixes[-1] if self.prefixes else 0, token_id))


class ScriptedWorker:
    """Executes steps; `fail_at[request id]` is the position whose computation fails for that request alone. With
    `slow_grammars`, those are not ready at some lengths, once each."""

    def __init__(self, setup: Setup, fail_at: dict[str, int]) -> None:
        self.block_size = setup.block_size
        self.num_state_slots = setup.num_state_slots
        self.slow_grammars = setup.slow_grammars
        self.fail_at = fail_at
        self.kv_cache: dict[tuple[int, int], int] = {}
        self.states: dict[int, int] = {}
        self.requests: dict[str, WorkerRequest] = {}

    def execute(self, step: ExecuteStep) -> StepResult:
        for request_id in step.finished_request_ids:
            del self.requests[request_id]
        for new in step.new_requests:
            assert new.request_id not in self.requests
            request = self.requests[new.request_id] = WorkerRequest(new)
            for token_id in new.token_ids:
                request.append(token_id)
        self.check_slots(step)
        sampled = [self.run(self.requests[item.request_id], item) for item in step.scheduled]
        drafts = [self.draft(self.requests[item.request_id], item.num_drafts) for item in step.drafts]
        return StepResult(rank=0, step_id=step.step_id, sampled=sampled, drafts=drafts)

    def run(self, request: WorkerRequest, item: ScheduledRequest) -> SampledTokens:
        start, end = item.num_computed_tokens, item.num_computed_tokens + item.num_tokens
        table_start = item.block_table_start
        if request.failed or start <= self.fail_at.get(item.request_id, -1) < end:
            request.failed = True
            return SampledTokens(request_id=item.request_id, error=ErrorInfo(type="ValueError", message="scripted"))
        drafts = item.draft_token_ids
        if drafts:
            assert end - len(drafts) == len(request.token_ids), "drafts come after the last known token"
        assert end - len(drafts) <= len(request.token_ids)
        assert table_start <= len(request.block_table)
        request.block_table[table_start : table_start + len(item.block_ids)] = item.block_ids
        self.check_kv_cache(request, start)
        prefixes = request.prefixes.copy()
        for token_id in drafts:
            prefixes.append(extend(prefixes[-1], token_id))
        for position in range(start, end):
            self.kv_cache[self.slot(request, position)] = prefixes[position]
        self.check_kv_cache(request, end - len(drafts))
        if self.num_state_slots:
            self.fold(request, item, prefixes)
        rows = self.prompt_logprobs(request, item)
        if end < len(request.token_ids):
            return SampledTokens(request_id=item.request_id, prompt_logprobs=rows)
        if self.slow_grammars and request.new.params.grammar is not None and end % 3 and request.not_ready_at != end:
            request.not_ready_at = end
            return SampledTokens(request_id=item.request_id, error=ErrorInfo(type=NOT_READY, message="scripted"))
        sampled: list[int] = []
        for draft in [*drafts, None]:
            sampled.append(next_token(request.new.seed, request.prefixes[-1]))
            request.append(sampled[-1])
            if sampled[-1] != draft:
                break
        return SampledTokens(request_id=item.request_id, token_ids=sampled, prompt_logprobs=rows)

    def check_slots(self, step: ExecuteStep) -> None:
        """The requests of a step may be computed in any order, or at once."""
        owners: dict[int, str] = {}
        for item in step.scheduled:
            written = [slot for _, slot in item.state_writes]
            assert len(set(written)) == len(written), "one slot for two tokens"
            for slot in written:
                assert owners.setdefault(slot, item.request_id) == item.request_id, "one slot of two requests"
        for item in step.scheduled:
            assert owners.get(item.state_read, item.request_id) == item.request_id, "read while another writes it"

    def fold(self, request: WorkerRequest, item: ScheduledRequest, prefixes: list[int]) -> None:
        start, writes = item.num_computed_tokens, dict(item.state_writes)
        assert (item.state_read < 0) == (start == 0)
        assert writes.keys() <= set(range(item.num_tokens))
        state = 0 if item.state_read < 0 else self.states.get(item.state_read)
        assert state == (prefixes[start - 1] if start else 0), f"state: {item.request_id} before position {start}"
        assert state is not None
        token_ids = [*request.token_ids, *item.draft_token_ids]
        for index in range(item.num_tokens):
            state = extend(state, token_ids[start + index])
            if index in writes:
                assert 0 <= writes[index] < self.num_state_slots
                self.states[writes[index]] = state

    def draft(self, request: WorkerRequest, count: int) -> list[int]:
        """As a draft model that is right three times out of four; it has nothing for a request that has failed."""
        if request.failed:
            return []
        drafts, prefix = [], request.prefixes[-1]
        for _ in range(count):
            right = next_token(request.new.seed, prefix)
            drafts.append(right if prefix % 4 else (right + 1) % NUM_TOKEN_IDS)
            prefix = extend(prefix, drafts[-1])
        return drafts

    def slot(self, request: WorkerRequest, position: int) -> tuple[int, int]:
        return request.block_table[position // self.block_size], position % self.block_size

    def check_kv_cache(self, request: WorkerRequest, num_tokens: int) -> None:
        for position in range(num_tokens):
            found = self.kv_cache.get(self.slot(request, position))
            assert found == request.prefixes[position], f"KV cache: {request.new.request_id} at position {position}"

    def prompt_logprobs(self, request: WorkerRequest, item: ScheduledRequest) -> LogprobRows | None:
        """Rows as `ScheduledRequest` says; `ranks` carries the positions, so that a test can see which ones came."""
        params = request.new.params
        if params.first_scored_token is None:
            return None
        start = item.num_computed_tokens
        last = min(start + item.num_tokens, request.new.num_prompt_tokens - 1)
        positions = range(max(start + 1, item.prompt_logprobs_start), last + 1)
        packed = struct.pack(f"<{len(positions)}i", *positions)
        with_candidates = [p for p in positions if params.prompt_candidates and p > params.prompt_candidates.start]
        candidates = struct.pack(f"<{len(with_candidates)}i", *with_candidates)
        return LogprobRows(
            num_rows=len(positions), width=1, token_ids=packed, logprobs=packed, ranks=packed, candidates=candidates
        )


@dataclass
class Outcome:
    token_ids: list[int] = field(default_factory=list)
    prompt_positions: list[int] = field(default_factory=list)
    candidate_positions: list[int] = field(default_factory=list)
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    num_cached_tokens: int = 0
    num_deltas: int = 0


@dataclass(frozen=True)
class Workload:
    """Requests with the tick at which each comes, and what happens to them."""

    specs: list[RequestSpec]
    arrivals: list[int]
    aborts: dict[str, int]
    fail_at: dict[str, int]
    restarts: frozenset[int]
    resets: frozenset[int]
    pauses: dict[str, tuple[int, int]] = field(default_factory=dict)
    """from one tick to another"""


@dataclass(frozen=True)
class Setup:
    num_blocks: int
    block_size: int
    max_model_len: int
    max_num_seqs: int
    max_num_batched_tokens: int
    policy: SchedulingPolicy
    enable_prefix_caching: bool
    max_prompt_tokens: int | None = None
    max_in_flight: int = 1
    speculative: SpeculativeConfig | None = None
    num_state_slots: int = 0
    slow_grammars: bool = False

    def scheduler(self, kv_events: KVEvents | None = None) -> Scheduler:
        limits = {name: getattr(self, name) for name in Limits.__dataclass_fields__ if hasattr(self, name)}
        plan = None
        if self.speculative is not None:
            plan = SpeculationPlan(self.speculative, steps_ahead=self.max_in_flight > 1, costs=COSTS)
        return Scheduler(
            Limits(**limits, max_draft_tokens=6),
            policy=self.policy,
            enable_prefix_caching=self.enable_prefix_caching,
            speculation=plan,
            kv_events=kv_events,
        )


def expected(spec: RequestSpec, setup: Setup) -> Outcome:
    """The one right outcome, without a scheduler."""
    token_ids = list(spec.prompt_token_ids)
    prefix = 0
    for token_id in token_ids:
        prefix = extend(prefix, token_id)
    outcome = Outcome()
    limit = min(len(token_ids) + spec.params.max_tokens, setup.max_model_len)
    while outcome.finish_reason is None:
        token_id = next_token(spec.seed, prefix)
        prefix = extend(prefix, token_id)
        token_ids.append(token_id)
        outcome.token_ids.append(token_id)
        may_stop = len(outcome.token_ids) >= spec.params.min_tokens
        # a complete grammar wins over min_tokens
        if (may_stop or spec.params.grammar is not None) and token_id in spec.params.eos_token_ids:
            outcome.finish_reason = "stop"
        elif may_stop and token_id in spec.params.stop_token_ids:
            outcome.finish_reason, outcome.stop_reason = "stop", token_id
        elif len(token_ids) == limit:
            outcome.finish_reason = "length"
        elif len(token_ids) > setup.num_blocks * setup.block_size:
            outcome.finish_reason = "error"
    if (first := spec.params.first_scored_token) is not None:
        outcome.prompt_positions = list(range(first, len(spec.prompt_token_ids)))
    if (given := spec.params.prompt_candidates) is not None:
        outcome.candidate_positions = list(range(1 + given.start, len(spec.prompt_token_ids)))
    return outcome


def identity(step: ExecuteStep) -> ExecuteStep:
    return step


class Simulation:
    """Runs a workload to its end; `tamper` may falsify the steps on their way to the worker."""

    def __init__(
        self, workload: Workload, setup: Setup, tamper: Callable[[ExecuteStep], ExecuteStep] = identity
    ) -> None:
        self.workload = workload
        self.setup = setup
        self.tamper = tamper
        self.kv_events = KVEvents(setup.block_size)
        self.mirror = CacheMirror()
        self.scheduler = setup.scheduler(self.kv_events)
        self.worker = ScriptedWorker(setup, workload.fail_at)
        self.in_flight: deque[tuple[ExecuteStep, StepResult]] = deque()
        self.outcomes = {spec.request_id: Outcome() for spec in workload.specs}
        self.steps: list[ExecuteStep] = []

    def run(self) -> dict[str, Outcome]:
        last_arrival = max(self.workload.arrivals)
        tick = 0
        while tick <= last_arrival or self.scheduler.num_unfinished or self.in_flight:
            assert tick < 4000, "no progress"
            self.command(tick)
            self.advance()
            self.scheduler.check_invariants()
            self.check_mirror()
            tick += 1
        assert self.scheduler.stats().kv_cache_usage == 0
        assert self.scheduler.reset_prefix_cache()
        self.scheduler.check_invariants()
        self.check_mirror()
        return self.outcomes

    def check_mirror(self) -> None:
        """A subscriber of KV events knows exactly what can be found."""
        self.mirror.apply(msgspec.to_builtins(self.kv_events.take()))
        assert self.mirror.blocks == findable_blocks(self.scheduler)

    def command(self, tick: int) -> None:
        for spec, arrival in zip(self.workload.specs, self.workload.arrivals, strict=True):
            if arrival == tick:
                self.scheduler.add(spec)
        for request_id, at in self.workload.aborts.items():
            delta = self.scheduler.abort(request_id) if at == tick else None
            if delta is not None:
                self.outcomes[request_id].finish_reason = delta.finish_reason
        for request_id, (start, end) in self.workload.pauses.items():
            if tick == start:
                self.scheduler.pause(request_id)
            if tick == end:
                self.scheduler.resume(request_id)
        if tick in self.workload.restarts:
            self.worker = ScriptedWorker(self.setup, self.workload.fail_at)
            self.in_flight.clear()
            self.scheduler.restart("killed")
        if tick in self.workload.resets:
            self.scheduler.reset_prefix_cache()

    def advance(self) -> None:
        while len(self.in_flight) < self.setup.max_in_flight:
            step = self.scheduler.schedule()
            self.scheduler.check_invariants()
            if step is None:
                break
            assert sum(item.num_tokens for item in step.scheduled) <= self.setup.max_num_batched_tokens
            if self.setup.max_prompt_tokens is not None:
                planned = [item.num_tokens - len(item.draft_token_ids) for item in step.scheduled]
                assert sum(count for count in planned if count > 1) <= self.setup.max_prompt_tokens
            assert len(step.scheduled) <= self.setup.max_num_seqs
            self.check_held_back(step)
            assert sum(len(item.draft_token_ids) for item in step.scheduled) <= 6
            self.steps.append(step)
            self.in_flight.append((step, self.worker.execute(self.tamper(step))))
        if self.in_flight:
            for delta in self.scheduler.update(*self.in_flight.popleft()):
                outcome = self.outcomes[delta.request_id]
                assert outcome.finish_reason is None
                outcome.token_ids += delta.token_ids
                outcome.finish_reason = delta.finish_reason
                outcome.stop_reason = delta.stop_reason
                assert not (outcome.num_deltas and delta.num_cached_tokens)
                outcome.num_cached_tokens += delta.num_cached_tokens
                outcome.num_deltas += 1
                if delta.prompt_logprobs is not None:
                    rows = delta.prompt_logprobs
                    outcome.prompt_positions += struct.unpack(f"<{rows.num_rows}i", rows.ranks)
                    outcome.candidate_positions += struct.unpack(f"<{len(rows.candidates) // 4}i", rows.candidates)

    def check_held_back(self, step: ExecuteStep) -> None:
        """A request with a grammar is in no step before the token that an earlier one samples for it is back."""
        sampled = {s.request_id for _, result in self.in_flight for s in result.sampled if s.token_ids}
        with_grammar = {spec.request_id for spec in self.workload.specs if spec.params.depends_on_output}
        assert not sampled & with_grammar & {item.request_id for item in step.scheduled}


def check_outcomes(workload: Workload, setup: Setup, outcomes: dict[str, Outcome]) -> None:
    for spec in workload.specs:
        found, right = outcomes[spec.request_id], expected(spec, setup)
        assert found.num_cached_tokens < len(spec.prompt_token_ids)
        cut_short = found.finish_reason == "abort" or spec.request_id in workload.fail_at
        if cut_short and found.finish_reason in ("abort", "error"):
            assert found.token_ids == right.token_ids[: len(found.token_ids)]
            assert found.prompt_positions == right.prompt_positions[: len(found.prompt_positions)]
            continue
        assert (found.token_ids, found.finish_reason, found.stop_reason, found.prompt_positions) == (
            right.token_ids,
            right.finish_reason,
            right.stop_reason,
            right.prompt_positions,
        )


speculative_configs = st.builds(
    SpeculativeConfig,
    method=st.sampled_from(["ngram", "suffix", "draft_model"]),
    num_speculative_tokens=st.sampled_from([1, 2, 4, 7]),
    adaptive=st.booleans(),
    prompt_lookup_min=st.integers(1, 2),
)
token_ids = st.integers(0, NUM_TOKEN_IDS - 1)
pauses = st.tuples(st.integers(0, 30), st.integers(1, 20)).map(lambda pause: (pause[0], sum(pause)))
SHARED_PREFIX = [1, 0, 2, 1, 3, 0, 1, 1, 2, 0, 3, 3, 1, 0, 2, 2, 1, 3, 0, 0]


def candidates_from(start: int) -> PromptCandidates:
    """Their ids do not concern the scheduler."""
    return PromptCandidates(start=start, width=1, token_ids=b"")


@st.composite
def request_specs(draw: st.DrawFn, ordinal: int, longest_prompt: int) -> RequestSpec:
    shared = draw(st.integers(0, min(longest_prompt, len(SHARED_PREFIX))))
    prompt = SHARED_PREFIX[:shared] + draw(st.lists(token_ids, max_size=max(0, longest_prompt - shared)))
    max_tokens = draw(st.integers(1, 16))
    params = SamplingSpec(
        max_tokens=max_tokens,
        min_tokens=draw(st.integers(0, max_tokens)),
        eos_token_ids=draw(st.sampled_from([[], [4]])),
        stop_token_ids=draw(st.sampled_from([[], [], [5], [4]])),
        prompt_logprobs=draw(st.sampled_from([None, None, None, 0])),
        prompt_candidates=draw(st.none() | st.integers(0, 6).map(candidates_from)),
        grammar=draw(st.sampled_from([None, None, "start: /.*/"])),
    )
    return RequestSpec(
        request_id=f"r{ordinal}",
        prompt_token_ids=prompt or [0],
        params=params,
        seed=draw(st.integers(0, 3)),
        ordinal=ordinal,
        priority=draw(st.integers(0, 2)),
        cache_salt=draw(st.sampled_from([None, None, None, "salt"])),
    )


@st.composite
def setups(draw: st.DrawFn) -> Setup:
    block_size = draw(st.sampled_from([1, 2, 4, 16]))
    max_num_seqs = draw(st.sampled_from([1, 2, 3, 8]))
    return Setup(
        num_blocks=draw(st.integers(-(-6 // block_size), 40 // block_size + 3)),
        block_size=block_size,
        max_model_len=draw(st.integers(4, 40)),
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=draw(st.sampled_from([1, 2, 3, 7, 16, 64])),
        max_prompt_tokens=draw(st.sampled_from([None, None, 1, 2, 5, 64])),
        policy=draw(st.sampled_from(["fcfs", "priority"])),
        enable_prefix_caching=draw(st.booleans()),
        max_in_flight=draw(st.integers(1, 3)),
        speculative=draw(st.one_of(st.none(), speculative_configs)),
        num_state_slots=draw(st.sampled_from([0, *(max_num_seqs + more for more in (0, 1, 2, 5, 20))])),
        slow_grammars=draw(st.booleans()),
    )


@st.composite
def workloads(draw: st.DrawFn, setup: Setup) -> Workload:
    longest_prompt = min(setup.max_model_len, setup.num_blocks * setup.block_size) - 1
    num_requests = draw(st.integers(1, 7))
    specs = [draw(request_specs(ordinal, longest_prompt)) for ordinal in range(num_requests)]
    ids = st.sampled_from([spec.request_id for spec in specs])
    return Workload(
        specs=draw(st.permutations(specs)),
        arrivals=draw(st.lists(st.integers(0, 20), min_size=num_requests, max_size=num_requests)),
        aborts=draw(st.dictionaries(ids, st.integers(0, 40), max_size=2)),
        fail_at=draw(st.dictionaries(ids, st.integers(0, 30), max_size=1)),
        restarts=draw(st.frozensets(st.integers(0, 40), max_size=2)),
        resets=draw(st.frozensets(st.integers(0, 40), max_size=2)),
        pauses=draw(st.dictionaries(ids, pauses, max_size=2)),
    )


@given(st.data())
@settings(max_examples=400, deadline=None, derandomize=True, database=None)
def test_outputs_do_not_depend_on_scheduling(data: st.DataObject) -> None:
    setup = data.draw(setups())
    workload = data.draw(workloads(setup))
    check_outcomes(workload, setup, Simulation(workload, setup).run())


def busy_workload() -> Workload:
    """Twelve requests with shared prefixes, enough to preempt in a small pool."""
    specs = [
        RequestSpec(
            request_id=f"r{ordinal}",
            prompt_token_ids=SHARED_PREFIX[: 4 + ordinal] + [ordinal % NUM_TOKEN_IDS] * (ordinal % 5),
            params=SamplingSpec(
                max_tokens=10 + ordinal,
                prompt_logprobs=0 if ordinal % 4 == 3 else None,
                grammar="start: /.*/" if ordinal % 5 == 1 else None,
            ),
            seed=ordinal,
            ordinal=ordinal,
            priority=ordinal % 3,
        )
        for ordinal in range(12)
    ]
    arrivals = [ordinal // 2 for ordinal in range(12)]
    return Workload(specs, arrivals, aborts={}, fail_at={}, restarts=frozenset(), resets=frozenset())


def small_setup(**changes: object) -> Setup:
    values: dict[str, object] = {
        "num_blocks": 12,
        "block_size": 4,
        "max_model_len": 64,
        "max_num_seqs": 8,
        "max_num_batched_tokens": 16,
        "policy": "fcfs",
        "enable_prefix_caching": True,
    }
    return Setup(**{**values, **changes})  # type: ignore[arg-type]


SPECULATIVE = [
    SpeculativeConfig(method="ngram", prompt_lookup_min=1, adaptive=False),
    SpeculativeConfig(method="suffix", prompt_lookup_min=1),
    SpeculativeConfig(method="draft_model", num_speculative_tokens=7),
]


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"num_blocks": 200},
        {"policy": "priority"},
        {"enable_prefix_caching": False},
        {"max_num_batched_tokens": 1},
        {"max_num_seqs": 1},
        {"block_size": 1, "num_blocks": 45},
        {"max_in_flight": 2},
        {"max_in_flight": 3, "policy": "priority"},
        *[{"speculative": config, "max_in_flight": depth} for config in SPECULATIVE for depth in (1, 2)],
        {"speculative": SPECULATIVE[2], "num_blocks": 200},
        *[{"num_state_slots": count, "slow_grammars": True, "max_in_flight": 2} for count in (8, 9, 12, 40)],
        {"num_state_slots": 40, "speculative": SPECULATIVE[2], "max_in_flight": 2},
        {"num_state_slots": 12, "block_size": 1, "num_blocks": 45, "speculative": SPECULATIVE[0]},
    ],
    ids=str,
)
def test_a_busy_workload_ends_right_under_every_setting(changes: dict[str, object]) -> None:
    workload, setup = busy_workload(), small_setup(**changes)
    check_outcomes(workload, setup, Simulation(workload, setup).run())


def test_the_busy_workload_preempts_and_hits_the_prefix_cache() -> None:
    simulation = Simulation(busy_workload(), small_setup())
    simulation.run()
    stats = simulation.scheduler.stats()
    assert stats.num_preemptions > 3
    assert stats.cached_prompt_tokens > 10
    assert stats.prefix_cache_hits > stats.cached_prompt_tokens
    assert stats.finished == {"stop": 0, "length": 12, "abort": 0, "error": 0}
    assert stats.generation_tokens == sum(10 + ordinal for ordinal in range(12))


@pytest.mark.parametrize("name", ["stored", "removed"])
def test_the_simulation_notices_a_missing_event(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def forget_one(self: KVEvents, *args: RequestSpec | list[BlockKey] | BlockKey | int) -> None:
        monkeypatch.undo()

    monkeypatch.setattr(KVEvents, name, forget_one)
    with pytest.raises((AssertionError, KeyError)):
        Simulation(busy_workload(), small_setup()).run()


@pytest.mark.parametrize("depth", [1, 2])
def test_drafts_are_kept_and_rejected_among_preemptions_and_prefix_hits(depth: int) -> None:
    simulation = Simulation(busy_workload(), small_setup(speculative=SPECULATIVE[2], max_in_flight=depth))
    simulation.run()
    stats = simulation.scheduler.stats()
    assert stats.num_preemptions > 3
    assert stats.prefix_cache_hits > stats.cached_prompt_tokens > 10
    assert 0 < stats.num_accepted_tokens < stats.num_draft_tokens
    assert stats.num_accepted_tokens == sum(stats.num_accepted_tokens_per_pos)
    assert stats.generation_tokens == sum(10 + ordinal for ordinal in range(12))
    plain = Simulation(busy_workload(), small_setup(max_in_flight=depth))
    plain.run()
    assert stats.num_steps < plain.scheduler.stats().num_steps


@pytest.mark.parametrize("num_spare", [0, 1, 4, 32])
def test_requests_resume_where_a_snapshot_of_their_state_was_kept(num_spare: int) -> None:
    """As many hits as without states where there is room for every snapshot, none where there is none."""
    plain = Simulation(busy_workload(), small_setup())
    plain.run()
    simulation = Simulation(busy_workload(), small_setup(num_state_slots=8 + num_spare))
    simulation.run()
    stats, most = simulation.scheduler.stats(), plain.scheduler.stats()
    assert stats.num_preemptions > 3
    assert (stats.cached_prompt_tokens > 10) == (num_spare > 0)
    assert stats.cached_prompt_tokens <= most.cached_prompt_tokens
    if num_spare == 32:
        assert stats.cached_prompt_tokens > 0.8 * most.cached_prompt_tokens


@pytest.mark.parametrize("speculative", [None, SPECULATIVE[2]], ids=["plain", "drafts"])
@pytest.mark.parametrize("num_state_slots", [3, 4, 7])
def test_every_end_and_every_crash_of_few_requests_leaves_all_slots_free(
    num_state_slots: int, speculative: SpeculativeConfig | None
) -> None:
    """One abort and one crash at every tick of a workload that preempts; invariants hold after each."""
    prompts = [SHARED_PREFIX[:9], SHARED_PREFIX[:6], [*SHARED_PREFIX[:6], 4]]
    specs = [
        RequestSpec(
            request_id=f"r{ordinal}",
            prompt_token_ids=prompt,
            params=SamplingSpec(max_tokens=6, grammar="start: /.*/" if ordinal == 1 else None),
            seed=ordinal,
            ordinal=ordinal,
        )
        for ordinal, prompt in enumerate(prompts)
    ]
    setup = small_setup(
        num_blocks=8,
        block_size=2,
        max_num_seqs=3,
        max_num_batched_tokens=5,
        max_in_flight=2,
        num_state_slots=num_state_slots,
        slow_grammars=True,
        speculative=speculative,
    )
    aborts: list[dict[str, int]] = [{}, *({f"r{index}": tick} for index in range(3) for tick in range(1, 14))]
    preempted = 0
    for aborted in aborts:
        for crash in (frozenset[int](), *(frozenset([tick]) for tick in range(1, 14, 2))):
            workload = Workload(specs, [0, 1, 2], aborted, fail_at={}, restarts=crash, resets=frozenset())
            simulation = Simulation(workload, setup)
            check_outcomes(workload, setup, simulation.run())
            preempted += simulation.scheduler.stats().num_preemptions
    assert preempted > 80


def steps_digest() -> str:
    simulation = Simulation(busy_workload(), small_setup(policy="priority", max_in_flight=2))
    simulation.run()
    return hashlib.sha256(msgspec.msgpack.encode(simulation.steps)).hexdigest()


def test_steps_are_the_same_in_every_process() -> None:
    """Python's own hash seed differs between the processes."""
    digests = {steps_digest()}
    for hash_seed in ("1", "2"):
        environment = {**os.environ, "PYTHONHASHSEED": hash_seed, "PYTHONPATH": os.pathsep.join(sys.path)}
        command = [sys.executable, __file__]
        digests.add(subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout.strip())
    assert len(digests) == 1


# Negative controls: the simulation must notice each of these


def foreign_block(step: ExecuteStep) -> ExecuteStep:
    """The last request of a step gets a block of the first one."""
    *others, last = step.scheduled
    if not (others and others[0].block_ids and last.block_ids):
        return step
    table = [*last.block_ids[:-1], others[0].block_ids[0]]
    return msgspec.structs.replace(step, scheduled=[*others, msgspec.structs.replace(last, block_ids=table)])


def false_hit(step: ExecuteStep) -> ExecuteStep:
    """A new request is told that one token more than is true was found in the cache."""
    new = {request.request_id for request in step.new_requests}
    scheduled = [
        msgspec.structs.replace(item, num_computed_tokens=item.num_computed_tokens + 1, num_tokens=item.num_tokens - 1)
        if item.request_id in new and item.num_tokens > 1
        else item
        for item in step.scheduled
    ]
    return msgspec.structs.replace(step, scheduled=scheduled)


def swapped_blocks(step: ExecuteStep) -> ExecuteStep:
    """A request's growth lands one place too early in its block table."""
    scheduled = [
        msgspec.structs.replace(item, block_table_start=max(0, item.block_table_start - 1)) for item in step.scheduled
    ]
    return msgspec.structs.replace(step, scheduled=scheduled)


def test_the_simulation_notices_rejected_drafts_counted_as_written(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the rollback, the next steps compute after positions that hold other tokens' keys and values."""
    monkeypatch.setattr(Scheduler, "_count_rejected", lambda *_: 0)
    setup = small_setup(num_blocks=200, enable_prefix_caching=False, speculative=SPECULATIVE[2])
    simulation = Simulation(busy_workload(), setup)
    with pytest.raises(AssertionError):
        simulation.run()


def foreign_state(step: ExecuteStep) -> ExecuteStep:
    """The last request of a step reads the first one's state."""
    *others, last = step.scheduled
    if not others or others[0].state_read < 0 or last.state_read < 0:
        return step
    return msgspec.structs.replace(
        step, scheduled=[*others, msgspec.structs.replace(last, state_read=others[0].state_read)]
    )


def late_snapshot(step: ExecuteStep) -> ExecuteStep:
    """A state that is kept before the last token is kept after it instead."""
    scheduled = [
        msgspec.structs.replace(item, state_writes=[(item.num_tokens - 1, slot) for _, slot in item.state_writes[:1]])
        for item in step.scheduled
    ]
    return msgspec.structs.replace(step, scheduled=scheduled)


@pytest.mark.parametrize("tamper", [foreign_state, late_snapshot])
def test_the_simulation_notices_a_wrong_state(tamper: Callable[[ExecuteStep], ExecuteStep]) -> None:
    simulation = Simulation(busy_workload(), small_setup(num_state_slots=40), tamper)
    with pytest.raises(AssertionError):
        simulation.run()


@pytest.mark.parametrize("tamper", [foreign_block, false_hit, swapped_blocks])
def test_the_simulation_notices_a_wrong_step(tamper: Callable[[ExecuteStep], ExecuteStep]) -> None:
    simulation = Simulation(busy_workload(), small_setup(), tamper)
    with pytest.raises((AssertionError, IndexError), match=r"KV cache|out of range"):
        simulation.run()


if __name__ == "__main__":
    print(steps_digest())
