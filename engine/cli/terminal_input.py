"""Reads texts from a terminal, with editing, completion and a history that is kept, or the lines of a file."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from prompt_toolkit.completion import CompleteEvent, Completer, Completion
    from prompt_toolkit.document import Document
    from prompt_toolkit.history import History
    from prompt_toolkit.key_binding import KeyBindings


class TerminalInput:
    """Reads texts from standard input."""

    def __init__(self, name: str, completions: Callable[[str], Sequence[str]] = lambda text: ()) -> None:
        """`name` is that of the history's file; `completions` returns the words that may follow a text."""
        self.is_interactive = sys.stdin.isatty()
        if not self.is_interactive:
            return
        # a tenth of a second that help and pipes do without
        from prompt_toolkit import PromptSession
        from prompt_toolkit.output import create_output

        self._session: PromptSession[str] = PromptSession(
            "> ",
            multiline=True,
            prompt_continuation="  ",
            history=_history(name),
            completer=_completer(completions),
            complete_while_typing=False,
            key_bindings=_keys(),
            output=create_output(always_prefer_tty=True),
        )

    def read(self) -> str:
        """Return the next text, or the next line of a file. Raises EOFError at the end."""
        return self._session.prompt() if self.is_interactive else input()


def history_file(name: str) -> Path:
    """Return `$XDG_STATE_HOME/sempre/<name>-history`, by default below `~/.local/state`."""
    given = os.environ.get("XDG_STATE_HOME", "")
    # The XDG base directory specification says to ignore a relative value.
    base = Path(given) if os.path.isabs(given) else Path.home() / ".local" / "state"
    return base / "sempre" / f"{name}-history"


def _history(name: str) -> History:
    from prompt_toolkit.history import FileHistory, InMemoryHistory

    path = history_file(name)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # only its owner reads what was asked
        os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600))
    except OSError as error:
        print(f"sempre: the history is not kept: {path}: {error.strerror}", file=sys.stderr)
        return InMemoryHistory()
    return FileHistory(str(path))


def _completer(completions: Callable[[str], Sequence[str]]) -> Completer:
    from prompt_toolkit.completion import Completer, Completion

    class Words(Completer):
        def get_completions(self, document: Document, complete_event: CompleteEvent) -> Iterator[Completion]:
            text = document.text_before_cursor
            word = text.rpartition(" ")[2]
            return (Completion(found, -len(word)) for found in completions(text) if found.startswith(word))

    return Words()


def _keys() -> KeyBindings:
    """Enter sends, Alt-Enter and a backslash before Enter begin a new line, Ctrl-C first empties what is typed."""
    from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent

    keys = KeyBindings()

    @keys.add("enter")
    def send(event: KeyPressEvent) -> None:
        buffer = event.current_buffer
        if buffer.document.text_before_cursor.endswith("\\"):
            buffer.delete_before_cursor()
            buffer.insert_text("\n")
        else:
            buffer.validate_and_handle()

    @keys.add("escape", "enter")
    def new_line(event: KeyPressEvent) -> None:
        event.current_buffer.insert_text("\n")

    @keys.add("c-c")
    def clear(event: KeyPressEvent) -> None:
        if event.current_buffer.text:
            event.current_buffer.reset()
        else:
            event.app.exit(exception=KeyboardInterrupt())

    return keys
