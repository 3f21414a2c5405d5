"""Markdown at a terminal while it arrives: finished blocks stay, the last one is drawn again as it grows."""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Iterator
from typing import Self

from markdown_it import MarkdownIt
from rich.console import Console, ConsoleOptions, RenderableType
from rich.live import Live
from rich.markdown import Markdown
from rich.segment import Segment

from sempre.ipc.log_lines import for_terminal

_REDRAW_S = 0.08
_FENCE = re.compile(r" {0,3}(`{3,}|~{3,})")
# HTML would vanish from what is shown, so it stays text
_PARSER = MarkdownIt("commonmark", {"html": False}).enable(["table", "strikethrough"])


class MarkdownDisplay:
    """Shows one answer as Markdown; the target of a link is visible, and control characters are not obeyed."""

    def __init__(self, console: Console | None = None) -> None:
        self._console = console or Console(highlight=False)
        self._growing = ""
        self._drawn_at = 0.0
        self._live = Live(console=self._console, auto_refresh=False, transient=True)

    def __enter__(self) -> Self:
        self._live.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._live.update("")
        self._live.stop()
        if self._growing.strip():
            self._console.print(_rendered(self._growing))
        self._growing = ""

    def write(self, text: str) -> None:
        """Print the blocks that `text` finishes, and draw the growing one at most every 80 ms."""
        finished, self._growing = split_blocks(self._growing + for_terminal(text, sys.stdout))
        for block in finished:
            self._live.update("", refresh=True)
            self._console.print(_rendered(block))
            self._console.print()
        now = time.monotonic()
        if finished or now - self._drawn_at >= _REDRAW_S:
            self._live.update(_LastLines(_rendered(self._growing)), refresh=True)
            self._drawn_at = now


def split_blocks(text: str) -> tuple[list[str], str]:
    """Split text into blocks that more text cannot change, and the rest.

    A cut is before an unindented line after an empty one, outside fenced code: an indented line may belong to the list
    before it.
    """
    blocks: list[str] = []
    block = fence = ""
    after_empty = False
    for line in text.splitlines(keepends=True):
        if after_empty and not fence and not line[0].isspace():
            blocks.append(block)
            block = ""
        mark = _FENCE.match(line)
        if mark and not fence:
            fence = mark[1]
        elif mark and mark[1].startswith(fence) and not line[mark.end() :].strip():
            fence = ""
        after_empty = not line.strip()
        block += line
    return blocks, block


def _rendered(text: str) -> Markdown:
    document = Markdown("", hyperlinks=False)
    document.parsed = _PARSER.parse(text)
    return document


class _LastLines:
    """The end of what does not fit on the screen."""

    def __init__(self, whole: RenderableType) -> None:
        self._whole = whole

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Segment]:
        for line in console.render_lines(self._whole, options.update(height=None), pad=False)[-(console.height - 2) :]:
            yield from line
            yield Segment.line()
