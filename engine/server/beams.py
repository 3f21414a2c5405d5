"""Beam search over HTTP: `n` beams per prompt, told once all rounds are done."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from sempre.engine.async_llm import AsyncLLM
from sempre.engine.frontend.beam_search import BeamSearchParams
from sempre.engine.frontend.prompts import PromptType, TokensPrompt
from sempre.engine.frontend.request_builder import PreparedRequest
from sempre.engine.output_stream import OutputStream
from sempre.engine.outputs import RequestOutput
from sempre.engine.sampling_params import SamplingParams
from sempre.engine.server.errors import BadRequest
from sempre.engine.server.requests import GenerationRequest
from sempre.ipc.error_info import again
from sempre.ipc.messages import TenantSpec

# sampling parameters that a search has a use for, or that choose nothing
_ALLOWED = frozenset({
    "n", "seed", "temperature", "max_tokens", "ignore_eos", "include_stop_str_in_output", "logprobs",
    "skip_special_tokens", "truncate_prompt_tokens", "truncation_side", "output_kind", "detokenize",
})  # fmt: skip


def beam_parameters(request: GenerationRequest, params: SamplingParams) -> BeamSearchParams | None:
    """The search that a request asks for, if any.

    Raises BadRequest for a field that a search does not honour, ConfigError for a value out of range.
    """
    if not request.use_beam_search:
        return None
    defaults = SamplingParams()
    for field in dataclasses.fields(SamplingParams):
        value = getattr(params, field.name)
        is_empty = isinstance(value, dict | list) and not value
        if field.name not in _ALLOWED and not is_empty and value != getattr(defaults, field.name):
            raise BadRequest(f"{field.name} cannot be used with use_beam_search.", param=field.name)
    return BeamSearchParams(
        beam_width=request.n,
        max_tokens=2**31 if params.max_tokens is None else params.max_tokens,
        ignore_eos=params.ignore_eos,
        temperature=params.temperature,
        length_penalty=request.length_penalty,
        include_stop_str_in_output=params.include_stop_str_in_output,
    )


class BeamStream:
    """The search of one HTTP request, in the place of an OutputStream: one output per prompt, at the end."""

    def __init__(
        self,
        engine: AsyncLLM,
        prompts: Sequence[PromptType],
        search: BeamSearchParams,
        given: SamplingParams,
        priority: int,
        tenant: TenantSpec | None = None,
    ) -> None:
        """Raises RequestError for a refused prompt, EngineDeadError."""
        self._engine = engine
        self._search = engine.beam_searches(prompts, search, given)
        self._given = given
        self._priority = priority
        self._tenant = tenant
        self._round: OutputStream | None = None
        self._failure: BaseException | None = None
        self._is_told = False

    @property
    def requests(self) -> list[PreparedRequest]:
        """The prompts, in order."""
        return [search.request for search in self._search.searches]

    @property
    def num_sequences(self) -> int:
        """Beams of all prompts."""
        return sum(search.params.beam_width for search in self._search.searches)

    async def next(self) -> list[RequestOutput]:
        """Wait for the whole search; then an empty list. Raises RequestError, EngineDeadError."""
        if self._is_told:
            return []
        await self._search.run(self._start)
        self._engine.record_beams(self._search)
        self._is_told = True
        tokenizer, fingerprint = self._engine.get_tokenizer(), self._engine.fingerprint
        return [each.request_output(tokenizer, self._given, fingerprint) for each in self._search.searches]

    def close(self) -> None:
        """Abort the running round; can be called twice."""
        if self._round is not None:
            self._round.close()

    def abort(self, error: BaseException) -> None:
        """Close, and raise `error` in the reader at once."""
        self._failure = error
        if self._round is not None:
            self._round.abort(error)

    def _start(self, prompts: Sequence[TokensPrompt], params: SamplingParams) -> OutputStream:
        if self._failure is not None:
            raise again(self._failure)
        self._round = self._engine.stream(prompts, params, priority=self._priority, record=False, tenant=self._tenant)
        return self._round
