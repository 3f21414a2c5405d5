"""Processes that share memory wait for each other: until all have come to a meeting, or until one has gone on.

Contract: every process has a line of LINE bytes, of a meeting at `lines` + index * LINE, all zero at first. The
meetings are numbered 1, 2, 3, …; what a process wrote before meeting n, or before it published a number, is seen by the
others after it. Nobody can be more than one meeting ahead of another. Numbers are those modulo 2**32. A process that
waits first looks again and again, then sleeps in the kernel until it is woken.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from sempre.kernels.lazy_module import LazyModule

if TYPE_CHECKING:
    from sempre.kernels.exchange import cpu as _cpu
else:
    _cpu = LazyModule(__name__, "cpu")

__all__ = ["LINE", "await_change", "enter", "meet", "publish"]

LINE = 64


def enter(lines: torch.Tensor, index: int) -> bool:
    """Take the line of process `index`; False if another process has taken it. `lines` int8 [processes * LINE]."""
    return _cpu.enter(lines, index)


def meet(lines: torch.Tensor, index: int, number: int, *, spins: int, wait_s: float) -> int | None:
    """Come to meeting `number`, and wait for the others; called again with the same number to wait on.

    `spins`: how often to look before sleeping. Returns None once all have come, or after about `wait_s` a process that
    has not.
    """
    return _cpu.meet(lines, index, number, spins=spins, wait_s=wait_s)


def publish(line: torch.Tensor, number: int) -> None:
    """Write a number to this process's line, int8 [LINE], and wake those that wait for it."""
    _cpu.publish(line, number)


def await_change(line: torch.Tensor, before: int, *, spins: int, wait_s: float) -> int:
    """Wait until another process's line has another number than `before`; return what it has.

    `spins`: how often to look before sleeping. After about `wait_s` it may still have `before`; 0 does not sleep.
    """
    return _cpu.await_change(line, before, spins=spins, wait_s=wait_s)
