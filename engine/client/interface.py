"""What a started engine is to the user process, whichever way it was started."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from sempre.ipc.messages import ClientCommand, ClientEvent, EngineReady, StartupProgress

ProgressCallback = Callable[[StartupProgress], None]


class EngineClient(Protocol):
    """A started engine. Not thread-safe."""

    ready: EngineReady

    def send(self, command: ClientCommand) -> None:
        """Queue a command; never blocks. Raises EngineDeadError, MessageTooLarge, or TypeError (no msgpack form)."""

    def receive(self, timeout_s: float | None = None) -> ClientEvent | None:
        """The next event; None when there is none within `timeout_s`, or when none can ever come.

        Raises EngineDeadError when the engine has ended, and ProtocolError when a frame was refused or lost: what is
        unfinished then may never be answered.
        """

    def close(self) -> None:
        """End the engine and all its processes; may be called again."""


class AsyncEngineClient(Protocol):
    """The same for asyncio; belongs to the event loop it was launched in."""

    ready: EngineReady

    @property
    def outage(self) -> str | None:
        """Why the engine as a whole is being restarted; None when it is not."""

    def send(self, command: ClientCommand) -> None: ...

    async def receive(self) -> ClientEvent: ...

    def close(self) -> None:
        """End the engine and all its processes, at once where it has failed; may be called again."""
