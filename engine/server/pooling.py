"""/v1/embeddings, /pooling, /classify, /score and /rerank."""

from __future__ import annotations

import base64
import time
from array import array
from collections.abc import Callable, Sequence
from sys import byteorder
from typing import Any, NamedTuple, TypeVar

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from sempre.engine.frontend.pooling import (
    NOT_SAMPLED,
    Pairs,
    as_classes,
    as_relevance,
    refuse_prompt_name,
    require_scores,
    stored_prompt,
    values_of,
)
from sempre.engine.frontend.pooling import require_pooling as required
from sempre.engine.outputs import RequestOutput
from sempre.engine.pooling import PoolingParams
from sempre.engine.server.body import read_model
from sempre.engine.server.errors import BadRequest
from sempre.engine.server.generation import Generation
from sempre.engine.server.load import load_header
from sempre.engine.server.offload import LONG_BYTES
from sempre.engine.server.parameters import check_model
from sempre.engine.server.pooling_requests import (
    Classification,
    ClassificationRequest,
    ClassificationResponse,
    Embedding,
    EmbeddingRequest,
    EmbeddingResponse,
    Pooled,
    PoolingBody,
    PoolingRequest,
    PoolingResponse,
    RerankDocument,
    RerankRequest,
    RerankResponse,
    RerankResult,
    RerankUsage,
    Score,
    ScoreRequest,
    ScoreResponse,
    Texts,
)
from sempre.engine.server.prompts import check_number, client_of, encode, id_of, prompts_of
from sempre.engine.server.responses import Usage
from sempre.engine.server.service import Service
from sempre.engine.server.tracing import RequestSpan
from sempre.ipc.config import PoolingTask

Body = TypeVar("Body", bound=PoolingBody)
# an event loop writes this many in some milliseconds
_MANY_NUMBERS = 10_000
_NAMES_OF_PAIRS = (("queries", "documents"), ("queries", "items"), ("text_1", "text_2"), ("data_1", "data_2"))


class _Pooling(NamedTuple):
    """What was pooled for one HTTP request."""

    outputs: list[RequestOutput]
    usage: Usage


async def create_embeddings(service: Service, http: Request) -> Response:
    """Embed one or several prompts. Raises errors that `errors.api_error` handles."""
    request = await _read(service, http, EmbeddingRequest, "embed")
    found = await _pooled(service, http, request, await _prompts(service, http, request), request.dimensions)

    def body() -> EmbeddingResponse:
        data = [
            Embedding(index, _encoded(output, request.encoding_format)) for index, output in enumerate(found.outputs)
        ]
        return EmbeddingResponse(data=data, usage=found.usage, **_head(service, http, request, "embd"))

    return await _answer(service, http, found, body)


async def create_pooling(service: Service, http: Request) -> Response:
    """Return what the model pools, whatever it is."""
    request = await _read(service, http, PoolingRequest, None)
    required(service.engine.ready.pooling, request.task)
    found = await _pooled(service, http, request, await _prompts(service, http, request), request.dimensions)

    def body() -> PoolingResponse:
        data = [Pooled(index, _encoded(output, request.encoding_format)) for index, output in enumerate(found.outputs)]
        return PoolingResponse(data=data, usage=found.usage, **_head(service, http, request, "pool"))

    return await _answer(service, http, found, body)


async def classify(service: Service, http: Request) -> Response:
    """Return the probability of each label for each prompt."""
    request = await _read(service, http, ClassificationRequest, "classify")
    found = await _pooled(service, http, request, await _prompts(service, http, request))
    model = required(service.engine.ready.pooling, "classify")

    def body() -> ClassificationResponse:
        classes = [as_classes(output, model).outputs for output in found.outputs]
        data = [Classification(index, each.label, each.probs, each.num_classes) for index, each in enumerate(classes)]
        return ClassificationResponse(data=data, usage=found.usage, **_head(service, http, request, "classify"))

    return await _answer(service, http, found, body)


async def create_scores(service: Service, http: Request) -> Response:
    """Return how well documents answer queries."""
    request = await _read(service, http, ScoreRequest, None)
    scores, usage = await _scores(service, http, request, *_pair_fields(request))
    data = [Score(index, score) for index, score in enumerate(scores)]
    body = ScoreResponse(data=data, usage=usage, **_head(service, http, request, "score"))
    return await _response(service, http, msgspec.json.encode(body))


async def rerank(service: Service, http: Request) -> Response:
    """Return documents in the order of their relevance to a query."""
    request = await _read(service, http, RerankRequest, None)
    scores, usage = await _scores(service, http, request, request.query, request.documents)
    # of equals the first one comes first, as sorting is stable
    order = sorted(range(len(scores)), key=lambda index: -scores[index])
    results = [
        RerankResult(index, RerankDocument(request.documents[index]), scores[index])
        for index in order[: request.top_n or None]
    ]
    head = _head(service, http, request, "rerank")
    del head["created"]
    body = RerankResponse(results=results, usage=RerankUsage(usage.prompt_tokens, usage.total_tokens), **head)
    return await _response(service, http, msgspec.json.encode(body))


async def _read(service: Service, http: Request, kind: type[Body], task: PoolingTask | None) -> Body:
    request = await read_model(http, kind, service)
    service.check_ready()
    check_model(request.model, service.model_names)
    required(service.engine.ready.pooling, task)
    return request


async def _prompts(service: Service, http: Request, request: EmbeddingRequest | ClassificationRequest) -> list[Any]:
    name = request.prompt_name if isinstance(request, EmbeddingRequest) else None
    before = stored_prompt(required(service.engine.ready.pooling), name)
    given: Any = [request.input] if isinstance(request.input, str) else request.input
    if given and isinstance(given[0], str):
        # a list of several types is refused later
        given = [before + each if isinstance(each, str) else each for each in given]
    elif name:
        refuse_prompt_name(name)
    return await prompts_of(request, given, "input", service, http)


async def _pooled(
    service: Service, http: Request, request: PoolingBody, prompts: Sequence[Any], dimensions: int | None = None
) -> _Pooling:
    params = PoolingParams(
        dimensions=dimensions,
        use_activation=request.use_activation,
        truncate_prompt_tokens=request.truncate_prompt_tokens,
        truncation_side=request.truncation_side,
        prompt_name="",  # texts have it already
    )
    with RequestSpan.begin(http, service, NOT_SAMPLED) as span:
        stream = service.open_pooled(http.state.client, prompts, params, request.priority)
        generation = Generation(service, stream, span)
    http.state.generation = generation
    with generation:
        generation.watch(http.receive)
        outputs = await generation.finished()
        for output in outputs:
            values_of(output)  # raises the error of one that failed
        return _Pooling(outputs, generation.usage())


async def _scores(
    service: Service, http: Request, request: PoolingBody, queries: Texts, documents: Texts
) -> tuple[list[float], Usage]:
    model = require_scores(service.engine.ready.pooling)
    pairs = Pairs(queries, documents)
    check_number("documents", len(pairs.single), service)
    for text in pairs.single:
        service.check_text(text)
    if model.task == "embed":
        before = stored_prompt(model, None)
        texts = [before + text for text in pairs.single]
        found = await _pooled(service, http, request, await prompts_of(request, texts, "documents", service, http))
        scored = pairs.scored(found.outputs, model.similarity)
    else:
        prompts = await _pair_prompts(service, http, pairs)
        if request.cache_salt is not None:
            prompts = [{**prompt, "cache_salt": request.cache_salt} for prompt in prompts]
        found = await _pooled(service, http, request, prompts)
        scored = [as_relevance(output) for output in found.outputs]
    return [each.outputs.score for each in scored], found.usage


async def _pair_prompts(service: Service, http: Request, pairs: Pairs) -> list[dict[str, Any]]:
    engine, texts = service.engine, pairs.texts()
    if engine.pair_arguments(*texts[0]) is None:
        encode_pair = engine.get_tokenizer().encode_pair

        def encoded() -> list[dict[str, Any]]:
            return [{"prompt_token_ids": encode_pair(query, document)} for query, document in texts]

        if http.state.body_bytes <= LONG_BYTES:
            return encoded()
        return await service.offload.in_thread(client_of(http), encoded)
    prompts = []
    for query, document in texts:
        # a model's own template has limits of time and memory, since it is untrusted
        arguments = engine.pair_arguments(query, document)
        assert arguments is not None
        text = await service.offload.in_urgent_helper("render_chat", arguments)
        prompts.append({"prompt": text, "prompt_token_ids": await encode(text, service, http, special=False)})
    return prompts


def _pair_fields(request: ScoreRequest) -> tuple[Texts, Texts]:
    given = {name for pair in _NAMES_OF_PAIRS for name in pair if getattr(request, name) is not None}
    for pair in _NAMES_OF_PAIRS:
        if given == set(pair):
            return getattr(request, pair[0]), getattr(request, pair[1])
    names = ", or ".join(" and ".join(pair) for pair in _NAMES_OF_PAIRS)
    raise BadRequest(f"give {names}; found {', '.join(sorted(given)) or 'none of them'}.", param="queries")


def _encoded(output: RequestOutput, encoding_format: str) -> list[float] | str:
    values = values_of(output)
    if encoding_format == "float":
        return values
    packed = array("f", values)
    if byteorder == "big":
        packed.byteswap()
    return base64.b64encode(packed.tobytes()).decode()


def _head(service: Service, http: Request, request: PoolingBody, prefix: str) -> dict[str, Any]:
    return {
        "id": f"{prefix}-{id_of(request, http)}",
        "created": int(time.time()),
        "model": request.model or service.model_names[0],
        "system_fingerprint": service.engine.fingerprint,
    }


async def _answer(service: Service, http: Request, found: _Pooling, body: Callable[[], msgspec.Struct]) -> Response:
    """Write the body, off the event loop if it is long."""

    def encoded() -> bytes:
        return msgspec.json.encode(body())

    is_long = sum(len(output.pooled or ()) for output in found.outputs) > _MANY_NUMBERS
    return await _response(service, http, await service.offload.written(encoded) if is_long else encoded())


async def _response(service: Service, http: Request, body: bytes) -> Response:
    return Response(body, headers=await load_header(service, http), media_type="application/json")
