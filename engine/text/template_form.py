"""The form in which a chat template reads messages, found by rendering small conversations with it.

OpenAI has one form, but templates expect many: arguments of tool calls as an object or as JSON text, content as a
string or as parts, a call's missing content as none, as an empty string, or left out. A template does not declare its
form and silently renders another one wrongly (`"{\\"id\\": 1}"`, `{'id': 1}`, or nothing). So each form is tried with
marked values, and the one that renders them unchanged is used.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any, Literal

Message = dict[str, Any]
Missing = Literal["absent", "none", "empty"]

_FIRST, _SECOND = "probe-first", "probe-second"
# A list printed as such, instead of its texts.
_PRINTED_PART = re.compile(rf"""["']text["']\s*:\s*["']{_FIRST}""")
_CALL_ID = "prb123456"  # nine characters: some templates refuse ids of another length
_TOOL = {
    "type": "function",
    "function": {
        "name": "probe_tool",
        "description": "A tool.",
        "parameters": {"type": "object", "properties": {"word": {"type": "string", "description": "A word."}}},
    },
}
_USER = {"role": "user", "content": "Hello."}
_AS_OBJECT = {_FIRST: _SECOND}
_AS_TEXT = f'{{"{_FIRST}": "{_SECOND}"}}'
_PRINTED_OBJECT = f"'{_FIRST}': '{_SECOND}'"


class TemplateForm:
    """The form that one template reads. Each answer depends on the template alone and is computed on first use."""

    def __init__(self, source: str, render: Callable[[Mapping[str, Any]], str]) -> None:
        """`render` renders the template `source` with variables; it may raise any Exception."""
        self._source = source
        self._render = render
        self.takes_parts = cache(self._takes_parts)
        """(role) → whether content of this role may be a list of text parts."""
        self.takes_text = cache(self._takes_text)
        """(role) → whether content of this role may be a string."""
        self.arguments_are_text = cache(self._arguments_are_text)
        """() → whether the arguments of a tool call must be JSON text rather than an object."""
        self.missing_content = cache(self._missing_content)
        """(where, given) → how to give an assistant message without content that has "calls" or "reasoning" only."""

    def mentions(self, name: str) -> bool:
        """Whether a field's or role's name occurs in the template."""
        return re.search(rf"\b{re.escape(name)}\b", self._source) is not None

    def _takes_parts(self, role: str) -> bool:
        parts = [{"type": "text", "text": text} for text in (_FIRST, _SECOND)]
        shown = self._try(self._conversation(role, parts), (_FIRST, _SECOND))
        return shown is not None and not _PRINTED_PART.search(shown)

    def _takes_text(self, role: str) -> bool:
        # a role that is rendered in neither form stays unchanged
        return self._try(self._conversation(role, _FIRST), (_FIRST,)) is not None or not self.takes_parts(role)

    def _arguments_are_text(self) -> bool:
        if any(self._shows_object(self._call(missing, _AS_OBJECT)) for missing in ("absent", "none", "empty")):
            return False
        calls = [self._call(missing, _AS_TEXT) for missing in ("absent", "none", "empty")]
        return any(self._try(_with_answer(call), (_AS_TEXT,)) is not None for call in calls)

    def _shows_object(self, call: Message) -> bool:
        shown = self._try(_with_answer(call), (_FIRST, _SECOND))
        return shown is not None and _PRINTED_OBJECT not in shown

    def _missing_content(self, where: Literal["calls", "reasoning"], given: Missing) -> Missing:
        # a call may be rendered without content; reasoning alone is a reply with empty content
        order: tuple[Missing, ...] = ("absent", "none", "empty") if where == "calls" else ("absent", "empty", "none")
        if given == "empty":
            order = ("empty", "absent", "none")
        found: list[tuple[int, int, Missing]] = []
        for rank, missing in enumerate(order):
            if where == "calls":
                arguments, seen = (_AS_TEXT, _AS_TEXT) if self.arguments_are_text() else (_AS_OBJECT, _SECOND)
                shown = self._try(_with_answer(self._call(missing, arguments)), (seen,))
            else:
                thought = _without_content({"role": "assistant", "reasoning_content": _FIRST}, missing)
                shown = self._try([_USER, thought, _USER], ())
            if shown is not None:
                # how a template renders a value that it does not expect
                found.append((shown.count("None") + shown.count("null"), rank, missing))
        return min(found)[2] if found else "empty"

    def _call(self, missing: Missing, arguments: object) -> Message:
        call = {"id": _CALL_ID, "type": "function", "function": {"name": "probe_tool", "arguments": arguments}}
        return _without_content({"role": "assistant", "tool_calls": [call]}, missing)

    def _conversation(self, role: str, content: object) -> list[Message]:
        message = {"role": role, "content": content}
        if role == "user":
            return [message]
        if role == "assistant":
            return [_USER, message, _USER]
        if role == "tool":
            arguments = _AS_TEXT if self.arguments_are_text() else _AS_OBJECT
            call = self._call(self.missing_content("calls", "absent"), arguments)
            return [_USER, call, {**message, "tool_call_id": _CALL_ID, "name": "probe_tool"}]
        return [message, _USER]

    def _try(self, messages: Sequence[Message], seen: Sequence[str]) -> str | None:
        """The prompt, if all of `seen` is in it, with or without tools; else None."""
        for tools in ([_TOOL], None):
            variables = {
                "messages": [dict(message) for message in messages],
                "tools": tools,
                "documents": None,
                "add_generation_prompt": True,
                "bos_token": "",
                "eos_token": "",
                "strftime_now": lambda _format: "26 Jul 2024",
            }
            try:
                shown = self._render(variables)
            except Exception:  # any error of an unknown template means that it does not read this form
                continue
            if all(text in shown for text in seen):
                return shown
        return None


def _without_content(message: Message, missing: Missing) -> Message:
    if missing == "absent":
        return message
    return {**message, "content": None if missing == "none" else ""}


def _with_answer(call: Message) -> list[Message]:
    answer = {"role": "tool", "tool_call_id": _CALL_ID, "name": "probe_tool", "content": "Yes."}
    return [_USER, call, answer]
