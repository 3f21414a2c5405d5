"""The client of an engine in its own processes."""

from __future__ import annotations

import logging
import os
import time
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, Self, TypeVar

import zmq
from msgspec.structs import replace

from sempre.engine.child_process import RestartBudget
from sempre.engine.client.engine_process import (
    EngineProcess,
    ProcessOptions,
    check_alike,
    client_event,
    ended_by,
    prepare_hosts,
)
from sempre.engine.client.interface import ProgressCallback
from sempre.engine.client.interrupts import allowed
from sempre.engine.client.pending_requests import PendingRequests
from sempre.engine.client.watch import HeartbeatMonitor, WorkerWatch
from sempre.ipc.channel import PeerBase, PeerChannel
from sempre.ipc.codec import FrameEncoder
from sempre.ipc.config import EngineConfig, with_weights
from sempre.ipc.endpoint import PrivateDirectory
from sempre.ipc.error_info import again
from sempre.ipc.errors import (
    CoordinatorDied,
    EngineDeadError,
    InvarianceError,
    ProtocolError,
    SeedMismatch,
    SempreError,
    StartupError,
)
from sempre.ipc.liveness import starting_timeout_s
from sempre.ipc.messages import (
    PROTOCOL_VERSION,
    ClientCommand,
    ClientEvent,
    ClientHello,
    EngineNotice,
    EngineReady,
    FramesRead,
    Heartbeat,
    ShutdownEngine,
    StartupProgress,
    UpdateWeights,
    UpdateWeightsReply,
    WorkerStateChanged,
)

logger = logging.getLogger(__name__)

# the coordinator itself enforces startup_timeout_s for each worker
_STARTUP_MARGIN_S = 30.0
# the longest wait without checking the coordinator, if its end does not wake us up
LOOK_S = 0.25
_LAST_FRAMES_S = 0.02
# by then killed workers have freed their memory
_GONE_S = 10.0
_GONE_POLL_S = 0.01
# no further restart after these errors of a successor: the bits would not be the same
_FINAL = (SeedMismatch, InvarianceError)

Channel = TypeVar("Channel", bound=PeerBase[ClientEvent])


@dataclass
class _Link(Generic[Channel]):
    """The current engine; replaced when the coordinator is restarted."""

    process: EngineProcess
    channel: Channel
    workers: WorkerWatch


class ProcessClientBase(Generic[Channel]):
    """Owns and monitors the coordinator process; subclasses define how to wait for events.

    A coordinator that dies after the start is restarted with its workers, and the unfinished requests continue where
    they were: the receiver only sees a pause. The engine's processes end with `close`, with this object, or with this
    process.
    """

    ready: EngineReady

    def __init__(
        self, config: EngineConfig, options: ProcessOptions, connect: Callable[[str, EngineConfig], Channel]
    ) -> None:
        self._config = config
        self._options = options
        self._connect = connect
        self._directory = options.directory or PrivateDirectory.create()
        try:
            prepare_hosts(config, self._directory)
            process, channel = self._start()
        except BaseException:
            self._directory.remove()
            raise
        self._link = _Link(process, channel, WorkerWatch())
        self._finalizer = weakref.finalize(self, _close, self._link)
        self._pending = PendingRequests()
        self._budget = RestartBudget(config.max_restarts, config.restart_window_s)
        self._encoder = FrameEncoder(config.max_message_bytes)
        self._is_ready = False
        self._outage: str | None = None
        self._gone_by: float | None = None
        self._error: EngineDeadError | None = None

    @property
    def process(self) -> EngineProcess:
        """The coordinator's process."""
        return self._link.process

    @property
    def outage(self) -> str | None:
        """As AsyncEngineClient."""
        return self._outage

    def send(self, command: ClientCommand) -> None:
        self._raise_if_ended()
        if self._outage is None:
            self._link.channel.send(command)
        else:
            # stays pending until the engine is back; commands that cannot be sent are refused now
            self._encoder.encode(command, 1)
        self._pending.sent(command)

    def close(self) -> None:
        if self._error is not None and not self._link.process.is_inherited():
            # it has failed, so no orderly shutdown is needed
            self._link.process.child.kill_group()
        self._finalizer()
        if self._error is None:
            self._error = EngineDeadError("the engine was shut down")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _start(self) -> tuple[EngineProcess, Channel]:
        process = EngineProcess(self._config, self._options, self._directory)
        try:
            channel = self._connect(process.client_address, self._config)
        except BaseException:
            process.bury()
            raise
        self._heartbeats = HeartbeatMonitor(self._config.heartbeat_interval_s)
        self._startup_deadline = time.monotonic() + self._config.startup_timeout_s + _STARTUP_MARGIN_S
        self._saw_end = False
        channel.send(ClientHello(protocol_version=PROTOCOL_VERSION, pid=os.getpid()))
        return process, channel

    def _interpret(self, arrival: ClientEvent) -> ClientEvent | None:
        """An event for the user, or None. Raises the error in the event."""
        self._heartbeats.heard()
        if (sequence := self._link.channel.read_up_to()) is not None:
            self._link.channel.send(FramesRead(sequence=sequence))
        try:
            event = client_event(arrival)
        except ProtocolError:
            raise  # one frame is lost, but the engine still runs
        except CoordinatorDied as error:
            # an error in the coordinator itself: a successor may succeed
            self._lose(error)
            self._raise_if_ended()
            return None
        except SempreError as error:
            if self._outage is not None and not isinstance(error, _FINAL):
                # a process that died while the successor was starting is restarted, too
                self._lose(CoordinatorDied(f"the restarted engine failed: {error}", cause=str(error)))
                self._raise_if_ended()
                return None
            self._error = again(ended_by(error))
            raise
        match event:
            case WorkerStateChanged():
                self._follow(event)
                return None
            case StartupProgress() | EngineReady() if self._outage is not None:
                if isinstance(event, EngineReady):
                    self._resume(event)
                return None
            case None:
                return None
        if isinstance(event, UpdateWeightsReply) and event.error is None:
            self._change_weights(event)
        self._pending.received(event)
        return event

    def _change_weights(self, reply: UpdateWeightsReply) -> None:
        """A successor begins with the new weights."""
        command = self._pending.call_of(reply)
        if isinstance(command, UpdateWeights):
            self._config = with_weights(self._config, command.path)
            self.ready = replace(self.ready, fingerprint=reply.fingerprint)

    def _follow(self, change: WorkerStateChanged) -> None:
        rank, pid = change.rank, change.pid
        if change.error is not None:
            logger.warning("%s: %s; worker %d is being restarted", change.error.type, change.error.message, rank)
        else:
            logger.warning("worker %d (pid %d) is ready again", rank, pid)
        if rank < self._config.ranks_per_node:
            self._link.workers.follow({rank: pid})
        pids = [*self.ready.worker_pids]
        pids[rank] = pid
        self.ready = replace(self.ready, worker_pids=pids)

    def _look_after(self) -> None:
        """Call this when nothing is left to read: detects that the coordinator has ended or does not answer, and drives
        a restart. Raises EngineDeadError if there is none."""
        if self._gone_by is not None:
            self._start_successor(self._gone_by)
            return
        process = self._link.process
        limit_s = self._config.heartbeat_timeout_s
        silence_s = self._heartbeats.silence_s(limit_s if self._is_ready else starting_timeout_s(limit_s))
        if process.child.ended():
            if self._saw_end:
                self._lose(process.death())
            else:
                # its last frames may still be in transit: read once more
                self._saw_end = True
                time.sleep(_LAST_FRAMES_S)
        elif silence_s is not None:
            self._lose(process.death(f"no heartbeat for {silence_s:.1f} s"))
        elif self._outage is not None and time.monotonic() > self._startup_deadline:
            limit = f"{self._config.startup_timeout_s:g} s (startup_timeout_s)"
            self._lose(process.death(f"not ready again after {limit}"))
        elif self._heartbeats.is_due():
            self._link.channel.send(Heartbeat())
        self._raise_if_ended()

    def _lose(self, error: CoordinatorDied) -> None:
        """The coordinator has died or failed: restart it, or end the engine."""
        started = self._is_ready or self._outage is not None
        if not started or not self._budget.take():
            text = f"{error}\nthe coordinator: {self._budget.exhausted()}" if started else str(error)
            self._error = CoordinatorDied(text, exitcode=error.exitcode, cause=error.cause)
            return
        logger.warning("%s; it is being restarted; %d sequences wait", error, self._pending.num_unfinished)
        self._retire(str(error).splitlines()[0])

    def _retire(self, reason: str) -> None:
        """End the engine's processes; a successor is started once they are gone."""
        self._is_ready = False
        self._outage = reason
        self._link.channel.close()
        self._link.process.bury()
        self._gone_by = time.monotonic() + _GONE_S
        self._rewatch()

    def _start_successor(self, gone_by: float) -> None:
        """Start a successor once no process of the former engine runs."""
        if ranks := self._link.workers.running():
            if time.monotonic() > gone_by:
                text = f"workers {ranks} still run {_GONE_S:g} s after they were killed with their coordinator"
                self._error = CoordinatorDied(f"{self._outage}; {text}", cause=text)
                self._raise_if_ended()
            return
        self._gone_by = None
        try:
            self._link.process, self._link.channel = self._start()
        except (OSError, ProtocolError) as error:
            self._lose(CoordinatorDied(f"the coordinator cannot be started again: {error}", cause=str(error)))
            self._raise_if_ended()
            return
        self._rewatch()

    def _rewatch(self) -> None:
        """Process and channel have been replaced."""

    def _resume(self, ready: EngineReady) -> None:
        """The successor is ready: it continues the unfinished requests. Raises StartupError if it differs."""
        try:
            check_alike(self.ready, ready)
        except CoordinatorDied as error:
            self._error = error
            raise
        self._take_ready(ready)
        self._outage = None
        for command in self._pending.commands():
            self._link.channel.send(command)
        logger.warning("the engine is ready again; %d sequences continue", self._pending.num_unfinished)

    def _take_ready(self, ready: EngineReady) -> None:
        self.ready = ready
        # a successor keeps the limits that were derived from memory at the first start
        self._config = replace(self._config, max_model_len=ready.max_model_len, max_num_seqs=ready.max_num_seqs)
        self._is_ready = True
        # those of other hosts end with their agents
        self._link.workers.follow(dict(enumerate(ready.worker_pids[: self._config.ranks_per_node])))

    def _raise_if_ended(self) -> None:
        if self._error is not None:
            raise again(self._error)

    def _startup_event(self, event: ClientEvent | None, on_progress: ProgressCallback | None) -> bool:
        """Whether the engine is ready. Raises StartupError if it takes too long."""
        match event:
            case StartupProgress():
                if on_progress is not None:
                    on_progress(event)
            case EngineReady():
                self._take_ready(event)
            case EngineNotice(message=text):
                logger.warning("%s", text)
            case None:
                limit = f"{self._config.startup_timeout_s:g} s (startup_timeout_s)"
                raise StartupError(f"the engine was not ready after {limit}")
            case _:
                raise ProtocolError(f"tag: expected EngineReady, found {type(event).__name__}")
        return self._is_ready

    def _startup_seconds_left(self) -> float:
        return max(0.0, self._startup_deadline - time.monotonic())

    @property
    def _look_s(self) -> float:
        """The longest wait without `_look_after`."""
        return LOOK_S if self._gone_by is None else _GONE_POLL_S


class ProcessClient(ProcessClientBase[PeerChannel[ClientEvent]]):
    """The blocking client."""

    def __init__(self, config: EngineConfig, options: ProcessOptions) -> None:
        super().__init__(config, options, _connect)
        self._rewatch()

    def _rewatch(self) -> None:
        self._poller = zmq.Poller()
        if self._gone_by is not None:
            return
        self._poller.register(self._link.channel.socket, zmq.POLLIN)
        if (descriptor := self.process.child.fileno()) is not None:
            self._poller.register(descriptor, zmq.POLLIN)

    @classmethod
    def launch(
        cls,
        config: EngineConfig,
        *,
        options: ProcessOptions | None = None,
        on_progress: ProgressCallback | None = None,
        meanwhile: Callable[[], None] = lambda: None,
    ) -> ProcessClient:
        """Start an engine, call `meanwhile`, and wait until the engine is ready; on failure, its processes have ended
        before this raises."""
        client = cls(config, options or ProcessOptions())
        try:
            meanwhile()
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
            while self._gone_by is None and (arrival := self._link.channel.receive(0)) is not None:
                event = self._interpret(arrival)
                if event is not None:
                    return event
            self._look_after()
            wait_s = self._look_s if deadline is None else min(self._look_s, deadline - time.monotonic())
            if wait_s <= 0:
                return None
            with allowed():
                self._poller.poll(round(wait_s * 1000))


def _connect(address: str, config: EngineConfig) -> PeerChannel[ClientEvent]:
    return PeerChannel(address, receives=ClientEvent, limit_bytes=config.max_message_bytes)


def _close(link: _Link[Any]) -> None:
    if link.process.is_inherited():
        return
    if not link.process.child.ended():
        link.channel.send(ShutdownEngine())
    link.process.end()
    link.channel.close()
    link.workers.close()
