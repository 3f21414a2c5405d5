"""Answers as they arrive: pieces of text on a display, then what reproduces them."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, Protocol, Self

from sempre.ipc.errors import RequestError
from sempre.ipc.log_lines import for_terminal, plain

if TYPE_CHECKING:
    from sempre.engine.frontend.prompts import PromptType
    from sempre.engine.llm import LLM
    from sempre.engine.sampling_params import SamplingParams


class Piece(NamedTuple):
    """What one event of a stream adds; facts that it does not state are None."""

    text: str
    seed: int | None = None
    fingerprint: str | None = None
    num_tokens: int | None = None
    """Tokens of the answer so far."""


@dataclass(slots=True)
class Answer:
    """An answer that was shown, perhaps only its beginning."""

    text: str = ""
    seed: int | None = None
    fingerprint: str | None = None
    num_tokens: int | None = None
    seconds: float = 0.0
    was_stopped: bool = False

    def add(self, piece: Piece) -> None:
        """Append a piece's text and take over its facts."""
        self.text += piece.text
        self.seed = self.seed if piece.seed is None else piece.seed
        self.fingerprint = piece.fingerprint or self.fingerprint
        self.num_tokens = self.num_tokens if piece.num_tokens is None else piece.num_tokens

    def facts(self) -> str:
        """What reproduces the answer, and its speed; empty if nothing is known."""
        known = [] if self.seed is None else [f"seed {self.seed}"]
        known += [f"fingerprint {self.fingerprint}"] if self.fingerprint else []
        if known and self.num_tokens and self.seconds > 0:
            known.append(f"{self.num_tokens:,} tokens, {self.num_tokens / self.seconds:.1f} tokens/s")
        return ", ".join(known)


class Display(Protocol):
    """Shows one answer; a context manager."""

    def __enter__(self) -> Self: ...

    def __exit__(self, *exception: object) -> None: ...

    def write(self, text: str) -> None:
        """Show more text."""
        ...


class PlainDisplay:
    """Writes the text as it is to standard output; at a terminal without control characters."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        pass

    def write(self, text: str) -> None:
        """Write and flush."""
        print(for_terminal(text, sys.stdout), end="", flush=True)


def show_answer(pieces: Iterable[Piece], display: Display) -> Answer | None:
    """Show an answer as it arrives; return it, or None if the request was refused. An interrupt stops it.

    At a terminal its facts follow on standard error.
    """
    answer = Answer()
    began = time.monotonic()
    try:
        with display:
            try:
                for piece in pieces:
                    answer.add(piece)
                    display.write(piece.text)
            except KeyboardInterrupt:
                answer.was_stopped = True
                display.write(" [stopped]")
    except RequestError as error:
        print(f"sempre: error: {plain(str(error))}", file=sys.stderr)
        return None
    answer.seconds = time.monotonic() - began
    print(flush=True)
    facts = answer.facts()
    if facts and sys.stderr.isatty():
        print(f"[{plain(facts)}]", file=sys.stderr)
    return answer


def engine_pieces(llm: LLM, prompt: PromptType, params: SamplingParams) -> Iterator[Piece]:
    """Yield the pieces of one completion; `params.output_kind` is DELTA."""
    num_tokens = 0
    for output in llm.stream(prompt, params):
        completion = output.outputs[0]
        num_tokens += len(completion.token_ids)
        yield Piece(completion.text, completion.seed, output.fingerprint, num_tokens)
