"""How many tokens are guessed, and when a request waits for its guesses."""

from __future__ import annotations

import pytest

from sempre.engine.config import SpeculativeConfig
from sempre.engine.speculation import SpeculationPlan
from sempre.engine.speculation.adaptive import DraftLength


def test_the_length_follows_the_share_of_right_guesses() -> None:
    length = DraftLength(7, gate=0.25)
    for _ in range(20):
        length.observe(4, missed=False)
    assert length.current == 7
    shrinking = []
    for _ in range(20):
        length.observe(0, missed=True)
        shrinking.append(length.current)
    assert shrinking == sorted(shrinking, reverse=True)
    assert shrinking[-1] == 0
    for _ in range(20):
        length.observe(1, missed=False)
    assert length.current == 7


def test_the_length_is_a_function_of_the_history_alone() -> None:
    history = [(3, True), (0, True), (4, False), (1, True), (2, True)]
    one, other = DraftLength(5, gate=0.25), DraftLength(5, gate=0.25)
    for right, missed in history:
        one.observe(right, missed=missed)
        other.observe(right, missed=missed)
        assert one.current == other.current


def test_a_length_that_does_not_adapt_stays() -> None:
    length = DraftLength(3, gate=0.9, adaptive=False)
    for _ in range(50):
        length.observe(0, missed=True)
    assert length.current == 3


LOOP = [5, 6, 7] * 6


def test_lookup_never_waits_while_its_guesses_are_wrong() -> None:
    """With steps ahead, a request without good guesses keeps two steps in flight; one in a loop waits for each."""
    plan = SpeculationPlan(SpeculativeConfig(method="ngram"), steps_ahead=True)
    repeating = plan.start()
    assert repeating.must_wait(LOOP, 1)
    assert not repeating.must_wait(LOOP, 0)
    assert repeating.drafts(LOOP, 10) == [5, 6, 7, 5]
    plain = plan.start()
    tokens = list(range(100, 120))
    assert not plain.must_wait(tokens, 1)
    assert plain.drafts(tokens, 10) == []
    surprised = plan.start()
    tokens = [1, 2, 3]
    for token in range(30):
        tokens = [*tokens, 1, 2, 1000 + token]  # after 1, 2 something new each time
        surprised.drafts(tokens[:-1], 10)
    assert surprised.drafts([*tokens, 1, 2], 10) == []
    assert not surprised.must_wait([*tokens, 1, 2], 1)


def test_lookup_notices_that_guesses_have_become_right_without_verifying_any() -> None:
    speculation = SpeculationPlan(SpeculativeConfig(method="ngram"), steps_ahead=True).start()
    tokens = [1, 2, 3]
    for token in range(30):
        tokens = [*tokens, 1, 2, 1000 + token]
        speculation.drafts(tokens[:-1], 0)
    for token in LOOP * 2:
        tokens = [*tokens, token]
        speculation.drafts(tokens, 0)
    assert speculation.drafts(tokens, 10)


def test_no_more_is_guessed_than_there_is_room_for() -> None:
    speculation = SpeculationPlan(SpeculativeConfig(method="ngram", adaptive=False), steps_ahead=False).start()
    assert len(speculation.drafts(LOOP, 10)) == 4
    assert len(speculation.drafts(LOOP, 2)) == 2
    assert speculation.drafts(LOOP, 0) == []


@pytest.mark.parametrize("placement", ["colocated", "worker"])
def test_a_draft_model_that_is_always_wrong_is_given_up_and_tried_again(placement: str) -> None:
    config = SpeculativeConfig(method="draft_model", model="m", placement=placement)  # type: ignore[arg-type]
    speculation = SpeculationPlan(config, steps_ahead=False).start()
    tokens, asked = [1], []
    for step in range(90):
        drafts = speculation.drafts(tokens, 10)
        wanted = speculation.num_wanted()
        tokens = [*tokens, step]
        speculation.sampled(tokens, drafts, 0, [9] * wanted)
        if placement == "worker" and speculation.awaits_worker:
            wanted = 4
            speculation.answered(len(tokens), [9] * wanted)  # type: ignore[attr-defined]
        asked.append(wanted > 0)
    assert asked[0]
    first_pause = asked.index(False)
    assert first_pause < 15
    assert True in asked[first_pause:]
    assert sum(asked[first_pause:]) <= 4


def test_guesses_for_another_length_are_not_used() -> None:
    config = SpeculativeConfig(method="draft_model", model="m", placement="worker", adaptive=False)
    speculation = SpeculationPlan(config, steps_ahead=False).start()
    speculation.sampled([1, 2, 3], [], 0, [])
    assert speculation.awaits_worker
    assert speculation.must_wait([1, 2, 3], 0)
    speculation.answered(2, [7, 8])  # type: ignore[attr-defined]
    assert not speculation.must_wait([1, 2, 3], 0)
    assert speculation.drafts([1, 2, 3], 10) == []
