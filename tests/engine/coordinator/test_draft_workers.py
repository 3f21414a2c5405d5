"""Draft workers that fail repeatedly are given up; what a user should know is said once."""

from __future__ import annotations

import random
import time
from collections import deque
from typing import Any

import pytest
from light_worker import LightWorker
from msgspec.structs import replace

from sempre.engine.coordinator.core import EngineCore
from sempre.engine.coordinator.draft_link import PATIENCE_S, DraftLink
from sempre.engine.coordinator.process import wait_ms
from sempre.engine.executor.inproc import InprocExecutor
from sempre.engine.harness import make_request
from sempre.engine.scheduling.limits import Limits
from sempre.engine.scheduling.request import Request
from sempre.engine.speculation import SpeculationPlan
from sempre.ipc.config import EngineConfig, SpeculativeConfig
from sempre.ipc.errors import WorkerDied
from sempre.ipc.messages import (
    EngineNotice,
    ExecuteStep,
    RngDigests,
    StepCosts,
    StepResult,
    WorkerCommand,
    WorkerEvent,
)

SPECULATIVE = SpeculativeConfig(method="draft_model", model="m", model_path="/", placement="worker", adaptive=False)
CONFIG = EngineConfig(model="scripted-light", model_path="/", speculative_config=SPECULATIVE)
PLAN = SpeculationPlan(SPECULATIVE, steps_ahead=False, costs=StepCosts(step=1.0, row=0.0, result=0.0, draft=0.0))


class OtherSeed(LightWorker):
    def seed(self) -> RngDigests:
        random.seed(self._settings.seed + 1)
        return self.digests()


class ScriptedExecutor(InprocExecutor):
    """A target and a draft worker, rank 1, in this process; the latter dies, is late, or answers as told."""

    def __init__(self) -> None:
        self.worker = LightWorker
        self.fails = False
        self.num_restarts = 0
        self.asked: list[ExecuteStep] = []
        self.answers: deque[StepResult] = deque()
        super().__init__(CONFIG, lambda: self.worker())

    def send(self, rank: int, command: WorkerCommand) -> None:
        if isinstance(command, ExecuteStep):
            assert rank == 1
            self.asked.append(command)
        else:
            super().send(rank, command)

    def receive(self) -> tuple[int, WorkerEvent] | None:
        if self.fails and 1 in self._workers:
            raise WorkerDied("draft worker 0 died: it was told to", rank=1, cause="it was told to")
        return (1, self.answers.popleft()) if self.answers else super().receive()

    def restart(self, rank: int, cause: str) -> None:
        assert rank == 1
        self.num_restarts += 1
        self.answers.clear()
        super().restart(rank, cause)


@pytest.fixture
def executor() -> ScriptedExecutor:
    return ScriptedExecutor()


@pytest.fixture
def core(executor: ScriptedExecutor) -> EngineCore:
    """Serving."""
    core = EngineCore(CONFIG, executor)
    assert polled(core) == []
    assert core.ready is not None
    return core


def link(core: EngineCore) -> DraftLink:
    assert core._drafts is not None
    return core._drafts.links[0]


def ask(core: EngineCore) -> None:
    request = Request(make_request([1, 2], max_tokens=90), 0, Limits(100, 100, 16, 8, 64), PLAN.start())
    assert request.speculation is not None
    request.speculation.sampled(request.token_ids, [], 0, None)
    link(core).ask([request])


def polled(core: EngineCore) -> list[str]:
    """Notices to the user until nothing more happens."""
    events = core.advance()
    while (more := core.next_events()) is not None:
        events += more + core.advance()
    return [event.message for event in events if isinstance(event, EngineNotice)]


def answer(executor: ScriptedExecutor, **changes: Any) -> None:
    result = StepResult(rank=1, step_id=executor.asked[-1].step_id, drafts=[[5]])
    executor.answers.append(replace(result, **changes))


def test_one_that_dies_before_the_engine_serves_stops_the_start(executor: ScriptedExecutor) -> None:
    core = EngineCore(CONFIG, executor)
    executor.fails = True
    with pytest.raises(WorkerDied, match="it was told to"):
        polled(core)
    assert executor.num_restarts == 0


def test_one_that_serves_in_between_is_always_started_again(executor: ScriptedExecutor, core: EngineCore) -> None:
    for _ in range(10):
        executor.fails = True
        [notice] = core.next_events() or []
        assert isinstance(notice, EngineNotice)
        assert "it was told to. Requests continue without its drafts while it is restarted" in notice.message
        executor.fails = False
        assert polled(core) == []
        ask(core)
        core.advance()
        answer(executor)
    assert len(executor.asked) == 10


def test_one_that_never_comes_back_is_given_up(executor: ScriptedExecutor, core: EngineCore) -> None:
    executor.fails = True
    first, last = polled(core)
    assert "while it is restarted" in first
    assert "it has not come back after 5 starts (max_restarts) and is given up" in last
    assert executor.num_restarts == CONFIG.max_restarts
    ask(core)
    assert polled(core) == []
    assert executor.asked == []
    assert [worker.state for worker in executor.health()] == ["ready"]


def test_a_successor_with_another_seed_is_never_asked(executor: ScriptedExecutor, core: EngineCore) -> None:
    executor.worker = OtherSeed
    executor.fails = True
    [first] = core.next_events() or []
    assert isinstance(first, EngineNotice)
    assert "while it is restarted" in first.message
    executor.fails = False
    ask(core)
    [last] = polled(core)
    assert "draft worker 0 is seeded differently from the worker that it replaces" in last
    assert "given up" in last
    assert executor.num_restarts == CONFIG.max_restarts
    assert executor.asked == []


@pytest.mark.parametrize(
    ("changes", "found"),
    [
        ({"drafts": []}, "drafts: expected 1 lists of at most [4] tokens in step 1, found 0 of []"),
        ({"drafts": [[5], [6]]}, "drafts: expected 1 lists of at most [4] tokens in step 1, found 2 of [1, 1]"),
        ({"drafts": [[5] * 5]}, "drafts: expected 1 lists of at most [4] tokens in step 1, found 1 of [5]"),
        ({"drafts": [[5, 1000]]}, "drafts: expected ids less than 1000, found 1000"),
        ({"step_id": 0}, "step_id: expected 1, found 0"),
    ],
)
def test_one_that_answers_wrongly_is_replaced(
    changes: dict[str, Any], found: str, executor: ScriptedExecutor, core: EngineCore
) -> None:
    ask(core)
    core.advance()
    answer(executor, **changes)
    notices = polled(core)
    assert len(notices) == 1
    assert f"a draft worker has failed: StepResult.{found}. Requests continue without its drafts while" in notices[0]
    assert executor.num_restarts == 1
    assert core.next_deadline() is None


def test_an_answer_to_nothing_costs_the_worker_only(executor: ScriptedExecutor, core: EngineCore) -> None:
    executor.answers.append(StepResult(rank=1, step_id=1))
    [notice] = polled(core)
    assert "StepResult.step_id: expected none, found 1" in notice


def test_the_end_of_a_wait_is_known_beforehand(executor: ScriptedExecutor, core: EngineCore) -> None:
    assert core.next_deadline() is None
    before = time.monotonic()
    ask(core)
    core.advance()
    deadline = core.next_deadline()
    assert deadline is not None
    assert before + PATIENCE_S <= deadline <= time.monotonic() + PATIENCE_S
    answer(executor)
    assert polled(core) == []
    assert core.next_deadline() is None


def test_the_coordinator_wakes_up_for_the_end_of_a_wait() -> None:
    now = 1e6
    for passed_s in (-1.0, 0.0, 0.0001, 0.0999, 0.1, 0.15):
        assert passed_s <= wait_ms(now + passed_s, now) / 1000 <= max(0.0, passed_s) + 0.002
    assert wait_ms(now + 10.0, now) == wait_ms(None, now)


def test_that_it_is_late_is_said_once(executor: ScriptedExecutor, core: EngineCore) -> None:
    assert core._drafts is not None
    notices = []
    for now in (1e6, 2e6):
        ask(core)
        for passed_s in (0.0, 0.9 * PATIENCE_S, PATIENCE_S, 3 * PATIENCE_S):
            notices += core._drafts.advance(now + passed_s)
        answer(executor)
        core.next_events()
    [notice] = notices
    assert "a draft worker has not answered within 0.5 s" in notice
    assert len(executor.asked) == 2
