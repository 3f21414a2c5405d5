"""The number of tokens of reasoning does not depend on how an output is cut into pieces."""

from __future__ import annotations

import pytest

from sempre.engine.parsing.reasoning import ReasoningCounter, ReasoningSplitter
from sempre.engine.text.token_stream import TokenStream
from sempre.engine.text.tokenizer import Tokenizer


@pytest.mark.parametrize(
    ("text", "inside", "reasoning"),
    [
        ("ab</think>c</think>", True, "ab</think>"),
        ("ab", True, "ab"),
        ("<think>ab</think>c", False, "<think>ab</think>"),
        ("\n<think>ab</think>c", True, "\n<think>ab</think>"),
        ("<think>ab", False, "<think>ab"),
        ("ab</think>c", False, ""),
        ("<thin", False, ""),
        ("", True, ""),
    ],
)
def test_tokens_are_counted_to_the_end_of_the_last_tag(
    byte_level: Tokenizer, text: str, inside: bool, reasoning: str
) -> None:
    ids = byte_level.encode(text, add_special_tokens=False)
    expected = len(byte_level.encode(reasoning, add_special_tokens=False))
    for size in (1, 2, 3, max(len(ids), 1)):
        counter = ReasoningCounter(ReasoningSplitter(inside=inside), TokenStream(byte_level))
        for start in range(0, len(ids), size):
            counter.push(ids[start : start + size])
        assert counter.count == expected, size
