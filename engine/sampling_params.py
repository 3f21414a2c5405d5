"""What a user asks of one request, validated once when it is made."""

from __future__ import annotations

import difflib
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from enum import IntEnum
from numbers import Integral, Real
from typing import Annotated, Any

from msgspec import Meta

from sempre.engine.structured_outputs import StructuredOutputsParams
from sempre.ipc.errors import ConfigError

logger = logging.getLogger(__name__)

MAX_N = 16384
MAX_STOP_STRINGS = 4
MAX_BAD_WORDS = 128
MIN_TEMPERATURE = 0.01
MAX_LOGIT_BIAS = 100.0

# Parameters of vLLM that have no meaning here yet: a user who brings one is told so.
UNSUPPORTED_PARAMETERS = frozenset(
    {
        "best_of",
        "early_stopping",
        "extra_args",
        "flat_logprobs",
        "guided_decoding",
        "length_penalty",
        "logits_processors",
        "logprob_token_ids",
        "prompt_logprob_start",
        "prompt_logprob_token_ids",
        "repetition_detection",
        "skip_reading_prefix_cache",
        "spaces_between_special_tokens",
        "stream_interval",
        "truncate_prompt_tokens",
        "use_beam_search",
        "watermarking",
    }
)
_INSTEAD = {
    "guided_decoding": "Use structured_outputs=StructuredOutputsParams(…).",
    "logits_processors": "Use logit_bias, allowed_token_ids or bad_words.",
}


class RequestOutputKind(IntEnum):
    """What the outputs of a streamed request hold."""

    CUMULATIVE = 0
    """Everything so far, each time."""
    DELTA = 1
    """Only what is new since the last output."""
    FINAL_ONLY = 2
    """One output, when the request has finished."""


def _doc(text: str) -> Meta:
    return Meta(description=text)


@dataclass(frozen=True, kw_only=True, slots=True)
class SamplingParams:
    """Sampling parameters of one request; names, defaults and ranges are those of vLLM.

    Values are checked and normalised here: `stop` becomes a list, `logit_bias` has integer keys and values in
    [-100, 100], `top_k=-1` becomes 0, `seed=-1` becomes None, a temperature in (0, 0.01) becomes 0.01, and greedy
    sampling (temperature 0) sets top_p=1, top_k=0, min_p=0. What depends on the model (vocabulary, context length,
    `max_logprobs`) is checked when the request is sent. `dataclasses.replace` makes a changed copy.

    Raises ConfigError (a ValueError) that names the parameter, TypeError for an unknown keyword.
    """

    n: Annotated[int, _doc("completions of the prompt; completion i is sampled with seed + i")] = 1
    presence_penalty: Annotated[float, _doc("subtracted from logits of tokens already generated, in [-2, 2]")] = 0.0
    frequency_penalty: Annotated[float, _doc("the same, times the count of the token, in [-2, 2]")] = 0.0
    repetition_penalty: Annotated[float, _doc("divides or multiplies logits of tokens already seen; 1 is off")] = 1.0
    temperature: Annotated[float, _doc("0 is greedy; in [0, 2]")] = 1.0
    top_p: Annotated[float, _doc("keep the most probable tokens of this total probability, in (0, 1]")] = 1.0
    top_k: Annotated[int, _doc("keep the k most probable tokens; 0 or -1 keeps all")] = 0
    min_p: Annotated[float, _doc("drop tokens less probable than this share of the best, in [0, 1]")] = 0.0
    seed: Annotated[int | None, _doc("None derives one from the engine's seed; the one in use is reported")] = None
    stop: Annotated[str | list[str] | None, _doc("strings that end the output; at most 4")] = None
    stop_token_ids: Annotated[list[int] | None, _doc("token ids that end the output")] = None
    ignore_eos: Annotated[bool, _doc("go on after the end-of-sequence token")] = False
    max_tokens: Annotated[int | None, _doc("most tokens to generate; None is as many as the context holds")] = 16
    min_tokens: Annotated[int, _doc("no stop before this many tokens")] = 0
    logprobs: Annotated[int | None, _doc("report the k best and the sampled token's log-probability; -1 all")] = None
    prompt_logprobs: Annotated[int | None, _doc("the same for every prompt token")] = None
    detokenize: Annotated[bool, _doc("produce text; without it, token ids only")] = True
    skip_special_tokens: Annotated[bool, _doc("leave special tokens out of the text")] = True
    include_stop_str_in_output: Annotated[bool, _doc("keep the stop string at the end of the text")] = False
    output_kind: Annotated[RequestOutputKind, _doc("what streamed outputs hold")] = RequestOutputKind.CUMULATIVE
    logit_bias: Annotated[
        Mapping[int, float] | Mapping[str, float] | None, _doc("added to the logits of these token ids, within ±100")
    ] = None
    allowed_token_ids: Annotated[list[int] | None, _doc("only these token ids may be sampled")] = None
    bad_words: Annotated[list[str] | None, _doc("words that may not be generated")] = None
    structured_outputs: Annotated[StructuredOutputsParams | None, _doc("the form the output must have")] = None
    thinking_token_budget: Annotated[int | None, _doc("after this many tokens of reasoning, </think> is forced")] = None

    def __new__(cls, **keywords: Any) -> SamplingParams:
        known = [field.name for field in fields(cls)]
        for name in keywords:
            if name in UNSUPPORTED_PARAMETERS:
                instead = _INSTEAD.get(name, "Leave it out.")
                raise ConfigError(
                    f"{name} is not supported by this engine. {instead}", parameter=name, value=keywords[name]
                )
            if name not in known:
                near = difflib.get_close_matches(name, known, n=1)
                hint = f" Did you mean {near[0]!r}?" if near else ""
                raise TypeError(f"SamplingParams has no parameter {name!r}.{hint}")
        return object.__new__(cls)

    def __post_init__(self) -> None:
        self._normalise_sampling()
        self._normalise_lengths()
        self._normalise_stops()
        self._normalise_token_rules()
        self._check_structured_outputs()
        if self.is_greedy:
            if self.n > 1:
                raise _refusal("n", self.n, f"must be 1 when using greedy sampling, got {self.n}.")
            self._set(top_p=1.0, top_k=0, min_p=0.0)

    @property
    def is_greedy(self) -> bool:
        """Whether the best token is always taken."""
        return self.temperature == 0.0

    @property
    def stop_strings(self) -> list[str]:
        """`stop` as the list it was normalised to."""
        return list(self.stop or [])

    def _set(self, **values: object) -> None:
        for name, value in values.items():
            object.__setattr__(self, name, value)

    def _normalise_sampling(self) -> None:
        n = _integer("n", self.n, "must be an int, but is of type {type}.")
        if n < 1:
            raise _refusal("n", n, f"must be at least 1, got {n}.")
        if n > MAX_N:
            raise _refusal("n", n, f"must be at most {MAX_N}, got {n}.")
        presence, frequency = (self._penalty(name) for name in ("presence_penalty", "frequency_penalty"))
        repetition = _finite("repetition_penalty", self.repetition_penalty)
        if repetition <= 0.0:
            raise _refusal("repetition_penalty", repetition, f"must be greater than zero, got {repetition}.")
        top_p, min_p = _number("top_p", self.top_p), _number("min_p", self.min_p)
        if not 0.0 < top_p <= 1.0:
            raise _refusal("top_p", top_p, f"must be in (0, 1], got {top_p}.")
        if not 0.0 <= min_p <= 1.0:
            raise _refusal("min_p", min_p, f"must be in [0, 1], got {min_p}.")
        top_k = _integer("top_k", self.top_k)
        if top_k < -1:
            raise _refusal("top_k", top_k, f"must be 0 (disable), or at least 1, got {top_k}.")
        self._set(n=n, presence_penalty=presence, frequency_penalty=frequency, repetition_penalty=repetition)
        self._set(temperature=_temperature(self.temperature), top_p=top_p, top_k=max(top_k, 0), min_p=min_p)
        self._set(seed=_seed(self.seed))

    def _penalty(self, name: str) -> float:
        value = _number(name, getattr(self, name))
        if not -2.0 <= value <= 2.0:
            raise _refusal(name, value, f"must be in [-2, 2], got {value}.")
        return value

    def _normalise_lengths(self) -> None:
        max_tokens = None if self.max_tokens is None else _integer("max_tokens", self.max_tokens)
        if max_tokens is not None and max_tokens < 1:
            raise _refusal("max_tokens", max_tokens, f"must be at least 1, got {max_tokens}.")
        min_tokens = _integer("min_tokens", self.min_tokens)
        if min_tokens < 0:
            raise _refusal("min_tokens", min_tokens, f"must be greater than or equal to 0, got {min_tokens}.")
        if max_tokens is not None and min_tokens > max_tokens:
            raise _refusal(
                "min_tokens",
                min_tokens,
                f"must be less than or equal to max_tokens={max_tokens}, got {min_tokens}.",
            )
        budget = self.thinking_token_budget
        if budget is not None:
            budget = _integer("thinking_token_budget", budget)
            if budget < 0:
                raise _refusal("thinking_token_budget", budget, f"must be non-negative, got {budget}.")
            self._set(thinking_token_budget=budget)
        self._set(max_tokens=max_tokens, min_tokens=min_tokens)
        for name in ("logprobs", "prompt_logprobs"):
            value = getattr(self, name)
            if value is None:
                continue
            value = _integer(name, value)
            if value < -1:
                raise _refusal(name, value, f"must be non-negative or -1, got {value}.")
            self._set(**{name: value})

    def _normalise_stops(self) -> None:
        for name in ("ignore_eos", "detokenize", "skip_special_tokens", "include_stop_str_in_output"):
            value = getattr(self, name)
            if not isinstance(value, bool):
                raise _refusal(name, value, f"must be True or False, got {value!r}.")
        stop = _strings("stop", [self.stop] if isinstance(self.stop, str) else self.stop)
        if "" in stop:
            raise _refusal("stop", self.stop, "cannot contain an empty string.")
        if len(stop) > MAX_STOP_STRINGS:
            raise _refusal("stop", self.stop, f"can hold at most {MAX_STOP_STRINGS} strings, got {len(stop)}.")
        if stop and not self.detokenize:
            raise ConfigError(
                "stop strings are only supported when detokenize is True. Set detokenize=True to use stop.",
                parameter="stop",
                value=self.stop,
            )
        stop_token_ids = _token_ids("stop_token_ids", self.stop_token_ids or [])
        try:
            output_kind = RequestOutputKind(self.output_kind)
        except ValueError:
            raise _refusal(
                "output_kind", self.output_kind, f"must be a RequestOutputKind, got {self.output_kind!r}."
            ) from None
        self._set(stop=stop, stop_token_ids=stop_token_ids, output_kind=output_kind)

    def _normalise_token_rules(self) -> None:
        allowed = self.allowed_token_ids
        if allowed is not None:
            allowed = _token_ids("allowed_token_ids", allowed)
            if not allowed:
                raise _refusal("allowed_token_ids", allowed, "is not None and empty!")
        bad_words = _strings("bad_words", self.bad_words)
        # A word of spaces only would be empty once its leading spaces are removed for tokenisation.
        if any(not word.strip() for word in bad_words):
            raise _refusal("bad_words", self.bad_words, "cannot contain an empty string. Remove it.")
        if len(bad_words) > MAX_BAD_WORDS:
            raise _refusal("bad_words", self.bad_words, f"can hold at most {MAX_BAD_WORDS} words.")
        logit_bias = None if self.logit_bias is None else _logit_bias(self.logit_bias)
        self._set(allowed_token_ids=allowed, bad_words=bad_words, logit_bias=logit_bias)

    def _check_structured_outputs(self) -> None:
        value = self.structured_outputs
        if value is None:
            return
        if not isinstance(value, StructuredOutputsParams):
            raise _refusal("structured_outputs", value, f"must be StructuredOutputsParams, got {type(value).__name__}.")
        if self.ignore_eos:
            raise _refusal("ignore_eos", True, "cannot be used with structured_outputs, whose end is that token.")


def _refusal(name: str, value: object, rest: str) -> ConfigError:
    return ConfigError(f"{name} {rest}", parameter=name, value=value)


def _integer(name: str, value: object, rest: str = "must be an int, got {value!r}.") -> int:
    # numpy's integers are welcome, and made Python's; a bool is an error in the caller's code.
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise _refusal(name, value, rest.format(value=value, type=type(value)))
    return int(value)


def _number(name: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, Real):
        raise _refusal(name, value, f"must be a number, got {value!r}.")
    try:
        return float(value)
    except OverflowError:
        raise _refusal(name, value, "is too large for a float.") from None


def _finite(name: str, value: object) -> float:
    number = _number(name, value)
    if not math.isfinite(number):
        raise _refusal(name, number, f"must be a finite number, got {number}.")
    return number


def _temperature(value: object) -> float:
    temperature = _finite("temperature", value)
    if temperature < 0.0:
        raise _refusal("temperature", temperature, f"must be non-negative, got {temperature}.")
    if temperature > 2.0:
        raise _refusal("temperature", temperature, f"must be in [0, 2], got {temperature}.")
    if 0.0 < temperature < MIN_TEMPERATURE:
        logger.warning("temperature %g is too small for float32 and is raised to %g.", temperature, MIN_TEMPERATURE)
        return MIN_TEMPERATURE
    return temperature


def _seed(value: object) -> int | None:
    if value is None:
        return None
    seed = _integer("seed", value)
    if seed == -1:
        return None
    if not 0 <= seed < 2**64:
        raise _refusal("seed", seed, f"must be None or in [0, 2**64), got {seed}.")
    return seed


def _strings(name: str, value: object) -> list[str]:
    if value is None:
        return []
    if isinstance(value, str) or not isinstance(value, Sequence) or not all(isinstance(item, str) for item in value):
        raise _refusal(name, value, f"must contain only strings, got {value!r}.")
    return list(value)


def _token_ids(name: str, value: object) -> list[int]:
    valid = isinstance(value, Sequence) and all(
        isinstance(item, Integral) and not isinstance(item, bool) for item in value
    )
    if not valid:
        raise _refusal(name, value, f"must contain only integers, got {value!r}.")
    assert isinstance(value, Sequence)
    return [int(item) for item in value]


def _logit_bias(value: object) -> dict[int, float]:
    if not isinstance(value, Mapping):
        raise _refusal("logit_bias", value, f"must be a dict of token id to number, got {value!r}.")
    bias: dict[int, float] = {}
    for key, amount in value.items():
        try:
            token_id = int(key) if isinstance(key, str) else _integer("logit_bias", key)
        except ValueError:
            raise _refusal("logit_bias", value, f"keys must be token ids, got {key!r}.") from None
        if token_id in bias:
            raise _refusal("logit_bias", value, f"names token id {token_id} twice.")
        number = _number("logit_bias", amount)
        if math.isnan(number):
            raise _refusal("logit_bias", value, f"of token id {token_id} must be a number, got {number}.")
        bias[token_id] = min(MAX_LOGIT_BIAS, max(-MAX_LOGIT_BIAS, number))
    return bias
