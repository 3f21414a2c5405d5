"""The executor's view of one worker process: its link, its open commands, and its end."""

from __future__ import annotations

import time
from collections import deque

from sempre.engine.child_process import ChildProcess
from sempre.ipc.error_info import restore
from sempre.ipc.errors import MessageMalformed, SempreError, StartupError, WorkerDied
from sempre.ipc.messages import (
    CallMethod,
    CallMethodReply,
    ErrorInfo,
    ExecuteStep,
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
    WorkerState,
)

_ANSWERS: dict[type[WorkerCommand], type[WorkerEvent]] = {
    LoadModel: ModelLoaded,
    StartServing: WorkerReady,
    ExecuteStep: StepResult,
    CallMethod: CallMethodReply,
}


class WorkerPeer:
    """Tracks the commands that a worker has yet to answer, oldest first.

    `num_restarts` workers had this rank before; the last of them ended because of `restart_cause`.
    """

    def __init__(
        self,
        rank: int,
        name: str,
        child: ChildProcess,
        ready_by: float,
        *,
        num_restarts: int = 0,
        restart_cause: str = "",
    ) -> None:
        self.rank = rank
        self.name = name
        self.child = child
        self.ready_by = ready_by
        self.num_restarts = num_restarts
        self.restart_cause = restart_cause
        self.identity: bytes | None = None
        self.serving = False
        self.last_heard = time.monotonic()
        self._owed: deque[WorkerCommand] = deque()
        self._owed_since = 0.0
        self._last_step_id = -1
        self._last_step_at: float | None = None
        self._last_word: ErrorInfo | None = None

    def sent(self, command: WorkerCommand) -> None:
        if type(command) in _ANSWERS:
            if not self._owed:
                self._owed_since = time.monotonic()
            self._owed.append(command)

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
            self._last_step_id = event.step_id
            self._last_step_at = self._owed_since
        if isinstance(event, WorkerReady):
            self.serving = True

    def is_repetition(self, event: WorkerEvent) -> bool:
        """Whether it repeats the answer of a finished step, which is harmless."""
        return isinstance(event, StepResult) and event.step_id <= self._last_step_id

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


def _expect(field: str, expected: object, found: object) -> None:
    if expected != found:
        raise MessageMalformed(f"{field}: expected {expected}, found {found}", field=field)
