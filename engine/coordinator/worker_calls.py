"""Calls of a method on every worker, and the collection of their replies."""

from __future__ import annotations

from sempre.engine.executor.base import Executor
from sempre.ipc.messages import CallMethod, CallMethodReply, CallWorkers, CallWorkersReply


class WorkerCalls:
    """A worker answers between two steps; replies are handed on in rank order when the last is there."""

    def __init__(self, executor: Executor) -> None:
        self._executor = executor
        self._next_id = 0
        self._client_ids: dict[int, int] = {}
        self._replies: dict[int, dict[int, CallMethodReply]] = {}

    def pending(self) -> bool:
        return bool(self._replies)

    def start(self, call: CallWorkers) -> None:
        # numbered anew, as two calls of a client may carry the same number
        call_id, self._next_id = self._next_id, self._next_id + 1
        self._client_ids[call_id] = call.call_id
        self._replies[call_id] = {}
        command = CallMethod(call_id=call_id, method=call.method, args=call.args, kwargs=call.kwargs)
        for rank in range(self._executor.world_size):
            self._executor.send(rank, command)

    def take(self, rank: int, reply: CallMethodReply) -> CallWorkersReply | None:
        replies = self._replies[reply.call_id]
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
