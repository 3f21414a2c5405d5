"""Turns a requested output form into a grammar for the workers, checked before anything is queued."""

from __future__ import annotations

import dataclasses
import json
import logging
import re
import threading
from collections.abc import Sequence
from functools import cache
from typing import TYPE_CHECKING, NamedTuple

from msgspec.structs import replace

from sempre.engine.frontend.grammar_errors import expression_reason, reason
from sempre.engine.frontend.json_forms import json_forms
from sempre.engine.frontend.schema_lark import MAX_TRANSLATED_CHARACTERS, literal
from sempre.engine.frontend.schema_numbers import check_range
from sempre.engine.frontend.schemas import SchemaRefused
from sempre.engine.frontend.tag_grammars import tag_grammars
from sempre.engine.parsing import harmony
from sempre.engine.parsing.reasoning import PromptReasoning, tags_of
from sempre.engine.sampling_params import SamplingParams
from sempre.engine.structural_tags import parse_structural_tag
from sempre.engine.structured_outputs import StructuredOutputsParams
from sempre.engine.text.tokenizer import Tokenizer
from sempre.ipc.errors import RequestError
from sempre.ipc.messages import ReasoningSpec, SamplingSpec

if TYPE_CHECKING:
    from llguidance import LLTokenizer
logger = logging.getLogger(__name__)

# no output has more tokens, and it fits a message
MOST_REASONING = 2**31 - 1

MAX_GRAMMAR_BYTES = 128 * 1024
"""Maximum UTF-8 bytes of a schema, expression, grammar, or all choices."""

# A server checks a large grammar in a thread first; building the request then finds it here.
_MOST_BUILT = 64
_MOST_BUILT_CHARACTERS = 8 << 20

_BODY = "body"
_SPACE = r"/[ \n\r\t]{0,4}/"
_END = 256


class GrammarBuilder:
    """Checks and translates. A worker can compile what it accepts: both use the same library and limits.

    The limits count steps, not seconds, so a grammar is refused everywhere or nowhere.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._built = _Built()

    def build(self, params: StructuredOutputsParams, vocab_size: int, eos_token_ids: list[int], max_tokens: int) -> str:
        """The grammar in llguidance's form, bounded to fit `max_tokens`. Raises RequestError naming the field."""
        field = f"structured_outputs.{params.constraint}"
        _require_library("structured_outputs")
        if not eos_token_ids:
            raise RequestError(
                "structured_outputs: expected a model with an end-of-sequence token, found none: "
                "it is what ends a structured output.",
                parameter="structured_outputs",
            )
        key = (*(tuple(value) if isinstance(value, list) else value for value in vars(params).values()), max_tokens)
        found = self._built.get(key)
        if found is None:
            found = self._build(params, field, vocab_size, eos_token_ids, max_tokens)
            self._built.keep(key, found)
        if found.problem:
            raise RequestError(found.problem, parameter=field)
        return found.grammar

    def _build(
        self, params: StructuredOutputsParams, field: str, vocab_size: int, eos_token_ids: list[int], max_tokens: int
    ) -> _Form:
        problem: str | None = ""
        try:
            _check_size(params, field)
            # report the problem of the last one tried
            for grammar in self._translated(params, field, max_tokens):
                if len(grammar) > MAX_TRANSLATED_CHARACTERS:
                    problem = f"as a grammar it has {len(grammar)} characters, at most {MAX_TRANSLATED_CHARACTERS}."
                    continue
                problem = self._problem(grammar, params, vocab_size, eos_token_ids)
                if problem is None:
                    return _Form(grammar, "")
        except RequestError as error:
            return _Form("", str(error))
        return _Form("", f"{field} is refused: {problem}")

    def _translated(self, params: StructuredOutputsParams, field: str, max_tokens: int) -> list[str]:
        """Candidate grammars, the best first."""
        try:
            if params.structural_tag is None:
                bodies = [[{"name": _BODY, **body}] for body in _bodies(params, field, max_tokens)]
            else:
                bodies = self._tagged(params, field, max_tokens)
        except SchemaRefused as error:
            raise RequestError(f"{field} is refused: {error}", parameter=field) from None
        frames = []
        if params.begins_after is not None:
            first = f"/(?s:.*){literal(params.begins_after)}/"
            frame = f"start: before {_SPACE} @{_BODY}\nbefore[lazy]: {first}\n"
            frames = [{"name": "frame", "lark_grammar": frame}]
        return [json.dumps({"grammars": [*frames, *body]}) for body in bodies]

    def _tagged(self, params: StructuredOutputsParams, field: str, max_tokens: int) -> list[list[dict[str, object]]]:
        tags = parse_structural_tag(params.structural_tag)
        contents = []
        for tag in tags.tags:
            keywords = {"begins_after": None, "structural_tag": None, **tag.form}
            contents.append(_bodies(dataclasses.replace(params, **keywords), field, max_tokens))
        return tag_grammars(tags, contents, self._tokenizer.special_texts, _BODY)

    def with_reasoning(self, spec: SamplingSpec, params: SamplingParams, prompt: PromptReasoning) -> SamplingSpec:
        """Return `spec` adapted to an output that reasons before its answer, after this prompt."""
        form, budget = params.structured_outputs, params.thinking_token_budget
        grammar = spec.grammar if form is not None and form.after_reasoning else None
        if grammar is None and budget is None:
            return spec
        _require_library("structured_outputs" if budget is None else "thinking_token_budget")
        if harmony.is_harmony(self._tokenizer):
            return self._with_channels(spec, grammar, budget, prompt.open_message)
        opened = prompt.opened
        if opened is None:
            return spec
        framed = None if grammar is None else self._after_reasoning(grammar, opened=opened)
        tags = tags_of(self._tokenizer)
        reasoning = ReasoningSpec(
            start=tags.start,
            end=tags.end,
            end_token_ids=self._tokenizer.encode(tags.end, add_special_tokens=False),
            begins_inside=opened,
            grammar=None if opened else framed,
            budget=None if budget is None else min(budget, MOST_REASONING),
        )
        if opened and framed is not None:
            return replace(spec, grammar=framed, reasoning=None if budget is None else reasoning)
        return replace(spec, reasoning=reasoning)

    def _with_channels(self, spec: SamplingSpec, grammar: str | None, budget: int | None, message: str) -> SamplingSpec:
        """`message`: the prompt's unfinished one."""
        if budget is not None:
            raise RequestError(
                "thinking_token_budget is for reasoning between <think> and </think>, which this model does not write. "
                "Ask for less with reasoning_effort.",
                parameter="thinking_token_budget",
                value=budget,
            )
        if grammar is None or harmony.MESSAGE in message:
            return spec
        return replace(spec, grammar=self._in_final_message(grammar, begun=bool(message)))

    def _in_final_message(self, grammar: str, *, begun: bool) -> str:
        """`grammar` as a message on the channel `final`, optionally after one with reasoning."""
        tags = {text: f"<[{token_id}]>" for token_id, text in self._tokenizer.special_texts.items()}
        role = f'{tags[harmony.START]} "assistant"'
        analysis, final = (
            f'{tags[harmony.CHANNEL]} "{channel}" {tags[harmony.MESSAGE]}' for channel in ("analysis", "final")
        )
        # no text matches a special token, so the thoughts end where their message does
        frame = [
            f"start: {'' if begun else role} thoughts {final} {_SPACE} @{_BODY}",
            f"thoughts: ({analysis} THOUGHTS {tags[harmony.END]} {role})?",
            "THOUGHTS: /(?s:.*)/",
        ]
        return _framed(frame, grammar)

    def _after_reasoning(self, grammar: str, *, opened: bool) -> str:
        """`grammar` after reasoning; if `opened`, its start tag is in the prompt."""
        tags = tags_of(self._tokenizer)
        start, end = (self._tokenizer.encode(tag, add_special_tokens=False) for tag in tags)
        # write a one-token tag as that token; it may be special, and no text matches special tokens
        open_tag = f"<[{start[0]}]>" if len(start) == 1 else json.dumps(tags.start)
        frame = [
            f"start: {'' if opened else open_tag} thoughts {_SPACE} @{_BODY}",
            "thoughts: closed" + (f" | THOUGHTS <[{end[0]}]>" if len(end) == 1 else ""),
            f"closed[lazy]: THOUGHTS {json.dumps(tags.end)}",
            # a complement alone would allow the bytes that stand for special tokens, too
            f"THOUGHTS: /(?s:.*)/ & ~/(?s:.*){literal(tags.end)}(?s:.*)/",
        ]
        return _framed(frame, grammar)

    def _problem(
        self, grammar: str, params: StructuredOutputsParams, vocab_size: int, eos_token_ids: list[int]
    ) -> str | None:
        from llguidance import LLMatcher, LLParserLimits, LLTokenizer, regex_to_lark

        field = f"structured_outputs.{params.constraint}"
        framed = grammar
        if params.after_reasoning and harmony.is_harmony(self._tokenizer):
            framed = self._in_final_message(grammar, begun=True)
        elif params.after_reasoning:
            framed = self._after_reasoning(grammar, opened=False)
        limits = LLParserLimits(verbose_errors=False)
        failed, messages = LLMatcher.validate_grammar_with_warnings(framed, None, limits=limits)
        messages = _without_remarks(messages, field)
        if not failed and messages:
            # special tokens have names that only the tokenizer knows
            tokenizer = LLTokenizer(self._tokenizer.to_json(), n_vocab=vocab_size, eos_token=eos_token_ids)
            failed, messages = LLMatcher.validate_grammar_with_warnings(framed, tokenizer, limits=limits)
            messages = _without_remarks(messages, field)
        elif not failed:
            # an unsatisfiable grammar allows no first byte
            start = LLMatcher(byte_tokenizer(), grammar, log_level=0, limits=limits)
            start.compute_bitmask()
            messages = [_reason(start.get_error())] if start.is_error() else []
        if not failed and not messages:
            return None
        if params.regex is not None:
            return expression_reason(messages[0], params.regex, regex_to_lark)
        return reason(messages[0], {params.whitespace_pattern: "whitespace_pattern"})


def _framed(frame: Sequence[str], grammar: str) -> str:
    return json.dumps(
        {"grammars": [{"name": "frame", "lark_grammar": "\n".join(frame)}, *json.loads(grammar)["grammars"]]}
    )


class _Form(NamedTuple):
    """A grammar, or why it is refused."""

    grammar: str
    problem: str


class _Built:
    """A thread-safe cache of recently built forms."""

    def __init__(self) -> None:
        self._forms: dict[tuple[object, ...], _Form] = {}
        self._lock = threading.Lock()

    def get(self, key: tuple[object, ...]) -> _Form | None:
        return self._forms.get(key)

    def keep(self, key: tuple[object, ...], form: _Form) -> None:
        """Add a form; drop the oldest ones."""
        with self._lock:
            self._forms[key] = form
            while len(self._forms) > _MOST_BUILT or sum(map(_size, self._forms.items())) > _MOST_BUILT_CHARACTERS:
                del self._forms[next(iter(self._forms))]


def _size(kept: tuple[tuple[object, ...], _Form]) -> int:
    key, form = kept
    texts = [text for part in key for text in (part if isinstance(part, tuple) else [part]) if isinstance(text, str)]
    return len(form.grammar) + sum(map(len, texts))


def _without_remarks(messages: list[str], field: str) -> list[str]:
    """Log where the library deviates from the schema, and return the other messages."""
    rest = [message for message in messages if not message.startswith("oneOf ")]
    if len(rest) < len(messages):
        logger.warning("%s: oneOf is treated as anyOf, since its cases may overlap", field)
    return rest


def _reason(message: str) -> str:
    first = message.partition("\n")[0]
    return "no text fulfils it." if first.startswith("NoExtension") else first


def _check_size(params: StructuredOutputsParams, field: str) -> None:
    given = getattr(params, params.constraint)
    parts = [given] if isinstance(given, str) else given if isinstance(given, list) else []
    parts = [*parts, params.begins_after or "", params.whitespace_pattern or ""]
    size = sum(len(part.encode(errors="replace")) for part in parts)
    if size > MAX_GRAMMAR_BYTES:
        raise RequestError(
            f"{field} may have at most {MAX_GRAMMAR_BYTES} bytes, found {size}.", parameter=field, value=size
        )


def _require_library(parameter: str) -> None:
    try:
        import llguidance  # noqa: F401
    except ImportError:
        raise RequestError(
            f"{parameter} needs the package llguidance, which is not installed: pip install llguidance",
            parameter=parameter,
        ) from None


def _bodies(params: StructuredOutputsParams, field: str, max_tokens: int) -> list[dict[str, object]]:
    """Candidates for a form, the best first. Raises SchemaRefused, RequestError."""
    if params.json is None and not params.json_object:
        return [_text_body(params, field)]
    return json_forms(params, max_tokens)


def _text_body(params: StructuredOutputsParams, field: str) -> dict[str, object]:
    """One grammar of llguidance's list."""
    if params.choice is not None:
        # Lark uses JSON's escapes
        return {"lark_grammar": "start: " + " | ".join(json.dumps(choice) for choice in params.choice)}
    if params.regex is not None:
        from llguidance import regex_to_lark

        # the library would drop this backslash
        if (len(params.regex) - len(params.regex.rstrip("\\"))) % 2:
            raise RequestError(f"{field} is refused: it ends with a backslash that escapes nothing.", parameter=field)
        return {"lark_grammar": f"start: /{regex_to_lark(params.regex)}/"}
    assert params.grammar is not None
    return {"lark_grammar": _checked_lark(_lark(params.grammar, field), field)}


def _lark(grammar: str, field: str) -> str:
    if "::=" not in grammar:
        return grammar
    from llguidance.gbnf_to_lark import gbnf_to_lark

    try:
        return str(gbnf_to_lark(grammar))
    except RecursionError:
        raise RequestError(f"{field} is refused: it is nested too deeply.", parameter=field) from None
    # the library raises plain Exception for some mistakes and its own error for others
    except Exception as error:
        raise RequestError(f"{field} is refused: {reason(str(error))}", parameter=field) from None


def _checked_lark(grammar: str, field: str) -> str:
    """Check that `%json {…}` in a grammar holds no number that crashes the library; return the grammar."""
    for found in re.finditer(r"%json\s*(?={)", grammar):
        try:
            schema, _ = json.JSONDecoder().raw_decode(grammar, found.end())
            check_range(schema)
        except json.JSONDecodeError:
            continue  # the library reports this, unless it is inside a string
        except (ValueError, RecursionError) as error:
            raise RequestError(f"{field} is refused: %json: {error}", parameter=field) from None
    return grammar


class _Bytes:
    """The tokenizer interface that llguidance requires."""

    eos_token_id = _END
    bos_token_id = None
    special_token_ids = (_END,)
    tokens = (*(bytes([byte]) for byte in range(256)), b"<end>")

    def __call__(self, text: str | bytes) -> list[int]:
        return list(text if isinstance(text, bytes) else text.encode())


@cache
def byte_tokenizer() -> LLTokenizer:
    """Return the shared tokenizer; creating it takes milliseconds."""
    from llguidance import LLTokenizer, TokenizerWrapper

    return LLTokenizer(TokenizerWrapper(_Bytes()), n_vocab=_END + 1, eos_token=[_END])
