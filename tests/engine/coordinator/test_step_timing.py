"""When the next step is planned: while the previous one runs, as late as the worker stays busy."""

from __future__ import annotations

import math

import pytest

from sempre.engine.coordinator.replica import Replica
from sempre.engine.coordinator.step_timing import StepTiming
from sempre.engine.scheduling import Scheduler
from sempre.engine.scheduling.limits import Limits
from sempre.ipc.messages import (
    ExecuteStep,
    RequestSpec,
    SampledTokens,
    SamplingSpec,
    ScheduledRequest,
    StepResult,
    WorkerCommand,
)


def step(computed: int, num_tokens: int = 1, requests: int = 2) -> ExecuteStep:
    scheduled = [
        ScheduledRequest(
            request_id=str(index),
            num_computed_tokens=computed,
            num_tokens=num_tokens,
            block_table_start=0,
            block_ids=[],
        )
        for index in range(requests)
    ]
    return ExecuteStep(step_id=0, scheduled=scheduled)


def after(first: ExecuteStep, second: ExecuteStep, *, lead_s: float = 0.008, seconds: float = 0.1) -> float:
    """When the step after `second` is planned, which was sent at 0.05 while `first` ran from 0 to `seconds`."""
    timing = StepTiming(lead_s)
    timing.sent(first, 0.0)
    timing.sent(second, 0.05)
    timing.answered(seconds)
    return timing.next_at()


def test_a_step_that_is_like_the_one_before_it_is_expected_to_take_as_long_per_token() -> None:
    assert after(step(10), step(11)) == pytest.approx(0.1 + 0.1 - 0.025)
    assert after(step(10), step(11, requests=3)) == pytest.approx(0.1 + 0.15 * 0.75)
    assert after(step(0, num_tokens=60), step(60, num_tokens=40)) == pytest.approx(0.1 + 0.1 * 40 / 60 * 0.75)
    assert after(step(10), step(11), seconds=0.06) == pytest.approx(0.06 + 0.06 - 0.015)
    # after a short step, planning starts so early that nothing is delayed
    assert after(step(10), step(11), seconds=0.051) - 0.051 < 0.051
    assert StepTiming(0.008).next_at() == -math.inf


@pytest.mark.parametrize(
    "other",
    [step(700), step(1000, requests=5), step(1000, requests=20), step(1000, num_tokens=2)],
    ids=["shorter contexts", "half as many", "twice as many", "prompts"],
)
def test_after_any_other_step_the_next_one_is_planned_at_once(other: ExecuteStep) -> None:
    expected = step(1000, requests=9)
    assert after(expected, expected) > 0.1
    assert after(expected, other) == (-math.inf if len(other.scheduled) != 5 else pytest.approx(0.1 + 0.75 * 5 / 90))


def test_the_fastest_of_the_last_steps_counts() -> None:
    timing = StepTiming(0.008)
    for number, seconds in enumerate((0.2, 0.1, 0.3)):
        timing.sent(step(number), float(number))
        timing.answered(number + seconds)
    timing.sent(step(3), 3.0)
    assert timing.next_at() == pytest.approx(3.0 + 0.1 - 0.025)
    for number in range(4, 13):
        timing.answered(number - 0.5)
        timing.sent(step(number), float(number))
    assert timing.next_at() == pytest.approx(12.0 + 0.5 * 0.75)


def test_a_worker_that_wants_steps_at_once_gets_them_at_once() -> None:
    assert after(step(10), step(11), lead_s=0.0) == -math.inf


def test_of_a_worker_that_is_gone_nothing_is_expected() -> None:
    timing = StepTiming(0.008)
    timing.sent(step(10), 0.0)
    timing.answered(0.1)
    timing.sent(step(11), 0.1)
    assert timing.next_at() > 0.1
    timing.reset()
    timing.sent(step(12), 5.0)
    assert timing.next_at() == -math.inf


class Sent:
    """An executor that keeps what it is sent."""

    def __init__(self) -> None:
        self.steps: list[ExecuteStep] = []

    def send(self, rank: int, command: WorkerCommand) -> None:
        assert isinstance(command, ExecuteStep)
        self.steps.append(command)


def spec(request_id: str, ordinal: int) -> RequestSpec:
    return RequestSpec(
        request_id=request_id, prompt_token_ids=[1, 2], params=SamplingSpec(max_tokens=9), seed=0, ordinal=ordinal
    )


def test_a_request_that_comes_while_a_long_step_runs_is_part_of_the_next_one(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr("sempre.engine.coordinator.replica.time.monotonic", lambda: clock[0])
    limits = Limits(
        max_model_len=64,
        num_blocks=8,
        block_size=16,
        max_num_seqs=4,
        max_num_batched_tokens=64,
        max_prompt_tokens=None,
        max_draft_tokens=0,
    )
    scheduler = Scheduler(limits, policy="fcfs", enable_prefix_caching=False)
    sent = Sent()
    replica = Replica(range(1), scheduler, sent, max_steps_in_flight=2, step_lead_s=0.008)  # type: ignore[arg-type]
    replica.add(spec("a", 0))
    for answered in range(4):
        replica.advance(clock[0])
        clock[0] += 0.1
        oldest = sent.steps[answered]
        sampled = [SampledTokens(request_id=item.request_id, token_ids=[7]) for item in oldest.scheduled]
        replica.take(0, StepResult(rank=0, step_id=oldest.step_id, sampled=sampled))
    # a step of 0.1 s has begun, and the one after it is not planned before the last quarter
    replica.advance(clock[0])
    num_sent = len(sent.steps)
    deadline = replica.next_deadline(clock[0])
    assert deadline == pytest.approx(clock[0] + 0.075)
    replica.advance(clock[0] + 0.07)
    assert len(sent.steps) == num_sent
    replica.add(spec("b", 1))
    replica.advance(deadline)
    assert [item.request_id for item in sent.steps[-1].scheduled] == ["a", "b"]
    assert len(sent.steps) == num_sent + 1
    assert replica.next_deadline(deadline) is None
