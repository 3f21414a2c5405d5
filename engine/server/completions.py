"""/v1/completions."""

from __future__ import annotations

import time
from collections.abc import Collection, Sequence
from contextlib import ExitStack

from starlette.requests import Request
from starlette.responses import Response

from sempre.engine.frontend.sequence_state import NewText
from sempre.engine.outputs import CompletionOutput, Logprob, RequestOutput
from sempre.engine.server.beams import beam_parameters
from sempre.engine.server.body import read_model
from sempre.engine.server.generation import DONE, Encoder, EventStream, Generation
from sempre.engine.server.load import load_header
from sempre.engine.server.logprobs import CompletionLogprobsWriter, IdNames, base64_array, joined, prompt_logprobs
from sempre.engine.server.parameters import apply_server_defaults, blame_on, check_model, completion_parameters
from sempre.engine.server.prompts import check_form, id_of, prompts_of
from sempre.engine.server.receipts import asks_for_receipts, receipt_of
from sempre.engine.server.requests import CompletionRequest
from sempre.engine.server.responses import (
    ChunkEncoder,
    CompletionChoice,
    CompletionLogprobs,
    CompletionResponse,
    early,
)
from sempre.engine.server.service import Service
from sempre.engine.server.tracing import RequestSpan
from sempre.engine.text.token_stream import TokenStream, finished_text


async def create_completion(service: Service, http: Request) -> Response:
    """Complete one or several prompts. Raises errors that `errors.api_error` handles."""
    request = await read_model(http, CompletionRequest, service)
    service.check_ready()
    check_model(request.model, service.served_names)
    apply_server_defaults(request, service.config)
    params = completion_parameters(request, service.default_parameters(request), service.config)
    search = beam_parameters(request, params)
    gives_receipts = await asks_for_receipts(service, http, searches=search is not None)
    prompts = await prompts_of(request, request.prompt, "prompt", service, http)
    with blame_on(request):
        await check_form(params, service, http)
    with RequestSpan.begin(http, service, params) as span, blame_on(request):
        stream = service.open(
            http.state.client, prompts, params, request.priority, search, gives_receipts, request.model
        )
        generation = Generation(service, stream, span, gives_receipts=gives_receipts)
    http.state.generation = generation
    with ExitStack() as stack:
        stack.enter_context(generation)
        answer = _Answer(service, request, generation, f"cmpl-{id_of(request, http)}")
        if request.stream:
            stack.pop_all()  # the stream closes it
            return EventStream(generation, [], answer.encoder, answer.last_event)
        generation.watch(http.receive)
        outputs = await generation.finished()
        body = await generation.encoded(lambda: answer.whole(outputs))
    return Response(body, headers=await load_header(service, http), media_type="application/json")


class _Answer:
    """Writes the choices of one request; choice i of prompt p has the index p * n + i."""

    def __init__(self, service: Service, request: CompletionRequest, generation: Generation, response_id: str) -> None:
        self._request = request
        self._generation = generation
        self._tokenizer = service.engine.get_tokenizer()
        self._id = response_id
        self._created = int(time.time())
        self._model = request.model or service.model_names[0]
        self._fingerprint = service.engine.fingerprint_of(generation.requests[0])
        skips_special = generation.requests[0].params.skip_special_tokens
        self._skipped: Collection[int] = self._tokenizer.special_texts if skips_special else ()
        self._names = IdNames() if request.return_tokens_as_token_ids else service.token_names
        self._writers: dict[int, CompletionLogprobsWriter] = {}
        self._begun: set[int] = set()
        self._prompt_rows: dict[int, Sequence[dict[int, Logprob] | None]] = {}
        self._chunks = ChunkEncoder(
            response_id=response_id,
            kind="text_completion",
            created=self._created,
            model=self._model,
            fingerprint=self._fingerprint,
            options=request.stream_options,
        )
        asks_for_more = request.logprobs is not None or request.echo or request.return_token_ids
        only_text_differs = not (asks_for_more or request.max_tokens == 0 or self._chunks.continuous_usage)
        self.encoder = Encoder(self._events, self._text_event if only_text_differs else None)

    def whole(self, outputs: list[RequestOutput]) -> CompletionResponse:
        """Return the body of an unstreamed response."""
        choices = [
            early(self._choice(place, output, choice))
            for place, output in enumerate(outputs)
            for choice in output.outputs
        ]
        return CompletionResponse(
            id=self._id,
            created=self._created,
            model=self._model,
            choices=choices,
            usage=self._generation.usage(0 if self._request.max_tokens == 0 else None),
            system_fingerprint=self._fingerprint,
            metrics=self._generation.times(),
        )

    def _events(self, output: RequestOutput) -> bytes:
        """Return the events of a prompt's new output."""
        place = self._generation.place(output)
        usage = self._generation.usage() if self._chunks.continuous_usage else None
        return b"".join([self._chunks.choice(self._choice(place, output, choice), usage) for choice in output.outputs])

    def _text_event(self, place: int, new: NewText) -> bytes:
        index, seed = place * self._request.n + new.index, new.seed
        return self._chunks.text(index, new.text, lambda text: CompletionChoice(index, text, None, None, None, seed))

    def last_event(self) -> bytes:
        """Return the end of the stream."""
        if not self._chunks.include_usage:
            return DONE
        usage = self._generation.usage(0 if self._request.max_tokens == 0 else None)
        return self._chunks.usage(usage, self._generation.times()) + DONE

    def _choice(self, place: int, output: RequestOutput, choice: CompletionOutput) -> CompletionChoice:
        request = self._request
        index = place * request.n + choice.index
        only_prompt = request.max_tokens == 0
        text, token_ids = ("", []) if only_prompt else (choice.text, choice.token_ids)
        written = CompletionChoice(
            index=index,
            text=text,
            logprobs=None,
            finish_reason="length" if only_prompt and choice.finish_reason else choice.finish_reason,
            stop_reason=None if only_prompt else choice.stop_reason,
            seed=choice.seed,
        )
        first = index not in self._begun
        if first:
            self._begun.add(index)
        echoed = self._echoed(output) if first and request.echo else ""
        written.text = echoed + text
        if request.logprobs is not None:
            rows = [] if only_prompt else choice.logprobs or []
            writer = self._writer(index, output, len(echoed))
            written.logprobs = writer.write(token_ids, rows)
            if first and request.echo:
                written.logprobs = joined(self._prompt_logprobs(place, output), written.logprobs)
        if request.return_token_ids:
            written.token_ids = token_ids
            written.prompt_token_ids = output.prompt_token_ids if first else None
        if request.prompt_logprobs is not None and output.prompt_logprobs is not None:
            written.prompt_logprobs = prompt_logprobs(output.prompt_logprobs)
        written.prompt_token_id_logprobs = base64_array(output.prompt_token_id_logprobs)
        if self._generation.gives_receipts:
            written.receipt = receipt_of(choice)
        return written

    def _writer(self, index: int, output: RequestOutput, offset: int) -> CompletionLogprobsWriter:
        writer = self._writers.get(index)
        if writer is None:
            stream = TokenStream(self._tokenizer, self._skipped, output.prompt_token_ids)
            writer = CompletionLogprobsWriter(self._names, stream, offset)
            self._writers[index] = writer
        return writer

    def _echoed(self, output: RequestOutput) -> str:
        """Return the prompt's text; a last character that the output completes belongs to the output."""
        if output.prompt is not None:
            return output.prompt
        if self._request.max_tokens == 0:
            return self._tokenizer.decode(output.prompt_token_ids)
        return finished_text(self._tokenizer, output.prompt_token_ids)

    def _prompt_logprobs(self, place: int, output: RequestOutput) -> CompletionLogprobs:
        prompt, token_ids = output.prompt, output.prompt_token_ids
        # special tokens are part of the text, except the one that encoding prepends
        begins = prompt is None or prompt.startswith(self._tokenizer.token_text(token_ids[0]))
        skipped = () if begins else token_ids[:1]
        stream = TokenStream(self._tokenizer, skipped)
        writer = CompletionLogprobsWriter(self._names, stream)
        # a stream reports them once, and another choice may begin later
        rows = self._prompt_rows.setdefault(place, output.prompt_logprobs or [])
        return writer.write(token_ids, rows)
