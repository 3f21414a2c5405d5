"""The JSON schemas that enforce tool calls."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

# as Python's json.dumps writes, and the models' training data
_SPACES = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
_DEFINITIONS = ("$defs", "definitions")

Schema = dict[str, Any]


def named_call_schema(parameters: Schema | None) -> Schema:
    """Of the arguments of one function."""
    return {**_parameters(parameters), "x-guidance": _SPACES}


def required_calls_schema(functions: Sequence[tuple[str, Schema | None]], *, parallel: bool) -> Schema:
    """Of a list of calls, at least one, of (name, parameters); not `parallel`: exactly one.

    Raises ValueError when two functions define one name differently.
    """
    definitions: dict[str, Schema] = {}
    calls = []
    for name, parameters in functions:
        schema = dict(_parameters(parameters))
        for key in _DEFINITIONS:
            # references name them from the root
            for local, definition in schema.pop(key, {}).items():
                if definitions.setdefault(key, {}).setdefault(local, definition) != definition:
                    raise ValueError(f"tools: {key}/{local} is defined twice, and not alike; rename one of them.")
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
