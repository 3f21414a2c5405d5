"""Parses the reasoning and then the tool calls of one output."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from sempre.engine.parsing.gemma4 import Gemma4Parser
from sempre.engine.parsing.harmony import HarmonyParser
from sempre.engine.parsing.pieces import Content, Parser, Piece
from sempre.engine.parsing.pythonic import PythonicParser
from sempre.engine.parsing.reasoning import (
    GRANITE,
    MISTRAL,
    SEED,
    THINK,
    PromptReasoning,
    ReasoningSplitter,
    ReasoningTags,
)
from sempre.engine.parsing.tagged_calls import DeepSeekV3Parser, DeepSeekV31Parser, MistralParser
from sempre.engine.parsing.tool_calls import HermesParser, Llama3JsonParser, Schema
from sempre.engine.parsing.xml_calls import Qwen3CoderParser, SeedOssParser

Schemas = Mapping[str, Schema | None]
"""Name of a function → the schema of its arguments."""

WHOLE_FORMATS: dict[str, str] = {"openai": "openai_gptoss", "gemma4": "gemma4"}
"""Formats of whole outputs, whose tags are special tokens: the name of the parser of tool calls, and of reasoning."""

REASONING_PARSERS: dict[str, tuple[ReasoningTags, ...]] = {
    "qwen3": (THINK,),
    "deepseek_r1": (THINK,),
    "mistral": (MISTRAL,),
    "seed_oss": (SEED,),
    "granite": GRANITE,
}
"""Models by name: what begins and ends their reasoning."""

BEGINS_INSIDE = ("deepseek_r1",)
"""Those whose unconstrained output begins inside its reasoning, however the prompt ends."""

OF_PHRASES = ("granite",)
"""Those that mark reasoning by phrases, which no grammar and no budget knows."""

TOOL_PARSERS: dict[str, Callable[[Schemas], Parser]] = {
    "hermes": lambda _schemas: HermesParser(),
    "llama3_json": lambda _schemas: Llama3JsonParser(),
    "mistral": lambda _schemas: MistralParser(),
    "pythonic": lambda _schemas: PythonicParser(),
    "deepseek_v3": lambda _schemas: DeepSeekV3Parser(),
    "deepseek_v31": lambda _schemas: DeepSeekV31Parser(),
    "qwen3_coder": Qwen3CoderParser,
    "seed_oss": SeedOssParser,
}
"""Formats of tool calls by name: a parser for tools with the given schemas."""

OF_SPECIAL_TOKENS = ("mistral",)
"""Formats of tool calls and of reasoning whose tags are special tokens, which must be in the text that is parsed."""

SHORT_IDS = ("mistral",)
"""Those whose chat templates read ids of nine letters and digits."""


def whole_parser(name: str, reasoning: PromptReasoning, *, calls: bool) -> HarmonyParser | Gemma4Parser:
    """The parser of an output in the whole format whose parser of reasoning has this name.

    `reasoning` is the prompt's. Without `calls`, calls are content.
    """
    if name == WHOLE_FORMATS["openai"]:
        return HarmonyParser(reasoning.open_message, calls=calls)
    return Gemma4Parser(reasoning.open_channel, calls=calls)


def reasoning_splitter(name: str, opened: bool | None, *, is_bound: bool = False) -> ReasoningSplitter | None:
    """The splitter of an output whose prompt has `opened` reasoning; None if the prompt switched reasoning off.

    `is_bound`: the answer is structured, from the first token if the output does not begin with the start tag.
    """
    if opened is None:
        return None
    inside = opened or (name in BEGINS_INSIDE and not is_bound)
    return ReasoningSplitter(inside=inside, tags=REASONING_PARSERS[name])


class OutputParser:
    """Splits off reasoning and parses tool calls in the rest; either may be None.

    A parser that finds reasoning may find calls, too.
    """

    def __init__(self, reasoning: Parser | None, tools: Parser | None, *, one_call: bool = False) -> None:
        """`one_call`: leave out every tool call but the first."""
        self._reasoning = reasoning
        self._tools = tools
        self._one_call = one_call

    def feed(self, text: str) -> list[Piece]:
        """Return the pieces that are certain after `text`."""
        return self._through_tools([Content(text)] if self._reasoning is None else self._reasoning.feed(text))

    def finish(self) -> list[Piece]:
        """End the text; return the remaining pieces."""
        pieces = [] if self._reasoning is None else self._through_tools(self._reasoning.finish())
        return pieces if self._tools is None else [*pieces, *self._counted(self._tools.finish())]

    def parse(self, text: str) -> list[Piece]:
        """Return all pieces of a complete text."""
        return [*self.feed(text), *self.finish()]

    def _through_tools(self, pieces: list[Piece]) -> list[Piece]:
        tools = self._tools
        if tools is None:
            return self._counted([piece for piece in pieces if piece != Content("")])
        found: list[Piece] = []
        for piece in pieces:
            found += tools.feed(piece.text) if isinstance(piece, Content) else [piece]
        return self._counted(found)

    def _counted(self, pieces: list[Piece]) -> list[Piece]:
        return [piece for piece in pieces if not (self._one_call and getattr(piece, "index", 0) > 0)]
