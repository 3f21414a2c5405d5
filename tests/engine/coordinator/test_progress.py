"""A request that has its turn and does not move is noticed; one that queues while others move is not."""

from __future__ import annotations

from sempre.engine.coordinator.progress_watch import ProgressWatch
from sempre.engine.harness import make_request
from sempre.engine.scheduling import Limits, Scheduler
from sempre.ipc.messages import ExecuteStep, SampledTokens, StepResult


def make_scheduler() -> Scheduler:
    limits = Limits(
        num_blocks=64,
        block_size=4,
        max_model_len=64,
        max_num_seqs=2,
        max_num_batched_tokens=16,
    )
    scheduler = Scheduler(limits, policy="fcfs", enable_prefix_caching=True)
    for number, name in enumerate(("one", "two", "queued")):
        scheduler.add(make_request([1, 2, 3], request_id=name, ordinal=number, max_tokens=40))
    return scheduler


def answer(scheduler: Scheduler, step: ExecuteStep) -> None:
    sampled = [SampledTokens(request_id=item.request_id, token_ids=[7]) for item in step.scheduled]
    scheduler.update(step, StepResult(rank=0, step_id=step.step_id, sampled=sampled))


def test_a_request_that_moves_or_queues_is_not_stalled() -> None:
    scheduler = make_scheduler()
    watch = ProgressWatch(0, scheduler)
    for now in range(20):
        step = scheduler.schedule()
        assert step is not None
        answer(scheduler, step)
        assert watch.stalled(float(now), 3.0) is None
    assert scheduler.stats().num_waiting == 1


def test_a_step_without_an_answer_stalls_its_requests() -> None:
    scheduler = make_scheduler()
    watch = ProgressWatch(4, scheduler)
    step = scheduler.schedule()
    assert step is not None
    for now in (10.0, 12.0, 13.0):
        assert watch.stalled(now, 3.0) is None
    found = watch.stalled(14.5, 3.0)
    assert found is not None
    assert (found.rank, found.num_requests, found.request_id, found.age_s) == (4, 2, "one", 4.5)
    answer(scheduler, step)
    assert watch.stalled(15.0, 3.0) is None


def test_where_nothing_moves_whoever_is_next_is_stalled() -> None:
    watch = ProgressWatch(0, make_scheduler())
    assert watch.stalled(10.0, 3.0) is None
    found = watch.stalled(14.0, 3.0)
    assert found is not None
    assert (found.num_requests, found.request_id) == (1, "one")


def test_an_idle_engine_is_not_stalled() -> None:
    scheduler = make_scheduler()
    watch = ProgressWatch(0, scheduler)
    watch.look(10.0)
    for name in ("one", "two", "queued"):
        scheduler.abort(name)
    assert watch.stalled(100.0, 3.0) is None
