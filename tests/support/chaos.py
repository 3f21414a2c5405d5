"""Random signals to the processes of an engine, at any moment: while they start, load, serve, restart or end.

Everything is drawn from a seed, but which process a signal meets, and what that is doing just then, is up to the clock.
"""

from __future__ import annotations

import random
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress

import psutil

COORDINATOR, WORKER, DRAFT_WORKER = "coordinator", "worker", "draft worker"
# of the engines that are harmed; the ranks after those are draft workers
NUM_REPLICAS = 2
# a process that is younger imports, loads or tests itself
_YOUNG_S = 2.5
_MOST_IN_VAIN = 3


def kind_of(process: psutil.Process) -> str | None:
    """What a process is to its engine; None: nothing, or it has ended."""
    try:
        words = process.cmdline()
    except psutil.Error:
        return None
    if "sempre.engine.coordinator" in words:
        return COORDINATOR
    if "sempre.workers" in words and "--connect" in words:
        return WORKER if int(words[words.index("--rank") + 1]) < NUM_REPLICAS else DRAFT_WORKER
    return None


def engine_processes(root_pid: int) -> list[tuple[psutil.Process, str]]:
    """What of `root_pid` and its descendants is a process of an engine, and what it is to that."""
    try:
        root = psutil.Process(root_pid)
        family = [root, *root.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []
    return [(process, kind) for process in family if (kind := kind_of(process)) is not None]


class Chaos:
    """A thread that harms the engines' processes at and below `root()` while the context lasts; `counts` of what.

    After a few faults without progress it waits: on a slow machine an engine would never come to anything.
    """

    def __init__(
        self,
        root: Callable[[], int],
        progress: Callable[[], int],
        *,
        seed: int,
        mean_pause_s: float,
        launcher: bool = False,
    ) -> None:
        """`progress` counts what has been finished. `launcher`: the root itself is killed now and then, for whoever
        supervises it to start it again."""
        self.counts: Counter[str] = Counter()
        self._root = root
        self._progress = progress
        self._drawn = random.Random(seed)
        self._mean_pause_s = mean_pause_s
        self._launcher = launcher
        self._ended = threading.Event()
        self._stopped: list[tuple[float, psutil.Process]] = []
        self._thread = threading.Thread(target=self._run, name="chaos")

    def __enter__(self) -> Chaos:
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._ended.set()
        self._thread.join()

    @property
    def num_faults(self) -> int:
        return sum(count for name, count in self.counts.items() if not name.startswith("("))

    def _run(self) -> None:
        next_fault = time.monotonic()
        finished, num_in_vain = self._progress(), 0
        while not self._ended.wait(0.02):
            now = time.monotonic()
            self._resume(now)
            if finished != self._progress():
                finished, num_in_vain = self._progress(), 0
            if now >= next_fault and num_in_vain < _MOST_IN_VAIN:
                next_fault = now + self._drawn.expovariate(1.0 / self._mean_pause_s)
                num_in_vain += 1
                self._harm()
        self._resume(float("inf"))

    def _harm(self) -> None:
        if self._launcher and self._drawn.random() < 0.03:
            self._signal(psutil.Process(self._root()), "launcher", signal.SIGKILL)
            return
        found = engine_processes(self._root())
        # two at once, now and then
        victims = self._drawn.sample(found, min(len(found), self._drawn.choice([1, 1, 1, 2])))
        if len(victims) == 2:
            self.counts["(two at once)"] += 1
        for process, kind in victims:
            if self._drawn.random() < 0.6:
                self._signal(process, kind, signal.SIGKILL)
            else:
                self._signal(process, kind, signal.SIGSTOP)
                # shorter and longer than a draft worker is waited for, and than a process may be silent
                until = time.monotonic() + self._drawn.choice([0.1, 0.4, 0.8, 2.0, 5.0])
                self._stopped.append((until, process))

    def _signal(self, process: psutil.Process, kind: str, number: signal.Signals) -> None:
        with suppress(psutil.NoSuchProcess):
            is_young = time.time() - process.create_time() < _YOUNG_S
            process.send_signal(number)
            self.counts[f"{number.name} {kind}"] += 1
            if is_young:
                self.counts[f"(of them while it started: {kind})"] += 1

    def _resume(self, now: float) -> None:
        for until, process in [entry for entry in self._stopped if entry[0] <= now]:
            self._stopped.remove((until, process))
            with suppress(psutil.NoSuchProcess):
                process.send_signal(signal.SIGCONT)
