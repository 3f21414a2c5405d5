"""Drafts on a simulated clock: they hardly ever cost anything, and bring what they can where they pay."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
from timed_speculation import Machine, Run, draft

from sempre.engine.speculation import SpeculationPlan, costs, speculation
from sempre.engine.speculation.costs import DraftCosts, DraftMeter
from sempre.ipc.config import SpeculativeConfig
from sempre.ipc.messages import DraftRequest, ExecuteStep, SampledTokens, ScheduledRequest, StepCosts

# what a worker expects of all of them: a draft token costs an eighth of a step
EXPECTED = StepCosts(step=1e-3, row=2e-5, result=3e-4, draft=1e-4)
CHEAP, FAIR = Machine(1e-3, 2e-5, 1e-4, 0.0), Machine(1e-3, 2e-5, 1e-4, 3e-4)
# much dearer than expected: small models, whose steps are shorter than the way of a result
DEAR, SLOW = Machine(1e-3, 2e-5, 3e-4, 1e-3), Machine(1e-3, 2e-5, 1e-3, 5e-4)
MACHINES = [CHEAP, FAIR, DEAR, SLOW, replace(FAIR, depth=1), replace(DEAR, depth=1)]
ROUNDS, TOKENS = 4, 128


def model_plan(machine: Machine, **settings: Any) -> SpeculationPlan:
    config = SpeculativeConfig(method="draft_model", model="m", num_speculative_tokens=4, **settings)
    return SpeculationPlan(config, steps_ahead=machine.depth > 1, costs=EXPECTED)


def rounds(run: Run, num_requests: int, count: int = ROUNDS) -> list[float]:
    return [run.generate(num_requests, TOKENS) for _ in range(count)]


@cache
def without(machine: Machine, num_requests: int) -> float:
    return sum(rounds(Run(machine, None), num_requests))


@pytest.mark.parametrize("num_requests", [1, 8])
@pytest.mark.parametrize("share", [0.0, 0.3, 0.5, 0.7, 0.9, 1.0])
@pytest.mark.parametrize("machine", MACHINES, ids=str)
def test_a_draft_model(machine: Machine, share: float, num_requests: int) -> None:
    """From the first step on, what is learnt included; and not far from a fixed length where that pays."""
    off = without(machine, num_requests)
    on = sum(rounds(Run(machine, model_plan(machine), share=share), num_requests))
    fixed = sum(rounds(Run(machine, model_plan(machine, adaptive=False), share=share), num_requests))
    assert off / on > 0.965
    if off / fixed > 1.25:
        assert fixed / on > 0.92


def test_expected_costs_alone_would_lose() -> None:
    """The control: the same run where nobody tells the time."""
    plan = model_plan(SLOW)
    plan.observe = lambda *_: None  # type: ignore[method-assign]
    assert without(SLOW, 1) / sum(rounds(Run(SLOW, plan, share=0.7), 1)) < 0.8


def test_a_draft_model_that_becomes_right_is_noticed_and_left_again() -> None:
    run = Run(FAIR, model_plan(FAIR), share=0.0)
    rounds(run, 1)
    off = without(FAIR, 1) / ROUNDS
    run.share = 1.0
    assert off / rounds(run, 1, 8)[-1] > 2.0
    run.share = 0.0
    assert off / rounds(run, 1, 8)[-1] > 0.98


def test_the_first_step_of_a_shape_does_not_count() -> None:
    """Graphs are captured in it: what comes after is judged by itself."""
    machine = Machine(1e-3, 2e-5, 1e-4, 0.0, capture=0.1)
    run = Run(machine, model_plan(machine), share=0.9)
    rounds(run, 1)
    assert without(CHEAP, 1) / sum(rounds(run, 1)) > 2.0


def test_drafts_that_cost_less_than_expected_are_tried_soon() -> None:
    """Rows that were expected to take half of a step each take none."""
    config = SpeculativeConfig(method="draft_model", model="m", num_speculative_tokens=4)
    plan = SpeculationPlan(config, steps_ahead=True, costs=StepCosts(step=1e-3, row=5e-4, result=0.0, draft=1e-4))
    assert without(CHEAP, 8) / sum(rounds(Run(CHEAP, plan, share=0.9), 8)) > 1.6


def test_what_does_not_pay_for_one_request_is_tried_for_many() -> None:
    """What was measured with one does not rule out a trial with eight."""
    machine = Machine(1e-3, 0.0, 1.2e-3, 0.0)
    plan = model_plan(machine)
    run = Run(machine, plan, share=0.9)
    rounds(run, 1)
    run.machine = replace(machine, draft=1e-4)
    assert without(run.machine, 8) / sum(rounds(run, 8)) > 1.6


@pytest.mark.parametrize("num_requests", [1, 8])
def test_a_machine_that_sometimes_does_something_else(num_requests: int) -> None:
    """Now and then, or half of the time."""
    for noise, percent in ((1e-2, 5), (7e-3, 45)):
        noisy = replace(CHEAP, noise=noise, noisy_percent=percent)
        for share, least in ((0.0, 0.93), (0.9, 1.4)):
            run = Run(noisy, model_plan(noisy), share=share)
            assert without(noisy, num_requests) / sum(rounds(run, num_requests)) > least, (noise, share)


def test_the_same_history_gives_the_same_steps() -> None:
    runs = [Run(DEAR, model_plan(DEAR), share=0.6) for _ in range(2)]
    assert rounds(runs[0], 8) == rounds(runs[1], 8)


class _Scripted:
    """A lookup that always has drafts for a request."""

    def __init__(self, request: int, share: float) -> None:
        self._request = request
        self._share = share
        self._length = 0

    def extend(self, token_ids: Sequence[int]) -> None:
        self._length += len(token_ids)

    def propose(self, count: int) -> list[int]:
        return [draft(self._request, self._length + at, self._share) for at in range(count)]

    def finish(self, num_prompt_tokens: int) -> None:
        pass


@pytest.mark.parametrize("num_requests", [1, 8])
@pytest.mark.parametrize("share", [0.0, 0.3, 0.6, 0.9])
@pytest.mark.parametrize("machine", [CHEAP, FAIR, Machine(1e-3, 4e-4, 0.0, 1e-3)], ids=str)
def test_lookup(machine: Machine, share: float, num_requests: int, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[_Scripted] = []

    def make(cache_salt: str | None) -> _Scripted:
        made.append(_Scripted(len(made) + 1, share))
        return made[-1]

    monkeypatch.setitem(speculation.DRAFTERS, "ngram", lambda config: make)
    config = SpeculativeConfig(method="ngram", num_speculative_tokens=4)
    plan = SpeculationPlan(config, steps_ahead=True, costs=EXPECTED)
    on = sum(rounds(Run(machine, plan), num_requests))
    assert without(machine, num_requests) / on > 0.965
    if machine == CHEAP and share == 0.9:
        assert without(machine, num_requests) / on > 2.0


def _step(number: int, num_tokens: int, num_made: int) -> ExecuteStep:
    item = ScheduledRequest(
        request_id="r", num_computed_tokens=9, num_tokens=num_tokens, block_table_start=0, block_ids=[]
    )
    made = [DraftRequest(request_id="r", num_drafts=num_made)] if num_made else []
    return ExecuteStep(step_id=number, scheduled=[item], drafts=made)


@pytest.mark.parametrize("num_tokens", [1, 5])
def test_a_trial_is_one_step_also_beside_prompts(num_tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(costs, "_FIRST_TRIAL", costs._LEAST_PAUSE)
    meter = DraftMeter(DraftCosts(first=0.0, draft=0.5, row=0.0), longest=4)
    for _ in range(50):
        meter.count(right=False)
    sampled, trials = [SampledTokens(request_id="r", token_ids=[0])], []
    for number in range(300):
        length = meter.trial_length if meter.costs is None else 0
        trials.append(length)
        meter.observe(_step(number, num_tokens if length else 1, length), sampled, float(number))
    assert set(trials) == {0, 2}
    assert trials.count(2) == 2
