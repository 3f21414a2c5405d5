"""Pooling as users see it: what may be asked of a model, pairs to score, and outputs."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import NoReturn, TypeVar

from sempre.engine.outputs import RequestOutput
from sempre.engine.parameter_checks import shown
from sempre.engine.pooling import (
    ClassificationOutput,
    ClassificationRequestOutput,
    EmbeddingOutput,
    EmbeddingRequestOutput,
    Outputs,
    PooledOutput,
    PoolingOutput,
    PoolingParams,
    PoolingRequestOutput,
    RelevanceOutput,
    ScoringRequestOutput,
)
from sempre.engine.sampling_params import RequestOutputKind, SamplingParams
from sempre.ipc.config import PoolingTask, Similarity
from sempre.ipc.errors import RequestError
from sempre.ipc.messages import PoolingModel, PoolingSpec

Kind = TypeVar("Kind", bound=PooledOutput)  # type: ignore[type-arg]
_NAMES = {"embed": "embeds", "classify": "classifies"}
_ONE_LABEL = 1
NOT_SAMPLED = SamplingParams(
    max_tokens=1, temperature=0.0, seed=0, detokenize=False, output_kind=RequestOutputKind.FINAL_ONLY
)
"""Of a request that is pooled: nothing is sampled."""


def require_pooling(model: PoolingModel | None, task: PoolingTask | None = None) -> PoolingModel:
    """Return the model's facts. Raises RequestError unless it pools, and for this task if one is given."""
    if model is None:
        raise RequestError(
            "This model generates text; it has no embeddings, classes or scores. Serve one that pools, or give"
            " runner='pooling' (--runner pooling) for one that can.",
            parameter="model",
        )
    if task is not None and task != model.task:
        raise RequestError(f"This model {_NAMES[model.task]}; it cannot {task}.", parameter="model")
    return model


def refuse_generation(model: PoolingModel | None) -> None:
    """Raise RequestError for a prompt to be continued by a model that pools."""
    if model is not None:
        raise RequestError(
            f"This model {_NAMES[model.task]} and does not generate text: use"
            f" {'embed (/v1/embeddings)' if model.task == 'embed' else 'classify or score (/classify, /rerank)'}.",
            parameter="model",
        )


def pooling_spec(params: PoolingParams, model: PoolingModel) -> PoolingSpec:
    """Return the workers' part of the parameters. Raises RequestError naming what the model cannot do."""
    if not isinstance(params, PoolingParams):
        raise RequestError(
            f"pooling_params must be PoolingParams, got {type(params).__name__}.",
            parameter="pooling_params",
            value=params,
        )
    params = replace(params)  # checks values assigned after construction
    require_pooling(model, params.task)
    if params.dimensions is not None and params.dimensions != model.width:
        _check_dimensions(params.dimensions, model)
    active = model.use_activation if params.use_activation is None else params.use_activation
    return PoolingSpec(dimensions=params.dimensions, use_activation=active)


def stored_prompt(model: PoolingModel, name: str | None) -> str:
    """Return what the model puts before texts. Raises RequestError for a name that it does not know."""
    if name is None:
        name = model.default_prompt_name or ""
    if name == "":
        return ""
    if name not in model.prompts:
        known = ", ".join(map(repr, model.prompts)) or "none: its files have no prompts"
        raise RequestError(
            f"prompt_name: expected one of the model's ({known}), found {shown(name)}.",
            parameter="prompt_name",
            value=name,
        )
    return model.prompts[name]


def refuse_prompt_name(name: str) -> NoReturn:
    """Raise RequestError for token ids beside the name of a stored prompt."""
    raise RequestError(
        "prompt_name is for texts; a prompt of token ids is used as given.", parameter="prompt_name", value=name
    )


def _check_dimensions(dimensions: int, model: PoolingModel) -> None:
    if model.task != "embed":
        text = "dimensions is for embeddings, and this model classifies."
    elif not model.is_matryoshka:
        text = (
            f"dimensions: this model does not state that its embeddings of {model.width} elements may be cut, which"
            " would lead to poor results. If it was trained for that (matryoshka), give"
            ' hf_overrides={"is_matryoshka": true}.'
        )
    elif model.dimensions and dimensions not in model.dimensions:
        text = f"dimensions must be one of {', '.join(map(str, model.dimensions))} for this model, got {dimensions}."
    elif dimensions > model.width:
        text = f"dimensions must be at most {model.width}, the size of this model's embeddings, got {dimensions}."
    else:
        return
    raise RequestError(text, parameter="dimensions", value=dimensions)


# Outputs


def _output(kind: type[Kind], pooled: RequestOutput, outputs: Outputs) -> Kind:
    return kind(
        request_id=pooled.request_id,
        outputs=outputs,
        prompt_token_ids=pooled.prompt_token_ids,
        num_cached_tokens=pooled.num_cached_tokens or 0,
        fingerprint=pooled.fingerprint,
    )


def values_of(output: RequestOutput) -> list[float]:
    """Return what was pooled. Raises RequestError if the request failed."""
    if output.pooled is None:
        choice = output.outputs[0]
        raise RequestError(
            f"prompt {output.request_id} could not be pooled: {choice.error or choice.finish_reason}",
            request_id=output.request_id,
        )
    return output.pooled


def as_pooled(output: RequestOutput) -> PoolingRequestOutput:
    return _output(PoolingRequestOutput, output, PoolingOutput(values_of(output)))


def as_embedding(output: RequestOutput) -> EmbeddingRequestOutput:
    return _output(EmbeddingRequestOutput, output, EmbeddingOutput(values_of(output)))


def as_classes(output: RequestOutput, model: PoolingModel) -> ClassificationRequestOutput:
    probs = values_of(output)
    best = probs.index(max(probs))
    return _output(ClassificationRequestOutput, output, ClassificationOutput(probs, model.labels[best]))


# Scores of pairs


class Pairs:
    """The pairs of one call: one query for all documents, or as many as documents."""

    def __init__(self, queries: object, documents: object) -> None:
        """Raises RequestError unless both are texts, or lists of texts that can be paired."""
        firsts, self._documents = _texts("query", queries), _texts("documents", documents)
        if len(firsts) not in (1, len(self._documents)):
            raise RequestError(
                f"one query for all documents, or one for each, is needed; got {len(firsts)} queries and"
                f" {len(self._documents)} documents.",
                parameter="query",
                value=queries,
            )
        self._shared = len(firsts) == 1
        self._queries = firsts

    def texts(self) -> list[tuple[str, str]]:
        """Return (query, document) of each pair."""
        queries = self._queries * len(self._documents) if self._shared else self._queries
        return list(zip(queries, self._documents, strict=True))

    @property
    def single(self) -> list[str]:
        """Each text once: the queries, then the documents, for a model that embeds them one by one."""
        return [*self._queries, *self._documents]

    def scored(self, embedded: Sequence[RequestOutput], similarity: Similarity) -> list[ScoringRequestOutput]:
        """Return how similar the texts of each pair are, from what the model returned for `single`."""
        count = len(self._queries)
        queries = [embedded[0]] * len(self._documents) if self._shared else embedded[:count]
        of_two = SIMILARITIES[similarity]
        pairs = zip(queries, embedded[count:], strict=True)
        return [_similarity(query, document, of_two) for query, document in pairs]


def _texts(parameter: str, given: object) -> list[str]:
    texts = [given] if isinstance(given, str) else given
    if not isinstance(texts, Sequence) or not texts or not all(isinstance(text, str) for text in texts):
        raise RequestError(
            f"{parameter} must be a text or a list of texts, at least one, got {shown(given)}.",
            parameter=parameter,
            value=given,
        )
    return list(texts)


def as_relevance(output: RequestOutput) -> ScoringRequestOutput:
    """Return the score of a pair that the model ranked."""
    return _output(ScoringRequestOutput, output, RelevanceOutput(values_of(output)[0]))


def _similarity(
    query: RequestOutput, document: RequestOutput, of_two: Callable[[Sequence[float], Sequence[float]], float]
) -> ScoringRequestOutput:
    score = of_two(values_of(query), values_of(document))
    found = _output(ScoringRequestOutput, document, RelevanceOutput(score))
    found.request_id = f"{query.request_id}_{document.request_id}"
    found.prompt_token_ids = query.prompt_token_ids + document.prompt_token_ids
    return found


def cosine(a: Sequence[float], b: Sequence[float]) -> float:
    """Sums are rounded once, so that no order of additions can be seen."""
    norms = math.sqrt(dot(a, a)) * math.sqrt(dot(b, b))
    return dot(a, b) / norms if norms else 0.0


def dot(a: Sequence[float], b: Sequence[float]) -> float:
    return math.fsum(x * y for x, y in zip(a, b, strict=True))


def _euclidean(a: Sequence[float], b: Sequence[float]) -> float:
    return -math.sqrt(math.fsum((x - y) ** 2 for x, y in zip(a, b, strict=True)))


def _manhattan(a: Sequence[float], b: Sequence[float]) -> float:
    return -math.fsum(abs(x - y) for x, y in zip(a, b, strict=True))


SIMILARITIES: dict[Similarity, Callable[[Sequence[float], Sequence[float]], float]] = {
    "cosine": cosine,
    "dot": dot,
    "euclidean": _euclidean,
    "manhattan": _manhattan,
}


def require_scores(model: PoolingModel | None) -> PoolingModel:
    """Return the facts of a model that scores pairs. Raises RequestError for another one."""
    found = require_pooling(model)
    if found.task == "classify" and found.width != _ONE_LABEL:
        raise RequestError(
            f"This model classifies with {found.width} labels; scores need a model with one label.", parameter="model"
        )
    return found


def pair_messages(template: str | None, query: str, document: str) -> list[Mapping[str, str]] | None:
    """Return a pair as messages, if the chat template knows the roles `query` and `document`; else None."""
    if template is None or not all(re.search(rf"['\"]{role}['\"]", template) for role in ("query", "document")):
        return None
    return [{"role": "query", "content": query}, {"role": "document", "content": document}]
