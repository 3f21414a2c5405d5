"""What is told of each rank while it works: its step, a digest of it, its memory, and where it is when it lags."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable

import msgspec
import pytest

from sempre.engine.executor.worker_peer import step_digest
from sempre.engine.harness import Cluster
from sempre.ipc.messages import AddRequests, CallWorkers, RequestSpec, SampledTokens, StepResult, WorkerHealth

Start = Callable[..., Cluster]
Requests = Callable[..., list[RequestSpec]]
INTERVAL_S = 0.1
SPECULATIVE = {
    "method": "draft_model",
    "model": "tiny-draft",
    "placement": "worker",
    "num_speculative_tokens": 2,
    "adaptive": False,
}


def ranks_when(cluster: Cluster, wanted: Callable[[WorkerHealth], bool], rank: int = 0) -> list[WorkerHealth]:
    """All ranks, once one of them is as wanted."""
    deadline = time.monotonic() + 10
    while not wanted((ranks := cluster.ranks())[rank]):
        assert time.monotonic() < deadline, ranks[rank]
        time.sleep(0.05)
    return ranks


def test_each_rank_tells_its_step_and_its_memory(start: Start, requests: Requests) -> None:
    cluster = start(tensor_parallel_size=2, speculative_config=SPECULATIVE, heartbeat_interval_s=INTERVAL_S)
    cluster.generate(requests(3))
    ranks = ranks_when(cluster, lambda worker: worker.resident_bytes is not None)
    assert [(worker.rank, worker.role, worker.state) for worker in ranks] == [
        (0, "target", "ready"),
        (1, "target", "ready"),
        (2, "draft", "ready"),
    ]
    assert {worker.host for worker in ranks} == {socket.gethostname()}
    assert [worker.pid for worker in ranks[:2]] == cluster.worker_pids()
    one, other, draft = ranks
    assert one.step_id is not None
    assert (one.step_id, one.step_digest) == (other.step_id, other.step_digest)
    assert draft.step_digest not in ("", one.step_digest)
    # a process with an interpreter, and no more than one
    assert 2**22 < (one.resident_bytes or 0) < 2**30
    assert [worker.stack for worker in ranks] == ["", "", ""]


def test_a_digest_tells_steps_apart() -> None:
    row = SampledTokens(request_id="a", token_ids=[1], hidden_digest=b"1")
    digests = [
        step_digest(StepResult(rank=rank, step_id=3, sampled=[msgspec.structs.replace(row, **other)]))
        for rank, other in enumerate([{}, {}, {"hidden_digest": b"2"}, {"token_ids": [2]}, {"request_id": "b"}])
    ]
    assert digests[0] == digests[1]
    assert len(set(digests)) == 4


def test_a_rank_that_lags_tells_where_it_is(start: Start, requests: Requests) -> None:
    cluster = start(heartbeat_interval_s=INTERVAL_S)
    cluster.call("slow", 1.5)
    cluster.client.send(AddRequests(requests=requests(1, max_tokens=1)))
    [worker] = ranks_when(cluster, lambda worker: worker.stack != "")
    # longer than four intervals of the heartbeat
    assert (worker.step_age_s or 0.0) > 0.4
    assert (worker.heartbeat_age_s or 0.0) < 0.4
    assert worker.stack.startswith("  File ")
    assert worker.stack.endswith("time.sleep(self._step_seconds)")
    assert ", in execute\n" in worker.stack
    # and no longer once it has gone on
    ranks_when(cluster, lambda worker: worker.stack == "" and worker.step_id is not None)


def test_a_rank_that_cannot_run_any_thread_is_asked_by_signal(start: Start) -> None:
    cluster = start(heartbeat_interval_s=INTERVAL_S, heartbeat_timeout_s=8.0)
    cluster.client.send(CallWorkers(call_id=999, method="hold", args=[1.5]))
    [worker] = ranks_when(cluster, lambda worker: "in hold" in worker.stack)
    assert (worker.heartbeat_age_s or 0.0) > 0.3
    assert "(most recent call first)" in worker.stack
    ranks_when(cluster, lambda worker: worker.stack == "")
    assert cluster.call("ping") == ["pong"]


@pytest.mark.product
def test_a_stopped_rank_is_told_from_a_busy_one(start: Start) -> None:
    cluster = start(data_parallel_size=2, heartbeat_interval_s=INTERVAL_S)
    cluster.stop(1)
    ranks = ranks_when(cluster, lambda worker: worker.process_state == "stopped", rank=1)
    assert ranks[0].process_state in ("sleeping", "running")
    cluster.resume(1)
    ranks_when(cluster, lambda worker: worker.process_state in ("sleeping", "running"), rank=1)
    assert cluster.call("ping") == ["pong", "pong"]
