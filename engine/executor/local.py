"""Worker processes, started with `python -m`: on this host, connected by ZeroMQ through a private folder, and on the
other hosts of an engine, connected by TCP."""

from __future__ import annotations

import logging
import time
from collections import Counter

import zmq
from msgspec.structs import replace

from sempre.engine.executor.base import device_index, draft_ranks, node_of, worker_name
from sempre.engine.executor.nodes import Nodes
from sempre.engine.executor.remote_process import RemoteProcess
from sempre.engine.executor.threads import threads_per_worker
from sempre.engine.executor.worker_peer import WorkerPeer
from sempre.engine.executor.worker_starter import WorkerStarter
from sempre.ipc.channel import HubChannel, check_pid, check_version
from sempre.ipc.config import EngineConfig
from sempre.ipc.endpoint import PrivateDirectory
from sempre.ipc.errors import MessageMalformed, ProtocolError, RanksDiffer, SempreError
from sempre.ipc.liveness import LONGEST_PAUSE_S, starting_timeout_s
from sempre.ipc.messages import (
    ErrorInfo,
    Heartbeat,
    LoadModel,
    Refused,
    ShutdownWorker,
    StartWorker,
    WorkerCommand,
    WorkerEvent,
    WorkerFailed,
    WorkerHealth,
    WorkerHello,
)

logger = logging.getLogger(__name__)

_GOODBYE_S = 2.0
# a worker that announced its failure, or cannot be reached, has this long to exit by itself
_LAST_WORD_S = 1.0
_LAST_FRAMES_S = 0.02


class LocalExecutor:
    """Starts its workers, on construction if all are on this host, watches them, and ends them.

    Workers also end with the process `client_pid`. `connect_address` is where they connect if there is a proxy in
    between; the default is this hub.
    """

    def __init__(
        self,
        config: EngineConfig,
        directory: PrivateDirectory,
        *,
        client_pid: int,
        worker_module: str = "sempre.workers",
        connect_address: str | None = None,
    ) -> None:
        self.world_size = config.world_size
        self._config = config
        self._client_pid = client_pid
        self._hub: HubChannel[WorkerEvent] = HubChannel(
            directory.worker_address, receives=WorkerEvent, limit_bytes=config.max_message_bytes
        )
        self._num_threads = threads_per_worker(config.num_threads, config.ranks_per_node)
        self._address = connect_address or directory.worker_address
        self._directory = directory
        self._worker_module = worker_module
        self._nodes: Nodes | None = None
        self._starter: WorkerStarter | None = None
        self._held: dict[int, LoadModel] = {}
        """until all ranks of the replica can be reached"""
        self._poller: zmq.Poller | None = None
        self._ending = False
        self._checked_at = time.monotonic()
        self._num_restarts: Counter[int] = Counter()
        self._peers: dict[int, WorkerPeer] = {}
        self._by_identity: dict[bytes, WorkerPeer] = {}
        self._departed: set[bytes] = set()
        if config.nnodes == 1:
            self.begin()

    def begin(self) -> None:
        """Start the workers, unless they have been. Raises the errors of a start."""
        if self._starter is not None:
            return
        try:
            if self._config.nnodes > 1:
                self._nodes = Nodes(self._config, self._hub)
            self._starter = WorkerStarter(
                self._directory,
                client_pid=self._client_pid,
                replica_size=self._config.replica_size,
                worker_module=self._worker_module,
                host=self._nodes.host if self._nodes else "",
            )
            for rank in (*range(self.world_size), *draft_ranks(self._config)):
                self._start(rank)
        except BaseException:
            self.shutdown()
            raise
        if self._poller is not None:
            self.register(self._poller)

    def take_notices(self) -> list[str]:
        """Lines for the user, each once."""
        if self._nodes is None:
            return []
        notices, self._nodes.notices = self._nodes.notices, []
        return notices

    def _start(self, rank: int, cause: str = "") -> None:
        """Start a worker; `cause` is why its predecessor ended."""
        config, nodes, start = self._config, self._nodes, self._num_restarts[rank]
        is_here = node_of(config, rank) == 0
        command = StartWorker(
            rank=rank,
            start=start,
            name=worker_name(config, rank),
            device=config.device,
            device_index=device_index(config, rank),
            num_threads=self._num_threads,
            heartbeat_interval_s=config.heartbeat_interval_s,
            max_message_bytes=config.max_message_bytes,
            hub_address=self._address if nodes is None or is_here else nodes.worker_address,
            keys=None if nodes is None else nodes.keys(rank, start),
            shares_memory=rank < self.world_size and config.replica_size > 1,
        )
        assert self._starter is not None
        child = self._starter.start(command) if nodes is None or is_here else nodes.start(command)
        ready_by = time.monotonic() + config.startup_timeout_s
        self._peers[rank] = peer = WorkerPeer(
            rank,
            command.name,
            child,
            ready_by,
            role="target" if rank < self.world_size else "draft",
            num_restarts=start,
            restart_cause=cause,
        )
        self._watch(peer)
        if self._ending:
            # `kill_all` of another thread may have missed it
            peer.child.send_kill()

    def register(self, poller: zmq.Poller) -> None:
        """Make `poller` wake up for frames of the workers and for their exits."""
        self._poller = poller
        poller.register(self._hub.socket, zmq.POLLIN)
        if self._nodes is not None:
            poller.register(self._nodes.socket, zmq.POLLIN)
        for peer in self._peers.values():
            self._watch(peer)

    def _watch(self, peer: WorkerPeer) -> None:
        if self._poller is not None and (descriptor := peer.child.fileno()) is not None:
            self._poller.register(descriptor, zmq.POLLIN)

    def restart(self, rank: int, cause: str) -> None:
        self.abandon(rank)
        self._num_restarts[rank] += 1
        self._start(rank, cause)

    def abandon(self, rank: int) -> None:
        old = self._peers.pop(rank, None)
        self._held.pop(rank, None)
        if old is None:
            return
        if self._poller is not None and (descriptor := old.child.fileno()) is not None:
            self._poller.unregister(descriptor)
        old.child.kill()
        old.child.close()
        if old.identity is not None:
            # frames it sent before its end may still arrive
            self._departed.add(old.identity)
            del self._by_identity[old.identity]
            self._hub.forget(old.identity)

    def health(self) -> list[WorkerHealth]:
        return [peer.health() for _, peer in sorted(self._peers.items())]

    def send(self, rank: int, command: WorkerCommand) -> None:
        if isinstance(command, LoadModel) and self._nodes is not None:
            for each, placed in self._placed(rank, command, self._nodes):
                self._send(self._peers[each], placed)
            return
        self._send(self._peers[rank], command)

    def _placed(self, rank: int, command: LoadModel, nodes: Nodes) -> list[tuple[int, LoadModel]]:
        """What to send now, and to which rank: with the paths of a rank's host, and with the addresses of all ranks of
        its replica once all have said theirs."""
        config, hello = command.config, nodes.hello_of(rank)
        if hello is not None:
            speculative = config.speculative_config
            if speculative is not None:
                speculative = replace(speculative, model_path=hello.draft_model_path)
            path = hello.model_path if config.role == "target" else hello.draft_model_path
            config = replace(config, model_path=path, speculative_config=speculative)
        if config.role != "target" or not self._config.crosses_nodes(rank):
            return [(rank, replace(command, config=config))]
        self._held[rank] = replace(command, config=config)
        size = self._config.replica_size
        ranks = range(rank // size * size, rank // size * size + size)
        if not all(peer in self._held for peer in ranks):
            return []
        addresses = {peer: self._peers[peer].address for peer in ranks}
        return [(peer, replace(self._held.pop(peer), addresses=addresses)) for peer in ranks]

    def _send(self, peer: WorkerPeer, command: WorkerCommand) -> None:
        assert peer.identity is not None, "a worker is sent nothing before its hello"
        try:
            self._hub.send(peer.identity, command)
        except ProtocolError as error:
            raise self._unreachable(peer, error) from error
        peer.sent(command)

    def receive(self) -> tuple[int, WorkerEvent] | None:
        if self._nodes is not None:
            self._nodes.read()
        event = self._next_event()
        if event is None and any(peer.child.exitcode() is not None for peer in self._peers.values()):
            # its last frames may still be in transit
            time.sleep(_LAST_FRAMES_S)
            event = self._next_event()
        if event is None:
            self._check_alive()
        return event

    def _next_event(self) -> tuple[int, WorkerEvent] | None:
        while (arrival := self._hub.receive()) is not None:
            identity, event = arrival
            if identity in self._departed:
                continue
            peer = self._by_identity.get(identity)
            if isinstance(event, ProtocolError):
                assert peer is not None
                raise self._end(peer, f"its link broke: {event}")
            if peer is None:
                welcomed = self._welcome(identity, event)
                if welcomed is not None:
                    return welcomed
            elif self._accept(peer, identity, event):
                return peer.rank, event
        return None

    def blame(self, rank: int, error: ProtocolError | RanksDiffer) -> SempreError:
        cause = str(error) if isinstance(error, RanksDiffer) else f"it broke the protocol: {error}"
        return self._end(self._peers[rank], cause)

    def kill_all(self) -> None:
        """Send SIGKILL without waiting; callable from any thread."""
        self._ending = True
        for peer in list(self._peers.values()):
            peer.child.send_kill()

    def shutdown(self, failure: ErrorInfo | None = None) -> None:
        """`failure`: why the engine ends, if it has failed, for the agents of other hosts."""
        for peer in self._peers.values():
            if peer.identity is not None and peer.child.exitcode() is None:
                try:
                    self._hub.send(peer.identity, ShutdownWorker())
                except ProtocolError as error:
                    logger.debug("%s", error)
        deadline = time.monotonic() + _GOODBYE_S
        for peer in self._peers.values():
            # an unconnected worker has nothing to finish
            patience = deadline - time.monotonic() if peer.identity is not None else 0.0
            if peer.child.wait(max(0.0, patience)) is None:
                peer.child.kill()
            peer.child.close()
        self._hub.close()
        if self._starter is not None:
            self._starter.close()
        if self._nodes is not None:
            nodes, self._nodes = self._nodes, None
            nodes.close(failure)

    def _welcome(self, identity: bytes, event: WorkerEvent) -> tuple[int, WorkerEvent] | None:
        """Accept the peer if `event` is the hello of a worker that we started; otherwise refuse it."""
        try:
            if not isinstance(event, WorkerHello):
                raise MessageMalformed(f"tag: expected WorkerHello, found {type(event).__name__}", field="tag")
            check_version(event)
            peer = self._peers.get(event.rank)
            if peer is None:
                text = f"WorkerHello.rank: expected one of {[*self._peers]}, found {event.rank}"
                raise MessageMalformed(text, field="WorkerHello.rank")
            pid = peer.child.pid
            if isinstance(peer.child, RemoteProcess) and self._nodes is not None:
                pid = self._nodes.pid_of(peer.child)
            check_pid(event, pid)
            if peer.identity is not None:
                raise MessageMalformed(f"WorkerHello.rank: rank {event.rank} is connected", field="WorkerHello.rank")
        except ProtocolError as error:
            self._hub.refuse(identity, error)
            return None
        self._hub.accept(identity)
        peer.identity, peer.address = identity, event.address
        peer.heard(event)
        self._by_identity[identity] = peer
        return event.rank, event

    def _accept(self, peer: WorkerPeer, identity: bytes, event: WorkerEvent) -> bool:
        """Whether the event is for the core. Raises the error of a failed worker."""
        peer.heard(event)
        match event:
            case Heartbeat():
                try:
                    self._hub.send(identity, Heartbeat(steps_done=event.steps_done))
                except ProtocolError as error:
                    raise self._unreachable(peer, error) from error
                return False
            case Refused(error=error):
                raise self._end(peer, f"it refused a frame: {error.message}")
        try:
            peer.check(event)
        except MessageMalformed as error:
            self._hub.refuse(identity, error)
            if peer.is_repetition(event):
                return False
            raise self._end(peer, f"it broke the protocol: {error}") from error
        if isinstance(event, WorkerFailed):
            peer.child.wait(_LAST_WORD_S)
            raise self._end(peer)
        return True

    def _check_alive(self) -> None:
        now = time.monotonic()
        pause_s, self._checked_at = now - self._checked_at, now
        if self._nodes is not None:
            self._nodes.check()
        for peer in self._peers.values():
            if peer.child.exitcode() is not None:
                raise peer.death()
            if pause_s > LONGEST_PAUSE_S:
                peer.last_heard += pause_s
            if not peer.child.pid:
                # its host is awaited
                peer.last_heard = now
            silence_s = now - peer.last_heard
            limit_s = self._config.heartbeat_timeout_s
            if not peer.serving:
                limit_s = starting_timeout_s(limit_s)
            peer.ask_if_silent(silence_s, limit_s, self._config.heartbeat_interval_s)
            if silence_s > limit_s:
                raise self._end(peer, f"no heartbeat for {silence_s:.1f} s")
            if not peer.serving and now > peer.ready_by:
                raise self._end(peer, f"not ready after {self._config.startup_timeout_s:g} s (startup_timeout_s)")

    def _unreachable(self, peer: WorkerPeer, error: ProtocolError) -> SempreError:
        """A worker that has just died cannot be reached, and how it died says more."""
        ended = peer.child.wait(_LAST_WORD_S) is not None
        return self._end(peer, None if ended else str(error))

    def _end(self, peer: WorkerPeer, cause: str | None = None) -> SempreError:
        """Make sure that the process is gone; return the error with the cause."""
        peer.child.kill()
        return peer.death(cause)
