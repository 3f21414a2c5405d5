"""When a signal may break in: not between the arrival of a frame and the end of what follows from it.

A handler that is written in Python raises wherever the main thread is, KeyboardInterrupt for one. Where that is inside
of a socket's `recv`, the frame is lost, and with it what it holds for everybody else.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

Handler = Callable[[int, FrameType | None], object]

# whose handlers commonly raise
_SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGALRM") if hasattr(signal, name)]
# of the user, while they are held
_handlers: dict[int, Handler] = {}
_waiting: dict[int, FrameType | None] = {}


@contextmanager
def held() -> Iterator[None]:
    """Inside, signals wait; they are handled at the end. Only the main thread is ever interrupted."""
    if _handlers or threading.current_thread() is not threading.main_thread():
        yield
        return
    _hold()
    try:
        yield
    finally:
        _release()


@contextmanager
def allowed() -> Iterator[None]:
    """A moment within `held` in which nothing can be lost: signals are handled."""
    if not _handlers or threading.current_thread() is not threading.main_thread():
        yield
        return
    _release()
    try:
        yield
    finally:
        _hold()


def _hold() -> None:
    for number in _SIGNALS:
        handler = signal.getsignal(number)
        if callable(handler):
            _handlers[number] = handler
            signal.signal(number, _note)


def _release() -> None:
    if not _handlers:
        return
    number, handler = _handlers.popitem()
    try:
        signal.signal(number, handler)
        if number in _waiting:
            handler(number, _waiting.pop(number))
    finally:
        # a handler that raises keeps none of the others waiting
        _release()


def _note(number: int, frame: FrameType | None) -> None:
    _waiting[number] = frame
