"""Sampling parameters of one request."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping
from dataclasses import InitVar, dataclass, fields
from enum import IntEnum
from typing import Annotated, Any, Literal, Self

from sempre.engine.near_names import near_name
from sempre.engine.parameter_checks import (
    boolean,
    finite,
    integer,
    logit_bias,
    number,
    refusal,
    shown,
    strings,
    token_id_rows,
    token_ids,
    within_float32,
)
from sempre.engine.structured_outputs import StructuredOutputsParams
from sempre.ipc.config import doc
from sempre.ipc.errors import ConfigError

logger = logging.getLogger(__name__)

MAX_N = 16384
# over HTTP only
MAX_STOP_STRINGS = 4
MAX_BAD_WORDS = 128
MAX_LOGPROB_TOKEN_IDS = 128
MIN_TEMPERATURE = 0.01

# Parameters of vLLM that this engine lacks, with the values that have no effect. InitVars of SamplingParams are
# passed on in the order of their declaration, which is the order here.
NEUTRAL_VALUES: dict[str, tuple[object, ...]] = {
    "watermarking": (False,),
    # added tokens are written by the tokenizer's decoder, which adds no such spaces
    "spaces_between_special_tokens": (True, False),
    "extra_args": ({},),
    "skip_reading_prefix_cache": (False,),
    "repetition_detection": (),
    "best_of": (1,),
    "use_beam_search": (False,),
    "length_penalty": (1, 1.0),
    "early_stopping": (False,),
    "logits_processors": ([],),
    "guided_decoding": (),
    "skip_clone": (False, True),
}
_INSTEAD = {
    "guided_decoding": "Use structured_outputs=StructuredOutputsParams(…).",
    "logits_processors": "Use logit_bias, allowed_token_ids or bad_words.",
}


class RequestOutputKind(IntEnum):
    """What the outputs of a streamed request contain."""

    CUMULATIVE = 0
    """Everything so far, each time."""
    DELTA = 1
    """Only what is new since the last output."""
    FINAL_ONLY = 2
    """One output, once the request has finished."""


@dataclass(slots=True)
class SamplingParams:
    """Sampling parameters of one request, with vLLM's names, order, defaults and ranges.

    Values are checked and normalised when the object is made: `stop` becomes a list, `logit_bias` has integer keys and
    values in [-100, 100], `top_k=-1` becomes 0, `seed=-1` becomes None (as in vLLM), a temperature in (0, 0.01) becomes
    0.01, and greedy sampling (temperature 0) sets top_p=1, top_k=0, min_p=0. Attributes may be assigned later: every
    request uses a copy of the values at the time of its call, checked again. Checks that need the model (vocabulary,
    context length, `max_logprobs`) happen then, too.

    `seed` is a 64-bit integer, signed or not: -2 and 2**64 - 2 sample alike, and each is reported as given.
    Parameters of vLLM that this engine lacks are allowed with values that have no effect.

    Raises ConfigError (a ValueError) that names the parameter, TypeError for an unknown keyword.
    """

    n: Annotated[int, doc("completions of the prompt; completion i is sampled with seed + i")] = 1
    presence_penalty: Annotated[float, doc("subtracted from logits of tokens already generated, in [-2, 2]")] = 0.0
    frequency_penalty: Annotated[float, doc("the same, times the count of the token, in [-2, 2]")] = 0.0
    repetition_penalty: Annotated[float, doc("divides or multiplies logits of tokens already seen; 1 is off")] = 1.0
    temperature: Annotated[float, doc("0 is greedy; at least 0")] = 1.0
    watermarking: InitVar[Any] = None
    top_p: Annotated[float, doc("keep the most probable tokens of this total probability, in [0, 1]; 0: the best")] = (
        1.0
    )
    top_k: Annotated[int, doc("keep the k most probable tokens; 0 or -1 keeps all")] = 0
    min_p: Annotated[float, doc("drop tokens less probable than this fraction of the best, in [0, 1]")] = 0.0
    seed: Annotated[
        int | None, doc("seed of the request, independent of the engine's; None derives one from the engine's")
    ] = None
    stop: Annotated[str | list[str] | None, doc("strings that end the output")] = None
    stop_token_ids: Annotated[list[int] | None, doc("token ids that end the output")] = None
    ignore_eos: Annotated[bool, doc("continue after the end-of-sequence token")] = False
    max_tokens: Annotated[int | None, doc("maximum tokens to generate; None is as many as the context holds")] = 16
    min_tokens: Annotated[int, doc("no stop before this many tokens")] = 0
    logprobs: Annotated[int | None, doc("report the k best and the sampled token's log-probability; -1 all")] = None
    prompt_logprobs: Annotated[int | None, doc("the same for every prompt token")] = None
    prompt_logprob_token_ids: Annotated[
        list[list[int]] | None,
        doc("one list per scored prompt token: ids whose log-probabilities to report in its place; -1 is none"),
    ] = None
    prompt_logprob_start: Annotated[
        int | None, doc("prompt tokens before the first scored one, less one; none: 0, which scores the second token")
    ] = None
    logprob_token_ids: Annotated[
        list[int] | None, doc("report the log-probabilities of these ids instead of the k best")
    ] = None
    flat_logprobs: Annotated[bool, doc("give log-probabilities as FlatLogprobs, in a few lists")] = False
    detokenize: Annotated[bool, doc("produce text; without it, token ids only")] = True
    skip_special_tokens: Annotated[bool, doc("leave special tokens out of the text")] = True
    spaces_between_special_tokens: InitVar[Any] = True
    include_stop_str_in_output: Annotated[bool, doc("keep the stop string at the end of the text")] = False
    output_kind: Annotated[RequestOutputKind, doc("what streamed outputs hold")] = RequestOutputKind.CUMULATIVE
    stream_interval: Annotated[int | None, doc("tokens per streamed output, if more than the engine's")] = None
    structured_outputs: Annotated[StructuredOutputsParams | None, doc("the form the output must have")] = None
    logit_bias: Annotated[
        Mapping[int, float] | Mapping[str, float] | None, doc("added to the logits of these token ids, within ±100")
    ] = None
    allowed_token_ids: Annotated[list[int] | None, doc("only these token ids may be sampled")] = None
    extra_args: InitVar[Any] = None
    bad_words: Annotated[list[str] | None, doc("words that may not be generated")] = None
    skip_reading_prefix_cache: InitVar[Any] = None
    thinking_token_budget: Annotated[
        int | None, doc("after this many tokens of reasoning, </think> is forced; -1 is no limit")
    ] = None
    repetition_detection: InitVar[Any] = None
    truncate_prompt_tokens: Annotated[
        int | None, doc("prompt tokens to keep; -1: as many as the context has room for")
    ] = None
    truncation_side: Annotated[
        Literal["left", "right"] | None, doc("where a prompt that is too long is cut; none: left")
    ] = None
    best_of: InitVar[Any] = None
    use_beam_search: InitVar[Any] = None
    length_penalty: InitVar[Any] = None
    early_stopping: InitVar[Any] = None
    logits_processors: InitVar[Any] = None
    guided_decoding: InitVar[Any] = None
    skip_clone: InitVar[Any] = False

    def __new__(cls, *values: Any, **keywords: Any) -> Self:
        for name in keywords:
            if name not in _KEYWORDS:
                near = near_name(name, [field.name for field in fields(cls)])
                hint = f" Did you mean {near!r}?" if near else ""
                raise TypeError(f"SamplingParams has no parameter {name!r}.{hint}")
        return object.__new__(cls)

    def __post_init__(self, *without_effect: object) -> None:
        for (name, neutral), value in zip(NEUTRAL_VALUES.items(), without_effect, strict=True):
            if value is not None:
                _check_neutral(name, neutral, value)
        self._normalise_sampling()
        self._normalise_lengths()
        self._normalise_reports()
        self._normalise_stops()
        self._normalise_token_rules()
        self._check_structured_outputs()
        if self.is_greedy:
            if self.n > 1:
                raise refusal("n", self.n, f"must be 1 when using greedy sampling, got {shown(self.n)}.")
            self.top_p, self.top_k, self.min_p = 1.0, 0, 0.0

    @classmethod
    def from_optional(cls, **keywords: Any) -> Self:
        """Return parameters in which None means the default; `max_tokens=None` has no limit, as in vLLM."""
        return cls(**{name: value for name, value in keywords.items() if value is not None or name == "max_tokens"})

    def clone(self) -> Self:
        """Return a copy that shares no list or mapping with this one, checked and normalised.

        Raises ConfigError for an invalid value assigned later.
        """
        return dataclasses.replace(self)

    @property
    def is_greedy(self) -> bool:
        """Whether the best token is always taken."""
        return self.temperature == 0.0

    @property
    def reports_logprobs(self) -> bool:
        """Whether outputs include log-probabilities."""
        return self.logprobs is not None or bool(self.logprob_token_ids)

    @property
    def stop_strings(self) -> list[str]:
        """`stop` as a list."""
        return [self.stop] if isinstance(self.stop, str) else list(self.stop or [])

    def _normalise_sampling(self) -> None:
        self.n = integer("n", self.n, "must be an int, but is of type {type}.", floats=False)
        if self.n < 1:
            raise refusal("n", self.n, f"must be at least 1, got {shown(self.n)}.")
        if self.n > MAX_N:
            raise refusal("n", self.n, f"must be at most {MAX_N}, got {shown(self.n)}.")
        self.presence_penalty = _penalty("presence_penalty", self.presence_penalty)
        self.frequency_penalty = _penalty("frequency_penalty", self.frequency_penalty)
        repetition = finite("repetition_penalty", self.repetition_penalty)
        if repetition <= 0.0:
            raise refusal("repetition_penalty", repetition, f"must be greater than zero, got {repetition}.")
        self.repetition_penalty = within_float32("repetition_penalty", repetition)
        self.temperature = _temperature(self.temperature)
        for name in ("top_p", "min_p"):
            share = number(name, getattr(self, name))
            if not 0.0 <= share <= 1.0:
                raise refusal(name, share, f"must be in [0, 1], got {share}.")
            setattr(self, name, share)
        top_k = integer("top_k", self.top_k)
        if top_k < -1:
            raise refusal("top_k", top_k, f"must be 0 (disable), or at least 1, got {shown(top_k)}.")
        self.top_k = max(top_k, 0)
        self.seed = _seed(self.seed)

    def _normalise_lengths(self) -> None:
        self.max_tokens = None if self.max_tokens is None else integer("max_tokens", self.max_tokens)
        if self.max_tokens is not None and self.max_tokens < 1:
            raise refusal("max_tokens", self.max_tokens, f"must be at least 1, got {shown(self.max_tokens)}.")
        self.min_tokens = integer("min_tokens", self.min_tokens)
        if self.min_tokens < 0:
            raise refusal(
                "min_tokens", self.min_tokens, f"must be greater than or equal to 0, got {shown(self.min_tokens)}."
            )
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise refusal(
                "min_tokens",
                self.min_tokens,
                f"must be less than or equal to max_tokens={shown(self.max_tokens)}, got {shown(self.min_tokens)}.",
            )
        if self.thinking_token_budget is not None:
            budget = integer("thinking_token_budget", self.thinking_token_budget)
            if budget < -1:
                raise refusal("thinking_token_budget", budget, f"must be non-negative, or -1, got {shown(budget)}.")
            self.thinking_token_budget = None if budget == -1 else budget
        if self.truncate_prompt_tokens is not None:
            most = integer("truncate_prompt_tokens", self.truncate_prompt_tokens)
            if most < -1 or most == 0:
                raise refusal("truncate_prompt_tokens", most, f"must be at least 1, or -1, got {shown(most)}.")
            self.truncate_prompt_tokens = most
        if self.truncation_side not in (None, "left", "right"):
            raise refusal(
                "truncation_side",
                self.truncation_side,
                f"must be 'left' or 'right', got {shown(self.truncation_side)}.",
            )

    def _normalise_reports(self) -> None:
        for name in ("logprobs", "prompt_logprobs"):
            value = getattr(self, name)
            if value is None:
                continue
            # as in vLLM, True asks for one
            value = 1 if value is True else integer(name, value)
            if value < -1:
                raise refusal(name, value, f"must be non-negative or -1, got {shown(value)}.")
            setattr(self, name, value)
        listed = list(dict.fromkeys(token_ids("logprob_token_ids", self.logprob_token_ids or [])))
        if len(listed) > MAX_LOGPROB_TOKEN_IDS:
            raise refusal(
                "logprob_token_ids", listed, f"can hold at most {MAX_LOGPROB_TOKEN_IDS} ids, got {len(listed)}."
            )
        self.logprob_token_ids = listed or None
        self._normalise_candidates()
        boolean("flat_logprobs", self.flat_logprobs)
        if self.stream_interval is not None:
            interval = integer("stream_interval", self.stream_interval)
            if interval < 1:
                raise refusal("stream_interval", interval, f"must be at least 1, got {shown(interval)}.")
            self.stream_interval = interval
        try:
            self.output_kind = RequestOutputKind(self.output_kind)
        except ValueError:
            raise refusal(
                "output_kind", self.output_kind, f"must be a RequestOutputKind, got {shown(self.output_kind)}."
            ) from None

    def _normalise_candidates(self) -> None:
        if self.prompt_logprob_token_ids is not None:
            self.prompt_logprob_token_ids = token_id_rows("prompt_logprob_token_ids", self.prompt_logprob_token_ids)
        if self.prompt_logprob_start is None:
            return
        start = integer("prompt_logprob_start", self.prompt_logprob_start)
        if start < 0:
            raise refusal("prompt_logprob_start", start, f"must be non-negative, got {shown(start)}.")
        if start and self.prompt_logprob_token_ids is None:
            raise refusal("prompt_logprob_start", start, "requires prompt_logprob_token_ids.")
        self.prompt_logprob_start = start if self.prompt_logprob_token_ids is not None else None

    def _normalise_stops(self) -> None:
        for name in ("ignore_eos", "detokenize", "skip_special_tokens", "include_stop_str_in_output"):
            boolean(name, getattr(self, name))
        stop = strings("stop", [self.stop] if isinstance(self.stop, str) else self.stop)
        if "" in stop:
            raise refusal("stop", self.stop, "cannot contain an empty string.")
        if stop and not self.detokenize:
            raise ConfigError(
                "stop strings are only supported when detokenize is True. Set detokenize=True to use stop.",
                parameter="stop",
                value=self.stop,
            )
        self.stop = stop
        self.stop_token_ids = list(dict.fromkeys(token_ids("stop_token_ids", self.stop_token_ids or [])))

    def _normalise_token_rules(self) -> None:
        if self.allowed_token_ids is not None:
            self.allowed_token_ids = token_ids("allowed_token_ids", self.allowed_token_ids)
            if not self.allowed_token_ids:
                raise refusal("allowed_token_ids", [], "is not None and empty!")
        words = list(dict.fromkeys(strings("bad_words", self.bad_words)))
        if "" in words:
            raise refusal("bad_words", self.bad_words, "cannot contain an empty string. Remove it.")
        if len(words) > MAX_BAD_WORDS:
            raise refusal("bad_words", self.bad_words, f"can hold at most {MAX_BAD_WORDS} words.")
        self.bad_words = words
        self.logit_bias = None if self.logit_bias is None else logit_bias(self.logit_bias)

    def _check_structured_outputs(self) -> None:
        value = self.structured_outputs
        if value is None:
            return
        if not isinstance(value, StructuredOutputsParams):
            raise refusal("structured_outputs", value, f"must be StructuredOutputsParams, got {type(value).__name__}.")
        if self.ignore_eos:
            raise refusal("ignore_eos", True, "cannot be used with structured_outputs, whose end is that token.")


_KEYWORDS = frozenset(NEUTRAL_VALUES).union(field.name for field in fields(SamplingParams))


def _check_neutral(name: str, neutral: tuple[object, ...], value: object) -> None:
    if any(type(value) is type(accepted) and value == accepted for accepted in neutral):
        return
    instead = _INSTEAD.get(name, "Leave it out.")
    raise ConfigError(f"{name} is not supported by this engine. {instead}", parameter=name, value=value)


def _penalty(name: str, value: object) -> float:
    penalty = number(name, value)
    if not -2.0 <= penalty <= 2.0:
        raise refusal(name, penalty, f"must be in [-2, 2], got {penalty}.")
    return penalty


def _temperature(value: object) -> float:
    temperature = finite("temperature", value)
    if temperature < 0.0:
        raise refusal("temperature", temperature, f"must be non-negative, got {temperature}.")
    if 0.0 < temperature < MIN_TEMPERATURE:
        logger.warning("temperature %g is too small for float32 and is raised to %g.", temperature, MIN_TEMPERATURE)
        return MIN_TEMPERATURE
    return within_float32("temperature", temperature) if temperature else 0.0


def _seed(value: object) -> int | None:
    if value is None:
        return None
    seed = integer("seed", value)
    if seed == -1:
        return None
    if not -(2**63) <= seed < 2**64:
        raise refusal("seed", seed, f"must be None or in [-2**63, 2**64), got {shown(seed)}.")
    return seed
