"""What is typed at a terminal: several lines are one message, a history is kept, commands are completed."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from pathlib import Path

import pexpect
import pytest

PROGRAM = """
from sempre.engine.cli.answers import Piece
from sempre.engine.cli.chat import converse
def ask(messages, sampling):
    print("asked", ascii(messages[-1]["content"]), len(messages), sampling, flush=True)
    yield Piece("yes", 7, "f", 1)
converse(ask, None, {})
print("end", flush=True)
"""
START, STOP = "\x1b[200~", "\x1b[201~"
PATIENCE_S = 60
# bracketed paste is switched on, and the cursor is shown after the first drawing
PROMPT = r"(?s)\x1b\[\?2004h.*?\x1b\[\?25h"


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    # a pseudo-terminal does not answer where its cursor is
    return {**os.environ, "XDG_STATE_HOME": str(tmp_path), "PROMPT_TOOLKIT_NO_CPR": "1", "TERM": "xterm"}


class Typist:
    """Types into the program, and reads what it says of its messages."""

    def __init__(self, environment: dict[str, str]) -> None:
        self._process = pexpect.spawn(
            sys.executable, ["-c", PROGRAM], env=environment, timeout=PATIENCE_S, encoding="utf-8"
        )
        self._process.delaybeforesend = None
        self._process.expect(PROMPT)

    def asks(self, keys: str) -> str:
        self._process.send(keys)
        self._process.expect(r"asked ([^\r]*)\r\n")
        asked: str = self._process.match[1]
        # the next text may be typed once the answer's facts are there
        self._process.expect_exact("seed 7, fingerprint f")
        self._process.expect(PROMPT)
        return asked

    def completes(self, keys: str, rest: str) -> None:
        self._process.send(keys)
        self._process.expect_exact(rest)

    def sees(self, keys: str, text: str) -> None:
        self._process.send(keys)
        self._process.expect_exact(text)
        self._process.expect(PROMPT)

    def ends(self) -> None:
        self._process.send("/exit\r")
        self._process.expect_exact("end\r\n")
        self._process.expect(pexpect.EOF)
        self._process.close()
        assert self._process.exitstatus == 0


def test_a_line_is_a_message(environment: dict[str, str]) -> None:
    typist = Typist(environment)
    assert typist.asks("one\r") == "'one' 1 {}"
    assert typist.asks("two\r") == "'two' 3 {}"
    typist.ends()


@pytest.mark.parametrize("text", ["one\ntwo", "def f():\n    return 1\n\nf()", "/etc\nis a folder"])
def test_lines_pasted_at_once_are_one_message(environment: dict[str, str], text: str) -> None:
    typist = Typist(environment)
    assert typist.asks(f"{START}{text}{STOP}\r") == f"{text!a} 1 {{}}"
    assert typist.asks("three\r") == "'three' 3 {}"
    typist.ends()


def test_lines_are_typed_with_a_backslash_or_alt_enter(environment: dict[str, str]) -> None:
    typist = Typist(environment)
    assert typist.asks("one\\\rtwo\x1b\rthree\r") == "'one\\ntwo\\nthree' 1 {}"
    typist.ends()


def test_the_history_is_kept_for_its_owner(environment: dict[str, str], tmp_path: Path) -> None:
    typist = Typist(environment)
    typist.asks("a question\r")
    typist.ends()
    file = tmp_path / "sempre" / "chat-history"
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    again = Typist(environment)
    # the newest entry is /exit
    assert again.asks("\x1b[A\x1b[A\r") == "'a question' 1 {}"
    again.ends()


def test_a_history_that_cannot_be_kept_is_said(environment: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "sempre").write_text("not a folder")
    process = pexpect.spawn(sys.executable, ["-c", PROGRAM], env=environment, timeout=PATIENCE_S, encoding="utf-8")
    process.expect_exact("sempre: the history is not kept: ")
    process.expect(PROMPT)
    process.sendeof()
    process.expect_exact("end")
    process.close()


def test_commands_and_parameters_are_completed(environment: dict[str, str]) -> None:
    typist = Typist(environment)
    typist.completes("/see\t", "d")
    typist.sees(" 5\r", "seed: 5")
    typist.completes("/set temperat\t", "ure")
    typist.sees(" 0.5\r", "temperature 0.5")
    assert typist.asks("x\r") == "'x' 1 {'seed': 5, 'temperature': 0.5}"
    typist.ends()


def test_ctrl_c_empties_what_is_typed_and_then_ends(environment: dict[str, str]) -> None:
    typist = Typist(environment)
    assert typist.asks("wrong\x03right\r") == "'right' 1 {}"
    process = typist._process
    process.send("\x03")
    process.expect_exact("KeyboardInterrupt")
    process.expect(pexpect.EOF)
    process.close()


def test_lines_of_a_file_are_messages_each() -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], input="one\ntwo\n", capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout.split("\n")[:4] == ["asked 'one' 1 {}", "yes", "asked 'two' 3 {}", "yes"]
    assert done.stderr == ""
