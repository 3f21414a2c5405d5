"""From what a user says of an output's form to a grammar as the workers take it, checked before anything is queued."""

from __future__ import annotations

import json
import re

from sempre.engine.structured_outputs import StructuredOutputsParams
from sempre.engine.text.tokenizer import Tokenizer
from sempre.ipc.errors import RequestError

MAX_GRAMMAR_BYTES = 128 * 1024
"""Most UTF-8 bytes of a schema, expression, grammar, or all choices. Compiling the largest takes below a second."""

_BODY = "body"


class GrammarBuilder:
    """Checks and translates. What it accepts a worker can compile: both ask the same library, within the same limits.

    The limits are counts of work, not seconds, so the same grammar is refused everywhere or nowhere.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer

    def build(self, params: StructuredOutputsParams, vocab_size: int, eos_token_ids: list[int]) -> str:
        """The grammar in llguidance's form. Raises RequestError naming the field."""
        field = f"structured_outputs.{params.constraint}"
        if not eos_token_ids:
            raise RequestError(
                "structured_outputs: expected a model with an end-of-sequence token, found none: "
                "it is what ends a structured output.",
                parameter="structured_outputs",
            )
        try:
            import llguidance  # noqa: F401
        except ImportError:
            raise RequestError(
                "structured_outputs needs the llguidance package: pip install 'sempre[structured]'.",
                parameter="structured_outputs",
            ) from None
        grammar = _translated(params, field)
        size = len(grammar.encode())
        if size > MAX_GRAMMAR_BYTES:
            raise RequestError(
                f"{field} may have at most {MAX_GRAMMAR_BYTES} bytes, found {size}.", parameter=field, value=size
            )
        self._check(grammar, field, vocab_size, eos_token_ids)
        return grammar

    def _check(self, grammar: str, field: str, vocab_size: int, eos_token_ids: list[int]) -> None:
        from llguidance import LLMatcher, LLParserLimits, LLTokenizer

        limits = LLParserLimits(verbose_errors=False)
        failed, messages = LLMatcher.validate_grammar_with_warnings(grammar, None, limits=limits)
        if not failed and messages:
            # special tokens are named, and only the tokenizer knows them
            tokenizer = LLTokenizer(self._tokenizer.to_json(), n_vocab=vocab_size, eos_token=eos_token_ids)
            failed, messages = LLMatcher.validate_grammar_with_warnings(grammar, tokenizer, limits=limits)
        if failed or messages:
            raise RequestError(f"{field} is refused: {messages[0].strip()}", parameter=field)


def _translated(params: StructuredOutputsParams, field: str) -> str:
    body = _body(params, field)
    if params.begins_after is not None:
        first = f"/(?s:.*){_escaped(params.begins_after)}/"
        frame = rf"start: before /\s*/ @{_BODY}" + f"\nbefore[lazy]: {first}\n"
        return json.dumps({"grammars": [{"name": "frame", "lark_grammar": frame}, {"name": _BODY, **body}]})
    return json.dumps({"grammars": [{"name": _BODY, **body}]})


def _body(params: StructuredOutputsParams, field: str) -> dict[str, object]:
    """One grammar of llguidance's list."""
    if params.json is not None or params.json_object:
        schema: dict[str, object] = json.loads(params.json) if isinstance(params.json, str) else {"type": "object"}
        options = schema.get("x-guidance", {})
        if params.disable_any_whitespace and isinstance(options, dict):
            schema["x-guidance"] = {**options, "whitespace_flexible": False}
        return {"json_schema": schema}
    if params.choice is not None:
        # escapes of JSON are Lark's too
        return {"lark_grammar": "start: " + " | ".join(json.dumps(choice) for choice in params.choice)}
    if params.regex is not None:
        from llguidance import regex_to_lark

        return {"lark_grammar": f"start: /{regex_to_lark(params.regex)}/"}
    assert params.grammar is not None
    return {"lark_grammar": _lark(params.grammar, field)}


def _lark(grammar: str, field: str) -> str:
    if "::=" not in grammar:
        return grammar
    from llguidance.gbnf_to_lark import GbnfToLarkError, gbnf_to_lark

    try:
        return str(gbnf_to_lark(grammar))
    except GbnfToLarkError as error:
        raise RequestError(f"{field} is refused: {error}", parameter=field) from None


def _escaped(text: str) -> str:
    """As a regular expression between slashes."""
    return re.escape(text).replace("/", r"\/").replace("\n", r"\n")
