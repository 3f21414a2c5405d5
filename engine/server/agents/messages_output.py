"""Answers of /v1/messages: whole, or as Anthropic's events."""

from __future__ import annotations

import hashlib
from typing import Any, cast

import msgspec
from msgspec import UNSET, Struct, UnsetType

from sempre.engine.outputs import CompletionOutput, RequestOutput
from sempre.engine.server.agents.blocks import Begun, Block, Blocks, Change, Ended, Grown
from sempre.engine.server.conversation import Conversation
from sempre.engine.server.errors import MESSAGES_PATH, APIError
from sempre.engine.server.receipts import receipt_of

_ENCODER = msgspec.json.Encoder()
# of the arguments of a call, which are held back, between two pings
_PING_EVERY = 32


class MessagesText(Struct, tag="text"):
    text: str
    citations: None = None


class MessagesThinking(Struct, tag="thinking"):
    """`signature`: SHA-256 of the text, for clients that expect one; it is not checked."""

    thinking: str
    signature: str


class MessagesToolUse(Struct, tag="tool_use"):
    """`input` as generated, or {"INVALID_JSON": …} of a call that is no JSON object or is cut off."""

    id: str
    name: str
    input: dict[str, Any]


class OutputTokensDetails(Struct):
    thinking_tokens: int


class MessagesUsage(Struct):
    """`input_tokens` are those that were computed, without the ones read from the prefix cache."""

    input_tokens: int
    cache_creation_input_tokens: int
    cache_read_input_tokens: int
    output_tokens: int
    output_tokens_details: OutputTokensDetails | UnsetType = UNSET


class MessagesResponse(Struct):
    """`seed`: the same request with this seed has the same answer, as long as the fingerprint is the same."""

    id: str
    model: str
    content: list[MessagesText | MessagesThinking | MessagesToolUse]
    stop_reason: str | None
    stop_sequence: str | None
    usage: MessagesUsage
    seed: int
    system_fingerprint: str
    type: str = "message"
    role: str = "assistant"
    receipt: msgspec.Raw | UnsetType = UNSET


class TokenCount(Struct):
    input_tokens: int


class MessagesAnswer:
    """Writes the answer of one conversation."""

    def __init__(self, conversation: Conversation, *, splits_reasoning: bool) -> None:
        self._conversation = conversation
        self._generation = conversation.generation
        [self._parser] = conversation.parsers
        self._splits_reasoning = splits_reasoning
        self._blocks = Blocks(lambda index: self._parser.call_id(index, "toolu_"))
        self._has_begun = False
        self._num_held = 0
        self._last: CompletionOutput | None = None

    def whole(self, output: RequestOutput) -> MessagesResponse:
        """Return the body of an unstreamed response."""
        [choice] = output.outputs
        self._read(choice)
        answer = self._answer(*self._stop(choice))
        answer.content = [_block(block) for block in self._blocks.all]
        if self._generation.gives_receipts:
            answer.receipt = receipt_of(choice)
        return answer

    def events(self, output: RequestOutput) -> bytes:
        """Return the events of a new output."""
        [choice] = output.outputs
        # the usage at the beginning says how much of the prompt was cached
        events = [] if self._has_begun else self._first_events()
        events += [self._event(change) for change in self._read(choice)]
        return b"".join(events)

    def last_events(self) -> bytes:
        """Return the end of the stream."""
        assert self._last is not None
        reason, sequence = self._stop(self._last)
        delta = {"stop_reason": reason, "stop_sequence": sequence}
        told: dict[str, object] = {"delta": delta, "usage": self._usage()}
        if self._generation.gives_receipts:
            told["receipt"] = receipt_of(self._last)
        return _event("message_delta", **told) + _event("message_stop")

    def _read(self, choice: CompletionOutput) -> list[Change]:
        changes = self._blocks.add(self._parser.pieces(choice.text, choice.token_ids))
        if choice.finish_reason is not None:
            self._last = choice
            changes += self._blocks.add(self._parser.last_pieces())
            changes += self._blocks.end(is_cut=choice.finish_reason == "length")
        return changes

    def _first_events(self) -> list[bytes]:
        self._has_begun = True
        answer = self._answer(None, None)
        answer.usage.output_tokens = 0
        return [_event("message_start", message=answer), _event("ping")]

    def _event(self, change: Change) -> bytes:
        """Calls are told once they are complete, as only then it is certain that their input is JSON."""
        index = change.block.index
        match change:
            case Begun(Block(kind="call")) | Grown(Block(kind="call")):
                self._num_held += 1
                return b"" if self._num_held % _PING_EVERY else _event("ping")
            case Ended(Block(kind="call") as block):
                empty = MessagesToolUse(block.call_id, block.name, {})
                delta = {"type": "input_json_delta", "partial_json": _input(block.text)}
                return (
                    _event("content_block_start", index=index, content_block=empty)
                    + _event("content_block_delta", index=index, delta=delta)
                    + _event("content_block_stop", index=index)
                )
            case Begun(Block(kind=kind)):
                empty_block = MessagesText("") if kind == "text" else MessagesThinking("", "")
                return _event("content_block_start", index=index, content_block=empty_block)
            case Grown(Block(kind="text"), text):
                return _event("content_block_delta", index=index, delta={"type": "text_delta", "text": text})
            case Grown(_, text):
                return _event("content_block_delta", index=index, delta={"type": "thinking_delta", "thinking": text})
            case Ended(Block(kind="reasoning") as block):
                delta = {"type": "signature_delta", "signature": _signature(block.text)}
                return _event("content_block_delta", index=index, delta=delta) + _event(
                    "content_block_stop", index=index
                )
            case _:
                return _event("content_block_stop", index=index)

    def _answer(self, reason: str | None, sequence: str | None) -> MessagesResponse:
        conversation = self._conversation
        return MessagesResponse(
            id=conversation.response_id,
            model=conversation.model,
            content=[],
            stop_reason=reason,
            stop_sequence=sequence,
            usage=self._usage(),
            seed=self._generation.requests[0].seeds[0],
            system_fingerprint=conversation.fingerprint,
        )

    def _stop(self, choice: CompletionOutput) -> tuple[str, str | None]:
        """(stop_reason, stop_sequence)."""
        if choice.finish_reason == "length":
            most = self._conversation.request.max_tokens
            is_full = most is not None and self._generation.num_tokens < most
            return "model_context_window_exceeded" if is_full else "max_tokens", None
        if self._blocks.has_calls:
            return "tool_use", None
        if isinstance(choice.stop_reason, str):
            return "stop_sequence", choice.stop_reason
        return "end_turn", None

    def _usage(self) -> MessagesUsage:
        usage = self._generation.usage()
        num_cached = usage.prompt_tokens_details.cached_tokens
        found = MessagesUsage(usage.prompt_tokens - num_cached, 0, num_cached, usage.completion_tokens)
        if self._splits_reasoning:
            found.output_tokens_details = OutputTokensDetails(self._parser.num_reasoning_tokens)
        return found


def failed_event(error: APIError) -> bytes:
    """Return the end of a stream that has failed."""
    return b"event: error\ndata: " + error.encode(MESSAGES_PATH) + b"\n\n"


def _event(kind: str, **members: object) -> bytes:
    return f"event: {kind}\ndata: ".encode() + _ENCODER.encode({"type": kind, **members}) + b"\n\n"


def _block(block: Block) -> MessagesText | MessagesThinking | MessagesToolUse:
    match block.kind:
        case "text":
            return MessagesText(block.text)
        case "reasoning":
            return MessagesThinking(block.text, _signature(block.text))
        case "call":
            return MessagesToolUse(block.call_id, block.name, cast(Any, msgspec.Raw(_input(block.text).encode())))


def _input(arguments: str) -> str:
    """The arguments of a call as a JSON object."""
    try:
        msgspec.json.decode(arguments or "{}", type=dict[str, Any])
    except (msgspec.DecodeError, UnicodeEncodeError, RecursionError):
        return _ENCODER.encode({"INVALID_JSON": arguments}).decode()
    return arguments or "{}"


def _signature(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
