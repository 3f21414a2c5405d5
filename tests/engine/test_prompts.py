"""The forms a prompt may have."""

from __future__ import annotations

from typing import Any

import pytest

from sempre.engine.frontend.prompts import ParsedPrompt, list_prompts, parse_prompt
from sempre.ipc.errors import RequestError


@pytest.mark.parametrize(
    ("prompt", "parsed"),
    [
        ("text", ParsedPrompt("text", None, None)),
        ({"prompt": "text", "cache_salt": "s"}, ParsedPrompt("text", None, "s")),
        ({"prompt_token_ids": [1, 2]}, ParsedPrompt(None, [1, 2], None)),
        ({"prompt_token_ids": [1, 2], "prompt": "text"}, ParsedPrompt("text", [1, 2], None)),
        ([1, 2], ParsedPrompt(None, [1, 2], None)),
    ],
)
def test_parse(prompt: Any, parsed: ParsedPrompt) -> None:
    assert parse_prompt(prompt) == parsed


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        (
            5,
            "a prompt must be a string, a list of token ids, {'prompt': …} or {'prompt_token_ids': …}, got int.",
        ),
        ({}, "a prompt needs prompt or prompt_token_ids."),
        (
            {"prompt_embeds": 1},
            "a prompt has no key 'prompt_embeds'; the keys are prompt, prompt_token_ids, cache_salt.",
        ),
        ({"prompt": 5}, "prompt must be a string, got 5."),
        ({"prompt_token_ids": "abc"}, "prompt_token_ids must be a list of ints, got 'abc'."),
        ({"prompt": "a", "cache_salt": ""}, "cache_salt must be a non-empty string, got ''."),
        ({"prompt": "a", "cache_salt": 3}, "cache_salt must be a non-empty string, got 3."),
    ],
)
def test_refused(prompt: Any, message: str) -> None:
    with pytest.raises(RequestError) as caught:
        parse_prompt(prompt)
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("prompts", "expected"),
    [
        ("a", (["a"], False)),
        ({"prompt": "a"}, ([{"prompt": "a"}], False)),
        ([1, 2], ([[1, 2]], False)),
        (["a", "b"], (["a", "b"], True)),
        ([[1], [2, 3]], ([[1], [2, 3]], True)),
        (("a", [1], {"prompt": "b"}), (["a", [1], {"prompt": "b"}], True)),
        ([], ([], True)),
        ([[]], ([[]], True)),
    ],
)
def test_list_prompts(prompts: Any, expected: tuple[list[Any], bool]) -> None:
    assert list_prompts(prompts) == expected


def test_list_prompts_refused() -> None:
    with pytest.raises(RequestError, match="prompts must be a prompt or a list of prompts, got NoneType"):
        list_prompts(None)


def test_bytes_are_no_list_of_prompts() -> None:
    with pytest.raises(RequestError, match="prompts must be a prompt or a list of prompts, got bytes"):
        list_prompts(b"text")
