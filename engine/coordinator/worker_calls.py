"""Calls a method on every worker and collects the replies."""

from __future__ import annotations

from collections.abc import Iterable

from sempre.engine.executor.base import Executor
from sempre.ipc.error_info import describe
from sempre.ipc.errors import RequestError, WorkerDied
from sempre.ipc.messages import CallMethod, CallMethodReply, CallWorkers, CallWorkersReply


class WorkerCalls:
    """A worker answers between two steps; replies are returned in rank order once the last has arrived.

    While a worker is being restarted, calls wait for it. A running call is sent again, once: all methods are
    read-only.
    """

    def __init__(self, executor: Executor) -> None:
        self._executor = executor
        self._next_id = 0
        self._under_way: dict[int, CallWorkers] = {}
        self._replies: dict[int, dict[int, CallMethodReply]] = {}
        self._lost_ranks: set[int] = set()
        self._waiting: list[CallWorkers] = []
        self._repeated: list[CallWorkers] = []

    def pending(self) -> bool:
        return bool(self._replies or self._waiting)

    def start(self, call: CallWorkers) -> None:
        if self._lost_ranks:
            self._waiting.append(call)
            return
        # renumbered, since two calls of a client may have the same number
        call_id, self._next_id = self._next_id, self._next_id + 1
        self._under_way[call_id] = call
        self._replies[call_id] = {}
        command = CallMethod(call_id=call_id, method=call.method, args=call.args, kwargs=call.kwargs)
        for rank in range(self._executor.world_size):
            self._executor.send(rank, command)

    def take(self, rank: int, reply: CallMethodReply) -> CallWorkersReply | None:
        replies = self._replies.get(reply.call_id)
        if replies is None:
            return None  # answered when another worker died
        replies[rank] = reply
        if len(replies) < self._executor.world_size:
            return None
        del self._replies[reply.call_id]
        call = self._under_way.pop(reply.call_id)
        self._repeated = [other for other in self._repeated if other is not call]
        client_id = call.call_id
        in_order = [replies[rank] for rank in sorted(replies)]
        for candidate in in_order:
            if candidate.error is not None:
                return CallWorkersReply(call_id=client_id, error=candidate.error)
        return CallWorkersReply(call_id=client_id, results=[candidate.result for candidate in in_order])

    def lose(self, ranks: Iterable[int], death: WorkerDied) -> list[CallWorkersReply]:
        """A worker died: running calls wait for its successor; those that do so for the second time fail."""
        self._lost_ranks.update(ranks)
        calls = [*self._under_way.values()]
        self._under_way.clear()
        self._replies.clear()
        failed = [call for call in calls if any(call is other for other in self._repeated)]
        self._repeated = [call for call in calls if not any(call is other for other in failed)]
        self._waiting = [*self._repeated, *self._waiting]
        text = f"worker {death.rank} died during the call for the second time ({death.cause})."
        error = describe(RequestError(text, parameter="method"))
        return [CallWorkersReply(call_id=call.call_id, error=error) for call in failed]

    def resume(self, ranks: Iterable[int]) -> None:
        """New workers are ready: start the calls that waited for them. Raises WorkerDied."""
        self._lost_ranks.difference_update(ranks)
        if not self._lost_ranks:
            waiting, self._waiting = self._waiting, []
            for call in waiting:
                self.start(call)
