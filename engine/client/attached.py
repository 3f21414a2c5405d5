"""The asyncio client of an engine that another process of ours owns.

The owner starts the coordinator, watches and restarts it, and tells this process what has become of it:

    Attach ── connect, hello, EngineReady ── EngineLost ── … ── Attach ── the unfinished requests continue
                                             EngineEnded: requests fail
"""

from __future__ import annotations

import asyncio
import os
import time

from msgspec import Struct

from sempre.engine.client.engine_process import check_alike, client_event, ended_by
from sempre.engine.client.pending_requests import PendingRequests
from sempre.engine.client.process import LOOK_S
from sempre.engine.client.successor import RestartOrder
from sempre.ipc.async_channel import AsyncPeerChannel
from sempre.ipc.codec import FrameEncoder
from sempre.ipc.config import EngineConfig
from sempre.ipc.error_info import again
from sempre.ipc.errors import ConfigError, CoordinatorDied, EngineDeadError, ProtocolError, SempreError, StartupError
from sempre.ipc.messages import (
    PROTOCOL_VERSION,
    ClientCommand,
    ClientEvent,
    ClientHello,
    EngineReady,
    FramesRead,
)

_HELLO_S = 30.0


class Attach(Struct, tag=True, frozen=True):
    """The engine is ready at this address, and expects this process once."""

    address: str
    coordinator_pid: int


class EngineLost(Struct, tag=True, frozen=True):
    """The engine is being started again."""

    reason: str


class EngineEnded(Struct, tag=True, frozen=True):
    """The engine has ended for good."""

    reason: str


OwnerNews = Attach | EngineLost | EngineEnded


class AttachedClient:
    """One of several clients. Its requests continue after a restart of the engine, as those of its owner would."""

    ready: EngineReady

    def __init__(self, config: EngineConfig, news: asyncio.Queue[OwnerNews]) -> None:
        self._config = config
        self._news = news
        self._channel: AsyncPeerChannel[ClientEvent] | None = None
        self._coordinator_pid: int | None = None
        self._pending = PendingRequests()
        self._encoder = FrameEncoder(config.max_message_bytes)
        self._outage: str | None = None
        self._error: EngineDeadError | None = None

    @classmethod
    async def attach(cls, config: EngineConfig, news: asyncio.Queue[OwnerNews]) -> AttachedClient:
        """Wait until the owner's engine is ready, and connect to it. Raises EngineDeadError if it ends before."""
        client = cls(config, news)
        while not isinstance(heard := await news.get(), Attach):
            if isinstance(heard, EngineEnded):
                raise EngineDeadError(heard.reason)
        try:
            client.ready = await client._connect(heard)
        except BaseException:
            client.close()
            raise
        return client

    @property
    def outage(self) -> str | None:
        """As AsyncEngineClient."""
        return self._outage

    def send(self, command: ClientCommand) -> None:
        self._raise_if_ended()
        if self._channel is not None:
            self._channel.send(command)
        else:
            # stays pending until the engine is back; commands that cannot be sent are refused now
            self._encoder.encode(command, 1)
        self._pending.sent(command)

    async def receive(self) -> ClientEvent:
        """The next event; cancelling loses none. Raises EngineDeadError, ProtocolError."""
        while True:
            self._raise_if_ended()
            while not self._news.empty():
                await self._obey(self._news.get_nowait())
            if self._channel is None:
                await self._obey(await self._news.get())
                continue
            arrival = await self._channel.receive(LOOK_S)
            event = None if arrival is None else self._interpret(arrival)
            if event is not None:
                return event

    async def replace(self, order: RestartOrder) -> None:
        """Raises ConfigError: the owner replaces the engine."""
        raise ConfigError("the process that owns the engine replaces it, not one of its API processes.")

    def close(self) -> None:
        """Leave the engine, whose owner ends the requests; can be called twice."""
        self._disconnect()
        if self._error is None:
            self._error = EngineDeadError("the engine was shut down")

    async def _obey(self, news: OwnerNews) -> None:
        match news:
            case Attach(coordinator_pid=pid) if pid == self._coordinator_pid:
                pass  # told twice
            case Attach():
                ready = await self._connect(news)
                check_alike(self.ready, ready)
                self.ready, self._outage = ready, None
                assert self._channel is not None
                for command in self._pending.commands():
                    self._channel.send(command)
            case EngineLost(reason=reason):
                self._disconnect()
                self._outage = reason
            case EngineEnded(reason=reason):
                self._disconnect()
                self._error = CoordinatorDied(reason, cause=reason)
                self._raise_if_ended()

    async def _connect(self, attach: Attach) -> EngineReady:
        """Say hello and wait for EngineReady. Raises StartupError."""
        self._disconnect()
        address, self._coordinator_pid = attach.address, attach.coordinator_pid
        channel: AsyncPeerChannel[ClientEvent] = AsyncPeerChannel(
            address, receives=ClientEvent, limit_bytes=self._config.max_message_bytes
        )
        self._channel = channel
        channel.send(ClientHello(protocol_version=PROTOCOL_VERSION, pid=os.getpid()))
        deadline = time.monotonic() + _HELLO_S
        while (left_s := deadline - time.monotonic()) > 0:
            event = await channel.receive(left_s)
            if isinstance(event, EngineReady):
                return event
            if event is not None:
                client_event(event)
        raise StartupError(f"{address}: no EngineReady within {_HELLO_S:g} s after this process has said hello")

    def _interpret(self, arrival: ClientEvent) -> ClientEvent | None:
        assert self._channel is not None
        if (sequence := self._channel.read_up_to()) is not None:
            self._channel.send(FramesRead(sequence=sequence))
        try:
            event = client_event(arrival)
        except ProtocolError:
            raise  # one frame is lost, but the engine still runs
        except SempreError as error:
            self._error = again(ended_by(error))
            raise
        if event is not None:
            self._pending.received(event)
        return event

    def _disconnect(self) -> None:
        if self._channel is not None:
            self._channel.close()
            self._channel = None

    def _raise_if_ended(self) -> None:
        if self._error is not None:
            raise again(self._error)
