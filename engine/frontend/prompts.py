"""The forms in which a prompt may be given."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, NotRequired, TypedDict

from sempre.engine.parameter_checks import shown
from sempre.ipc.errors import RequestError


class TextPrompt(TypedDict):
    """A prompt as text. Prompts with different `cache_salt` share no prefix cache."""

    prompt: str
    cache_salt: NotRequired[str]


class TokensPrompt(TypedDict):
    """A prompt as token ids, used as given; `prompt` is its text, only shown in the output."""

    prompt_token_ids: Sequence[int]
    prompt: NotRequired[str]
    cache_salt: NotRequired[str]


PromptType = str | TextPrompt | TokensPrompt | Sequence[int]
"""One prompt."""

_KEYS = ("prompt", "prompt_token_ids", "cache_salt")


class ParsedPrompt(NamedTuple):
    """A parsed prompt; `text` is encoded if there are no `token_ids`."""

    text: str | None
    token_ids: Sequence[int] | None
    cache_salt: str | None


def parse_prompt(prompt: object) -> ParsedPrompt:
    """Parse one prompt. Raises RequestError for any other form."""
    if isinstance(prompt, str):
        return ParsedPrompt(prompt, None, None)
    if isinstance(prompt, Mapping):
        return _parse_mapping(prompt)
    if is_token_ids(prompt):
        return ParsedPrompt(None, prompt, None)  # type: ignore[arg-type]
    raise RequestError(
        "a prompt must be a string, a list of token ids, {'prompt': …} or {'prompt_token_ids': …}, "
        f"got {type(prompt).__name__}.",
        parameter="prompt",
        value=prompt,
    )


def list_prompts(prompts: object) -> tuple[list[Any], bool]:
    """Return the prompts as a list, and whether a list was given rather than one prompt."""
    if isinstance(prompts, str | Mapping) or (is_token_ids(prompts) and len(prompts) > 0):  # type: ignore[arg-type]
        return [prompts], False
    if isinstance(prompts, Sequence) and not isinstance(prompts, bytes | bytearray):
        return list(prompts), True
    raise RequestError(
        f"prompts must be a prompt or a list of prompts, got {type(prompts).__name__}.",
        parameter="prompts",
        value=prompts,
    )


def is_token_ids(value: object) -> bool:
    """Whether `value` is a sequence without strings, mappings or sequences; its items are checked later."""
    if type(value) is list and set(map(type, value)) == {int}:
        return True  # fast path for the common case
    return (
        isinstance(value, Sequence)
        and not isinstance(value, str | bytes)
        and not any(isinstance(item, str | Mapping | Sequence) for item in value)
    )


def _parse_mapping(prompt: Mapping[Any, Any]) -> ParsedPrompt:
    for key in prompt:
        if key not in _KEYS and prompt[key] is not None:
            raise RequestError(
                f"a prompt has no key {shown(key)}; the keys are {', '.join(_KEYS)}.", parameter="prompt", value=prompt
            )
    text, token_ids, salt = (prompt.get(key) for key in _KEYS)
    if text is None and token_ids is None:
        raise RequestError("a prompt needs prompt or prompt_token_ids.", parameter="prompt", value=prompt)
    if text is not None and not isinstance(text, str):
        raise RequestError(f"prompt must be a string, got {shown(text)}.", parameter="prompt", value=text)
    if token_ids is not None and not is_token_ids(token_ids):
        raise RequestError(
            f"prompt_token_ids must be a list of ints, got {shown(token_ids)}.",
            parameter="prompt_token_ids",
            value=token_ids,
        )
    if salt is not None and (not isinstance(salt, str) or not salt):
        raise RequestError(
            f"cache_salt must be a non-empty string, got {shown(salt)}.", parameter="cache_salt", value=salt
        )
    return ParsedPrompt(text, token_ids, salt)
