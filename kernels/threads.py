"""The compute threads of the CPU kernels. No kernel's result depends on their number.

numba is imported only when used: a worker on a GPU does without it.
"""

from __future__ import annotations


def set_num_threads(count: int) -> None:
    """Use `count` threads from now on, at most as many as numba started with (the usable cores)."""
    import numba

    numba.set_num_threads(max(1, min(count, numba.config.NUMBA_NUM_THREADS)))


def settle_threads() -> None:
    """Have every compute thread round as IEEE 754 says and keep subnormal numbers.

    A thread inherits the floating-point state of the one that started it, which may be any.
    """
    import numba

    from sempre.kernels.float_state import settle_threads

    settle_threads(numba.config.NUMBA_NUM_THREADS)


def get_num_threads() -> int:
    import numba

    return int(numba.get_num_threads())
