"""The asyncio clients of an engine in its own processes and of one inside this process."""

from __future__ import annotations

import asyncio
import time
from concurrent.futures import ThreadPoolExecutor

from sempre.engine.client.engine_process import ProcessOptions
from sempre.engine.client.inproc import InprocClient
from sempre.engine.client.interface import ProgressCallback
from sempre.engine.client.process import LOOK_S, ProcessClientBase
from sempre.engine.executor.base import Executor
from sempre.ipc.async_channel import AsyncPeerChannel
from sempre.ipc.config import EngineConfig
from sempre.ipc.messages import ClientCommand, ClientEvent, EngineReady


class AsyncProcessClient(ProcessClientBase[AsyncPeerChannel[ClientEvent]]):
    """The client for asyncio; tied to the event loop in which it is created."""

    def __init__(self, config: EngineConfig, options: ProcessOptions) -> None:
        super().__init__(config, options, _connect)

    @classmethod
    async def launch(
        cls,
        config: EngineConfig,
        *,
        options: ProcessOptions | None = None,
        on_progress: ProgressCallback | None = None,
    ) -> AsyncProcessClient:
        """Like ProcessClient.launch, without blocking the event loop."""
        client = cls(config, options or ProcessOptions())
        try:
            while not client._startup_event(await client._receive(client._startup_seconds_left()), on_progress):
                pass
        except BaseException:
            client.close()
            raise
        return client

    async def receive(self) -> ClientEvent:
        """The next event; cancelling loses none. Raises the errors of ProcessClient.receive."""
        while True:
            event = await self._receive(LOOK_S)
            if event is not None:
                return event

    async def _receive(self, timeout_s: float) -> ClientEvent | None:
        self._raise_if_ended()
        deadline = time.monotonic() + timeout_s
        while (wait_s := min(self._look_s, deadline - time.monotonic())) > 0:
            if self._gone_by is not None:
                await asyncio.sleep(wait_s)
                arrival = None
            else:
                arrival = await self._link.channel.receive(wait_s)
            if arrival is None:
                self._look_after()
                continue
            event = self._interpret(arrival)
            if event is not None:
                return event
        return None


def _connect(address: str, config: EngineConfig) -> AsyncPeerChannel[ClientEvent]:
    return AsyncPeerChannel(address, receives=ClientEvent, limit_bytes=config.max_message_bytes)


class AsyncInprocClient:
    """Computes in its own thread, so that the event loop keeps running."""

    def __init__(self, client: InprocClient, thread: ThreadPoolExecutor) -> None:
        self.ready: EngineReady = client.ready
        self._client = client
        self._thread = thread
        self._sent = asyncio.Event()
        self._receiving: asyncio.Future[ClientEvent | None] | None = None

    @classmethod
    async def launch(
        cls, config: EngineConfig, *, executor: Executor | None = None, on_progress: ProgressCallback | None = None
    ) -> AsyncInprocClient:
        """Like InprocClient.launch; `on_progress` is called in the other thread."""
        thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="sempre-engine")
        loop = asyncio.get_running_loop()
        try:
            client = await loop.run_in_executor(
                thread, lambda: InprocClient.launch(config, executor=executor, on_progress=on_progress)
            )
        except BaseException:
            thread.shutdown(wait=False)
            raise
        return cls(client, thread)

    @property
    def outage(self) -> str | None:
        return None

    def send(self, command: ClientCommand) -> None:
        self._client.send(command)
        self._sent.set()

    async def receive(self) -> ClientEvent:
        """The next event. If a call is cancelled, the next one returns its event."""
        while True:
            self._sent.clear()
            if self._receiving is None and not self._client.has_work():
                await self._sent.wait()
            if self._receiving is None:
                self._receiving = asyncio.get_running_loop().run_in_executor(self._thread, self._client.receive)
            event = await asyncio.shield(self._receiving)
            self._receiving = None
            if event is not None:
                return event

    def close(self) -> None:
        """Close the engine after the current step."""
        self._thread.submit(self._client.close).result()
        self._thread.shutdown()
