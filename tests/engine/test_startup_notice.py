"""What a person at a terminal reads while an engine starts."""

from __future__ import annotations

import io
import threading

import pytest

from sempre.engine.frontend.progress import StartupNotice

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


def test_a_short_start_is_silent() -> None:
    terminal = Terminal()
    with StartupNotice("tiny", terminal, delay_s=NEVER_S):
        pass
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
