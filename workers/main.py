"""The worker process: a socket loop around a worker object.

The loop says hello, then answers each command in order. A heartbeat goes out every interval: from the loop while it
waits, from a second thread while a command computes; the lock decides which of them has the socket.
"""

from __future__ import annotations

import argparse
import faulthandler
import importlib.metadata
import logging
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Sequence
from typing import NoReturn, Protocol

import zmq
from msgspec.structs import astuple

from sempre.ipc.channel import PeerChannel
from sempre.ipc.error_info import describe, restore
from sempre.ipc.errors import MessageMalformed, MessageTooLarge, ProtocolError, RequestError
from sempre.ipc.liveness import (
    collect_garbage_rarely,
    die_with_parent_thread,
    leave_terminal_signals_to_parent,
    watch_grandparent,
    watch_parent,
)
from sempre.ipc.log_lines import set_up_process_log
from sempre.ipc.messages import (
    PROTOCOL_VERSION,
    CallMethod,
    CallMethodReply,
    ExecuteStep,
    Heartbeat,
    LoadModel,
    Message,
    ModelLoaded,
    Refused,
    SampledTokens,
    ShutdownWorker,
    StartServing,
    StepResult,
    WorkerCommand,
    WorkerEvent,
    WorkerFailed,
    WorkerHello,
    WorkerReady,
)
from sempre.ipc.process_facts import main_thread_stack, resident_bytes
from sempre.workers.host_links import HostLinks

logger = logging.getLogger(__name__)

# how often a step on an accelerator is polled while no command arrives
_STEP_POLL_S = 20e-6
_FLUSH_MS = 2000
# a command that takes longer, in heartbeat intervals, has its stack told with every heartbeat
_LAGGING_INTERVALS = 4


class WorkerProtocol(Protocol):
    """What the loop, and the in-process executor, need of a worker."""

    def load_model(self, command: LoadModel) -> ModelLoaded: ...

    def start_serving(self, command: StartServing) -> WorkerReady: ...

    @property
    def steps_in_flight(self) -> int: ...

    def submit(self, command: ExecuteStep) -> None:
        """Queue a step after the running ones; may return before it is done."""

    def step_done(self) -> bool:
        """Whether the oldest step in flight is done, so that `collect` would not wait."""

    def collect(self) -> StepResult:
        """Wait for that step; its result."""

    def call(self, command: CallMethod) -> CallMethodReply:
        """An error of the called method is part of the reply."""

    def shutdown(self) -> None: ...


def run_command(worker: WorkerProtocol, command: WorkerCommand) -> WorkerEvent:
    """Have `worker` answer one command that is not a step. Raises what the worker raises."""
    match command:
        case CallMethod():
            return worker.call(command)
        case LoadModel():
            return worker.load_model(command)
        case StartServing():
            return worker.start_serving(command)
        case _:
            raise AssertionError(f"{type(command).__name__} has no answer")


def sendable(event: WorkerEvent, error: TypeError | MessageTooLarge) -> WorkerEvent | None:
    """What to send in place of an event that cannot be sent, so that only its requester is affected.

    None when nothing can be left out.
    """
    match event, error:
        case CallMethodReply(rank=rank, call_id=call_id), _:
            return CallMethodReply(rank=rank, call_id=call_id, error=describe(error, rank))
        case StepResult(), MessageTooLarge(limit_bytes=limit_bytes) if event.sampled:
            share = limit_bytes // (2 * len(event.sampled))
            kept = [s if _logprob_bytes(s) <= share else _too_large(s, error) for s in event.sampled]
            return StepResult(rank=event.rank, step_id=event.step_id, sampled=kept, drafts=event.drafts)
        case _:
            return None


def _logprob_bytes(sampled: SampledTokens) -> int:
    rows = [rows for rows in (sampled.logprobs, sampled.prompt_logprobs) if rows is not None]
    return sum(len(packed) for part in rows for packed in astuple(part) if isinstance(packed, bytes))


def _too_large(sampled: SampledTokens, error: MessageTooLarge) -> SampledTokens:
    text = f"the log-probabilities of request {sampled.request_id!r} in one step are too large to be sent: {error}"
    refusal = RequestError(text, parameter="logprobs", request_id=sampled.request_id)
    return SampledTokens(request_id=sampled.request_id, error=describe(refusal))


class WorkerLoop:
    """One worker's conversation with its coordinator."""

    def __init__(
        self,
        rank: int,
        channel: PeerChannel[WorkerCommand],
        make_worker: Callable[[], WorkerProtocol],
        interval_s: float,
        address: str = "",
    ) -> None:
        """`address` is where ranks on other hosts reach the worker."""
        self._rank = rank
        self._address = address
        self._channel = channel
        self._make_worker = make_worker
        self._interval_s = interval_s
        self._worker: WorkerProtocol | None = None
        self._accepts: tuple[type[WorkerCommand], ...] = (LoadModel,)
        self._max_steps_in_flight = 1
        self._steps_done = 0
        self._working_since: float | None = None
        """on the oldest command without an answer (time.monotonic)"""
        self._socket_lock = threading.Lock()
        self._ended = threading.Event()

    def run(self) -> int:
        """The exit code: 0 after ShutdownWorker, 1 after a failure reported to the coordinator."""
        versions = {name: importlib.metadata.version(name) for name in ("numpy", "torch")}
        self._send(
            WorkerHello(
                protocol_version=PROTOCOL_VERSION,
                rank=self._rank,
                pid=os.getpid(),
                versions=versions,
                host=socket.gethostname(),
                address=self._address,
            )
        )
        threading.Thread(target=self._beat, name="heartbeat", daemon=True).start()
        try:
            # imports what a worker needs while the coordinator is still starting
            self._worker = self._make_worker()
            self._serve(self._worker)
        except Exception as error:
            logger.exception("worker %d failed", self._rank)
            self._channel.socket.setsockopt(zmq.LINGER, _FLUSH_MS)
            self._send(WorkerFailed(rank=self._rank, error=describe(error, self._rank)))
            return 1
        finally:
            with self._socket_lock:
                self._ended.set()
            if self._worker is not None:
                self._worker.shutdown()
        return 0

    def _serve(self, worker: WorkerProtocol) -> None:
        while True:
            command = self._next_command(worker)
            match command:
                case None if worker.steps_in_flight:
                    self._collect(worker)
                case None | Heartbeat():
                    continue
                case ExecuteStep() if ExecuteStep in self._accepts:
                    self._begin_work()
                    worker.submit(command)
                    if worker.step_done() or worker.steps_in_flight >= self._max_steps_in_flight:
                        self._collect(worker)
                case ShutdownWorker():
                    return
                case Refused(error=error) if self._accepts == (LoadModel,):
                    raise restore(error) or ProtocolError(f"the coordinator refused this worker: {error.message}")
                case Refused(error=error):
                    # the coordinator decides whether it can continue without that frame
                    logger.warning("the coordinator refused a frame: %s", error.message)
                case _:
                    while worker.steps_in_flight:
                        self._collect(worker)  # answers go out in the order of the commands
                    self._answer(worker, command)

    def _collect(self, worker: WorkerProtocol) -> None:
        result = worker.collect()
        self._steps_done += 1
        self._reply(result)
        self._working_since = time.monotonic() if worker.steps_in_flight else None

    def _next_command(self, worker: WorkerProtocol) -> WorkerCommand | None:
        """The next command; None after the interval, and as soon as the oldest step in flight is done."""
        while worker.steps_in_flight and not worker.step_done():
            if (command := self._receive(0.0)) is not None:
                return command
            time.sleep(_STEP_POLL_S)
        if worker.steps_in_flight:
            return self._receive(0.0)
        command = self._receive(self._interval_s)
        if command is None:
            self._send(self._heartbeat())
        return command

    def _receive(self, timeout_s: float) -> WorkerCommand | None:
        with self._socket_lock:
            try:
                return self._channel.receive(timeout_s)
            except ProtocolError:
                # answered and logged by the channel; the coordinator knows what it sent
                return None

    def _answer(self, worker: WorkerProtocol, command: WorkerCommand) -> None:
        if type(command) not in self._accepts:
            names = " or ".join(kind.__name__ for kind in self._accepts)
            found = type(command).__name__
            self._send(Refused(error=describe(MessageMalformed(f"tag: expected {names}, found {found}", field="tag"))))
            return
        self._begin_work()
        event = run_command(worker, command)
        match event:
            case ModelLoaded(max_steps_in_flight=depth):
                self._accepts = (StartServing,)
                self._max_steps_in_flight = depth
            case WorkerReady():
                self._accepts = (ExecuteStep, CallMethod)
        self._reply(event)
        self._working_since = None

    def _begin_work(self) -> None:
        if self._working_since is None:
            self._working_since = time.monotonic()

    def _reply(self, event: WorkerEvent) -> None:
        try:
            self._send(event)
        except (TypeError, MessageTooLarge) as error:
            substitute = sendable(event, error)
            if substitute is None:
                raise
            self._send(substitute)

    def _heartbeat(self) -> Heartbeat:
        since = self._working_since
        is_lagging = since is not None and time.monotonic() - since > _LAGGING_INTERVALS * self._interval_s
        stack = main_thread_stack() if is_lagging else ""
        return Heartbeat(rank=self._rank, steps_done=self._steps_done, resident_bytes=resident_bytes(), stack=stack)

    def _send(self, message: Message) -> None:
        with self._socket_lock:
            self._channel.send(message)

    def _beat(self) -> None:
        while not self._ended.wait(self._interval_s):
            # not acquired: the loop has the socket and sends heartbeats itself
            if self._socket_lock.acquire(blocking=False):
                try:
                    if not self._ended.is_set():
                        self._channel.send(self._heartbeat())
                finally:
                    self._socket_lock.release()


def main(
    make_worker: Callable[[], WorkerProtocol], argv: Sequence[str] | None = None, hosts: HostLinks | None = None
) -> NoReturn:
    """Entry point of a worker process; the exit code is 0 after ShutdownWorker, else 1. `hosts`: its links to other
    hosts, if it has any."""
    options = parse_options(argv)
    die_with_parent_thread(options.parent_pid)
    faulthandler.enable()
    # a coordinator that no longer hears of this process asks for the stacks of its threads, which go to its log
    faulthandler.register(signal.SIGUSR1)
    collect_garbage_rarely()
    leave_terminal_signals_to_parent()
    set_up_process_log(f"worker {options.rank}")
    watch_parent(options.parent_pid, lambda: None)
    watch_grandparent(options.client_pid, options.parent_pid)
    channel: PeerChannel[WorkerCommand] = PeerChannel(
        options.connect,
        receives=WorkerCommand,
        limit_bytes=options.max_message_bytes,
        keys=None if hosts is None else hosts.hub_keys,
    )
    address = "" if hosts is None else hosts.address
    with channel:
        code = WorkerLoop(options.rank, channel, make_worker, options.heartbeat_interval_s, address).run()
    if hosts is not None:
        hosts.close()
    zmq.Context.instance().term()
    logging.shutdown()
    # nothing is left to save; tearing down torch would only take time
    os._exit(code)


def parse_options(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line of a worker process."""
    parser = argparse.ArgumentParser(prog="python -m sempre.workers", description="A worker; started by a coordinator.")
    parser.add_argument("--connect", required=True, help="address of the coordinator's hub")
    parser.add_argument("--rank", required=True, type=int)
    parser.add_argument("--device", default="cpu", help="where it will be told to compute: auto, cpu or cuda")
    parser.add_argument("--device-index", type=int, default=0, help="of its GPU, if it has one")
    parser.add_argument("--shared-memory", type=int, help="file descriptor, if other ranks share its replica")
    parser.add_argument("--keys-from-stdin", action="store_true", help="read keys for links to other hosts, as JSON")
    parser.add_argument("--listen", default="", help="address of this host for ranks on others")
    parser.add_argument("--parent-pid", required=True, type=int, help="the coordinator, which must not be outlived")
    parser.add_argument("--client-pid", required=True, type=int, help="the user's process, which must not be either")
    parser.add_argument("--heartbeat-interval-s", type=float, default=0.5)
    parser.add_argument("--max-message-bytes", type=int, default=256 * 1024 * 1024)
    return parser.parse_args(argv)
