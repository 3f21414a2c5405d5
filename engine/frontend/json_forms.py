"""JSON forms for the grammar library: the schema rewritten, bounds added, white space limited."""

from __future__ import annotations

import json
from contextlib import suppress
from typing import Any

from sempre.engine.frontend.schema_bounds import add_bounds
from sempre.engine.frontend.schema_lark import (
    NothingFits,
    NotKept,
    has_exact_numbers,
    lark_of,
    needs_exact_numbers,
    without_marks,
)
from sempre.engine.frontend.schemas import SchemaRefused, rewritten
from sempre.engine.structured_outputs import StructuredOutputsParams

WHITE_SPACE = r"[ \n\r\t]{1,2}"
"""White space between two parts of JSON; without a bound a model may write only that until its limit."""
_OWN_SPACE = ("whitespace_flexible", "whitespace_pattern", "item_separator", "key_separator")


def json_forms(params: StructuredOutputsParams, max_tokens: int) -> list[dict[str, Any]]:
    """Return candidate grammars for the form, the best first: with bounds that fit `max_tokens` and, in case these
    contradict the schema, without; each with exact numbers where the library itself would omit some.

    Raises SchemaRefused.
    """
    forms = [_form(params, max_tokens), _form(params, None)]
    bodies: list[dict[str, Any]] = []
    for form in forms if forms[0] != forms[1] else forms[:1]:
        if not has_exact_numbers(form):
            bodies.append({"json_schema": form})
            continue
        # the library reports an invalid or too deep schema
        with suppress(NotKept, NothingFits, TypeError, AttributeError, ValueError, RecursionError):
            bodies.append({"lark_grammar": lark_of(form, form["x-guidance"])})
        if needs_exact_numbers(form) is None:
            bodies.append({"json_schema": without_marks(form)})
    if not bodies:
        raise SchemaRefused("", str(needs_exact_numbers(forms[0])))
    return bodies


def _form(params: StructuredOutputsParams, max_tokens: int | None) -> dict[str, Any]:
    schema = json.loads(params.json) if isinstance(params.json, str) else {"type": "object"}
    options = schema.pop("x-guidance", {})
    try:
        schema, nodes = rewritten(schema, closed=bool(params.disable_additional_properties))
        if max_tokens is not None:
            add_bounds(schema, nodes, max_tokens)
    except (TypeError, AttributeError, ValueError, RecursionError) as error:
        raise SchemaRefused("", f"is not a valid JSON schema: {error}") from None
    return {**schema, "x-guidance": _options(params, options)}


def _options(params: StructuredOutputsParams, given: Any) -> Any:
    """Options for the library: the request's override the schema's own."""
    if not isinstance(given, dict):
        return given
    options = {"coerce_one_of": True, **given}
    if params.whitespace_pattern is not None:
        return {**options, "whitespace_pattern": params.whitespace_pattern}
    if params.disable_any_whitespace:
        options.pop("whitespace_pattern", None)
        return {**options, "whitespace_flexible": False}
    return options if set(_OWN_SPACE) & set(given) else {**options, "whitespace_pattern": WHITE_SPACE}
