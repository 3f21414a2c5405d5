"""The user process's side of an engine: commands out, events in.

interface.py         EngineClient, AsyncEngineClient
process.py           over ZeroMQ to a coordinator process
inproc.py            coordinator's core and worker in this process (multiprocessing off)
asynchronous.py      the same two for asyncio
attached.py          over ZeroMQ to the coordinator of another process of ours
engine_process.py    start, monitoring and end of the coordinator process
pending_requests.py  unanswered requests and calls, with which another coordinator can continue
successor.py         the order in which a running engine is replaced
watch.py             silence of the coordinator, and whether the workers of a dead one are gone
"""

from __future__ import annotations

from collections.abc import Callable

from sempre.engine.client.interface import AsyncEngineClient, EngineClient, ProgressCallback
from sempre.ipc.config import EngineConfig

__all__ = ["AsyncEngineClient", "EngineClient", "ProgressCallback", "launch", "launch_async"]


def launch(
    config: EngineConfig,
    on_progress: ProgressCallback | None = None,
    *,
    meanwhile: Callable[[], None] = lambda: None,
) -> EngineClient:
    """Start an engine and wait until it is ready; `meanwhile` is called once its processes, if any, have started.

    Raises the error that stopped it: ModelError, ConfigError, SeedMismatch, InvarianceError, StartupError, …
    """
    if config.multiprocessing:
        from sempre.engine.client.process import ProcessClient

        return ProcessClient.launch(config, on_progress=on_progress, meanwhile=meanwhile)
    from sempre.engine.client.inproc import InprocClient

    meanwhile()
    return InprocClient.launch(config, on_progress=on_progress)


async def launch_async(config: EngineConfig, on_progress: ProgressCallback | None = None) -> AsyncEngineClient:
    """Like `launch`, for asyncio; the event loop keeps running while the engine starts."""
    from sempre.engine.client.asynchronous import AsyncInprocClient, AsyncProcessClient

    if config.multiprocessing:
        return await AsyncProcessClient.launch(config, on_progress=on_progress)
    return await AsyncInprocClient.launch(config, on_progress=on_progress)
