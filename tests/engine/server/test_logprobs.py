"""Log-probabilities as JSON holds them: finite, in order, with offsets into the choice's text."""

from __future__ import annotations

import math

from sempre.engine.outputs import Logprob
from sempre.engine.server.logprobs import FLOOR, CompletionLogprobsWriter, chat_logprobs, joined, prompt_logprobs
from sempre.engine.text.tokenizer import Tokenizer

ROWS = [
    {5: Logprob(-3.0, 3, "ab"), 6: Logprob(-1.0, 1, "c"), 7: Logprob(-2.0, 2, "d")},
    {6: Logprob(-1.0, 1, "c"), 8: Logprob(-math.inf, 2, "c")},
]


def test_offsets_go_on_from_part_to_part() -> None:
    writer = CompletionLogprobsWriter(as_token_ids=False)
    first = writer.write_first(9, "xyz")
    second, third = writer.write([5], ROWS[:1]), writer.write([6], ROWS[1:])
    found = joined(joined(first, second), third)
    assert found.tokens == ["xyz", "ab", "c"]
    assert found.text_offset == [0, 3, 5]
    assert found.token_logprobs == [None, -3.0, -1.0]
    # of two tokens with one text the more probable one stands
    assert found.top_logprobs == [None, {"ab": -3.0, "c": -1.0, "d": -2.0}, {"c": -1.0}]


def test_tokens_may_be_named_by_their_ids() -> None:
    written = CompletionLogprobsWriter(as_token_ids=True).write([6], ROWS[1:])
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
    first, row = prompt_logprobs([None, ROWS[1]])
    assert first is None
    assert row is not None
    assert (row["8"].logprob, row["8"].rank) == (FLOOR, 2)
