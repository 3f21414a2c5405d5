"""An engine in processes does its work: same results anywhere, commands answered, errors told."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

import pytest
from light_worker import LightWorker
from scripted_worker import next_token

from sempre.engine.client.asynchronous import AsyncInprocClient, AsyncProcessClient
from sempre.engine.client.engine_process import ProcessOptions
from sempre.engine.client.inproc import InprocClient
from sempre.engine.executor.inproc import InprocExecutor
from sempre.engine.harness import Cluster, generate, make_request
from sempre.ipc.config import EngineConfig
from sempre.ipc.errors import ConfigError, EngineDeadError, MessageMalformed, MessageTooLarge, RequestError, WorkerDied
from sempre.ipc.messages import (
    PROTOCOL_VERSION,
    AbortRequests,
    AddRequests,
    CallWorkers,
    CallWorkersReply,
    ClientEvent,
    ClientHello,
    ExecuteStep,
    OutputsReady,
    RequestOutputDelta,
    RequestSpec,
    ResetPrefixCache,
    ResetPrefixCacheReply,
    ShutdownEngine,
    StepResult,
)

Start = Callable[..., Cluster]
Requests = Callable[..., list[RequestSpec]]
SCRIPTED = EngineConfig(model="scripted-light", model_path="/")


def expected_tokens(spec: RequestSpec) -> list[int]:
    tokens = list(spec.prompt_token_ids)
    for _ in range(spec.params.max_tokens):
        tokens.append(next_token(spec.seed, tokens))
    return tokens[len(spec.prompt_token_ids) :]


def inproc(config: EngineConfig = SCRIPTED) -> InprocClient:
    return InprocClient.launch(config, executor=InprocExecutor(config, LightWorker))


@pytest.mark.parametrize("settings", [{}, {"data_parallel_size": 3}, {"max_num_seqs": 2, "max_num_batched_tokens": 4}])
def test_results_do_not_depend_on_processes_or_settings(
    start: Start, requests: Requests, settings: dict[str, int]
) -> None:
    specs = requests(7)
    results = start(**settings).generate(specs)
    assert [result.token_ids for result in results] == [expected_tokens(spec) for spec in specs]
    assert [len(result.logprobs) for result in results] == [spec.params.max_tokens for spec in specs]
    assert {result.finish_reason for result in results} == {"length"}


@pytest.mark.parametrize("replicas", [1, 2])
def test_the_engine_in_this_process_gives_the_same(requests: Requests, replicas: int) -> None:
    specs = requests(5)
    config = EngineConfig(model="scripted-light", model_path="/", data_parallel_size=replicas)
    client = inproc(config)
    assert [result.token_ids for result in generate(client, specs)] == [expected_tokens(spec) for spec in specs]
    assert client.receive(0) is None
    client.close()
    with pytest.raises(EngineDeadError, match="shut down"):
        client.receive(0)


def test_an_error_of_a_step_in_this_process_is_the_death_of_its_worker() -> None:
    """Also an error of the project: only before it serves does it speak for itself."""

    class Refusing(LightWorker):
        def execute(self, command: ExecuteStep) -> StepResult:
            raise MessageMalformed("scheduled: expected nothing", field="scheduled")

    client = InprocClient.launch(SCRIPTED, executor=InprocExecutor(SCRIPTED, Refusing))
    with pytest.raises(WorkerDied, match="worker 0 failed: MessageMalformed: scheduled: expected nothing") as death:
        generate(client, [make_request([1])])
    assert death.value.rank == 0
    client.close()


def test_replicas_share_the_work_by_load(start: Start, requests: Requests) -> None:
    cluster = start(data_parallel_size=2)
    cluster.generate(requests(8))
    metrics = cluster.metrics()
    assert metrics["prompt_tokens"] == [12.0, 12.0]
    assert metrics["request_success"] == {"stop": 0.0, "length": 8.0, "abort": 0.0, "error": 0.0}
    assert metrics["num_requests_running"] == [0.0, 0.0]


def test_an_abort_ends_a_request(start: Start) -> None:
    cluster = start()
    client = cluster.client
    client.send(CallWorkers(call_id=1, method="slow", args=[0.01]))
    assert client.receive(10) == CallWorkersReply(call_id=1, results=[None])
    client.send(AddRequests(requests=[make_request([1], request_id="long", max_tokens=4000)]))
    assert isinstance(client.receive(10), OutputsReady)
    client.send(AbortRequests(request_ids=["unknown", "long"]))
    reasons: list[str | None] = []
    while "abort" not in reasons:
        event = client.receive(10)
        assert isinstance(event, OutputsReady)
        reasons += [output.finish_reason for output in event.outputs]
    # the worker goes on with others, under the same id too
    assert cluster.generate([make_request([1], request_id="long", max_tokens=2)])[0].finish_reason == "length"


def test_a_request_that_cannot_run_is_refused_alone(start: Start, requests: Requests) -> None:
    cluster = start(max_model_len=16)
    bad = make_request(range(20), request_id="too long", ordinal=100)
    with pytest.raises(RequestError, match="maximum model length of 16"):
        cluster.generate([*requests(2), bad])
    specs = requests(3, first=50)
    assert [result.token_ids for result in cluster.generate(specs)] == [expected_tokens(spec) for spec in specs]


def test_an_id_in_use_is_refused(start: Start) -> None:
    cluster = start()
    twins = [make_request([1], request_id="twin", ordinal=i, max_tokens=500) for i in range(2)]
    with pytest.raises(RequestError, match="'twin' is in use"):
        cluster.generate(twins)


def test_calls_are_answered_in_rank_order_between_steps(start: Start) -> None:
    cluster = start(data_parallel_size=2)
    assert cluster.call("ping") == ["pong", "pong"]
    with pytest.raises(ConfigError, match="no worker method 'shut_down'"):
        cluster.call("shut_down")
    with pytest.raises(Exception, match="TypeError"):
        cluster.call("ping", "an argument too many")
    assert cluster.call("ping") == ["pong", "pong"]


def test_the_prefix_cache_is_reset_only_when_idle(start: Start) -> None:
    cluster = start()
    client = cluster.client
    prompt = list(range(100))
    cluster.generate([make_request(prompt)])
    assert cluster.generate([make_request(prompt)])[0].num_cached_tokens == 96
    client.send(ResetPrefixCache(call_id=1))
    assert client.receive(10) == ResetPrefixCacheReply(call_id=1, done=True)
    assert cluster.generate([make_request(prompt)])[0].num_cached_tokens == 0
    client.send(AddRequests(requests=[make_request(prompt, max_tokens=1000)]))
    client.send(ResetPrefixCache(call_id=2))
    replies = []
    while not replies:
        event = client.receive(10)
        replies += [event] if isinstance(event, ResetPrefixCacheReply) else []
    assert replies == [ResetPrefixCacheReply(call_id=2, done=False)]


def test_a_command_out_of_place_is_refused_and_harms_nobody(start: Start, requests: Requests) -> None:
    cluster = start()
    cluster.client.send(ClientHello(protocol_version=PROTOCOL_VERSION, pid=1))
    with pytest.raises(MessageMalformed, match="expected a command of a serving engine, found ClientHello"):
        cluster.client.receive(10)
    assert len(cluster.generate(requests(3))) == 3


def test_a_command_that_is_too_large_is_refused_before_it_is_sent(start: Start, requests: Requests) -> None:
    cluster = start(max_message_bytes=1 << 16)
    with pytest.raises(MessageTooLarge, match="max_message_bytes"):
        cluster.client.send(CallWorkers(call_id=1, method="ping", args=["x" * (1 << 16)]))
    assert len(cluster.generate(requests(3))) == 3


def test_log_probabilities_that_are_too_large_fail_their_request_alone(start_odd: Start, requests: Requests) -> None:
    cluster = start_odd("logprobs are too large", max_message_bytes=1 << 16)
    specs = requests(3)
    cluster.client.send(AddRequests(requests=specs))
    outputs = {spec.request_id: RequestOutputDelta(request_id=spec.request_id) for spec in specs}
    while any(output.finish_reason is None for output in outputs.values()):
        event = cluster.client.receive(10)
        assert isinstance(event, OutputsReady)
        outputs |= {output.request_id: output for output in event.outputs}
    assert [outputs[spec.request_id].finish_reason for spec in specs] == ["error", "length", "length"]
    error = outputs[specs[0].request_id].error
    assert error is not None
    assert error.type == "RequestError"
    assert "max_message_bytes" in error.message


def test_a_reply_that_is_too_large_fails_its_call_alone(start: Start) -> None:
    cluster = start(data_parallel_size=2, max_message_bytes=1 << 16)
    assert [len(text) for text in cluster.call("repeat", "x", 30_000)] == [30_000, 30_000]
    for size in (40_000, 70_000):  # too large together, too large each
        with pytest.raises(MessageTooLarge, match="max_message_bytes"):
            cluster.call("repeat", "x", size)
    assert cluster.call("ping") == ["pong", "pong"]


def test_the_prefix_caches_of_all_replicas_are_reset_or_none(start: Start) -> None:
    cluster = start(data_parallel_size=2)
    client = cluster.client
    prompt = list(range(1, 34))

    def cached_tokens(ordinal: int) -> int:
        return cluster.generate([make_request(prompt, ordinal=ordinal, max_tokens=1)])[0].num_cached_tokens

    assert cached_tokens(0) == 0
    assert cached_tokens(1) == 32
    # the first replica has what is cached, and nothing to do; the second one is busy
    client.send(AddRequests(requests=[make_request([i], request_id=f"long {i}", max_tokens=4000) for i in (1, 2)]))
    client.send(AbortRequests(request_ids=["long 1"]))
    client.send(ResetPrefixCache(call_id=5))
    while not isinstance(event := client.receive(10), ResetPrefixCacheReply):
        assert isinstance(event, OutputsReady)
    assert event == ResetPrefixCacheReply(call_id=5, done=False)
    assert cached_tokens(2) == 32


def test_receive_returns_in_time_when_there_is_nothing(start: Start) -> None:
    cluster = start()
    assert cluster.client.receive(0) is None
    assert cluster.client.receive(0.05) is None


def test_an_idle_engine_stays_alive_beyond_its_heartbeat_timeout(start: Start, requests: Requests) -> None:
    cluster = start(heartbeat_interval_s=0.05, heartbeat_timeout_s=0.4)
    time.sleep(1.0)
    assert len(cluster.generate(requests(2))) == 2
    assert cluster.client.receive(1.0) is None


def test_a_step_longer_than_the_heartbeat_timeout_is_no_death(start: Start) -> None:
    cluster = start(heartbeat_interval_s=0.05, heartbeat_timeout_s=0.4)
    cluster.call("slow", 1.2)
    assert len(cluster.generate([make_request([1], max_tokens=1)])) == 1


def test_a_closed_engine_says_so_and_can_be_closed_again(start: Start) -> None:
    cluster = start()
    cluster.close()
    cluster.close()
    with pytest.raises(EngineDeadError, match="shut down"):
        cluster.client.send(ShutdownEngine())
    with pytest.raises(EngineDeadError, match="shut down"):
        cluster.client.receive(0)


def test_the_asynchronous_client(requests: Requests) -> None:
    async def run() -> list[OutputsReady]:
        options = ProcessOptions(worker_module="light_worker")
        client = await AsyncProcessClient.launch(SCRIPTED, options=options)
        with client:
            client.send(AddRequests(requests=requests(3)))
            outputs = []
            while sum(o.finish_reason is not None for event in outputs for o in event.outputs) < 3:
                event = await received_after_a_cancelled_call(client)
                assert isinstance(event, OutputsReady)
                outputs.append(event)
            return outputs

    assert tokens_of(asyncio.run(run())) == {spec.request_id: expected_tokens(spec) for spec in requests(3)}


def test_the_asynchronous_client_in_this_process(requests: Requests) -> None:
    async def run() -> list[OutputsReady]:
        client = await AsyncInprocClient.launch(SCRIPTED, executor=InprocExecutor(SCRIPTED, LightWorker))
        idle = asyncio.create_task(client.receive())
        await asyncio.sleep(0.01)
        client.send(AddRequests(requests=requests(3)))
        outputs = [await idle]
        while sum(o.finish_reason is not None for event in outputs for o in event.outputs) < 3:
            outputs.append(await received_after_a_cancelled_call(client))
        client.close()
        return [event for event in outputs if isinstance(event, OutputsReady)]

    assert tokens_of(asyncio.run(run())) == {spec.request_id: expected_tokens(spec) for spec in requests(3)}


async def received_after_a_cancelled_call(client: AsyncProcessClient | AsyncInprocClient) -> ClientEvent:
    """The next event, asked for by a call that is cancelled while it waits and then by another."""
    waiting = asyncio.create_task(client.receive())
    await asyncio.sleep(0)
    # an event that was here already has ended the call: it is the result, and there is nothing left to cancel
    return await (client.receive() if waiting.cancel() else waiting)


def tokens_of(events: list[OutputsReady]) -> dict[str, list[int]]:
    tokens: dict[str, list[int]] = {}
    for event in events:
        for output in event.outputs:
            tokens.setdefault(output.request_id, []).extend(output.token_ids)
    return tokens
