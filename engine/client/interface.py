"""The user process's end of an engine: commands out, events in.

launch        → ProcessClient (process.py), or InprocClient (inproc.py) with multiprocessing off
launch_async  → AsyncProcessClient, or AsyncInprocClient with multiprocessing off (asynchronous.py)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from sempre.engine.config import EngineConfig
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


def launch(
    config: EngineConfig,
    on_progress: ProgressCallback | None = None,
    *,
    meanwhile: Callable[[], None] = lambda: None,
) -> EngineClient:
    """Start an engine and wait until it is ready; `meanwhile` is called once its processes, if any, are on their way.

    Raises the error that stopped it: ModelError, ConfigError, SeedMismatch, InvarianceError, StartupError, …
    """
    if config.multiprocessing:
        from sempre.engine.client.process import ProcessClient

        return ProcessClient.launch(config, on_progress=on_progress, meanwhile=meanwhile)
    from sempre.engine.client.inproc import InprocClient

    meanwhile()
    return InprocClient.launch(config, on_progress=on_progress)


async def launch_async(config: EngineConfig, on_progress: ProgressCallback | None = None) -> AsyncEngineClient:
    """As `launch`, for asyncio; the event loop runs on while the engine starts."""
    from sempre.engine.client.asynchronous import AsyncInprocClient, AsyncProcessClient

    if config.multiprocessing:
        return await AsyncProcessClient.launch(config, on_progress=on_progress)
    return await AsyncInprocClient.launch(config, on_progress=on_progress)
