"""What control costs per step: a step sent to 8 workers over ipc:// and over tcp:// with CURVE, and a model of many.

Measured: a hub in this process and 8 worker processes exchange the engine's own messages, in its own frames, over its
own kind of socket. A round is a step for R requests sent to every worker, decoded there, answered with one token for
each, and all answers decoded and compared here; nothing is computed. Rounds follow each other at once. With fewer cores
than workers the processes wait for each other, so the figures are those of a crowded host.

`plan` is a whole step of a coordinator with one worker in the same process, which computes nothing: scheduling, and
taking the result.

The model (`control_plane_model.py`) is fed with the costs of one worker: what the coordinator pays per message, and the
latency that is left of a round. The latency between hosts cannot be measured here: `--latency-away-us` is added to that
of tcp:// on loopback.

    python benchmarks/control_plane.py
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from importlib import import_module
from pathlib import Path
from typing import Any

import zmq
from control_plane_model import Costs, FanOut, Layout, Simulation

from sempre.engine.arguments import engine_config
from sempre.engine.client.inproc import InprocClient
from sempre.engine.coordinator.rank_comparison import compare_ranks
from sempre.engine.executor.inproc import InprocExecutor
from sempre.engine.harness import make_request
from sempre.engine.version import __version__
from sempre.ipc.channel import Link, configure
from sempre.ipc.codec import FrameDecoder, FrameEncoder
from sempre.ipc.messages import (
    AddRequests,
    ExecuteStep,
    OutputsReady,
    SampledTokens,
    ScheduledRequest,
    StepResult,
    WorkerCommand,
    WorkerEvent,
)

SUPPORT = Path(__file__).resolve().parents[1] / "tests" / "support"
LIMIT_BYTES = 2**28
WORKERS = 8
REQUESTS = (1, 64, 256)
ROUNDS, WARM_UP = 1000, 100
LAYOUTS = [
    Layout(replicas, ranks, hosts, fan_out)
    for replicas, ranks, hosts in ((1, 8, 1), (1, 8, 2), (8, 8, 2), (1, 64, 2), (1, 64, 16), (64, 8, 16), (1, 512, 16))
    for fan_out in ("direct", "by host")
]


def step(step_id: int, num_requests: int) -> ExecuteStep:
    """A decode step: one token for each request, one of 16 with a new block."""
    scheduled = [
        ScheduledRequest(
            request_id=f"request-{i}",
            num_computed_tokens=500 + step_id,
            num_tokens=1,
            block_table_start=32,
            block_ids=[7000 + i] if (i + step_id) % 16 == 0 else [],
        )
        for i in range(num_requests)
    ]
    return ExecuteStep(step_id=step_id, scheduled=scheduled)


def result(rank: int, command: ExecuteStep) -> StepResult:
    """What a rank of a tensor-parallel replica answers."""
    sampled = [
        SampledTokens(request_id=item.request_id, token_ids=[1234], hidden_digest=b"12345678")
        for item in command.scheduled
    ]
    return StepResult(rank=rank, step_id=command.step_id, sampled=sampled)


def work(address: str, rank: int, server_key: str) -> None:
    """A worker: says hello with an empty step's result, then answers steps until it is killed."""
    socket = zmq.Context.instance().socket(zmq.DEALER)
    configure(socket, LIMIT_BYTES)
    if server_key:
        socket.curve_publickey, socket.curve_secretkey = zmq.curve_keypair()
        socket.curve_serverkey = server_key.encode()
    socket.connect(address)
    link: Link[WorkerCommand] = Link(FrameEncoder(LIMIT_BYTES), FrameDecoder(WorkerCommand, LIMIT_BYTES))
    socket.send(link.pack(StepResult(rank=rank, step_id=0)))
    while True:
        command = link.unpack(socket.recv_multipart())
        assert isinstance(command, ExecuteStep)
        socket.send(link.pack(result(rank, command)))


class Hub:
    """The coordinator's end, and its workers."""

    def __init__(self, stack: ExitStack, transport: str, num_workers: int) -> None:
        self.socket = zmq.Context.instance().socket(zmq.ROUTER)
        stack.callback(self.socket.close)
        configure(self.socket, LIMIT_BYTES)
        key = b""
        if transport == "tcp+curve":
            key, secret = zmq.curve_keypair()
            self.socket.curve_server, self.socket.curve_publickey, self.socket.curve_secretkey = True, key, secret
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        self.socket.bind(f"ipc://{folder}/hub.sock" if transport == "ipc" else "tcp://127.0.0.1:*")
        address = self.socket.last_endpoint.decode().rstrip("\0")
        for rank in range(num_workers):
            command = [sys.executable, __file__, "--worker", address, str(rank), key.decode()]
            process = subprocess.Popen(command)
            stack.callback(process.wait)
            stack.callback(process.kill)
        self.links: dict[bytes, Link[WorkerEvent]] = {}
        encoder, decoder = FrameEncoder(LIMIT_BYTES), FrameDecoder(WorkerEvent, LIMIT_BYTES)
        while len(self.links) < num_workers:
            identity, frame = self.socket.recv_multipart()
            self.links[identity] = Link(encoder, decoder)
            self.links[identity].unpack([frame])
        self.sent_bytes = self.received_bytes = 0

    def round(self, command: ExecuteStep) -> tuple[float, float, float]:
        """Seconds of a whole round, of sending, and of receiving without waiting."""
        start = time.perf_counter()
        for identity, link in self.links.items():
            frame = link.pack(command)
            self.sent_bytes = len(frame)
            self.socket.send_multipart([identity, frame], zmq.DONTWAIT)
        sent = time.perf_counter()
        results, receiving = {}, 0.0
        while len(results) < len(self.links):
            self.socket.poll()
            began = time.perf_counter()
            identity, frame = self.socket.recv_multipart()
            self.received_bytes = len(frame)
            event = self.links[identity].unpack([frame])
            assert isinstance(event, StepResult)
            results[event.rank] = event
            receiving += time.perf_counter() - began
        began = time.perf_counter()
        compare_ranks(results, len(results))
        end = time.perf_counter()
        return end - start, sent - start, receiving + end - began


def measured(transport: str, num_workers: int, num_requests: int) -> dict[str, Any]:
    """Of many rounds: median and 99th percentile, and the costs of one message, in microseconds."""
    with ExitStack() as stack:
        hub = Hub(stack, transport, num_workers)
        times = [hub.round(step(i, num_requests)) for i in range(WARM_UP + ROUNDS)][WARM_UP:]
    whole, sending, receiving = zip(*times, strict=True)
    return {
        "transport": transport,
        "workers": num_workers,
        "requests": num_requests,
        "median_us": 1e6 * statistics.median(whole),
        "p99_us": 1e6 * statistics.quantiles(whole, n=100)[98],
        "send_us": 1e6 * statistics.median(sending) / num_workers,
        "receive_us": 1e6 * statistics.median(receiving) / num_workers,
        "step_bytes": hub.sent_bytes,
        "result_bytes": hub.received_bytes,
    }


def worker_seconds(num_requests: int) -> float:
    """What a worker pays per step to decode it and to encode its answer."""
    sender: Link[WorkerEvent] = Link(FrameEncoder(LIMIT_BYTES), FrameDecoder(WorkerEvent, LIMIT_BYTES))
    receiver: Link[WorkerCommand] = Link(FrameEncoder(LIMIT_BYTES), FrameDecoder(WorkerCommand, LIMIT_BYTES))
    times = []
    for i in range(300):
        frame = bytes(sender.pack(step(i, num_requests)))
        start = time.perf_counter()
        command = receiver.unpack([frame])
        assert isinstance(command, ExecuteStep)
        receiver.pack(result(0, command))
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def plan_seconds(num_requests: int) -> float:
    """A step of a coordinator with a worker in this process, which computes next to nothing."""
    config = engine_config("tiny", multiprocessing=False, max_num_seqs=max(REQUESTS))
    client = InprocClient.launch(config, executor=InprocExecutor(config, import_module("light_worker").LightWorker))
    requests = [make_request([1, 2, 3], ordinal=i, max_tokens=200, request_id=str(i)) for i in range(num_requests)]
    client.send(AddRequests(requests=requests))
    times = []
    for _ in range(190):
        start = time.perf_counter()
        event = client.receive(60)
        assert isinstance(event, OutputsReady)
        times.append(time.perf_counter() - start)
    client.close()
    return statistics.median(times)


def costs(num_requests: int, rows: list[dict[str, Any]], latency_away_s: float) -> Costs:
    """What the model is fed with: the costs of a message with one worker, and what is left of a round as latency."""
    here, away = (
        next(r for r in rows if (r["transport"], r["workers"], r["requests"]) == (transport, 1, num_requests))
        for transport in ("ipc", "tcp+curve")
    )
    worker = worker_seconds(num_requests)

    def latency(row: dict[str, Any]) -> float:
        left = row["median_us"] - row["send_us"] - row["receive_us"] - 1e6 * worker
        return max(0.0, left / 2) * 1e-6

    return Costs(
        plan=plan_seconds(num_requests),
        send=away["send_us"] * 1e-6,
        receive=away["receive_us"] * 1e-6,
        worker=worker,
        latency_here=latency(here),
        latency_away=latency(away) + latency_away_s,
        step_bytes=away["step_bytes"],
        result_bytes=away["result_bytes"],
    )


def simulated(fed: Costs, layout: Layout, compute_s: float, in_flight: int) -> dict[str, Any]:
    """One row of the model."""
    found = Simulation(fed, layout, compute_s=compute_s, in_flight=in_flight).run()
    fan_out: FanOut = layout.fan_out
    return {
        "workers": layout.workers,
        "replicas": layout.replicas,
        "ranks": layout.ranks,
        "hosts": layout.hosts,
        "fan_out": fan_out,
        "in_flight": in_flight,
        "overhead_us": 1e6 * found.overhead_median_s,
        "overhead_p99_us": 1e6 * found.overhead_p99_s,
        "coordinator_load": found.coordinator_load,
        "kilobytes_between_hosts": found.bytes_between_hosts_per_step / 1e3,
    }


def table(rows: list[dict[str, Any]]) -> None:
    """Print rows with the same keys."""
    names = list(rows[0])
    cells = [[f"{row[name]:.2f}" if isinstance(row[name], float) else str(row[name]) for name in names] for row in rows]
    widths = [max(len(name), *(len(row[i]) for row in cells)) for i, name in enumerate(names)]
    for row in [names, *cells]:
        print("  ".join(f"{cell:>{width}}" for cell, width in zip(row, widths, strict=True)))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--latency-away-us", type=float, default=20.0, help="one way between two hosts of a cluster")
    parser.add_argument("--compute-ms", type=float, default=10.0, help="of a step in the model")
    parser.add_argument("--requests", type=int, default=64, choices=REQUESTS, help="of a replica in the model")
    options = parser.parse_args()
    sys.path.append(str(SUPPORT))
    rows = [
        measured(transport, num_workers, num_requests)
        for transport in ("ipc", "tcp+curve")
        for num_workers in (1, WORKERS)
        for num_requests in REQUESTS
    ]
    table(rows)
    fed = costs(options.requests, rows, options.latency_away_us * 1e-6)
    print(f"\nthe model's costs, in microseconds and bytes: {shown(fed)}\n")
    model = [simulated(fed, layout, options.compute_ms * 1e-3, in_flight) for in_flight in (1, 2) for layout in LAYOUTS]
    table(model)
    document = {
        "measured": rows,
        "costs": vars(fed),
        "model": model,
        "cores": os.cpu_count(),
        "load": os.getloadavg(),
        "engine": __version__,
        "versions": {"python": platform.python_version(), "zmq": zmq.zmq_version()},
    }
    print(json.dumps(document))


def shown(fed: Costs) -> dict[str, float]:
    """Seconds as microseconds."""
    return {name: round(value * 1e6, 1) if isinstance(value, float) else value for name, value in vars(fed).items()}


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        work(sys.argv[2], int(sys.argv[3]), sys.argv[4])
    else:
        main()
