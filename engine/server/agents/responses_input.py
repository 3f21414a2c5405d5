"""From a request of /v1/responses to one of /v1/chat/completions."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from typing import Any

from sempre.engine.server.agents.responses_requests import (
    FunctionCallItem,
    FunctionCallOutputItem,
    FunctionChoice,
    InputItem,
    InputItemMessage,
    InputText,
    JsonObjectFormat,
    JsonSchemaTextFormat,
    OutputText,
    ReasoningItem,
    Refusal,
    ResponsesRequest,
)
from sempre.engine.server.agents.sampling import sampling_of
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
    "prompt": "input",
    "messages": "input",
    "response_format": "text.format",
    "reasoning_effort": "reasoning.effort",
    "max_tokens": "max_output_tokens",
    "max_completion_tokens": "max_output_tokens",
}
"""Fields of a chat, and those of this request that are in their place."""
_LEADING = ("system", "developer")

Message = dict[str, Any]


def chat_request(request: ResponsesRequest) -> ChatCompletionRequest:
    """Return the chat that a request asks for. Raises BadRequest naming the field."""
    fields = sampling_of(request)
    fields |= {"max_completion_tokens": request.max_output_tokens, "stop": request.stop}
    fields |= {"parallel_tool_calls": request.parallel_tool_calls, **_tools(request)}
    if request.reasoning is not None:
        fields["reasoning_effort"] = request.reasoning.effort
    match None if request.text is None else request.text.format:
        case JsonObjectFormat():
            fields["response_format"] = ResponseFormat(type="json_object")
        case JsonSchemaTextFormat(schema=schema):
            fields["response_format"] = ResponseFormat(type="json_schema", json_schema=JsonSchemaFormat(schema=schema))
    return ChatCompletionRequest(messages=_messages(request), **fields)


def _tools(request: ResponsesRequest) -> dict[str, Any]:
    choice = request.tool_choice
    if isinstance(choice, FunctionChoice):
        fields: dict[str, Any] = {
            "tool_choice": NamedToolChoice(type="function", function=FunctionName(name=choice.name))
        }
    else:
        # without tools any choice but a required one is none
        fields = {"tool_choice": None if not request.tools and choice == "auto" else choice}
    if request.tools:
        fields["tools"] = [
            Tool(
                type="function",
                function=FunctionDefinition(
                    name=tool.name, description=tool.description, parameters=tool.parameters, strict=tool.strict
                ),
            )
            for tool in request.tools
        ]
    return fields


def _messages(request: ResponsesRequest) -> list[Message]:
    items: Sequence[InputItem]
    items = [InputItemMessage(role="user", content=request.input)] if isinstance(request.input, str) else request.input
    if not items:
        raise BadRequest("input must hold at least one item.", param="input")
    found = _Messages()
    for place, item in enumerate(items):
        found.add(item, f"input[{place}]")
    return _with_one_system_message(request.instructions, found.all)


class _Messages:
    """Joins items to messages: those of the assistant in a row are one."""

    def __init__(self) -> None:
        self.all: list[Message] = []
        self._names: dict[str, str] = {}

    def add(self, item: InputItem, where: str) -> None:
        match item:
            case InputItemMessage(role="assistant"):
                message = self._assistant()
                texts = [*message.get("content", []), *_texts(item.content)]
                message["content"] = texts
            case InputItemMessage(role=role):
                self.all.append({"role": role, "content": _joined(_texts(item.content))})
            case ReasoningItem():
                message = self._assistant()
                earlier = message.get("reasoning_content")
                thought = _thought(item, where)
                message["reasoning_content"] = thought if earlier is None else f"{earlier}\n{thought}"
            case FunctionCallItem():
                self._names[item.call_id] = item.name
                function = {"name": item.name, "arguments": item.arguments}
                call = {"id": item.call_id, "type": "function", "function": function}
                self._assistant().setdefault("tool_calls", []).append(call)
            case FunctionCallOutputItem():
                self.all.append(self._result(item, where))

    def _assistant(self) -> Message:
        if not self.all or self.all[-1]["role"] != "assistant":
            self.all.append({"role": "assistant"})
        return self.all[-1]

    def _result(self, item: FunctionCallOutputItem, where: str) -> Message:
        if item.call_id not in self._names:
            raise BadRequest(
                f"{where}.call_id: no function_call before it has the call_id {item.call_id!r}; this server stores no "
                "responses, so the input must hold the call, too.",
                param=f"{where}.call_id",
            )
        content = item.output if isinstance(item.output, str) else _joined(_texts(item.output))
        return {"role": "tool", "tool_call_id": item.call_id, "name": self._names[item.call_id], "content": content}


def _texts(content: str | Sequence[InputText | OutputText | Refusal]) -> list[dict[str, str]]:
    texts = (
        [content]
        if isinstance(content, str)
        else [part.refusal if isinstance(part, Refusal) else part.text for part in content]
    )
    return [{"type": "text", "text": text} for text in texts]


def _joined(parts: list[dict[str, str]]) -> str | list[dict[str, str]]:
    """One part as a string: the chat template's form joins several."""
    return parts if len(parts) > 1 else "".join(part["text"] for part in parts)


def _thought(item: ReasoningItem, where: str) -> str:
    if item.content is not None:
        return "\n".join(part.text for part in item.content)
    if item.encrypted_content is None:
        return "\n".join(part.text for part in item.summary)
    try:
        return base64.b64decode(item.encrypted_content, validate=True).decode()
    except ValueError:
        field = f"{where}.encrypted_content"
        raise BadRequest(f"{field} was not made by this server, which cannot read it.", param=field) from None


def encrypted(thought: str) -> str:
    """Return reasoning in the form of `encrypted_content`, which holds it for the next request and hides nothing."""
    return base64.b64encode(thought.encode("utf-8", "surrogatepass")).decode()


def _with_one_system_message(instructions: str | None, messages: list[Message]) -> list[Message]:
    """Instructions and the messages of the system and the developer before all others, as one: many templates read only
    one."""
    for message in messages:
        if message["role"] == "assistant" and isinstance(message.get("content"), list):
            message["content"] = _joined(message["content"])
    num_leading = next((i for i, message in enumerate(messages) if message["role"] not in _LEADING), len(messages))
    leading, rest = messages[:num_leading], messages[num_leading:]
    if instructions is not None:
        leading.insert(0, {"role": "system", "content": instructions})
    if len(leading) > 1:
        texts = [each for message in leading for each in _plain(message["content"])]
        leading = [{"role": leading[-1]["role"], "content": "\n\n".join(texts)}]
    return leading + rest


def _plain(content: str | list[dict[str, str]]) -> list[str]:
    return [content] if isinstance(content, str) else [part["text"] for part in content]
