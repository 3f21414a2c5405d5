"""Turns a decoder's index path into field names: `$[3][0][1]` of a StepResult is `StepResult.sampled[0].token_ids`.

Structs travel as arrays (settings alone as maps), so the decoder can only count. The names are found by walking the
message's types.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import msgspec
from msgspec import inspect

_AT = re.compile(r" - at (?:`key` in )?`\$(?P<steps>[^`]*)`$")
_STEP = re.compile(r"\[(\d+|\.\.\.)\]|(\.\w+)")
# the header of an array, that of a short string, and the string
_MOST_TAG_BYTES = 5 + 1 + 31
_TOO_SHORT = re.compile(r"Expected `array` of at least length \d+, got (\d+)")


def field_path(error_text: str, payload: bytes | memoryview, messages: Mapping[str, type[msgspec.Struct]]) -> str:
    """The name of the field that `error_text` (of a msgspec error) complains about; `$` is the frame as a whole.

    `messages` maps a message's tag to its type.
    """
    steps = (
        [index or name for index, name in _STEP.findall(match["steps"])] if (match := _AT.search(error_text)) else []
    )
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
    """The message's tag, or an empty string when there is none to be read.

    What follows is not read: it may be nested arbitrarily deep.
    """
    head = bytes(payload[:_MOST_TAG_BYTES])
    if head[:1] == b"\xdc":
        rest = head[3:]
    elif head[:1] == b"\xdd":
        rest = head[5:]
    elif head and 0x90 < head[0] <= 0x9F:
        rest = head[1:]
    else:
        return ""
    if not rest or not 0xA0 <= rest[0] <= 0xBF:  # a tag is a string of at most 31 bytes
        return ""
    return rest[1 : 1 + (rest[0] & 0x1F)].decode(errors="replace")


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
            case inspect.StructType(fields=fields) if step.startswith("."):
                names += step
                kind = next(field.type for field in fields if field.encode_name == step[1:])
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
    """The member of a union that has parts; other types unchanged, without their metadata."""
    if isinstance(kind, inspect.Metadata):
        return _container(kind.type)
    if isinstance(kind, inspect.UnionType):
        for member in kind.types:
            if isinstance(member, inspect.StructType | inspect.ListType | inspect.DictType):
                return member
    return kind
