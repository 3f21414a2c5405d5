"""The user process's interface to a started engine, however it was started."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from sempre.engine.client.successor import RestartOrder
from sempre.ipc.messages import ClientCommand, ClientEvent, EngineReady, StartupProgress

ProgressCallback = Callable[[StartupProgress], None]


class EngineClient(Protocol):
    """A started engine. Not thread-safe."""

    ready: EngineReady

    def send(self, command: ClientCommand) -> None:
        """Queue a command; never blocks. Raises EngineDeadError, MessageTooLarge, or TypeError (no msgpack form)."""

    def receive(self, timeout_s: float | None = None) -> ClientEvent | None:
        """The next event; None if there is none within `timeout_s`, or if none can ever come.

        Raises EngineDeadError if the engine has ended, and ProtocolError if a frame was refused or lost: unfinished
        requests may then never be answered.
        """

    def close(self) -> None:
        """End the engine and all its processes; can be called twice."""


class AsyncEngineClient(Protocol):
    """The same for asyncio; tied to the event loop in which it was launched."""

    ready: EngineReady

    @property
    def outage(self) -> str | None:
        """Why the whole engine is being restarted; None if it is not."""

    def send(self, command: ClientCommand) -> None: ...

    async def receive(self) -> ClientEvent: ...

    async def replace(self, order: RestartOrder) -> None:
        """Replace the engine by a new one, with which unfinished requests continue; another task must receive.

        Raises ConfigError where that is not possible, the errors of a start, and CoordinatorDied if the new engine
        would give other bits. The former one then computes on, unless it had to end first: see `successor.py`.
        """

    def close(self) -> None:
        """End the engine and all its processes, at once if it has failed; can be called twice."""
