"""Free text with tagged parts that have a form, such as tool calls: the two formats of vLLM's `structural_tag`.

{"type": "structural_tag", "triggers": ["<call"],
 "structures": [{"begin": "<call=f>", "schema": {…}, "end": "</call>"}]}
{"type": "structural_tag", "format": {"type": "triggered_tags", "triggers": ["<call"], "tags": [
 {"type": "tag", "begin": "<call=f>", "content": {"type": "json_schema", "json_schema": {…}}, "end": "</call>"}]}}
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta, Struct

from sempre.ipc.errors import ConfigError

MAX_TAGS = 128
_FIELD = "structured_outputs.structural_tag"

Text = Annotated[str, Meta(min_length=1)]


class _Schema(Struct, tag_field="type", tag="json_schema", forbid_unknown_fields=True, frozen=True):
    json_schema: dict[str, Any] | str


class _Regex(Struct, tag_field="type", tag="regex", forbid_unknown_fields=True, frozen=True):
    pattern: Text


class _Grammar(Struct, tag_field="type", tag="grammar", forbid_unknown_fields=True, frozen=True):
    grammar: Text


class Tag(Struct, forbid_unknown_fields=True, frozen=True):
    """A part of the output: `begin`, what `content` describes, `end`."""

    begin: Text
    content: _Schema | _Regex | _Grammar
    end: str
    type: Literal["tag"] = "tag"

    @property
    def form(self) -> dict[str, Any]:
        """The content as a keyword of StructuredOutputsParams."""
        match self.content:
            case _Schema(json_schema=schema):
                return {"json": schema}
            case _Regex(pattern=pattern):
                return {"regex": pattern}
            case _Grammar(grammar=grammar):
                return {"grammar": grammar}


class TriggeredTags(Struct, forbid_unknown_fields=True, frozen=True, tag_field="type", tag="triggered_tags"):
    """Text in which each trigger is the beginning of a tag."""

    triggers: Annotated[list[Text], Meta(min_length=1, max_length=MAX_TAGS)]
    tags: Annotated[list[Tag], Meta(min_length=1, max_length=MAX_TAGS)]
    at_least_one: bool = False
    stop_after_first: bool = False


class _Structure(Struct, forbid_unknown_fields=True, frozen=True):
    begin: Text
    end: str
    schema: dict[str, Any] | str = {}


class _Older(Struct, forbid_unknown_fields=True, frozen=True):
    structures: Annotated[list[_Structure], Meta(min_length=1, max_length=MAX_TAGS)]
    triggers: Annotated[list[Text], Meta(min_length=1, max_length=MAX_TAGS)]
    type: Literal["structural_tag"] = "structural_tag"


class _Newer(Struct, forbid_unknown_fields=True, frozen=True):
    format: TriggeredTags
    type: Literal["structural_tag"] = "structural_tag"


def parse_structural_tag(value: object) -> TriggeredTags:
    """Read either format, as JSON text or a dict. Raises ConfigError naming the member."""
    try:
        found = msgspec.json.decode(value) if isinstance(value, str) else value
        if not isinstance(found, Mapping):
            raise _refused(f"must be an object in JSON, got {type(found).__name__}")
        if "format" in found:
            tags = msgspec.convert(found, _Newer).format
        else:
            older = msgspec.convert(found, _Older)
            tags = TriggeredTags(older.triggers, [Tag(s.begin, _Schema(s.schema), s.end) for s in older.structures])
    except (msgspec.ValidationError, msgspec.DecodeError, RecursionError) as error:
        raise _refused(f"is refused: {error}") from None
    for tag in tags.tags:
        if not tag.begin.startswith(tuple(tags.triggers)):
            raise _refused(f"is refused: no trigger of {tags.triggers} is the beginning of {tag.begin!r}")
    return tags


def _refused(text: str) -> ConfigError:
    return ConfigError(f"{_FIELD} {text}.", parameter=_FIELD)
