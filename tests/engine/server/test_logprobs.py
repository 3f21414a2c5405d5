"""Log-probabilities as JSON holds them: finite, in order, with offsets into the choice's text."""

from __future__ import annotations

import math

from small_tokenizers import byte_fallback_backend

from sempre.engine.outputs import Logprob
from sempre.engine.server.logprobs import (
    FLOOR,
    CompletionLogprobsWriter,
    IdNames,
    TokenNames,
    chat_logprobs,
    joined,
    prompt_logprobs,
)
from sempre.engine.text.token_stream import TokenStream
from sempre.engine.text.tokenizer import Tokenizer

ROWS = [
    {5: Logprob(-3.0, 3, "ab"), 6: Logprob(-1.0, 1, "c"), 7: Logprob(-2.0, 2, "d")},
    {6: Logprob(-1.0, 1, "c"), 8: Logprob(-math.inf, 2, "c")},
]


def writer(tokenizer: Tokenizer, *, as_token_ids: bool = False, offset: int = 0) -> CompletionLogprobsWriter:
    stream = TokenStream(tokenizer, tokenizer.special_texts)
    return CompletionLogprobsWriter(IdNames() if as_token_ids else TokenNames(tokenizer), stream, offset)


def row(*token_ids: int) -> dict[int, Logprob]:
    """The first one sampled, the others the most probable ones."""
    return {token_id: Logprob(-float(rank), rank, "?") for rank, token_id in enumerate(token_ids)}


def test_offsets_go_on_from_part_to_part(byte_level: Tokenizer) -> None:
    fox, dog = byte_level.encode("f")[0], byte_level.encode("d")[0]
    end = byte_level.eos_token_id or 0
    found = writer(byte_level, offset=4)
    first, second = found.write([fox], [None]), found.write([end, dog, fox], [row(end), row(dog), row(fox)])
    whole = joined(first, second)
    assert whole.tokens == ["f", "</s>", "d", "f"]
    assert whole.text_offset == [4, 5, 5, 6]  # a hidden token is no part of the text
    assert whole.token_logprobs == [None, 0.0, 0.0, 0.0]
    assert whole.top_logprobs == [None, {"</s>": 0.0}, {"d": 0.0}, {"f": 0.0}]


def test_parts_of_characters_are_named_by_their_bytes(byte_level: Tokenizer) -> None:
    parts = [byte_level.encode(text)[0] for text in ("ה", "ж", "\\")]  # the first bytes of two letters
    found = writer(byte_level).write(parts[:1], [row(*parts)])
    assert found.tokens == ["bytes:\\xd7"]
    assert found.top_logprobs == [{"bytes:\\xd7": 0.0, "bytes:\\xd0": -1.0, "\\": -2.0}]


def test_offsets_count_whole_characters(byte_level: Tokenizer) -> None:
    ids = byte_level.encode("a🌶b")
    found = writer(byte_level).write(ids, [None] * len(ids))
    assert len(ids) > 3
    assert found.text_offset == [0, *[1] * (len(ids) - 2), 2]


def test_no_token_hides_another_that_looks_like_it() -> None:
    """Whichever was sampled: all are there, with their numbers, and the sampled one by its name."""
    tokenizer = Tokenizer(byte_fallback_backend())
    letter = next(i for i in range(259, len(tokenizer)) if tokenizer.token_text(i) == "a")
    alike = [3 + ord("a"), letter, 3 + ord("b")]
    for sampled in alike[:2]:
        entries = {sampled: Logprob(-5.0, 9, "a"), **row(*(other for other in alike if other != sampled))}
        found = writer(tokenizer).write([sampled], [entries])
        [top] = found.top_logprobs
        assert top is not None
        other = alike[1] if sampled == alike[0] else alike[0]
        assert top == {"a": -5.0, f"token_id:{other}": 0.0, "b": -1.0}
        assert found.token_logprobs == [top[found.tokens[0]]]


def test_tokens_may_be_named_by_their_ids(byte_level: Tokenizer) -> None:
    written = writer(byte_level, as_token_ids=True).write([6], ROWS[1:])
    assert written.tokens == ["token_id:6"]
    assert written.top_logprobs == [{"token_id:6": -1.0, "token_id:8": FLOOR}]


def test_a_chat_token_has_its_best_alternatives_and_itself_only_among_them(byte_level: Tokenizer) -> None:
    def tops(num_top: int) -> list[list[tuple[str, float]]]:
        found = chat_logprobs([5, 6], ROWS, num_top=num_top, tokenizer=byte_level, as_token_ids=False)
        assert [(token.token, token.logprob) for token in found.content] == [("ab", -3.0), ("c", -1.0)]
        return [[(top.token, top.logprob) for top in token.top_logprobs] for token in found.content]

    assert tops(0) == [[], []]
    assert tops(2) == [[("c", -1.0), ("d", -2.0)], [("c", -1.0), ("c", FLOOR)]]
    assert tops(3)[0] == [("c", -1.0), ("d", -2.0), ("ab", -3.0)]


def test_a_token_of_probability_zero_has_a_number() -> None:
    first, second = prompt_logprobs([None, ROWS[1]])
    assert first is None
    assert second is not None
    assert (second["8"].logprob, second["8"].rank) == (FLOOR, 2)
