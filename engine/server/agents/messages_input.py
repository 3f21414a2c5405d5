"""From a request of /v1/messages to one of /v1/chat/completions."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any

from sempre.engine.server.agents.messages_requests import (
    AnyChoice,
    AutoChoice,
    CountTokensRequest,
    InputBlock,
    InputMessage,
    MessagesRequest,
    NoneChoice,
    TextBlock,
    ThinkingBlock,
    ThinkingDisabled,
    ThinkingEnabled,
    ToolResultBlock,
    ToolUseBlock,
)
from sempre.engine.server.agents.sampling import sampling_of
from sempre.engine.server.config import ServerConfig
from sempre.engine.server.errors import BadRequest
from sempre.engine.server.requests import (
    ChatCompletionRequest,
    FunctionDefinition,
    FunctionName,
    JsonSchemaFormat,
    NamedToolChoice,
    ResponseFormat,
    Tool,
)

NAMES = {
    "prompt": "messages",
    "stop": "stop_sequences",
    "response_format": "output_config.format",
    "reasoning_effort": "output_config.effort",
    "thinking_token_budget": "thinking.budget_tokens",
    "max_completion_tokens": "max_tokens",
}
"""Fields of a chat, and those of this request that are in their place."""
_THINKS = re.compile(r"\benable_thinking\b")

Message = dict[str, Any]


def chat_request(request: CountTokensRequest, config: ServerConfig, template: str) -> ChatCompletionRequest:
    """Return the chat that a request asks for; `template` is the chat template. Raises BadRequest naming the field."""
    fields = sampling_of(request)
    fields |= _thinking(request, config, template)
    if isinstance(request, MessagesRequest):
        fields |= {"max_tokens": request.max_tokens, "stop": request.stop_sequences}
    if (output := request.output_config) is not None:
        fields["reasoning_effort"] = output.effort
        if output.format is not None:
            schema = JsonSchemaFormat(schema=output.format.schema)
            fields["response_format"] = ResponseFormat(type="json_schema", json_schema=schema)
    fields |= _tools(request)
    messages, continues = _messages(request)
    return ChatCompletionRequest(
        messages=messages, continue_final_message=continues, add_generation_prompt=not continues, **fields
    )


def _thinking(request: CountTokensRequest, config: ServerConfig, template: str) -> dict[str, Any]:
    thinking = request.thinking
    if thinking is None:
        return {}
    fields: dict[str, Any] = {}
    if isinstance(thinking, ThinkingDisabled | ThinkingEnabled):
        # the two names that chat templates have for it
        name = "enable_thinking" if _THINKS.search(template) or "thinking" not in template else "thinking"
        switch = {name: isinstance(thinking, ThinkingEnabled)}
        fields["chat_template_kwargs"] = switch | (request.chat_template_kwargs or {})
    # a model whose reasoning nobody can tell from its answer has none to be limited
    if isinstance(thinking, ThinkingEnabled) and config.reasoning_parser and request.thinking_token_budget is None:
        fields["thinking_token_budget"] = thinking.budget_tokens
    if not isinstance(thinking, ThinkingDisabled) and thinking.display == "omitted":
        fields["include_reasoning"] = False
    return fields


def _tools(request: CountTokensRequest) -> dict[str, Any]:
    fields: dict[str, Any] = {}
    if request.tools:
        fields["tools"] = [
            Tool(
                type="function",
                function=FunctionDefinition(
                    name=tool.name, description=tool.description, parameters=tool.input_schema, strict=tool.strict
                ),
            )
            for tool in request.tools
        ]
    match request.tool_choice:
        case None:
            return fields
        case NoneChoice():
            fields["tool_choice"] = "none"
            return fields
        case AutoChoice():
            fields["tool_choice"] = "auto"
        case AnyChoice():
            fields["tool_choice"] = "required"
        case named:
            fields["tool_choice"] = NamedToolChoice(type="function", function=FunctionName(name=named.name))
    if request.tool_choice.disable_parallel_tool_use:
        fields["parallel_tool_calls"] = False
    return fields


def _messages(request: CountTokensRequest) -> tuple[list[Message], bool]:
    """The messages of the chat, and whether the answer continues the last one."""
    found: list[Message] = []
    system = "" if request.system is None else _content(_blocks(request.system))
    if system:
        found.append({"role": "system", "content": system})
    names: dict[str, str] = {}
    for place, role, blocks in _turns(request.messages):
        if role == "assistant":
            found.append(_assistant(blocks, place))
            names |= {block.id: block.name for block in blocks if isinstance(block, ToolUseBlock)}
        else:
            found += _others(role, blocks, place, names)
    continues = request.messages[-1].role == "assistant"
    if continues and "tool_calls" in found[-1]:
        raise BadRequest(
            "messages: the last message calls tools; the next one must hold a tool_result for each.", param="messages"
        )
    return found, continues


def _turns(messages: Sequence[InputMessage]) -> list[tuple[str, str, list[InputBlock]]]:
    """(where it begins, role, blocks) of each turn: messages in a row of one role are one."""
    turns: list[tuple[str, str, list[InputBlock]]] = []
    for place, message in enumerate(messages):
        blocks = _blocks(message.content)
        if turns and turns[-1][1] == message.role:
            turns[-1][2].extend(blocks)
        else:
            turns.append((f"messages[{place}]", message.role, blocks))
    return turns


def _blocks(content: str | Sequence[InputBlock]) -> list[InputBlock]:
    return [TextBlock(text=content)] if isinstance(content, str) else list(content)


def _assistant(blocks: Iterable[InputBlock], where: str) -> Message:
    message: Message = {"role": "assistant", "content": ""}
    texts: list[TextBlock] = []
    thoughts: list[str] = []
    calls: list[dict[str, Any]] = []
    for block in blocks:
        match block:
            case TextBlock():
                texts.append(block)
            case ThinkingBlock(thinking=thought):
                thoughts.append(thought)
            case ToolUseBlock():
                function = {"name": block.name, "arguments": block.input}
                calls.append({"id": block.id, "type": "function", "function": function})
            case _:
                raise BadRequest(f"{where}: a tool_result must be in a message of the user.", param=where)
    message["content"] = _content(texts)
    if thoughts:
        message["reasoning_content"] = "\n".join(thoughts)
    if calls:
        message["tool_calls"] = calls
        if not texts:
            del message["content"]
    return message


def _others(role: str, blocks: Iterable[InputBlock], where: str, names: dict[str, str]) -> list[Message]:
    """The messages of a turn of the user, in the order of its blocks; `names`: id of a call → its tool."""
    found: list[Message] = []
    texts: list[TextBlock] = []

    def end_text() -> None:
        if texts:
            found.append({"role": role, "content": _content(texts)})
            texts.clear()

    for block in blocks:
        match block:
            case TextBlock():
                texts.append(block)
            case ToolResultBlock() if role == "user":
                end_text()
                if block.tool_use_id not in names:
                    raise BadRequest(
                        f"{where}: no tool_use block before it has the tool_use_id {block.tool_use_id!r}.", param=where
                    )
                found.append(_result(block, names[block.tool_use_id]))
            case _:
                kind = type(block).__struct_config__.tag
                raise BadRequest(f"{where}: a message of the role {role!r} cannot hold a {kind} block.", param=where)
    end_text()
    return found or [{"role": role, "content": ""}]


def _result(block: ToolResultBlock, name: str) -> Message:
    content = _content(_blocks(block.content or ""))
    if block.is_error:
        content = f"Error: {content}" if isinstance(content, str) else [{"type": "text", "text": "Error:"}, *content]
    return {"role": "tool", "tool_call_id": block.tool_use_id, "name": name, "content": content}


def _content(blocks: Iterable[InputBlock]) -> str | list[dict[str, str]]:
    """Texts as content of a chat message: several are parts, which the chat template's form joins."""
    texts = [block.text for block in blocks if isinstance(block, TextBlock)]
    return [{"type": "text", "text": text} for text in texts] if len(texts) > 1 else "".join(texts)
