"""How many compute threads a worker gets."""

from __future__ import annotations

import os


def threads_per_worker(num_threads: int, num_workers: int) -> int:
    """`num_threads`, or for 0 the cores this process may use divided by the workers that share them, at least 1."""
    if num_threads > 0:
        return num_threads
    if hasattr(os, "sched_getaffinity"):
        cores = len(os.sched_getaffinity(0))
    else:
        cores = os.cpu_count() or 1
    return max(1, cores // num_workers)


def thread_variables(num_threads: int) -> dict[str, str]:
    """The environment that keeps every threading library of a worker at `num_threads`."""
    names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMBA_NUM_THREADS")
    return dict.fromkeys(names, str(num_threads))
