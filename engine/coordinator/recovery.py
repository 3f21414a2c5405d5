"""After a worker dies, its replica gets new workers, and the requests continue where they were.

The bits are the same: noise is a function of (seed, position, token), so a request is recomputed from its prompt and
the tokens it has so far.
"""

from __future__ import annotations

import logging

from sempre.engine.child_process import RestartBudget
from sempre.engine.coordinator.core import EngineCore
from sempre.engine.executor.base import Executor
from sempre.ipc.config import EngineConfig
from sempre.ipc.error_info import describe
from sempre.ipc.errors import StartupError, WorkerDied
from sempre.ipc.messages import ClientEvent, WorkerStateChanged

logger = logging.getLogger(__name__)


class Recovery:
    """Restarts the workers of a replica together, each within its budget."""

    def __init__(self, config: EngineConfig, core: EngineCore, executor: Executor) -> None:
        self._core = core
        self._executor = executor
        self._budgets = [
            RestartBudget(config.max_restarts, config.restart_window_s) for _ in range(executor.world_size)
        ]

    def replace(self, error: WorkerDied) -> list[ClientEvent]:
        """Start successors; return events for the client. Raises `error`, with the count, after too many restarts.

        Raises StartupError while the engine starts: its client knows whether that is the first start or a restart.
        """
        rank = error.rank
        if self._core.ready is None:
            raise StartupError(str(error), rank=rank, cause=error.cause) from error
        budget = self._budgets[rank]
        if not budget.take():
            raise WorkerDied(
                f"{error}\nworker {rank}: {budget.exhausted()}",
                rank=rank,
                exitcode=error.exitcode,
                cause=error.cause,
                worker_traceback=error.worker_traceback,
            ) from error
        logger.warning("%s", error)
        lost = self._core.lose_worker(error)
        budget.forgive(lost.num_explained_crashes)
        for peer in lost.ranks:
            self._executor.restart(peer, error.cause if peer == rank else f"worker {rank} died: {error.cause}")
        pids = {report.rank: report.pid for report in self._executor.health()}
        changes = [
            WorkerStateChanged(rank=peer, state="restarting", pid=pids[peer], error=describe(error, rank))
            for peer in lost.ranks
        ]
        return [*changes, *lost.events]
