"""Number of compute threads of a worker."""

from __future__ import annotations

import os


def threads_per_worker(num_threads: int, num_workers: int) -> int:
    """`num_threads`, or if 0 the cores of this process divided by the workers that share them, at least 1."""
    if num_threads > 0:
        return num_threads
    return max(1, _usable_cores() // num_workers)


def threads_beside_a_server(num_workers: int) -> int:
    """Threads per worker that leave one core for an HTTP server, its event loop and the coordinator.

    A worker's threads wait for each other, so one that loses its core to the server delays all.
    """
    return max(1, (_usable_cores() - 1) // num_workers)


def _usable_cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


# About 0.1 ms of spinning: enough to bridge the gap between two kernels of a step, but short enough that threads do
# not keep spinning on a core that a descheduled peer needs.
SPIN_COUNT = "20000"


def thread_variables(num_threads: int) -> dict[str, str]:
    """Environment variables that limit every threading library of a worker to `num_threads`.

    The user's OMP_WAIT_POLICY or GOMP_SPINCOUNT, if set, decide how long idle threads spin.
    """
    names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMBA_NUM_THREADS")
    variables = dict.fromkeys(names, str(num_threads))
    if not {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"} & set(os.environ):
        variables["GOMP_SPINCOUNT"] = SPIN_COUNT
    return variables
