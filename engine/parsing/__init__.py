"""What a model's text means: reasoning, content and tool calls, piece by piece while it is generated.

    pieces.py        what a parser yields, and the message that they make up
    reasoning.py     ReasoningSplitter: <think> … </think>
    call_scanner.py  CallScanner: one JSON object that names a function and its arguments
    tool_calls.py    HermesParser, Llama3JsonParser; the JSON schema that enforces a call, and the parsers of such
    output_parser.py OutputParser: the two in a row, for one output

The pieces of a text do not depend on how it was cut into chunks: a stream and a whole message are parsed alike.
Nothing here knows of servers or engines.
"""

from sempre.engine.parsing.output_parser import REASONING_PARSERS, TOOL_PARSERS, OutputParser
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
    "REASONING_PARSERS",
    "TOOL_PARSERS",
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
