"""How many compute threads a worker gets."""

from __future__ import annotations

import os


def threads_per_worker(num_threads: int, num_workers: int) -> int:
    """`num_threads`, or for 0 the cores this process may use divided by the workers that share them, at least 1."""
    if num_threads > 0:
        return num_threads
    return max(1, _usable_cores() // num_workers)


def threads_beside_a_server(num_workers: int) -> int:
    """The threads of a worker that leave one core to an HTTP server, its event loop and the coordinator.

    Threads of a worker wait for each other, so one that has lost its core for a while to the server holds all up.
    """
    return max(1, (_usable_cores() - 1) // num_workers)


def _usable_cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


# About 0.1 ms of spinning: it bridges the gap between two kernels of a step, but a thread that has lost its core to
# another process lets the scheduler work instead of burning the core that its peer waits for.
SPIN_COUNT = "20000"


def thread_variables(num_threads: int) -> dict[str, str]:
    """The environment that keeps every threading library of a worker at `num_threads`.

    How long idle threads spin is the user's choice where OMP_WAIT_POLICY or GOMP_SPINCOUNT is set.
    """
    names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMBA_NUM_THREADS")
    variables = dict.fromkeys(names, str(num_threads))
    if not {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"} & set(os.environ):
        variables["GOMP_SPINCOUNT"] = SPIN_COUNT
    return variables
