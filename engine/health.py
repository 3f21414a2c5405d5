"""Whether an engine is healthy, and if not, which of its processes is at fault."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from typing import Literal, TypeVar

from msgspec import Struct

from sempre.ipc import messages
from sempre.ipc.config import EngineConfig
from sempre.ipc.errors import EngineUnhealthy, SempreError

EngineState = Literal["starting", "ready", "restarting", "dead"]
# A worker sends heartbeats while it computes, too; a busy machine alone does not explain this many missing ones.
HEARTBEATS_MISSED = 10
_OUTAGE_LOOK_S = 0.05


class WorkerHealth(Struct, frozen=True, kw_only=True):
    """One worker process. Ages are in seconds, None if the event has not happened."""

    rank: int
    pid: int
    state: messages.WorkerState
    heartbeat_age_s: float | None
    """Time since the worker's last heartbeat."""
    step_age_s: float | None
    """How long the current step has taken so far; None without one."""
    last_step_age_s: float | None
    """Time since it finished a step."""
    num_restarts: int
    cause: str
    """Why it was last restarted; empty if it never was."""


_Health = TypeVar("_Health", bound=WorkerHealth)


class RankReport(WorkerHealth, frozen=True, kw_only=True):
    """One worker process in detail, for whoever looks for the reason of a delay."""

    role: messages.WorkerRole
    host: str
    """The name of its machine."""
    step_id: int | None
    """The last step that it has finished."""
    step_digest: str
    """Of that step's tokens and hidden states: the same for all ranks of a stage."""
    resident_bytes: int | None
    """Its memory in RAM, as of its last heartbeat; None if unknown."""
    process_state: str
    """What its process does: running, sleeping, stopped, …; empty if unknown."""
    stack: str
    """Of one that works on a command for long, the stack of its main thread; of one that is silent, of all threads."""


class Problem(Struct, frozen=True, kw_only=True):
    """What is wrong with one process; `rank` is None for the coordinator or the whole engine."""

    rank: int | None
    text: str


class EngineHealth(Struct, frozen=True, kw_only=True):
    """The engine is healthy when there is no problem: every worker is ready and sends heartbeats, no step is stuck, and
    no scheduled request has stopped making progress."""

    state: EngineState
    problems: list[Problem]
    workers: list[WorkerHealth] = []
    ranks: list[RankReport] = []
    """Every worker in detail: the targets in rank order, then the draft workers."""

    @property
    def healthy(self) -> bool:
        """Whether there is no problem."""
        return not self.problems

    def check(self) -> None:
        """Raise EngineUnhealthy with all problems and the rank of the first."""
        if self.problems:
            first = self.problems[0]
            text = "; ".join(problem.text for problem in self.problems)
            raise EngineUnhealthy(f"the engine is {self.state}: {text}", rank=first.rank, cause=first.text)


def unhealthy(state: EngineState, text: str) -> EngineHealth:
    """The health of an engine whose workers cannot be asked."""
    return EngineHealth(state=state, problems=[Problem(rank=None, text=text)])


async def answered_health(
    asking: asyncio.Task[messages.HealthReply], config: EngineConfig, outage: Callable[[], str | None], timeout_s: float
) -> EngineHealth:
    """The health that the coordinator reports. An outage, during which nobody answers, may begin meanwhile."""
    deadline = time.monotonic() + timeout_s
    try:
        while not asking.done():
            if (cause := outage()) is not None:
                return unhealthy("restarting", cause)
            if (wait_s := deadline - time.monotonic()) <= 0:
                return unhealthy("ready", f"the coordinator has not answered for {timeout_s:g} s")
            await asyncio.wait([asking], timeout=min(wait_s, _OUTAGE_LOOK_S))
        reply = asking.result()
        return judge(reply.workers, config, reply.stalled, reply.draft_workers)
    except SempreError as error:
        return unhealthy("dead", str(error))
    finally:
        asking.cancel()


def judge(
    reports: Sequence[messages.WorkerHealth],
    config: EngineConfig,
    stalled: Sequence[messages.StalledRequests] = (),
    draft_workers: Sequence[messages.WorkerHealth] = (),
) -> EngineHealth:
    """The health of an engine, from its coordinator's report of workers and of requests without progress; draft workers
    are not needed for it."""
    problems = [problem for report in reports if (problem := _problem(report, config)) is not None]
    explained = {problem.rank for problem in problems}
    problems += [_stall(report, config) for report in stalled if report.rank not in explained]
    workers = [_named(report, WorkerHealth) for report in reports]
    restarting = any(report.state != "ready" for report in reports)
    ranks = [_named(report, RankReport) for report in (*reports, *draft_workers)]
    state: EngineState = "restarting" if restarting else "ready"
    return EngineHealth(state=state, problems=problems, workers=workers, ranks=ranks)


def _named(report: messages.WorkerHealth, kind: type[_Health]) -> _Health:
    """Users see fields by name; the message is an array."""
    return kind(**{name: getattr(report, name) for name in kind.__struct_fields__})


def _problem(report: messages.WorkerHealth, config: EngineConfig) -> Problem | None:
    rank, who = report.rank, f"worker {report.rank} (pid {report.pid})"
    silence_limit_s = min(config.heartbeat_timeout_s, HEARTBEATS_MISSED * config.heartbeat_interval_s)
    if report.state != "ready":
        because = f": {report.cause}" if report.cause else ""
        return Problem(rank=rank, text=f"{who} is {report.state}{because}")
    if report.heartbeat_age_s is not None and report.heartbeat_age_s > silence_limit_s:
        return Problem(rank=rank, text=f"{who} was last heard {report.heartbeat_age_s:.1f} s ago")
    if report.step_age_s is not None and report.step_age_s > config.step_timeout_s:
        limit = f"step_timeout_s={config.step_timeout_s:g}"
        return Problem(rank=rank, text=f"{who} is stuck in a step for {report.step_age_s:.1f} s ({limit})")
    return None


def _stall(report: messages.StalledRequests, config: EngineConfig) -> Problem:
    count, name = report.num_requests, report.request_id
    who = f"request {name!r} of worker {report.rank} has"
    if count > 1:
        who = f"{count} requests of worker {report.rank}, {name!r} the first of them, have"
    limit = f"step_timeout_s={config.step_timeout_s:g}"
    return Problem(rank=report.rank, text=f"{who} not moved for {report.age_s:.1f} s ({limit})")
