"""Bodies of the endpoints for models that pool, and of their responses: OpenAI's, Jina's and vLLM's fields."""

from __future__ import annotations

from typing import Annotated, Literal

from msgspec import Meta, Struct

from sempre.engine.server.requests import Count, TokenId
from sempre.engine.server.responses import Usage

Input = Annotated[str | list[str | TokenId | list[TokenId]], Meta(description="text or token ids, or a list of either")]
Texts = Annotated[str | list[str], Meta(description="a text or a list of texts")]
Length = Annotated[int, Meta(ge=-1, description="cut longer prompts to this many tokens; -1: to what the model takes")]


class PoolingBody(Struct, kw_only=True):
    """What all of them have in common."""

    model: str | None = None
    truncate_prompt_tokens: Length | None = None
    truncation_side: Literal["left", "right"] | None = None
    use_activation: Annotated[
        bool | None, Meta(description="norm 1 for embeddings, probabilities for classes; default: the model's")
    ] = None
    priority: Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)] = 0
    cache_salt: Annotated[str, Meta(min_length=1)] | None = None
    request_id: str | None = None


class InputBody(PoolingBody, kw_only=True):
    """Prompts, each pooled by itself."""

    input: Input
    add_special_tokens: bool = True


class EmbeddingRequest(InputBody, kw_only=True):
    """Body of /v1/embeddings."""

    encoding_format: Literal["float", "base64"] = "float"
    dimensions: (
        Annotated[int, Meta(ge=1, description="elements of an embedding, for models trained for that")] | None
    ) = None
    prompt_name: Annotated[
        str | None, Meta(description="the model's stored prompt before each text; default: the model's, empty: none")
    ] = None


class PoolingRequest(EmbeddingRequest, kw_only=True):
    """Body of /pooling: whatever the model pools."""

    task: Literal["embed", "classify"] | None = None


class ClassificationRequest(InputBody, kw_only=True):
    """Body of /classify."""


class ScoreRequest(PoolingBody, kw_only=True):
    """Body of /score: one query for all documents, or one for each; under any of vLLM's names."""

    queries: Texts | None = None
    documents: Texts | None = None
    items: Texts | None = None
    text_1: Texts | None = None
    text_2: Texts | None = None
    data_1: Texts | None = None
    data_2: Texts | None = None


class RerankRequest(PoolingBody, kw_only=True):
    """Body of /rerank: documents in the order of their relevance to a query."""

    query: str
    documents: Annotated[list[str], Meta(min_length=1)]
    top_n: Annotated[Count, Meta(description="at most this many; 0: all")] = 0


# Responses


class Embedding(Struct):
    index: int
    embedding: list[float] | str
    """base64: float32, little-endian"""
    object: str = "embedding"


class EmbeddingResponse(Struct):
    id: str
    created: int
    model: str
    data: list[Embedding]
    usage: Usage
    system_fingerprint: str
    object: str = "list"


class Pooled(Struct):
    index: int
    data: list[float] | str
    object: str = "pooling"


class PoolingResponse(Struct):
    id: str
    created: int
    model: str
    data: list[Pooled]
    usage: Usage
    system_fingerprint: str
    object: str = "list"


class Classification(Struct):
    index: int
    label: str
    probs: list[float]
    num_classes: int


class ClassificationResponse(Struct):
    id: str
    created: int
    model: str
    data: list[Classification]
    usage: Usage
    system_fingerprint: str
    object: str = "list"


class Score(Struct):
    index: int
    score: float
    object: str = "score"


class ScoreResponse(Struct):
    id: str
    created: int
    model: str
    data: list[Score]
    usage: Usage
    system_fingerprint: str
    object: str = "list"


class RerankDocument(Struct):
    text: str


class RerankResult(Struct):
    index: int
    document: RerankDocument
    relevance_score: float


class RerankUsage(Struct):
    prompt_tokens: int
    total_tokens: int


class RerankResponse(Struct):
    """`results`: the most relevant first; of equals the one given first."""

    id: str
    model: str
    usage: RerankUsage
    results: list[RerankResult]
    system_fingerprint: str
