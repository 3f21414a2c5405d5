"""Draft workers that fail again and again are given up; what a user should know is said, and said once."""

from __future__ import annotations

import random
import time
from collections import deque

import pytest
from light_worker import LightWorker

from sempre.engine.coordinator.core import EngineCore
from sempre.engine.coordinator.draft_link import DraftLink
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
    """A target and a draft worker, rank 1, in this process; that one dies, is late, or answers as it is told."""

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
    """What the user is told until nothing more happens."""
    events = core.advance()
    while (more := core.next_events()) is not None:
        events += more + core.advance()
    return [event.message for event in events if isinstance(event, EngineNotice)]


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
        assert "it was told to. Requests go on without its drafts while it is restarted" in notice.message
        executor.fails = False
        assert polled(core) == []
        ask(core)
        core.advance()
        executor.answers.append(StepResult(rank=1, step_id=executor.asked[-1].step_id, drafts=[[5]]))
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


def test_one_that_answers_too_little_is_replaced(executor: ScriptedExecutor, core: EngineCore) -> None:
    ask(core)
    core.advance()
    executor.answers.append(StepResult(rank=1, step_id=executor.asked[-1].step_id))
    [notice] = polled(core)
    assert "a draft worker has failed: StepResult.drafts: expected 1 lists" in notice
    assert executor.num_restarts == 1


def test_that_it_is_late_is_said_once(executor: ScriptedExecutor, core: EngineCore) -> None:
    notices = []
    for _ in range(2):
        ask(core)
        until = time.monotonic() + 0.7  # more than it is waited for
        while time.monotonic() < until:
            notices += polled(core)
            time.sleep(0.02)
        assert link(core).is_late
        executor.answers.append(StepResult(rank=1, step_id=executor.asked[-1].step_id, drafts=[[5]]))
        notices += polled(core)
        assert not link(core).is_late
    [notice] = notices
    assert "a draft worker has not answered within 0.5 s" in notice
    assert len(executor.asked) == 2
