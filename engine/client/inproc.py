"""The client of an engine inside this process: core and worker, driven by `receive`."""

from __future__ import annotations

import weakref
from collections import deque

from sempre.engine.client.engine_process import ended_by
from sempre.engine.client.interface import ProgressCallback
from sempre.engine.coordinator.core import EngineCore
from sempre.engine.executor.base import Executor
from sempre.engine.executor.inproc import InprocExecutor
from sempre.ipc.config import EngineConfig
from sempre.ipc.error_info import again
from sempre.ipc.errors import EngineDeadError
from sempre.ipc.messages import ClientCommand, ClientEvent, EngineReady, ShutdownEngine, StartupProgress


class InprocClient:
    """Computes only while `receive` waits for an event."""

    ready: EngineReady

    def __init__(self, config: EngineConfig, executor: Executor) -> None:
        self._core = EngineCore(config, executor)
        self._commands: deque[ClientCommand] = deque()
        self._events: deque[ClientEvent] = deque()
        self._error: EngineDeadError | None = None
        self._finalizer = weakref.finalize(self, _end, self._core, executor)

    @classmethod
    def launch(
        cls, config: EngineConfig, *, executor: Executor | None = None, on_progress: ProgressCallback | None = None
    ) -> InprocClient:
        """Load the model into this process and seed its global generators. Raises the errors of the start-up."""
        client = cls(config, executor or InprocExecutor(config))
        try:
            client._start(on_progress)
        except BaseException:
            client.close()
            raise
        return client

    def send(self, command: ClientCommand) -> None:
        """Queue a command for the next `receive`; only this method may be called from another thread."""
        if self._error is not None:
            raise again(self._error)
        self._commands.append(command)

    def receive(self, timeout_s: float | None = None) -> ClientEvent | None:
        """As in EngineClient, but a step in progress cannot be interrupted, even after `timeout_s`."""
        if self._error is not None:
            raise again(self._error)
        self._obey_commands()
        try:
            while not self._events and self._work():
                pass
        except Exception as error:
            # after any error, the state of scheduler and worker is unknown
            self._error = again(ended_by(error))
            raise
        return self._events.popleft() if self._events else None

    def has_work(self) -> bool:
        """Whether `receive` has an event or can compute one."""
        return bool(self._commands or self._events) or self._core.has_unfinished()

    def close(self) -> None:
        self._finalizer()
        if self._error is None:
            self._error = ended_by(EngineDeadError("the engine was shut down"))

    def _obey_commands(self) -> None:
        """Raises MessageMalformed for an unexpected command, which does not harm the engine."""
        while self._commands:
            command = self._commands.popleft()
            if isinstance(command, ShutdownEngine):
                self.close()
            else:
                self._events += self._core.handle_command(command)

    def _work(self) -> bool:
        """Run one command of a worker; False if there was nothing to do."""
        self._events += self._core.advance()
        events = self._core.next_events()
        self._events += events or []
        return events is not None

    def _start(self, on_progress: ProgressCallback | None) -> None:
        while self._core.ready is None:
            if not self._work() and self._core.ready is None:
                raise AssertionError("a worker in this process has not answered")
            while self._events:
                event = self._events.popleft()
                if isinstance(event, StartupProgress) and on_progress is not None:
                    on_progress(event)
        self.ready = self._core.ready


def _end(core: EngineCore, executor: Executor) -> None:
    core.close()
    executor.shutdown()
