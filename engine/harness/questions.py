"""Questions to a coordinator whose answers are single events: calls of workers, metrics, health."""

from __future__ import annotations

import time
from collections.abc import Callable
from itertools import count
from typing import Any, TypeVar

from sempre.engine.client import EngineClient
from sempre.ipc.error_info import restore
from sempre.ipc.errors import ProtocolError
from sempre.ipc.messages import (
    CallWorkers,
    CallWorkersReply,
    ClientCommand,
    GetHealth,
    GetMetrics,
    HealthReply,
    MetricsReply,
    WorkerHealth,
)

_REPLY_S = 60.0

Reply = TypeVar("Reply", CallWorkersReply, HealthReply, MetricsReply)


class Questions:
    """Asks the coordinator of a client. Events that are no answer are dropped, so no output should be due."""

    def __init__(self, client: EngineClient) -> None:
        self._client = client
        self._ids = count(1)

    def call(self, method: str, *args: object) -> list[Any]:
        """Call a method of every worker; return results in rank order. Raises the first error."""
        reply = self._ask(lambda call_id: CallWorkers(call_id=call_id, method=method, args=[*args]), CallWorkersReply)
        if reply.error is not None:
            raise restore(reply.error) or ProtocolError(f"{reply.error.type}: {reply.error.message}")
        return reply.results

    def metrics(self) -> dict[str, Any]:
        """Counters and gauges by name."""
        return self._ask(lambda call_id: GetMetrics(call_id=call_id), MetricsReply).values

    def ranks(self) -> list[WorkerHealth]:
        """What the coordinator knows of each worker, targets first."""
        reply = self._ask(lambda call_id: GetHealth(call_id=call_id), HealthReply)
        return [*reply.workers, *reply.draft_workers]

    def _ask(self, make: Callable[[int], ClientCommand], kind: type[Reply]) -> Reply:
        call_id = next(self._ids)
        self._client.send(make(call_id))
        deadline = time.monotonic() + _REPLY_S
        while (event := self._client.receive(max(0.0, deadline - time.monotonic()))) is not None:
            if isinstance(event, kind) and event.call_id == call_id:
                return event
        raise TimeoutError(f"no {kind.__name__} within {_REPLY_S:g} s")
