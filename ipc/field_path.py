"""Turns a decoder's index path into field names: `$[3][0][1]` of a StepResult is `StepResult.sampled[0].token_ids`.

Structs travel as arrays, so the decoder can only count. The names are found by walking the message's types.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import msgspec
from msgspec import inspect

_AT = re.compile(r" - at (?:`key` in )?`\$(?P<steps>[^`]*)`$")
_STEP = re.compile(r"\[(\d+|\.\.\.)\]")
_TOO_SHORT = re.compile(r"Expected `array` of at least length \d+, got (\d+)")


def field_path(error_text: str, payload: bytes | memoryview, messages: Mapping[str, type[msgspec.Struct]]) -> str:
    """The name of the field that `error_text` (of a msgspec error) complains about; `$` is the frame as a whole.

    `messages` maps a message's tag to its type.
    """
    steps = _STEP.findall(match["steps"]) if (match := _AT.search(error_text)) else []
    too_short = _TOO_SHORT.match(error_text)
    if too_short:
        steps.append(too_short[1])
    if not steps:
        return "$"
    if steps == ["0"]:
        return "tag"
    tag = _tag(payload)
    if tag not in messages:
        return "$" + "".join(f"[{step}]" for step in steps)
    return tag + _walk(inspect.type_info(messages[tag]), steps)


def _tag(payload: bytes | memoryview) -> str:
    """The message's tag, or an empty string when there is none to be read."""
    try:
        envelope = msgspec.msgpack.decode(payload, type=list[msgspec.Raw])
        return msgspec.msgpack.decode(envelope[0], type=str)
    except (msgspec.DecodeError, UnicodeDecodeError, IndexError):
        return ""


def _walk(kind: inspect.Type, steps: list[str]) -> str:
    names = ""
    for step in steps:
        kind = _container(kind)
        match kind:
            case inspect.StructType(fields=fields, tag=tag) if step.isdigit():
                index = int(step) - (tag is not None)
                if not 0 <= index < len(fields):
                    return f"{names}[{step}]"
                names += f".{fields[index].name}"
                kind = fields[index].type
            case inspect.ListType(item_type=item_type):
                names += f"[{step}]"
                kind = item_type
            case inspect.DictType(value_type=value_type):
                names += "[…]"
                kind = value_type
            case _:
                names += f"[{step}]"
    return names


def _container(kind: inspect.Type) -> inspect.Type:
    """The member of a union that has parts; other types as they are."""
    if isinstance(kind, inspect.UnionType):
        for member in kind.types:
            if isinstance(member, inspect.StructType | inspect.ListType | inspect.DictType):
                return member
    return kind
