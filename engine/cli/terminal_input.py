"""What is typed at a terminal, or pasted into it: several lines pasted at once are one text."""

from __future__ import annotations

import select
import sys

# what is pasted comes at once, what is typed does not
_PASTE_S = 0.05


class TerminalInput:
    """Reads texts from standard input; at a terminal with editing and history."""

    def __init__(self) -> None:
        self.is_interactive = sys.stdin.isatty()
        self._gathers_lines = False
        if self.is_interactive:
            # with it imported, input() edits lines and remembers them
            import readline

            # the terminal marks what is pasted, and a line break within it does not end the text; Python turns it off
            readline.parse_and_bind("set enable-bracketed-paste on")
            self._gathers_lines = "libedit" in (readline.__doc__ or "")

    def read(self) -> str:
        """Return the next text; of a file, the next line. Raises EOFError at the end."""
        lines = [input("> " if self.is_interactive else "")]
        while self._gathers_lines and select.select([sys.stdin], [], [], _PASTE_S)[0]:
            lines.append(input())
        return "\n".join(lines)
