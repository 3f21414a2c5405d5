"""Tool calls between tags, whose arguments are JSON: DeepSeek and Mistral.

The arguments are passed on as they arrive, as in the formats of `tool_calls.py`.
"""

from __future__ import annotations

from enum import Enum, auto

from sempre.engine.parsing.pieces import Arguments, Piece, TagSplitter
from sempre.engine.parsing.tool_calls import AroundCalls, RequiredCallsParser

_FENCE, _FENCE_END = "```json", "```"


class _At(Enum):
    CONTENT = auto()
    HEADER = auto()
    ARGUMENTS = auto()


class _TaggedParser(AroundCalls):
    """Text before a call is content; a call that names no function is content, unchanged."""

    TAGS: tuple[str, ...] = ()

    def __init__(self) -> None:
        super().__init__()
        self._splitter = TagSplitter(self.TAGS)
        self._at = _At.CONTENT
        # the text and tags of a call before its arguments
        self._header = ""
        # the end of the arguments so far, while it may be more than arguments
        self._held = ""
        self._has_arguments = False

    def feed(self, text: str) -> list[Piece]:
        for before, tag in self._splitter.split(text):
            self._add(before)
            if tag:
                self._at_tag(tag)
        return self._take()

    def finish(self) -> list[Piece]:
        self._add(self._splitter.take_rest())
        self._end_call(is_cut=True)
        return self._finish()

    def _add(self, text: str) -> None:
        if not text:
            return
        match self._at:
            case _At.CONTENT:
                self._say(text)
            case _At.HEADER:
                self._header += text
                self._read_header()
            case _At.ARGUMENTS:
                self._add_arguments(text)

    def _at_tag(self, tag: str) -> None:
        """A tag has come."""
        raise NotImplementedError

    def _read_header(self) -> None:
        """The header has grown."""

    def _begin_arguments(self, name: str) -> None:
        self._start_call(name)
        self._at, self._header, self._held, self._has_arguments = _At.ARGUMENTS, "", "", False

    def _add_arguments(self, text: str) -> None:
        text = self._held + text
        if not self._has_arguments:
            text = text.lstrip()
        certain = _without_fence_end(text)
        self._held = text[len(certain) :]
        if certain:
            self._has_arguments = True
            self._pieces.append(Arguments(self._num_calls - 1, certain))

    def _end_call(self, *, is_cut: bool = False) -> None:
        """Whatever was read last has ended, or `is_cut` with the text."""
        if self._at is _At.HEADER:
            self._say(self._header)
        elif self._at is _At.ARGUMENTS and not self._has_arguments and not is_cut:
            self._pieces.append(Arguments(self._num_calls - 1, "{}"))
        self._at, self._header, self._held = _At.CONTENT, "", ""


def _without_fence_end(text: str) -> str:
    """Arguments without what may follow them: the end of a fence, as much of it as there is, and white space."""
    before = text.rstrip()
    num_ticks = min(len(before) - len(before.rstrip("`")), len(_FENCE_END))
    return before[: len(before) - num_ticks].rstrip()


class DeepSeekV31Parser(_TaggedParser):
    """<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>NAME<｜tool▁sep｜>{…}<｜tool▁call▁end｜>…<｜tool▁calls▁end｜>."""

    BEGIN, END = "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"
    CALL, SEPARATOR, CALL_END = "<｜tool▁call▁begin｜>", "<｜tool▁sep｜>", "<｜tool▁call▁end｜>"
    TAGS = (BEGIN, END, CALL, SEPARATOR, CALL_END)

    def _at_tag(self, tag: str) -> None:
        if tag == self.SEPARATOR and self._at is _At.HEADER:
            self._at_separator()
            return
        if self._at is _At.HEADER and tag == self.CALL_END:
            self._header += tag
        self._end_call()
        if tag == self.CALL:
            self._at, self._header = _At.HEADER, tag

    def _at_separator(self) -> None:
        name = self._header.removeprefix(self.CALL).strip()
        if name:
            self._begin_arguments(name)
        else:
            self._header += self.SEPARATOR
            self._end_call()


class DeepSeekV3Parser(DeepSeekV31Parser):
    """The same with `function<｜tool▁sep｜>NAME`, a line break, and the arguments in a fence of three backticks."""

    def _at_separator(self) -> None:
        self._header += self.SEPARATOR

    def _read_header(self) -> None:
        _, separator, rest = self._header.partition(self.SEPARATOR)
        name, line_end, arguments = rest.partition("\n")
        if not separator or not line_end:
            return
        if not name.strip():
            self._end_call()
            return
        begun = arguments.lstrip()
        # the fence is complete, or is none
        if begun.startswith(_FENCE) or not _FENCE.startswith(begun):
            self._begin_arguments(name.strip())
            self._add(begun.removeprefix(_FENCE))

    def _end_call(self, *, is_cut: bool = False) -> None:
        _, separator, rest = self._header.partition(self.SEPARATOR)
        name = rest.partition("\n")[0].strip()
        if self._at is _At.HEADER and separator and name:
            # a call without arguments, or cut off before them
            self._begin_arguments(name)
        super()._end_call(is_cut=is_cut)


class MistralParser(_TaggedParser):
    """[TOOL_CALLS]NAME[CALL_ID]…[ARGS]{…}, any number of times; or one [TOOL_CALLS] before a list of calls in JSON.

    The tags are special tokens, so they must be in the text that is parsed.
    """

    CALLS, CALL_ID, ARGS = "[TOOL_CALLS]", "[CALL_ID]", "[ARGS]"
    TAGS = (CALLS, CALL_ID, ARGS)

    def __init__(self) -> None:
        super().__init__()
        self._list: RequiredCallsParser | None = None

    def finish(self) -> list[Piece]:
        pieces = self.feed("")
        self._add(self._splitter.take_rest())
        if self._list is None:
            return [*pieces, *super().finish()]
        return [*pieces, *self._take(), *self._list.finish()]

    def _at_tag(self, tag: str) -> None:
        if self._list is not None:
            self._pieces += self._list.feed(tag)
        elif tag == self.CALLS:
            self._end_call()
            self._at, self._header = _At.HEADER, tag
        elif self._at is _At.HEADER and tag == self.ARGS:
            name = self._header.removeprefix(self.CALLS).partition(self.CALL_ID)[0].strip()
            if name:
                self._begin_arguments(name)
            else:
                self._header += tag
                self._end_call()
        elif self._at is _At.HEADER:
            self._header += tag
        else:
            self._add(tag)

    def _add(self, text: str) -> None:
        if self._list is None:
            super()._add(text)
        elif text:
            self._pieces += self._list.feed(text)

    def _read_header(self) -> None:
        rest = self._header.removeprefix(self.CALLS).lstrip()
        if rest[:1] in ("[", "{") and not self._num_calls:
            self._at, self._list = _At.CONTENT, RequiredCallsParser()
            self._pieces += self._list.feed(rest)
            return
        name, brace, arguments = rest.partition("{")
        if brace and name.strip() and self.CALL_ID not in name:
            # of version 11, which has no tag between them
            self._begin_arguments(name.strip())
            self._add(brace + arguments)
