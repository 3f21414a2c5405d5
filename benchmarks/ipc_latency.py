"""What it costs per step that coordinator and workers are separate processes.

The same engine with the same model-less worker runs in processes and inside this one; both schedule, sample and deliver
the same tokens. The difference per step is the price of the two hops (coordinator ⇄ worker and coordinator → client):
encoding, checksums, ZeroMQ, context switches, decoding. Steps decode one token for each of N requests.

    python benchmarks/ipc_latency.py
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import sys
import time
from importlib import import_module
from pathlib import Path

import msgspec
import zmq

from sempre.engine.arguments import engine_config
from sempre.engine.client import EngineClient
from sempre.engine.client.inproc import InprocClient
from sempre.engine.executor.inproc import InprocExecutor
from sempre.engine.harness import Cluster, make_request
from sempre.engine.version import __version__
from sempre.ipc.messages import AddRequests, OutputsReady

SUPPORT = Path(__file__).resolve().parents[1] / "tests" / "support"
WORKER = "scripted_worker"
CONCURRENCIES = (1, 8, 32, 128)
STEPS = 500
ROUNDS = 5


def seconds_per_step(client: EngineClient, num_requests: int) -> float:
    """Median over rounds of the mean time between two outputs, without the first steps."""
    means = []
    for _ in range(ROUNDS):
        requests = [
            make_request([1, 2, 3], ordinal=i, max_tokens=STEPS, logprobs=0, request_id=f"request-{i}")
            for i in range(num_requests)
        ]
        client.send(AddRequests(requests=requests))
        times: list[float] = []
        unfinished = num_requests
        while unfinished:
            event = client.receive(60)
            assert isinstance(event, OutputsReady)
            times.append(time.perf_counter())
            unfinished -= sum(output.finish_reason is not None for output in event.outputs)
        means.append((times[-1] - times[10]) / (len(times) - 11))
    return statistics.median(means)


def main() -> None:
    os.environ["PYTHONPATH"] = str(SUPPORT)
    sys.path.append(str(SUPPORT))
    config = engine_config("tiny", multiprocessing=False)
    inproc = InprocClient.launch(config, executor=InprocExecutor(config, import_module(WORKER).ScriptedWorker))
    rows = []
    print(f"{'requests':>8} {'one process, ms':>16} {'processes, ms':>14} {'difference, ms':>15}")
    with Cluster("tiny", worker_module=WORKER) as cluster:
        for concurrency in CONCURRENCIES:
            alone_ms = 1000 * seconds_per_step(inproc, concurrency)
            apart_ms = 1000 * seconds_per_step(cluster.client, concurrency)
            print(f"{concurrency:8} {alone_ms:16.3f} {apart_ms:14.3f} {apart_ms - alone_ms:15.3f}")
            rows.append({"requests": concurrency, "one_process_ms": alone_ms, "processes_ms": apart_ms})
    inproc.close()
    versions = {"python": platform.python_version(), "msgspec": msgspec.__version__, "zmq": zmq.zmq_version()}
    print(json.dumps({"rows": rows, "cores": os.cpu_count(), "engine": __version__, "versions": versions}))


if __name__ == "__main__":
    main()
