"""How a chat request's tools and the server's parsers affect its prompt, grammar and response."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Mapping
from dataclasses import dataclass
from dataclasses import replace as replaced
from typing import Any

import msgspec

from sempre.engine.frontend.request_builder import PreparedRequest
from sempre.engine.parsing import (
    OF_PHRASES,
    OF_SPECIAL_TOKENS,
    SHORT_IDS,
    TOOL_PARSERS,
    WHOLE_FORMATS,
    OutputParser,
    named_call_schema,
    required_calls_schema,
)
from sempre.engine.parsing.gemma4 import Gemma4Parser
from sempre.engine.parsing.harmony import HarmonyParser
from sempre.engine.parsing.output_parser import reasoning_splitter, whole_parser
from sempre.engine.parsing.pieces import Parser
from sempre.engine.parsing.reasoning import ReasoningCounter, ReasoningSplitter
from sempre.engine.parsing.tool_calls import NamedCallParser, RequiredCallsParser
from sempre.engine.server.config import ServerConfig
from sempre.engine.server.errors import BadRequest
from sempre.engine.server.message_parser import MessageParser, ParsedContent, PlainContent
from sempre.engine.server.parameters import structured_outputs
from sempre.engine.server.requests import ChatCompletionRequest, NamedToolChoice
from sempre.engine.structured_outputs import StructuredOutputsParams
from sempre.engine.text.token_stream import TokenStream
from sempre.engine.text.tokenizer import Tokenizer


@dataclass(frozen=True)
class ChatPlan:
    """Decisions about a request before its prompt is known."""

    template_tools: list[dict[str, Any]] | None
    """as passed to the chat template"""
    structured: StructuredOutputsParams | None
    call_parser: str | None
    """the format of the tool calls to parse: a name of TOOL_PARSERS or WHOLE_FORMATS, "required", or "named" """
    named: str
    """the function that tool_choice names, if any"""
    one_call: bool
    reasoning_parser: str | None
    include_reasoning: bool
    short_ids: bool
    """whether the ids of calls have the form that the model's chat template reads"""
    schemas: Mapping[str, dict[str, Any] | None]
    """of the arguments of the request's functions"""

    @classmethod
    def of(cls, request: ChatCompletionRequest, config: ServerConfig) -> ChatPlan:
        """Raises BadRequest or ConfigError naming the field."""
        structured = structured_outputs(request)
        if config.reasoning_parser in OF_PHRASES and request.thinking_token_budget not in (None, -1):
            raise BadRequest(
                f"thinking_token_budget is not available with the reasoning parser {config.reasoning_parser!r}, whose "
                "reasoning ends with a phrase, not with a tag. Leave it out.",
                param="thinking_token_budget",
            )
        parallel = request.parallel_tool_calls is not False
        call_parser, named = _call_parser(request, config)
        if call_parser in ("required", "named"):
            if structured is not None:
                raise BadRequest(
                    "You can use structured outputs or tools, not both: tool_choice enforces a tool call, and "
                    "response_format or structured_outputs another form.",
                    param="tool_choice",
                )
            structured = StructuredOutputsParams(json=_call_schema(request, named, parallel=parallel))
        elif structured is not None and _is_an_answer(structured):
            # output in such a form is the answer, even if it looks like a call
            call_parser = None
        return cls(
            template_tools=[msgspec.to_builtins(tool) for tool in request.tools] if request.tools else None,
            structured=structured,
            call_parser=call_parser,
            named=named,
            one_call=not parallel,
            reasoning_parser=config.reasoning_parser or None,
            include_reasoning=request.include_reasoning is not False,
            short_ids=config.tool_call_parser in SHORT_IDS,
            schemas={tool.function.name: tool.function.parameters for tool in request.tools or []},
        )

    @property
    def reads_special_tokens(self) -> bool:
        """Whether they must be in the text that is parsed."""
        return self.is_whole_format or bool({self.call_parser, self.reasoning_parser} & set(OF_SPECIAL_TOKENS))

    @property
    def is_whole_format(self) -> bool:
        """Whether reasoning, calls and content are parts of one format."""
        return self.reasoning_parser in WHOLE_FORMATS.values()

    @property
    def form(self) -> StructuredOutputsParams | None:
        """The form of the output; reasoning before it is free, unless the request says where the form begins."""
        if self.structured is None or self.structured.begins_after is not None:
            return self.structured
        if self.reasoning_parser is None or self.reasoning_parser in OF_PHRASES:
            return self.structured
        return replaced(self.structured, after_reasoning=True)

    def message_parsers(self, request: PreparedRequest, tokenizer: Tokenizer, n: int) -> list[MessageParser]:
        """The parsers of `n` choices, which a beam search does not have as sequences of its request.

        The ids of calls follow from the prompt and the seed, since they are part of the next prompt of many templates:
        the same conversation with the same seed goes on in the same way.
        """
        ids = array("q", request.prompt_token_ids).tobytes() if self._has_parser else b""
        origin = hashlib.sha256(ids).hexdigest()
        return [self._message_parser(request, tokenizer, f"{origin}/{request.seeds[0]}/{i}") for i in range(n)]

    @property
    def _has_parser(self) -> bool:
        return self.reasoning_parser is not None or self.call_parser is not None

    def _message_parser(self, request: PreparedRequest, tokenizer: Tokenizer, id_prefix: str) -> MessageParser:
        reasoning, counted = self._reasoning_parser(request), self._reasoning_parser(request)
        if reasoning is None and self.call_parser is None:
            return PlainContent()
        counter = None
        if counted is not None:
            skipped = tokenizer.special_texts if request.params.skip_special_tokens else ()
            counter = ReasoningCounter(counted, TokenStream(tokenizer, skipped, request.prompt_token_ids))
        return ParsedContent(
            OutputParser(reasoning, self._tool_parser(), one_call=self.one_call),
            id_prefix=id_prefix,
            short_ids=self.short_ids,
            reports_calls=self.call_parser != "named",
            has_content=self.call_parser not in ("required", "named"),
            include_reasoning=self.include_reasoning,
            counter=counter,
        )

    def _reasoning_parser(self, request: PreparedRequest) -> ReasoningSplitter | HarmonyParser | Gemma4Parser | None:
        if self.reasoning_parser is None:
            return None
        if self.is_whole_format:
            return whole_parser(self.reasoning_parser, request.reasoning, calls=self.call_parser in WHOLE_FORMATS)
        bound = (form := self.form) is not None and form.after_reasoning
        return reasoning_splitter(self.reasoning_parser, request.reasoning.opened, is_bound=bound)

    def _tool_parser(self) -> Parser | None:
        match self.call_parser:
            case None:
                return None
            case "named":
                return NamedCallParser(self.named)
            case "required":
                return RequiredCallsParser()
            case name:
                return None if name in WHOLE_FORMATS else TOOL_PARSERS[name](self.schemas)


def _call_parser(request: ChatCompletionRequest, config: ServerConfig) -> tuple[str | None, str]:
    """(format of the calls, named function)."""
    choice = request.tool_choice
    if not request.tools:
        if choice in (None, "none"):
            return None, ""
        raise BadRequest("When using `tool_choice`, `tools` must be set.", param="tool_choice")
    names = [tool.function.name for tool in request.tools]
    if len(set(names)) < len(names):
        raise BadRequest("tools: two functions have the same name.", param="tools")
    if isinstance(choice, NamedToolChoice):
        if choice.function.name not in names:
            raise BadRequest(
                f"tool_choice names the function {choice.function.name!r}, which is not among the tools: {names}.",
                param="tool_choice",
            )
        return "named", choice.function.name
    if choice == "required":
        return "required", ""
    if choice == "none":
        return None, ""
    if not (config.enable_auto_tool_choice and config.tool_call_parser):
        raise BadRequest(
            '"auto" tool choice requires --enable-auto-tool-choice and --tool-call-parser to be set.',
            param="tool_choice",
        )
    return config.tool_call_parser, ""


def _is_an_answer(form: StructuredOutputsParams) -> bool:
    """Whether the form describes a value; a regular expression, a grammar or tags may describe calls in the model's own
    format."""
    return form.regex is None and form.grammar is None and form.structural_tag is None


def _call_schema(request: ChatCompletionRequest, named: str, *, parallel: bool) -> dict[str, Any]:
    functions = [(tool.function.name, tool.function.parameters) for tool in request.tools or []]
    if named:
        return named_call_schema(dict(functions)[named])
    try:
        return required_calls_schema(functions, parallel=parallel)
    except ValueError as error:
        raise BadRequest(str(error), param="tools") from None
