"""Worker objects in this process: no sockets, no other processes.

The workers seed this process's global generators, which is the cost of multiprocessing=False.
"""

from __future__ import annotations

import os
import socket
from collections import deque
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import TYPE_CHECKING, TypeVar

from sempre.engine.executor.base import draft_ranks, worker_name
from sempre.ipc.config import EngineConfig
from sempre.ipc.error_info import describe
from sempre.ipc.errors import SempreError, WorkerDied
from sempre.ipc.messages import (
    PROTOCOL_VERSION,
    ExecuteStep,
    StepResult,
    WorkerCommand,
    WorkerEvent,
    WorkerHealth,
    WorkerHello,
    WorkerReady,
)
from sempre.ipc.process_facts import resident_bytes

if TYPE_CHECKING:
    from sempre.workers.main import WorkerProtocol

Result = TypeVar("Result")


class InprocExecutor:
    """One worker per rank; each computes when its event is requested."""

    def __init__(self, config: EngineConfig, make_worker: Callable[[], WorkerProtocol] | None = None) -> None:
        self._config = config
        self.world_size = config.world_size
        self._make_worker = make_worker or _default_worker
        self._computing = _compute_state() if make_worker is None else nullcontext
        self._workers: dict[int, WorkerProtocol] = {}
        self._commands: deque[tuple[int, WorkerCommand]] = deque()
        self._hellos: deque[tuple[int, WorkerHello]] = deque()
        ranks = [*range(self.world_size), *draft_ranks(config)]
        self._starting = set(ranks)
        """not ready yet, and not replacing others"""
        for rank in ranks:
            self._start(rank)

    def _start(self, rank: int) -> None:
        with self._computing():
            # imports for a worker may create tensors
            self._workers[rank] = self._make_worker()
        self._hellos.append((rank, WorkerHello(protocol_version=PROTOCOL_VERSION, rank=rank, pid=os.getpid())))

    def restart(self, rank: int, cause: str) -> None:
        self.abandon(rank)
        self._start(rank)

    def abandon(self, rank: int) -> None:
        self._starting.discard(rank)
        self._commands = deque(command for command in self._commands if command[0] != rank)
        self._hellos = deque(hello for hello in self._hellos if hello[0] != rank)
        worker = self._workers.pop(rank, None)
        if worker is not None:
            with self._computing():
                worker.shutdown()

    def send(self, rank: int, command: WorkerCommand) -> None:
        self._commands.append((rank, command))

    def receive(self) -> tuple[int, WorkerEvent] | None:
        if self._hellos:
            return self._hellos.popleft()
        while self._commands and isinstance(step := self._commands[0][1], ExecuteStep):
            rank = self._commands[0][0]
            worker = self._workers[rank]
            if worker.steps_in_flight and worker.step_done():
                break
            self._commands.popleft()
            result = self._checked(rank, partial(_start_step, worker, step))
            if result is not None:
                return rank, result
        for rank, worker in self._workers.items():
            if worker.steps_in_flight:
                return rank, self._checked(rank, worker.collect)
        if not self._commands:
            return None
        rank, command = self._commands.popleft()
        return rank, self._answer(rank, command)

    def blame(self, rank: int, error: Exception) -> WorkerDied:
        info = describe(error, rank)
        cause = f"{info.type}: {info.message}"
        text = f"{worker_name(self._config, rank)} failed: {cause}"
        return WorkerDied(text, rank=rank, cause=cause, worker_traceback=info.traceback)

    def health(self) -> list[WorkerHealth]:
        """Cannot be called while a worker computes, so nothing is ever late."""
        return [
            WorkerHealth(
                rank=rank,
                pid=os.getpid(),
                state="starting" if rank in self._starting else "ready",
                role="target" if rank < self.world_size else "draft",
                host=socket.gethostname(),
                resident_bytes=resident_bytes(),
                process_state="running",
            )
            for rank in sorted(self._workers)
        ]

    def shutdown(self) -> None:
        with self._computing():
            for worker in self._workers.values():
                worker.shutdown()
        self._workers.clear()

    def _answer(self, rank: int, command: WorkerCommand) -> WorkerEvent:
        from sempre.workers.main import run_command

        event = self._checked(rank, partial(run_command, self._workers[rank], command))
        if isinstance(event, WorkerReady):
            self._starting.discard(rank)
        return event

    def _checked(self, rank: int, action: Callable[[], Result]) -> Result:
        """Run `action`; convert its error to this worker's error."""
        try:
            with self._computing():
                return action()
        except SempreError as error:
            if rank in self._starting:
                raise
            raise self.blame(rank, error) from error
        except Exception as error:
            raise self.blame(rank, error) from error


def _start_step(worker: WorkerProtocol, step: ExecuteStep) -> StepResult | None:
    """Start a step; its result if that is there at once."""
    worker.submit(step)
    return worker.collect() if worker.steps_in_flight == 1 and worker.step_done() else None


def _compute_state() -> Callable[[], AbstractContextManager[None]]:
    from sempre.workers.process_state import ComputeState

    return ComputeState().entered


def _default_worker() -> WorkerProtocol:
    # imports torch, which the rest of the engine does not need
    from sempre.workers.worker import Worker

    return Worker()
