"""The other hosts of an engine, as its coordinator sees them: their agents, and the keys of their workers."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import zmq

from sempre.engine.executor.base import draft_ranks, node_of
from sempre.engine.executor.node_facts import check_node, clock_offset_s, describe_node, own_facts
from sempre.engine.executor.remote_process import RemoteProcess
from sempre.engine.nodes import ip_address_of
from sempre.ipc.channel import HubChannel
from sempre.ipc.config import EngineConfig
from sempre.ipc.curve import HEAD, Gate, node_owner, read_key_file
from sempre.ipc.endpoint import tcp_endpoint
from sempre.ipc.errors import MessageMalformed, ProtocolError, StartupError
from sempre.ipc.key_pairs import KeyPair, WorkerKeys
from sempre.ipc.liveness import LONGEST_PAUSE_S
from sempre.ipc.messages import (
    EndNode,
    ErrorInfo,
    Heartbeat,
    KillWorker,
    NodeCommand,
    NodeEvent,
    NodeHello,
    StartWorker,
    WorkerEvent,
    WorkerExited,
    WorkerStarted,
)

logger = logging.getLogger(__name__)

_NODES, _WORKERS = "nodes", "workers"
_FLUSH_MS = 2000
_PID_S = 5.0


@dataclass
class _Node:
    number: int
    hello: NodeHello | None = None
    """of the agent that is connected, if any"""
    identity: bytes = b""
    last_heard: float = 0.0
    queued: list[StartWorker] = field(default_factory=list)
    """until an agent is connected"""
    processes: dict[int, RemoteProcess] = field(default_factory=dict)
    """the last start of each rank"""


class Nodes:
    """Hosts 1 and up. `hub` gets an address that their workers can reach."""

    def __init__(self, config: EngineConfig, hub: HubChannel[WorkerEvent]) -> None:
        """Raises ConfigError, and ProtocolError where the port is in use."""
        assert config.node_key_file is not None
        secret = read_key_file(Path(config.node_key_file))
        self._config = config
        self._own = KeyPair.derived(secret, HEAD)
        self.host = ip_address_of(config.master_addr)
        self._facts = own_facts(self.host)
        self.notices = [describe_node(0, config, self._facts)]
        """lines for the user"""
        self._gate = Gate()
        for number in range(1, config.nnodes):
            self._gate.allow(_NODES, KeyPair.derived(secret, node_owner(number)).public)
        try:
            self._channel: HubChannel[NodeEvent] = HubChannel(
                tcp_endpoint(self.host, config.master_port),
                receives=NodeEvent,
                limit_bytes=config.max_message_bytes,
                secure=partial(self._gate.secure, domain=_NODES, own=self._own),
            )
            secure = partial(self._gate.secure, domain=_WORKERS, own=self._own)
            self.worker_address = hub.bind_also(tcp_endpoint(self.host, "*"), secure)
        except BaseException:
            self._gate.close()
            raise
        self._deadline = time.monotonic() + config.startup_timeout_s
        self._checked_at = time.monotonic()
        self._nodes = [_Node(number) for number in range(1, config.nnodes)]
        self._by_identity: dict[bytes, _Node] = {}
        self._pairs: dict[tuple[int, int], dict[int, KeyPair]] = {}
        """by replica, or draft worker, and number of its start: those of its ranks"""

    @property
    def socket(self) -> zmq.Socket[bytes]:
        """Readable when there is something to `read`."""
        return self._channel.socket

    def keys(self, rank: int, start: int) -> WorkerKeys | None:
        """What a worker needs for links between hosts; None: it has none."""
        crosses = rank < self._config.world_size and self._config.crosses_nodes(rank)
        is_remote = node_of(self._config, rank) != 0
        if not crosses and not is_remote:
            return None
        pairs = self._pairs_of(rank, start)
        peers = {peer: pair.public for peer, pair in pairs.items() if peer != rank} if crosses else {}
        return WorkerKeys(own=pairs[rank], hub=self._own.public if is_remote else "", peers=peers)

    def _pairs_of(self, rank: int, start: int) -> dict[int, KeyPair]:
        """The ranks of a replica start together, each as often as the others."""
        ranks = range(rank, rank + 1)
        if rank not in draft_ranks(self._config):
            size = self._config.replica_size
            ranks = range(rank // size * size, rank // size * size + size)
        known = self._pairs.get((ranks.start, start))
        if known is None:
            for pair in self._pairs.pop((ranks.start, start - 1), {}).values():
                self._gate.forbid(_WORKERS, pair.public)
            known = self._pairs[ranks.start, start] = {peer: KeyPair.new() for peer in ranks}
            for pair in known.values():
                self._gate.allow(_WORKERS, pair.public)
        return known

    def start(self, command: StartWorker) -> RemoteProcess:
        """On the rank's host, as soon as its agent is connected."""
        node = self._nodes[node_of(self._config, command.rank) - 1]
        node.processes[command.rank] = process = RemoteProcess(self, node.number, command)
        node.queued = [queued for queued in node.queued if queued.rank != command.rank]
        if node.hello is None or not self._tell(node, command):
            node.queued.append(command)
        return process

    def kill(self, node: int, command: StartWorker) -> bool:
        """See `NodeLink`."""
        found = self._nodes[node - 1]
        found.queued = [queued for queued in found.queued if queued.rank != command.rank]
        return found.hello is not None and self._tell(found, KillWorker(rank=command.rank, start=command.start))

    def hello_of(self, rank: int) -> NodeHello | None:
        """Of the host of a rank; None for this host."""
        number = node_of(self._config, rank)
        return self._nodes[number - 1].hello if number else None

    def pid_of(self, process: RemoteProcess) -> int:
        """Its agent tells it at about the time of the worker's hello."""
        deadline = time.monotonic() + _PID_S
        while not process.pid and process.end is None and time.monotonic() < deadline:
            self.read(0.01)
        return process.pid

    def read(self, wait_s: float = 0.0) -> None:
        """See `NodeLink`. Raises StartupError for a host that cannot take part, while the engine starts."""
        while (arrival := self._channel.receive(wait_s)) is not None:
            wait_s = 0.0
            identity, event = arrival
            node = self._by_identity.get(identity)
            if isinstance(event, ProtocolError):
                assert node is not None
                self._lose(node, f"its link broke: {event}")
            elif node is None:
                self._welcome(identity, event)
            else:
                self._take(node, event)

    def _take(self, node: _Node, event: NodeEvent) -> None:
        node.last_heard = time.monotonic()
        match event:
            case Heartbeat():
                self._tell(node, Heartbeat())
            case WorkerStarted(rank=rank, start=start, pid=pid) if (process := _process(node, rank, start)) is not None:
                process.pid = pid
            case WorkerExited(rank=rank, start=start) if (process := _process(node, rank, start)) is not None:
                process.end = event

    def _welcome(self, identity: bytes, event: NodeEvent) -> None:
        try:
            if not isinstance(event, NodeHello):
                raise MessageMalformed(f"tag: expected NodeHello, found {type(event).__name__}", field="tag")
            check_node(event, self._config, self._facts)
            node = self._nodes[event.node_rank - 1]
            # a former agent of this host may be gone without a word
            if node.hello is not None and self._tell(node, Heartbeat()):
                former = f"{node.hello.facts.host}, pid {node.hello.pid}"
                text = f"NodeHello.node_rank: node {node.number} has joined already, from {former}"
                raise MessageMalformed(text, field="NodeHello.node_rank")
        except ProtocolError as error:
            self._channel.refuse(identity, error)
            return
        except StartupError as error:
            self._channel.refuse(identity, ProtocolError(str(error)))
            if any(node.hello is None and not node.last_heard for node in self._nodes):
                raise
            return
        self._channel.accept(identity)
        self._by_identity[identity] = node
        node.identity, node.hello, node.last_heard = identity, event, time.monotonic()
        self.notices.append(describe_node(node.number, self._config, event.facts, clock_offset_s(event.facts)))
        queued, node.queued = node.queued, []
        self._tell(node, Heartbeat())
        for command in queued:
            self._tell(node, command)

    def check(self) -> None:
        """Notice hosts that are silent. Raises StartupError for those that have never come."""
        now = time.monotonic()
        pause_s, self._checked_at = now - self._checked_at, now
        absent = [node.number for node in self._nodes if not node.last_heard]
        if absent and now > self._deadline:
            names = " and ".join(f"node {number}" for number in absent)
            raise StartupError(
                f"{names} of {self._config.nnodes}: not connected to {self._channel.address} within"
                f" {self._config.startup_timeout_s:g} s (startup_timeout_s). Run `sempre serve … --headless --nnodes"
                f" {self._config.nnodes} --node-rank {absent[0]} --master-addr {self._config.master_addr} --master-port"
                f" {self._config.master_port}` there, with the same node_key_file.",
                cause="missing",
            )
        for node in self._nodes:
            if node.hello is None:
                continue
            if pause_s > LONGEST_PAUSE_S:
                node.last_heard += pause_s
            if now - node.last_heard > self._config.heartbeat_timeout_s:
                self._lose(node, f"no heartbeat for {now - node.last_heard:.1f} s")

    def close(self, error: ErrorInfo | None) -> None:
        """End the hosts' agents, with an error if the engine has failed."""
        for node in self._nodes:
            if node.hello is not None:
                self._tell(node, EndNode(error=error))
        self._channel.socket.setsockopt(zmq.LINGER, _FLUSH_MS)
        self._channel.close()
        self._gate.close()

    def _tell(self, node: _Node, command: NodeCommand) -> bool:
        try:
            self._channel.send(node.identity, command)
        except ProtocolError as error:
            self._lose(node, str(error))
            return False
        return True

    def _lose(self, node: _Node, cause: str) -> None:
        """Its agent ends its workers when it notices, and may come back."""
        if node.hello is None:
            return
        name = f"node {node.number} ({node.hello.facts.host}, {node.hello.facts.address})"
        logger.warning("%s is lost: %s", name, cause)
        self.notices.append(f"{name} is lost: {cause}")
        del self._by_identity[node.identity]
        self._channel.forget(node.identity)
        node.hello = None
        for process in node.processes.values():
            if process.end is None and process.command not in node.queued:
                process.lose(f"{name} is lost: {cause}")


def _process(node: _Node, rank: int, start: int) -> RemoteProcess | None:
    process = node.processes.get(rank)
    return process if process is not None and process.command.start == start else None
