"""How many tokens are drafted, and when a request waits for its drafts."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from msgspec.structs import replace

from sempre.engine.speculation import Ask, Incarnation, ModelSpeculation, SpeculationPlan
from sempre.engine.speculation.costs import DraftCosts, DraftLength, DraftMeter, FixedLength
from sempre.engine.speculation.speculation import LookupSpeculation, draft_costs
from sempre.ipc.config import EngineConfig, SpeculativeConfig
from sempre.ipc.messages import DraftRequest, ExecuteStep, SampledTokens, ScheduledRequest, StepCosts

CHEAP = DraftCosts(first=0.1, draft=0.0, row=0.1)
COSTS = StepCosts(step=1e-3, row=0.05e-3, result=0.5e-3, draft=0.1e-3)


def test_the_length_follows_the_share_of_right_drafts() -> None:
    length = DraftLength(DraftMeter(CHEAP, 7))
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
    one, other = DraftLength(DraftMeter(CHEAP, 5)), DraftLength(DraftMeter(CHEAP, 5))
    for right, missed in history:
        one.observe(right, missed=missed)
        other.observe(right, missed=missed)
        assert one.current == other.current


def test_a_length_that_does_not_adapt_stays() -> None:
    length = FixedLength(3)
    for _ in range(50):
        length.observe(0, missed=True)
    assert length.current == 3


@pytest.mark.parametrize(
    "costs", [DraftCosts(0.0, 0.0, 0.1), DraftCosts(0.7, 0.1, 0.0), DraftCosts(0.1, 0.5, 0.04), DraftCosts(1, 0.2, 0.1)]
)
def test_the_length_is_the_one_that_brings_most_tokens_per_time(costs: DraftCosts) -> None:
    """Where drafts pay at all: the others of a step have paid for waiting then."""
    length = DraftLength(DraftMeter(costs, 6))
    lengths = set()
    for right in [1] * 40 + [0] * 40:
        length.observe(right, missed=not right)
        rate = length._rate

        def speed(count: int, rate: float = rate) -> float:
            return (1.0 - rate ** (count + 1)) / (1.0 - rate) / (1.0 + costs.first + count * (costs.draft + costs.row))

        best = max(speed(count) for count in range(7))
        if length.current:
            assert speed(length.current) == pytest.approx(best, rel=1e-12)
        else:
            assert best < 1.05, "so little is not worth it"
        lengths.add(length.current)
    assert 0 in lengths
    assert max(lengths) > 2


def test_one_draft_token_costs_more_where_more_requests_wait_for_its_row() -> None:
    costs = DraftCosts(first=0.5, draft=0.2, row=0.05)
    assert costs.each(1) == pytest.approx(0.25)
    assert costs.each(8) == pytest.approx(0.6)
    assert costs.of_step([4]) == pytest.approx(0.5 + 4 * 0.2 + 4 * 0.05)
    assert costs.of_step([4, 1, 3]) == pytest.approx(0.5 + 4 * 0.2 + 8 * 0.05)
    assert costs.times(2.0) == pytest.approx((1.0, 0.4, 0.1))


def test_costs_are_counted_in_steps_of_the_target() -> None:
    costs = StepCosts(step=2e-3, row=0.2e-3, result=0.5e-3, draft=0.3e-3)
    in_turn = draft_costs(costs, steps_ahead=False, asks_worker=False)
    assert in_turn == pytest.approx((0.0, 0.15, 0.1))
    assert draft_costs(costs, steps_ahead=True, asks_worker=False) == pytest.approx((0.25, 0.15, 0.1))
    assert draft_costs(costs, steps_ahead=True, asks_worker=True).first > 0.25


class Steps:
    """The steps of one request, told to its plan with the time that was expected."""

    def __init__(self, plan: SpeculationPlan, costs: DraftCosts) -> None:
        self._plan = plan
        self._costs = costs
        self._now = 0.0
        self._num_steps = 0

    def answered(self, drafts: list[int], num_made: int, num_kept: int) -> None:
        """A step that verified `drafts`, and after which `num_made` were made."""
        length = max(len(drafts), num_made)
        self._now += 1.0 + (self._costs.first + length * self._costs.each(1) if length else 0.0)
        item = ScheduledRequest(
            request_id="r",
            num_computed_tokens=9,
            num_tokens=1 + len(drafts),
            block_table_start=0,
            block_ids=[],
            draft_token_ids=drafts,
        )
        made = [DraftRequest(request_id="r", num_drafts=num_made)] if num_made else []
        step = ExecuteStep(step_id=self._num_steps, scheduled=[item], drafts=made)
        self._num_steps += 1
        sampled = SampledTokens(request_id="r", token_ids=[0] * (1 + num_kept))
        self._plan.observe(step, [sampled], self._now)


def stepped(
    costs: StepCosts, *, placement: str = "colocated", steps_ahead: bool = False
) -> tuple[ModelSpeculation, Steps]:
    """One request of a draft model, whose steps are timed."""
    config = SpeculativeConfig(method="draft_model", model="m", placement=placement)  # type: ignore[arg-type]
    plan = SpeculationPlan(config, steps_ahead=steps_ahead, costs=costs)
    speculation = plan.start()
    assert isinstance(speculation, ModelSpeculation)
    asks = placement == "worker"
    return speculation, Steps(plan, draft_costs(costs, steps_ahead=steps_ahead, asks_worker=asks))


def model_speculation(
    costs: StepCosts, *, placement: str = "colocated", steps_ahead: bool = False, **settings: bool
) -> ModelSpeculation:
    config = SpeculativeConfig(method="draft_model", model="m", placement=placement, **settings)  # type: ignore[arg-type]
    speculation = SpeculationPlan(config, steps_ahead=steps_ahead, costs=costs).start()
    assert isinstance(speculation, ModelSpeculation)
    return speculation


def ask_for(token_ids: list[int], answer: list[int] | None = None) -> Ask:
    return Ask(num_known=len(token_ids), num_drafts=4, deadline=1.0, worker=Incarnation(), answer=answer)


def test_the_draft_after_the_right_ones_counts_as_wrong() -> None:
    """One right draft and then a wrong one, forever: every other draft is right, and drafting one at a time pays
    off."""
    speculation = model_speculation(StepCosts(step=1.0, row=0.1, result=0.0, draft=0.2))
    tokens = [1]
    lengths = []
    for step in range(100):
        drafts = speculation.drafts(tokens, 10)
        wanted = speculation.num_wanted()
        tokens = [*tokens, step]
        speculation.sampled(tokens, drafts, min(1, len(drafts)), [9] * wanted if wanted else None)
        lengths.append(wanted)
    assert lengths[0] > 1
    # one draft is always right, two never are
    assert set(lengths[-20:]) == {1, 2}


def test_a_draft_worker_that_is_not_there_is_not_waited_for_at_every_token() -> None:
    speculation, steps = stepped(COSTS, placement="worker")
    tokens, asked = [1], []
    for step in range(600):
        # nearly all that was drafted was wrong, until the worker has gone
        drafts = speculation.drafts(tokens, 10)
        tokens = [*tokens, step]
        speculation.sampled(tokens, drafts, 0, None)
        steps.answered(drafts, 0, 0)
        asked.append(speculation.num_to_ask() > 0)
        if asked[-1]:
            speculation.ask = ask_for(tokens, [9, 9] if step < 30 else None)
    assert sum(asked[:30]) > 1
    assert 1 <= sum(asked[100:]) <= 7


def test_a_draft_model_that_has_no_drafts_is_asked_ever_more_rarely() -> None:
    """It may have no room for a sequence, or a shorter context: steps go on ahead meanwhile."""
    speculation = model_speculation(COSTS, steps_ahead=True)
    tokens, asked = [1], []
    for step in range(400):
        assert not speculation.drafts(tokens, 10)
        wanted = speculation.num_wanted()
        asked.append(wanted > 0)
        assert speculation.must_wait(tokens, 1) == asked[-1]
        tokens = [*tokens, step]
        speculation.sampled(tokens, [], 0, [] if wanted else None)
    assert asked[0]
    assert 3 <= sum(asked) <= 5


def test_with_steps_ahead_a_request_waits_while_its_draft_worker_is_asked() -> None:
    """A step planned before the previous result would leave the drafts nothing to apply to."""
    asking = model_speculation(COSTS, placement="worker", steps_ahead=True, adaptive=False)
    assert asking.must_wait([1], 1)
    assert not asking.must_wait([1], 0)
    given_up = model_speculation(
        StepCosts(step=1e-3, row=0.0, result=0.0, draft=1e-3), placement="worker", steps_ahead=True
    )
    assert given_up.num_to_ask() == 0
    assert not given_up.must_wait([1], 1)


class FixedDrafter:
    def __init__(self, drafts: list[int]) -> None:
        self._drafts = drafts

    def extend(self, token_ids: Sequence[int]) -> None:
        pass

    def propose(self, count: int) -> list[int]:
        return self._drafts[:count]

    def finish(self, num_prompt_tokens: int) -> None:
        pass


@pytest.mark.parametrize("longest", [1, 4])
def test_lookup_waits_only_for_drafts_that_reach_past_the_token_in_flight(longest: int) -> None:
    for drafts, waits in (([], False), ([7], False), ([7, 8], True)):
        length = FixedLength(longest)
        speculation = LookupSpeculation(FixedDrafter(drafts), length, longest)
        assert speculation.must_wait([1, 2], 1) == waits


def test_the_drafts_of_one_step_are_bounded() -> None:
    """Their rows of logits have a buffer of fixed size."""
    plain = EngineConfig(model="m", model_path="/", max_num_seqs=3)
    drafting = SpeculativeConfig(method="ngram", num_speculative_tokens=4)
    assert plain.max_draft_tokens == 0
    assert replace(plain, speculative_config=drafting).max_draft_tokens == 12
    assert replace(plain, speculative_config=drafting, max_num_seqs=1000).max_draft_tokens == 256


LOOP = [5, 6, 7] * 6


def test_lookup_never_waits_while_its_drafts_are_wrong() -> None:
    """With steps ahead, a request without good drafts keeps two steps in flight; one in a loop waits for each."""
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


def test_lookup_notices_that_drafts_have_become_right_without_verifying_any() -> None:
    speculation = SpeculationPlan(SpeculativeConfig(method="ngram"), steps_ahead=True, costs=COSTS).start()
    tokens = [1, 2, 3]
    for token in range(30):
        tokens = [*tokens, 1, 2, 1000 + token]
        speculation.drafts(tokens[:-1], 0)
    for token in LOOP * 2:
        tokens = [*tokens, token]
        speculation.drafts(tokens, 0)
    assert speculation.drafts(tokens, 10)


def test_no_more_is_drafted_than_there_is_room_for() -> None:
    speculation = SpeculationPlan(
        SpeculativeConfig(method="ngram", adaptive=False), steps_ahead=False, costs=COSTS
    ).start()
    assert len(speculation.drafts(LOOP, 10)) == 4
    assert len(speculation.drafts(LOOP, 2)) == 2
    assert speculation.drafts(LOOP, 0) == []


@pytest.mark.parametrize("placement", ["colocated", "worker"])
def test_a_draft_model_that_is_always_wrong_is_given_up_and_tried_again(placement: str) -> None:
    speculation, steps = stepped(COSTS, placement=placement)
    tokens, asked = [1], []
    for step in range(600):
        drafts = speculation.drafts(tokens, 10)
        wanted = speculation.num_wanted()
        tokens = [*tokens, step]
        speculation.sampled(tokens, drafts, 0, [9] * wanted if wanted else None)
        steps.answered(drafts, wanted, 0)
        if placement == "worker" and (wanted := speculation.num_to_ask()):
            speculation.ask = ask_for(tokens, [9] * wanted)
        asked.append(wanted > 0)
    first = asked.index(True)
    pause = asked.index(False, first)
    assert pause < first + 15
    assert True in asked[pause:]
    assert sum(asked[pause:]) <= 20, "while they are cheap"


def test_drafts_for_another_length_are_not_used() -> None:
    config = SpeculativeConfig(method="draft_model", model="m", placement="worker", adaptive=False)
    speculation = SpeculationPlan(config, steps_ahead=False, costs=COSTS).start()
    speculation.sampled([1, 2, 3], [], 0, None)
    assert speculation.num_to_ask() == 4
    speculation.ask = ask_for([1, 2], [7, 8])
    assert speculation.drafts([1, 2, 3], 10) == []
    speculation.ask = ask_for([1, 2, 3], [7, 8])
    assert speculation.drafts([1, 2, 3], 10) == [7, 8]


def test_what_was_asked_before_the_last_result_is_forgotten() -> None:
    """With a step ahead the request goes on while its draft worker is asked; it is not given up for that."""
    speculation = model_speculation(COSTS, placement="worker", steps_ahead=True)
    for tokens in ([1], [1, 2]):
        speculation.sampled(tokens, [], 0, None)
        assert speculation.num_to_ask() > 0
        assert speculation.ask is None
        speculation.ask = ask_for(tokens)


def test_an_ask_ends_with_its_answer_its_worker_or_its_deadline() -> None:
    answered, lost, late = ask_for([1]), ask_for([1]), ask_for([1])
    assert all(ask.is_open(0.9) for ask in (answered, lost, late))
    answered.answer = []
    lost.worker.is_gone = True
    assert not answered.is_open(0.9)
    assert not lost.is_open(0.9)
    assert not late.is_open(1.0)
