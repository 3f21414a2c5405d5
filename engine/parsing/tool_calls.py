"""Parses tool calls in the format that a model was trained on or that a grammar enforces."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sempre.engine.parsing.call_scanner import CallScanner
from sempre.engine.parsing.pieces import Arguments, CallStart, Content, Piece, split_before_tag

# After an object: white space and surplus closing brackets.
_NOTHING = " \t\r\n}]"
# the separators of Python's json.dumps and of the models' training data
_SPACES = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
_DEFINITIONS = ("$defs", "definitions")
Schema = dict[str, Any]


class AroundCalls:
    """Content around calls. White space alone before, between or after calls is dropped."""

    def __init__(self) -> None:
        self._pieces: list[Piece] = []
        self._num_calls = 0
        self._space = ""
        self._content_is_blank = True

    def _take(self) -> list[Piece]:
        pieces, self._pieces = self._pieces, []
        return pieces

    def _finish(self) -> list[Piece]:
        """The remaining pieces; the text has ended."""
        if self._space and not (self._content_is_blank and self._num_calls):
            self._pieces.append(Content(self._space))
        return self._take()

    def _say(self, text: str) -> None:
        """Add content; white space is held back until other content follows."""
        text = self._space + text
        end = len(text.rstrip())
        self._space = text[end:]
        if end:
            self._content_is_blank = False
            self._pieces.append(Content(text[:end]))

    def _start_call(self, name: str) -> None:
        if self._space and not self._content_is_blank:
            self._pieces.append(Content(self._space))
        self._space, self._content_is_blank = "", True
        self._num_calls += 1
        self._pieces.append(CallStart(self._num_calls - 1, name))


class _CallParser(AroundCalls):
    """What the formats in JSON share: one call at a time.

    An object that does not name a function is content, unchanged. One that names a function and then breaks off or is
    malformed is a call with the arguments it has, since they were already passed on.
    """

    def __init__(self) -> None:
        super().__init__()
        self._scanner: CallScanner | None = None
        self._is_started = False

    def feed(self, text: str) -> list[Piece]:
        while text:
            text = self._step(text)
        return self._take()

    def finish(self) -> list[Piece]:
        self._end()
        return self._finish()

    def _step(self, text: str) -> str:
        """Read some of `text` and return the rest."""
        raise NotImplementedError

    def _end(self) -> None:
        """The text has ended."""
        raise NotImplementedError

    def _begin_call(self) -> None:
        self._scanner, self._is_started = CallScanner(), False

    def _scan(self, text: str) -> str:
        """Continue reading the call; return the text after it."""
        scanner = self._scanner
        assert scanner is not None
        rest = scanner.feed(text)
        if scanner.name is not None:
            if not self._is_started:
                self._start_call(scanner.name)
            if news := scanner.take_arguments():
                self._pieces.append(Arguments(self._num_calls - 1, news))
        return rest

    def _cut_off(self, scanner: CallScanner) -> None:
        """The text has ended inside a call."""
        if rest := scanner.take_cut_off():
            self._pieces.append(Arguments(self._num_calls - 1, rest))

    def _start_call(self, name: str) -> None:
        super()._start_call(name)
        self._is_started = True


class HermesParser(_CallParser):
    """<tool_call>{"name": …, "arguments": {…}}</tool_call>, any number of times, and content around them.

    White space and stray brackets after an object are dropped; any other text there is content, which happens when
    the end tag is missing. The next start tag ends a call, too.
    """

    START, END = "<tool_call>", "</tool_call>"

    def __init__(self) -> None:
        super().__init__()
        self._undecided = ""
        # the text after an object so far, while it is ignorable; None once it is content
        self._gap: str | None = ""

    def _step(self, text: str) -> str:
        scanner = self._scanner
        if scanner is None:
            return self._outside(text)
        if not (scanner.done or scanner.malformed):
            text = self._scan(text)
        if scanner.malformed and scanner.name is None:
            self._give_back(scanner)
        elif scanner.done or scanner.malformed:
            return self._behind_object(scanner, text)
        return text

    def _outside(self, text: str) -> str:
        before, tag, after = (self._undecided + text).partition(self.START)
        if tag:
            self._say(before)
            self._undecided = ""
            self._begin_call()
            return after
        certain, self._undecided = split_before_tag(before, self.START)
        self._say(certain)
        return ""

    def _behind_object(self, scanner: CallScanner, text: str) -> str:
        text = self._undecided + text
        self._undecided = ""
        places = [(text.find(tag), tag) for tag in (self.START, self.END) if tag in text]
        if not places:
            certain = min((split_before_tag(text, tag)[0] for tag in (self.START, self.END)), key=len)
            self._undecided = text[len(certain) :]
            self._leave(scanner, certain)
            return ""
        start, tag = min(places)
        self._leave(scanner, text[:start])
        self._scanner, self._gap = None, ""
        return text[start + (len(tag) if tag == self.END else 0) :]

    def _leave(self, scanner: CallScanner, text: str) -> None:
        """Text between the object and the end tag."""
        if not scanner.done:
            if text:
                self._pieces.append(Arguments(self._num_calls - 1, text))
        elif self._gap is None:
            self._say(text)
        else:
            self._gap += text
            if self._gap.strip(_NOTHING):
                self._say(self._gap)
                self._gap = None

    def _give_back(self, scanner: CallScanner) -> None:
        self._say(self.START + scanner.raw)
        self._scanner = None

    def _end(self) -> None:
        scanner, rest = self._scanner, self._undecided
        self._undecided = ""
        if scanner is None:
            self._say(rest)
        elif scanner.name is None:
            self._give_back(scanner)
        else:
            self._cut_off(scanner)
            self._leave(scanner, rest)


class _JsonCallsParser(_CallParser):
    """Calls only: OPENING, calls separated by SEPARATOR, then CLOSING. Any other text is content."""

    OPENING = ""
    SEPARATOR = ""
    CLOSING = ""
    # surplus brackets that an object may end with
    STRAY = ""

    def __init__(self) -> None:
        super().__init__()
        # white space and separators before a call that has not begun or is not certain yet
        self._head = ""
        self._is_content = False

    def _step(self, text: str) -> str:
        if self._is_content:
            self._say(text)
            return ""
        scanner = self._scanner
        if scanner is None:
            return self._between(self._head + text)
        rest = self._scan(text)
        if scanner.malformed and scanner.name is None:
            self._give_back(scanner)
        elif scanner.malformed:
            if rest:
                self._pieces.append(Arguments(self._num_calls - 1, rest))
            return ""
        elif scanner.done:
            self._scanner, self._head = None, ""
        return rest

    def _between(self, text: str) -> str:
        begin, separator = text.lstrip(), self.SEPARATOR if self._num_calls else self.OPENING
        if self._num_calls:
            begin = begin.lstrip(self.STRAY + " \t\r\n")
        if begin.startswith(separator):
            begin = begin[len(separator) :].lstrip()
        elif separator.startswith(begin):
            begin = ""
        if not begin or (self._num_calls and begin.rstrip() == self.CLOSING):
            self._head = text
            return ""
        if begin.startswith("{"):
            self._head = text[: -len(begin)]
            self._begin_call()
            return begin
        self._is_content = True
        return text

    def _give_back(self, scanner: CallScanner) -> None:
        self._is_content = True
        self._say(self._head + scanner.raw)
        self._scanner = None

    def _end(self) -> None:
        if self._scanner is None and not self._is_content:
            if not (self._num_calls and self._head.lstrip(self.STRAY + " \t\r\n").rstrip() in ("", self.CLOSING)):
                self._say(self._head)
        elif self._scanner is not None and self._scanner.name is None:
            self._give_back(self._scanner)
        elif self._scanner is not None:
            self._cut_off(self._scanner)


class Llama3JsonParser(_JsonCallsParser):
    """{"name": …, "parameters": {…}}, several separated by `;`, optionally after <|python_tag|>."""

    OPENING, SEPARATOR, CLOSING = "<|python_tag|>", ";", ";"
    STRAY = "}"


class RequiredCallsParser(_JsonCallsParser):
    """[{"name": …, "parameters": {…}}, …], as the grammar of `required_calls_schema` enforces it.

    Only calls can follow a call; one that is cut off before its name is dropped.
    """

    OPENING, SEPARATOR, CLOSING = "[", ",", "]"

    def _end(self) -> None:
        if not self._num_calls:
            super()._end()


class NamedCallParser:
    """The whole text is the arguments of one function, enforced by its schema."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._is_started = False

    def feed(self, text: str) -> list[Piece]:
        pieces: list[Piece] = []
        if not self._is_started:
            text = text.lstrip()
            if text:
                self._is_started = True
                pieces.append(CallStart(0, self._name))
        if text:
            pieces.append(Arguments(0, text))
        return pieces

    def finish(self) -> list[Piece]:
        return []


def named_call_schema(parameters: Schema | None) -> Schema:
    """The schema of one function's arguments."""
    return {**_parameters(parameters), "x-guidance": _SPACES}


def required_calls_schema(functions: Sequence[tuple[str, Schema | None]], *, parallel: bool) -> Schema:
    """The schema of a list of calls of (name, parameters): at least one, without `parallel` exactly one.

    Raises ValueError if two functions define the same name differently.
    """
    definitions: dict[str, Schema] = {}
    calls = []
    for name, parameters in functions:
        schema = dict(_parameters(parameters))
        for key in _DEFINITIONS:
            # references name them from the root
            for local, definition in schema.pop(key, {}).items():
                if definitions.setdefault(key, {}).setdefault(local, definition) != definition:
                    raise ValueError(f"tools: {key}/{local} is defined twice, differently; rename one of them.")
        calls.append(
            {
                "type": "object",
                "properties": {"name": {"const": name}, "parameters": schema},
                "required": ["name", "parameters"],
                "additionalProperties": False,
            }
        )
    limit = {} if parallel else {"maxItems": 1}
    return {"type": "array", "minItems": 1, **limit, "items": {"anyOf": calls}, **definitions, "x-guidance": _SPACES}


def _parameters(parameters: Schema | None) -> Schema:
    return parameters or {"type": "object", "properties": {}, "additionalProperties": False}
