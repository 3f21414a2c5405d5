"""Where draft workers live: processes of this machine, or this process."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import zmq

from sempre.engine.config import EngineConfig
from sempre.engine.executor.base import Executor
from sempre.engine.executor.inproc import InprocExecutor
from sempre.engine.executor.local import LocalExecutor
from sempre.ipc.endpoint import PrivateDirectory

if TYPE_CHECKING:
    from sempre.workers.main import WorkerProtocol


class LocalDraftHost:
    """Processes with a hub of their own, so that their end concerns nobody else."""

    def __init__(self, directory: PrivateDirectory, worker_module: str, client_pid: int) -> None:
        self._directory = directory
        self._client_pid = client_pid
        self._poller: zmq.Poller | None = None
        self._worker_module = worker_module
        self._executor: LocalExecutor | None = None
        self._num_starts = 0

    def watch_with(self, poller: zmq.Poller) -> None:
        """Have `poller` wake up for the workers that are started from now on."""
        self._poller = poller

    def start(self, config: EngineConfig) -> Executor:
        self._num_starts += 1
        executor = LocalExecutor(
            config,
            self._directory,
            client_pid=self._client_pid,
            worker_module=self._worker_module,
            hub_address=self._directory.draft_address(self._num_starts),
            kind="draft worker",
        )
        if self._poller is not None:
            executor.register(self._poller)
        self._executor = executor
        return executor

    def stop(self) -> None:
        executor, self._executor = self._executor, None
        if executor is not None:
            executor.kill_all()
            if self._poller is not None:
                executor.unregister(self._poller)
            executor.shutdown()

    def kill_all(self) -> None:
        """SIGKILL without waiting; callable from any thread."""
        executor = self._executor
        if executor is not None:
            executor.kill_all()


class InprocDraftHost:
    """Worker objects in this process."""

    def __init__(self, make_worker: Callable[[], WorkerProtocol] | None = None) -> None:
        self._make_worker = make_worker
        self._executor: InprocExecutor | None = None

    def start(self, config: EngineConfig) -> Executor:
        self._executor = InprocExecutor(config, self._make_worker)
        return self._executor

    def stop(self) -> None:
        if self._executor is not None:
            self._executor.shutdown()
            self._executor = None
