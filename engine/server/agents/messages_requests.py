"""Bodies of requests of /v1/messages: Anthropic's fields, and this engine's own.

Fields and blocks of Anthropic's that this server lacks are refused, except those in `neutral.py`.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from msgspec import Meta, Struct

from sempre.engine.server.agents.sampling import SamplingFields


class TextBlock(Struct, kw_only=True, tag="text"):
    """Text of a message."""

    text: str


class ThinkingBlock(Struct, kw_only=True, tag="thinking"):
    """Reasoning of an earlier answer."""

    thinking: str


class ToolUseBlock(Struct, kw_only=True, tag="tool_use"):
    """A call of a tool in an earlier answer."""

    id: Annotated[str, Meta(min_length=1)]
    name: Annotated[str, Meta(min_length=1)]
    input: dict[str, Any]


class ToolResultBlock(Struct, kw_only=True, tag="tool_result"):
    """What a tool has returned."""

    tool_use_id: Annotated[str, Meta(min_length=1)]
    content: str | list[TextBlock] | None = None
    is_error: Annotated[bool, Meta(description="the model reads `Error: ` before the content")] = False


InputBlock = TextBlock | ThinkingBlock | ToolUseBlock | ToolResultBlock


class InputMessage(Struct, kw_only=True):
    """One message of the conversation. If the last one is the assistant's, the answer continues it."""

    role: Literal["user", "assistant", "system"]
    content: str | list[InputBlock]


class ClientTool(Struct, kw_only=True, tag="custom"):
    """A tool that the client runs."""

    name: Annotated[str, Meta(min_length=1, max_length=128)]
    input_schema: Annotated[dict[str, Any], Meta(description="JSON schema of the input")]
    description: str | None = None
    strict: Annotated[bool | None, Meta(description="accepted, without effect")] = None


class AutoChoice(Struct, kw_only=True, tag="auto"):
    """The model decides whether it calls tools."""

    disable_parallel_tool_use: bool = False


class AnyChoice(Struct, kw_only=True, tag="any"):
    """The model must call tools."""

    disable_parallel_tool_use: bool = False


class ToolChoice(Struct, kw_only=True, tag="tool"):
    """The model must call this tool."""

    name: str
    disable_parallel_tool_use: bool = False


class NoneChoice(Struct, kw_only=True, tag="none"):
    """The model calls no tools."""


class ThinkingEnabled(Struct, kw_only=True, tag="enabled"):
    """The model thinks, at most so many tokens."""

    budget_tokens: Annotated[int, Meta(ge=1)]
    display: Annotated[
        Literal["summarized", "omitted"] | None, Meta(description="omitted: no thinking in the answer; else all of it")
    ] = None


class ThinkingAdaptive(Struct, kw_only=True, tag="adaptive"):
    """The model decides whether it thinks."""

    display: Literal["summarized", "omitted"] | None = None


class ThinkingDisabled(Struct, kw_only=True, tag="disabled"):
    """The chat template is told to switch thinking off."""


class JsonFormat(Struct, kw_only=True, tag="json_schema"):
    """The answer is JSON of this schema."""

    schema: dict[str, Any]


class OutputConfig(Struct, kw_only=True):
    """The effort of the model and the form of its answer."""

    effort: Annotated[
        Literal["low", "medium", "high", "xhigh", "max"] | None, Meta(description="a variable of the chat template")
    ] = None
    format: JsonFormat | None = None


class CountTokensRequest(SamplingFields, kw_only=True):
    """Body of /v1/messages/count_tokens, which makes the prompt that /v1/messages would."""

    messages: Annotated[list[InputMessage], Meta(min_length=1)]
    system: str | list[TextBlock] | None = None
    tools: Annotated[list[ClientTool], Meta(max_length=128)] | None = None
    tool_choice: AutoChoice | AnyChoice | ToolChoice | NoneChoice | None = None
    thinking: ThinkingEnabled | ThinkingAdaptive | ThinkingDisabled | None = None
    output_config: OutputConfig | None = None


class MessagesRequest(CountTokensRequest, kw_only=True):
    """Body of /v1/messages."""

    max_tokens: Annotated[int, Meta(ge=1)]
    stop_sequences: list[str] | None = None
