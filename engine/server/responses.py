"""Bodies of responses, with fields in wire order, and the chunks of a stream.

The constant part of a stream is encoded once per request, so a token costs one small encoding.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, TypeVar, cast

import msgspec
from msgspec import UNSET, Struct, UnsetType

from sempre.engine.outputs import RequestMetrics
from sempre.engine.server.requests import StreamOptions

TopLogprobs = dict[str, float]
PromptLogprobs = list[dict[str, "PromptLogprob"] | None]
_ENCODER = msgspec.json.Encoder()
_MARK = "\0"
_ENCODED_MARK = _ENCODER.encode(_MARK)


Choice = TypeVar("Choice", bound=Struct)


def early(choice: Choice) -> Choice:
    """Return a choice already encoded, for its place in a response, so that a response of many takes little memory."""
    return cast(Choice, msgspec.Raw(_ENCODER.encode(choice)))


class PromptTokensDetails(Struct):
    cached_tokens: int


class CompletionTokensDetails(Struct):
    reasoning_tokens: int


class Usage(Struct):
    prompt_tokens: int
    total_tokens: int
    completion_tokens: int
    prompt_tokens_details: PromptTokensDetails
    completion_tokens_details: CompletionTokensDetails | UnsetType = UNSET
    """only if the server tells reasoning from answers"""


class RequestTimes(Struct, omit_defaults=True):
    """Times of one request, measured on the host of the server."""

    time_to_first_token_ms: float | None = None
    """from the first step to the first token"""
    generation_time_ms: float | None = None
    """from the first token to the last"""
    queue_time_ms: float | None = None
    mean_itl_ms: float | None = None
    tokens_per_second: float | None = None
    """from the first step to the last token"""

    @classmethod
    def of(cls, times: RequestMetrics, num_tokens: int) -> RequestTimes:
        """The times of a request that has ended."""
        first, last = times.first_token_time, times.finished_time
        if first is None or last is None or times.time_in_queue is None:
            return cls()
        begin = times.arrival_time + times.time_in_queue
        generation, whole = max(last - first, 0.0), max(last - begin, 0.0)
        return cls(
            time_to_first_token_ms=max(first - begin, 0.0) * 1000,
            generation_time_ms=generation * 1000,
            queue_time_ms=times.time_in_queue * 1000,
            mean_itl_ms=generation / (num_tokens - 1) * 1000 if num_tokens > 1 else None,
            tokens_per_second=num_tokens / whole if whole else None,
        )


class PromptLogprob(Struct):
    logprob: float
    rank: int | None
    decoded_token: str | None


class CompletionLogprobs(Struct):
    """One entry per token. `text_offset` counts characters from the start of the choice's text."""

    text_offset: list[int]
    token_logprobs: list[float | None]
    tokens: list[str]
    top_logprobs: list[TopLogprobs | None]


class CompletionChoice(Struct):
    """`seed`: the same request with this seed and n=1 gives the same choice."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: str | None
    stop_reason: int | str | None
    seed: int
    token_ids: list[int] | None = None
    prompt_token_ids: list[int] | None = None
    prompt_logprobs: PromptLogprobs | None = None
    prompt_token_id_logprobs: str | None = None
    """an array [scored prompt tokens, ids] of float32 in NumPy's file format, as base64"""
    receipt: msgspec.Raw | UnsetType = UNSET
    """how to make this choice again, if the request asked for it"""


class CompletionResponse(Struct):
    id: str
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage
    system_fingerprint: str
    object: str = "text_completion"
    service_tier: None = None
    kv_transfer_params: None = None
    metrics: RequestTimes | UnsetType = UNSET


class ChatTopLogprob(Struct):
    token: str
    logprob: float
    bytes: list[int]


class ChatTokenLogprob(Struct):
    token: str
    logprob: float
    bytes: list[int]
    top_logprobs: list[ChatTopLogprob]


class ChatLogprobs(Struct):
    content: list[ChatTokenLogprob]


class ToolCallFunction(Struct, omit_defaults=True):
    name: str | None = None
    arguments: str | None = None


class ToolCall(Struct, omit_defaults=True):
    """`index` only in streams."""

    function: ToolCallFunction
    id: str | None = None
    type: str | None = None
    index: int | None = None


class ChatMessage(Struct):
    role: str
    content: str | None
    refusal: str | None = None
    annotations: None = None
    audio: None = None
    function_call: None = None
    tool_calls: list[ToolCall] | UnsetType = UNSET
    """left out if there are none, as by OpenAI"""
    reasoning: str | None = None
    reasoning_content: str | None = None
    """the same, under its older name"""


class ChatDelta(Struct):
    """What a chunk adds to the message."""

    role: str | UnsetType = UNSET
    content: str | UnsetType | None = UNSET
    reasoning: str | UnsetType = UNSET
    reasoning_content: str | UnsetType = UNSET
    """the same, under its older name"""
    tool_calls: list[ToolCall] | UnsetType = UNSET


class ChatChoice(Struct):
    index: int
    message: ChatMessage
    logprobs: ChatLogprobs | None
    finish_reason: str | None
    stop_reason: int | str | None
    seed: int
    token_ids: list[int] | None = None
    receipt: msgspec.Raw | UnsetType = UNSET
    """as of a completion"""


class ChatChunkChoice(Struct):
    index: int
    delta: ChatDelta
    logprobs: ChatLogprobs | None
    finish_reason: str | None
    stop_reason: int | str | None
    seed: int
    token_ids: list[int] | UnsetType = UNSET
    receipt: msgspec.Raw | UnsetType = UNSET
    """in the last chunk of a choice"""


class ChatCompletionResponse(Struct):
    id: str
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage
    system_fingerprint: str
    object: str = "chat.completion"
    service_tier: None = None
    prompt_logprobs: PromptLogprobs | None = None
    prompt_token_id_logprobs: str | None = None
    """an array [scored prompt tokens, ids] of float32 in NumPy's file format, as base64"""
    prompt_token_ids: list[int] | None = None
    kv_transfer_params: None = None
    metrics: RequestTimes | UnsetType = UNSET


class ModelCard(Struct):
    id: str
    created: int
    max_model_len: int
    root: str
    parent: str | None = None
    owned_by: str = "sempre"
    object: str = "model"


class ModelList(Struct):
    data: list[ModelCard]
    object: str = "list"


class TokenizeResponse(Struct):
    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None = None


class DetokenizeResponse(Struct):
    prompt: str


class _Frame(NamedTuple):
    """An event without its text."""

    before: bytes
    behind: bytes


class ChunkEncoder:
    """Encodes one choice at a time as `data: {"id":…,"choices":[…],"system_fingerprint":…}`."""

    def __init__(
        self, *, response_id: str, kind: str, created: int, model: str, fingerprint: str, options: StreamOptions | None
    ) -> None:
        head = {"id": response_id, "object": kind, "created": created, "model": model}
        self._head = b"data: " + _ENCODER.encode(head)[:-1] + b',"choices":['
        self._fingerprint = b'],"system_fingerprint":' + _ENCODER.encode(fingerprint)
        self.include_usage = options is not None and options.include_usage
        # without include_usage there is no continuous usage either, as in vLLM
        self.continuous_usage = options is not None and options.include_usage and options.continuous_usage_stats
        self._frames: dict[int, _Frame] = {}
        self._tail = self._fingerprint + (b',"usage":null}\n\n' if self.include_usage else b"}\n\n")

    def choice(
        self,
        choice: CompletionChoice | ChatChunkChoice,
        usage: Usage | None = None,
        prompt_token_ids: list[int] | None = None,
    ) -> bytes:
        """Return the event of one choice; only the first of a chat has `prompt_token_ids`."""
        tail = self._tail if usage is None else self._usage_tail(usage)
        if prompt_token_ids is not None:
            tail = b'],"prompt_token_ids":' + _ENCODER.encode(prompt_token_ids) + b"," + tail.removeprefix(b"],")
        return self._head + _ENCODER.encode(choice) + tail

    def text(self, index: int, text: str, choice_of: Callable[[str], CompletionChoice | ChatChunkChoice]) -> bytes:
        """Return the event of `choice_of(text)`, in which only the text differs between calls for choice `index` and
        occurs once."""
        frame = self._frames.get(index)
        if frame is None:
            before, _, behind = self.choice(choice_of(_MARK)).rpartition(_ENCODED_MARK)
            frame = self._frames[index] = _Frame(before, behind)
        return frame.before + _ENCODER.encode(text) + frame.behind

    def usage(self, usage: Usage, times: RequestTimes | UnsetType) -> bytes:
        """Return the last event of a stream, which has its usage, and its times if the server reports them."""
        event = self._head + self._usage_tail(usage)
        if times is UNSET:
            return event
        return event.removesuffix(b"}\n\n") + b',"metrics":' + _ENCODER.encode(times) + b"}\n\n"

    def _usage_tail(self, usage: Usage) -> bytes:
        return self._fingerprint + b',"usage":' + _ENCODER.encode(usage) + b"}\n\n"
