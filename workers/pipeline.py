"""Steps that a worker has taken and not yet answered, oldest first.

A worker on an accelerator takes a step while the one before it runs; any other worker computes a step when it takes it.
"""

from __future__ import annotations

from collections import deque
from typing import Protocol, runtime_checkable

from sempre.ipc.messages import ExecuteStep, StepResult


class StepExecutor(Protocol):
    """Computes one step at a time."""

    def execute(self, command: ExecuteStep) -> StepResult: ...


@runtime_checkable
class PipelinedExecutor(Protocol):
    """Takes steps ahead of their results."""

    def submit(self, command: ExecuteStep) -> None:
        """Start a step behind those that run; returns before it is done."""

    def step_done(self) -> bool:
        """Whether the oldest step that was submitted and not collected is done."""

    def collect(self) -> StepResult:
        """Wait for that step; its result."""


class StepPipeline:
    """The steps in flight of one worker."""

    def __init__(self, worker: StepExecutor) -> None:
        self._worker = worker
        self._ahead = worker if isinstance(worker, PipelinedExecutor) else None
        self._results: deque[StepResult] = deque()
        self._in_flight = 0

    def __len__(self) -> int:
        return self._in_flight

    def submit(self, command: ExecuteStep) -> None:
        if self._ahead is None:
            self._results.append(self._worker.execute(command))
        else:
            self._ahead.submit(command)
        self._in_flight += 1

    def done(self) -> bool:
        """Whether `collect` would not wait."""
        return self._ahead is None or self._ahead.step_done()

    def collect(self) -> StepResult:
        """The result of the oldest step."""
        self._in_flight -= 1
        return self._results.popleft() if self._ahead is None else self._ahead.collect()
