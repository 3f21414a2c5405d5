"""Turns prompts and sampling parameters into requests for the coordinator."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from msgspec.structs import replace

from sempre.engine.adapters import Adapter
from sempre.engine.frontend.limits import RequestLimits, check_candidates, cut
from sempre.engine.frontend.pooling import (
    NOT_SAMPLED,
    pooling_spec,
    refuse_generation,
    refuse_prompt_name,
    require_pooling,
    stored_prompt,
)
from sempre.engine.frontend.prompts import list_prompts, parse_prompt
from sempre.engine.frontend.sampling_spec import SpecBuilder, check_utf8
from sempre.engine.parameter_checks import shown
from sempre.engine.parsing.reasoning import PromptReasoning
from sempre.engine.pooling import PoolingParams
from sempre.engine.sampling_params import SamplingParams
from sempre.engine.seed_counts import Numbering, SeedCounts
from sempre.engine.seeding import child_seed, derive_request_seed, distribution_digest, reported_seed, request_digest
from sempre.engine.text.tokenizer import Tokenizer
from sempre.ipc.errors import ConfigError, RequestError
from sempre.ipc.messages import PoolingSpec, RequestSpec, SamplingSpec


@dataclass(frozen=True, slots=True)
class PreparedRequest:
    """One user request: a prompt and its `n` sequences."""

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    params: SamplingParams
    """The values at the time of the call."""
    sequences: list[RequestSpec]
    """Sequence i samples with the seed of the request plus i."""
    seeds: list[int]
    """The seed of each sequence as reported to the user: a negative one as given."""
    arrival_time: float
    reasoning: PromptReasoning = field(compare=False, repr=False)
    """Whether the output begins inside reasoning."""
    is_recorded: bool = False
    """Whether its outputs have receipts."""
    adapter: Adapter | None = None
    """None: the model itself"""


class _Parameters(NamedTuple):
    """Checked parameters of a call, one for all prompts that share them."""

    given: SamplingParams
    params: SamplingParams
    spec: SamplingSpec
    distribution: bytes


class _Checked(NamedTuple):
    """A valid request."""

    request_id: str | None
    text: str | None
    token_ids: list[int]
    parameters: _Parameters
    spec: SamplingSpec
    reasoning: PromptReasoning
    priority: int
    cache_salt: str | None
    is_recorded: bool
    adapter: Adapter | None = None


class RequestBuilder:
    """Checks requests, numbers them, and derives a seed for those without one.

    That seed depends on (engine seed, digest of the request, number of earlier requests without a seed and with this
    digest), so it does not depend on other requests before it or at the same time.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        limits: RequestLimits,
        is_in_use: Callable[[str, int], bool] = lambda request_id, n: False,
        *,
        records_all: bool = False,
        numbering: Numbering | None = None,
    ) -> None:
        """`is_in_use(id, n)`: whether an unfinished request has this id, or a sequence has one of its `n` ids.
        `records_all`: outputs have receipts unless a call says otherwise. `numbering` is shared with other processes.
        """
        self.records_all = records_all
        self._tokenizer = tokenizer
        self.limits = limits
        self._specs = SpecBuilder(tokenizer, limits)
        self._is_in_use = is_in_use
        self._prefix, self._seed_counts = numbering or Numbering("", SeedCounts())
        self._num_requests = 0
        self._num_sequences = 0
        # The parameters checked last: a list of prompts mostly shares one object. Every call checks them again, since
        # the caller may change them in between.
        self._checked: _Parameters | None = None

    @property
    def num_dropped_digests(self) -> int:
        """Requests without a seed whose count was dropped because too many different ones followed."""
        return self._seed_counts.num_dropped

    def build_all(
        self,
        prompts: object,
        params: SamplingParams | Sequence[SamplingParams],
        priorities: int | Sequence[int] | None = None,
        *,
        record: bool | None = None,
        adapters: Sequence[Adapter | None] = (None,),
    ) -> list[PreparedRequest]:
        """Build one request per prompt; all are checked before the first is numbered. `record`: whether they have
        receipts; None is the builder's setting. `adapters`: one for all prompts, or one each.

        Raises RequestError (a ValueError) naming the refused prompt or parameter and the reason.
        """
        parts, is_list = list_prompts(prompts)
        params_list = _one_each("sampling_params", params, SamplingParams, len(parts))
        priority_list = _one_each("priority", 0 if priorities is None else priorities, int, len(parts))
        adapter_list = _adapters_each(adapters, len(parts))
        self._checked = None
        checked = [
            self._check(prompt, prompt_params, priority, where=f"prompts[{i}]" if is_list else "", record=record)
            for i, (prompt, prompt_params, priority) in enumerate(zip(parts, params_list, priority_list, strict=True))
        ]
        both = zip(checked, adapter_list, strict=True)
        return [self._number(request) for request in [each._replace(adapter=adapter) for each, adapter in both]]

    def build(
        self,
        prompt: object,
        params: SamplingParams,
        priority: int = 0,
        *,
        request_id: str | None = None,
        adapter: Adapter | None = None,
    ) -> PreparedRequest:
        """Build one request. Raises RequestError, also for a `request_id` in use."""
        self._checked = None
        return self._number(self._check(prompt, params, priority, request_id=request_id)._replace(adapter=adapter))

    def _check(
        self,
        prompt: object,
        params: SamplingParams,
        priority: int,
        *,
        request_id: str | None = None,
        where: str = "",
        record: bool | None = None,
    ) -> _Checked:
        """`where` is a prefix of error texts."""
        refuse_generation(self.limits.pooling)
        if not isinstance(params, SamplingParams):
            raise RequestError(
                f"sampling_params must be SamplingParams, got {type(params).__name__}.",
                parameter="sampling_params",
                value=params,
            )
        with _located(where):
            text, given_ids, cache_salt = parse_prompt(prompt)
            parameters = self._parameters(params)
            token_ids = self._prompt_token_ids(text, given_ids, parameters.params)
            max_tokens = self.limits.max_tokens(parameters.params, len(token_ids))
            check_candidates(parameters.spec.prompt_candidates, len(token_ids))
            self._check_rest(priority, cache_salt, request_id, params.n)
        shared = parameters.spec
        spec = shared if shared.max_tokens == max_tokens else replace(shared, max_tokens=max_tokens)
        reasoning = PromptReasoning(self._tokenizer, token_ids)
        spec = self._specs.with_reasoning(spec, parameters.params, reasoning)
        is_recorded = self.records_all if record is None else record
        if is_recorded and spec.logprobs is None:
            spec = replace(spec, logprobs=0)  # those of the sampled tokens, for the receipt
        return _Checked(request_id, text, token_ids, parameters, spec, reasoning, priority, cache_salt, is_recorded)

    def _number(self, request: _Checked) -> PreparedRequest:
        params, spec = request.parameters.params, request.spec
        adapter = None if request.adapter is None else request.adapter.spec
        if params.seed is None:
            # a prompt that opens the reasoning changes the grammar
            as_shared = spec.grammar is request.parameters.spec.grammar and spec.reasoning is None
            distribution = request.parameters.distribution if as_shared else distribution_digest(spec)
            digest = request_digest(distribution, request.token_ids, None if adapter is None else adapter.digest)
            seed = derive_request_seed(self.limits.engine_seed, digest, self._seed_counts.count(digest))
        else:
            seed = params.seed
        name = self._free_name(params.n) if request.request_id is None else request.request_id
        # Siblings share the prompt, so one sequence reports its log-probabilities.
        sibling_spec = replace(spec, prompt_logprobs=None, prompt_candidates=None) if params.n > 1 else spec
        sequences = [
            RequestSpec(
                request_id=name if params.n == 1 else f"{name}_{i}",
                prompt_token_ids=request.token_ids,
                params=spec if i == 0 else sibling_spec,
                seed=child_seed(seed, i),
                ordinal=self._num_sequences + i,
                priority=request.priority,
                cache_salt=request.cache_salt,
                adapter=adapter,
            )
            for i in range(params.n)
        ]
        self._num_requests += 1
        self._num_sequences += params.n
        seeds = [reported_seed(seed, i) for i in range(params.n)]
        return PreparedRequest(
            name,
            request.text,
            request.token_ids,
            params,
            sequences,
            seeds,
            time.time(),
            request.reasoning,
            request.is_recorded,
            request.adapter,
        )

    def _check_rest(self, priority: int, cache_salt: object, request_id: str | None, n: int) -> None:
        _check_priority(priority)
        _check_text("cache_salt", cache_salt)
        _check_text("request_id", request_id)
        if request_id is not None and self._is_in_use(request_id, n):
            raise RequestError(
                f"request_id {shown(request_id)} is in use by an unfinished request.",
                parameter="request_id",
                value=request_id,
            )

    def build_pooled(
        self, prompts: object, params: PoolingParams, priority: int = 0, *, request_id: str | None = None
    ) -> list[PreparedRequest]:
        """Build one request per prompt for a model that pools; all are checked before the first is numbered.

        Raises RequestError, also for a model that generates; only a single prompt may have a `request_id`.
        """
        model = require_pooling(self.limits.pooling)
        spec, before = pooling_spec(params, model), stored_prompt(model, params.prompt_name)
        parts, is_list = list_prompts(prompts)
        checked = []
        for index, prompt in enumerate(parts):
            with _located(f"prompts[{index}]" if is_list else ""):
                text, given_ids, cache_salt = parse_prompt(prompt)
                if given_ids is None:
                    text = before + (text or "")
                elif params.prompt_name:
                    refuse_prompt_name(params.prompt_name)
                token_ids = self._prompt_token_ids(text, given_ids, params)
                self.limits.check_length(len(token_ids), num_output_tokens=0)
                self._check_rest(priority, cache_salt, request_id, 1)
                checked.append((text, token_ids, cache_salt))
        return [self._number_pooled(*each, spec, priority, request_id) for each in checked]

    def _number_pooled(
        self,
        text: str | None,
        token_ids: list[int],
        cache_salt: str | None,
        spec: PoolingSpec,
        priority: int,
        request_id: str | None,
    ) -> PreparedRequest:
        name = self._free_name(1) if request_id is None else request_id
        sequence = RequestSpec(
            request_id=name,
            prompt_token_ids=token_ids,
            params=SamplingSpec(max_tokens=1),
            seed=0,
            ordinal=self._num_sequences,
            priority=priority,
            cache_salt=cache_salt,
            pooling=spec,
        )
        self._num_requests += 1
        self._num_sequences += 1
        reasoning = PromptReasoning(self._tokenizer, token_ids)
        return PreparedRequest(
            name, text, token_ids, NOT_SAMPLED, [sequence], [0], time.time(), reasoning, is_recorded=self.records_all
        )

    def check_form(self, params: SamplingParams) -> None:
        """Check the form of the output, which is slow for a large grammar; any thread may call this.

        Raises RequestError like `build_all`, which then does not check this form again.
        """
        self._specs.check_form(params)

    def _free_name(self, n: int) -> str:
        """Return the request's number, changed if a user has chosen it as an id."""
        name = f"{self._prefix}{self._num_requests}"
        while self._is_in_use(name, n):
            name += "+"
        return name

    def _parameters(self, given: SamplingParams) -> _Parameters:
        if self._checked is None or self._checked.given is not given:
            try:
                params = given.clone()
            except ConfigError as error:  # a value assigned after construction
                raise RequestError(str(error), parameter=error.parameter, value=error.value) from None
            spec = self._specs.build(params)
            self._checked = _Parameters(given, params, spec, distribution_digest(spec))
        return self._checked

    def _prompt_token_ids(
        self, text: str | None, given: Sequence[int] | None, params: SamplingParams | PoolingParams
    ) -> list[int]:
        most = self.limits.max_prompt_tokens(params)
        if given is not None:
            token_ids = self._specs.checked_ids("prompt_token_ids", given)
            return token_ids if most is None else cut(token_ids, token_ids, most, params.truncation_side)
        text = text or ""
        check_utf8("prompt", text)
        token_ids = self._tokenizer.encode(text)
        if most is None or len(token_ids) <= most:
            return token_ids
        return cut(token_ids, self._tokenizer.encode(text, add_special_tokens=False), most, params.truncation_side)


def _adapters_each(adapters: Sequence[Adapter | None], count: int) -> list[Adapter | None]:
    """Return one per prompt; a single one applies to all."""
    items = list(adapters) * count if len(adapters) == 1 else list(adapters)
    if len(items) != count:
        raise RequestError(
            f"The lengths of prompts and lora_request must be the same, got {count} and {len(items)}.",
            parameter="lora_request",
        )
    return items


@contextmanager
def _located(where: str) -> Iterator[None]:
    """Put `where`, if not empty, before the text of a RequestError."""
    try:
        yield
    except RequestError as error:
        if not where:
            raise
        raise RequestError(f"{where}: {error}", parameter=error.parameter, value=error.value) from None


def _check_priority(priority: int) -> None:
    if isinstance(priority, bool) or not isinstance(priority, int) or not -(2**63) <= priority < 2**63:
        raise RequestError(
            f"priority must be an int of 64 bits, got {shown(priority)}.", parameter="priority", value=priority
        )


def _check_text(parameter: str, value: object) -> None:
    """Raise RequestError unless `value` is a string that can cross a process, or None."""
    if value is None:
        return
    if not isinstance(value, str):
        raise RequestError(f"{parameter} must be a string, got {shown(value)}.", parameter=parameter, value=value)
    check_utf8(parameter, value)


def _one_each(parameter: str, values: Any, kind: type, count: int) -> list[Any]:
    """Return one value per prompt; a single value applies to all."""
    items = [values] * count if isinstance(values, kind) and not isinstance(values, bool) else values
    if not isinstance(items, Sequence) or not all(
        isinstance(item, kind) and not isinstance(item, bool) for item in items
    ):
        raise RequestError(
            f"{parameter} must be {kind.__name__} or a list with one per prompt, got {shown(values)}.",
            parameter=parameter,
            value=values,
        )
    if len(items) != count:
        raise RequestError(
            f"The lengths of prompts and {parameter} must be the same, got {count} and {len(items)}.",
            parameter=parameter,
            value=values,
        )
    return list(items)
