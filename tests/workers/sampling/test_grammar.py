"""What a grammar allows next is a function of the tokens so far, however the state got there."""

from __future__ import annotations

import json
import threading
import time
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from grammars import EOS, LETTERS, OBJECT, TINY, VOCABULARY, compiler
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from sempre.ipc.messages import NOT_READY, ReasoningSpec, SamplingSpec
from sempre.kernels.sampling import allow_bits
from sempre.workers.sampling import GrammarCompiler, RowError, Sampler, SamplingState
from sempre.workers.sampling.grammar import _THREADS, GrammarState, StepPatience
from sempre.workers.sampling.row_error import NotReady

TOKENIZER = Tokenizer.from_file(str(TINY / "tokenizer.json"))
PROMPT = [7, 8, 9]
TEXT = '{"a": 17, "b": [1, "x"]}'


def sequence(text: str) -> list[int]:
    return [*PROMPT, *TOKENIZER.encode(text, add_special_tokens=False).ids]


COMPILER = compiler()


def started(grammar: str, tokens: list[int]) -> GrammarState:
    return COMPILER.start(SamplingSpec(max_tokens=50, grammar=grammar, eos_token_ids=EOS), tokens, len(PROMPT))


def allowed(state: GrammarState, position: int) -> list[int]:
    bits = np.unpackbits(state.allowed_words(position).view(np.uint8), bitorder="little")
    return np.flatnonzero(bits).tolist()


def test_the_tokens_allowed_are_those_that_continue_a_valid_text() -> None:
    ids = allowed(started(LETTERS, list(PROMPT)), len(PROMPT))
    texts = {TOKENIZER.decode([token], skip_special_tokens=False) for token in ids}
    every = [TOKENIZER.decode([token], skip_special_tokens=False) for token in range(VOCABULARY)]
    assert texts == {text for text in every if 1 <= len(text) <= 9 and set(text) <= set("abcdefghijklm")}


def test_the_end_is_allowed_exactly_when_the_text_is_complete() -> None:
    tokens = sequence(TEXT)
    state = started(OBJECT, tokens)
    for position in range(len(PROMPT), len(tokens)):
        ids = allowed(state, position)
        assert tokens[position] in ids
        assert not set(EOS) & set(ids)
    assert allowed(state, len(tokens)) == EOS


POSITIONS = st.lists(st.integers(len(PROMPT), len(sequence(TEXT))), min_size=1, max_size=12)


@given(POSITIONS)
@settings(max_examples=60)
def test_a_state_that_went_back_and_forth_equals_a_fresh_one(positions: list[int]) -> None:
    tokens = sequence(TEXT)
    state = started(OBJECT, tokens)
    for position in positions:
        fresh = started(OBJECT, tokens[:position])
        assert (state.allowed_words(position) == fresh.allowed_words(position)).all()


def test_one_state_in_several_rows_gives_each_row_its_own_mask() -> None:
    """As needed to verify draft tokens."""
    tokens = sequence(TEXT)
    params = SamplingSpec(max_tokens=50, grammar=OBJECT, eos_token_ids=EOS)
    logits = torch.randn(len(tokens) - len(PROMPT), VOCABULARY, generator=torch.Generator().manual_seed(1))
    positions = list(range(len(PROMPT), len(tokens)))
    shared = SamplingState(params, 5, tokens, len(PROMPT), started(OBJECT, tokens))
    together = Sampler().sample(logits.clone(), [shared] * len(positions), positions)
    for row, position in enumerate(positions):
        lone = SamplingState(params, 5, tokens[:position], len(PROMPT), started(OBJECT, tokens[:position]))
        assert Sampler().sample(logits[row : row + 1].clone(), [lone], [position]) == [together[row]]


@pytest.mark.parametrize(
    ("grammar", "message"),
    [
        ('{"grammars": [{"json_schema": {"type": "objekt"}}]}', "structured_outputs: .*objekt"),
        ("nonsense {", "structured_outputs: "),
        ('{"grammars": [{"lark_grammar": "start: <|nobody|>"}]}', "unknown special token"),
    ],
)
def test_a_grammar_that_does_not_compile_is_the_error_of_its_row(grammar: str, message: str) -> None:
    tokens = list(PROMPT)
    with pytest.raises(RowError, match=message):
        started(grammar, tokens).allowed_words(len(PROMPT))
    bad = SamplingState(SamplingSpec(max_tokens=5, grammar=grammar), 1, tokens, 3, started(grammar, tokens))
    good = SamplingState(SamplingSpec(max_tokens=5), 1, tokens, 3)
    logits = torch.randn(2, VOCABULARY, generator=torch.Generator().manual_seed(1))
    results = Sampler().sample(logits.clone(), [bad, good], [3, 3])
    assert results[0].token_id is None
    assert results[0].error is not None
    assert results[0].error.facts["parameter"] == "structured_outputs"
    assert results[1:] == Sampler().sample(logits[1:].clone(), [good], [3])


def test_a_token_that_leaves_the_grammar_is_an_error() -> None:
    tokens = [*PROMPT, *TOKENIZER.encode("zebra").ids]
    with pytest.raises(RowError, match=r"structured_outputs: .*satisfy the grammar"):
        started(LETTERS, tokens).allowed_words(len(tokens))


def test_a_grammar_beyond_its_limits_is_an_error_and_no_stall() -> None:
    """Work per token is bounded, in counts: the same tokens meet the limit at the same place."""
    ambiguous = '{"grammars": [{"lark_grammar": "start: (a | b | c | d)+\\na: X+\\nb: X+\\nc: X+\\nd: X+\\nX: /a/"}]}'
    tokens = [*PROMPT, *TOKENIZER.encode("a" * 200).ids]

    def limit_of(state: GrammarState) -> int:
        for position in range(len(PROMPT), len(tokens)):
            try:
                state.allowed_words(position)
            except RowError:
                return position
        raise AssertionError("no limit was met")

    limit = limit_of(started(ambiguous, tokens))
    assert limit_of(started(ambiguous, tokens)) == limit
    with pytest.raises(RowError):
        started(ambiguous, tokens).allowed_words(limit)


def test_a_form_that_is_not_ready_is_asked_for_again() -> None:
    """Whatever delays its threads, a step continues without the row, and the row samples the same token later."""
    impatient = GrammarCompiler(TINY, VOCABULARY, step_wait_s=0.0)
    go_on = threading.Event()
    blocked = [impatient._threads.submit(go_on.wait, 60) for _ in range(_THREADS)]
    tokens = sequence(TEXT)
    params = SamplingSpec(max_tokens=50, grammar=OBJECT, eos_token_ids=EOS)
    form = impatient.start(params, tokens, len(PROMPT))
    state = SamplingState(params, 5, tokens, len(PROMPT), form)
    plain = SamplingState(SamplingSpec(max_tokens=5), 1, tokens, 3)
    logits = torch.randn(2, VOCABULARY, generator=torch.Generator().manual_seed(1))
    position = len(tokens) - 2
    for _ in range(3):
        impatient.patience.begin_step()
        held, other = Sampler().sample(logits.clone(), [state, plain], [position, 3])
        assert held.error is not None
        assert held.error.type == NOT_READY
        assert [other] == Sampler().sample(logits[1:].clone(), [plain], [3])
    go_on.set()
    assert all(work.result() for work in blocked)
    form.prepare(position)
    deadline = time.monotonic() + 60
    while (found := Sampler().sample(logits[:1].clone(), [state], [position])[0]).error is not None:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    patient = SamplingState(params, 5, tokens, len(PROMPT), started(OBJECT, tokens))
    assert [found] == Sampler().sample(logits[:1].clone(), [patient], [position])


def test_the_rows_of_a_step_wait_no_longer_together_than_one() -> None:
    patience = StepPatience(0.2)
    never: Future[int] = Future()
    began = time.monotonic()
    for _ in range(1000):
        with pytest.raises(NotReady):
            patience.result_of(never)
    # a thousand waits of their own would be 200 s
    assert time.monotonic() - began < 60
    never.set_result(5)
    assert patience.result_of(never) == 5


def test_what_one_request_has_read_is_not_seen_by_others_of_its_form() -> None:
    tokens = sequence(TEXT)
    first = started(OBJECT, tokens)
    masks = [first.allowed_words(position).copy() for position in range(len(PROMPT), len(tokens) + 1)]
    second = started(OBJECT, tokens)
    for place, mask in enumerate(masks):
        assert (second.allowed_words(len(PROMPT) + place) == mask).all()
        assert (first.allowed_words(len(tokens)) == masks[-1]).all()


def test_no_token_left_names_the_grammar_among_the_causes() -> None:
    tokens = list(PROMPT)
    params = SamplingSpec(max_tokens=5, grammar=LETTERS, allowed_token_ids=[3, 4], eos_token_ids=EOS)
    state = SamplingState(params, 1, tokens, 3, started(LETTERS, tokens))
    (result,) = Sampler().sample(torch.zeros(1, VOCABULARY), [state], [3])
    assert result.error is not None
    assert "structured_outputs" in result.error.message


def test_a_model_without_a_tokenizer_file_is_an_error_of_the_request(tmp_path: Path) -> None:
    params = SamplingSpec(max_tokens=50, grammar=LETTERS, eos_token_ids=EOS)
    state = GrammarCompiler(tmp_path, VOCABULARY).start(params, list(PROMPT), len(PROMPT))
    with pytest.raises(RowError, match=r"structured_outputs: .*tokenizer\.json cannot be used with grammars"):
        state.allowed_words(len(PROMPT))


@pytest.mark.parametrize("vocabulary", [1, 31, 32, 33, 100])
def test_allow_bits(vocabulary: int) -> None:
    generator = np.random.default_rng(vocabulary)
    row = generator.standard_normal(vocabulary).astype(np.float32)
    words = generator.integers(-(2**31), 2**31, size=2).astype(np.int32)
    expected = row.copy()
    for token in range(vocabulary):
        word = int(words[token // 32]) if token < 64 else 0
        if not (word >> (token % 32)) & 1:
            expected[token] = -np.inf
    allow_bits(row, words)
    assert (row == expected).all()


TAG = TOKENIZER.encode("</think>", add_special_tokens=False).ids
LETTERS_RULE = "start: /[a-m]{2,9}/"


def framed(*, opened: bool) -> str:
    """LETTERS after reasoning."""
    opening = "" if opened else '"<think>" '
    lines = (f"start: {opening}thoughts @body", 'thoughts[lazy]: ANY "</think>"', r"ANY: ~/(?s:.*)<\/think>(?s:.*)/")
    frame = {"lark_grammar": "\n".join(lines)}
    return json.dumps({"grammars": [frame, {"name": "body", "lark_grammar": LETTERS_RULE}]})


def reasoning(**fields: Any) -> ReasoningSpec:
    return ReasoningSpec(start="<think>", end="</think>", end_token_ids=TAG, **fields)


def state_of(tokens: list[int], **fields: Any) -> GrammarState:
    return COMPILER.start(SamplingSpec(max_tokens=90, eos_token_ids=EOS, **fields), tokens, len(PROMPT))


def test_an_output_may_answer_at_once_or_reason_first() -> None:
    """Both are open at the first token; the tokens decide, and what was decided can be taken back."""
    tokens = sequence("<think>zebra</think>abc")
    state = state_of(tokens, grammar=LETTERS, reasoning=reasoning(grammar=framed(opened=False)))
    [less_than] = TOKENIZER.encode("<").ids
    first = len(PROMPT)
    answers = allowed(started(LETTERS, list(PROMPT)), first)
    assert allowed(state, first) == sorted([*answers, less_than])
    assert allowed(state, len(tokens)) == allowed(started(LETTERS, sequence("abc")), len(PROMPT) + 1)
    assert TOKENIZER.encode("zebra").ids[0] in allowed(state, first + len(TOKENIZER.encode("<think>").ids))
    assert allowed(state, first) == sorted([*answers, less_than])
    tokens[first:] = TOKENIZER.encode("abc").ids
    assert allowed(state, first + 1) == allowed(started(LETTERS, sequence("abc")), first + 1)
    allowed(state, first)
    tokens[first:] = TOKENIZER.encode("zebra").ids
    with pytest.raises(RowError, match="do not satisfy the grammar"):
        state.allowed_words(first + 1)


def test_a_form_that_would_take_the_tag_for_text_does_not() -> None:
    anything = '{"grammars": [{"lark_grammar": "start: /(?s:.*)/"}]}'
    tokens = sequence("<think>a</think>")
    state = state_of(tokens, grammar=anything, reasoning=reasoning(grammar=framed(opened=False)))
    assert allowed(state, len(tokens)) == allowed(started(LETTERS, list(PROMPT)), len(PROMPT))


@pytest.mark.parametrize("begins_inside", [False, True])
@pytest.mark.parametrize("bound", [False, True])
@pytest.mark.parametrize("budget", [0, 1, 7])
def test_reasoning_ends_when_its_budget_is_spent(begins_inside: bool, bound: bool, budget: int) -> None:
    """Also in the middle of a character, of which each byte is a token here."""
    opening = [] if begins_inside else TOKENIZER.encode("<think>", add_special_tokens=False).ids
    thoughts = TOKENIZER.encode("Well日日日日", add_special_tokens=False).ids[:budget]
    after = TOKENIZER.encode("abc", add_special_tokens=False).ids
    tokens = [*PROMPT, *opening, *thoughts, *TAG, *after]
    grammar = framed(opened=begins_inside) if bound else None
    forms = {
        "grammar": grammar if begins_inside or not bound else LETTERS,
        "reasoning": reasoning(begins_inside=begins_inside, budget=budget, grammar=None if begins_inside else grammar),
    }
    state = state_of(tokens, **forms)
    due = len(PROMPT) + len(opening) + budget
    for position in [*range(len(PROMPT), len(tokens) + 1), *range(len(tokens), len(PROMPT) - 1, -1)]:
        ids = allowed(state, position)
        if due <= position < due + len(TAG):
            assert ids == [TAG[position - due]]
        elif position < len(tokens):
            assert tokens[position] in ids
            assert len(ids) > 1 or position < len(PROMPT) + len(opening)


def test_the_budget_says_nothing_once_reasoning_has_ended_or_of_an_answer_at_once() -> None:
    ended = sequence("<think>a</think> then much more is said, token after token")
    never = sequence("It is <think> and much more, token after token")
    for tokens in (ended, never):
        state = state_of(tokens, reasoning=reasoning(budget=9))
        for position in range(len(PROMPT), len(tokens) + 1):
            assert len(allowed(state, position)) >= VOCABULARY


@pytest.mark.parametrize("min_tokens", [0, 30])
def test_a_complete_form_wins_over_min_tokens(min_tokens: int) -> None:
    """While the grammar can continue, no end is allowed before `min_tokens`; where it can only end, it may."""
    params = SamplingSpec(max_tokens=50, min_tokens=min_tokens, grammar=LETTERS, eos_token_ids=EOS)

    def may_end(text: str) -> bool:
        tokens = sequence(text)
        state = SamplingState(params, 1, tokens, len(PROMPT), COMPILER.start(params, tokens, len(PROMPT)))
        row = np.zeros(VOCABULARY, np.float32)
        state.process(row, len(tokens))
        assert np.isfinite(row).any()
        return bool(np.isfinite(row[EOS]).all())

    assert may_end("abcabcabc")
    assert may_end("abc") == (min_tokens == 0)
    assert not may_end("a")
