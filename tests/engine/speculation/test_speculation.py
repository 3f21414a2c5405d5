"""How many tokens are guessed, and when a request waits for its guesses."""

from __future__ import annotations

from itertools import pairwise

import pytest

from sempre.engine.config import SpeculativeConfig
from sempre.engine.speculation import SpeculationPlan
from sempre.engine.speculation.adaptive import DraftLength, GuessCosts
from sempre.engine.speculation.speculation import guess_costs
from sempre.ipc.messages import StepCosts

CHEAP = GuessCosts(first=0.1, each=0.1)
COSTS = StepCosts(step=1e-3, row=0.05e-3, result=0.5e-3, guess=0.1e-3)


def test_the_length_follows_the_share_of_right_guesses() -> None:
    length = DraftLength(7, costs=CHEAP)
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
    one, other = DraftLength(5, costs=CHEAP), DraftLength(5, costs=CHEAP)
    for right, missed in history:
        one.observe(right, missed=missed)
        other.observe(right, missed=missed)
        assert one.current == other.current


def test_a_length_that_does_not_adapt_stays() -> None:
    length = DraftLength(3, costs=GuessCosts(9.0, 9.0), adaptive=False)
    for _ in range(50):
        length.observe(0, missed=True)
    assert length.current == 3


@pytest.mark.parametrize(
    "costs", [GuessCosts(0.0, 0.1), GuessCosts(0.7, 0.1), GuessCosts(0.1, 0.54), GuessCosts(1, 0.3)]
)
def test_the_length_is_the_one_that_brings_most_tokens_per_time(costs: GuessCosts) -> None:
    length = DraftLength(6, costs=costs)
    lengths = set()
    for right in [1] * 40 + [0] * 40:
        length.observe(right, missed=not right)
        rate = length._rate

        def speed(count: int, rate: float = rate) -> float:
            paid = 1.0 + (costs.first if count else 0.0) + count * costs.each
            return (1.0 - rate ** (count + 1)) / (1.0 - rate) / paid

        assert speed(length.current) == pytest.approx(max(speed(count) for count in range(7)), rel=1e-12)
        lengths.add(length.current)
    assert 0 in lengths
    assert max(lengths) > 2


def test_costs_are_counted_in_steps_of_the_target() -> None:
    costs = StepCosts(step=2e-3, row=0.2e-3, result=0.5e-3, guess=0.3e-3)
    in_turn = guess_costs(costs, steps_ahead=False, asks_worker=False)
    assert in_turn == pytest.approx((0.0, 0.25))
    assert guess_costs(costs, steps_ahead=True, asks_worker=False) == pytest.approx((0.25, 0.25))
    assert guess_costs(costs, steps_ahead=True, asks_worker=True).first > 0.25


def test_a_draft_model_as_slow_as_its_target_is_not_asked_but_for_a_look() -> None:
    """Even one that is always right, until that is known; looks become rare where they find nothing."""
    costs = StepCosts(step=1e-3, row=0.1e-3, result=0.3e-3, guess=1e-3)
    config = SpeculativeConfig(method="draft_model", model="m", num_speculative_tokens=4)
    speculation = SpeculationPlan(config, steps_ahead=True, costs=costs).start()
    tokens, looks = [1], []
    for step in range(300):
        drafts = speculation.drafts(tokens, 10)
        wanted = speculation.num_wanted()
        assert speculation.must_wait(tokens, 1) == (wanted > 0 or bool(drafts))
        tokens = [*tokens, step]
        speculation.sampled(tokens, drafts, len(drafts), [9] * wanted)
        if wanted:
            looks.append(step)
    assert len(looks) == 3
    gaps = [later - former for former, later in pairwise(looks)]
    assert gaps[1] > 1.9 * gaps[0] > 60


LOOP = [5, 6, 7] * 6


def test_lookup_never_waits_while_its_guesses_are_wrong() -> None:
    """With steps ahead, a request without good guesses keeps two steps in flight; one in a loop waits for each."""
    plan = SpeculationPlan(SpeculativeConfig(method="ngram"), steps_ahead=True, costs=COSTS)
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
    speculation = SpeculationPlan(SpeculativeConfig(method="ngram"), steps_ahead=True, costs=COSTS).start()
    tokens = [1, 2, 3]
    for token in range(30):
        tokens = [*tokens, 1, 2, 1000 + token]
        speculation.drafts(tokens[:-1], 0)
    for token in LOOP * 2:
        tokens = [*tokens, token]
        speculation.drafts(tokens, 0)
    assert speculation.drafts(tokens, 10)


def test_no_more_is_guessed_than_there_is_room_for() -> None:
    speculation = SpeculationPlan(
        SpeculativeConfig(method="ngram", adaptive=False), steps_ahead=False, costs=COSTS
    ).start()
    assert len(speculation.drafts(LOOP, 10)) == 4
    assert len(speculation.drafts(LOOP, 2)) == 2
    assert speculation.drafts(LOOP, 0) == []


@pytest.mark.parametrize("placement", ["colocated", "worker"])
def test_a_draft_model_that_is_always_wrong_is_given_up_and_tried_again(placement: str) -> None:
    config = SpeculativeConfig(method="draft_model", model="m", placement=placement)  # type: ignore[arg-type]
    speculation = SpeculationPlan(config, steps_ahead=False, costs=COSTS).start()
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
    speculation = SpeculationPlan(config, steps_ahead=False, costs=COSTS).start()
    speculation.sampled([1, 2, 3], [], 0, [])
    assert speculation.awaits_worker
    assert speculation.must_wait([1, 2, 3], 0)
    speculation.answered(2, [7, 8])  # type: ignore[attr-defined]
    assert not speculation.must_wait([1, 2, 3], 0)
    assert speculation.drafts([1, 2, 3], 10) == []
