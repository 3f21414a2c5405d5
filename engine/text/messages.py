"""Chat messages in the form that a template reads."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from sempre.engine.text.template_form import Message, Missing, TemplateForm
from sempre.ipc.errors import RequestError

ContentFormat = Literal["auto", "string", "openai"]
"""Content for a template: the form it reads (auto), always one string, or always a list of OpenAI's parts."""

_ROLES = ("system", "developer", "user", "assistant", "tool")
# The names that templates use for the same text.
_REASONING = ("reasoning_content", "reasoning", "thinking")
# type of a part → its field with the text
_TEXT_PARTS = {"text": "text", "input_text": "text", "output_text": "text", "refusal": "refusal"}


def messages_for(
    messages: Sequence[Mapping[str, Any]], form: TemplateForm, content_format: ContentFormat
) -> list[Message]:
    """Return copies of the messages in the template's form. Raises RequestError naming the invalid field.

    Null fields and an empty list of tool calls are dropped. Arguments become an object or JSON text, content a string
    (parts are joined by newlines) or parts; missing content is written the way the template expects.
    """
    formed = [_Message(message, index, form, content_format).formed() for index, message in enumerate(messages)]
    if not formed:
        raise RequestError("messages must hold at least one message.", parameter="messages", value=messages)
    return formed


def tools_for(tools: Sequence[Mapping[str, Any]] | None) -> list[dict[str, Any]] | None:
    """Return the tools without null fields; None if there are no tools."""
    if not tools:
        return None
    plain = [_without_nulls(tool) for tool in tools]
    for tool in plain:
        if isinstance(tool.get("function"), Mapping):
            tool["function"] = _without_nulls(tool["function"])
    return plain


class _Message:
    """Converts one message to the template's form."""

    def __init__(self, message: object, index: int, form: TemplateForm, content_format: ContentFormat) -> None:
        self._where = f"messages[{index}]"
        if not isinstance(message, Mapping):
            raise self._error("", f"must be a mapping with role and content, got {type(message).__name__}", message)
        self._given = message
        self._form = form
        self._content_format = content_format

    def formed(self) -> Message:
        message = _without_nulls(self._given)
        role = message["role"] = self._role()
        calls = self._tool_calls()
        if calls:
            message["tool_calls"] = calls
        else:
            message.pop("tool_calls", None)
        has_reasoning = role == "assistant" and self._name_reasoning(message)
        content = self._content(role, "calls" if calls else "reasoning" if has_reasoning else None)
        if content == "absent":
            message.pop("content", None)
        else:
            message["content"] = content[0]
        return message

    def _role(self) -> str:
        role = self._given.get("role")
        if not isinstance(role, str) or not role:
            raise self._error(".role", f"must be a non-empty string, got {role!r}", role)
        # OpenAI's newer name for it, which few models know
        return "system" if role == "developer" and not self._form.mentions(role) else role

    def _name_reasoning(self, message: Message) -> bool:
        """Set the reasoning under every name that the template uses; return whether there is any."""
        name = next((name for name in _REASONING if name in message), None)
        if name is None:
            return False
        reasoning = message[name]
        if not isinstance(reasoning, str):
            raise self._error(f".{name}", f"must be a string, got {type(reasoning).__name__}", reasoning)
        for other in _REASONING:
            if self._form.mentions(other):
                message.setdefault(other, reasoning)
        return bool(reasoning)

    def _content(self, role: str, beside: Literal["calls", "reasoning"] | None) -> tuple[object] | Literal["absent"]:
        """The content in a tuple, or "absent". `beside`: what else the reply contains."""
        given = self._given.get("content")
        parts = self._texts(given) if isinstance(given, list) else None
        if parts is None and not isinstance(given, str | None):
            kind = type(given).__name__
            raise self._error(".content", f"must be a string or a list of text parts, got {kind}", given)
        text = "\n".join(parts) if parts is not None else given
        if not text and role == "assistant" and beside is not None:
            missing: Missing = "empty" if text is not None else "none" if "content" in self._given else "absent"
            missing = self._form.missing_content(beside, missing)
            return "absent" if missing == "absent" else (None if missing == "none" else "",)
        if self._gives_parts(role, parts):
            if parts is None:
                return ([{"type": "text", "text": text or ""}],)
            # a template may read other fields of a part, too
            more = [dict(part) if isinstance(part, Mapping) else {} for part in given or ()]
            return ([{**part, "type": "text", "text": each} for part, each in zip(more, parts, strict=True)],)
        return (text or "",)

    def _gives_parts(self, role: str, parts: Sequence[str] | None) -> bool:
        if self._content_format != "auto":
            return self._content_format == "openai"
        role = role if role in _ROLES else "user"
        return not self._form.takes_text(role) if not parts else self._form.takes_parts(role)

    def _texts(self, parts: Sequence[object]) -> list[str]:
        texts = []
        for index, part in enumerate(parts):
            where = f".content[{index}]"
            if isinstance(part, str):
                texts.append(part)
                continue
            kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
            if not isinstance(part, Mapping) or kind not in _TEXT_PARTS:
                what = (
                    f"must be {{'type': 'text', 'text': …}}, got type {kind!r}; only text can be given to this engine"
                )
                raise self._error(where, what, part)
            text = part.get(_TEXT_PARTS[kind])
            if not isinstance(text, str):
                raise self._error(f"{where}.{_TEXT_PARTS[kind]}", f"must be a string, got {text!r}", text)
            texts.append(text)
        return texts

    def _tool_calls(self) -> list[Message]:
        calls = self._given.get("tool_calls")
        if calls is None:
            return []
        if not isinstance(calls, Sequence) or isinstance(calls, str | bytes):
            raise self._error(".tool_calls", f"must be a list, got {type(calls).__name__}", calls)
        return [self._tool_call(call, f".tool_calls[{index}]") for index, call in enumerate(calls)]

    def _tool_call(self, call: object, where: str) -> Message:
        if not isinstance(call, Mapping) or not isinstance(call.get("function"), Mapping):
            raise self._error(where, "must be {'id': …, 'type': 'function', 'function': {…}}", call)
        function = _without_nulls(call["function"])
        if not isinstance(function.get("name"), str):
            raise self._error(f"{where}.function.name", f"must be a string, got {function.get('name')!r}", call)
        function["arguments"] = self._arguments(function.get("arguments"), f"{where}.function.arguments")
        formed = {**_without_nulls(call), "function": function}
        formed.setdefault("type", "function")
        return formed

    def _arguments(self, arguments: object, where: str) -> object:
        """Arguments as an object or as JSON text; missing or empty means no arguments."""
        as_text = self._form.arguments_are_text()
        if arguments is None or arguments == "":
            arguments = {}
        if isinstance(arguments, str):
            try:
                value = json.loads(arguments)
            except (ValueError, RecursionError) as error:
                if as_text:
                    return arguments
                raise self._error(where, f"must be JSON, which this chat template needs: {error}", arguments) from None
            return arguments if as_text else value
        return json.dumps(arguments, ensure_ascii=False) if as_text else arguments

    def _error(self, field: str, what: str, value: object) -> RequestError:
        where = self._where + field
        return RequestError(f"{where} {what}.", parameter=where, value=value)


def _without_nulls(mapping: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in mapping.items() if value is not None}
