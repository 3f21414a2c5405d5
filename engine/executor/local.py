"""Worker processes on this machine, started with `python -m`, connected by ZeroMQ through a private folder."""

from __future__ import annotations

import logging
import os
import time
from collections import Counter

import zmq

from sempre.engine.child_process import ChildProcess, child_environment
from sempre.engine.executor.base import device_index, draft_ranks, worker_name
from sempre.engine.executor.replica_memory import ReplicaMemory
from sempre.engine.executor.threads import thread_variables, threads_per_worker
from sempre.engine.executor.worker_peer import WorkerPeer
from sempre.ipc.channel import HubChannel, check_pid, check_version
from sempre.ipc.config import EngineConfig
from sempre.ipc.endpoint import PrivateDirectory
from sempre.ipc.errors import MessageMalformed, ProtocolError, RanksDiffer, SempreError
from sempre.ipc.liveness import LONGEST_PAUSE_S, starting_timeout_s
from sempre.ipc.messages import (
    Heartbeat,
    Refused,
    ShutdownWorker,
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
    """Starts its workers on construction, watches them, and ends them.

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
        threads = threads_per_worker(config.num_threads, self.world_size)
        self._environment = child_environment() | thread_variables(threads)
        self._worker_module = worker_module
        self._address = connect_address or directory.worker_address
        self._directory = directory
        # the ranks of a replica restart together, each as often as the others
        self._memory = ReplicaMemory(config.replica_size)
        self._poller: zmq.Poller | None = None
        self._ending = False
        self._checked_at = time.monotonic()
        self._num_restarts: Counter[int] = Counter()
        self._peers: dict[int, WorkerPeer] = {}
        self._by_identity: dict[bytes, WorkerPeer] = {}
        self._departed: set[bytes] = set()
        try:
            for rank in (*range(self.world_size), *draft_ranks(config)):
                self._start(rank)
        except BaseException:
            self.shutdown()
            raise

    def _start(self, rank: int, cause: str = "") -> None:
        """Start a worker; `cause` is why its predecessor ended."""
        name = worker_name(self._config, rank)
        arguments = ["--connect", self._address, "--rank", str(rank), "--device", self._config.device]
        arguments += ["--device-index", str(device_index(self._config, rank))]
        arguments += ["--parent-pid", str(os.getpid()), "--client-pid", str(self._client_pid)]
        arguments += ["--heartbeat-interval-s", repr(self._config.heartbeat_interval_s)]
        arguments += ["--max-message-bytes", str(self._config.max_message_bytes)]
        log_path = self._directory.log_path(name.replace(" ", "-"))
        shared = None if rank >= self.world_size else self._memory.descriptor(rank, self._num_restarts[rank])
        if shared is not None:
            arguments += ["--shared-memory", str(shared)]
        child = ChildProcess(
            self._worker_module,
            arguments,
            log_path=log_path,
            environment=self._environment,
            pass_fds=[] if shared is None else [shared],
        )
        ready_by = time.monotonic() + self._config.startup_timeout_s
        self._peers[rank] = peer = WorkerPeer(
            rank,
            name,
            child,
            ready_by,
            role="target" if rank < self.world_size else "draft",
            num_restarts=self._num_restarts[rank],
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
        peer = self._peers[rank]
        assert peer.identity is not None, "a worker is sent nothing before its hello"
        try:
            self._hub.send(peer.identity, command)
        except ProtocolError as error:
            raise self._unreachable(peer, error) from error
        peer.sent(command)

    def receive(self) -> tuple[int, WorkerEvent] | None:
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

    def shutdown(self) -> None:
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
        self._memory.close()

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
            check_pid(event, peer.child.pid)
            if peer.identity is not None:
                raise MessageMalformed(f"WorkerHello.rank: rank {event.rank} is connected", field="WorkerHello.rank")
        except ProtocolError as error:
            self._hub.refuse(identity, error)
            return None
        self._hub.accept(identity)
        peer.identity = identity
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
        for peer in self._peers.values():
            if peer.child.exitcode() is not None:
                raise peer.death()
            if pause_s > LONGEST_PAUSE_S:
                peer.last_heard += pause_s
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
