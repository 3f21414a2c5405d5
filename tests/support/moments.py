"""Things that happen while a test does something else."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def in_a_moment(action: Callable[[], object]) -> Iterator[None]:
    """Run `action` from another thread while the body runs, and wait for its end."""
    thread = threading.Thread(target=lambda: (time.sleep(0.4), action()))
    thread.start()
    try:
        yield
    finally:
        thread.join()
