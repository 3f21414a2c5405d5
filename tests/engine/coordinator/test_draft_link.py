"""What a draft worker is asked, and that no request waits for one that is not there, late, or gone."""

from __future__ import annotations

import pytest

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
VOCAB_SIZE = 100


LIMITS = Limits(100, 100, 16, 8, 64)


def make(name: str) -> Request:
    return Request(make_request([1, 2, 3], request_id=name, max_tokens=90), 0, LIMITS, PLAN.start())


def speculation(request: Request) -> ModelSpeculation:
    assert isinstance(request.speculation, ModelSpeculation)
    return request.speculation


def sample(request: Request, *token_ids: int) -> Request:
    """A step has produced these; the request now needs drafts."""
    request.token_ids += token_ids
    speculation(request).sampled(request.token_ids, [], 0, None)
    return request


def waits(request: Request, now: float = 0.0) -> bool:
    ask = speculation(request).ask
    return ask is not None and ask.is_open(now)


def drafts(request: Request) -> list[int]:
    return speculation(request).drafts(request.token_ids, 10)


def send(link: DraftLink, now: float = 0.0) -> ExecuteStep:
    step = link.next_step(now)
    assert step is not None
    return step


def answer(link: DraftLink, step: ExecuteStep, *drafts: list[int]) -> None:
    link.take(StepResult(rank=0, step_id=step.step_id, drafts=[*drafts]))


def asked(step: ExecuteStep) -> list[tuple[str, list[int], int]]:
    return [(item.request_id, item.token_ids, item.num_drafts) for item in step.drafts]


@pytest.fixture
def link() -> DraftLink:
    """A link to a serving worker."""
    link = DraftLink()
    link.begin(VOCAB_SIZE)
    return link


def test_the_worker_is_told_every_token_once_and_every_end_once(link: DraftLink) -> None:
    one, two = make("one"), make("two")
    link.ask([sample(one, 4)])
    first = send(link)
    assert [(new.request_id, new.token_ids) for new in first.new_requests] == [("one", [1, 2, 3, 4])]
    assert asked(first) == [("one", [], 3)]
    answer(link, first, [7, 8, 9])
    assert not waits(one)
    assert drafts(one) == [7, 8, 9]
    link.ask([sample(one, 7, 8, 5), sample(two, 6)])
    second = send(link)
    assert [new.request_id for new in second.new_requests] == ["two"]
    assert asked(second) == [("one", [7, 8, 5], 3), ("two", [], 3)]
    answer(link, second, [1], [2])
    assert (drafts(one), drafts(two)) == ([1], [2])
    link.forget("two")
    link.forget("never asked about")
    link.ask([sample(one, 1)])
    third = send(link)
    assert third.finished_request_ids == ["two"]
    assert asked(third) == [("one", [1], 3)]
    answer(link, third, [])
    link.ask([sample(one, 2)])
    assert send(link).finished_request_ids == []


def test_one_step_at_a_time(link: DraftLink) -> None:
    one, two = make("one"), make("two")
    link.ask([sample(one, 4)])
    first = send(link)
    link.ask([sample(two, 4)])
    assert link.next_step(0.0) is None
    assert waits(two)
    answer(link, first, [5])
    assert asked(send(link)) == [("two", [], 3)]


def test_nobody_waits_for_a_worker_that_is_not_there() -> None:
    link, request = DraftLink(), make("one")
    link.ask([sample(request, 4)])
    assert link.next_step(0.0) is None
    assert not waits(request)
    assert drafts(request) == []
    link.begin(VOCAB_SIZE)
    link.ask([sample(request, 5)])
    assert [new.token_ids for new in send(link).new_requests] == [[1, 2, 3, 4, 5]]


def test_a_request_that_has_ended_meanwhile_is_not_asked_about(link: DraftLink) -> None:
    ended, queued, other = make("ended"), make("queued"), make("other")
    link.ask([sample(ended, 4), sample(other, 4)])
    ended.finish_reason = "abort"
    step = send(link)
    assert asked(step) == [("other", [], 3)]
    link.ask([sample(queued, 4)])
    assert link.next_step(0.0) is None
    speculation(queued).ended(queued.token_ids, 3)
    answer(link, step, [5])
    assert link.next_step(0.0) is None


def test_what_was_asked_before_the_last_result_is_not_sent(link: DraftLink) -> None:
    """It is computed again while it is queued: by a preemption, or by the death of its worker."""
    one, two = make("one"), make("two")
    link.ask([sample(one, 4)])
    first = send(link)
    link.ask([sample(two, 4)])
    assert link.next_step(0.0) is None
    link.ask([sample(two, 5), two])
    assert link.next_step(0.0) is None
    answer(link, first, [5])
    second = send(link)
    assert asked(second) == [("two", [], 3)]
    answer(link, second, [6])
    assert drafts(two) == [6]


def test_nobody_waits_longer_than_a_moment(link: DraftLink) -> None:
    one, two, three = make("one"), make("two"), make("three")
    link.ask([sample(one, 4)])
    late = send(link, now=10.0)
    queued_at = 10.0 + 0.9 * PATIENCE_S
    link.ask([sample(two, 4)])
    assert link.next_step(queued_at) is None
    assert waits(one, queued_at)
    assert link.next_deadline(queued_at) == 10.0 + PATIENCE_S
    assert not waits(one, 10.0 + PATIENCE_S)
    assert link.is_late(10.0 + PATIENCE_S)
    assert link.next_deadline(10.0 + PATIENCE_S) == queued_at + PATIENCE_S
    assert not waits(two, queued_at + PATIENCE_S)
    assert link.next_deadline(20.0) is None
    link.ask([sample(one, 5), sample(three, 4)])
    assert link.next_step(20.0) is None
    assert not waits(one, 20.0)
    assert not waits(three, 20.0)
    assert link.next_deadline(20.0) is None
    link.ask([sample(one, 6)])
    # its drafts are for a sequence that has since continued
    answer(link, late, [7, 8])
    assert not link.is_late(20.0)
    step = send(link, now=30.0)
    assert waits(one, 30.0)
    assert asked(step) == [("one", [5, 6], 3)]
    assert not link.is_late(30.0)


def test_drafts_that_come_too_late_are_not_used(link: DraftLink) -> None:
    request = make("one")
    link.ask([sample(request, 4)])
    step = send(link)
    assert drafts(request) == [], "it went on without"
    answer(link, step, [7, 8])
    assert drafts(request) == []
    sample(request, 7)
    assert drafts(request) == []


def test_drafts_reach_their_request_when_another_has_ended(link: DraftLink) -> None:
    one, two = make("one"), make("two")
    link.ask([sample(one, 4), sample(two, 4)])
    step = send(link)
    one.finish_reason = "abort"
    link.forget("one")
    answer(link, step, [7], [8])
    assert drafts(two) == [8]


def test_a_new_worker_is_told_everything_again(link: DraftLink) -> None:
    one, two, three = make("one"), make("two"), make("three")
    link.ask([sample(one, 4), sample(three, 4)])
    answer(link, send(link), [5], [5])
    link.ask([sample(one, 6)])
    send(link)
    link.forget("three")
    link.ask([sample(two, 4)])
    assert link.next_step(0.0) is None
    assert waits(one)
    assert waits(two)
    link.begin(VOCAB_SIZE)
    assert not waits(one)
    assert not waits(two)
    link.ask([sample(one, 7)])
    step = send(link)
    assert [new.token_ids for new in step.new_requests] == [[1, 2, 3, 4, 6, 7]]
    assert step.finished_request_ids == []
    answer(link, step, [9])
    assert drafts(one) == [9]
    assert drafts(two) == []
