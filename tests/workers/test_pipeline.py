"""Steps in flight: of a worker that computes at once, and of one that works on its own."""

from __future__ import annotations

from collections import deque

from sempre.ipc.messages import ExecuteStep, StepResult
from sempre.workers.pipeline import StepPipeline


class Immediate:
    def execute(self, command: ExecuteStep) -> StepResult:
        return StepResult(rank=0, step_id=command.step_id)


class Ahead:
    """Finishes a step when it is told to."""

    def __init__(self) -> None:
        self.steps: deque[int] = deque()
        self.finished = 0

    def execute(self, command: ExecuteStep) -> StepResult:
        raise AssertionError("steps are submitted")

    def submit(self, command: ExecuteStep) -> None:
        self.steps.append(command.step_id)

    def step_done(self) -> bool:
        return self.finished > 0

    def collect(self) -> StepResult:
        self.finished -= 1
        return StepResult(rank=0, step_id=self.steps.popleft())


def test_an_ordinary_worker_is_done_at_once() -> None:
    pipeline = StepPipeline(Immediate())
    assert not pipeline
    pipeline.submit(ExecuteStep(step_id=4))
    assert len(pipeline) == 1
    assert pipeline.done()
    assert pipeline.collect().step_id == 4
    assert not pipeline


def test_results_come_in_the_order_of_the_steps() -> None:
    worker = Ahead()
    pipeline = StepPipeline(worker)
    pipeline.submit(ExecuteStep(step_id=1))
    pipeline.submit(ExecuteStep(step_id=2))
    assert not pipeline.done()
    worker.finished = 2
    assert pipeline.done()
    assert [pipeline.collect().step_id for _ in range(2)] == [1, 2]
    assert len(pipeline) == 0
