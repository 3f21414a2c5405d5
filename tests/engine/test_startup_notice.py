"""What a person at a terminal reads while an engine starts."""

from __future__ import annotations

import io
import threading

import pytest

from sempre.engine.frontend.progress import StartupNotice
from sempre.ipc.messages import StartupProgress

NEVER_S = 3600.0


class Terminal(io.StringIO):
    def __init__(self) -> None:
        super().__init__()
        self.was_written = threading.Event()

    def isatty(self) -> bool:
        return True

    def flush(self) -> None:
        self.was_written.set()


def test_a_long_start_is_explained_and_its_end_told() -> None:
    terminal = Terminal()
    with StartupNotice("tiny", terminal, delay_s=0.0):
        assert terminal.was_written.wait(60)
    first, last = terminal.getvalue().splitlines()
    assert first.startswith("sempre: starting tiny; the first start on a machine compiles the kernels")
    assert last.startswith("sempre: tiny is ready after ")


def test_phases_of_a_long_start_are_told_with_their_times() -> None:
    terminal = Terminal()
    with StartupNotice("tiny", terminal, delay_s=0.0) as notice:
        assert terminal.was_written.wait(60)
        notice.phase_ended(StartupProgress(phase="load", seconds=3.21, compile_seconds=2.5))
        notice.phase_ended(StartupProgress(phase="warm_up", seconds=0.56))
    assert terminal.getvalue().splitlines()[1:3] == [
        "sempre: loading the weights took 3.2 s, of which compiling kernels 2.5 s",
        "sempre: preparing the kernels and checking them took 0.6 s",
    ]


def test_phases_that_ended_before_a_start_was_long_are_told_then() -> None:
    terminal = Terminal()
    notice = StartupNotice("tiny", terminal, delay_s=0.0)
    notice.phase_ended(StartupProgress(phase="start", seconds=0.31))
    assert terminal.getvalue() == ""
    with notice:
        assert terminal.was_written.wait(60)
    assert terminal.getvalue().splitlines()[1] == "sempre: starting the processes took 0.3 s"


def test_a_short_start_is_silent() -> None:
    terminal = Terminal()
    with StartupNotice("tiny", terminal, delay_s=NEVER_S) as notice:
        notice.phase_ended(StartupProgress(phase="load", seconds=0.1))
    assert terminal.getvalue() == ""


def test_a_failed_start_is_never_called_ready() -> None:
    terminal = Terminal()

    def fail() -> None:
        with StartupNotice("tiny", terminal, delay_s=0.0):
            assert terminal.was_written.wait(60)
            raise ValueError("no model")

    with pytest.raises(ValueError, match="no model"):
        fail()
    assert "ready" not in terminal.getvalue()


def test_nothing_is_written_into_a_file() -> None:
    file = io.StringIO()
    threads_before = threading.active_count()
    with StartupNotice("tiny", file, delay_s=NEVER_S):
        assert threading.active_count() == threads_before
    assert file.getvalue() == ""
