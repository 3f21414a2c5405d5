"""Body of requests of /v1/responses: OpenAI's fields, and this engine's own.

Fields, items and tools of OpenAI's that this server lacks are refused, except those in `neutral.py`.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from msgspec import Meta, Struct

from sempre.engine.server.agents.sampling import SamplingFields


class InputText(Struct, kw_only=True, tag="input_text"):
    """Text of a message or of what a tool returned."""

    text: str


class OutputText(Struct, kw_only=True, tag="output_text"):
    """Text of an earlier answer."""

    text: str


class Refusal(Struct, kw_only=True, tag="refusal"):
    """Text of an earlier refusal."""

    refusal: str


class InputItemMessage(Struct, kw_only=True, tag="message"):
    """A message; an item without a type is one."""

    is_default: ClassVar[bool] = True

    role: Literal["user", "assistant", "system", "developer"]
    content: str | list[InputText | OutputText | Refusal]


class SummaryText(Struct, kw_only=True, tag="summary_text"):
    text: str


class ReasoningText(Struct, kw_only=True, tag="reasoning_text"):
    text: str


class ReasoningItem(Struct, kw_only=True, tag="reasoning"):
    """Reasoning of an earlier answer: its content, else what `reasoning.encrypted_content` made of it."""

    summary: list[SummaryText] = []
    content: list[ReasoningText] | None = None
    encrypted_content: str | None = None


class FunctionCallItem(Struct, kw_only=True, tag="function_call"):
    """A call of a function in an earlier answer."""

    call_id: Annotated[str, Meta(min_length=1)]
    name: Annotated[str, Meta(min_length=1)]
    arguments: str


class FunctionCallOutputItem(Struct, kw_only=True, tag="function_call_output"):
    """What a function has returned."""

    call_id: Annotated[str, Meta(min_length=1)]
    output: str | list[InputText]


InputItem = InputItemMessage | ReasoningItem | FunctionCallItem | FunctionCallOutputItem


class FunctionTool(Struct, kw_only=True, tag="function"):
    """A function that the model may call. Its schema is enforced strictly if a call is enforced."""

    name: Annotated[str, Meta(min_length=1, max_length=128)]
    parameters: dict[str, Any] | None = None
    description: str | None = None
    strict: Annotated[bool | None, Meta(description="accepted, without effect")] = None


class FunctionChoice(Struct, kw_only=True, tag="function"):
    """Call this function."""

    name: str


class TextFormat(Struct, kw_only=True, tag="text"):
    """Free text."""


class JsonObjectFormat(Struct, kw_only=True, tag="json_object"):
    """Any JSON object."""


class JsonSchemaTextFormat(Struct, kw_only=True, tag="json_schema"):
    """JSON of a schema, which is always enforced strictly."""

    schema: dict[str, Any]
    name: str | None = None
    description: str | None = None
    strict: bool | None = None


class TextConfig(Struct, kw_only=True):
    """The form of the answer."""

    format: TextFormat | JsonObjectFormat | JsonSchemaTextFormat | None = None


class ReasoningConfig(Struct, kw_only=True):
    """The effort of the model. Its reasoning is always told as it is, never summarised."""

    effort: Annotated[
        Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"] | None,
        Meta(description="a variable of the chat template"),
    ] = None
    summary: Annotated[Literal["auto", "concise", "detailed"] | None, Meta(description="accepted, without effect")] = (
        None
    )


Includable = Literal[
    "reasoning.encrypted_content",
    "file_search_call.results",
    "web_search_call.results",
    "web_search_call.action.sources",
    "message.input_image.image_url",
    "computer_call_output.output.image_url",
    "code_interpreter_call.outputs",
]


class ResponsesRequest(SamplingFields, kw_only=True):
    """Body of /v1/responses."""

    input: str | list[InputItem]
    instructions: Annotated[str | None, Meta(description="a system message before the input")] = None
    max_output_tokens: Annotated[int, Meta(ge=1, description="default: as many as the context holds")] | None = None
    tools: Annotated[list[FunctionTool], Meta(max_length=128)] | None = None
    tool_choice: Literal["none", "auto", "required"] | FunctionChoice | None = None
    parallel_tool_calls: Annotated[bool | None, Meta(description="false: at most one tool call")] = None
    text: TextConfig | None = None
    reasoning: ReasoningConfig | None = None
    include: Annotated[
        list[Includable] | None, Meta(description="`reasoning.encrypted_content`; others are of tools not built here")
    ] = None
    metadata: Annotated[dict[str, str] | None, Meta(description="part of the response")] = None
    truncation: Annotated[
        Literal["auto", "disabled"] | None, Meta(description="without effect: an input that is too long is refused")
    ] = None
    stop: str | list[str] | None = None
