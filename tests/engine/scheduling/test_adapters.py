"""At most so many adapters in a step: who waits, who overtakes, and that nobody waits for ever."""

from __future__ import annotations

import pytest

from sempre.engine.scheduling import Limits, Scheduler
from sempre.engine.scheduling.prefix_cache import root_digest
from sempre.ipc.errors import RequestError
from sempre.ipc.messages import (
    AdapterSpec,
    ExecuteStep,
    RequestSpec,
    SampledTokens,
    SamplingSpec,
    StepResult,
)

DIGESTS = {name: f"{number:064x}" for number, name in enumerate("abcd", 1)}


def spec(
    name: str, ordinal: int, adapter: str | None, *, prompt: list[int] | None = None, tokens: int = 4
) -> RequestSpec:
    found = None if adapter is None else AdapterSpec(name=adapter, path=f"/{adapter}", digest=DIGESTS[adapter])
    return RequestSpec(
        request_id=name,
        prompt_token_ids=prompt or [100 * ordinal + i for i in range(3)],
        params=SamplingSpec(max_tokens=tokens),
        seed=1,
        ordinal=ordinal,
        adapter=found,
    )


def scheduler(**changes: int) -> Scheduler:
    limits = {"max_model_len": 64, "num_blocks": 64, "block_size": 4, "max_num_seqs": 4, "max_num_batched_tokens": 64}
    return Scheduler(Limits(**{**limits, "max_adapters": 2, **changes}), policy="fcfs", enable_prefix_caching=True)


def run(planned: Scheduler) -> tuple[ExecuteStep, list[str]]:
    """One step, and who has ended."""
    step = planned.schedule()
    assert step is not None
    planned.check_invariants()
    sampled = [SampledTokens(request_id=item.request_id, token_ids=[7]) for item in step.scheduled]
    deltas = planned.update(step, StepResult(rank=0, step_id=step.step_id, sampled=sampled))
    planned.check_invariants()
    return step, [delta.request_id for delta in deltas if delta.finish_reason is not None]


def ids(step: ExecuteStep) -> list[str]:
    return [item.request_id for item in step.scheduled]


def test_a_third_adapter_waits_and_others_go_on() -> None:
    planned = scheduler()
    for ordinal, adapter in enumerate(("a", "b", "c", None, "a")):
        planned.add(spec(f"{ordinal}{adapter}", ordinal, adapter))
    step, _ = run(planned)
    assert ids(step) == ["0a", "1b", "3None", "4a"]
    assert [new.adapter and new.adapter.name for new in step.new_requests] == ["a", "b", None, "a"]
    assert planned.stats().num_deferred == 1
    ended: list[str] = []
    while "2c" not in ids(step):
        step, done = run(planned)
        ended += done
    assert ended == ["0a", "1b", "3None", "4a"]


def test_nobody_is_overtaken_for_ever() -> None:
    """Requests of two adapters keep coming; one of a third has its turn after at most max_num_seqs of them."""
    planned = scheduler()
    for ordinal in range(4):
        planned.add(spec(f"{ordinal}", ordinal, "ab"[ordinal % 2], tokens=2 + ordinal))
    planned.add(spec("waiting", 4, "c"))
    overtaking, ordinal = 0, 5
    for _ in range(60):
        planned.add(spec(f"{ordinal}", ordinal, "ab"[ordinal % 2], tokens=2 + ordinal % 3))
        ordinal += 1
        step, _ = run(planned)
        if "waiting" in ids(step):
            break
        overtaking += sum(int(new.request_id) > 4 for new in step.new_requests)
    assert "waiting" in ids(step)
    assert 0 < overtaking <= 4


def test_a_slot_is_free_when_the_last_of_an_adapter_ends() -> None:
    planned = scheduler(max_adapters=1)
    planned.add(spec("first", 0, "a"))
    planned.add(spec("second", 1, "b"))
    assert ids(run(planned)[0]) == ["first"]
    planned.abort("first")
    assert ids(run(planned)[0]) == ["second"]
    planned.restart("a fault")
    planned.check_invariants()
    planned.add(spec("third", 2, "a"))
    assert ids(run(planned)[0]) == ["second"]


def test_prefixes_are_not_shared_between_adapters() -> None:
    planned, prompt = scheduler(max_adapters=3), list(range(13))
    for ordinal, adapter in enumerate(("a", "b", None)):
        planned.add(spec(f"{ordinal}", ordinal, adapter, prompt=prompt, tokens=1))
    step, ended = run(planned)
    assert [item.num_computed_tokens for item in step.scheduled] == [0, 0, 0]
    assert ended == ["0", "1", "2"]
    for ordinal, adapter in enumerate(("a", None, "c", "b"), 3):
        planned.add(spec(f"{ordinal}", ordinal, adapter, prompt=prompt, tokens=1))
    step, _ = run(planned)
    assert {item.request_id: item.num_computed_tokens for item in step.scheduled} == {"3": 12, "4": 12, "5": 0, "6": 12}


def test_roots_differ_by_salt_and_adapter() -> None:
    salts, adapters = (None, "x"), (None, DIGESTS["a"], DIGESTS["b"])
    roots = {root_digest(salt, adapter) for salt in salts for adapter in adapters}
    assert len(roots) == 6
    assert root_digest(None) == bytes(32)


def test_an_adapter_is_refused_where_none_are_served() -> None:
    with pytest.raises(RequestError, match="enable_lora=True for adapter 'a'"):
        scheduler(max_adapters=0).add(spec("first", 0, "a"))
