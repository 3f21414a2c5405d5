"""The draft workers of an engine, one for each replica: their start, their death, their restart.

They cost speed when they fail, never a request: what they would have guessed is computed without guesses.
"""

from __future__ import annotations

import logging
import time
from typing import Protocol

import msgspec

from sempre.engine.config import EngineConfig
from sempre.engine.coordinator.draft_link import PATIENCE_S, DraftLink
from sempre.engine.coordinator.startup import StartUp
from sempre.engine.executor.base import Executor
from sempre.ipc.errors import SempreError, StartupError, WorkerDied
from sempre.ipc.messages import StepResult

logger = logging.getLogger(__name__)


class DraftHost(Protocol):
    """Where draft workers live."""

    def start(self, config: EngineConfig) -> Executor:
        """Fresh workers of role draft."""

    def stop(self) -> None:
        """End them at once; may be called again."""


class DraftWorkers:
    """Keeps draft workers running; `links[i]` serves replica i."""

    def __init__(self, config: EngineConfig, host: DraftHost, target: StartUp) -> None:
        """Starts them; `config` and `target` are those of the workers they guess for."""
        self._target = target
        self._config = draft_config(config)
        self._host = host
        self.links = [DraftLink() for _ in range(config.data_parallel_size)]
        self._num_starts = 0  # since they last served
        self._has_served = False
        self._told_late = False
        self._executor: Executor | None = None
        self._startup: StartUp | None = None
        self._start()

    @property
    def is_serving(self) -> bool:
        return self._executor is not None and self._startup is not None and self._startup.ready is not None

    @property
    def step_seconds(self) -> float:
        """What one guess may be expected to take; known while they serve."""
        assert self._startup is not None
        return self._startup.costs.step

    def poll(self) -> list[str]:
        """Take what has arrived and send what is wanted; what the user should know. Raises only before the engine has
        served: a draft worker that cannot start is an error of the settings."""
        notices: list[str] = []
        try:
            while True:
                sent = self._send_steps()
                if not self._receive() and not sent:
                    break
        except SempreError as error:
            if not self._has_served:
                if isinstance(error, WorkerDied):
                    raise StartupError(str(error), rank=error.rank, cause=error.cause) from error
                raise
            notices += self._restart(error)
        now = time.monotonic()
        late = [link for link in self.links if link.check_late(now)]
        if late and not self._told_late:
            self._told_late = True
            notices.append(
                f"a draft worker has not answered within {PATIENCE_S:g} s: requests go on without its guesses whenever "
                "it is late. The outputs are the same."
            )
        return notices

    def serve(self) -> list[int]:
        """The engine is ready: from now on a failure costs speed only. Their process ids.

        Raises SeedMismatch, or ConfigError when their tokens are not the target's.
        """
        assert self._startup is not None
        assert self._startup.ready is not None
        self._target.check_drafts(self._startup)
        self._has_served = True
        self._num_starts = 0
        return self._startup.ready.worker_pids

    def shutdown(self) -> None:
        self._host.stop()
        self._executor = None

    def _start(self) -> None:
        self._num_starts += 1
        self._executor = self._host.start(self._config)
        self._startup = StartUp(self._config, self._executor, role="draft")

    def _restart(self, error: SempreError | OSError) -> list[str]:
        """After the death of one, all of them start anew: at most `max_restarts` times before they serve again."""
        for link in self.links:
            link.reset()
        self._host.stop()
        self._executor = None
        logger.warning("draft workers: %s", error)
        most_starts = self._config.max_restarts
        first = self._num_starts == 0
        while self._num_starts < most_starts:
            try:
                self._start()
                break
            except (OSError, SempreError) as another:
                error = another
                self._host.stop()
                self._executor = None
        what = f"a draft worker has failed: {str(error).splitlines()[0]}. Requests go on without its guesses"
        if self._executor is None:
            return [f"{what}; it has not come back after {most_starts} starts (max_restarts) and is given up."]
        return [f"{what} while it is restarted. The outputs are the same."] if first else []

    def _receive(self) -> bool:
        """Take one event; False when there is none."""
        arrival = None if self._executor is None else self._executor.receive()
        if arrival is None:
            return False
        rank, event = arrival
        if isinstance(event, StepResult):
            self.links[rank].take(event)
        else:
            assert self._startup is not None
            self._startup.handle(rank, event)
            if self._has_served and self.is_serving:
                self._target.check_drafts(self._startup)
                self._num_starts = 0
        return True

    def _send_steps(self) -> bool:
        sent = False
        for rank, link in enumerate(self.links):
            step = link.next_step(time.monotonic(), available=self.is_serving)
            if step is not None:
                assert self._executor is not None
                self._executor.send(rank, step)
                sent = True
        return sent


def draft_config(config: EngineConfig) -> EngineConfig:
    """The settings of the draft workers of an engine with `config`."""
    speculative = config.speculative_config
    assert speculative is not None
    assert speculative.model is not None
    assert speculative.model_path is not None
    return msgspec.structs.replace(
        config,
        model=speculative.model,
        model_path=speculative.model_path,
        tensor_parallel_size=1,
        quantization=None,
        speculative_config=None,
    )
