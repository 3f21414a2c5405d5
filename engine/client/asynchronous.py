"""The asyncio clients of an engine in its own processes and of one inside this process."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial

from sempre.engine.client.engine_process import ProcessOptions, check_alike
from sempre.engine.client.inproc import InprocClient
from sempre.engine.client.interface import ProgressCallback
from sempre.engine.client.process import LOOK_S, ProcessClientBase
from sempre.engine.client.successor import RestartOrder, check_room, lacks_memory, resolved_order
from sempre.engine.executor.base import Executor
from sempre.ipc.async_channel import AsyncPeerChannel
from sempre.ipc.config import EngineConfig
from sempre.ipc.errors import ConfigError, EngineDeadError
from sempre.ipc.messages import ClientCommand, ClientEvent, EngineReady

logger = logging.getLogger(__name__)

# between two looks at whether `receive` has changed the engine
_CHANGED_LOOK_S = 0.02


class AsyncProcessClient(ProcessClientBase[AsyncPeerChannel[ClientEvent]]):
    """The client for asyncio; tied to the event loop in which it is created."""

    def __init__(self, config: EngineConfig, options: ProcessOptions) -> None:
        super().__init__(config, options, _connect)
        self._change: Callable[[], None] | None = None
        """what the task that receives does next to the link, which it alone uses"""
        self._is_replacing = False

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

    async def replace(self, order: RestartOrder) -> None:
        """As AsyncEngineClient."""
        self._raise_if_ended()
        if self._is_replacing:
            raise ConfigError("the engine is being replaced already; wait until it has been.")
        self._is_replacing = True
        try:
            order = resolved_order(order, self._config, self.ready)
            if order != "stop-first":
                try:
                    await self._start_first()
                    return
                except ConfigError as error:
                    if order == "start-first" or not lacks_memory(error):
                        raise
                    logger.warning("%s The running engine is stopped first.", error)
            await self._changed(partial(self._retire, "the engine is being replaced"))
            while self._outage is not None:
                await asyncio.sleep(_CHANGED_LOOK_S)
                self._raise_if_ended()
        finally:
            self._is_replacing = False

    async def _start_first(self) -> None:
        options = replace(self._options, directory=None)
        successor = await AsyncProcessClient.launch(self._config, options=options)
        try:
            await self._changed(partial(self._take_over, successor))
        except BaseException:
            if self.process is not successor.process:
                successor.process.child.kill_group()
                successor.close()
            raise

    async def _changed(self, change: Callable[[], None]) -> None:
        """Have `receive` make a change, and wait until it has. Raises the change's error."""
        done: asyncio.Future[None] = asyncio.get_running_loop().create_future()

        def make() -> None:
            try:
                change()
            except (ConfigError, EngineDeadError) as error:
                done.set_exception(error)
            else:
                done.set_result(None)

        self._change = make
        try:
            while not done.done():
                self._raise_if_ended()
                await asyncio.sleep(_CHANGED_LOOK_S)
            done.result()
        finally:
            self._change = None

    def _take_over(self, successor: AsyncProcessClient) -> None:
        """Use the engine of `successor` instead of ours, whose last outputs are computed again. Raises CoordinatorDied,
        ConfigError."""
        check_alike(self.ready, successor.ready)
        check_room(self.ready, successor.ready)
        link, theirs = self._link, successor._link
        link.channel.close()
        link.process.bury()
        if self._directory is not self._options.directory:
            self._directory.remove()
        link.workers.close()
        successor._finalizer.detach()
        link.process, link.channel, link.workers = theirs.process, theirs.channel, theirs.workers
        self._directory, self._heartbeats = successor._directory, successor._heartbeats
        self._saw_end, self._gone_by, self._outage = False, None, None
        self._take_ready(successor.ready)
        for command in self._pending.commands():
            link.channel.send(command)
        logger.info(
            "a new engine (process %d) continues %d sequences", link.process.child.pid, self._pending.num_unfinished
        )

    async def _receive(self, timeout_s: float) -> ClientEvent | None:
        self._raise_if_ended()
        deadline = time.monotonic() + timeout_s
        while (wait_s := min(self._look_s, deadline - time.monotonic())) > 0:
            if self._change is not None:
                make_change, self._change = self._change, None
                make_change()
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

    async def replace(self, order: RestartOrder) -> None:
        """Raises ConfigError: there is no process to replace."""
        raise ConfigError("an engine inside this process cannot be replaced: it needs multiprocessing.")

    def close(self) -> None:
        """Close the engine after the current step."""
        self._thread.submit(self._client.close).result()
        self._thread.shutdown()
