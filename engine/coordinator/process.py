"""The coordinator process: `python -m sempre.engine.coordinator`, with CoordinatorArguments as JSON on stdin.

One thread, one poll loop: commands of the client, events of the workers, exits of worker processes. It starts the
workers first, and imports no torch.
"""

from __future__ import annotations

import faulthandler
import logging
import os
import sys
import time
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path

import msgspec
import zmq

from sempre.engine.coordinator.clients import Clients
from sempre.engine.executor.local import LocalExecutor
from sempre.ipc.channel import HubChannel, check_version
from sempre.ipc.config import EngineConfig
from sempre.ipc.endpoint import PrivateDirectory
from sempre.ipc.error_info import describe
from sempre.ipc.errors import MessageMalformed, MessageTooLarge, ProtocolError, WorkerDied
from sempre.ipc.liveness import (
    collect_garbage_rarely,
    leave_terminal_signals_to_parent,
    wake_up_with_parent_thread,
    watch_parent,
)
from sempre.ipc.log_lines import set_up_process_log
from sempre.ipc.messages import (
    AdmitClient,
    CallWorkersReply,
    ClientCommand,
    ClientEvent,
    ClientHello,
    DropClient,
    EngineFailed,
    EngineNotice,
    ErrorInfo,
    FramesRead,
    Heartbeat,
    OutputsReady,
    Refused,
    ShutdownEngine,
)

logger = logging.getLogger(__name__)

_POLL_MS = 200
_FLUSH_MS = 2000
# outputs that the client has not read, beyond which its requests wait; the results of steps in flight come on top
MOST_UNREAD_BYTES = 64 << 20
_HELLO_S = 10.0


class CoordinatorArguments(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`worker_connect` is the address for workers if there is a proxy; None is the coordinator's own hub."""

    config: EngineConfig
    directory: str
    client_pid: int
    worker_module: str = "sempre.workers"
    worker_connect: str | None = None


class Coordinator:
    """Serves its owner, and the clients that this has let in, with the workers of one executor."""

    def __init__(
        self,
        config: EngineConfig,
        executor: LocalExecutor,
        hub: HubChannel[ClientCommand],
        client_pid: int,
    ) -> None:
        # imported here, so that the workers start while the scheduler is imported
        from sempre.engine.coordinator.core import EngineCore
        from sempre.engine.coordinator.recovery import Recovery

        self._hub = hub
        self._clients = Clients(client_pid)
        self._unsent: list[ClientEvent] = []
        self._stopping = False
        self._poller = zmq.Poller()
        self._poller.register(hub.socket, zmq.POLLIN)
        executor.register(self._poller)
        self._executor = executor
        self._core = EngineCore(config, executor)
        self._recovery = Recovery(config, self._core, executor)

    def run(self) -> None:
        """Run until ShutdownEngine. Raises errors that end the engine, which `main` reports."""
        self._executor.begin()
        while not self._stopping:
            deadline = None if self._is_owner_behind() else self._core.next_deadline()
            self._poller.poll(wait_ms(deadline, time.monotonic()))
            try:
                self._serve_client()
                self._serve_workers()
                self.tell(EngineNotice(message=text) for text in self._executor.take_notices())
                self._hold_back()
                if self._is_owner_behind():
                    self._core.rest()
                else:
                    self.tell(self._core.advance())
            except WorkerDied as error:
                self.tell(self._recovery.replace(error))

    def close(self) -> None:
        """Call this at the end, whatever ended it."""
        self._core.close()

    def tell(self, events: Iterable[ClientEvent]) -> None:
        """Send each event to the client that it is for; those for the owner wait until it has said hello."""
        self._unsent += events
        if self._clients.owner is None:
            return
        for event in self._unsent:
            for client, part in self._clients.addressed(event):
                self._tell_one(client, part)
        self._unsent.clear()

    def _tell_one(self, client: bytes, event: ClientEvent) -> None:
        try:
            self._send(client, event)
        except ProtocolError as gone:
            if client == self._clients.owner:
                raise
            # the owner will drop it
            logger.debug("%s", gone)

    def _is_owner_behind(self) -> bool:
        """Whether the owner has left so much unread that no further step should be computed: it is stopped, or does
        something else, and the outputs wait in this process or in its own."""
        owner = self._clients.owner
        return owner is not None and self._is_behind(owner)

    def _is_behind(self, client: bytes) -> bool:
        return self._hub.unread_bytes(client) > MOST_UNREAD_BYTES

    def _hold_back(self) -> None:
        """The requests of another client that is behind wait for it alone."""
        for client in self._clients.others:
            command = self._clients.hold(client) if self._is_behind(client) else self._clients.let_go(client)
            if command is not None:
                self.tell(self._core.handle_command(command))

    def _send(self, client: bytes, event: ClientEvent) -> None:
        try:
            self._hub.send(client, event)
        except MessageTooLarge as error:
            match event:
                case OutputsReady(outputs=[_, _, *_]):
                    for output in event.outputs:
                        self._send(client, OutputsReady(outputs=[output]))
                case CallWorkersReply(call_id=call_id):
                    self._hub.send(client, CallWorkersReply(call_id=call_id, error=describe(error)))
                case _:
                    raise

    def fail(self, error: ErrorInfo) -> None:
        """Tell the client why the engine ends; wait for a client that is still connecting."""
        self._unsent.append(EngineFailed(error=error))
        deadline = time.monotonic() + _HELLO_S
        while self._clients.owner is None and time.monotonic() < deadline:
            self._hub.socket.poll(_POLL_MS)
            self._serve_client()
        try:
            self.tell([])
        except ProtocolError as gone:
            logger.warning("the client is gone: %s", gone)

    def _serve_workers(self) -> None:
        while (events := self._core.next_events()) is not None:
            self.tell(events)

    def _serve_client(self) -> None:
        while (arrival := self._hub.receive()) is not None:
            identity, command = arrival
            if isinstance(command, ProtocolError):
                continue  # the hub has answered; the client knows what it sent
            try:
                self._obey(identity, command)
            except ProtocolError as error:
                self._hub.refuse(identity, error)

    def _obey(self, identity: bytes, command: ClientCommand) -> None:
        if identity not in self._clients:
            self._welcome(identity, command)
            return
        match command:
            case Heartbeat():
                self._tell_one(identity, Heartbeat())
            case FramesRead(sequence=sequence):
                self._hub.has_read(identity, sequence)
            case ShutdownEngine() if identity == self._clients.owner:
                self._stopping = True
            case AdmitClient(pid=pid) if identity == self._clients.owner:
                self._clients.admit(pid)
            case DropClient(pid=pid) if identity == self._clients.owner:
                self._drop(pid)
            case Refused(error=error):
                # the client has raised the error to the user
                logger.warning("the client refused a frame: %s", error.message)
            case _:
                self.tell(self._core.handle_command(self._clients.taken(identity, command)))

    def _drop(self, pid: int) -> None:
        identity, command = self._clients.drop(pid)
        if identity is not None:
            self._hub.forget(identity)
            self._core.handle_command(command)

    def _welcome(self, identity: bytes, command: ClientCommand) -> None:
        if not isinstance(command, ClientHello):
            raise MessageMalformed(f"tag: expected ClientHello, found {type(command).__name__}", field="tag")
        check_version(command)
        self._clients.welcome(identity, command.pid)
        self._hub.accept(identity, counts_unread=True)
        if identity == self._clients.owner:
            self.tell([])
        elif self._core.ready is not None:
            self._tell_one(identity, self._core.ready)


def wait_ms(deadline: float | None, now: float) -> int:
    """How long to wait for messages so that the `deadline` has passed afterwards, in milliseconds."""
    return _POLL_MS if deadline is None else max(0, min(_POLL_MS, 1 + int(1000 * (deadline - now))))


def main() -> int:
    """Entry point. Exit code 0 after ShutdownEngine, 1 after a failure reported to the client."""
    last_acts: list[Callable[[], None]] = []
    wake_up_with_parent_thread()
    watch_parent(os.getppid(), partial(_run_all, last_acts))
    # read one line, not to the end: a process forked by the client also holds the other end of the pipe
    arguments = msgspec.json.decode(sys.stdin.buffer.readline(), type=CoordinatorArguments)
    config = arguments.config
    directory = PrivateDirectory(Path(arguments.directory))
    if os.getppid() != arguments.client_pid:
        directory.remove()
        return 1
    faulthandler.enable()
    collect_garbage_rarely()
    leave_terminal_signals_to_parent()
    set_up_process_log("coordinator")
    hub: HubChannel[ClientCommand] = HubChannel(
        directory.client_address, receives=ClientCommand, limit_bytes=config.max_message_bytes
    )
    executor = LocalExecutor(
        config,
        directory,
        client_pid=arguments.client_pid,
        worker_module=arguments.worker_module,
        connect_address=arguments.worker_connect,
    )
    last_acts += [executor.kill_all, directory.remove]
    with hub:
        code = _serve(config, executor, hub, arguments.client_pid)
    if os.getppid() != arguments.client_pid:
        # the client would have removed it
        directory.remove()
    zmq.Context.instance().term()
    return code


def _run_all(acts: Iterable[Callable[[], None]]) -> None:
    for act in acts:
        act()


def _serve(
    config: EngineConfig,
    executor: LocalExecutor,
    hub: HubChannel[ClientCommand],
    client_pid: int,
) -> int:
    coordinator = Coordinator(config, executor, hub, client_pid)
    failure: ErrorInfo | None = None
    try:
        coordinator.run()
    except Exception as error:
        logger.exception("the engine failed")
        hub.socket.setsockopt(zmq.LINGER, _FLUSH_MS)
        failure = describe(error)
        coordinator.fail(failure)
        return 1
    finally:
        coordinator.close()
        executor.shutdown(failure)
    return 0
