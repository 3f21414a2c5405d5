"""A worker that takes a step while the one before it runs: more steps in flight, the same results."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from sempre.engine.arguments import engine_config
from sempre.engine.client.inproc import InprocClient
from sempre.engine.executor.inproc import InprocExecutor
from sempre.engine.harness import COORDINATOR, Cluster, compare_generations, generate
from sempre.ipc.messages import AbortRequests, AddRequests, CallWorkers, CallWorkersReply, OutputsReady, RequestSpec

HERE = Path(__file__).parent
# few blocks, so that requests are preempted while their tokens are in flight
SETTINGS = {"max_num_seqs": 6, "max_num_batched_tokens": 16, "kv_cache_memory_bytes": 9, "max_model_len": 64}

MakeRequests = Callable[..., list[RequestSpec]]


@pytest.fixture
def ahead(start: Callable[..., Cluster]) -> Cluster:
    return start(worker_module="ahead_worker", **SETTINGS)


@pytest.fixture
def ahead_inproc(monkeypatch: pytest.MonkeyPatch) -> Iterator[InprocClient]:
    monkeypatch.syspath_prepend(str(HERE))
    from ahead_worker import AheadWorker

    config = engine_config("tiny", multiprocessing=False, **SETTINGS)
    client = InprocClient.launch(config, executor=InprocExecutor(config, AheadWorker))
    yield client
    client.close()
    del sys.modules["ahead_worker"]


def test_the_results_are_those_of_one_step_at_a_time(
    start: Callable[..., Cluster], ahead: Cluster, ahead_inproc: InprocClient, requests: MakeRequests
) -> None:
    specs = requests(20, max_tokens=30)
    expected = start(**SETTINGS).generate(specs)
    assert compare_generations(expected, ahead.generate(specs)).equal
    assert compare_generations(expected, generate(ahead_inproc, specs)).equal
    assert ahead.metrics()["num_preemptions"] > [0.0]
    assert ahead.call("most_in_flight") == [2]


def test_a_call_waits_for_the_steps_before_it(ahead: Cluster, requests: MakeRequests) -> None:
    ahead.client.send(AddRequests(requests=requests(4, max_tokens=20)))
    ahead.client.send(CallWorkers(call_id=1, method="ping"))
    replied, unfinished = False, 4
    while unfinished or not replied:
        event = ahead.client.receive(10.0)
        assert event is not None
        replied |= isinstance(event, CallWorkersReply)
        if isinstance(event, OutputsReady):
            unfinished -= sum(delta.finish_reason is not None for delta in event.outputs)


def test_an_abort_with_steps_in_flight(ahead: Cluster, requests: MakeRequests) -> None:
    """What is in flight for the request is dropped, and its id may be used again at once."""
    specs = requests(3, max_tokens=25)
    expected = ahead.generate(specs)
    ahead.call("slow", 0.2)  # so that they run for seconds, however late this process is to end them
    ahead.client.send(AddRequests(requests=specs))
    while not isinstance(event := ahead.client.receive(10.0), OutputsReady):
        assert event is not None
    ahead.client.send(AbortRequests(request_ids=[spec.request_id for spec in specs]))
    aborted = 0
    while aborted < 3:
        event = ahead.client.receive(10.0)
        assert event is not None
        if isinstance(event, OutputsReady):
            aborted += sum(delta.finish_reason == "abort" for delta in event.outputs)
    ahead.call("slow", 0.0)
    assert compare_generations(expected, ahead.generate(specs)).equal


@pytest.mark.parametrize("target", [0, COORDINATOR])
def test_a_death_with_steps_in_flight(ahead: Cluster, requests: MakeRequests, target: int | str) -> None:
    """The tokens of both steps are lost with the process, and come again."""
    specs = requests(8, max_tokens=25)
    expected = ahead.generate(specs)
    ahead.client.send(AddRequests(requests=specs))
    found: dict[str, list[int]] = {spec.request_id: [] for spec in specs}
    unfinished, killed = len(specs), False
    while unfinished:
        event = ahead.client.receive(20.0)
        assert isinstance(event, OutputsReady)
        for delta in event.outputs:
            found[delta.request_id] += delta.token_ids
            unfinished -= delta.finish_reason is not None
        if not killed:
            ahead.kill(target)
            killed = True
    assert [found[spec.request_id] for spec in specs] == [generation.token_ids for generation in expected]
