"""Error texts for a prompt that does not fit. Clients match the first words, which are those of OpenAI and vLLM."""

from __future__ import annotations


def too_long(num_prompt_tokens: int, max_model_len: int) -> str:
    """A prompt that leaves no room for an output."""
    return (
        f"{_limit(max_model_len)} {_prompt(num_prompt_tokens)} is longer than the maximum model length of "
        f"{max_model_len}. Shorten the prompt or raise max_model_len."
    )


def too_long_for_cache(num_prompt_tokens: int, max_model_len: int, max_kv_tokens: int) -> str:
    """A prompt that fits the model but not the KV cache of `max_kv_tokens` tokens."""
    return (
        f"{_limit(max_model_len)} {_prompt(num_prompt_tokens)} does not fit into the KV cache of {max_kv_tokens} "
        "tokens. Shorten the prompt or raise kv_cache_memory_bytes."
    )


def too_many_characters(num_characters: int, max_model_len: int) -> str:
    """A prompt that is not encoded at all, since no encoding of it could fit."""
    return (
        f"{_limit(max_model_len)} The decoder prompt ({num_characters} characters) is longer than the maximum model "
        f"length of {max_model_len}, however it is encoded. Shorten the prompt or raise max_model_len."
    )


def _limit(max_model_len: int) -> str:
    return f"This model's maximum context length is {max_model_len} tokens."


def _prompt(num_prompt_tokens: int) -> str:
    return f"The decoder prompt (length {num_prompt_tokens}) plus the number of requested output tokens (at least 1)"
