"""An engine that sleeps: it computes nothing, and its workers do without their caches, or also without their weights.

    SleepEngine → unfinished requests are aborted, finish, or keep their tokens
        → no step is in flight: release on every rank → SleepReply
    WakeEngine → restore on every rank → SleepReply → what waited is computed

One change runs at a time. A rank whose worker dies meanwhile is brought to the state that the others get, once its
successor is ready. If a rank refuses a change, all ranks go back to the state before it.
"""

from __future__ import annotations

from collections.abc import Iterable

from sempre.engine.coordinator.startup import StartUp
from sempre.engine.executor.base import Executor
from sempre.ipc.error_info import describe
from sempre.ipc.errors import RequestError
from sempre.ipc.messages import (
    CallMethod,
    CallMethodReply,
    ErrorInfo,
    SleepEngine,
    SleepReply,
    SleepTag,
    WakeEngine,
)

RELEASE, RESTORE = "_release", "_restore"

# far above the numbers of other calls, and of updates of weights
_FIRST_ID = 1 << 41
_IN_MEMORY: tuple[SleepTag, ...] = ("kv_cache", "weights")


class SleepControl:
    """What the engine does without, and at most one change of that."""

    def __init__(self, executor: Executor, startup: StartUp) -> None:
        self._executor = executor
        self._startup = startup
        self.away: tuple[SleepTag, ...] = ()
        self._former: tuple[SleepTag, ...] = ()
        """before the change that runs"""
        self._command: SleepEngine | WakeEngine | None = None
        self._waits = False
        """for the unfinished requests, or the steps in flight"""
        self._error: ErrorInfo | None = None
        self._call_id = _FIRST_ID
        self._awaited: dict[int, int] = {}
        """rank to the number of the call that it has not answered"""
        self._lost: set[int] = set()
        self._questions: list[int] = []

    def state(self, call_id: int) -> list[SleepReply]:
        """The answer to a question for the state; none yet while that changes."""
        if self.is_changing:
            self._questions.append(call_id)
            return []
        return [SleepReply(call_id=call_id, tags=list(self.away))]

    def take_answers(self) -> list[SleepReply]:
        """A change has ended: the answers to what was asked meanwhile."""
        questions, self._questions = self._questions, []
        return [SleepReply(call_id=call_id, tags=list(self.away)) for call_id in questions]

    @property
    def is_pending(self) -> bool:
        """Whether requests that come now wait."""
        return bool(self.away) or self._command is not None

    @property
    def is_changing(self) -> bool:
        """Whether a reply is pending."""
        return self._command is not None

    @property
    def holds_steps(self) -> bool:
        """Whether no step may be sent."""
        return self.is_pending and not (self._waits and self.lets_finish)

    @property
    def is_waiting(self) -> bool:
        """Whether `release` is to be called once no step is in flight and, if it `lets_finish`, no request unfinished;
        all workers must be there."""
        return self._waits and not self._lost

    @property
    def lets_finish(self) -> bool:
        """Whether the unfinished requests are to end before the release."""
        return isinstance(self._command, SleepEngine) and self._command.mode == "wait"

    @property
    def clears_cache(self) -> bool:
        """Whether what is cached is forgotten with the change that runs."""
        command = self._command
        return isinstance(command, SleepEngine) and (command.clear_cache or "kv_cache" in command.tags)

    @property
    def frees_memory(self) -> bool:
        """Whether the change that runs takes memory from the workers."""
        return isinstance(self._command, SleepEngine) and not set(self._command.tags).isdisjoint(_IN_MEMORY)

    def refusal(self, command: SleepEngine | WakeEngine, *, updates_weights: bool) -> SleepReply | None:
        """Why this change cannot begin now, if it cannot; `updates_weights`: an update of weights has not ended."""
        text = self._refusal(command, updates_weights=updates_weights)
        if text is None:
            return None
        error = describe(RequestError(text, parameter="tags", value=command.tags))
        return SleepReply(call_id=command.call_id, tags=list(self.away), error=error)

    def refuse_weights(self, num_unfinished: int) -> RequestError | None:
        """Why the weights cannot be updated now, if they cannot. `num_unfinished`: requests that have begun."""
        if not self.is_pending or self.lets_finish:
            return None
        if self.is_changing:
            return RequestError("update_weights: expected an engine that neither falls asleep nor wakes up; try again.")
        if "weights" in self.away:
            return RequestError("update_weights: expected weights in memory, found them asleep: wake up 'weights'.")
        if num_unfinished:
            return RequestError(
                f"update_weights: expected no unfinished requests in a sleeping engine, found {num_unfinished}, which"
                " would finish with other weights than they began with. Wake up first, or sleep with mode 'abort' or"
                " 'wait'."
            )
        return None

    def accept(self, command: SleepEngine | WakeEngine) -> SleepReply | None:
        """Begin a change that is not refused. A sleep goes on with `release`. The reply, if that is all."""
        self._command, self._former, self._error = command, self.away, None
        if isinstance(command, SleepEngine):
            self._waits = True
            return None
        kept = [tag for tag in self.away if tag not in command.tags]
        # scheduling follows the last of the memory
        woken = [tag for tag in command.tags if tag in _IN_MEMORY and tag in self.away]
        if woken and not set(kept) & set(_IN_MEMORY):
            kept = []
        return self._move(tuple(kept))

    def release(self) -> SleepReply | None:
        """No step is in flight: take the memory from the workers. The reply, if there is nothing to take."""
        assert isinstance(self._command, SleepEngine)
        self._waits = False
        asked = {*self.away, *self._command.tags, "scheduling"}
        return self._move(tuple(tag for tag in ("scheduling", *_IN_MEMORY) if tag in asked))

    def take(self, rank: int, reply: CallMethodReply) -> SleepReply | None:
        """The answer to the client, once the last worker has answered. Replies to former calls are ignored."""
        if self._awaited.get(rank) != reply.call_id:
            return None
        del self._awaited[rank]
        self._error = self._error or reply.error
        return self._progress()

    def lose(self, ranks: Iterable[int]) -> None:
        """Workers have died; their successors begin awake."""
        for rank in ranks:
            self._lost.add(rank)
            self._awaited.pop(rank, None)

    def resume(self, ranks: Iterable[int]) -> SleepReply | None:
        """Their successors are ready."""
        for rank in ranks:
            self._lost.discard(rank)
            self._tell(rank, (), self.away)
        return self._progress()

    def _refusal(self, command: SleepEngine | WakeEngine, *, updates_weights: bool) -> str | None:
        if self._command is not None or updates_weights:
            other = "an update of weights" if updates_weights else "another change of sleep"
            return f"sleep, wake_up: expected an engine that changes nothing else, found {other}. Try again after it."
        if isinstance(command, SleepEngine):
            return None
        staying = [tag for tag in self.away if tag not in command.tags]
        if "kv_cache" in command.tags and "weights" in staying:
            return "tags: expected 'weights' with or before 'kv_cache', found them asleep. Wake up 'weights' first."
        memory = [tag for tag in staying if tag in _IN_MEMORY]
        if "scheduling" in command.tags and memory:
            return f"tags: expected {' and '.join(map(repr, memory))} with or before 'scheduling', found it asleep."
        return None

    def _move(self, target: tuple[SleepTag, ...]) -> SleepReply | None:
        """Bring every rank from `away` to `target`. The reply, if no worker has to be asked."""
        before, self.away = self.away, target
        for rank in range(self._executor.world_size):
            if rank not in self._lost:
                self._tell(rank, before, target)
        return self._progress()

    def _tell(self, rank: int, before: tuple[SleepTag, ...], target: tuple[SleepTag, ...]) -> None:
        lost = [tag for tag in target if tag in _IN_MEMORY and tag not in before]
        found = [tag for tag in before if tag in _IN_MEMORY and tag not in target]
        if not (lost or found):
            return
        method = RELEASE if lost else RESTORE
        args: list[object] = [lost] if lost else self._startup.memory(found)
        self._call_id += 1
        self._awaited[rank] = self._call_id
        self._executor.send(rank, CallMethod(call_id=self._call_id, method=method, args=args))

    def _progress(self) -> SleepReply | None:
        if self._command is None or self._waits or self._awaited or self._lost:
            return None
        if self._error is not None and self.away != self._former:
            # those that have changed change back; to the others it makes no difference
            return self._move(self._former)
        command, self._command = self._command, None
        return SleepReply(call_id=command.call_id, tags=list(self.away), error=self._error)
