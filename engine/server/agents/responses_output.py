"""Answers of /v1/responses: whole, or as OpenAI's events."""

from __future__ import annotations

import time
from typing import Any

import msgspec
from msgspec import UNSET, Struct, UnsetType

from sempre.engine.outputs import CompletionOutput, RequestOutput
from sempre.engine.server.agents.blocks import Begun, Block, Blocks, Change, Ended, Grown
from sempre.engine.server.agents.responses_input import encrypted
from sempre.engine.server.agents.responses_requests import ResponsesRequest
from sempre.engine.server.conversation import Conversation
from sempre.engine.server.errors import APIError
from sempre.engine.server.receipts import receipt_of

_ENCODER = msgspec.json.Encoder()
_ENCRYPTED = "reasoning.encrypted_content"


class ResponsesText(Struct, tag="output_text"):
    text: str
    annotations: list[Any] = []
    logprobs: list[Any] = []


class ResponsesReasoningText(Struct, tag="reasoning_text"):
    text: str


class ResponsesMessage(Struct, tag="message"):
    id: str
    status: str
    content: list[ResponsesText]
    role: str = "assistant"


class ResponsesReasoning(Struct, tag="reasoning"):
    id: str
    status: str
    content: list[ResponsesReasoningText]
    summary: list[Any] = []
    encrypted_content: str | None = None


class ResponsesFunctionCall(Struct, tag="function_call"):
    """`arguments` as generated."""

    id: str
    call_id: str
    name: str
    arguments: str
    status: str


OutputItem = ResponsesMessage | ResponsesReasoning | ResponsesFunctionCall


class InputTokensDetails(Struct):
    cached_tokens: int
    cache_write_tokens: int = 0


class ReasoningTokensDetails(Struct):
    reasoning_tokens: int


class ResponsesUsage(Struct):
    input_tokens: int
    input_tokens_details: InputTokensDetails
    output_tokens: int
    output_tokens_details: ReasoningTokensDetails
    total_tokens: int


class IncompleteDetails(Struct):
    reason: str


class ResponsesError(Struct):
    code: str
    message: str


class ResponsesResponse(Struct, kw_only=True):
    """`seed`: the same request with this seed has the same answer, as long as the fingerprint is the same."""

    id: str
    object: str = "response"
    created_at: int
    completed_at: int | None = None
    status: str
    error: ResponsesError | None = None
    incomplete_details: IncompleteDetails | None = None
    instructions: str | None
    max_output_tokens: int | None
    model: str
    output: list[OutputItem]
    parallel_tool_calls: bool
    previous_response_id: None = None
    reasoning: dict[str, Any]
    store: bool = False
    temperature: float
    text: dict[str, Any]
    tool_choice: Any
    tools: list[dict[str, Any]]
    top_p: float
    truncation: str
    usage: ResponsesUsage | None = None
    metadata: dict[str, str]
    background: bool = False
    seed: int
    system_fingerprint: str
    receipt: msgspec.Raw | UnsetType = UNSET


class ResponsesAnswer:
    """Writes the answer of one conversation."""

    def __init__(self, request: ResponsesRequest, conversation: Conversation) -> None:
        self._request = request
        self._conversation = conversation
        self._generation = conversation.generation
        [self._parser] = conversation.parsers
        self._is_told = _ENCRYPTED in (request.include or ())
        self._blocks = Blocks(self._parser.call_id)
        self._cut: Block | None = None
        self._last: CompletionOutput | None = None
        self._created = int(time.time())
        self._num_events = 0
        self._suffix = conversation.response_id.removeprefix("resp_")

    def whole(self, output: RequestOutput) -> ResponsesResponse:
        """Return the body of an unstreamed response."""
        self._read(output.outputs[0])
        return self._ended()

    def first_events(self) -> list[bytes]:
        """Return the events before the first output."""
        response = self._response("in_progress")
        return [self._event(f"response.{kind}", response=response) for kind in ("created", "in_progress")]

    def events(self, output: RequestOutput) -> bytes:
        """Return the events of a new output."""
        return b"".join(
            [
                self._event(kind, **members)
                for change in self._read(output.outputs[0])
                for kind, members in self._of(change)
            ]
        )

    def last_event(self) -> bytes:
        """Return the end of the stream."""
        response = self._ended()
        return self._event(f"response.{response.status}", response=response)

    def failed_event(self, error: APIError) -> bytes:
        """Return the end of a stream that has failed."""
        response = self._response("failed")
        response.error = ResponsesError("server_error", str(error))
        return self._event("response.failed", response=response)

    def _read(self, choice: CompletionOutput) -> list[Change]:
        changes = self._blocks.add(self._parser.pieces(choice.text, choice.token_ids))
        if choice.finish_reason is not None:
            self._last = choice
            changes += self._blocks.add(self._parser.last_pieces())
            ended = self._blocks.end(is_cut=choice.finish_reason == "length")
            self._cut = next((change.block for change in ended if isinstance(change, Ended) and change.is_cut), None)
            changes += ended
        return changes

    def _of(self, change: Change) -> list[tuple[str, dict[str, Any]]]:
        """The events of a change, with their members."""
        block = change.block
        where: dict[str, Any] = {"item_id": self._id(block), "output_index": block.index}
        part = {**where, "content_index": 0}
        name = {"text": "output_text", "reasoning": "reasoning_text", "call": "function_call_arguments"}[block.kind]
        # texts have log-probabilities, of which there are none here
        more: dict[str, Any] = {"logprobs": []} if block.kind == "text" else {}
        of_text = where if block.kind == "call" else {**part, **more}
        match change:
            case Begun():
                item = self._item(block, "in_progress", is_empty=True)
                added = ("response.output_item.added", {"output_index": block.index, "item": item})
                return (
                    [added]
                    if block.kind == "call"
                    else [
                        added,
                        ("response.content_part.added", {**part, "part": _part(block, "")}),
                    ]
                )
            case Grown(_, text):
                return [(f"response.{name}.delta", {**of_text, "delta": text})]
            case Ended(_, is_cut):
                done = {"output_index": block.index, "item": self._item(block, "incomplete" if is_cut else "completed")}
                if block.kind == "call":
                    told = {**where, "name": block.name, "arguments": block.text}
                    return [(f"response.{name}.done", told), ("response.output_item.done", done)]
                return [
                    (f"response.{name}.done", {**of_text, "text": block.text}),
                    ("response.content_part.done", {**part, "part": _part(block, block.text)}),
                    ("response.output_item.done", done),
                ]

    def _event(self, kind: str, **members: object) -> bytes:
        event = {"type": kind, "sequence_number": self._num_events, **members}
        self._num_events += 1
        return f"event: {kind}\ndata: ".encode() + _ENCODER.encode(event) + b"\n\n"

    def _id(self, block: Block) -> str:
        prefix = {"text": "msg", "reasoning": "rs", "call": "fc"}[block.kind]
        return f"{prefix}_{self._suffix}_{block.index}"

    def _item(self, block: Block, status: str, *, is_empty: bool = False) -> OutputItem:
        name, text = self._id(block), "" if is_empty else block.text
        match block.kind:
            case "call":
                return ResponsesFunctionCall(name, block.call_id, block.name, text, status)
            case "text":
                return ResponsesMessage(name, status, [] if is_empty else [ResponsesText(text)])
            case "reasoning":
                content = [] if is_empty else [ResponsesReasoningText(text)]
                hidden = encrypted(text) if self._is_told and not is_empty else None
                return ResponsesReasoning(name, status, content, encrypted_content=hidden)

    def _ended(self) -> ResponsesResponse:
        """The response with its output."""
        assert self._last is not None
        is_cut = self._last.finish_reason == "length"
        response = self._response("incomplete" if is_cut else "completed")
        if is_cut:
            response.incomplete_details = IncompleteDetails("max_output_tokens")
        response.completed_at = int(time.time())
        response.output = [
            self._item(block, "incomplete" if block is self._cut else "completed") for block in self._blocks.all
        ]
        usage = self._generation.usage()
        response.usage = ResponsesUsage(
            usage.prompt_tokens,
            InputTokensDetails(usage.prompt_tokens_details.cached_tokens),
            usage.completion_tokens,
            ReasoningTokensDetails(self._parser.num_reasoning_tokens),
            usage.total_tokens,
        )
        if self._generation.gives_receipts:
            response.receipt = receipt_of(self._last)
        return response

    def _response(self, status: str) -> ResponsesResponse:
        request, params = self._request, self._generation.requests[0].params
        reasoning = request.reasoning
        return ResponsesResponse(
            id=self._conversation.response_id,
            created_at=self._created,
            status=status,
            instructions=request.instructions,
            max_output_tokens=request.max_output_tokens,
            model=self._conversation.model,
            output=[],
            parallel_tool_calls=request.parallel_tool_calls is not False,
            reasoning={"effort": None if reasoning is None else reasoning.effort, "summary": None},
            temperature=params.temperature,
            text={"format": {"type": "text"} if request.text is None else msgspec.to_builtins(_format(request))},
            tool_choice=request.tool_choice or "auto",
            tools=[msgspec.to_builtins(tool) for tool in request.tools or []],
            top_p=params.top_p,
            truncation=request.truncation or "disabled",
            metadata=request.metadata or {},
            seed=self._generation.requests[0].seeds[0],
            system_fingerprint=self._conversation.fingerprint,
        )


def _format(request: ResponsesRequest) -> Any:
    assert request.text is not None
    return request.text.format or {"type": "text"}


def _part(block: Block, text: str) -> ResponsesText | ResponsesReasoningText:
    return ResponsesText(text) if block.kind == "text" else ResponsesReasoningText(text)
