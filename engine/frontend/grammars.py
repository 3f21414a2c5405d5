"""From what a user says of an output's form to a grammar as the workers take it, checked before anything is queued."""

from __future__ import annotations

import json
import re

from msgspec.structs import replace

from sempre.engine.parsing.reasoning import END, START, opens_reasoning
from sempre.engine.sampling_params import SamplingParams
from sempre.engine.structured_outputs import StructuredOutputsParams
from sempre.engine.text.tokenizer import Tokenizer
from sempre.ipc.errors import RequestError
from sempre.ipc.messages import ReasoningSpec, SamplingSpec

MAX_GRAMMAR_BYTES = 128 * 1024
"""Most UTF-8 bytes of a schema, expression, grammar, or all choices. Compiling the largest takes below a second."""

_BODY = "body"
_SPACE = r"/[ \n\r\t]{0,4}/"
# any bytes without the end tag, also those that are no UTF-8
_THOUGHTS = rf"~/(?s:.*){re.escape(END).replace('/', chr(92) + '/')}(?s:.*)/"
_TAIL_TOKENS = 16
"""Last tokens of a prompt in which a tag that ends it is looked for."""


class GrammarBuilder:
    """Checks and translates. What it accepts a worker can compile: both ask the same library, within the same limits.

    The limits are counts of work, not seconds, so the same grammar is refused everywhere or nowhere.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer

    def build(self, params: StructuredOutputsParams, vocab_size: int, eos_token_ids: list[int]) -> str:
        """The grammar in llguidance's form. Raises RequestError naming the field."""
        field = f"structured_outputs.{params.constraint}"
        _require_library("structured_outputs")
        if not eos_token_ids:
            raise RequestError(
                "structured_outputs: expected a model with an end-of-sequence token, found none: "
                "it is what ends a structured output.",
                parameter="structured_outputs",
            )
        grammar = _translated(params, field)
        size = len(grammar.encode())
        if size > MAX_GRAMMAR_BYTES:
            raise RequestError(
                f"{field} may have at most {MAX_GRAMMAR_BYTES} bytes, found {size}.", parameter=field, value=size
            )
        checked = self._after_reasoning(grammar, opened=False) if params.after_reasoning else grammar
        self._check(checked, field, vocab_size, eos_token_ids)
        return grammar

    def with_reasoning(self, spec: SamplingSpec, params: SamplingParams, prompt_token_ids: list[int]) -> SamplingSpec:
        """Return `spec` with what holds for an output that reasons before its answer, behind this prompt."""
        form, budget = params.structured_outputs, params.thinking_token_budget
        grammar = spec.grammar if form is not None and form.after_reasoning else None
        if grammar is None and budget is None:
            return spec
        _require_library("structured_outputs" if budget is None else "thinking_token_budget")
        opened = opens_reasoning(self._tokenizer.decode(prompt_token_ids[-_TAIL_TOKENS:], skip_special_tokens=False))
        if opened is None:
            return spec
        framed = None if grammar is None else self._after_reasoning(grammar, opened=opened)
        reasoning = ReasoningSpec(
            start=START,
            end=END,
            end_token_ids=self._tokenizer.encode(END, add_special_tokens=False),
            begins_inside=opened,
            grammar=None if opened else framed,
            budget=budget,
        )
        if opened and framed is not None:
            return replace(spec, grammar=framed, reasoning=None if budget is None else reasoning)
        return replace(spec, reasoning=reasoning)

    def _after_reasoning(self, grammar: str, *, opened: bool) -> str:
        """`grammar` behind reasoning, whose start tag stands in the prompt where it is `opened`."""
        start, end = (self._tokenizer.encode(tag, add_special_tokens=False) for tag in (START, END))
        # a tag that is one token is written as that token; it may be a special one, which no text matches
        open_tag = f"<[{start[0]}]>" if len(start) == 1 else json.dumps(START)
        frame = [
            f"start: {'' if opened else open_tag} thoughts {_SPACE} @{_BODY}",
            "thoughts: closed" + (f" | THOUGHTS <[{end[0]}]>" if len(end) == 1 else ""),
            f"closed[lazy]: THOUGHTS {json.dumps(END)}",
            f"THOUGHTS: {_THOUGHTS}",
        ]
        return json.dumps(
            {"grammars": [{"name": "frame", "lark_grammar": "\n".join(frame)}, *json.loads(grammar)["grammars"]]}
        )

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


def _require_library(parameter: str) -> None:
    try:
        import llguidance  # noqa: F401
    except ImportError:
        raise RequestError(
            f"{parameter} needs the llguidance package: pip install 'sempre[structured]'.", parameter=parameter
        ) from None


def _translated(params: StructuredOutputsParams, field: str) -> str:
    body = _body(params, field)
    if params.begins_after is not None:
        first = f"/(?s:.*){_escaped(params.begins_after)}/"
        frame = f"start: before {_SPACE} @{_BODY}\nbefore[lazy]: {first}\n"
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
