"""Turns sampling parameters into the workers' SamplingSpec: checked against the model, in token ids."""

from __future__ import annotations

import sys
from array import array
from collections.abc import Sequence
from numbers import Integral
from typing import Any

from sempre.engine.frontend.grammars import GrammarBuilder
from sempre.engine.frontend.limits import RequestLimits
from sempre.engine.parameter_checks import shown
from sempre.engine.parsing.reasoning import PromptReasoning
from sempre.engine.sampling_params import SamplingParams
from sempre.engine.structured_outputs import with_defaults
from sempre.engine.text.tokenizer import Tokenizer
from sempre.ipc.errors import RequestError
from sempre.ipc.messages import PromptCandidates, SamplingSpec


class SpecBuilder:
    """Translates parameters for one model."""

    def __init__(self, tokenizer: Tokenizer, limits: RequestLimits) -> None:
        self._tokenizer = tokenizer
        self._limits = limits
        self._grammars = GrammarBuilder(tokenizer)

    def build(self, params: SamplingParams) -> SamplingSpec:
        """Return the part that does not depend on the prompt; `max_tokens` stays 1.

        Raises RequestError naming the parameter.
        """
        self._limits.check_logprobs(params)
        if params.stop_strings and not self._tokenizer.makes_text:
            raise RequestError(
                "stop needs text, which skip_tokenizer_init=True does not have; use stop_token_ids.",
                parameter="stop",
                value=params.stop,
            )
        bias = params.logit_bias or {}
        bias_ids = self.checked_ids("logit_bias", list(bias))
        # without duplicates: every worker keeps them for every sequence
        allowed = None if params.allowed_token_ids is None else list(dict.fromkeys(params.allowed_token_ids))
        listed = params.logprob_token_ids
        # a total probability of 0 keeps only the best token
        top_k, top_p = (params.top_k, params.top_p) if params.top_p else (1, 1.0)
        return SamplingSpec(
            max_tokens=1,
            min_tokens=params.min_tokens,
            temperature=params.temperature,
            top_p=top_p,
            # the size of the vocabulary means all
            top_k=0 if top_k >= self._limits.vocab_size else top_k,
            min_p=params.min_p,
            presence_penalty=params.presence_penalty,
            frequency_penalty=params.frequency_penalty,
            repetition_penalty=params.repetition_penalty,
            logit_bias=dict(zip(bias_ids, bias.values(), strict=True)),
            allowed_token_ids=None if allowed is None else self.checked_ids("allowed_token_ids", allowed),
            bad_words_token_ids=self._bad_words(params.bad_words or []),
            eos_token_ids=[] if params.ignore_eos else self._limits.eos_token_ids,
            stop_token_ids=self.checked_ids("stop_token_ids", params.stop_token_ids or []),
            # listed ids are reported with the sampled token, instead of the best
            logprobs=0 if listed else self._most(params.logprobs),
            prompt_logprobs=self._most(params.prompt_logprobs),
            grammar=self._grammar(params),
            logprob_token_ids=self.checked_ids("logprob_token_ids", listed or []),
            prompt_candidates=self._candidates(params),
        )

    def checked_ids(self, parameter: str, token_ids: Sequence[Any]) -> list[int]:
        """Return token ids as ints. Raises RequestError for one outside the vocabulary."""
        if set(map(type, token_ids)) == {int} and min(token_ids) >= 0 and max(token_ids) < self._limits.vocab_size:
            return list(token_ids)
        checked = []
        for token_id in token_ids:
            if isinstance(token_id, bool) or not isinstance(token_id, Integral):
                raise RequestError(
                    f"{parameter} must contain only ints, got {shown(token_id)}.", parameter=parameter, value=token_id
                )
            number = int(token_id)
            if not 0 <= number < self._limits.vocab_size:
                raise RequestError(
                    f"Token id {shown(token_id)} is out of vocabulary: {parameter} takes ids in "
                    f"[0, {self._limits.vocab_size}).",
                    parameter=parameter,
                    value=token_id,
                )
            checked.append(number)
        return checked

    def with_reasoning(self, spec: SamplingSpec, params: SamplingParams, prompt: PromptReasoning) -> SamplingSpec:
        """Return `spec` adapted to an output that reasons before its answer, after this prompt."""
        return self._grammars.with_reasoning(spec, params, prompt)

    def _candidates(self, params: SamplingParams) -> PromptCandidates | None:
        """The candidates of the prompt, their rows filled up to the longest."""
        rows = params.prompt_logprob_token_ids
        if rows is None:
            return None
        name = "prompt_logprob_token_ids"
        if len(rows) >= self._limits.max_model_len:
            raise RequestError(
                f"{name} has {len(rows)} rows, but a prompt has at most {self._limits.max_model_len - 1} scored rows "
                "(max_model_len - 1).",
                parameter=name,
                value=len(rows),
            )
        width = max(map(len, rows))
        self.checked_ids(name, [token_id for row in rows for token_id in row if token_id != -1])
        packed = array("i", [token_id for row in rows for token_id in (*row, *[-1] * (width - len(row)))])
        if sys.byteorder == "big":
            packed.byteswap()
        return PromptCandidates(start=params.prompt_logprob_start or 0, width=width, token_ids=packed.tobytes())

    def _most(self, count: int | None) -> int | None:
        return None if count is None else min(count, self._limits.vocab_size)

    def check_form(self, params: SamplingParams) -> None:
        """Check the grammar of `params`. Raises RequestError."""
        self._grammar(params)

    def _grammar(self, params: SamplingParams) -> str | None:
        if params.structured_outputs is None:
            return None
        limits = self._limits
        form = with_defaults(params.structured_outputs, limits.structured_outputs)
        max_tokens = min(params.max_tokens or limits.max_model_len, limits.max_model_len)
        return self._grammars.build(form, limits.vocab_size, limits.eos_token_ids, max_tokens)

    def _bad_words(self, words: Sequence[str]) -> list[list[int]]:
        """Return the banned token sequences: each word, and the word after a space.

        Leading white space is dropped, as in vLLM, unless the word has nothing else. The second form is the word in the
        middle of a text; it is left out if it ends with the first form (after a space token), which bans it already.
        """
        sequences = []
        for word in words:
            check_utf8("bad_words", word)
            bare = word.lstrip() or word
            plain = self._tokenizer.encode(bare, add_special_tokens=False)
            if not plain:
                raise RequestError(f"bad_words: {shown(word)} has no tokens.", parameter="bad_words", value=word)
            spaced = self._tokenizer.encode(" " + bare, add_special_tokens=False)
            forms = [plain]
            if spaced[-len(plain) :] != plain:
                forms.append(spaced)
            sequences += [self.checked_ids("bad_words", form) for form in forms]
        return sequences


def check_utf8(parameter: str, value: str) -> None:
    """Raise RequestError for text without a UTF-8 form, which neither tokenizer nor wire accepts."""
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise RequestError(
            f"{parameter} has no UTF-8 form: {error.reason} at character {error.start}.",
            parameter=parameter,
            value=value,
        ) from None
