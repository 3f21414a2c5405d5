"""Calls of a method on every worker, and the collection of their replies."""

from __future__ import annotations

from collections.abc import Iterable

from sempre.engine.executor.base import Executor
from sempre.ipc.error_info import describe
from sempre.ipc.errors import RequestError, WorkerDied
from sempre.ipc.messages import CallMethod, CallMethodReply, CallWorkers, CallWorkersReply


class WorkerCalls:
    """A worker answers between two steps; replies are handed on in rank order when the last is there.

    While a worker is being restarted, calls wait for it.
    """

    def __init__(self, executor: Executor) -> None:
        self._executor = executor
        self._next_id = 0
        self._client_ids: dict[int, int] = {}
        self._replies: dict[int, dict[int, CallMethodReply]] = {}
        self._lost_ranks: set[int] = set()
        self._waiting: list[CallWorkers] = []

    def pending(self) -> bool:
        return bool(self._replies or self._waiting)

    def start(self, call: CallWorkers) -> None:
        if self._lost_ranks:
            self._waiting.append(call)
            return
        # numbered anew, as two calls of a client may carry the same number
        call_id, self._next_id = self._next_id, self._next_id + 1
        self._client_ids[call_id] = call.call_id
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
        client_id = self._client_ids.pop(reply.call_id)
        in_order = [replies[rank] for rank in sorted(replies)]
        for candidate in in_order:
            if candidate.error is not None:
                return CallWorkersReply(call_id=client_id, error=candidate.error)
        return CallWorkersReply(call_id=client_id, results=[candidate.result for candidate in in_order])

    def lose(self, ranks: Iterable[int], death: WorkerDied) -> list[CallWorkersReply]:
        """A worker died: calls that were under way have an error, as nobody knows what they did."""
        self._lost_ranks.update(ranks)
        error = RequestError(
            f"worker {death.rank} died during the call ({death.cause}) and is being restarted; call again.",
            parameter="method",
        )
        replies = [CallWorkersReply(call_id=client, error=describe(error)) for client in self._client_ids.values()]
        self._client_ids.clear()
        self._replies.clear()
        return replies

    def resume(self, ranks: Iterable[int]) -> None:
        """Fresh workers are ready: what waited for them is started. Raises WorkerDied."""
        self._lost_ranks.difference_update(ranks)
        if not self._lost_ranks:
            waiting, self._waiting = self._waiting, []
            for call in waiting:
                self.start(call)
