"""Limits of a request, and how a prompt that exceeds them is cut or refused."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from sempre.engine.parameter_checks import shown
from sempre.engine.pooling import PoolingParams
from sempre.engine.sampling_params import SamplingParams
from sempre.ipc.config import LogprobsMode
from sempre.ipc.errors import RequestError, too_long, too_long_for_cache
from sempre.ipc.messages import PoolingModel, PromptCandidates


@dataclass(frozen=True, slots=True)
class RequestLimits:
    """Limits of a request."""

    engine_seed: int
    vocab_size: int
    max_model_len: int
    max_kv_tokens: int
    """Tokens that the KV cache of one replica holds."""
    max_logprobs: int
    """Maximum log-probabilities per token; -1 is the whole vocabulary."""
    eos_token_ids: list[int]
    structured_outputs: Mapping[str, Any] = field(default_factory=dict)
    """Defaults for structured outputs."""
    pooling: PoolingModel | None = None
    """None: the model generates."""
    logprobs_mode: LogprobsMode = "raw_logprobs"

    def max_tokens(self, params: SamplingParams, num_prompt_tokens: int) -> int:
        """Return how many tokens may be generated: the requested number, limited by the context.

        Raises RequestError for an empty prompt or one that leaves no room.
        """
        self.check_length(num_prompt_tokens, num_output_tokens=1)
        room = self.max_model_len - num_prompt_tokens
        if params.min_tokens > room:
            raise RequestError(
                f"min_tokens must be less than or equal to max_tokens={room}, got {shown(params.min_tokens)}: the "
                f"prompt (length {num_prompt_tokens}) leaves no more of the maximum model length of "
                f"{self.max_model_len}.",
                parameter="min_tokens",
                value=params.min_tokens,
            )
        return room if params.max_tokens is None else min(params.max_tokens, room)

    def check_length(self, num_prompt_tokens: int, num_output_tokens: int) -> None:
        """Raise RequestError for an empty prompt, or one that leaves no room for this many tokens."""
        if not num_prompt_tokens:
            raise RequestError("The decoder prompt cannot be empty.", parameter="prompt", value=[])
        length = num_prompt_tokens + num_output_tokens
        if length > self.max_model_len:
            text = too_long(num_prompt_tokens, self.max_model_len, num_output_tokens)
        elif length > self.max_kv_tokens:
            text = too_long_for_cache(num_prompt_tokens, self.max_model_len, self.max_kv_tokens, num_output_tokens)
        else:
            return
        raise RequestError(text, parameter="prompt", value=num_prompt_tokens)

    def max_prompt_tokens(self, params: SamplingParams | PoolingParams) -> int | None:
        """Return the length to which a longer prompt is cut; None for no cut.

        `truncate_prompt_tokens=-1` leaves room for `max_tokens`, at least one. Raises RequestError for a length beyond
        the model's.
        """
        most = params.truncate_prompt_tokens
        if most is None:
            return None
        if most > self.max_model_len:
            raise RequestError(
                f"truncate_prompt_tokens value ({most}) is greater than max_model_len ({self.max_model_len}). "
                "Please request a smaller truncation size.",
                parameter="truncate_prompt_tokens",
                value=most,
            )
        if most != -1:
            return most
        if isinstance(params, PoolingParams):
            return min(self.max_model_len, self.max_kv_tokens)
        return max(1, min(self.max_model_len - (params.max_tokens or 1), self.max_kv_tokens - 1))

    def check_logprobs(self, params: SamplingParams) -> None:
        """Raise RequestError for more log-probabilities per token than the engine reports."""
        limit = self.max_logprobs
        if limit == -1:
            return
        for name, kind in (("logprobs", "sample"), ("prompt_logprobs", "prompt")):
            asked = getattr(params, name)
            if asked is None:
                continue
            count = self.vocab_size if asked == -1 else asked
            if count > limit:
                raise RequestError(
                    f"Requested {kind} logprobs of {count}, which is greater than max allowed: {limit}. "
                    "Raise max_logprobs of the engine.",
                    parameter=name,
                    value=asked,
                )
        widest = max(map(len, params.prompt_logprob_token_ids or ()), default=0)
        if widest > limit:
            raise RequestError(
                f"Requested {widest} token ids per row in prompt_logprob_token_ids, which is greater than max allowed: "
                f"{limit}. Raise max_logprobs of the engine.",
                parameter="prompt_logprob_token_ids",
                value=widest,
            )


def check_candidates(given: PromptCandidates | None, num_prompt_tokens: int) -> None:
    """Raise RequestError unless there is a row of candidates for each prompt token that is to be scored."""
    if given is None:
        return
    expected = max(num_prompt_tokens - 1 - given.start, 0)
    if given.num_rows != expected:
        raise RequestError(
            f"prompt_logprob_token_ids has {given.num_rows} rows, but a prompt of {num_prompt_tokens} tokens has "
            f"{expected} scored rows (its length - 1 - prompt_logprob_start={given.start}).",
            parameter="prompt_logprob_token_ids",
            value=given.num_rows,
        )


def cut(token_ids: list[int], without_special: list[int], most: int, side: str | None) -> list[int]:
    """Return at most `most` of a prompt's tokens, cut on `side` (None: left).

    `without_special` are the tokens of the text alone: the tokenizer's special tokens around them are kept.
    """
    if len(token_ids) <= most:
        return token_ids
    num_special = len(token_ids) - len(without_special)
    leading = next((i for i in range(num_special + 1) if token_ids[i : i + len(without_special)] == without_special), 0)
    trailing = num_special - leading
    room = most - num_special
    if num_special < 0 or room < 0 or token_ids[leading : len(token_ids) - trailing] != without_special:
        return token_ids[:most] if side == "right" else token_ids[-most:]
    kept = without_special[:room] if side == "right" else without_special[len(without_special) - room :]
    return [*token_ids[:leading], *kept, *token_ids[len(token_ids) - trailing :]]
