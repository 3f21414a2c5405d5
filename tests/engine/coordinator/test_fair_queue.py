"""Tenants share an engine in proportion to their weights, whatever each of them has waiting."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
from msgspec.structs import replace

from sempre.engine.coordinator.fair_queue import FairQueue
from sempre.engine.coordinator.replica import Replica
from sempre.engine.harness import make_request
from sempre.engine.scheduling import Limits, Scheduler
from sempre.ipc.error_info import describe
from sempre.ipc.errors import RequestError
from sempre.ipc.messages import (
    EngineReady,
    ExecuteStep,
    RequestOutputDelta,
    RequestSpec,
    SampledTokens,
    StepResult,
    TenantSpec,
    WorkerCommand,
)

PROMPT = list(range(3, 11))
MAX_NUM_SEQS = 4
READY = EngineReady(
    vocab_size=512,
    max_model_len=64,
    eos_token_ids=[],
    num_blocks=256,
    block_size=4,
    world_size=1,
    fingerprint={},
    max_num_batched_tokens=128,
    max_num_seqs=MAX_NUM_SEQS,
)


class Engine:
    """Replicas behind a fair queue; every step gives each of its requests a token."""

    def __init__(self, num_replicas: int = 1, **settings: Any) -> None:
        limits = Limits(
            max_model_len=64, num_blocks=256, block_size=4, max_num_seqs=MAX_NUM_SEQS, max_num_batched_tokens=128
        )
        self.steps: dict[int, list[ExecuteStep]] = {rank: [] for rank in range(num_replicas)}
        self.replicas = [
            Replica(range(rank, rank + 1), Scheduler(limits, policy="fcfs", enable_prefix_caching=True), self)  # type: ignore[arg-type]
            for rank in range(num_replicas)
        ]
        self.queue = FairQueue(**settings)
        self.owners: dict[str, Replica] = {}
        self.begun: list[str] = []
        self.ended: list[str] = []
        self.refused: list[RequestOutputDelta] = []

    def send(self, rank: int, command: WorkerCommand) -> None:
        assert isinstance(command, ExecuteStep)
        self.steps[rank].append(command)

    def add(self, name: str, tenant: str, weight: int = 1, **fields: Any) -> None:
        request = make_request(
            fields.pop("prompt", PROMPT), request_id=name, max_tokens=fields.pop("max_tokens", 6), **fields
        )
        self.queue.add(_of(request, TenantSpec(name=tenant, weight=weight)))

    def step(self) -> None:
        self.refused += self.queue.begin(self.replicas, READY, self._begin)
        for rank, replica in enumerate(self.replicas):
            replica.advance(0.0)
            if not self.steps[rank]:
                continue
            step = self.steps[rank].pop()
            sampled = [SampledTokens(request_id=item.request_id, token_ids=[7]) for item in step.scheduled]
            outputs = replica.take(rank, StepResult(rank=rank, step_id=step.step_id, sampled=sampled))
            self.queue.count(outputs)
            self.ended += [output.request_id for output in outputs if output.finish_reason is not None]

    def _begin(self, spec: RequestSpec, replica: Replica) -> RequestOutputDelta | None:
        try:
            replica.add(spec)
        except RequestError as error:
            return RequestOutputDelta(request_id=spec.request_id, finish_reason="error", error=describe(error))
        self.begun.append(spec.request_id)
        self.owners[spec.request_id] = replica
        return None


def _of(request: RequestSpec, tenant: TenantSpec) -> RequestSpec:
    return replace(request, tenant=tenant)


def shares(names: list[str]) -> Counter[str]:
    return Counter(name[0] for name in names)


@pytest.mark.parametrize("num_replicas", [1, 2])
@pytest.mark.parametrize("weight", [1, 3])
def test_backlogged_tenants_are_served_in_proportion_to_their_weights(num_replicas: int, weight: int) -> None:
    engine = Engine(num_replicas)
    for index in range(200):
        engine.add(f"a{index}", "a")
    for index in range(200):
        engine.add(f"b{index}", "b", weight)
    while len(engine.ended) < 160:
        engine.step()
    found = shares(engine.ended)
    # the bound of the algorithm: what fits into the steps at once, twice
    assert abs(found["b"] - weight * found["a"]) <= 2 * (weight + 1) * MAX_NUM_SEQS * num_replicas
    # each tenant's own requests keep their order
    for tenant in "ab":
        own = [int(name[1:]) for name in engine.begun if name[0] == tenant]
        assert own == sorted(own)


def test_without_turns_the_first_to_fill_the_queue_has_it_all() -> None:
    """The control: the same requests as those of one tenant."""
    engine = Engine()
    for index in range(200):
        engine.add(f"a{index}", "one")
    for index in range(200):
        engine.add(f"b{index}", "one")
    while len(engine.ended) < 160:
        engine.step()
    assert shares(engine.ended) == {"a": 160}


def test_long_outputs_count() -> None:
    """A tenant whose requests are six times as long gets as many tokens, not as many requests."""
    engine = Engine()
    for index in range(100):
        engine.add(f"a{index}", "a", max_tokens=36)
        engine.add(f"b{index}", "b", max_tokens=6)
    while len(engine.ended) < 60:
        engine.step()
    found = shares(engine.ended)
    a, b = found["a"] * (8 + 2 * 36), found["b"] * (8 + 2 * 6)
    assert abs(a - b) <= 2 * MAX_NUM_SEQS * (8 + 2 * 36)


def test_what_an_idle_tenant_has_not_used_is_not_saved_up() -> None:
    engine = Engine()
    for index in range(300):
        engine.add(f"a{index}", "a")
    while len(engine.ended) < 100:
        engine.step()
    seen = len(engine.begun)
    for index in range(100):
        engine.add(f"b{index}", "b")
    while len(engine.begun) < seen + 60:
        engine.step()
    found = shares(engine.begun[seen : seen + 60])
    assert abs(found["a"] - found["b"]) <= 2 * MAX_NUM_SEQS


def test_one_tenant_alone_fills_every_step() -> None:
    engine = Engine()
    for index in range(40):
        engine.add(f"a{index}", "a")
    num_steps = 0
    while len(engine.ended) < 40:
        engine.step()
        num_steps += 1
    # six tokens each, four at a time
    assert num_steps == 60


def test_requests_that_end_while_they_wait_are_forgotten() -> None:
    engine = Engine()
    for index in range(10):
        engine.add(f"a{index}", "a")
    engine.step()
    num_waiting = len(engine.queue)
    assert num_waiting == 5
    assert "a9" in engine.queue
    assert engine.queue.remove("a9")
    assert engine.queue.remove("a5")
    assert not engine.queue.remove("a0"), "it has begun"
    assert not engine.queue.remove("a9")
    while len(engine.ended) < 8:
        engine.step()
    assert len(engine.queue) == 0
    assert shares(engine.ended) == {"a": 8}
    assert not {"a5", "a9"} & set(engine.begun)


def test_a_request_that_can_never_run_ends_at_its_turn_and_costs_nothing() -> None:
    engine = Engine()
    engine.add("a0", "a", prompt=list(range(3, 90)))
    engine.add("a1", "a")
    while not engine.ended:
        engine.step()
    assert [(delta.request_id, delta.finish_reason) for delta in engine.refused] == [("a0", "error")]
    assert engine.ended == ["a1"]


def test_a_request_paused_while_it_waits_is_paused_when_it_begins() -> None:
    engine = Engine()
    for index in range(2):
        engine.add(f"a{index}", "a")
    engine.queue.pause("a0")
    for _ in range(10):
        engine.step()
    assert engine.ended == ["a1"]
    engine.owners["a0"].resume_request("a0")
    for _ in range(10):
        engine.step()
    assert engine.ended == ["a1", "a0"]


def test_priorities_count_among_a_tenants_own_requests() -> None:
    for uses_priority in (True, False):
        engine = Engine(uses_priority=uses_priority)
        for index in range(8):
            engine.add(f"a{index}", "a", priority=-index)
            engine.add(f"b{index}", "b")
        while len(engine.begun) < 16:
            engine.step()
        own = [name for name in engine.begun if name[0] == "a"]
        assert own == [f"a{index}" for index in (range(7, -1, -1) if uses_priority else range(8))]
        assert abs(shares(engine.begun[:8])["a"] - 4) <= 1
