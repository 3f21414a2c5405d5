"""From prompts and sampling parameters to the requests that the coordinator understands."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Integral
from typing import Any

from msgspec.structs import replace

from sempre.engine.frontend.grammars import GrammarBuilder
from sempre.engine.frontend.prompts import list_prompts, parse_prompt
from sempre.engine.sampling_params import SamplingParams
from sempre.engine.seeding import child_seed, derive_request_seed
from sempre.engine.structured_outputs_config import with_defaults
from sempre.engine.text.tokenizer import Tokenizer
from sempre.ipc.errors import RequestError
from sempre.ipc.messages import RequestSpec, SamplingSpec


@dataclass(frozen=True, slots=True)
class PreparedRequest:
    """One user request: a prompt and its `n` sequences."""

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    params: SamplingParams
    sequences: list[RequestSpec]
    """Sequence i samples with the seed of the request plus i."""
    arrival_time: float


@dataclass(frozen=True, slots=True)
class RequestLimits:
    """What a request must fit into."""

    engine_seed: int
    vocab_size: int
    max_model_len: int
    max_kv_tokens: int
    """Tokens that the KV cache of one replica holds."""
    max_logprobs: int
    """Most log-probabilities per token; -1 is the whole vocabulary."""
    eos_token_ids: list[int]
    allows_priority: bool
    structured_outputs: Mapping[str, Any] = field(default_factory=dict)
    """Defaults of forms."""


class RequestBuilder:
    """Checks requests and numbers them.

    A request without a seed gets one from (engine seed, ordinal of the request), so equal calls in equal order on
    equal engines give equal seeds. Ordinals count only requests that passed all checks.
    """

    def __init__(self, tokenizer: Tokenizer, limits: RequestLimits) -> None:
        self._tokenizer = tokenizer
        self._limits = limits
        self._grammars = GrammarBuilder(tokenizer)
        self._num_requests = 0
        self._num_sequences = 0
        # The parameters checked last: a list of prompts mostly shares one object. They are checked anew in every call,
        # as the caller may change a list or mapping in between.
        self._checked: tuple[SamplingParams, SamplingSpec] | None = None

    def build_all(
        self,
        prompts: object,
        params: SamplingParams | Sequence[SamplingParams],
        priorities: Sequence[int] | None = None,
    ) -> list[PreparedRequest]:
        """Build one request per prompt; all are checked before the first is numbered.

        Raises RequestError (a ValueError) that says which prompt or parameter is refused and why.
        """
        parts, is_list = list_prompts(prompts)
        params_list = _one_each("sampling_params", params, SamplingParams, len(parts))
        priority_list = _one_each("priority", 0 if priorities is None else priorities, int, len(parts))
        first_request, first_sequence = self._num_requests, self._num_sequences
        requests = []
        self._checked = None
        try:
            for i, (prompt, prompt_params, priority) in enumerate(zip(parts, params_list, priority_list, strict=True)):
                where = f"prompts[{i}]" if is_list else ""
                requests.append(self._build(prompt, prompt_params, priority, where=where))
        except BaseException:
            self._num_requests, self._num_sequences = first_request, first_sequence
            raise
        return requests

    def build(
        self, prompt: object, params: SamplingParams, priority: int = 0, *, request_id: str | None = None
    ) -> PreparedRequest:
        """Build one request. Raises RequestError."""
        self._checked = None
        return self._build(prompt, params, priority, request_id=request_id)

    def _build(
        self,
        prompt: object,
        params: SamplingParams,
        priority: int,
        *,
        request_id: str | None = None,
        where: str = "",
    ) -> PreparedRequest:
        """`where` precedes error texts."""
        if not isinstance(params, SamplingParams):
            raise RequestError(
                f"sampling_params must be SamplingParams, got {type(params).__name__}.",
                parameter="sampling_params",
                value=params,
            )
        try:
            text, given_ids, cache_salt = parse_prompt(prompt)
            if given_ids is None:
                token_ids = self._encoded(text or "")
            else:
                token_ids = self._checked_ids("prompt_token_ids", given_ids)
            spec = self._fitted(self._sampling_spec(params), params, token_ids)
            self._check_priority(priority)
            _check_text("cache_salt", cache_salt)
            _check_text("request_id", request_id)
        except RequestError as error:
            if not where:
                raise
            raise RequestError(f"{where}: {error}", parameter=error.parameter, value=error.value) from None
        ordinal = self._num_requests
        seed = derive_request_seed(self._limits.engine_seed, ordinal) if params.seed is None else params.seed
        name = str(ordinal) if request_id is None else request_id
        # Siblings share the prompt, so one report of its log-probabilities is enough.
        sibling_spec = replace(spec, prompt_logprobs=None) if params.n > 1 else spec
        sequences = [
            RequestSpec(
                request_id=name if params.n == 1 else f"{name}_{i}",
                prompt_token_ids=token_ids,
                params=spec if i == 0 else sibling_spec,
                seed=child_seed(seed, i),
                ordinal=self._num_sequences + i,
                priority=priority,
                cache_salt=cache_salt,
            )
            for i in range(params.n)
        ]
        self._num_requests += 1
        self._num_sequences += params.n
        return PreparedRequest(name, text, token_ids, params, sequences, time.time())

    def _encoded(self, text: str) -> list[int]:
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise RequestError(
                f"prompt has no UTF-8 form: {error.reason} at character {error.start}.", parameter="prompt", value=text
            ) from None
        return self._tokenizer.encode(text)

    def _sampling_spec(self, params: SamplingParams) -> SamplingSpec:
        """Return what depends on parameters and model, but not on the prompt; `max_tokens` is set by `_fitted`."""
        if self._checked is not None and self._checked[0] is params:
            return self._checked[1]
        self._check_logprobs(params)
        bias = params.logit_bias or {}
        bias_ids = self._checked_ids("logit_bias", list(bias))
        allowed = params.allowed_token_ids
        spec = SamplingSpec(
            max_tokens=1,
            min_tokens=params.min_tokens,
            temperature=params.temperature,
            top_p=params.top_p,
            # more than the vocabulary keeps all of it
            top_k=min(params.top_k, self._limits.vocab_size),
            min_p=params.min_p,
            presence_penalty=params.presence_penalty,
            frequency_penalty=params.frequency_penalty,
            repetition_penalty=params.repetition_penalty,
            logit_bias=dict(zip(bias_ids, bias.values(), strict=True)),
            allowed_token_ids=None if allowed is None else self._checked_ids("allowed_token_ids", allowed),
            bad_words_token_ids=self._bad_words(params.bad_words or []),
            eos_token_ids=[] if params.ignore_eos else self._limits.eos_token_ids,
            stop_token_ids=self._checked_ids("stop_token_ids", params.stop_token_ids or []),
            logprobs=params.logprobs,
            prompt_logprobs=params.prompt_logprobs,
            grammar=self._grammar(params),
        )
        self._checked = (params, spec)
        return spec

    def _grammar(self, params: SamplingParams) -> str | None:
        if params.structured_outputs is None:
            return None
        limits = self._limits
        form = with_defaults(params.structured_outputs, limits.structured_outputs)
        return self._grammars.build(form, limits.vocab_size, limits.eos_token_ids)

    def _fitted(self, spec: SamplingSpec, params: SamplingParams, token_ids: list[int]) -> SamplingSpec:
        """Return `spec` with as many tokens as asked for and as the context holds, and what it may think before."""
        if not token_ids:
            raise RequestError("The decoder prompt cannot be empty.", parameter="prompt", value=token_ids)
        room = self._limits.max_model_len - len(token_ids)
        if room < 1:
            raise RequestError(
                f"The decoder prompt (length {len(token_ids)}) plus the number of requested output tokens (at least 1) "
                f"is longer than the maximum model length of {self._limits.max_model_len}. "
                "Shorten the prompt or raise max_model_len.",
                parameter="prompt",
                value=len(token_ids),
            )
        if len(token_ids) >= self._limits.max_kv_tokens:
            raise RequestError(
                f"The decoder prompt (length {len(token_ids)}) plus the number of requested output tokens (at least 1) "
                f"does not fit into the KV cache of {self._limits.max_kv_tokens} tokens. "
                "Shorten the prompt or raise kv_cache_memory_bytes.",
                parameter="prompt",
                value=len(token_ids),
            )
        if params.min_tokens > room:
            raise RequestError(
                f"min_tokens={params.min_tokens} does not fit behind the prompt (length {len(token_ids)}): "
                f"the maximum model length is {self._limits.max_model_len}.",
                parameter="min_tokens",
                value=params.min_tokens,
            )
        max_tokens = room if params.max_tokens is None else min(params.max_tokens, room)
        spec = spec if spec.max_tokens == max_tokens else replace(spec, max_tokens=max_tokens)
        return self._grammars.with_reasoning(spec, params, token_ids)

    def _check_logprobs(self, params: SamplingParams) -> None:
        limit = self._limits.max_logprobs
        if limit == -1:
            return
        for name, kind in (("logprobs", "sample"), ("prompt_logprobs", "prompt")):
            asked = getattr(params, name)
            if asked is None:
                continue
            count = self._limits.vocab_size if asked == -1 else asked
            if count > limit:
                raise RequestError(
                    f"Requested {kind} logprobs of {count}, which is greater than max allowed: {limit}. "
                    "Raise max_logprobs of the engine.",
                    parameter=name,
                    value=asked,
                )

    def _check_priority(self, priority: int) -> None:
        if isinstance(priority, bool) or not isinstance(priority, int) or not -(2**63) <= priority < 2**63:
            raise RequestError(
                f"priority must be an int of 64 bits, got {priority!r}.", parameter="priority", value=priority
            )
        if priority != 0 and not self._limits.allows_priority:
            raise RequestError(
                f"Got priority {priority} but priority scheduling is not enabled. Set scheduling_policy='priority'.",
                parameter="priority",
                value=priority,
            )

    def _checked_ids(self, parameter: str, token_ids: Sequence[Any]) -> list[int]:
        if set(map(type, token_ids)) == {int} and min(token_ids) >= 0 and max(token_ids) < self._limits.vocab_size:
            return list(token_ids)
        checked = []
        for token_id in token_ids:
            if isinstance(token_id, bool) or not isinstance(token_id, Integral):
                raise RequestError(
                    f"{parameter} must contain only ints, got {token_id!r}.", parameter=parameter, value=token_id
                )
            number = int(token_id)
            if not 0 <= number < self._limits.vocab_size:
                raise RequestError(
                    f"Token id {token_id} is out of vocabulary: {parameter} takes ids in "
                    f"[0, {self._limits.vocab_size}).",
                    parameter=parameter,
                    value=token_id,
                )
            checked.append(number)
        return checked

    def _bad_words(self, words: Sequence[str]) -> list[list[int]]:
        """Return the token sequences that may not be generated: each word, and the word behind a space.

        The second form is what the word looks like in the middle of a text. It is left out when it ends with the
        first one (a space token before it), which bans it already.
        """
        sequences = []
        for word in words:
            plain = self._tokenizer.encode(word.lstrip(), add_special_tokens=False)
            spaced = self._tokenizer.encode(" " + word.lstrip(), add_special_tokens=False)
            forms = [plain]
            if spaced[-len(plain) :] != plain:
                forms.append(spaced)
            sequences += [self._checked_ids("bad_words", form) for form in forms]
        return sequences


def _check_text(parameter: str, value: object) -> None:
    """Raise RequestError for what cannot cross a process as a string; None is left out."""
    if value is None:
        return
    if not isinstance(value, str):
        raise RequestError(f"{parameter} must be a string, got {value!r}.", parameter=parameter, value=value)
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise RequestError(
            f"{parameter} has no UTF-8 form: {error.reason} at character {error.start}.",
            parameter=parameter,
            value=value,
        ) from None


def _one_each(parameter: str, values: Any, kind: type, count: int) -> list[Any]:
    """Return one value per prompt; a single value counts for all."""
    items = [values] * count if isinstance(values, kind) and not isinstance(values, bool) else values
    if not isinstance(items, Sequence) or not all(
        isinstance(item, kind) and not isinstance(item, bool) for item in items
    ):
        raise RequestError(
            f"{parameter} must be {kind.__name__} or a list with one per prompt, got {values!r}.",
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
