"""The client for asyncio of an engine inside this process."""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor

from sempre.engine.client import ProgressCallback
from sempre.engine.client_inproc import InprocClient
from sempre.engine.config import EngineConfig
from sempre.engine.executor.base import Executor
from sempre.ipc.messages import ClientCommand, ClientEvent, EngineReady


class AsyncInprocClient:
    """Computes in one thread of its own, so that the event loop runs on."""

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
        """As InprocClient.launch; `on_progress` is called in the other thread."""
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

    def send(self, command: ClientCommand) -> None:
        self._client.send(command)
        self._sent.set()

    async def receive(self) -> ClientEvent:
        """The next event. A cancelled call's event is returned by the next one."""
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
        """Waits for the step in progress."""
        self._thread.submit(self._client.close).result()
        self._thread.shutdown()
