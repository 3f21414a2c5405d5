"""Synchronous communication of a front end with its engine."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from itertools import count
from typing import TypeVar

from sempre.engine.client import EngineClient
from sempre.engine.client.interrupts import held
from sempre.engine.client.pending_requests import frames
from sempre.engine.frontend.output_processor import OutputProcessor, RequestState
from sempre.engine.frontend.request_builder import PreparedRequest
from sempre.ipc.error_info import restore
from sempre.ipc.errors import EngineDeadError, ProtocolError, RequestError
from sempre.ipc.messages import (
    AbortRequests,
    AddRequests,
    CallWorkersReply,
    ClientCommand,
    ClientEvent,
    EngineNotice,
    GetSleepState,
    HealthReply,
    MetricsReply,
    OutputsReady,
    Refused,
    RequestSpec,
    ResetPrefixCacheReply,
    SleepEngine,
    SleepReply,
    SleepTag,
    UpdateWeights,
    UpdateWeightsReply,
    WakeEngine,
)

logger = logging.getLogger(__name__)

Reply = TypeVar(
    "Reply", CallWorkersReply, HealthReply, MetricsReply, ResetPrefixCacheReply, SleepReply, UpdateWeightsReply
)
REPLIES = (CallWorkersReply, HealthReply, MetricsReply, ResetPrefixCacheReply, SleepReply, UpdateWeightsReply)
SleepCommand = SleepEngine | WakeEngine | GetSleepState


class Session:
    """Sends requests and routes events: outputs to the processor, replies to the caller."""

    def __init__(self, client: EngineClient, processor: OutputProcessor) -> None:
        self._client = client
        self._processor = processor
        self._call_ids = count()
        self._withdrawn: list[RequestState] = []
        self._asleep: list[SleepTag] = []
        # Reentrant: a stream may be read inside any other call.
        self._in_use = threading.RLock()

    @contextmanager
    def exclusive(self) -> Iterator[None]:
        """Context manager that admits one thread. Raises RuntimeError while another thread is in it.

        Waiting instead would hide that the order of equal requests, and so which of them gets which seed, depends on
        timing.
        """
        if not self._in_use.acquire(blocking=False):
            raise RuntimeError(
                "another thread is using this LLM, and only one thread may use it at a time: give all prompts to one "
                "call, make one LLM per thread, or use AsyncLLM."
            )
        try:
            yield
        finally:
            self._in_use.release()

    def submit(self, requests: Sequence[PreparedRequest]) -> list[RequestState]:
        """Track and send requests. Raises RequestError for an id in use."""
        states = [self._processor.add(request) for request in requests]
        for frame in frames_of(requests):
            with held():
                self._client.send(AddRequests(requests=frame))
        return states

    def receive(self) -> list[RequestState]:
        """Wait for one event; return the updated requests. Raises EngineDeadError, ProtocolError; RequestError if the
        engine sleeps, since only the waiting thread could wake it up."""
        if self._asleep:
            raise RequestError(f"the engine sleeps ({', '.join(self._asleep)}); call wake_up() first.")
        with held():
            event = self._client.receive()
            if event is None:
                text = f"the engine is idle, but {self._processor.num_unfinished} requests are unfinished"
                raise EngineDeadError(text)
            return self._take(event)

    def ask(self, command: ClientCommand, call_id: int, kind: type[Reply], timeout_s: float | None = None) -> Reply:
        """Send `command` and wait for its reply; outputs that arrive meanwhile are kept. Raises TimeoutError."""
        with self.exclusive(), held():
            return self._ask(command, call_id, kind, timeout_s)

    def next_call_id(self) -> int:
        """Return the number for a new call."""
        return next(self._call_ids)

    def drop(self, requests: Iterable[PreparedRequest], because: BaseException) -> None:
        """Forget the unfinished requests and, unless the engine died, abort them."""
        with held():
            sequence_ids = self._processor.forget(request.request_id for request in requests)
            if sequence_ids and not isinstance(because, EngineDeadError):
                with suppress(EngineDeadError):  # a stream that is dropped after the end has nothing to abort
                    self._client.send(AbortRequests(request_ids=sequence_ids))

    def update_weights(self, path: str, *, restarts: bool) -> UpdateWeightsReply:
        """Give the workers these weights, once the unfinished requests have ended or, if it `restarts` them, at once;
        `begin_again` must follow then."""
        command = UpdateWeights(call_id=self.next_call_id(), path=path)
        with self.exclusive(), held():
            if restarts:
                self._withdrawn, sequence_ids = self._processor.withdraw()
                if sequence_ids:
                    self._client.send(AbortRequests(request_ids=sequence_ids))
            return self._ask(command, command.call_id, UpdateWeightsReply, None)

    def change_sleep(self, make_command: Callable[[int], SleepCommand]) -> list[SleepTag]:
        """Have the engine fall asleep or wake up; return what it does without now. Raises the error of workers."""
        call_id = self.next_call_id()
        self._asleep = tags_asleep(self.ask(make_command(call_id), call_id, SleepReply))
        return self._asleep

    def begin_again(self) -> None:
        """Send the requests again that an update of weights restarts."""
        withdrawn, self._withdrawn = self._withdrawn, []
        self._processor.begin_again(withdrawn)
        for frame in frames_of(state.request for state in withdrawn):
            with held():
                self._client.send(AddRequests(requests=frame))

    def _ask(self, command: ClientCommand, call_id: int, kind: type[Reply], timeout_s: float | None) -> Reply:
        deadline = Deadline(timeout_s)
        self._client.send(command)
        while True:
            remaining_s = deadline.remaining_s(f"no answer to {type(command).__name__}")
            event = self._client.receive(remaining_s)
            # A reply with another number belongs to a call that was interrupted.
            if isinstance(event, kind) and event.call_id == call_id:
                return event
            if event is not None:
                self._take(event)
            elif remaining_s is None:
                raise EngineDeadError(f"the engine is idle and has not answered {type(command).__name__}")

    def _take(self, event: ClientEvent) -> list[RequestState]:
        if isinstance(event, OutputsReady):
            processed = self._processor.process(event.outputs)
            if processed.stopped_ids:
                self._client.send(AbortRequests(request_ids=processed.stopped_ids, finish_reason="stop"))
            return processed.updated
        check_refused(event)
        return []


def frames_of(requests: Iterable[PreparedRequest]) -> Iterator[list[RequestSpec]]:
    """Yield the sequences of all requests in order, in lists that fit into a frame."""
    return frames(spec for request in requests for spec in request.sequences)


def tags_asleep(reply: SleepReply) -> list[SleepTag]:
    """Return what a sleeping engine does without. Raises the error of a change that was refused or has failed."""
    if reply.error is None:
        return reply.tags
    raise restore(reply.error) or RequestError(f"{reply.error.type}: {reply.error.message}")


def check_refused(event: ClientEvent) -> None:
    """Log a notice; raise the error if the coordinator refused one of our frames."""
    if isinstance(event, EngineNotice):
        logger.warning("%s", event.message)
    if isinstance(event, Refused):
        raise restore(event.error) or ProtocolError(f"{event.error.type}: {event.error.message}")


class Deadline:
    """`timeout_s` seconds from now; None is never."""

    def __init__(self, timeout_s: float | None) -> None:
        self._timeout_s = timeout_s
        self._end = None if timeout_s is None else time.monotonic() + timeout_s

    def remaining_s(self, what: str) -> float | None:
        """Return the seconds left, None without a deadline. Raises TimeoutError with `what` after the deadline."""
        if self._end is None:
            return None
        left = self._end - time.monotonic()
        if left <= 0.0:
            raise TimeoutError(f"{what} within {self._timeout_s} s")
        return left
