"""Progress at a terminal: a bar for `LLM.generate`, a line for the start-up."""

from __future__ import annotations

import logging
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Any, Self, TextIO

from sempre.engine.frontend.output_processor import RequestState
from sempre.engine.outputs import RequestOutput
from sempre.ipc.messages import StartupProgress

logger = logging.getLogger(__name__)

UseTqdm = bool | Callable[..., Any]
"""True, False, or a callable with tqdm's interface that makes a bar."""
# A normal start of a small model is faster; a first start, which compiles kernels, takes several times as long.
DELAY_S = 2.0
_REFRESH_S = 0.1
# less is no news
_MIN_COMPILE_S = 0.1
_PHASES = {
    "start": "starting the processes",
    "load": "loading the weights",
    "warm_up": "preparing the kernels and checking them",
}


class GenerationProgress:
    """Counts finished sequences, and tokens as they arrive."""

    def __init__(self, use_tqdm: UseTqdm, num_sequences: int) -> None:
        self._bar: Any = None
        self._num_input_tokens = 0
        self._num_output_tokens = 0
        self._counted: dict[str, int] = {}
        self._shown_at = time.monotonic()
        if use_tqdm is False:
            return
        self._bar = _bar(use_tqdm, num_sequences, postfix=_speeds(0, 0.0, 0.0))

    def count(self, request: RequestState) -> None:
        """Count the tokens of a request that goes on; the bar is drawn again at most every 100 ms."""
        if self._bar is None:
            return
        self._add(request.request_id, sum(sequence.num_tokens for sequence in request.sequences))
        if time.monotonic() - self._shown_at >= _REFRESH_S:
            self._show()
            self._bar.refresh()

    def finish(self, output: RequestOutput) -> None:
        """Count a finished request."""
        if self._bar is None:
            return
        self._num_input_tokens += len(output.prompt_token_ids) * len(output.outputs)
        self._add(output.request_id, sum(len(completion.token_ids) for completion in output.outputs))
        self._show()
        self._bar.update(len(output.outputs))

    def _add(self, request_id: str, num_tokens: int) -> None:
        self._num_output_tokens += num_tokens - self._counted.get(request_id, 0)
        self._counted[request_id] = num_tokens

    def _show(self) -> None:
        self._shown_at = time.monotonic()
        elapsed = self._bar.format_dict["elapsed"]
        if elapsed > 0.0:
            num_output = self._num_output_tokens
            self._bar.postfix = _speeds(num_output, self._num_input_tokens / elapsed, num_output / elapsed)

    def close(self) -> None:
        """Close the bar."""
        if self._bar is not None:
            self._bar.close()


@contextmanager
def search_progress(use_tqdm: UseTqdm, num_prompts: int) -> Iterator[Callable[[int], object]]:
    """A bar of a beam search; yields what is called with the number of prompts done so far."""
    if use_tqdm is False:
        yield lambda num_done: None
        return
    bar = _bar(use_tqdm, num_prompts)
    try:
        yield lambda num_done: bar.update(num_done - bar.n)
    finally:
        bar.close()


def _bar(use_tqdm: UseTqdm, total: int, **keywords: Any) -> Any:
    # a bar of the notebook in one
    from tqdm.auto import tqdm

    make: Callable[..., Any] = tqdm if use_tqdm is True else use_tqdm  # type: ignore[assignment]
    return make(total=total, desc="Processed prompts", dynamic_ncols=True, **keywords)


def _speeds(num_tokens: int, input_speed: float, output_speed: float) -> str:
    return f"{num_tokens} tokens, est. speed input: {input_speed:.2f} toks/s, output: {output_speed:.2f} toks/s"


def log_progress(progress: StartupProgress) -> None:
    """Log one finished phase of the start-up."""
    logger.info("start-up: %s took %.2f s%s", progress.phase, progress.seconds, _compiled(progress))


def _compiled(progress: StartupProgress) -> str:
    if progress.compile_seconds < _MIN_COMPILE_S:
        return ""
    return f", of which compiling kernels {progress.compile_seconds:.1f} s"


class StartupNotice:
    """Context manager of a start-up that writes to `stream` if it takes longer than `delay_s`: phases and the end.

    Silent unless at a terminal or in a notebook. Phases are logged in any case.
    """

    def __init__(self, model: str, stream: TextIO | None = None, delay_s: float = DELAY_S) -> None:
        self._model = model
        self._stream = sys.stderr if stream is None else stream
        self._began = 0.0
        self._told = threading.Event()
        # phases end in this thread or the engine's, the timer has its own
        self._lock = threading.Lock()
        self._phases: list[str] = []
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
            self._write(f"sempre: {self._model} is ready after {time.monotonic() - self._began:.1f} s")

    def phase_ended(self, progress: StartupProgress) -> None:
        """Tell of a phase if the start is a long one, at once or when it turns out to be."""
        log_progress(progress)
        with self._lock:
            name = _PHASES.get(progress.phase, progress.phase)
            self._phases.append(f"sempre: {name} took {progress.seconds:.1f} s{_compiled(progress)}")
            self._write_phases()

    def _tell(self) -> None:
        with self._lock:
            self._told.set()
            self._write(
                f"sempre: starting {self._model}; the first start on a machine compiles the kernels and can take a "
                "minute"
            )
            self._write_phases()

    def _write_phases(self) -> None:
        if self._told.is_set():
            for line in self._phases:
                self._write(line)
            self._phases.clear()

    def _write(self, line: str) -> None:
        print(line, file=self._stream, flush=True)
