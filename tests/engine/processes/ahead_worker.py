"""A scripted worker that takes two steps at a time, as one on a GPU does; started as a module.

A step is computed when it is collected, some milliseconds after it was submitted.
"""

from __future__ import annotations

import time
from collections import deque

import msgspec
from light_worker import LightWorker

from sempre.ipc.messages import CallMethod, CallMethodReply, ExecuteStep, LoadModel, ModelLoaded, StepResult
from sempre.workers.main import main

STEP_S = 0.003


class AheadWorker(LightWorker):
    def __init__(self) -> None:
        super().__init__()
        self._submitted: deque[ExecuteStep] = deque()
        self._done_at = 0.0
        self._most_in_flight = 0

    def load_model(self, command: LoadModel) -> ModelLoaded:
        return msgspec.structs.replace(super().load_model(command), max_steps_in_flight=2)

    @property
    def steps_in_flight(self) -> int:
        return len(self._submitted)

    def submit(self, command: ExecuteStep) -> None:
        if not self._submitted:
            self._done_at = time.monotonic() + STEP_S
        self._submitted.append(command)
        self._most_in_flight = max(self._most_in_flight, len(self._submitted))

    def step_done(self) -> bool:
        return time.monotonic() >= self._done_at

    def collect(self) -> StepResult:
        self._done_at = time.monotonic() + STEP_S
        return LightWorker.execute(self, self._submitted.popleft())

    def call(self, command: CallMethod) -> CallMethodReply:
        assert not self._submitted, "a call is answered after the steps before it"
        if command.method == "most_in_flight":
            return CallMethodReply(rank=self._settings.rank, call_id=command.call_id, result=self._most_in_flight)
        return super().call(command)


if __name__ == "__main__":
    main(AheadWorker)
