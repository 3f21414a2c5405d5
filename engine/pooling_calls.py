"""The methods of `LLM` and `AsyncLLM` for models that pool."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import AsyncGenerator, Mapping, Sequence
from typing import Any, overload

from sempre.engine.client import AsyncEngineClient
from sempre.engine.frontend.engine_base import EngineBase
from sempre.engine.frontend.pooling import (
    Pairs,
    as_classes,
    as_embedding,
    as_pooled,
    as_relevance,
    require_pooling,
    require_scores,
)
from sempre.engine.frontend.progress import UseTqdm
from sempre.engine.frontend.prompts import PromptType, TokensPrompt
from sempre.engine.frontend.request_builder import PreparedRequest
from sempre.engine.frontend.tenants import of_tenant
from sempre.engine.output_stream import OutputStream
from sempre.engine.outputs import RequestOutput, ScoringOutput
from sempre.engine.pooling import (
    ClassificationRequestOutput,
    EmbeddingRequestOutput,
    PoolingParams,
    PoolingRequestOutput,
    ScoringRequestOutput,
)
from sempre.engine.sampling_params import SamplingParams
from sempre.engine.vllm_settings import refuse_values
from sempre.ipc.config import PoolingTask
from sempre.ipc.errors import RequestError
from sempre.ipc.messages import TenantSpec

Prompts = PromptType | Sequence[PromptType]
Texts = str | Sequence[str]


class PoolingEngine(EngineBase):
    """What both kinds of engine share."""

    def _pair_prompts(self, pairs: Pairs) -> list[TokensPrompt]:
        return [self._frontend.pair_prompt(query, document) for query, document in pairs.texts()]

    def _classes(self, outputs: Sequence[RequestOutput]) -> list[ClassificationRequestOutput]:
        model = require_pooling(self._frontend.pooling, "classify")
        return [as_classes(output, model) for output in outputs]


class PoolingLLM(PoolingEngine):
    """The base of `LLM`."""

    @abstractmethod
    def _complete(
        self, prompts: Prompts, params: SamplingParams, priority: Sequence[int] | None, use_tqdm: UseTqdm
    ) -> list[RequestOutput]:
        """Generate for each prompt; outputs in the order of `prompts`."""

    @abstractmethod
    def _pool(self, prompts: Prompts, params: PoolingParams | None, use_tqdm: UseTqdm) -> list[RequestOutput]:
        """Pool each prompt; outputs in the order of `prompts`."""

    def embed(
        self,
        prompts: Prompts,
        *,
        use_tqdm: UseTqdm = True,
        pooling_params: PoolingParams | None = None,
        lora_request: object = None,
        tokenization_kwargs: object = None,
    ) -> list[EmbeddingRequestOutput]:
        """Return the vector of each prompt; the same bits for any batch.

        Raises RequestError for a refused prompt or parameter, for a model that does not embed, and when a request
        fails while it runs.
        """
        refuse_values(lora_request=lora_request, tokenization_kwargs=tokenization_kwargs)
        require_pooling(self._frontend.pooling, "embed")
        return [as_embedding(output) for output in self._pool(prompts, pooling_params, use_tqdm)]

    def encode(
        self,
        prompts: Prompts,
        pooling_params: PoolingParams | None = None,
        *,
        use_tqdm: UseTqdm = True,
        pooling_task: PoolingTask | None = None,
        lora_request: object = None,
        tokenization_kwargs: object = None,
    ) -> list[PoolingRequestOutput]:
        """Return what the model pools, whether it embeds or classifies. Raises the errors of `embed`."""
        refuse_values(lora_request=lora_request, tokenization_kwargs=tokenization_kwargs)
        require_pooling(self._frontend.pooling, pooling_task)
        return [as_pooled(output) for output in self._pool(prompts, pooling_params, use_tqdm)]

    def classify(
        self,
        prompts: Prompts,
        *,
        use_tqdm: UseTqdm = True,
        pooling_params: PoolingParams | None = None,
        lora_request: object = None,
        tokenization_kwargs: object = None,
    ) -> list[ClassificationRequestOutput]:
        """Return the probability of each label for each prompt. Raises the errors of `embed`."""
        refuse_values(lora_request=lora_request, tokenization_kwargs=tokenization_kwargs)
        require_pooling(self._frontend.pooling, "classify")
        return self._classes(self._pool(prompts, pooling_params, use_tqdm))

    @overload
    def score(self, prompts: Prompts, *, use_tqdm: UseTqdm = False) -> list[ScoringOutput]: ...

    @overload
    def score(
        self,
        prompts: Texts,
        documents: Texts,
        *,
        use_tqdm: UseTqdm = False,
        pooling_params: PoolingParams | None = None,
    ) -> list[ScoringRequestOutput]: ...

    def score(
        self,
        prompts: Any,
        documents: Texts | None = None,
        *,
        use_tqdm: UseTqdm = False,
        pooling_params: PoolingParams | None = None,
    ) -> Any:
        """Return the log-probability of each prompt, per token and in total; the same bits as in generation.

        With `documents`, the prompts are queries, one for all documents or one for each, and the result is how well
        each document answers: what a model that ranks says of the pair, or the similarity of two embeddings (the
        cosine, unless the model's files name another).

        A prompt must leave room for one token. Raises RequestError, also when a request fails while it runs.
        """
        if documents is not None:
            return self._score_pairs(prompts, documents, pooling_params, use_tqdm)
        params = SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=0, detokenize=False)
        outputs = self._complete(prompts, params, None, use_tqdm)
        return [_scored(output) for output in outputs]

    def _score_pairs(
        self, query: Texts, documents: Texts, params: PoolingParams | None, use_tqdm: UseTqdm
    ) -> list[ScoringRequestOutput]:
        pairs = Pairs(query, documents)
        if (model := require_scores(self._frontend.pooling)).task == "embed":
            return pairs.scored(self._pool(pairs.single, params, use_tqdm), model.similarity)
        return [as_relevance(output) for output in self._pool(self._pair_prompts(pairs), params, use_tqdm)]


def _scored(output: RequestOutput) -> ScoringOutput:
    error = output.outputs[0].error
    if error is not None or output.prompt_logprobs is None:
        raise RequestError(f"prompt {output.request_id} could not be scored: {error}", request_id=output.request_id)
    logprobs = [
        None if row is None else row[token_id].logprob
        for token_id, row in zip(output.prompt_token_ids, output.prompt_logprobs, strict=True)
    ]
    total = 0.0
    # Not sum(): since Python 3.12 it rounds differently.
    for logprob in logprobs[1:]:
        assert logprob is not None
        total += logprob
    return ScoringOutput(output.prompt_token_ids, logprobs, total, output.fingerprint)


class AsyncPoolingLLM(PoolingEngine):
    """The base of `AsyncLLM`."""

    @abstractmethod
    async def _begun(self) -> None:
        """Start the engine unless it was started, and wait until it is ready. Raises the errors of its start."""

    @abstractmethod
    def _connected(self) -> AsyncEngineClient:
        """Return the link to the engine. Raises EngineDeadError."""

    @abstractmethod
    def _follow(self, requests: list[PreparedRequest]) -> OutputStream:
        """Start requests and return their outputs as one stream."""

    def pool(
        self,
        prompts: Prompts,
        pooling_params: PoolingParams | None = None,
        *,
        priority: int = 0,
        request_id: str | None = None,
        tenant: TenantSpec | None = None,
    ) -> OutputStream:
        """Start all prompts or none, and return their outputs as one stream; only one prompt may have an id. Requests
        of a `tenant` wait for its turn among those of others.

        Raises RequestError for a refused prompt or parameter, EngineDeadError when the engine died.
        """
        self._connected()
        params = pooling_params or PoolingParams()
        requests = self._frontend.builder.build_pooled(prompts, params, priority, request_id=request_id)
        return self._follow(of_tenant(requests, tenant))

    @property
    def chat_template(self) -> str | None:
        """The chat template in use, None when there is none."""
        return self._frontend.chat_template

    def chat_arguments(self, messages: Sequence[Mapping[str, Any]], **keywords: Any) -> dict[str, Any]:
        """Return the arguments for `engine.text.render_chat`; takes the keywords of `LLM.chat`."""
        return self._frontend.chat_arguments(messages, **keywords)

    def pair_arguments(self, query: str, document: str) -> dict[str, Any] | None:
        """Return the arguments of `engine.text.render_chat` for a pair to be scored; None if the chat template does
        not know the roles `query` and `document`."""
        return self._frontend.pair_arguments(query, document)

    async def encode(
        self,
        prompt: PromptType,
        pooling_params: PoolingParams | None = None,
        request_id: str | None = None,
        *,
        lora_request: object = None,
        trace_headers: object = None,
        priority: int = 0,
        tokenization_kwargs: object = None,
    ) -> AsyncGenerator[PoolingRequestOutput, None]:
        """Yield what the model pools of one prompt, once, like `LLM.encode`. Closing the generator aborts it."""
        refuse_values(lora_request=lora_request, trace_headers=trace_headers, tokenization_kwargs=tokenization_kwargs)
        await self._begun()
        stream = self.pool(prompt, pooling_params, priority=priority, request_id=request_id)
        for output in await stream.finished():
            yield as_pooled(output)

    async def embed(
        self, prompts: Prompts, *, pooling_params: PoolingParams | None = None
    ) -> list[EmbeddingRequestOutput]:
        """Return the vector of each prompt, like `LLM.embed`."""
        await self._begun()
        require_pooling(self._frontend.pooling, "embed")
        return [as_embedding(output) for output in await self.pool(prompts, pooling_params).finished()]

    async def classify(
        self, prompts: Prompts, *, pooling_params: PoolingParams | None = None
    ) -> list[ClassificationRequestOutput]:
        """Return the probability of each label for each prompt, like `LLM.classify`."""
        await self._begun()
        require_pooling(self._frontend.pooling, "classify")
        return self._classes(await self.pool(prompts, pooling_params).finished())

    async def score(
        self, query: Texts, documents: Texts, *, pooling_params: PoolingParams | None = None
    ) -> list[ScoringRequestOutput]:
        """Return how well each document answers the query, like `LLM.score`."""
        await self._begun()
        pairs = Pairs(query, documents)
        if (model := require_scores(self._frontend.pooling)).task == "embed":
            return pairs.scored(await self.pool(pairs.single, pooling_params).finished(), model.similarity)
        outputs = await self.pool(self._pair_prompts(pairs), pooling_params).finished()
        return [as_relevance(output) for output in outputs]
