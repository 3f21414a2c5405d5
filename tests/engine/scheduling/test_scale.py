"""What a step does must not grow with what waits, nor with the number of blocks: operations are counted, not timed."""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable, Iterator
from random import Random
from types import FrameType
from typing import Any

import pytest

from sempre.engine.scheduling import Limits, Scheduler
from sempre.engine.scheduling.request import Request
from sempre.engine.scheduling.waiting_queue import WaitingQueue
from sempre.ipc.messages import AdapterSpec, ExecuteStep, RequestSpec, SampledTokens, SamplingSpec, StepResult

FEW, MANY = 300, 4_000
STEPS = 6
LIMITS = Limits(
    num_blocks=20_000,
    block_size=4,
    max_model_len=2_000,
    max_num_seqs=64,
    max_num_batched_tokens=128,
    max_prompt_tokens=64,
    max_adapters=2,
)


def _spec(number: int, length: int, adapter: int | None = None) -> RequestSpec:
    return RequestSpec(
        request_id=f"request-{number}",
        prompt_token_ids=[1 + (number * 7919 + i) % 30_000 for i in range(length)],
        params=SamplingSpec(max_tokens=50),
        seed=number,
        ordinal=number,
        adapter=None if adapter is None else AdapterSpec(name=str(adapter), path="", digest=f"{adapter:02x}"),
    )


def _long_prompts(count: int) -> Iterator[RequestSpec]:
    yield from (_spec(number, 300) for number in range(count))


def _as_long_as_a_borderline(count: int) -> Iterator[RequestSpec]:
    """Just too long to be admitted before the others, and of one class with those that are not."""
    yield from (_spec(number, 300 if number == 0 else 15 + number % 3) for number in range(count))


def _short_prompts(count: int) -> Iterator[RequestSpec]:
    yield from (_spec(number, 3) for number in range(count))


def _adapters_without_a_slot(count: int) -> Iterator[RequestSpec]:
    yield from (_spec(number, 20, number if number < 2 else 2 + number % 2) for number in range(count))


def _beyond_the_cache(count: int) -> Iterator[RequestSpec]:
    """Each fits alone; together they preempt each other."""
    yield from (_spec(number, 40 + number % 5) for number in range(count))


CASES: dict[str, tuple[Callable[[int], Iterator[RequestSpec]], dict[str, Any]]] = {
    "long prompts": (_long_prompts, {}),
    "borderline prompts": (_as_long_as_a_borderline, {}),
    "short prompts, all seats taken": (_short_prompts, {"max_num_seqs": 8}),
    "adapters without a slot": (_adapters_without_a_slot, {}),
    "few blocks": (_beyond_the_cache, {"num_blocks": 60}),
}


def _answer(step: ExecuteStep, lengths: dict[str, int]) -> StepResult:
    lengths.update((new.request_id, len(new.token_ids)) for new in step.new_requests)
    sampled = []
    for item in step.scheduled:
        samples = item.num_computed_tokens + item.num_tokens == lengths[item.request_id]
        lengths[item.request_id] += samples
        sampled.append(SampledTokens(request_id=item.request_id, token_ids=[5] if samples else []))
    return StepResult(rank=0, step_id=step.step_id, sampled=sampled)


def _num_lines(function: Callable[[], Any]) -> int:
    """Lines of the engine that run inside `function`."""
    count = 0

    def trace(frame: FrameType, event: str, argument: object) -> Any:
        nonlocal count
        count += event == "line"
        return trace

    before = sys.gettrace()
    # a collection, which may begin anywhere, calls functions of test libraries
    gc.disable()
    sys.settrace(trace)
    try:
        function()
    finally:
        sys.settrace(before)
        gc.enable()
    return count


def _lines_of_steps(specs: Iterator[RequestSpec], **changes: Any) -> tuple[list[int], list[list[str]], int]:
    """Of each step; who was scheduled in it; and the lines of a snapshot of the figures."""
    scheduler = Scheduler(_limits(**changes), policy="fcfs", enable_prefix_caching=True)
    for spec in specs:
        scheduler.add(spec)
    lengths: dict[str, int] = {}
    lines, scheduled = [], []
    for _ in range(STEPS):
        planned: list[ExecuteStep] = []
        count = _num_lines(lambda: planned.append(scheduler.schedule()))  # noqa: B023
        result = _answer(planned[0], lengths)
        count += _num_lines(lambda: scheduler.update(planned[0], result))  # noqa: B023
        lines.append(count)
        scheduled.append([item.request_id for item in planned[0].scheduled])
    return lines, scheduled, _num_lines(scheduler.stats)


def _limits(**changes: Any) -> Limits:
    return Limits(**{name: changes.get(name, getattr(LIMITS, name)) for name in Limits.__dataclass_fields__})


@pytest.mark.parametrize("case", CASES)
def test_a_step_does_as_much_whether_few_requests_wait_or_many(case: str) -> None:
    make, changes = CASES[case]
    few, few_scheduled, few_of_stats = _lines_of_steps(make(FEW), **changes)
    many, many_scheduled, many_of_stats = _lines_of_steps(make(MANY), **changes)
    assert many_scheduled == few_scheduled
    assert many == few
    assert many_of_stats > 5 * few_of_stats, "the control: what looks at all that wait does grow, and is seen here"


def test_a_step_does_as_much_whatever_the_number_of_blocks() -> None:
    few, few_scheduled, _ = _lines_of_steps(_long_prompts(FEW), num_blocks=20_000)
    many, many_scheduled, _ = _lines_of_steps(_long_prompts(FEW), num_blocks=1_000_000)
    assert many_scheduled == few_scheduled
    assert many == few


# The queue


def _requests(count: int, random: Random) -> list[Request]:
    specs = [
        _spec(number, random.choice([1, 2, 3, 5, 9, 30, 120]), random.choice([None, 0, 1])) for number in range(count)
    ]
    return [Request(spec, random.choice([0, 0, 1]), LIMITS) for spec in specs]


def _shorter_by_looking_at_all(
    queue: list[Request], after: Any, most: int, share: int, last_priority: int
) -> list[Request]:
    found = []
    for request in queue:
        if after is not None and request.order_key <= after:
            continue
        if request.order_key[0] > last_priority or not share:
            break
        cost = request.prompt_cost(0, request.num_tokens)
        if cost <= min(most, share):
            found.append(request)
            share -= cost
    return found


@pytest.mark.parametrize("seed", range(20))
def test_the_queue_finds_what_looking_at_all_would(seed: int) -> None:
    random = Random(seed)
    requests = _requests(31, random)
    queue, left = WaitingQueue(), []
    for request in random.sample(requests, len(requests)):
        queue.add(request)
        left.append(request)
        if random.random() < 0.3:
            gone = left.pop(random.randrange(len(left)))
            queue.remove(gone)
        queue.check_invariants()
        left.sort(key=lambda request: request.order_key)
        assert list(queue) == left
        if not left:
            continue
        assert queue.first is left[0]
        adapters = random.sample(["00", "01"], random.randrange(3))
        expected = next((r for r in left if r.adapter is None or r.adapter in adapters), None)
        assert queue.first_of_adapters(adapters) is expected
        after = random.choice([None, random.choice(left).order_key])
        arguments = (after, random.choice([0, 4, 40]), random.choice([0, 6, 60]), random.choice([0, 1]))
        assert queue.shorter(*arguments) == _shorter_by_looking_at_all(left, *arguments)


def test_a_short_prompt_is_found_behind_any_number_of_long_ones() -> None:
    queue = WaitingQueue(Request(_spec(number, 300), 0, LIMITS) for number in range(2_000))
    last = Request(_spec(2_000, 3), 0, LIMITS)
    queue.add(last)
    assert queue.shorter(queue.first.order_key, 299, 16, 0) == [last]
