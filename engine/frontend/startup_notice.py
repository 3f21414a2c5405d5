"""The line that tells a person at a terminal why nothing is seen yet."""

from __future__ import annotations

import sys
import threading
import time
from types import TracebackType
from typing import Self, TextIO

# Ordinary starts of a small model end before; a first start, which compiles kernels, takes several times as long.
DELAY_S = 2.0


class StartupNotice:
    """Context of a start-up: writes one line to `stream` when it lasts longer than `delay_s`, and one at its end.

    Silent unless a person reads along: at a terminal, or in a notebook. Phases are logged in any case.
    """

    def __init__(self, model: str, stream: TextIO | None = None, delay_s: float = DELAY_S) -> None:
        self._model = model
        self._stream = sys.stderr if stream is None else stream
        self._began = 0.0
        self._told = threading.Event()
        self._timer = threading.Timer(delay_s, self._tell)
        self._timer.daemon = True

    def __enter__(self) -> Self:
        self._began = time.monotonic()
        if self._stream is not None and (self._stream.isatty() or "ipykernel" in sys.modules):
            self._timer.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._timer.ident is None:
            return
        self._timer.cancel()
        self._timer.join()
        if self._told.is_set() and error is None:
            self._write(f"sempre: {self._model} is ready after {time.monotonic() - self._began:.0f} s")

    def _tell(self) -> None:
        self._told.set()
        self._write(
            f"sempre: starting {self._model}; the first start on a machine compiles the kernels and can take a minute"
        )

    def _write(self, line: str) -> None:
        print(line, file=self._stream, flush=True)
