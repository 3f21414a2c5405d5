"""What a draft worker is asked, and that no request waits for one that is not there, late, or gone."""

from __future__ import annotations

from sempre.engine.coordinator.draft_link import PATIENCE_S, DraftLink
from sempre.engine.harness import make_request
from sempre.engine.scheduling.limits import Limits
from sempre.engine.scheduling.request import Request
from sempre.engine.speculation import ModelSpeculation, SpeculationPlan
from sempre.ipc.config import SpeculativeConfig
from sempre.ipc.messages import ExecuteStep, StepCosts, StepResult

PLAN = SpeculationPlan(
    SpeculativeConfig(method="draft_model", model="m", placement="worker", num_speculative_tokens=3, adaptive=False),
    steps_ahead=True,
    costs=StepCosts(step=1.0, row=0.0, result=0.0, draft=0.0),
)


LIMITS = Limits(100, 100, 16, 8, 64)


def make(name: str) -> Request:
    return Request(make_request([1, 2, 3], request_id=name, max_tokens=90), 0, LIMITS, PLAN.start())


def speculation(request: Request) -> ModelSpeculation:
    assert isinstance(request.speculation, ModelSpeculation)
    return request.speculation


def sample(request: Request, *token_ids: int) -> Request:
    """A step has brought these; the request now awaits guesses."""
    request.token_ids += token_ids
    speculation(request).sampled(request.token_ids, [], 0, None)
    assert awaits(request)
    return request


def awaits(request: Request) -> bool:
    return speculation(request).must_wait(request.token_ids, 0)


def guesses(request: Request) -> list[int]:
    return speculation(request).drafts(request.token_ids, 10)


def propose(link: DraftLink, now: float = 0.0) -> ExecuteStep:
    step = link.next_step(now, available=True)
    assert step is not None
    return step


def answer(link: DraftLink, step: ExecuteStep, *drafts: list[int]) -> None:
    link.take(StepResult(rank=0, step_id=step.step_id, drafts=[*drafts]))


def asked(step: ExecuteStep) -> list[tuple[str, list[int], int]]:
    return [(item.request_id, item.token_ids, item.num_drafts) for item in step.drafts]


def test_the_worker_is_told_every_token_once_and_every_end_once() -> None:
    link, one, two = DraftLink(), make("one"), make("two")
    link.ask([sample(one, 4)])
    first = propose(link)
    assert [(new.request_id, new.token_ids) for new in first.new_requests] == [("one", [1, 2, 3, 4])]
    assert asked(first) == [("one", [], 3)]
    answer(link, first, [7, 8, 9])
    assert not awaits(one)
    assert guesses(one) == [7, 8, 9]
    link.ask([sample(one, 7, 8, 5), sample(two, 6)])
    second = propose(link)
    assert [new.request_id for new in second.new_requests] == ["two"]
    assert asked(second) == [("one", [7, 8, 5], 3), ("two", [], 3)]
    answer(link, second, [1], [2])
    assert (guesses(one), guesses(two)) == ([1], [2])
    link.forget("two")
    link.forget("never asked about")
    link.ask([sample(one, 1)])
    third = propose(link)
    assert third.finished_request_ids == ["two"]
    assert asked(third) == [("one", [1], 3)]
    answer(link, third, [])
    link.ask([sample(one, 2)])
    assert propose(link).finished_request_ids == []


def test_one_step_at_a_time() -> None:
    link, one, two = DraftLink(), make("one"), make("two")
    link.ask([sample(one, 4)])
    first = propose(link)
    link.ask([sample(two, 4)])
    assert link.next_step(0.0, available=True) is None
    assert awaits(two)
    answer(link, first, [5])
    assert asked(propose(link)) == [("two", [], 3)]


def test_nobody_waits_for_a_worker_that_is_not_there() -> None:
    link, request = DraftLink(), make("one")
    link.ask([sample(request, 4)])
    assert link.next_step(0.0, available=False) is None
    assert not awaits(request)
    assert guesses(request) == []
    link.ask([sample(request, 5)])
    assert [new.token_ids for new in propose(link).new_requests] == [[1, 2, 3, 4, 5]]


def test_a_request_that_has_ended_meanwhile_is_not_asked_about() -> None:
    link, ended, other = DraftLink(), make("ended"), make("other")
    link.ask([sample(ended, 4), sample(other, 4)])
    ended.finish_reason = "abort"
    assert asked(propose(link)) == [("other", [], 3)]
    link.reset()
    link.ask([ended])
    assert link.next_step(0.0, available=True) is None


def test_nobody_waits_for_a_worker_that_is_late() -> None:
    link, one, two = DraftLink(), make("one"), make("two")
    link.ask([sample(one, 4)])
    late = propose(link, now=10.0)
    assert not link.check_late(10.0 + 0.9 * PATIENCE_S)
    assert awaits(one)
    assert link.check_late(10.0 + PATIENCE_S)
    assert not link.check_late(20.0), "it is late once"
    assert not awaits(one)
    link.ask([sample(one, 5), sample(two, 4)])
    assert link.next_step(20.0, available=True) is None
    assert not awaits(one)
    assert not awaits(two)
    link.ask([sample(one, 6)])
    # its guesses are for a sequence that has gone on
    answer(link, late, [7, 8])
    assert awaits(one)
    assert asked(propose(link, now=30.0)) == [("one", [5, 6], 3)]
    assert not link.check_late(30.0)


def test_guesses_reach_whom_they_are_for_when_another_has_ended() -> None:
    link, one, two = DraftLink(), make("one"), make("two")
    link.ask([sample(one, 4), sample(two, 4)])
    step = propose(link)
    one.finish_reason = "abort"
    link.forget("one")
    answer(link, step, [7], [8])
    assert guesses(two) == [8]


def test_a_new_worker_is_told_everything_anew() -> None:
    link, one, two, three = DraftLink(), make("one"), make("two"), make("three")
    link.ask([sample(one, 4), sample(three, 4)])
    answer(link, propose(link), [5], [5])
    link.ask([sample(one, 6)])
    propose(link)
    link.forget("three")
    link.ask([sample(two, 4)])
    link.reset()
    assert not awaits(one)
    assert not awaits(two)
    link.ask([sample(one, 7)])
    step = propose(link)
    assert [new.token_ids for new in step.new_requests] == [[1, 2, 3, 4, 6, 7]]
    assert step.finished_request_ids == []
    answer(link, step, [9])
    assert guesses(one) == [9]
    assert guesses(two) == []
