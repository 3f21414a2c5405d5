"""Several lines that are pasted into a terminal are one message."""

from __future__ import annotations

import os
import pty
import select
import subprocess
import sys
import time

import pytest

PROGRAM = """
from sempre.engine.cli.chat import _converse
_converse(lambda messages: print("asked", ascii(messages[-1]["content"]), flush=True), [])
print("end", flush=True)
"""
START, STOP = "\x1b[200~", "\x1b[201~"


def converse(*typed: str) -> list[str]:
    """The messages that a conversation at a terminal sees; each text is typed when the one before was answered."""
    ours, theirs = pty.openpty()
    with subprocess.Popen([sys.executable, "-c", PROGRAM], stdin=theirs, stdout=theirs, stderr=theirs) as process:
        os.close(theirs)
        shown = ""
        for number, text in enumerate([*typed, "/exit\r"]):
            shown = _read_until(ours, shown, "> ", number + 1)
            os.write(ours, text.encode())
        shown = _read_until(ours, shown, "end\r\n", 1)
        assert process.wait(20) == 0
    os.close(ours)
    return [line.partition("asked ")[2] for line in shown.splitlines() if "asked " in line]


def _read_until(terminal: int, shown: str, mark: str, count: int) -> str:
    deadline = time.monotonic() + 60
    while shown.count(mark) < count:
        assert time.monotonic() < deadline, shown
        if select.select([terminal], [], [], 0.2)[0]:
            shown += os.read(terminal, 65536).decode(errors="replace")
    return shown


def test_a_line_is_a_message() -> None:
    assert converse("one\r", "two\r") == ["'one'", "'two'"]


@pytest.mark.parametrize("text", ["one\ntwo", "def f():\n    return 1\n\nf()", "/etc\nis a folder"])
def test_lines_pasted_at_once_are_one_message(text: str) -> None:
    assert converse(f"{START}{text}{STOP}\r", "three\r") == [ascii(text), "'three'"]


def test_lines_of_a_file_are_messages_each() -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], input="one\ntwo\n", capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout.split("\n")[:2] == ["asked 'one'", "asked 'two'"]
