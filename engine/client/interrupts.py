"""When signals are handled: not between the arrival of a frame and the end of its processing.

A Python handler raises wherever the main thread is, for example KeyboardInterrupt. Inside a socket's `recv`, that loses
the frame with the outputs of all requests in it.

A handler may raise here too, between any two instructions. So nothing depends on a complete installation or
restoration: a leftover stand-in does what the user's handler does.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import ClassVar

Handler = Callable[[int, FrameType | None], object]

# signals whose handlers typically raise; checking all signals would cost as much as a small step
_NAMES = ("SIGINT", "SIGTERM", "SIGALRM", "SIGHUP", "SIGUSR1", "SIGUSR2")
_SIGNALS = [getattr(signal, name) for name in _NAMES if hasattr(signal, name)]


class _StandIn:
    """Replaces one of the user's handlers: records the signal while signals are held, otherwise handles it."""

    holding = False
    waiting: ClassVar[dict[_StandIn, FrameType | None]] = {}
    installed: ClassVar[dict[int, _StandIn]] = {}

    def __init__(self, number: int, handler: Handler) -> None:
        self.number = number
        self.handler = handler

    def __call__(self, number: int, frame: FrameType | None) -> None:
        if _StandIn.holding:
            _StandIn.waiting[self] = frame
            return
        try:
            self.handler(number, frame)
        finally:
            _handle_waiting()


@contextmanager
def held() -> Iterator[None]:
    """Hold signals inside the context and handle them at its end. Only the main thread is ever interrupted."""
    if _StandIn.holding or threading.current_thread() is not threading.main_thread():
        yield
        return
    try:
        _hold()
        yield
    finally:
        _release()


@contextmanager
def allowed() -> Iterator[None]:
    """Handle signals within `held`, at a point where nothing can be lost."""
    if not _StandIn.holding or threading.current_thread() is not threading.main_thread():
        yield
        return
    try:
        _release()
        yield
    finally:
        _hold()


def _hold() -> None:
    for number in _SIGNALS:
        handler = signal.getsignal(number)
        if callable(handler) and not isinstance(handler, _StandIn):
            _StandIn.installed[number] = _StandIn(number, handler)
            signal.signal(number, _StandIn.installed[number])
    _StandIn.holding = True


def _release() -> None:
    _StandIn.holding = False
    try:
        _handle_waiting()
    finally:
        for number, stand_in in list(_StandIn.installed.items()):
            if isinstance(signal.getsignal(number), _StandIn):
                signal.signal(number, stand_in.handler)
            del _StandIn.installed[number]


def _handle_waiting() -> None:
    if not _StandIn.waiting:
        return
    stand_in, frame = _StandIn.waiting.popitem()
    try:
        stand_in.handler(stand_in.number, frame)
    finally:
        # a handler that raises does not block the others
        _handle_waiting()
