"""/v1/chat/completions."""

from __future__ import annotations

import time
from contextlib import ExitStack

from msgspec import UNSET
from starlette.requests import Request
from starlette.responses import Response

from sempre.engine.frontend.sequence_state import NewText
from sempre.engine.outputs import CompletionOutput, RequestOutput
from sempre.engine.server.body import read_model
from sempre.engine.server.conversation import Conversation, open_conversation
from sempre.engine.server.generation import DONE, Encoder, EventStream
from sempre.engine.server.load import load_header
from sempre.engine.server.logprobs import base64_array, chat_logprobs, prompt_logprobs
from sempre.engine.server.message_parser import PlainContent, message_of
from sempre.engine.server.receipts import receipt_of
from sempre.engine.server.requests import ChatCompletionRequest
from sempre.engine.server.responses import (
    ChatChoice,
    ChatChunkChoice,
    ChatCompletionResponse,
    ChatDelta,
    ChatLogprobs,
    ChunkEncoder,
    CompletionTokensDetails,
    Usage,
    early,
)
from sempre.engine.server.service import Service

_EMPTY = ChatDelta()


async def create_chat_completion(service: Service, http: Request) -> Response:
    """Answer a conversation. Raises errors that `errors.api_error` handles."""
    request = await read_model(http, ChatCompletionRequest, service)
    conversation = await open_conversation(service, http, request, "chatcmpl-")
    generation = conversation.generation
    with ExitStack() as stack:
        stack.enter_context(generation)
        answer = _Answer(service, conversation)
        if request.stream:
            stack.pop_all()  # the stream closes it
            return EventStream(generation, answer.first_events(), answer.encoder, answer.last_event)
        generation.watch(http.receive)
        [output] = await generation.finished()
        body = await generation.encoded(lambda: answer.whole(output))
    return Response(body, headers=await load_header(service, http), media_type="application/json")


class _Answer:
    """Writes the choices of one conversation."""

    def __init__(self, service: Service, conversation: Conversation) -> None:
        self._request = request = conversation.request
        self._generation = conversation.generation
        self._tokenizer = service.engine.get_tokenizer()
        self._role = service.config.response_role
        self._id = conversation.response_id
        self._created = int(time.time())
        self._model = conversation.model
        self._fingerprint = conversation.fingerprint
        self._parsers = parsers = conversation.parsers
        self._splits_reasoning = bool(service.config.reasoning_parser)
        self._enforces_calls = not isinstance(request.tool_choice, str | None) or request.tool_choice == "required"
        self._chunks = ChunkEncoder(
            response_id=self._id,
            kind="chat.completion.chunk",
            created=self._created,
            model=self._model,
            fingerprint=self._fingerprint,
            options=request.stream_options,
        )
        asks_for_more = request.logprobs or request.return_token_ids or self._chunks.continuous_usage
        is_plain = all(isinstance(parser, PlainContent) for parser in parsers)
        self.encoder = Encoder(self._events, self._text_event if is_plain and not asks_for_more else None)

    def whole(self, output: RequestOutput) -> ChatCompletionResponse:
        """Return the body of an unstreamed response."""
        choices = [early(self._whole_choice(choice)) for choice in output.outputs]
        body = ChatCompletionResponse(
            id=self._id,
            created=self._created,
            model=self._model,
            choices=choices,
            usage=self._usage(),
            system_fingerprint=self._fingerprint,
            metrics=self._generation.times(),
        )
        if self._request.return_token_ids:
            body.prompt_token_ids = output.prompt_token_ids
        if self._request.prompt_logprobs is not None and output.prompt_logprobs is not None:
            body.prompt_logprobs = prompt_logprobs(output.prompt_logprobs)
        body.prompt_token_id_logprobs = base64_array(output.prompt_token_id_logprobs)
        return body

    def first_events(self) -> list[bytes]:
        """Return the first event of each choice: its role."""
        prompt = self._generation.requests[0]
        opening = self._echoed()
        usage = self._usage() if self._chunks.continuous_usage else None
        token_ids = prompt.prompt_token_ids if self._request.return_token_ids else None
        # beams have one seed
        seeds = list(prompt.seeds) * (len(self._parsers) // len(prompt.seeds))
        return [
            self._chunks.choice(
                ChatChunkChoice(index, ChatDelta(role=self._role, content=opening), None, None, None, seed),
                usage,
                token_ids if index == 0 else None,
            )
            for index, seed in enumerate(seeds)
        ]

    def _events(self, output: RequestOutput) -> bytes:
        """Return the events of a new output."""
        chunks = [self._chunk_choice(choice) for choice in output.outputs]
        usage = self._usage() if self._chunks.continuous_usage else None
        return b"".join([self._chunks.choice(chunk, usage) for chunk in chunks if _says_something(chunk)])

    def _text_event(self, _place: int, new: NewText) -> bytes:
        index, seed = new.index, new.seed
        return self._chunks.text(
            index, new.text, lambda text: ChatChunkChoice(index, ChatDelta(content=text), None, None, None, seed)
        )

    def last_event(self) -> bytes:
        """Return the end of the stream."""
        if not self._chunks.include_usage:
            return DONE
        return self._chunks.usage(self._usage(), self._generation.times()) + DONE

    def _usage(self) -> Usage:
        usage = self._generation.usage()
        if self._splits_reasoning:
            num_reasoning = sum(parser.num_reasoning_tokens for parser in self._parsers)
            usage.completion_tokens_details = CompletionTokensDetails(num_reasoning)
        return usage

    def _chunk_choice(self, choice: CompletionOutput) -> ChatChunkChoice:
        parser = self._parsers[choice.index]
        delta = parser.feed(choice.text, choice.token_ids)
        reason = choice.finish_reason
        if reason is not None:
            held, reason = parser.finish(reason)
            delta = _merged(delta, held)
        written = ChatChunkChoice(choice.index, delta, self._logprobs(choice), reason, choice.stop_reason, choice.seed)
        if self._request.return_token_ids:
            written.token_ids = choice.token_ids
        if self._generation.gives_receipts:
            written.receipt = receipt_of(choice)
        return written

    def _whole_choice(self, choice: CompletionOutput) -> ChatChoice:
        parser = self._parsers[choice.index]
        fed = parser.feed(choice.text, choice.token_ids)
        held, reason = parser.finish(choice.finish_reason or "stop")
        message = message_of([ChatDelta(content=self._echoed()), fed, held], self._role)
        if self._enforces_calls and message.content is None:
            message.content = ""  # as in vLLM; a call that the model makes by itself has null
        written = ChatChoice(choice.index, message, self._logprobs(choice), reason, choice.stop_reason, choice.seed)
        if self._request.return_token_ids:
            written.token_ids = choice.token_ids
        if self._generation.gives_receipts:
            written.receipt = receipt_of(choice)
        return written

    def _logprobs(self, choice: CompletionOutput) -> ChatLogprobs | None:
        if not self._request.logprobs:
            return None
        return chat_logprobs(
            choice.token_ids,
            choice.logprobs or [],
            num_top=-1 if self._request.logprob_token_ids else self._request.top_logprobs or 0,
            tokenizer=self._tokenizer,
            as_token_ids=self._request.return_tokens_as_token_ids,
        )

    def _echoed(self) -> str:
        """Return the last message's text if the request wants it before the answer."""
        content = self._request.messages[-1].get("content") if self._request.echo else None
        return content if isinstance(content, str) else ""


def _says_something(chunk: ChatChunkChoice) -> bool:
    """False if all generated text may still become something else."""
    return bool(chunk.delta != _EMPTY or chunk.finish_reason or chunk.logprobs or chunk.token_ids)


def _merged(first: ChatDelta, second: ChatDelta) -> ChatDelta:
    """Return both deltas as one."""
    if second == _EMPTY:
        return first
    merged = message_of([first, second], "")
    thought = UNSET if merged.reasoning is None else merged.reasoning
    delta = ChatDelta(reasoning=thought, reasoning_content=thought)
    delta.content = merged.content if merged.content else UNSET
    delta.tool_calls = [*(first.tool_calls or []), *(second.tool_calls or [])] or UNSET
    return delta
