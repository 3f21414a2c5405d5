"""A conversation: its messages, its settings, and the commands that change them."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from sempre.engine.cli.answers import Answer, Display, Piece, show_answer
from sempre.engine.cli.parser import UsageError
from sempre.engine.near_names import near_name
from sempre.engine.sampling_params import SamplingParams
from sempre.ipc.errors import ConfigError, ServerError
from sempre.ipc.log_lines import plain

Message = dict[str, str]
Ask = Callable[[Sequence[Message], Mapping[str, Any]], Iterable[Piece]]
"""Yields the pieces of the answer to these messages with these sampling parameters."""

COMMANDS = {
    "/help": "show this",
    "/again": "ask the last message again with the seed of its answer, and say whether the answer is the same",
    "/seed": "N: the seed of what follows; off: one per message; alone: show it",
    "/set": "NAME VALUE: a sampling parameter; NAME alone: the default again; alone: show all",
    "/system": "TEXT: the message that begins the conversation; alone: none",
    "/undo": "forget the last message and its answer",
    "/reset": "forget the conversation",
    "/save": "FILE: keep the conversation, with seeds and fingerprints",
    "/load": "FILE: continue a conversation that was kept",
    "/exit": "end",
}
KEYS = "Alt-Enter begins a new line, Ctrl-C stops an answer, Ctrl-D ends."


class Turn(msgspec.Struct, forbid_unknown_fields=True):
    """A message and its answer."""

    question: str
    answer: str
    seed: int | None = None
    fingerprint: str | None = None
    sampling: dict[str, Any] = {}
    """The parameters it was asked with."""


class Kept(msgspec.Struct, forbid_unknown_fields=True):
    """What `/save` writes."""

    system: str | None
    sampling: dict[str, Any]
    turns: list[Turn]


class Conversation:
    """Reads no input: `take` gets each text."""

    def __init__(
        self,
        ask: Ask,
        display: Callable[[], Display],
        *,
        system: str | None,
        sampling: Mapping[str, Any],
        settable: Sequence[str] = (),
        survives: bool = False,
    ) -> None:
        """`settable`: names for /set. `survives`: report a server's failure and go on, instead of raising it."""
        self._ask, self._display = ask, display
        self._opening, self._sampling = system, dict(sampling)
        self._settable, self._survives = settable, survives
        self.turns: list[Turn] = []
        self._unanswered: str | None = None

    def take(self, text: str) -> bool:
        """Answer a message, or do what a command says; return whether the conversation goes on."""
        text = text.strip()
        word, _, argument = text.partition(" ")
        if not text.startswith("/") or "\n" in word or (word not in COMMANDS and "\n" in text):
            if text:
                self._answer(text)
            return True
        if word == "/exit":
            return False
        if word not in COMMANDS:
            near = near_name(word, COMMANDS)
            _tell(f"unknown command {word}. {f'Did you mean {near}?' if near else '/help shows all.'}")
            return True
        try:
            getattr(self, f"_{word[1:]}")(argument.strip())
        except (UsageError, ConfigError, OSError) as error:
            _tell(f"{word}: {error}")
        return True

    def completions(self, text: str) -> list[str]:
        """Return the words that may come next."""
        if " " not in text:
            return list(COMMANDS) if text.startswith("/") else []
        return list(self._settable) if text.startswith("/set ") and text.count(" ") == 1 else []

    def _messages(self, question: str) -> list[Message]:
        messages = [] if self._opening is None else [{"role": "system", "content": self._opening}]
        for turn in self.turns:
            messages += [{"role": "user", "content": turn.question}, {"role": "assistant", "content": turn.answer}]
        return [*messages, {"role": "user", "content": question}]

    def _answer(self, question: str, sampling: Mapping[str, Any] | None = None) -> Answer | None:
        """Ask, and keep the turn if it was answered; a message whose server failed can be asked /again."""
        used = self._sampling if sampling is None else sampling
        self._unanswered = None
        try:
            answer = show_answer(self._ask(self._messages(question), used), self._display())
        except ServerError as error:
            if not self._survives:
                raise
            print(f"\nsempre: error: {plain(str(error))}\nsempre: /again asks once more", file=sys.stderr)
            self._unanswered = question
            return None
        if answer is None or (answer.was_stopped and not answer.text):
            return None
        self.turns.append(Turn(question, answer.text, answer.seed, answer.fingerprint, dict(used)))
        return answer

    # Commands: one method each, named like it.

    def _help(self, _: str) -> None:
        _tell("\n".join(f"{name:<8} {text}" for name, text in COMMANDS.items()) + f"\n{KEYS}")

    def _again(self, _: str) -> None:
        if self._unanswered is not None:
            self._answer(self._unanswered)
            return
        if not self.turns:
            raise UsageError("nothing was asked yet")
        before = self.turns.pop()
        seed = {} if before.seed is None else {"seed": before.seed}
        answer = self._answer(before.question, {**before.sampling, **seed})
        if answer is None:
            self.turns.append(before)
            return
        self.turns[-1].sampling = before.sampling
        _tell(_comparison(before, answer))

    def _seed(self, argument: str) -> None:
        if argument == "off":
            self._sampling.pop("seed", None)
        elif argument:
            self._change("seed", argument)
        _tell(f"seed: {self._sampling.get('seed', 'one per message')}")

    def _set(self, argument: str) -> None:
        name, _, value = argument.partition(" ")
        name = name.replace("-", "_")
        if name and name not in self._settable:
            near = near_name(name, self._settable)
            raise UsageError(f"there is no parameter {name!r}." + (f" Did you mean {near!r}?" if near else ""))
        if value:
            self._change(name, value.strip())
        elif name:
            self._sampling.pop(name, None)
        _tell(", ".join(f"{key} {json.dumps(given)}" for key, given in self._sampling.items()) or "all are defaults")

    def _change(self, name: str, text: str) -> None:
        try:
            value = json.loads(text)
        except ValueError:
            value = text
        changed = {**self._sampling, name: value}
        SamplingParams(**{"max_tokens": None, **changed})  # raises ConfigError for a value out of range
        self._sampling = changed

    def _system(self, argument: str) -> None:
        self._opening = argument or None
        _tell(f"system: {self._opening or 'none'}")

    def _undo(self, _: str) -> None:
        if not self.turns:
            raise UsageError("there is nothing to forget")
        _tell(f"forgotten: {self.turns.pop().question}")

    def _reset(self, _: str) -> None:
        self.turns.clear()
        self._unanswered = None

    def _save(self, argument: str) -> None:
        document = msgspec.json.encode(Kept(self._opening, self._sampling, self.turns))
        path = _path(argument)
        path.write_bytes(msgspec.json.format(document) + b"\n")
        _tell(f"kept in {path}")

    def _load(self, argument: str) -> None:
        path = _path(argument)
        try:
            kept = msgspec.json.decode(path.read_bytes(), type=Kept)
        except msgspec.MsgspecError as error:
            raise UsageError(f"{path} is not a conversation that /save kept: {error}") from None
        SamplingParams(**{"max_tokens": None, **kept.sampling})
        self._opening, self._sampling, self.turns = kept.system, kept.sampling, kept.turns
        _tell(f"{len(self.turns)} messages of {path}")


def _path(argument: str) -> Path:
    if not argument:
        raise UsageError("the name of a file is missing")
    return Path(argument).expanduser()


def _comparison(before: Turn, answer: Answer) -> str:
    if answer.was_stopped:
        return "stopped: not compared"
    if answer.text == before.answer:
        return "the same answer"
    pairs = enumerate(zip(before.answer, answer.text, strict=False))
    at = next((i for i, (a, b) in pairs if a != b), min(len(before.answer), len(answer.text)))
    reason = "the server reports no seed" if before.seed is None else ""
    if before.fingerprint != answer.fingerprint:
        reason = f"the fingerprint was {before.fingerprint}"
    return f"another answer from character {at + 1} on" + (f": {reason}" if reason else "")


def _tell(text: str) -> None:
    print("\n".join(plain(line) for line in text.splitlines()), file=sys.stderr)
