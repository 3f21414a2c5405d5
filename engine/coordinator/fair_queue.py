"""Whose request is next, where several tenants share one engine.

The Virtual Token Counter of Sheng et al., "Fairness in Serving Large Language Models" (OSDI 2024): each tenant has a
counter of the tokens it has been served, those of outputs counted twice, divided by its weight; the next request is one
of the tenant with the lowest counter. A tenant that was idle does not keep what it has not used: its counter rises to
the lowest of those that wait.

Requests wait here until a replica can soon begin them, so the schedulers' own order is that of the turns. Integers and
the order of arrival decide, so equal requests get equal turns. No bit of an output depends on them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from heapq import heappop, heappush
from typing import NamedTuple

from msgspec.structs import replace

from sempre.engine.coordinator.replica import Replica, best_replica
from sempre.engine.scheduling import SchedulerStats
from sempre.ipc.messages import EngineReady, RequestOutputDelta, RequestSpec, TenantSpec

_PROMPT_COST = 1
_OUTPUT_COST = 2
Start = Callable[[RequestSpec, Replica], RequestOutputDelta | None]
# counters are integers; a weight of at most 1000 divides this with an error below 2**-10 of a token
_UNIT = 1 << 20


class Room(NamedTuple):
    """How many requests, and tokens of their prompts, a replica could begin with its next step."""

    num_sequences: int
    num_tokens: int

    @classmethod
    def of(cls, stats: SchedulerStats, ready: EngineReady) -> Room:
        """A step's tokens if no more than the next request waits for room, and one request more than a step can have,
        so that it is there when one ends."""
        if stats.num_waiting > stats.num_deferred + 1:
            return cls(0, 0)
        return cls(ready.max_num_seqs + 1 - stats.num_running - stats.num_waiting, ready.max_num_batched_tokens)

    @property
    def is_open(self) -> bool:
        return self.num_sequences > 0 and self.num_tokens > 0

    def without(self, num_tokens: int) -> Room:
        """Return what is left when a request of so many tokens has begun."""
        return Room(self.num_sequences - 1, self.num_tokens - num_tokens)


class _Place(NamedTuple):
    """Of a waiting request, among those of its tenant."""

    priority: int
    ordinal: int
    spec: RequestSpec


class _Tenant:
    """One tenant: its counter and its waiting requests."""

    def __init__(self, spec: TenantSpec) -> None:
        self.weight = spec.weight
        self.served = 0
        self.places: list[_Place] = []

    def charge(self, num_tokens: int, cost: int) -> None:
        self.served += num_tokens * cost * _UNIT // self.weight


class FairQueue:
    """The waiting requests of tenants. Requests without a tenant never wait here."""

    def __init__(self, *, uses_priority: bool = False) -> None:
        """`uses_priority`: a tenant's requests of lower priority value come before its others."""
        self._uses_priority = uses_priority
        self._tenants: dict[str, _Tenant] = {}
        self._waiting: dict[str, _Tenant] = {}
        self._begun: dict[str, _Tenant] = {}
        self._paused: set[str] = set()
        self._last: _Tenant | None = None
        self._num_added = 0
        self._num_begun = 0

    def __len__(self) -> int:
        return len(self._waiting)

    def __iter__(self) -> Iterator[str]:
        return iter(self._waiting)

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._waiting

    def add(self, spec: RequestSpec) -> None:
        """Let a request of a tenant wait for its turn."""
        assert spec.tenant is not None
        tenant = self._tenants.setdefault(spec.tenant.name, _Tenant(spec.tenant))
        tenant.weight = spec.tenant.weight
        if not tenant.places:
            tenant.served = max(tenant.served, self._floor())
        priority = spec.priority if self._uses_priority else 0
        heappush(tenant.places, _Place(priority, self._num_added, spec))
        self._waiting[spec.request_id] = tenant
        self._num_added += 1

    def remove(self, request_id: str) -> bool:
        """Forget a request that has ended. Returns whether it was waiting."""
        self._paused.discard(request_id)
        self._begun.pop(request_id, None)
        tenant = self._waiting.pop(request_id, None)
        if tenant is not None:
            self._tidy(tenant)
        return tenant is not None

    def pause(self, request_id: str) -> None:
        """A waiting request will be paused when its turn comes; ignores others."""
        if request_id in self._waiting:
            self._paused.add(request_id)

    def resume(self, request_id: str) -> None:
        """A waiting request will not be paused; ignores others."""
        self._paused.discard(request_id)

    def count(self, outputs: Iterable[RequestOutputDelta]) -> None:
        """Charge the tokens of outputs to their tenants, and forget what has finished."""
        if not self._begun:
            return
        for output in outputs:
            tenant = self._begun.get(output.request_id)
            if tenant is not None:
                tenant.charge(len(output.token_ids), _OUTPUT_COST)
                if output.finish_reason is not None:
                    del self._begun[output.request_id]

    def begin(self, replicas: Sequence[Replica], ready: EngineReady, start: Start) -> Iterator[RequestOutputDelta]:
        """Start requests, in turn, while a replica can soon begin one; yield the ends of those that are refused."""
        rooms = {replica: Room.of(replica.stats(), ready) for replica in replicas} if self._waiting else {}
        while self._waiting:
            candidates = [replica for replica, room in rooms.items() if room.is_open]
            if not candidates:
                return
            spec, tenant = self._next()
            replica = best_replica(candidates, spec)
            num_tokens = len(spec.prompt_token_ids) + len(spec.output_token_ids)
            rooms[replica] = rooms[replica].without(num_tokens)
            end = start(spec, replica)
            if end is not None:
                yield end
                continue
            tenant.charge(num_tokens, _PROMPT_COST)
            self._begun[spec.request_id] = tenant
            if spec.request_id in self._paused:
                self._paused.discard(spec.request_id)
                replica.pause_request(spec.request_id)

    def _next(self) -> tuple[RequestSpec, _Tenant]:
        """Take the request whose turn it is; of equal tenants, the one that came first."""
        tenant = min((each for each in self._tenants.values() if each.places), key=lambda each: each.served)
        spec = heappop(tenant.places).spec
        del self._waiting[spec.request_id]
        self._tidy(tenant)
        ordinal, self._num_begun = self._num_begun, self._num_begun + 1
        return replace(spec, ordinal=ordinal), tenant

    def _tidy(self, tenant: _Tenant) -> None:
        """Remove forgotten requests from the head of a tenant's queue."""
        while tenant.places and tenant.places[0].spec.request_id not in self._waiting:
            heappop(tenant.places)
        if not tenant.places:
            self._last = tenant

    def _floor(self) -> int:
        """The least counter of a tenant that waits; if none does, of the last that did."""
        waiting = [tenant.served for tenant in self._tenants.values() if tenant.places]
        last = 0 if self._last is None else self._last.served
        return min(waiting, default=last)
