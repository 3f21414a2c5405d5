"""Splits a model's text into reasoning, content and tool calls while it is generated.

    pieces.py        what a parser yields, and the message assembled from it
    harmony.py       HarmonyParser: the messages of gpt-oss, with their channels
    gemma4.py        Gemma4Parser: the thoughts and calls of Gemma 4; gemma4_arguments.py: those of a call, into JSON
    reasoning.py     ReasoningSplitter: <think> … </think>, and the tags or phrases of other models
    call_scanner.py  CallScanner: one JSON object that names a function and its arguments
    tool_calls.py    HermesParser, Llama3JsonParser; JSON schemas that enforce calls, and parsers for them
    tagged_calls.py  DeepSeekV3Parser, DeepSeekV31Parser, MistralParser: tags around a name and its JSON
    xml_calls.py     Qwen3CoderParser, SeedOssParser: an element per parameter
    pythonic.py      PythonicParser: a list of calls in Python; python_call.py: the arguments of one, into JSON
    detection.py     the format of tool calls that a chat template shows
    output_parser.py OutputParser: reasoning, then tool calls, of one output

The pieces do not depend on how the text was cut into chunks: a stream and a whole message are parsed alike.
Nothing here depends on servers or engines.
"""

from sempre.engine.parsing.output_parser import (
    OF_PHRASES,
    OF_SPECIAL_TOKENS,
    REASONING_PARSERS,
    SHORT_IDS,
    TOOL_PARSERS,
    WHOLE_FORMATS,
    OutputParser,
)
from sempre.engine.parsing.pieces import (
    Arguments,
    CallStart,
    Content,
    ParsedMessage,
    Piece,
    Reasoning,
    ToolCall,
    assemble,
)
from sempre.engine.parsing.tool_calls import named_call_schema, required_calls_schema

__all__ = [
    "OF_PHRASES",
    "OF_SPECIAL_TOKENS",
    "REASONING_PARSERS",
    "SHORT_IDS",
    "TOOL_PARSERS",
    "WHOLE_FORMATS",
    "Arguments",
    "CallStart",
    "Content",
    "OutputParser",
    "ParsedMessage",
    "Piece",
    "Reasoning",
    "ToolCall",
    "assemble",
    "named_call_schema",
    "required_calls_schema",
]
