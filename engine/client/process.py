"""The client of an engine in processes of its own."""

from __future__ import annotations

import os
import time
import weakref
from collections.abc import Callable
from typing import Generic, Self, TypeVar

import zmq

from sempre.engine.client.engine_process import EngineProcess, ProcessOptions, client_event, ended_by
from sempre.engine.client.interface import ProgressCallback
from sempre.engine.client.vigil import Vigil
from sempre.engine.config import EngineConfig
from sempre.ipc.channel import PeerBase, PeerChannel
from sempre.ipc.errors import EngineDeadError, ProtocolError, SempreError, StartupError
from sempre.ipc.messages import (
    PROTOCOL_VERSION,
    ClientCommand,
    ClientEvent,
    ClientHello,
    EngineReady,
    Heartbeat,
    ShutdownEngine,
    StartupProgress,
)

# the coordinator itself holds each worker to startup_timeout_s
_STARTUP_MARGIN_S = 30.0
# the longest wait without a look at the coordinator, where its end is not an event of its own
LOOK_S = 0.25
_LAST_FRAMES_S = 0.02

Channel = TypeVar("Channel", bound=PeerBase[ClientEvent])


class ProcessClientBase(Generic[Channel]):
    """Owns the coordinator process and watches it; how to wait for events is the subclass's.

    The engine's processes end with `close`, with this object, or with this process.
    """

    ready: EngineReady

    def __init__(
        self, config: EngineConfig, options: ProcessOptions, connect: Callable[[str, EngineConfig], Channel]
    ) -> None:
        self.process = EngineProcess(config, options)
        self._channel = connect(self.process.client_address, config)
        self._finalizer: Callable[[], object] = weakref.finalize(self, _close, self.process, self._channel)
        self._vigil = Vigil(config.heartbeat_interval_s, config.heartbeat_timeout_s)
        self._startup_timeout_s = config.startup_timeout_s
        self._startup_deadline = time.monotonic() + config.startup_timeout_s + _STARTUP_MARGIN_S
        self._is_ready = False
        self._saw_end = False
        self._error: EngineDeadError | None = None
        self._channel.send(ClientHello(protocol_version=PROTOCOL_VERSION, pid=os.getpid()))

    def send(self, command: ClientCommand) -> None:
        self._raise_if_ended()
        self._channel.send(command)

    @property
    def outage(self) -> str | None:
        """As AsyncEngineClient."""
        return None

    def close(self) -> None:
        self._finalizer()
        if self._error is None:
            self._error = EngineDeadError("the engine was shut down")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _interpret(self, arrival: ClientEvent) -> ClientEvent | None:
        """An event for the user, or None. Raises what the event carries."""
        self._vigil.heard()
        try:
            return client_event(arrival)
        except ProtocolError:
            raise  # one frame is lost, the engine is not
        except SempreError as error:
            self._error = ended_by(error)
            raise

    def _look_after(self) -> None:
        """To be called when nothing is left to be read: raises CoordinatorDied when the coordinator has ended or,
        once the engine has started, does not answer."""
        silence_s = self._vigil.silence_s() if self._is_ready else None
        if self.process.child.ended():
            if self._saw_end:
                self._error = self.process.death()
            else:
                # its last frames may still be on their way: read once more
                self._saw_end = True
                time.sleep(_LAST_FRAMES_S)
        elif silence_s is not None:
            self._error = self.process.death(f"no heartbeat for {silence_s:.1f} s")
        elif self._vigil.is_due():
            self._channel.send(Heartbeat())
        self._raise_if_ended()

    def _raise_if_ended(self) -> None:
        if self._error is not None:
            raise self._error

    def _startup_event(self, event: ClientEvent | None, on_progress: ProgressCallback | None) -> bool:
        """True once the engine is ready. Raises StartupError when it takes too long."""
        match event:
            case StartupProgress():
                if on_progress is not None:
                    on_progress(event)
            case EngineReady():
                self.ready = event
                self._is_ready = True
            case None:
                raise StartupError(f"the engine was not ready after {self._startup_timeout_s:g} s (startup_timeout_s)")
            case _:
                raise ProtocolError(f"tag: expected EngineReady, found {type(event).__name__}")
        return self._is_ready

    def _startup_seconds_left(self) -> float:
        return max(0.0, self._startup_deadline - time.monotonic())


class ProcessClient(ProcessClientBase[PeerChannel[ClientEvent]]):
    """The blocking client."""

    def __init__(self, config: EngineConfig, options: ProcessOptions) -> None:
        super().__init__(config, options, _connect)
        self._poller = zmq.Poller()
        self._poller.register(self._channel.socket, zmq.POLLIN)
        if (descriptor := self.process.child.fileno()) is not None:
            self._poller.register(descriptor, zmq.POLLIN)

    @classmethod
    def launch(
        cls,
        config: EngineConfig,
        *,
        options: ProcessOptions | None = None,
        on_progress: ProgressCallback | None = None,
    ) -> ProcessClient:
        """Start an engine and wait until it is ready; when it is not, its processes are gone before this raises."""
        client = cls(config, options or ProcessOptions())
        try:
            while not client._startup_event(client.receive(client._startup_seconds_left()), on_progress):
                pass
        except BaseException:
            client.close()
            raise
        return client

    def receive(self, timeout_s: float | None = None) -> ClientEvent | None:
        self._raise_if_ended()
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        while True:
            while (arrival := self._channel.receive(0)) is not None:
                event = self._interpret(arrival)
                if event is not None:
                    return event
            self._look_after()
            wait_s = LOOK_S if deadline is None else min(LOOK_S, deadline - time.monotonic())
            if wait_s <= 0:
                return None
            self._poller.poll(round(wait_s * 1000))


def _connect(address: str, config: EngineConfig) -> PeerChannel[ClientEvent]:
    return PeerChannel(address, receives=ClientEvent, limit_bytes=config.max_message_bytes)


def _close(process: EngineProcess, channel: PeerBase[ClientEvent]) -> None:
    if process.is_inherited():
        return
    if not process.child.ended():
        channel.send(ShutdownEngine())
    process.end()
    channel.close()
