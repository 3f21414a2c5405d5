"""The executor's view of one worker process: its link, its open commands, and its end."""

from __future__ import annotations

import hashlib
import time
from collections import deque

import msgspec

from sempre.engine.executor.remote_process import RemoteProcess, WorkerProcess
from sempre.ipc.error_info import restore
from sempre.ipc.errors import MessageMalformed, SempreError, StartupError, WorkerDied
from sempre.ipc.messages import (
    CallMethod,
    CallMethodReply,
    ErrorInfo,
    ExecuteStep,
    Heartbeat,
    LoadModel,
    ModelLoaded,
    StartServing,
    StepResult,
    WorkerCommand,
    WorkerEvent,
    WorkerFailed,
    WorkerHealth,
    WorkerHello,
    WorkerReady,
    WorkerRole,
    WorkerState,
)
from sempre.ipc.process_facts import process_state

_ANSWERS: dict[type[WorkerCommand], type[WorkerEvent]] = {
    LoadModel: ModelLoaded,
    StartServing: WorkerReady,
    ExecuteStep: StepResult,
    CallMethod: CallMethodReply,
}

# a process that has been silent for this many intervals of heartbeats is asked for its stacks
_SILENT_INTERVALS = 4


class WorkerPeer:
    """Tracks the commands that a worker has yet to answer, oldest first.

    `num_restarts` workers had this rank before; the last of them ended because of `restart_cause`.
    """

    def __init__(
        self,
        rank: int,
        name: str,
        child: WorkerProcess,
        ready_by: float,
        *,
        role: WorkerRole = "target",
        num_restarts: int = 0,
        restart_cause: str = "",
    ) -> None:
        self.rank = rank
        self.name = name
        self.child = child
        self.ready_by = ready_by
        self.role = role
        self.num_restarts = num_restarts
        self.restart_cause = restart_cause
        self.identity: bytes | None = None
        self.address = ""
        """where ranks on other hosts reach it"""
        self.serving = False
        self.last_heard = time.monotonic()
        self._owed: deque[WorkerCommand] = deque()
        self._owed_since = 0.0
        self._host = ""
        self._heartbeat = Heartbeat()
        self._stacks_from: int | None = None
        """where in its log the stacks begin that it was asked for; None: it was not"""
        self._last_step: StepResult | None = None
        self._last_step_at: float | None = None
        self._last_word: ErrorInfo | None = None

    def sent(self, command: WorkerCommand) -> None:
        if type(command) in _ANSWERS:
            if not self._owed:
                self._owed_since = time.monotonic()
            self._owed.append(command)

    def heard(self, event: WorkerEvent) -> None:
        """A frame of the worker has arrived."""
        self.last_heard = time.monotonic()
        self._stacks_from = None
        if isinstance(event, Heartbeat):
            self._heartbeat = event
        if isinstance(event, WorkerHello):
            self._host = event.host

    def ask_if_silent(self, silence_s: float, limit_s: float, interval_s: float) -> None:
        """Have a process write its stacks to its log, once it has been silent for several intervals, or while it starts
        for half of what it may be."""
        # a starting process may import for long
        patience_s = min(limit_s / 2, _SILENT_INTERVALS * interval_s if self.serving else limit_s)
        if self.identity is None or self._stacks_from is not None or silence_s < patience_s:
            return
        self._stacks_from = self.child.log_size()
        self.child.ask_for_stacks()

    def check(self, event: WorkerEvent) -> None:
        """Raise MessageMalformed unless `event` answers the oldest open command."""
        name = type(event).__name__
        if isinstance(event, WorkerHello):
            raise MessageMalformed(f"{name}: rank {self.rank} said hello before", field="tag")
        _expect(f"{name}.rank", self.rank, getattr(event, "rank", self.rank))
        if isinstance(event, WorkerFailed):
            self._last_word = event.error
            return
        owed = self._owed[0] if self._owed else None
        _expect("tag", _ANSWERS[type(owed)].__name__ if owed else "nothing", name)
        match owed, event:
            case ExecuteStep(step_id=expected), StepResult(step_id=found):
                _expect("StepResult.step_id", expected, found)
            case CallMethod(call_id=expected), CallMethodReply(call_id=found):
                _expect("CallMethodReply.call_id", expected, found)
        self._owed.popleft()
        # it can only begin the next one now
        self._owed_since = time.monotonic()
        if isinstance(event, StepResult):
            self._last_step = event
            self._last_step_at = self._owed_since
        if isinstance(event, WorkerReady):
            self.serving = True

    def is_repetition(self, event: WorkerEvent) -> bool:
        """Whether it repeats the answer of a finished step, which is harmless."""
        last = self._last_step
        return isinstance(event, StepResult) and last is not None and event.step_id <= last.step_id

    def health(self) -> WorkerHealth:
        now = time.monotonic()
        if self.serving:
            state: WorkerState = "ready"
        else:
            state = "restarting" if self.num_restarts else "starting"
        in_step = bool(self._owed) and isinstance(self._owed[0], ExecuteStep)
        return WorkerHealth(
            rank=self.rank,
            pid=self.child.pid,
            state=state,
            heartbeat_age_s=None if self.identity is None else now - self.last_heard,
            step_age_s=now - self._owed_since if in_step else None,
            last_step_age_s=None if self._last_step_at is None else now - self._last_step_at,
            num_restarts=self.num_restarts,
            cause=self.restart_cause,
            role=self.role,
            host=self._host,
            step_id=None if self._last_step is None else self._last_step.step_id,
            step_digest="" if self._last_step is None else step_digest(self._last_step),
            resident_bytes=self._heartbeat.resident_bytes,
            process_state="" if isinstance(self.child, RemoteProcess) else process_state(self.child.pid),
            stack=self._heartbeat.stack if self._stacks_from is None else self.child.log_tail(self._stacks_from),
        )

    def death(self, cause: str | None = None) -> SempreError:
        """The error to raise once the process has ended; `cause` is set if we ended it."""
        word = self._last_word
        exitcode = self.child.exitcode()
        if word is not None and cause is None:
            cause = f"{word.type}: {word.message}"
        ending = self.child.describe_exit()
        text = f"{self.name} (pid {self.child.pid}) died: {ending}" + (f"; {cause}" if cause else "")
        traceback = word.traceback if word else self.child.log_tail()
        if not self.serving and not self.num_restarts:
            original = restore(word) if word else None
            return original or StartupError(f"{text}\n{traceback}".rstrip(), rank=self.rank, cause=cause or ending)
        return WorkerDied(
            f"{text}\n{traceback}".rstrip(),
            rank=self.rank,
            exitcode=exitcode,
            cause=cause or ending,
            worker_traceback=traceback,
        )


def step_digest(result: StepResult) -> str:
    """Of the tokens and hidden states of a step, or of its drafts: the same for all ranks of a stage."""
    rows = [(sampled.request_id, sampled.token_ids, sampled.hidden_digest) for sampled in result.sampled]
    return hashlib.sha256(msgspec.msgpack.encode([rows, [] if rows else result.drafts])).hexdigest()[:16]


def _expect(field: str, expected: object, found: object) -> None:
    if expected != found:
        raise MessageMalformed(f"{field}: expected {expected}, found {found}", field=field)
