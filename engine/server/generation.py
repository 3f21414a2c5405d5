"""One HTTP request in the engine: streamed or whole, and aborted as soon as its client disconnects.

Optionally, a log line per request contains its prompt and parameters.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from typing import NamedTuple

import msgspec
from msgspec import UNSET, UnsetType
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from sempre.engine.frontend.request_builder import PreparedRequest
from sempre.engine.frontend.sequence_state import NewText
from sempre.engine.output_stream import OutputStream
from sempre.engine.outputs import Logprob, RequestMetrics, RequestOutput
from sempre.engine.sampling_params import SamplingParams
from sempre.engine.server.beams import BeamStream
from sempre.engine.server.errors import APIError, ClientGone, api_error
from sempre.engine.server.responses import PromptTokensDetails, RequestTimes, Usage
from sempre.engine.server.service import Service
from sempre.engine.server.tracing import RequestSpan

# an event loop writes this many in a millisecond or two, and parses this many in ten
_LONG_LOGPROBS = 1000
_LONG_TOKENS = 1000
# characters of one part of a stream: more come at once only where the reader is slow
_LONG_TEXT = 8000
DONE = b"data: [DONE]\n\n"
_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
]
logger = logging.getLogger(__name__)


class Encoder(NamedTuple):
    """Writes the events of a stream."""

    output: Callable[[RequestOutput], bytes]
    text: Callable[[int, NewText], bytes] | None
    """of a prompt, by its index, if its events tell only text before the last one"""


_DEFAULTS = SamplingParams()


class Generation:
    """An admitted request. Use as a context manager, which cleans up the request however it ends."""

    def __init__(
        self, service: Service, stream: OutputStream | BeamStream, span: RequestSpan, *, gives_receipts: bool = False
    ) -> None:
        self.stream = stream
        self.gives_receipts = gives_receipts
        self.requests = stream.requests
        self.num_cached = [0] * len(self.requests)
        self.num_tokens = 0
        self._client = service.client_of(stream)
        self._client.charge(sum(len(request.prompt_token_ids) for request in self.requests))
        self._times: RequestMetrics | None = None
        self._places = {request.request_id: place for place, request in enumerate(self.requests)}
        self._service = service
        if service.config.enable_log_requests:
            log_requests(stream.requests, service.config.max_log_len)
        self._record = service.metrics.begin(stream.requests)
        self._span = span
        self._watcher: asyncio.Task[None] | None = None

    def watch(self, receive: Receive) -> None:
        """Abort the request if its client disconnects."""
        self._watcher = asyncio.create_task(self._wait_for_disconnect(receive))

    async def next(self) -> list[RequestOutput]:
        """Wait for the outputs of a step; an empty list means that all have finished."""
        return self._noted(await self.stream.next())

    def _noted(self, outputs: list[RequestOutput]) -> list[RequestOutput]:
        for output in outputs:
            self._times = output.metrics
            if output.num_cached_tokens:
                self.num_cached[self.place(output)] = output.num_cached_tokens
        self._count(self._record.take(outputs))
        return outputs

    def _count(self, num_tokens: int) -> None:
        self.num_tokens += num_tokens
        self._client.charge(num_tokens)

    def place(self, output: RequestOutput) -> int:
        """Return the index of an output's prompt."""
        return self._places[output.request_id]

    async def finished(self) -> list[RequestOutput]:
        """Return the final outputs, in the order of the prompts."""
        whole: dict[int, RequestOutput] = {}
        while outputs := await self.next():
            whole.update((self.place(output), output) for output in outputs)
        return [whole[place] for place in range(len(self.requests))]

    async def encoded(self, body: Callable[[], msgspec.Struct]) -> bytes:
        """Return a whole response as JSON; `body` builds it, off the event loop if it is long."""

        def encode() -> bytes:
            return msgspec.json.encode(body())

        if self._num_logprobs() <= _LONG_LOGPROBS and self.num_tokens <= _LONG_TOKENS:
            return encode()
        return await self._service.offload.written(encode)

    async def next_events(self, encoder: Encoder) -> bytes | None:
        """Wait for the events of a step, which may be none; None means that all outputs have finished."""
        stream = self.stream
        if encoder.text is None or not isinstance(stream, OutputStream):
            outputs = await self.next()
            return await self.written(outputs, encoder.output) if outputs else None
        if not (states := await stream.updated()):
            return None
        events = []
        for state in states:
            if (texts := stream.take_texts(state)) is not None:
                place = self._places[state.request_id]
                for new in texts:
                    self._count(self._record.arrived(state.request_id, new.index, new.num_tokens, state.metrics))
                    events.append(encoder.text(place, new))
            elif (output := stream.take(state)) is not None:
                events.append(await self.written(self._noted([output]), encoder.output))
        return b"".join(events)

    async def written(self, outputs: Sequence[RequestOutput], encode: Callable[[RequestOutput], bytes]) -> bytes:
        """Return the events of outputs, encoded off the event loop if they are long."""

        def events() -> bytes:
            return b"".join(map(encode, outputs))

        rows: list[Sequence[Mapping[int, Logprob] | None] | None]
        rows = [choice.logprobs for output in outputs for choice in output.outputs]
        rows += [output.prompt_logprobs for output in outputs]
        num_logprobs = sum(len(part) * len(part[-1] or ()) for part in rows if part)
        num_characters = sum(len(choice.text) for output in outputs for choice in output.outputs)
        if num_logprobs <= _LONG_LOGPROBS and num_characters <= _LONG_TEXT:
            return events()
        return await self._service.offload.written(events)

    def _num_logprobs(self) -> int:
        """Maximum number of log-probabilities in the response."""
        params = self.requests[0].params
        num_prompt = sum(len(request.prompt_token_ids) for request in self.requests)
        asked = ((self.num_tokens, params.logprobs), (num_prompt, params.prompt_logprobs))
        vocab_size = self._service.engine.ready.vocab_size
        return sum(size * (vocab_size if most == -1 else 1 + most) for size, most in asked if most is not None)

    def usage(self, num_completion_tokens: int | None = None) -> Usage:
        """Return the tokens used so far."""
        num_prompt = sum(len(request.prompt_token_ids) for request in self.requests)
        num_output = self.num_tokens if num_completion_tokens is None else num_completion_tokens
        return Usage(num_prompt, num_prompt + num_output, num_output, PromptTokensDetails(sum(self.num_cached)))

    def times(self) -> RequestTimes | UnsetType:
        """Return the times of a request with one prompt, if the server reports them."""
        if not self._service.config.enable_per_request_metrics or self._times is None or len(self.requests) > 1:
            return UNSET
        return RequestTimes.of(self._times, self.num_tokens)

    def close(self) -> None:
        """End the request; can be called twice."""
        if self._watcher is not None:
            self._watcher.cancel()
            self._watcher = None
        self._service.close(self.stream)
        self._record.end()
        self._span.end(self.requests, self.num_tokens)

    def __enter__(self) -> Generation:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    async def _wait_for_disconnect(self, receive: Receive) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        self.stream.abort(ClientGone())


class EventStream(Response):
    """Server-sent events of one generation; each step of the engine is one write.

    `first`, the events of each output, then those of `last`; or, after a failure, those of `failed`.
    """

    media_type = "text/event-stream"

    def __init__(
        self,
        generation: Generation,
        first: Sequence[bytes],
        encoder: Encoder,
        last: Callable[[], bytes],
        failed: Callable[[APIError], bytes] | None = None,
    ) -> None:
        super().__init__()
        self._generation = generation
        self._first = first
        self._encoder = encoder
        self._last = last
        self._failed = failed or failed_event

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with self._generation as generation:
            generation.watch(receive)
            # `send` includes the headers that middleware adds.
            await send({"type": "http.response.start", "status": 200, "headers": list(_HEADERS)})
            # No middleware reads the body, so tokens go straight to the socket's server. A separate task sends them,
            # because a task resumes through all frames that await it, here dozens of middleware frames.
            await asyncio.create_task(self._send_body(scope["state"]["server_send"]))

    async def _send_body(self, send: Send) -> None:
        try:
            for event in self._first:
                await send({"type": "http.response.body", "body": event, "more_body": True})
            while (body := await self._generation.next_events(self._encoder)) is not None:
                if body:
                    await send({"type": "http.response.body", "body": body, "more_body": True})
            end = self._last()
        except ClientGone:
            return
        except Exception as error:
            end = self._failed(api_error(error))
        await send({"type": "http.response.body", "body": end, "more_body": False})


def failed_event(error: APIError) -> bytes:
    """Return the end of a stream of completions that has failed."""
    return b"data: " + error.encode() + b"\n\n" + DONE


def log_requests(requests: Sequence[PreparedRequest], max_len: int | None) -> None:
    """Log each prompt (at most `max_len` characters and token ids) and the parameters that are not defaults."""
    for request in requests:
        params = {
            name: value
            for name in (field.name for field in fields(request.params))
            # the server chooses the output kind
            if name != "output_kind" and (value := getattr(request.params, name)) != getattr(_DEFAULTS, name)
        }
        facts = {
            "engine_request_id": request.request_id,
            "seed": request.seeds[0],
            "prompt": None if request.prompt is None else request.prompt[:max_len],
            "prompt_token_ids": request.prompt_token_ids[:max_len],
            "num_prompt_tokens": len(request.prompt_token_ids),
            "params": {name: repr(value) for name, value in params.items()},
        }
        logger.info("request", extra={"facts": facts})
