"""/health: whether coordinator and workers answer, and whether steps come to an end."""

from __future__ import annotations

import msgspec

from sempre.engine.async_llm import AsyncLLM
from sempre.ipc.errors import CoordinatorDied, EngineDeadError, WorkerDied
from sempre.ipc.messages import WorkerHealth

# A heartbeat may be late on a busy machine; one that is this many intervals late is missed.
_MISSED_BEATS = 10


class Problem(msgspec.Struct):
    """`rank` is the worker's; None is the coordinator."""

    rank: int | None
    reason: str


class Worker(msgspec.Struct):
    """Seconds since the last sign of life, and since the start of the oldest step it has not finished."""

    rank: int
    silence_s: float
    step_age_s: float


class Health(msgspec.Struct):
    status: str
    problems: list[Problem]
    workers: list[Worker]


async def check_health(engine: AsyncLLM, *, step_timeout_s: float) -> Health:
    """Ask the coordinator, which hears the heartbeats. Never raises for an engine that is ill or dead."""
    config = engine.config
    limit_s = min(config.heartbeat_timeout_s, _MISSED_BEATS * config.heartbeat_interval_s)
    try:
        workers = await engine.get_health(limit_s)
    except TimeoutError:
        return _ill([Problem(None, f"the coordinator has not answered for {limit_s:g} s")])
    except EngineDeadError as error:
        rank = error.rank if isinstance(error, WorkerDied) else None
        who = "the coordinator" if isinstance(error, CoordinatorDied) else "the engine"
        text = str(error).splitlines()[0]
        return _ill([Problem(rank, text if rank is not None else f"{who} has ended: {text}")])
    problems = [problem for worker in workers if (problem := _problem(worker, limit_s, step_timeout_s)) is not None]
    seen = [Worker(worker.rank, worker.silence_s, worker.step_age_s) for worker in workers]
    return _ill(problems, seen) if problems else Health("healthy", [], seen)


def _problem(worker: WorkerHealth, limit_s: float, step_timeout_s: float) -> Problem | None:
    if worker.silence_s > limit_s:
        return Problem(worker.rank, f"worker {worker.rank} has given no heartbeat for {worker.silence_s:.1f} s")
    if worker.step_age_s > step_timeout_s:
        return Problem(worker.rank, f"worker {worker.rank} has been in one step for {worker.step_age_s:.1f} s")
    return None


def _ill(problems: list[Problem], workers: list[Worker] | None = None) -> Health:
    return Health("unhealthy", problems, workers or [])
