"""A meeting of processes in memory that they share: each waits until all have come.

Contract: every process has a line of LINE bytes at `lines` + index * LINE, all zero at first. The meetings are numbered
1, 2, 3, …; what a process wrote before meeting n is seen by the others after it. Nobody can be more than one meeting
ahead of another. A process that waits first looks again and again, then sleeps in the kernel until it is woken.
"""

from __future__ import annotations

import torch

__all__ = ["LINE", "enter", "meet"]

LINE = 64


def enter(lines: torch.Tensor, index: int) -> bool:
    """Take the line of process `index`; False if another process has taken it. `lines` int8 [processes * LINE]."""
    from sempre.kernels.exchange import cpu

    return cpu.enter(lines, index)


def meet(lines: torch.Tensor, index: int, number: int, *, spins: int, wait_s: float) -> int | None:
    """Come to meeting `number`, and wait for the others; called again with the same number to wait on.

    `spins`: how often to look before sleeping. Returns None once all have come, or after about `wait_s` a process that
    has not.
    """
    from sempre.kernels.exchange import cpu

    return cpu.meet(lines, index, number, spins=spins, wait_s=wait_s)
