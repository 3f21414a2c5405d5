"""A model on paper of what control costs with many workers: step time, the coordinator's load, traffic between hosts.

A simulation of events. The coordinator is one server that does one thing at a time, in order of arrival: it plans a
step of a replica, sends it to each of the replica's ranks, and receives each result. A rank begins a step when it has
arrived and the one before has ended, and a step's ranks compute together, since they exchange partial sums. With two
steps in flight the next one is planned while the first is computed.

`direct` is what the engine does: a message for each rank. `by host` is what it might do: one message to each host that
has ranks of the replica, where a relay passes it on and collects the results.

Latencies and costs are those that `control_plane.py` measures.
"""

from __future__ import annotations

import heapq
import statistics
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

FanOut = Literal["direct", "by host"]


@dataclass(frozen=True)
class Costs:
    """Seconds, and bytes of the messages of one step."""

    plan: float
    """coordinator, per step of a replica: schedule, and take the results"""
    send: float
    """coordinator or relay, per message: encode, and hand it to the socket"""
    receive: float
    """coordinator or relay, per result: take it from the socket, decode and compare"""
    worker: float
    """worker, per step: decode the step and encode the result"""
    latency_here: float
    """one way, within a host"""
    latency_away: float
    """one way, to another host"""
    step_bytes: int
    result_bytes: int


@dataclass(frozen=True)
class Layout:
    """`replicas` of `ranks` workers each, in order of rank on `hosts` of equal size; the coordinator is on host 0."""

    replicas: int
    ranks: int
    hosts: int = 1
    fan_out: FanOut = "direct"

    @property
    def workers(self) -> int:
        return self.replicas * self.ranks

    def host(self, worker: int) -> int:
        return worker * self.hosts // self.workers


class Simulated(NamedTuple):
    """What a simulation found. A step's overhead is its time from plan to plan, less the time of computing."""

    overhead_median_s: float
    overhead_p99_s: float
    coordinator_load: float
    """share of its time; at 1 it decides the speed"""
    bytes_between_hosts_per_step: int
    """of one replica, the largest"""


@dataclass
class _Replica:
    workers: range
    missing: dict[int, int] = field(default_factory=dict)
    """by step: results that have not arrived"""
    free_at: float = 0.0
    ended: list[float] = field(default_factory=list)
    next_step: int = 0


class Simulation:
    """Runs every replica for `num_steps` steps of `compute_s`."""

    def __init__(self, costs: Costs, layout: Layout, *, compute_s: float, in_flight: int, num_steps: int = 300) -> None:
        self._costs = costs
        self._layout = layout
        self._compute_s = compute_s
        self._in_flight = in_flight
        self._num_steps = num_steps
        self._events: list[tuple[float, int, int, int]] = []
        """arrivals at the coordinator: time, tie-break, replica, and step (-1: plan the next one)"""
        self._count = 0
        self._free_at = 0.0
        self._busy_s = 0.0
        ranks = layout.ranks
        self._replicas = [_Replica(range(i * ranks, (i + 1) * ranks)) for i in range(layout.replicas)]

    def run(self) -> Simulated:
        for index in range(len(self._replicas)):
            for _ in range(self._in_flight):
                self._arrives(0.0, index, -1)
        while self._events:
            time, _, index, step = heapq.heappop(self._events)
            now = max(time, self._free_at)
            self._free_at = self._plan(now, index) if step < 0 else self._receive(now, index, step)
            self._busy_s += self._free_at - now
        gaps = [
            later - earlier - self._compute_s
            for replica in self._replicas
            for earlier, later in zip(replica.ended[10:], replica.ended[11:], strict=False)
        ]
        return Simulated(
            statistics.median(gaps),
            statistics.quantiles(gaps, n=100)[98],
            self._busy_s / self._free_at,
            max(self._bytes_between_hosts(replica) for replica in self._replicas),
        )

    def _arrives(self, time: float, replica: int, step: int) -> None:
        heapq.heappush(self._events, (time, self._count, replica, step))
        self._count += 1

    def _plan(self, now: float, index: int) -> float:
        """The coordinator plans and sends a step; when it is done with that."""
        replica, costs = self._replicas[index], self._costs
        step = replica.next_step
        if step == self._num_steps:
            return now
        replica.next_step += 1
        now += costs.plan
        groups = self._groups(replica)
        replica.missing[step] = len(groups)
        arrivals = []
        for host, size in groups:
            now += costs.send
            relayed = 0.0 if self._layout.fan_out == "direct" else size * costs.send + costs.latency_here
            arrivals.append(now + self._latency(host) + relayed + costs.worker / 2)
        begin = max(replica.free_at, *arrivals)
        replica.free_at = end = begin + self._compute_s
        for host, size in groups:
            collected = 0.0 if self._layout.fan_out == "direct" else size * costs.receive + costs.latency_here
            self._arrives(end + costs.worker / 2 + collected + self._latency(host), index, step)
        return now

    def _receive(self, now: float, index: int, step: int) -> float:
        """The coordinator takes one result; with the last one of a step it is time for the next."""
        replica = self._replicas[index]
        now += self._costs.receive
        replica.missing[step] -= 1
        if replica.missing[step] == 0:
            del replica.missing[step]
            replica.ended.append(now)
            self._arrives(now, index, -1)
        return now

    def _groups(self, replica: _Replica) -> list[tuple[int, int]]:
        """Whom the coordinator sends a step: hosts, and for how many ranks each."""
        hosts = [self._layout.host(worker) for worker in replica.workers]
        if self._layout.fan_out == "direct":
            return [(host, 1) for host in hosts]
        return [(host, hosts.count(host)) for host in dict.fromkeys(hosts)]

    def _latency(self, host: int) -> float:
        return self._costs.latency_away if host else self._costs.latency_here

    def _bytes_between_hosts(self, replica: _Replica) -> int:
        away = sum(1 for host, _ in self._groups(replica) if host)
        return away * (self._costs.step_bytes + self._costs.result_bytes)
