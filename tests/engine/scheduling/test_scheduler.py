"""One behaviour of the scheduler per test; `Replica` answers its steps with scripted tokens."""

from __future__ import annotations

import struct
from typing import Any

import msgspec
import pytest

from sempre.engine.scheduling import Limits, Scheduler
from sempre.engine.scheduling.request import Request
from sempre.engine.speculation import SpeculationPlan
from sempre.ipc.config import SpeculativeConfig
from sempre.ipc.errors import ProtocolError, RequestError
from sempre.ipc.messages import (
    NOT_READY,
    DraftRequest,
    ErrorInfo,
    ExecuteStep,
    LogprobRows,
    RequestOutputDelta,
    RequestSpec,
    SampledTokens,
    SamplingSpec,
    StepCosts,
    StepResult,
)

COSTS = StepCosts(step=1.0, row=0.0, result=0.0)
LOOKUP = SpeculativeConfig(method="ngram", num_speculative_tokens=7, adaptive=False)
DRAFT_MODEL = SpeculativeConfig(method="draft_model", num_speculative_tokens=4, adaptive=False)


def spec(request_id: str, prompt: int | list[int] = 4, *, ordinal: int = 0, **fields: Any) -> RequestSpec:
    """A request with a prompt of its own of the given length, unless the tokens are given."""
    prompt_token_ids = [1000 + 100 * ordinal + i for i in range(prompt)] if isinstance(prompt, int) else prompt
    of_spec = {name: fields.pop(name) for name in ("priority", "cache_salt") if name in fields}
    params = SamplingSpec(**{"max_tokens": 8, **fields})
    return RequestSpec(
        request_id=request_id, prompt_token_ids=prompt_token_ids, params=params, seed=7, ordinal=ordinal, **of_spec
    )


def rows(first: int, last: int) -> LogprobRows:
    """One column; every field tells the row's position."""
    packed = struct.pack(f"<{last - first + 1}i", *range(first, last + 1))
    return LogprobRows(
        num_rows=last - first + 1, width=1, token_ids=packed, logprobs=packed, ranks=packed, listed_ranks=packed
    )


class Replica:
    """A scheduler and the lengths its worker would know; every request samples 100, 101, … unless scripted."""

    def __init__(self, **changes: Any) -> None:
        arguments: dict[str, Any] = {
            "num_blocks": 64,
            "block_size": 4,
            "max_model_len": 100,
            "max_num_seqs": 8,
            "max_num_batched_tokens": 64,
            "policy": "fcfs",
            "enable_prefix_caching": True,
        }
        arguments |= changes
        limits = {name: arguments.pop(name) for name in Limits.__dataclass_fields__ if name in arguments}
        self.scheduler = Scheduler(Limits(**limits), **arguments)
        self.lengths: dict[str, int] = {}
        self.script: dict[str, list[int]] = {}

    def add(self, *specs: RequestSpec) -> None:
        for item in specs:
            self.scheduler.add(item)

    def schedule(self) -> ExecuteStep:
        step = self.scheduler.schedule()
        assert step is not None
        self.scheduler.check_invariants()
        return step

    def answer(self, step: ExecuteStep) -> StepResult:
        """What the worker returns."""
        for new in step.new_requests:
            self.lengths[new.request_id] = len(new.token_ids)
        sampled = []
        for item in step.scheduled:
            token_ids = []
            if item.num_computed_tokens + item.num_tokens == self.lengths[item.request_id]:
                script = self.script.get(item.request_id)
                token_ids = [script.pop(0)] if script else [100 + self.lengths[item.request_id]]
                self.lengths[item.request_id] += 1
            sampled.append(SampledTokens(request_id=item.request_id, token_ids=token_ids))
        return StepResult(rank=0, step_id=step.step_id, sampled=sampled, drafts=[[] for _ in step.drafts])

    def step(self) -> tuple[dict[str, int], list[RequestOutputDelta]]:
        """One step: tokens computed per request, and the deltas."""
        step = self.schedule()
        deltas = self.scheduler.update(step, self.answer(step))
        self.scheduler.check_invariants()
        return planned(step), deltas

    def finish(self) -> dict[str, RequestOutputDelta]:
        """Step until nothing is left; the last delta of each request."""
        last = {}
        while self.scheduler.has_unfinished():
            for delta in self.step()[1]:
                last[delta.request_id] = delta
        return last


def planned(step: ExecuteStep) -> dict[str, int]:
    return {item.request_id: item.num_tokens for item in step.scheduled}


# What is refused


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        (0, "The decoder prompt cannot be empty"),
        (
            100,
            r"^This model's maximum context length is 100 tokens\. The decoder prompt \(length 100\) plus .* is longer",
        ),
        (32, r"does not fit into the KV cache of 32 tokens\. .*kv_cache_memory_bytes"),
    ],
)
def test_a_prompt_that_can_never_run_is_refused(prompt: int, message: str) -> None:
    scheduler = Replica(num_blocks=8).scheduler
    with pytest.raises(RequestError, match=message) as refused:
        scheduler.add(spec("a", prompt))
    assert (refused.value.parameter, refused.value.value, refused.value.request_id) == ("prompt_token_ids", prompt, "a")
    assert not scheduler.has_unfinished()


def test_an_id_in_use_is_refused_until_its_request_ends() -> None:
    replica = Replica()
    replica.add(spec("a", max_tokens=1))
    with pytest.raises(RequestError, match="'a' belongs to an unfinished request"):
        replica.add(spec("a", ordinal=1))
    replica.step()
    replica.add(spec("a", ordinal=2))


# Order and budget


def test_prompts_leave_a_step_short_to_those_who_decode() -> None:
    replica = Replica(max_num_batched_tokens=16, max_prompt_tokens=4)
    replica.add(spec("a", 3), spec("b", 10, ordinal=1), spec("c", 2, ordinal=2))
    steps = [replica.step()[0] for _ in range(5)]
    assert steps == [
        {"a": 3, "b": 1},
        {"a": 1, "b": 4},
        {"a": 1, "b": 4},
        {"a": 1, "b": 1, "c": 2},
        {"a": 1, "b": 1, "c": 1},
    ]


def test_a_short_prompt_does_not_wait_for_the_long_ones_before_it() -> None:
    """Neither for one that is being computed nor for those that wait; each of these computes less for one step."""
    replica = Replica(max_num_batched_tokens=80, max_prompt_tokens=16, num_blocks=64)
    replica.add(spec("a", 40), spec("b", 30, ordinal=1), spec("c", 3, ordinal=2), spec("d", 4, ordinal=3))
    steps = [replica.step()[0] for _ in range(3)]
    assert steps == [{"a": 13, "c": 3}, {"a": 12, "c": 1, "d": 4}, {"a": 15, "b": 1, "c": 1, "d": 1}]
    assert {delta.finish_reason for delta in replica.finish().values()} == {"length"}


@pytest.mark.parametrize(
    ("prompts", "first"),
    [
        ([20, 5], {"a": 16}),  # more than a quarter of the room
        ([20, 4], {"a": 12, "b": 4}),
        ([12, 4], {"a": 12, "b": 4}),
        ([12, 5, 4, 1], {"a": 12, "c": 4}),
        ([4, 4, 4, 4, 4], {"a": 4, "b": 4, "c": 4, "d": 4}),  # as long as those before it
    ],
)
def test_how_short_a_prompt_must_be(prompts: list[int], first: dict[str, int]) -> None:
    replica = Replica(max_num_batched_tokens=80, max_prompt_tokens=16, num_blocks=64)
    replica.add(*(spec("abcde"[number], length, ordinal=number) for number, length in enumerate(prompts)))
    assert replica.step()[0] == first


def test_a_short_prompt_of_a_lower_priority_waits() -> None:
    replica = Replica(max_num_batched_tokens=80, max_prompt_tokens=16, num_blocks=64, policy="priority")
    replica.add(spec("a", 40), spec("b", 3, ordinal=1, priority=1), spec("c", 3, ordinal=2))
    assert replica.step()[0] == {"a": 13, "c": 3}
    assert replica.step()[0] == {"a": 16, "c": 1}


def test_scored_prompt_tokens_take_twice_the_room() -> None:
    """Since a row of logits and its log-probabilities are computed for each; with the last of them that ends."""
    replica = Replica(max_num_batched_tokens=80, max_prompt_tokens=16, num_blocks=64)
    replica.add(spec("a", 20, prompt_logprobs=5), spec("b", 40, ordinal=1))
    steps = [planned(replica.schedule()) for _ in range(4)]
    assert steps == [{"a": 8}, {"a": 8}, {"a": 4, "b": 8}, {"a": 1, "b": 16}]


def test_tokens_far_from_the_beginning_take_more_room() -> None:
    """Since attention reads all tokens before them: here, one beside 16 costs twice as much as the first."""
    limits = {"max_num_batched_tokens": 80, "max_prompt_tokens": 16, "num_blocks": 64}
    replica = Replica(**limits, attention_parity=16)
    replica.add(spec("a", 60), spec("b", 40, ordinal=1))
    steps = [planned(replica.schedule()) for _ in range(6)]
    # 11 + 11²/32 is 14; at 35, each costs 1 + 37/16; where "a" is cut, nothing of "b" is computed
    assert steps == [{"a": num_tokens} for num_tokens in (11, 8, 6, 5, 5, 4)]
    even = Replica(**limits)
    even.add(spec("a", 60))
    assert [planned(even.schedule())["a"] for _ in range(4)] == [16, 16, 16, 12]


@pytest.mark.parametrize("parity", [None, 1, 7, 1700, 10**9])
@pytest.mark.parametrize("scores", [False, True])
def test_the_room_of_a_prompt_is_used_and_exceeded_by_one_token_at_most(parity: int | None, scores: bool) -> None:
    limits = Limits(10**6, 10**6, 16, 8, 4096, attention_parity=parity)
    request = Request(spec("a", 100_000, **({"prompt_logprobs": 1} if scores else {})), 0, limits)
    for start in (0, 1, 16, 1900, 90_000):
        assert request.prompt_room(start, 0) == 0
        for budget in (1, 2, 16, 240, 2048):
            room = request.prompt_room(start, budget)
            assert room >= 1
            assert request.prompt_cost(start, room - 1) < budget <= request.prompt_cost(start, room + 1)


def test_without_a_limit_of_their_own_prompts_fill_the_step() -> None:
    replica = Replica(max_num_batched_tokens=16)
    replica.add(spec("a", 3), spec("b", 10, ordinal=1), spec("c", 2, ordinal=2))
    assert replica.step()[0] == {"a": 3, "b": 10, "c": 2}


def test_a_long_prompt_is_cut_and_samples_only_at_its_end() -> None:
    replica = Replica(max_num_batched_tokens=4)
    replica.add(spec("a", 10))
    assert replica.step() == ({"a": 4}, [])
    assert replica.step() == ({"a": 4}, [])
    computed, deltas = replica.step()
    assert computed == {"a": 2}
    assert [delta.token_ids for delta in deltas] == [[110]]


def test_running_requests_go_on_decoding_beside_a_long_prompt() -> None:
    replica = Replica(max_num_batched_tokens=6)
    replica.add(spec("a", 4))
    replica.step()
    replica.add(spec("b", 12, ordinal=1))
    assert [replica.step()[0] for _ in range(3)] == [{"a": 1, "b": 5}, {"a": 1, "b": 5}, {"a": 1, "b": 2}]


def test_a_long_prompt_leaves_a_token_to_each_request_after_it() -> None:
    replica = Replica(max_num_batched_tokens=6, policy="priority")
    replica.add(spec("low", 4, priority=1))
    replica.step()
    replica.add(spec("high", 12, ordinal=1, priority=0))
    assert replica.step()[0] == {"low": 1, "high": 5}
    assert replica.step()[0] == {"high": 5, "low": 1}


def test_at_most_max_num_seqs_run_in_the_order_of_their_ordinals() -> None:
    replica = Replica(max_num_seqs=2)
    replica.add(*(spec(name, ordinal=ordinal, max_tokens=2) for name, ordinal in [("c", 2), ("a", 0), ("b", 1)]))
    steps = [list(replica.step()[0]) for _ in range(4)]
    assert steps == [["a", "b"], ["a", "b"], ["c"], ["c"]]


@pytest.mark.parametrize(("policy", "first"), [("fcfs", "a"), ("priority", "b")])
def test_priority_counts_only_under_its_policy(policy: str, first: str) -> None:
    replica = Replica(max_num_seqs=1, policy=policy)
    replica.add(spec("a", priority=5), spec("b", ordinal=1, priority=-5))
    assert list(replica.step()[0]) == [first]


def test_none_overtakes_the_first_waiting_request() -> None:
    replica = Replica(num_blocks=4, max_model_len=16)
    replica.add(spec("a", 8), spec("b", 12, ordinal=1), spec("c", 1, ordinal=2))
    assert list(replica.step()[0]) == ["a"]


# Pauses


def test_a_paused_request_leaves_its_place_and_its_blocks_to_others_until_it_goes_on() -> None:
    replica = Replica(num_blocks=4, max_num_seqs=1, enable_prefix_caching=False)
    replica.add(spec("a", 7, max_tokens=3), spec("b", 7, ordinal=1, max_tokens=3))
    assert replica.step()[0] == {"a": 7}
    ahead = replica.schedule()
    replica.scheduler.pause("a")
    replica.scheduler.pause("a")
    replica.scheduler.check_invariants()
    assert [delta.token_ids for delta in replica.scheduler.update(ahead, replica.answer(ahead))] == [[108]], (
        "still comes"
    )
    assert [replica.step()[0] for _ in range(3)] == [{"b": 7}, {"b": 1}, {"b": 1}]
    assert not replica.scheduler.has_unfinished()
    assert replica.scheduler.schedule() is None
    for _ in range(2):
        replica.scheduler.resume("a")
    computed, deltas = replica.step()
    assert (computed, [(delta.token_ids, delta.finish_reason) for delta in deltas]) == ({"a": 9}, [([109], "length")])


def test_a_paused_request_can_be_aborted_and_survives_a_crash() -> None:
    replica = Replica(num_blocks=16)
    replica.add(spec("a", 7, max_tokens=3), spec("b", 7, ordinal=1, max_tokens=3))
    replica.step()
    replica.schedule()
    for name in ("a", "b", "unknown"):
        replica.scheduler.pause(name)
    replica.scheduler.resume("unknown")
    assert replica.scheduler.restart("killed") == []
    assert replica.scheduler.schedule() is None, "not even alone, as one that may have caused the crash"
    ended = replica.scheduler.abort("b")
    assert ended is not None
    replica.scheduler.check_invariants()
    replica.scheduler.resume("a")
    assert replica.finish()["a"].finish_reason == "length"
    assert replica.scheduler.num_unfinished == 0


# Preemption


def test_the_last_request_is_preempted_and_computed_again() -> None:
    replica = Replica(num_blocks=4, enable_prefix_caching=False)
    replica.add(spec("a", 7, max_tokens=6), spec("b", 7, ordinal=1, max_tokens=6))
    assert replica.step()[0] == {"a": 7, "b": 7}
    assert replica.step()[0] == {"a": 1, "b": 1}
    assert replica.step()[0] == {"a": 1}
    assert replica.scheduler.stats().num_preemptions == 1
    while "b" not in (step := replica.schedule()).scheduled[0].request_id:
        replica.scheduler.update(step, replica.answer(step))
    again = step.scheduled[0]
    assert (again.num_computed_tokens, again.num_tokens, again.block_table_start) == (0, 9, 0)
    assert len(again.block_ids) == 3
    assert step.new_requests == []
    replica.scheduler.update(step, replica.answer(step))
    assert replica.finish()["b"].finish_reason == "length"
    assert replica.scheduler.stats().generation_tokens == 12


def test_the_last_request_preempts_itself_for_nobody_else() -> None:
    replica = Replica(num_blocks=4, enable_prefix_caching=False)
    replica.add(spec("a", 6), spec("b", 8, ordinal=1))
    replica.step()
    assert replica.step()[0] == {"a": 1}


def test_a_preempted_request_finds_its_own_blocks_again() -> None:
    replica = Replica(num_blocks=4)
    replica.add(spec("a", 7, max_tokens=4), spec("b", 7, ordinal=1, max_tokens=6))
    for _ in range(4):
        replica.step()
    step = replica.schedule()
    assert [(item.request_id, item.num_computed_tokens) for item in step.scheduled] == [("b", 4)], "its tail went to a"


def test_a_preempted_request_goes_on_before_those_that_came_after_it() -> None:
    replica = Replica(num_blocks=4, enable_prefix_caching=False)
    replica.add(spec("a", 7, max_tokens=6), spec("b", 7, ordinal=1, max_tokens=6))
    for _ in range(2):
        replica.step()
    replica.add(spec("c", 1, ordinal=2, max_tokens=2))
    assert replica.step()[0] == {"a": 1}, "b left"
    steps = [replica.step()[0] for _ in range(4)]
    assert steps == [{"a": 1}, {"a": 1}, {"a": 1}, {"b": 9, "c": 1}], "c fits beside a, but b was first"


def test_nobody_is_admitted_in_a_step_that_preempts() -> None:
    replica = Replica(num_blocks=4, max_num_seqs=2, policy="priority", enable_prefix_caching=False)
    replica.add(spec("a", 7), spec("b", 7, ordinal=1, priority=2))
    replica.step()
    replica.add(spec("c", 1, ordinal=2, priority=1))
    replica.step()
    assert replica.step()[0] == {"a": 1}, "b left"
    assert replica.step()[0] == {"a": 1, "c": 1}


def test_a_planned_step_does_not_change_any_more() -> None:
    replica = Replica()
    replica.add(spec("a", 4))
    steps = [replica.schedule(), replica.schedule()]
    assert [step.scheduled[0].block_ids for step in steps] == [[0], [1]]


def test_a_request_that_outgrows_the_pool_ends_with_an_error_whoever_runs() -> None:
    lasts = []
    for others in ([], [spec("b", 7, ordinal=1, max_tokens=2)]):
        replica = Replica(num_blocks=4, max_model_len=50)
        replica.add(spec("a", 10, max_tokens=30), *others)
        lasts.append(replica.finish()["a"])
        assert replica.scheduler.stats().generation_tokens == 7 + 2 * len(others)
    assert lasts[0] == lasts[1]
    assert lasts[0].finish_reason == "error"
    assert lasts[0].token_ids == [116]
    error = lasts[0].error
    assert error is not None
    assert "17 tokens and outgrew the KV cache of 16 tokens (num_blocks=4, block_size=4)" in error.message
    assert "kv_cache_memory_bytes" in error.message


# Ends


@pytest.mark.parametrize(
    ("params", "script", "num_tokens", "reason"),
    [
        ({"eos_token_ids": [2]}, [5, 2, 5], 2, ("stop", None)),
        ({"stop_token_ids": [3]}, [5, 3, 5], 2, ("stop", 3)),
        ({"eos_token_ids": [2], "stop_token_ids": [2, 3]}, [5, 2], 2, ("stop", None)),
        ({"stop_token_ids": [3], "min_tokens": 3}, [5, 3, 3, 5], 3, ("stop", 3)),
        ({"eos_token_ids": [2], "min_tokens": 3}, [2, 2, 5, 2], 4, ("stop", None)),
        ({"eos_token_ids": [2], "min_tokens": 3, "grammar": "start: /.*/"}, [5, 2], 2, ("stop", None)),
        ({"eos_token_ids": [2], "max_tokens": 3}, [5, 5, 2], 3, ("stop", None)),
        ({"max_tokens": 3}, [5, 5, 5], 3, ("length", None)),
    ],
)
def test_how_a_request_ends(
    params: dict[str, Any], script: list[int], num_tokens: int, reason: tuple[str, int | None]
) -> None:
    replica = Replica()
    replica.script["a"] = script
    replica.add(spec("a", **params))
    last = replica.finish()["a"]
    assert (last.finish_reason, last.stop_reason) == reason
    assert replica.scheduler.stats().generation_tokens == num_tokens


def test_the_model_length_caps_max_tokens() -> None:
    replica = Replica(max_model_len=6)
    replica.add(spec("a", 4, max_tokens=50))
    assert replica.finish()["a"].finish_reason == "length"
    assert replica.scheduler.stats().generation_tokens == 2


def drafting_replica(drafts: list[int], **params: Any) -> tuple[Replica, ExecuteStep]:
    """A replica with drafts for the tokens after the first one, and the step that verifies them."""
    replica = Replica(speculation=SpeculationPlan(DRAFT_MODEL, steps_ahead=False, costs=COSTS), max_draft_tokens=8)
    replica.add(spec("a", **params))
    step = replica.schedule()
    assert step.drafts == [DraftRequest(request_id="a", num_drafts=4)]
    result = msgspec.structs.replace(falsified(replica.answer(step), token_ids=[9]), drafts=[drafts])
    replica.scheduler.update(step, result)
    return replica, replica.schedule()


def test_several_tokens_are_cut_at_the_first_end() -> None:
    replica, step = drafting_replica([5, 3, 6], stop_token_ids=[3], max_tokens=9)
    assert step.scheduled[0].draft_token_ids == [5, 3, 6]
    sampled = [SampledTokens(request_id="a", token_ids=[5, 3, 6, 3], logprobs=rows(0, 3))]
    deltas = replica.scheduler.update(step, StepResult(rank=0, step_id=1, sampled=sampled, drafts=[[]]))
    expected = RequestOutputDelta(
        request_id="a", token_ids=[5, 3], logprobs=rows(0, 1), finish_reason="stop", stop_reason=3
    )
    assert deltas == [expected]


def test_after_rejected_drafts_the_request_continues_after_its_last_token() -> None:
    replica, step = drafting_replica([5, 6, 7], max_tokens=9)
    assert (step.scheduled[0].num_computed_tokens, step.scheduled[0].num_tokens) == (4, 4)
    sampled = [SampledTokens(request_id="a", token_ids=[5, 8])]
    replica.scheduler.update(step, StepResult(rank=0, step_id=1, sampled=sampled, drafts=[[]]))
    (item,) = replica.schedule().scheduled
    assert (item.num_computed_tokens, item.num_tokens) == (6, 1)
    stats = replica.scheduler.stats()
    assert (stats.num_drafts, stats.num_draft_tokens, stats.num_accepted_tokens) == (1, 3, 1)
    assert stats.num_accepted_tokens_per_pos == [1]


def test_a_block_that_ends_with_a_rejected_draft_is_not_found() -> None:
    """Its last slot holds keys and values of the draft, not of the token sampled in its place."""
    replica, step = drafting_replica([5, 6, 7], max_tokens=9)
    (item,) = step.scheduled
    assert (item.num_computed_tokens, item.num_tokens) == (4, 4), "the last draft is at the end of the second block"
    sampled = [SampledTokens(request_id="a", token_ids=[5, 6, 8])]
    replica.scheduler.update(step, StepResult(rank=0, step_id=1, sampled=sampled, drafts=[[]]))
    replica.add(spec("b", [1000, 1001, 1002, 1003, 9, 5, 6, 8, 1], ordinal=1))
    step = replica.schedule()
    assert [(item.request_id, item.num_computed_tokens) for item in step.scheduled] == [("a", 7), ("b", 4)]


def test_drafts_never_reach_past_the_last_token_a_request_may_have() -> None:
    _, step = drafting_replica([5, 6, 7], max_tokens=3)
    assert step.scheduled[0].draft_token_ids == [5]


def lookup_replica(**changes: Any) -> Replica:
    """A replica that drafts for repetitive requests."""
    plan = SpeculationPlan(LOOKUP, steps_ahead=True, costs=COSTS)
    return Replica(speculation=plan, max_draft_tokens=8, enable_prefix_caching=False, **changes)


def test_drafts_leave_a_token_to_each_request_after_them() -> None:
    replica = lookup_replica(max_num_batched_tokens=6)
    replica.script["a"] = [5]
    replica.add(spec("a", [5, 6, 5, 6], max_tokens=20), spec("b", 2, ordinal=1))
    assert replica.step()[0] == {"a": 4, "b": 2}
    assert planned(replica.schedule()) == {"a": 5, "b": 1}


def test_nothing_is_planned_ahead_of_a_result_that_a_request_needs_to_draft() -> None:
    """Two halves of a batch in turn would take the time of two batches."""
    replica = lookup_replica()
    replica.script["a"] = [5]
    replica.add(spec("a", [5, 6, 5, 6], max_tokens=20), spec("b", 2, ordinal=1))
    replica.step()
    verifying = replica.schedule()
    assert planned(verifying) == {"a": 8, "b": 1}
    assert replica.scheduler.schedule() is None
    sampled = [SampledTokens(request_id="a", token_ids=[6, 9]), replica.answer(verifying).sampled[1]]
    replica.scheduler.update(verifying, StepResult(rank=0, step_id=verifying.step_id, sampled=sampled))
    assert planned(replica.schedule()) == {"a": 1, "b": 1}


def test_stopped_while_its_drafts_are_verified_it_waits_for_the_result() -> None:
    replica = lookup_replica(num_blocks=6)
    replica.script["a"] = [5]
    replica.add(spec("free", 7), spec("a", [5, 6, 5, 6, 5, 6], ordinal=1, max_tokens=20))
    assert replica.step()[0] == {"free": 7, "a": 6}
    verifying = replica.schedule()
    assert verifying.scheduled[1].draft_token_ids == [6, 5, 6, 5, 6, 5, 6]
    replica.scheduler.pause("a")
    replica.scheduler.resume("a")
    assert planned(replica.schedule()) == {"free": 1}
    replica.scheduler.abort("free")
    assert replica.scheduler.schedule() is None, "there is room, and nobody knows how long the request is"
    sampled = [replica.answer(verifying).sampled[0], SampledTokens(request_id="a", token_ids=[6, 9])]
    (delta,) = replica.scheduler.update(verifying, StepResult(rank=0, step_id=verifying.step_id, sampled=sampled))
    assert (delta.request_id, delta.token_ids) == ("a", [6, 9])
    assert planned(replica.schedule()) == {"a": 9}


@pytest.mark.parametrize(("salt", "drafts"), [("a", [104, 105, 106, 107]), ("b", []), (None, [])])
def test_nothing_is_drafted_from_outputs_of_another_salt(salt: str | None, drafts: list[int]) -> None:
    suffix = SpeculativeConfig(method="suffix", num_speculative_tokens=4, prompt_lookup_min=1, adaptive=False)
    plan = SpeculationPlan(suffix, steps_ahead=False, costs=COSTS)
    replica = Replica(speculation=plan, max_draft_tokens=8, enable_prefix_caching=False)
    replica.add(spec("former", 3, cache_salt="a"))
    assert replica.finish()["former"].finish_reason == "length"
    replica.script["later"] = [103]
    replica.add(spec("later", 5, ordinal=1, cache_salt=salt))
    replica.step()
    assert replica.schedule().scheduled[0].draft_token_ids == drafts


@pytest.mark.parametrize("token_ids", [[5, 7, 6], [6, 6], [5, 6, 7, 8, 9]])
def test_tokens_that_do_not_follow_the_drafts_are_refused(token_ids: list[int]) -> None:
    replica, step = drafting_replica([5, 6, 7], max_tokens=9)
    sampled = [SampledTokens(request_id="a", token_ids=token_ids)]
    with pytest.raises(ProtocolError, match=r"expected a beginning of the drafts \[5, 6, 7\] and one token"):
        replica.scheduler.update(step, StepResult(rank=0, step_id=1, sampled=sampled, drafts=[[]]))


def not_ready(step: ExecuteStep, result: StepResult, request_id: str) -> StepResult:
    """The worker's answer when it could not sample for one request."""
    error = ErrorInfo(type=NOT_READY, message="later")
    sampled = [
        SampledTokens(request_id=request_id, error=error) if item.request_id == request_id else item
        for item in result.sampled
    ]
    return msgspec.structs.replace(result, sampled=sampled)


def test_a_token_that_is_not_ready_is_sampled_in_a_later_step_and_nobody_else_waits() -> None:
    replica = Replica()
    form = spec("form", 6, max_tokens=3, grammar="x")
    replica.add(form, spec("other", 5, ordinal=1, max_tokens=4))
    for expected in ({"form": 6, "other": 5}, {"form": 1, "other": 1}, {"form": 1, "other": 1}):
        step = replica.schedule()
        assert planned(step) == expected
        lengths = dict(replica.lengths)
        answer = not_ready(step, replica.answer(step), "form")
        replica.lengths["form"] = lengths.get("form", 6)
        deltas = replica.scheduler.update(step, answer)
        replica.scheduler.check_invariants()
        assert [delta.request_id for delta in deltas] == ["other"]
    assert [item.num_computed_tokens for item in step.scheduled] == [5, 6]
    last = replica.finish()
    assert last["form"].finish_reason == "length"
    assert replica.scheduler.stats().generation_tokens == 7


def test_a_prompt_whose_log_probabilities_are_wanted_is_computed_again_when_its_token_is_not_ready() -> None:
    replica = Replica()
    replica.add(spec("form", 6, max_tokens=3, grammar="x", prompt_logprobs=0))
    for _ in range(2):
        step = replica.schedule()
        [item] = step.scheduled
        assert (item.num_computed_tokens, item.num_tokens, item.prompt_logprobs_start) == (0, 6, 1)
        answer = not_ready(step, replica.answer(step), "form")
        replica.lengths["form"] = 6
        assert replica.scheduler.update(step, answer) == []
        replica.scheduler.check_invariants()
    step = replica.schedule()
    [sampled] = replica.answer(step).sampled
    result = StepResult(
        rank=0, step_id=step.step_id, sampled=[msgspec.structs.replace(sampled, prompt_logprobs=rows(1, 5))]
    )
    [delta] = replica.scheduler.update(step, result)
    assert delta.prompt_logprobs == rows(1, 5)
    assert replica.finish()["form"].finish_reason == "length"


def test_a_token_that_is_not_ready_of_a_request_that_was_aborted() -> None:
    replica = Replica()
    replica.add(spec("form", 6, grammar="x"))
    step = replica.schedule()
    replica.scheduler.abort("form")
    assert replica.scheduler.update(step, not_ready(step, replica.answer(step), "form")) == []
    assert not replica.scheduler.has_unfinished()


def test_an_error_ends_one_request_and_leaves_nothing_findable_of_its_step() -> None:
    replica = Replica()
    prompt = list(range(12))
    replica.add(spec("a", prompt), spec("b", 4, ordinal=1))
    step = replica.schedule()
    result = replica.answer(step)
    error = ErrorInfo(type="ValueError", message="no")
    failed = [SampledTokens(request_id="a", error=error), result.sampled[1]]
    deltas = replica.scheduler.update(step, msgspec.structs.replace(result, sampled=failed))
    assert [(delta.request_id, delta.finish_reason, delta.error) for delta in deltas] == [
        ("a", "error", error),
        ("b", None, None),
    ]
    replica.add(spec("c", prompt, ordinal=2))
    step = replica.schedule()
    assert step.finished_request_ids == ["a"]
    assert [item.num_computed_tokens for item in step.scheduled if item.request_id == "c"] == [0]


# Aborts and ids


def test_abort_ends_waiting_and_running_requests_and_ignores_unknown_ones() -> None:
    replica = Replica(max_num_seqs=1)
    replica.add(spec("a"), spec("b", ordinal=1), spec("c", ordinal=2))
    replica.step()
    for name in ("a", "b"):
        delta = replica.scheduler.abort(name)
        assert delta == RequestOutputDelta(request_id=name, finish_reason="abort")
        assert replica.scheduler.abort(name) is None
    step = replica.schedule()
    assert step.finished_request_ids == ["a"], "the worker never saw b"
    assert planned(step) == {"c": 4}


def test_an_id_used_again_is_not_given_the_result_of_its_former_request() -> None:
    replica = Replica()
    replica.add(spec("a", 4))
    former = replica.schedule()
    replica.scheduler.abort("a")
    replica.add(spec("a", 6, ordinal=1))
    assert replica.scheduler.update(former, replica.answer(former)) == []
    step = replica.schedule()
    assert step.finished_request_ids == ["a"]
    assert [new.token_ids for new in step.new_requests] == [list(range(1100, 1106))]
    assert planned(step) == {"a": 6}


# Results that are refused


def falsified(result: StepResult, **changes: Any) -> StepResult:
    first, *others = result.sampled
    return msgspec.structs.replace(result, sampled=[msgspec.structs.replace(first, **changes), *others])


@pytest.mark.parametrize(
    ("falsify", "message"),
    [
        (lambda result: msgspec.structs.replace(result, step_id=5), r"step_id: expected 0.*found 5"),
        (lambda result: msgspec.structs.replace(result, sampled=[]), r"sampled: expected 2 entries in step 0, found 0"),
        (lambda result: falsified(result, request_id="x"), r"sampled\[0\].request_id: expected request 'a'.*'x'"),
        (lambda result: falsified(result, token_ids=[]), r"token_ids: expected at least one token in step 0, found 0"),
        (lambda result: falsified(result, prompt_logprobs=rows(1, 2)), r"prompt_logprobs: expected 3 rows.*2 rows"),
    ],
)
def test_a_result_that_does_not_answer_the_step_is_refused_and_changes_nothing(falsify: Any, message: str) -> None:
    replica = Replica()
    replica.add(spec("a", prompt_logprobs=0), spec("b", ordinal=1))
    step = replica.schedule()
    right = falsified(replica.answer(step), prompt_logprobs=rows(1, 3))
    with pytest.raises(ProtocolError, match=message):
        replica.scheduler.update(step, falsify(right))
    deltas = replica.scheduler.update(step, right)
    assert [delta.token_ids for delta in deltas] == [[104], [104]]


def test_a_token_for_an_unfinished_prompt_is_refused() -> None:
    replica = Replica(max_num_batched_tokens=2)
    replica.add(spec("a"))
    step = replica.schedule()
    with pytest.raises(ProtocolError, match="expected no token in step 0, found 1 tokens"):
        replica.scheduler.update(step, falsified(replica.answer(step), token_ids=[1]))


def test_a_result_without_a_step_is_refused() -> None:
    replica = Replica()
    replica.add(spec("a", max_tokens=1))
    step = replica.schedule()
    result = replica.answer(step)
    replica.scheduler.update(step, result)
    with pytest.raises(ProtocolError, match="no step is in flight, found 0"):
        replica.scheduler.update(step, result)


# Prefix cache


def test_full_blocks_are_reused_and_reported_once() -> None:
    replica = Replica()
    prompt = list(range(10))
    replica.add(spec("a", prompt, max_tokens=1))
    replica.step()
    replica.add(spec("b", [*prompt[:8], 77, 78, 79], ordinal=1))
    step = replica.schedule()
    assert (step.scheduled[0].num_computed_tokens, step.scheduled[0].num_tokens) == (8, 3)
    (first,) = replica.scheduler.update(step, replica.answer(step))
    assert first.num_cached_tokens == 8
    assert [delta.num_cached_tokens for delta in replica.step()[1]] == [0]
    stats = replica.scheduler.stats()
    assert (stats.prefix_cache_queries, stats.prefix_cache_hits) == (21, 8)
    assert (stats.prompt_tokens, stats.cached_prompt_tokens) == (21, 8)


def test_the_last_token_is_always_computed() -> None:
    replica = Replica()
    prompt = list(range(8))
    replica.add(spec("a", prompt, max_tokens=1))
    replica.step()
    replica.add(spec("b", prompt, ordinal=1))
    assert replica.step()[0] == {"b": 4}


@pytest.mark.parametrize(
    ("changes", "first", "second", "num_cached"),
    [
        ({}, {"cache_salt": "x"}, {"cache_salt": "x"}, 8),
        ({}, {"cache_salt": "x"}, {"cache_salt": "y"}, 0),
        ({}, {"cache_salt": "x"}, {}, 0),
        ({}, {}, {"cache_salt": ""}, 0),
        ({}, {}, {"prompt_logprobs": 0}, 0),
        ({}, {"prompt_logprobs": 0}, {}, 8),
        ({"enable_prefix_caching": False}, {}, {}, 0),
    ],
)
def test_who_may_reuse_whose_blocks(
    changes: dict[str, Any], first: dict[str, Any], second: dict[str, Any], num_cached: int
) -> None:
    replica = Replica(**changes)
    prompt = list(range(10))
    replica.add(spec("a", prompt, max_tokens=1, **first))
    step = replica.schedule()
    asked = "prompt_logprobs" in first
    replica.scheduler.update(step, falsified(replica.answer(step), prompt_logprobs=rows(1, 9) if asked else None))
    replica.add(spec("b", prompt, ordinal=1, **second))
    assert replica.schedule().scheduled[0].num_computed_tokens == num_cached


def test_a_block_is_not_found_before_its_step_has_returned() -> None:
    replica = Replica()
    prompt = list(range(10))
    replica.add(spec("a", prompt))
    step = replica.schedule()
    replica.add(spec("b", prompt, ordinal=1))
    assert planned(replica.schedule())["b"] == 10
    replica.scheduler.update(step, replica.answer(step))
    replica.add(spec("c", prompt, ordinal=2))
    assert planned(replica.schedule())["c"] == 2


def test_a_later_chunk_is_not_found_before_its_step_has_returned() -> None:
    replica = Replica(max_num_batched_tokens=8)
    prompt = list(range(20))
    replica.add(spec("a", prompt))
    replica.step()
    assert planned(replica.schedule()) == {"a": 8}
    replica.scheduler.abort("a")
    replica.add(spec("b", prompt, ordinal=1))
    assert replica.schedule().scheduled[0].num_computed_tokens == 8


def test_a_block_is_not_found_before_its_last_token_is_written() -> None:
    replica = Replica(max_num_batched_tokens=6)
    prompt = list(range(12))
    replica.add(spec("a", prompt))
    step = replica.schedule()
    replica.scheduler.update(step, replica.answer(step))
    replica.scheduler.abort("a")
    replica.add(spec("b", prompt, ordinal=1))
    assert replica.schedule().scheduled[0].num_computed_tokens == 4


def test_equal_blocks_computed_in_one_step_are_kept_once() -> None:
    replica = Replica()
    prompt = list(range(9))
    replica.add(spec("a", prompt, max_tokens=1), spec("b", prompt, ordinal=1, max_tokens=1))
    assert replica.step()[0] == {"a": 9, "b": 9}
    replica.add(spec("c", prompt, ordinal=2), spec("d", prompt, ordinal=3))
    step = replica.schedule()
    assert planned(step) == {"c": 1, "d": 1}
    c, d = step.scheduled
    assert c.block_ids[:2] == d.block_ids[:2]
    assert c.block_ids[2] != d.block_ids[2]


def test_the_longest_unused_contents_are_evicted_first_and_tails_before_heads() -> None:
    replica = Replica(num_blocks=6, max_model_len=24)
    old, new = list(range(8)), list(range(50, 58))
    replica.add(spec("a", old, max_tokens=1))
    replica.step()
    replica.add(spec("b", new, ordinal=1, max_tokens=1))
    replica.step()
    replica.add(spec("c", 11, ordinal=2, max_tokens=1))
    replica.step()  # takes two free blocks and the tail of `old`, and leaves one block that was never full
    replica.add(spec("d", [*new, 1], ordinal=3), spec("e", [*old, 1], ordinal=4))
    step = replica.schedule()
    assert [(item.request_id, item.num_computed_tokens) for item in step.scheduled] == [("d", 8), ("e", 4)]


def test_generated_tokens_are_found_too() -> None:
    replica = Replica()
    replica.script["a"] = [7, 8, 9, 10]
    replica.add(spec("a", [1, 2, 3, 4, 5, 6], max_tokens=4))
    replica.finish()
    replica.add(spec("b", [1, 2, 3, 4, 5, 6, 7, 8, 9, 10], ordinal=1))
    assert replica.schedule().scheduled[0].num_computed_tokens == 8


def test_the_prefix_cache_is_reset_only_while_no_request_holds_blocks() -> None:
    replica = Replica()
    prompt = list(range(10))
    replica.add(spec("a", prompt))
    replica.step()
    assert not replica.scheduler.reset_prefix_cache()
    replica.finish()
    assert replica.scheduler.reset_prefix_cache()
    replica.add(spec("b", prompt, ordinal=1))
    assert replica.step()[0] == {"b": 10}


# Prompt log-probabilities


def test_prompt_rows_are_asked_for_once_also_after_preemption() -> None:
    replica = Replica(num_blocks=4, max_num_batched_tokens=11, enable_prefix_caching=False)
    replica.add(spec("a", 5, max_tokens=6), spec("b", 7, ordinal=1, max_tokens=3, prompt_logprobs=0))
    starts, reported = [], []
    while replica.scheduler.has_unfinished():
        step = replica.schedule()
        result = replica.answer(step)
        sampled = list(result.sampled)
        for index, item in enumerate(step.scheduled):
            if item.request_id != "b":
                continue
            starts.append((item.num_computed_tokens, item.prompt_logprobs_start))
            first = max(item.num_computed_tokens + 1, item.prompt_logprobs_start)
            last = min(item.num_computed_tokens + item.num_tokens, 6)
            if first <= last:
                sampled[index] = msgspec.structs.replace(sampled[index], prompt_logprobs=rows(first, last))
        for delta in replica.scheduler.update(step, msgspec.structs.replace(result, sampled=sampled)):
            if delta.prompt_logprobs is not None:
                packed = delta.prompt_logprobs.ranks
                reported += struct.unpack(f"<{len(packed) // 4}i", packed)
    assert replica.scheduler.stats().num_preemptions == 1
    assert starts[:2] == [(0, 1), (3, 4)]
    assert (0, 7) in starts[2:], "computed again, with nothing left to report"
    assert reported == [1, 2, 3, 4, 5, 6]


def test_prompt_rows_are_asked_for_once_also_after_a_crash() -> None:
    replica = Replica(max_num_batched_tokens=8)
    replica.add(spec("a", 10, prompt_logprobs=0))
    step = replica.schedule()
    replica.scheduler.update(step, falsified(replica.answer(step), prompt_logprobs=rows(1, 4)))
    crash(replica)
    starts = []
    for reported in (None, rows(5, 8), rows(9, 9)):
        step = replica.schedule()
        starts.append((step.scheduled[0].num_computed_tokens, step.scheduled[0].prompt_logprobs_start))
        replica.scheduler.update(step, falsified(replica.answer(step), prompt_logprobs=reported))
    assert starts == [(0, 5), (4, 5), (8, 9)]


# A fresh worker


def test_restart_sends_every_token_again_and_counts_nothing_twice() -> None:
    replica = Replica()
    prompt = list(range(10))
    replica.add(spec("a", prompt, max_tokens=4), spec("b", 4, ordinal=1))
    replica.step()
    lost = replica.schedule()
    replica.scheduler.abort("b")
    replica.scheduler.restart("killed")
    replica.scheduler.check_invariants()
    with pytest.raises(ProtocolError, match="no step is in flight"):
        replica.scheduler.update(lost, replica.answer(lost))
    step = replica.schedule()
    assert step.step_id > lost.step_id
    assert step.finished_request_ids == []
    (new,) = step.new_requests
    assert (new.token_ids, new.num_prompt_tokens, new.seed) == ([*prompt, 110], 10, 7)
    (item,) = step.scheduled
    assert (item.num_computed_tokens, item.num_tokens) == (0, 11), "the cached blocks died with the worker"
    replica.scheduler.update(step, replica.answer(step))
    replica.finish()
    stats = replica.scheduler.stats()
    assert (stats.prompt_tokens, stats.generation_tokens) == (14, 1 + 4)


# Steps ahead of their results


def test_a_step_ahead_plans_the_token_in_flight_and_never_past_max_tokens() -> None:
    replica = Replica()
    replica.add(spec("a", 4, max_tokens=3))
    steps = [replica.schedule() for _ in range(3)]
    positions = [(step.scheduled[0].num_computed_tokens, step.scheduled[0].num_tokens) for step in steps]
    assert positions == [(0, 4), (4, 1), (5, 1)]
    assert replica.scheduler.schedule() is None, "its last token is in flight"
    deltas = [replica.scheduler.update(step, replica.answer(step))[0] for step in steps]
    assert [delta.token_ids for delta in deltas] == [[104], [105], [106]]
    assert [delta.finish_reason for delta in deltas] == [None, None, "length"]


def test_a_step_ahead_of_an_end_is_ignored() -> None:
    replica = Replica()
    replica.script["a"] = [2]
    replica.add(spec("a", eos_token_ids=[2]))
    first, second = replica.schedule(), replica.schedule()
    (delta,) = replica.scheduler.update(first, replica.answer(first))
    assert delta.finish_reason == "stop"
    assert replica.scheduler.update(second, replica.answer(second)) == []
    assert not replica.scheduler.has_unfinished()
    replica.scheduler.check_invariants()


def test_a_result_from_before_a_preemption_offers_no_block_of_the_new_admission() -> None:
    replica = Replica(num_blocks=5, max_num_batched_tokens=8)
    replica.add(spec("a", 4, max_tokens=9), spec("b", 12, ordinal=1))
    steps = [replica.schedule() for _ in range(4)]
    assert [planned(step) for step in steps] == [{"a": 4, "b": 4}, {"a": 1, "b": 7}, {"a": 1, "b": 1}, {"a": 1}]
    replica.scheduler.abort("a")
    steps.append(replica.schedule())
    assert planned(steps[4]) == {"b": 8}
    for step in steps[:4]:
        replica.scheduler.update(step, replica.answer(step))
        replica.scheduler.check_invariants()
    replica.add(spec("c", [*range(1100, 1108), 1], ordinal=2))
    steps.append(replica.schedule())
    assert planned(steps[5]) == {"b": 5}, "c finds nothing and does not fit"
    replica.scheduler.update(steps[4], replica.answer(steps[4]))
    steps.append(replica.schedule())
    assert planned(steps[6]) == {"b": 1, "c": 1}, "now its prefix is there"


def test_a_request_preempted_while_its_last_token_is_in_flight_is_not_computed_again() -> None:
    replica = Replica(num_blocks=4, enable_prefix_caching=False)
    replica.add(spec("a", 7, max_tokens=9), spec("b", 7, ordinal=1, max_tokens=1))
    steps = [replica.schedule() for _ in range(3)]
    assert [planned(step) for step in steps] == [{"a": 7, "b": 7}, {"a": 1}, {"a": 1}]
    assert replica.scheduler.stats().num_preemptions == 1
    replica.scheduler.abort("a")
    assert replica.scheduler.schedule() is None
    (delta,) = replica.scheduler.update(steps[0], replica.answer(steps[0]))
    assert (delta.request_id, delta.token_ids, delta.finish_reason) == ("b", [107], "length")
    replica.scheduler.check_invariants()


# Figures


def test_stats() -> None:
    replica = Replica(max_num_seqs=1, num_blocks=8)
    replica.add(spec("a", 4, max_tokens=2), spec("b", 4, ordinal=1))
    assert (replica.scheduler.num_unfinished, replica.scheduler.stats().num_waiting) == (2, 2)
    replica.step()
    before = replica.scheduler.stats()
    assert (before.num_running, before.num_waiting, before.num_steps, before.kv_cache_usage) == (1, 1, 1, 1 / 8)
    replica.finish()
    after = replica.scheduler.stats()
    assert (after.num_running, after.num_waiting, after.kv_cache_usage) == (0, 0, 0.0)
    assert after.finished == {"stop": 0, "length": 2, "abort": 0, "error": 0}
    assert before.finished["length"] == 0, "a snapshot does not change"


def test_a_step_counts_the_tokens_of_prompts_once_and_those_it_brings() -> None:
    replica = Replica(max_num_batched_tokens=6)
    replica.add(spec("a", 8, max_tokens=3))
    sizes = []
    for _ in range(4):
        before = replica.scheduler.stats().tokens_per_step.sum
        replica.step()
        sizes.append(replica.scheduler.stats().tokens_per_step.sum - before)
    assert sizes == [6, 2 + 1, 1, 1]
    replica.add(spec("again", [*range(1000, 1008)], ordinal=1, max_tokens=1))
    replica.finish()
    stats = replica.scheduler.stats()
    assert (stats.cached_prompt_tokens, stats.tokens_per_step.sum) == (4, 11 + 8 + 1)


def test_preempted_requests_count_their_prompts_once_and_their_preemptions() -> None:
    replica = Replica(num_blocks=4, max_num_batched_tokens=10)
    replica.add(spec("a", 7, max_tokens=6), spec("b", 7, ordinal=1, max_tokens=6), spec("c", 3, ordinal=2))
    replica.finish()
    replica.add(spec("gone", 3, ordinal=3))
    replica.step()
    replica.scheduler.abort("gone")
    stats = replica.scheduler.stats()
    assert stats.num_preemptions > 1
    assert stats.tokens_per_step.sum == stats.prompt_tokens + stats.generation_tokens == 20 + 6 + 6 + 8 + 1
    assert stats.tokens_per_step.buckets()[-1][1] == stats.num_steps
    assert stats.preemptions_per_request.sum == stats.num_preemptions
    assert stats.preemptions_per_request.buckets()[-1][1] == 4


def test_who_waits_for_a_result_or_for_a_suspect_waits_for_no_room() -> None:
    full = Replica(max_num_seqs=1)
    full.add(spec("a"), spec("b", ordinal=1))
    full.step()
    stats = full.scheduler.stats()
    assert (stats.num_waiting, stats.num_deferred) == (1, 0)
    crash(full)
    stats = full.scheduler.stats()
    assert (stats.num_waiting, stats.num_deferred) == (2, 1), "a runs alone, and has room"
    full.schedule()
    stats = full.scheduler.stats()
    assert (stats.num_waiting, stats.num_deferred) == (1, 1)

    preempted = Replica(num_blocks=4, enable_prefix_caching=False)
    preempted.add(spec("a", 7, max_tokens=9), spec("b", 7, ordinal=1, max_tokens=1))
    steps = [preempted.schedule() for _ in range(3)]
    preempted.add(spec("c", 8, ordinal=2))
    stats = preempted.scheduler.stats()
    assert (stats.num_waiting, stats.num_deferred) == (2, 1), "b waits for its last token, c for room"
    for step in steps:
        preempted.scheduler.update(step, preempted.answer(step))
    stats = preempted.scheduler.stats()
    assert (stats.num_waiting, stats.num_deferred) == (1, 0)


# A grammar's next mask needs the token before


def test_a_request_with_a_grammar_sits_out_while_its_token_is_in_flight() -> None:
    replica = Replica(max_num_batched_tokens=8)
    replica.add(spec("free", 2), spec("bound", 9, ordinal=1, grammar="start: /.*/"))
    first = replica.schedule()
    assert planned(first) == {"free": 2, "bound": 6}
    second = replica.schedule()
    assert planned(second) == {"free": 1, "bound": 3}, "its prompt goes on, nothing was sampled yet"
    third = replica.schedule()
    assert planned(third) == {"free": 1}
    for step in (first, second):
        replica.scheduler.update(step, replica.answer(step))
    fourth = replica.schedule()
    assert planned(fourth) == {"free": 1, "bound": 1}
    for step in (third, fourth):
        replica.scheduler.update(step, replica.answer(step))
    assert replica.finish()["bound"].finish_reason == "length"


def test_alone_it_leaves_nothing_to_plan_until_its_token_is_back() -> None:
    replica = Replica()
    replica.add(spec("bound", grammar="start: /.*/"))
    step = replica.schedule()
    assert replica.scheduler.schedule() is None
    replica.scheduler.update(step, replica.answer(step))
    assert planned(replica.schedule()) == {"bound": 1}


def test_preempted_with_its_token_in_flight_it_waits_for_it() -> None:
    replica = Replica(num_blocks=4, enable_prefix_caching=False)
    replica.add(spec("free", 7), spec("bound", 6, ordinal=1, grammar="start: /.*/"))
    steps = [replica.schedule()]
    while replica.scheduler.stats().num_preemptions == 0:
        steps.append(replica.schedule())
    replica.scheduler.abort("free")
    assert replica.scheduler.schedule() is None, "there is room, and its token is in flight"
    for step in steps:
        replica.scheduler.update(step, replica.answer(step))
    assert planned(replica.schedule()) == {"bound": 7}


# After a crash


def crash(replica: Replica) -> list[str]:
    """A step is under way when the worker dies; the ids of the requests that are given up."""
    replica.schedule()
    return [delta.request_id for delta in replica.scheduler.restart("killed")]


def test_suspects_run_alone_until_each_has_passed() -> None:
    replica = Replica()
    replica.add(spec("a", 4, max_tokens=9), spec("b", 4, ordinal=1, max_tokens=9))
    replica.step()
    assert crash(replica) == []
    replica.add(spec("c", 4, ordinal=2, max_tokens=9))
    companies = []
    for _ in range(4):
        step = replica.schedule()
        replica.scheduler.check_invariants()
        companies.append([item.request_id for item in step.scheduled])
        replica.scheduler.update(step, replica.answer(step))
    assert companies == [["a"], ["b"], ["a", "b", "c"], ["a", "b", "c"]]


def test_nobody_waits_for_a_suspect_that_has_ended() -> None:
    replica = Replica()
    replica.add(spec("a", 4, max_tokens=9), spec("b", 4, ordinal=1, max_tokens=9))
    replica.step()
    assert crash(replica) == []
    replica.add(spec("c", 4, ordinal=2, max_tokens=9))
    replica.scheduler.abort("a")
    stats = replica.scheduler.stats()
    assert (stats.num_waiting, stats.num_deferred) == (2, 1), "b runs alone now, and only c waits for it"
    companies = [list(replica.step()[0]) for _ in range(2)]
    assert companies == [["b"], ["b", "c"]]


def test_a_suspect_passes_with_all_tokens_that_were_under_way() -> None:
    """Any of them may have killed the worker."""
    replica = Replica()
    replica.add(spec("a", 4, max_tokens=9), spec("b", 4, ordinal=1, max_tokens=9))
    replica.step()
    replica.schedule()
    assert crash(replica) == []
    companies = []
    for _ in range(5):
        step = replica.schedule()
        companies.append([item.request_id for item in step.scheduled])
        replica.scheduler.update(step, replica.answer(step))
    assert companies == [["a"], ["a"], ["b"], ["b"], ["a", "b"]]


def test_a_request_that_is_at_work_in_every_crash_is_given_up() -> None:
    replica = Replica()
    replica.add(spec("a", 4, max_tokens=9), spec("b", 4, ordinal=1, max_tokens=9))
    replica.step()
    assert crash(replica) == []
    assert crash(replica) == [], "a for the second time, alone"
    step = replica.schedule()
    assert [item.request_id for item in step.scheduled] == ["b"], "the less suspicious one first"
    replica.scheduler.update(step, replica.answer(step))
    assert crash(replica) == ["a"]
    replica.finish()
    assert replica.scheduler.stats().finished == {"stop": 0, "length": 1, "abort": 0, "error": 1}


def test_a_request_continues_from_its_tokens() -> None:
    replica = Replica()
    begun = msgspec.structs.replace(
        spec("a", 4, max_tokens=4, prompt_logprobs=0), output_token_ids=[8, 9], num_prompt_logprobs_delivered=3
    )
    replica.add(begun)
    step = replica.schedule()
    (new,) = step.new_requests
    assert (new.token_ids, new.num_prompt_tokens) == ([*begun.prompt_token_ids, 8, 9], 4)
    assert step.scheduled[0].prompt_logprobs_start == 4
    deltas = replica.scheduler.update(step, replica.answer(step))
    assert (len(deltas), deltas[0].num_cached_tokens) == (1, 0)
    with pytest.raises(
        RequestError, match=r"output_token_ids: the sequence has 8 tokens; the maximum to continue is 7"
    ):
        replica.add(msgspec.structs.replace(begun, request_id="b", output_token_ids=[1, 2, 3, 4]))
