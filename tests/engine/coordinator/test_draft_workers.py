"""Draft workers that fail again and again are given up; what a user should know is said, and said once."""

from __future__ import annotations

import random
import time
from collections import deque
from pathlib import Path

import pytest
from light_worker import LightWorker

from sempre.engine.config import EngineConfig, SpeculativeConfig
from sempre.engine.coordinator.draft_workers import DraftWorkers
from sempre.engine.coordinator.startup import StartUp
from sempre.engine.executor.base import Executor
from sempre.engine.executor.inproc import InprocExecutor
from sempre.engine.harness import make_request
from sempre.engine.scheduling.limits import Limits
from sempre.engine.scheduling.request import Request
from sempre.engine.speculation import SpeculationPlan
from sempre.ipc.errors import ProtocolError, SempreError, StartupError, WorkerDied
from sempre.ipc.messages import (
    ExecuteStep,
    RngDigests,
    StepCosts,
    StepResult,
    WorkerCommand,
    WorkerEvent,
    WorkerHealth,
)

SPECULATIVE = SpeculativeConfig(
    method="draft_model", model="m", model_path=Path("/"), placement="worker", adaptive=False
)
CONFIG = EngineConfig(model="scripted-light", model_path=Path("/"), speculative_config=SPECULATIVE)
PLAN = SpeculationPlan(SPECULATIVE, steps_ahead=False, costs=StepCosts(step=1.0, row=0.0, result=0.0, draft=0.0))


class OtherSeed(LightWorker):
    def seed(self) -> RngDigests:
        random.seed(self._settings.seed + 1)
        return self.digests()


class ScriptedHost:
    """A draft worker in this process that dies, is late, or answers as it is told."""

    world_size = 1

    def __init__(self) -> None:
        self.worker = LightWorker
        self.fails = False
        self.num_starts = 0
        self.asked: list[ExecuteStep] = []
        self.answers: deque[StepResult] = deque()
        self._workers: InprocExecutor | None = None

    def start(self, config: EngineConfig) -> Executor:
        self.num_starts += 1
        self._workers = InprocExecutor(config, self.worker)
        return self

    def stop(self) -> None:
        self._workers = None

    def send(self, rank: int, command: WorkerCommand) -> None:
        if isinstance(command, ExecuteStep):
            self.asked.append(command)
            return
        assert self._workers is not None
        self._workers.send(rank, command)

    def receive(self) -> tuple[int, WorkerEvent] | None:
        if self.fails:
            raise WorkerDied("draft worker 0 died: it was told to", rank=0, cause="it was told to")
        if self.answers:
            return 0, self.answers.popleft()
        assert self._workers is not None
        return self._workers.receive()

    def blame(self, rank: int, error: ProtocolError) -> SempreError:
        return error

    def health(self) -> list[WorkerHealth]:
        return []

    def shutdown(self) -> None:
        self.stop()


def started_target() -> StartUp:
    executor = InprocExecutor(CONFIG, LightWorker)
    startup = StartUp(CONFIG, executor)
    while startup.ready is None:
        arrival = executor.receive()
        assert arrival is not None
        startup.handle(*arrival)
    return startup


@pytest.fixture
def host() -> ScriptedHost:
    return ScriptedHost()


@pytest.fixture
def drafts(host: ScriptedHost) -> DraftWorkers:
    """Serving."""
    workers = DraftWorkers(CONFIG, host, started_target())
    assert workers.poll() == []
    assert workers.is_serving
    workers.serve()
    return workers


def ask(drafts: DraftWorkers) -> None:
    request = Request(make_request([1, 2], max_tokens=90), 0, Limits(100, 100, 16), PLAN.start())
    assert request.speculation is not None
    request.speculation.sampled(request.token_ids, [], 0, None)
    drafts.links[0].ask([request])


def polled(drafts: DraftWorkers, count: int) -> list[str]:
    return [notice for _ in range(count) for notice in drafts.poll()]


def test_one_that_dies_before_the_engine_serves_stops_the_start(host: ScriptedHost) -> None:
    workers = DraftWorkers(CONFIG, host, started_target())
    host.fails = True
    with pytest.raises(StartupError, match="it was told to"):
        workers.poll()


def test_one_that_serves_in_between_is_always_started_again(host: ScriptedHost, drafts: DraftWorkers) -> None:
    for _ in range(10):
        host.fails = True
        [notice] = drafts.poll()
        assert "it was told to. Requests go on without its guesses while it is restarted" in notice
        host.fails = False
        assert drafts.poll() == []
        assert drafts.is_serving


def test_one_that_never_comes_back_is_given_up(host: ScriptedHost, drafts: DraftWorkers) -> None:
    host.fails = True
    first, last = polled(drafts, 20)
    assert "while it is restarted" in first
    assert "it has not come back after 5 starts (max_restarts) and is given up" in last
    assert host.num_starts == 1 + CONFIG.max_restarts
    ask(drafts)
    assert drafts.poll() == []
    assert host.asked == []


def test_a_successor_with_another_seed_is_never_asked(host: ScriptedHost, drafts: DraftWorkers) -> None:
    host.worker = OtherSeed
    host.fails = True
    [first] = drafts.poll()
    assert "while it is restarted" in first
    host.fails = False
    ask(drafts)
    [last] = polled(drafts, 20)
    assert "seeded differently" in last
    assert "given up" in last
    assert host.num_starts == 1 + CONFIG.max_restarts
    assert host.asked == []


def test_that_it_is_late_is_said_once(host: ScriptedHost, drafts: DraftWorkers) -> None:
    notices = []
    for _ in range(2):
        ask(drafts)
        until = time.monotonic() + 0.7  # more than it is waited for
        while time.monotonic() < until:
            notices += drafts.poll()
            time.sleep(0.02)
        assert drafts.links[0].is_late
        host.answers.append(StepResult(rank=0, step_id=host.asked[-1].step_id, drafts=[[5]]))
        notices += drafts.poll()
        assert not drafts.links[0].is_late
    [notice] = notices
    assert "a draft worker has not answered within 0.5 s" in notice
    assert len(host.asked) == 2
