"""An output as a sequence of blocks: reasoning, text and tool calls, in the order in which they were generated.

A stream and a whole answer are made of the same blocks, however the output was cut.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Literal

from sempre.engine.parsing import Arguments, CallStart, Content, Piece, Reasoning

Kind = Literal["reasoning", "text", "call"]


@dataclass
class Block:
    """`parts` are its text so far: of a call, the arguments."""

    index: int
    kind: Kind
    name: str = ""
    call_id: str = ""
    parts: list[str] = field(default_factory=list)

    @property
    def text(self) -> str:
        return "".join(self.parts)


@dataclass(frozen=True)
class Begun:
    """A block has begun."""

    block: Block


@dataclass(frozen=True)
class Grown:
    """A block has more text."""

    block: Block
    text: str


@dataclass(frozen=True)
class Ended:
    """A block is complete, or `is_cut` with the output."""

    block: Block
    is_cut: bool = False


Change = Begun | Grown | Ended


class Blocks:
    """Joins the pieces of one output."""

    def __init__(self, call_id: Callable[[int], str]) -> None:
        """`call_id` returns the id of the tool call with an index."""
        self._call_id = call_id
        self._all: list[Block] = []
        self._is_open = False

    def add(self, pieces: Iterable[Piece]) -> list[Change]:
        """Return what the pieces change."""
        changes: list[Change] = []
        for piece in pieces:
            match piece:
                case Content(text):
                    changes += self._grow("text", text)
                case Reasoning(text):
                    changes += self._grow("reasoning", text)
                case CallStart(index, name):
                    changes += self._begin("call", name, self._call_id(index))
                case Arguments(_, text):
                    changes.append(self._grown(text))
        return changes

    def end(self, *, is_cut: bool) -> list[Change]:
        """The output has ended."""
        if not self._is_open:
            return []
        self._is_open = False
        return [Ended(self._all[-1], is_cut)]

    @property
    def all(self) -> list[Block]:
        """The blocks so far."""
        return self._all

    @property
    def has_calls(self) -> bool:
        return any(block.kind == "call" for block in self._all)

    def _grow(self, kind: Kind, text: str) -> list[Change]:
        if not text:
            return []
        begun = [] if self._is_open and self._all[-1].kind == kind else self._begin(kind)
        return [*begun, self._grown(text)]

    def _begin(self, kind: Kind, name: str = "", call_id: str = "") -> list[Change]:
        ended = self.end(is_cut=False)
        self._all.append(Block(len(self._all), kind, name, call_id))
        self._is_open = True
        return [*ended, Begun(self._all[-1])]

    def _grown(self, text: str) -> Change:
        block = self._all[-1]
        block.parts.append(text)
        return Grown(block, text)
