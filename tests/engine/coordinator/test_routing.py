"""Which of several replicas gets a request: the one that has least to compute then."""

from __future__ import annotations

from typing import Any

import pytest

from sempre.engine.coordinator.replica import Replica, best_replica
from sempre.engine.harness import make_request
from sempre.engine.scheduling import Limits, Scheduler
from sempre.ipc.messages import AdapterSpec, ExecuteStep, RequestSpec, SampledTokens, StepResult, WorkerCommand

PROMPT = list(range(3, 43))
OTHER = list(range(500, 540))


class Sent:
    """Keeps the steps that are sent."""

    def __init__(self) -> None:
        self.steps: list[ExecuteStep] = []

    def send(self, rank: int, command: WorkerCommand) -> None:
        assert isinstance(command, ExecuteStep)
        self.steps.append(command)


def make_replicas(count: int, *, enable_prefix_caching: bool = True, num_state_slots: int = 0) -> list[Replica]:
    limits = Limits(
        max_model_len=256,
        num_blocks=64,
        block_size=4,
        max_num_seqs=4,
        max_num_batched_tokens=128,
        num_state_slots=num_state_slots,
    )
    return [
        Replica(
            range(rank, rank + 1),
            Scheduler(limits, policy="fcfs", enable_prefix_caching=enable_prefix_caching),
            Sent(),  # type: ignore[arg-type]
        )
        for rank in range(count)
    ]


def spec(request_id: str, prompt: list[int], max_tokens: int = 1, **settings: Any) -> RequestSpec:
    return make_request(prompt, request_id=request_id, max_tokens=max_tokens, **settings)


def serve(replica: Replica, request: RequestSpec) -> None:
    """Have the replica finish the request, whose prefix it then has cached."""
    replica.add(request)
    sent = replica._executor.steps  # type: ignore[attr-defined]
    while replica.num_unfinished:
        replica.advance(0.0)
        step = sent[-1]
        sampled = [SampledTokens(request_id=item.request_id, token_ids=[7]) for item in step.scheduled]
        replica.take(replica.ranks[0], StepResult(rank=replica.ranks[0], step_id=step.step_id, sampled=sampled))


def test_the_least_busy_replica_gets_a_request_and_the_first_on_a_tie() -> None:
    replicas = make_replicas(3)
    assert best_replica(replicas, spec("a", PROMPT)) is replicas[0]
    replicas[0].add(spec("a", PROMPT))
    assert best_replica(replicas, spec("b", PROMPT)) is replicas[1]
    replicas[1].add(spec("b", PROMPT))
    replicas[2].add(spec("c", OTHER[:5]))
    assert best_replica(replicas, spec("d", PROMPT)) is replicas[2]


def test_a_request_follows_the_longest_cached_prefix() -> None:
    replicas = make_replicas(3)
    serve(replicas[1], spec("a", PROMPT[:13]))
    serve(replicas[2], spec("b", PROMPT))
    assert best_replica(replicas, spec("c", PROMPT)) is replicas[2]
    assert best_replica(replicas, spec("d", PROMPT[:9] + OTHER)) is replicas[1]
    assert best_replica(replicas, spec("e", OTHER)) is replicas[0]


def test_a_replica_that_is_busier_than_the_prefix_saves_does_not_get_it() -> None:
    replicas = make_replicas(2)
    serve(replicas[1], spec("a", PROMPT))
    # 36 of the 40 tokens are cached: whole blocks, without the last token
    replicas[1].add(spec("b", OTHER[:30], max_tokens=6))
    assert best_replica(replicas, spec("c", PROMPT)) is replicas[1]
    replicas[1].add(spec("d", OTHER[:1], max_tokens=1))
    assert best_replica(replicas, spec("c", PROMPT)) is replicas[0]


@pytest.mark.parametrize(
    "settings",
    [
        {"cache_salt": "other"},
        {"prompt_logprobs": 1},
        {"adapter": AdapterSpec(name="a", path="/a", digest="0f")},
    ],
)
def test_what_cannot_be_read_does_not_count(settings: dict[str, Any]) -> None:
    replicas = make_replicas(2)
    serve(replicas[1], spec("a", PROMPT))
    request = spec("b", PROMPT)
    if "adapter" in settings:
        import msgspec

        request = msgspec.structs.replace(request, **settings)
    else:
        request = spec("b", PROMPT, **settings)
    assert best_replica(replicas, request) is replicas[0]


def test_without_a_prefix_cache_load_decides() -> None:
    replicas = make_replicas(2, enable_prefix_caching=False)
    serve(replicas[1], spec("a", PROMPT))
    assert best_replica(replicas, spec("b", PROMPT)) is replicas[0]


def test_a_replica_without_workers_is_the_last_choice() -> None:
    replicas = make_replicas(2)
    serve(replicas[0], spec("a", PROMPT))
    replicas[0].lose_workers("a test")
    assert best_replica(replicas, spec("b", PROMPT)) is replicas[1]
    replicas[1].lose_workers("a test")
    assert best_replica(replicas, spec("b", PROMPT)) is replicas[0]


def test_a_prefix_is_looked_up_once_for_all_replicas() -> None:
    """Keys are added one by one, as far as any replica has them."""
    replicas = make_replicas(3)
    serve(replicas[2], spec("a", PROMPT))
    keys: list[Any] = []
    assert [replica.num_cached_tokens(spec("b", OTHER), keys) for replica in replicas] == [0, 0, 0]
    assert len(keys) == 1
    keys = []
    assert [replica.num_cached_tokens(spec("b", PROMPT), keys) for replica in replicas] == [0, 0, 36]
    assert len(keys) == 9
