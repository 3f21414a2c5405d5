"""The agent of a host that only has workers: it starts them for the coordinator of another host, and watches them.

    connecting ── host 0 answers ── serving ── EndNode ── ended
        ^                              │
        └──── the link is lost: all workers are killed

An agent that was accepted once waits for `heartbeat_timeout_s` for its coordinator's successor; before that, for
`startup_timeout_s`.
"""

from __future__ import annotations

import logging
import os
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import zmq
from zmq.utils.monitor import recv_monitor_message

from sempre.engine.child_process import ChildProcess
from sempre.engine.client.watch import HeartbeatMonitor
from sempre.engine.executor.node_facts import describe_node, own_facts, own_hello
from sempre.engine.executor.worker_starter import WorkerStarter
from sempre.engine.nodes import ip_address_of, own_address
from sempre.ipc.channel import PeerChannel
from sempre.ipc.config import EngineConfig
from sempre.ipc.curve import HEAD, ClientKeys, node_owner, read_key_file
from sempre.ipc.endpoint import PrivateDirectory, tcp_endpoint
from sempre.ipc.error_info import restore
from sempre.ipc.errors import ConfigError, SempreError, StartupError
from sempre.ipc.key_pairs import KeyPair
from sempre.ipc.messages import (
    EndNode,
    Heartbeat,
    KillWorker,
    NodeCommand,
    Refused,
    StartWorker,
    WorkerExited,
    WorkerStarted,
)

logger = logging.getLogger(__name__)

_PAUSE_S = 0.1
_LOOK_MS = 200
_PROBE_S = 2.0
# a wrong key looks like a link that breaks again and again
_KEY_REFUSED_S = 5.0
_FLUSH_MS = 2000
_BREAKS = (
    zmq.EVENT_DISCONNECTED,
    zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL,
    zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL,
    zmq.EVENT_HANDSHAKE_FAILED_AUTH,
)

Value = TypeVar("Value")


class NodeAgent:
    """Runs until the engine ends, in the thread that has made it."""

    def __init__(self, config: EngineConfig, *, worker_module: str = "sempre.workers") -> None:
        assert config.node_key_file is not None
        self._config = config
        self._worker_module = worker_module
        self._key_file = Path(config.node_key_file)
        self._name = f"node {config.node_rank}"
        self._workers: dict[int, tuple[int, ChildProcess]] = {}
        """by rank: the number of its start, and the process"""

    def run(self) -> None:
        """Return when the engine has ended. Raises StartupError, naming the address and port tried, if host 0 cannot be
        reached, and the errors of an engine that has failed."""
        deadline = time.monotonic() + self._config.startup_timeout_s
        secret = self._await(lambda: read_key_file(self._key_file), FileNotFoundError, deadline)
        address = self._await(lambda: ip_address_of(self._config.master_addr), ConfigError, deadline)
        own = own_address(address)
        directory = PrivateDirectory.create()
        starter = WorkerStarter(
            directory,
            client_pid=os.getpid(),
            replica_size=self._config.replica_size,
            worker_module=self._worker_module,
            host=own,
        )
        keys = ClientKeys(
            KeyPair.derived(secret, node_owner(self._config.node_rank)), KeyPair.derived(secret, HEAD).public
        )
        try:
            while _Conversation(self, address, keys, own, starter).run(deadline):
                logger.warning("%s: the link to host 0 is lost; its workers have ended", self._name)
                deadline = time.monotonic() + self._config.heartbeat_timeout_s
        finally:
            self.kill_workers()
            starter.close()
            directory.remove()

    def kill_workers(self) -> None:
        """Return when they are gone."""
        for _, child in self._workers.values():
            child.kill()
            child.close()
        self._workers.clear()

    @property
    def workers(self) -> dict[int, tuple[int, ChildProcess]]:
        """Those that run, by rank, each with the number of its start."""
        return self._workers

    @property
    def config(self) -> EngineConfig:
        """This host's."""
        return self._config

    def _await(self, look: Callable[[], Value], absent: type[Exception], deadline: float) -> Value:
        while True:
            try:
                return look()
            except absent as error:
                if time.monotonic() > deadline:
                    raise StartupError(
                        f"{self._name}: {error} within {self._config.startup_timeout_s:g} s (startup_timeout_s)",
                        cause=str(error),
                    ) from error
                time.sleep(_PAUSE_S)


class _Conversation:
    """One link to host 0, from its first attempt to its end."""

    def __init__(
        self, agent: NodeAgent, address: str, keys: ClientKeys, own_address: str, starter: WorkerStarter
    ) -> None:
        self._agent = agent
        self._config = agent.config
        self._name = f"node {agent.config.node_rank}"
        self._host = address
        self._starter = starter
        self._own_address = own_address
        self._channel: PeerChannel[NodeCommand] = PeerChannel(
            tcp_endpoint(address, agent.config.master_port),
            receives=NodeCommand,
            limit_bytes=agent.config.max_message_bytes,
            keys=keys,
        )
        self._monitor = self._channel.socket.get_monitor_socket()
        self._poller = zmq.Poller()
        self._poller.register(self._channel.socket, zmq.POLLIN)
        self._poller.register(self._monitor, zmq.POLLIN)
        self._heartbeats = HeartbeatMonitor(agent.config.heartbeat_interval_s)
        self._broken_since: float | None = None
        """since when connections have been made and closed again"""
        self._is_secure = False
        self._is_accepted = False
        self._is_lost = False

    def run(self, deadline: float) -> bool:
        """Whether the link was lost, so that another one is to be made. Raises StartupError."""
        try:
            while True:
                self._poller.poll(min(_LOOK_MS, round(1000 * self._config.heartbeat_interval_s)))
                self._read_monitor()
                while (command := self._channel.receive(0.0)) is not None:
                    if isinstance(command, EndNode):
                        self._end(command)
                        return False
                    self._obey(command)
                self._report_exits()
                if not self._is_accepted:
                    self._check_connecting(deadline)
                elif self._is_lost or self._heartbeats.silence_s(self._config.heartbeat_timeout_s) is not None:
                    return True
                elif self._heartbeats.is_due():
                    self._channel.send(Heartbeat(rank=self._config.node_rank))
        finally:
            for _, child in self._agent.workers.values():
                child.kill()
            # so that host 0 need not wait for heartbeats
            self._channel.socket.setsockopt(zmq.LINGER, _FLUSH_MS if self._is_accepted and not self._is_lost else 0)
            self._report_exits()
            self._channel.socket.disable_monitor()
            self._channel.close()

    def _read_monitor(self) -> None:
        while self._monitor.poll(0):
            event = recv_monitor_message(self._monitor)["event"]
            if event == zmq.EVENT_HANDSHAKE_SUCCEEDED:
                self._is_secure = True
                if not self._is_accepted:
                    # not before: its clock would be that of when it began to wait
                    self._channel.send(own_hello(self._config, self._own_address))
            elif event in _BREAKS:
                self._is_lost = self._is_accepted
                if not self._is_secure:
                    self._broken_since = self._broken_since or time.monotonic()

    def _obey(self, command: NodeCommand) -> None:
        self._heartbeats.heard()
        if not self._is_accepted and not isinstance(command, Refused):
            self._is_accepted = True
            logger.warning("%s", describe_node(self._config.node_rank, self._config, own_facts(self._own_address)))
        match command:
            case StartWorker():
                self._start(command)
            case KillWorker(rank=rank, start=start) if self._agent.workers.get(rank, (None,))[0] == start:
                self._agent.workers[rank][1].kill()
            case Refused(error=error):
                text = f"{self._name}: host 0 at {self._channel.address} refused: {error.message}"
                raise StartupError(text, cause=error.message)

    def _start(self, command: StartWorker) -> None:
        rank, start = command.rank, command.start
        former = self._agent.workers.pop(rank, None)
        if former is not None:
            former[1].kill()
            former[1].close()
        try:
            child = self._starter.start(command)
        except OSError as error:
            self._channel.send(WorkerExited(rank=rank, start=start, ending=f"cannot be started: {error}"))
            return
        self._agent.workers[rank] = (start, child)
        self._channel.send(WorkerStarted(rank=rank, start=start, pid=child.pid))
        if (descriptor := child.fileno()) is not None:
            self._poller.register(descriptor, zmq.POLLIN)

    def _report_exits(self) -> None:
        for rank, (start, child) in list(self._agent.workers.items()):
            code = child.exitcode()
            if code is None:
                continue
            ending = child.describe_exit()
            event = WorkerExited(rank=rank, start=start, exitcode=code, ending=ending, log_tail=child.log_tail())
            self._channel.send(event)
            if (descriptor := child.fileno()) is not None:
                self._poller.unregister(descriptor)
            child.close()
            del self._agent.workers[rank]

    def _end(self, command: EndNode) -> None:
        """Raises the error of an engine that has failed."""
        if command.error is not None:
            error: SempreError | None = restore(command.error)
            text = f"{command.error.type}: {command.error.message}"
            raise error or StartupError(f"{self._name}: the engine has failed: {text}", cause=text)

    def _check_connecting(self, deadline: float) -> None:
        now = time.monotonic()
        address = f"{self._channel.address} (master_addr {self._config.master_addr})"
        if self._broken_since is not None and now - self._broken_since > _KEY_REFUSED_S:
            raise StartupError(
                f"{self._name}: host 0 at {address} does not accept this host's key: {self._config.node_key_file}"
                " (node_key_file) must be the same on all hosts",
                cause="key",
            )
        if now > deadline:
            raise StartupError(
                f"{self._name}: host 0 cannot be reached at {address}: {self._probe()} (waited for"
                f" {self._config.startup_timeout_s:g} s, startup_timeout_s)",
                cause="unreachable",
            )

    def _probe(self) -> str:
        """Why the port does not answer."""
        try:
            socket.create_connection((self._host, self._config.master_port), _PROBE_S).close()
        except OSError as error:
            return str(error.strerror or error)
        return "it takes connections but does not answer"
