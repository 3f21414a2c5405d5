"""Offline throughput on a CPU against other engines, in one run on one machine.

Metric: output tokens per second of a batch of `concurrency` prompts of random tokens, greedy, end of sequence
ignored, wall clock of one generate call. Every engine runs in its own process and stays loaded; the engines take turns,
so that drift of the machine affects all of them, and the median of the repetitions counts. First with the dtype that
each chooses by itself, what a user gets, then in float32. Also: output tokens per second of processor time, summed over
the engine's process tree, which a busy machine changes less (with one thread, which never waits for another); seconds
from process start until the engine is constructed; and peak resident memory of the process tree.

    python benchmarks/offline_throughput.py --vllm-python /path/to/venv-with-vllm-cpu/bin/python

The last line is one JSON document.
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
from dataclasses import dataclass, field
from pathlib import Path

import psutil
from peers import vllm_cpu
from peers.checkpoint import as_safetensors

from sempre.engine.models import resolve_model
from sempre.engine.version import __version__

PEERS = Path(__file__).parent / "peers"

# the threads of the previous engine may still spin
PAUSE_S = 1.0


@dataclass
class Engine:
    """One engine in its own process, driven by lines on its standard input and output."""

    name: str
    command: list[str]
    environment: dict[str, str]
    ready_s: float = 0.0
    tokens_per_s: dict[int, list[float]] = field(default_factory=dict)
    tokens_per_cpu_s: dict[int, list[float]] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)

    def start(self) -> None:
        began = time.perf_counter()
        self.process = subprocess.Popen(
            self.command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=os.environ | self.environment
        )
        self.versions = self._answer()["versions"]
        self.ready_s = time.perf_counter() - began

    def _answer(self) -> dict:
        while line := self.process.stdout.readline():
            if line.startswith("@"):
                return json.loads(line[1:])
        raise RuntimeError(f"{self.name} ended with exit code {self.process.wait()}")

    def run(self, prompts: list[list[int]], output_len: int) -> tuple[float, float]:
        """Output tokens per second of one generate call, and per second of processor time."""
        used = self._cpu_seconds()
        self.process.stdin.write(json.dumps({"prompts": prompts, "output_len": output_len}) + "\n")
        self.process.stdin.flush()
        answer = self._answer()
        assert answer["output_tokens"] == len(prompts) * output_len, (self.name, answer)
        tokens = answer["output_tokens"]
        return tokens / answer["seconds"], tokens / (self._cpu_seconds() - used)

    def _tree(self) -> list[psutil.Process]:
        root = psutil.Process(self.process.pid)
        return [root, *root.children(recursive=True)]

    def _cpu_seconds(self) -> float:
        return sum(times.user + times.system for times in (process.cpu_times() for process in self._tree()))

    def peak_resident_bytes(self) -> int:
        return sum(_peak(process.pid) for process in self._tree())

    def stop(self) -> None:
        self.process.stdin.close()
        self.process.wait(timeout=60)


def _peak(pid: int) -> int:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return 0


def _engines(args: argparse.Namespace, model: str, dtype: str) -> list[Engine]:
    threads = str(args.threads)
    common = ["--model", model, "--dtype", dtype, "--threads", threads]
    engines = [Engine("sempre", [sys.executable, str(PEERS / "run_sempre.py"), *common], {})]
    engines.append(
        Engine(
            "transformers", [sys.executable, str(PEERS / "run_transformers.py"), *common], {"OMP_NUM_THREADS": threads}
        )
    )
    if args.vllm_python:
        environment = vllm_cpu.environment(args.vllm_python, args.threads) | {"VLLM_LOGGING_LEVEL": "ERROR"}
        engines.append(Engine("vllm-cpu", [args.vllm_python, str(PEERS / "run_vllm.py"), *common], environment))
    return [engine for engine in engines if engine.name in args.engines]


def _prompts(count: int, length: int, round_number: int) -> list[list[int]]:
    """Distinct prompts in every round, so that no prefix cache helps."""
    return [
        [1000 + (i * 7919 + j * 104729 + round_number * 1299709) % 40000 for j in range(length)] for i in range(count)
    ]


def _measure(engines: list[Engine], args: argparse.Namespace) -> None:
    for engine in engines:
        engine.run(_prompts(2, args.input_len, 999), 4)
    for concurrency in args.concurrency:
        for repetition in range(args.repetitions):
            for engine in engines:
                time.sleep(PAUSE_S)
                prompts = _prompts(concurrency, args.input_len, concurrency * 100 + repetition)
                speed, per_cpu = engine.run(prompts, args.output_len)
                engine.tokens_per_s.setdefault(concurrency, []).append(speed)
                engine.tokens_per_cpu_s.setdefault(concurrency, []).append(per_cpu)
                print(
                    f"  {engine.name:13s} {concurrency:3d} x {args.input_len}/{args.output_len}: {speed:8.1f} tok/s,"
                    f" {per_cpu:8.1f} per CPU second",
                    flush=True,
                )


def _report(engines: list[Engine]) -> dict:
    """By engine."""
    rows = {}
    for engine in engines:
        rows[engine.name] = {
            "output_tokens_per_s": _medians(engine.tokens_per_s),
            "output_tokens_per_cpu_s": _medians(engine.tokens_per_cpu_s),
            "start_to_ready_s": round(engine.ready_s, 2),
            "peak_resident_mb": round(engine.peak_resident_bytes() / 2**20),
            "versions": engine.versions,
        }
    ours = rows["sempre"]
    for name, row in rows.items():
        speeds = "  ".join(f"{c}: {v:8.1f}" for c, v in row["output_tokens_per_s"].items())
        print(f"{name:13s} tok/s {speeds}   ready {row['start_to_ready_s']:6.1f} s   {row['peak_resident_mb']} MB")
        row["sempre_over_this"] = {
            **{
                name: {c: round(ours[name][c] / v, 2) for c, v in row[name].items()}
                for name in ("output_tokens_per_s", "output_tokens_per_cpu_s")
            },
            "start_to_ready": round(ours["start_to_ready_s"] / row["start_to_ready_s"], 3),
            "resident": round(ours["peak_resident_mb"] / row["peak_resident_mb"], 3),
        }
    return rows


def _medians(speeds: dict[int, list[float]]) -> dict[str, float]:
    return {str(concurrency): round(statistics.median(values), 2) for concurrency, values in speeds.items()}


def _compare(args: argparse.Namespace, model: str, dtype: str) -> dict:
    """All engines with one dtype; by engine."""
    engines = _engines(args, model, dtype)
    for engine in engines:
        engine.start()
        print(f"{engine.name}: ready after {engine.ready_s:.1f} s", flush=True)
    _measure(engines, args)
    report = _report(engines)
    for engine in engines:
        engine.stop()
    return report


def _document(args: argparse.Namespace, by_dtype: dict) -> dict:
    return {
        "benchmark": "offline_throughput",
        "model": args.model,
        "input_len": args.input_len,
        "output_len": args.output_len,
        "threads": args.threads,
        "repetitions": args.repetitions,
        "machine": platform.machine(),
        "version": __version__,
        "dtypes": by_dtype,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--dtypes", nargs="+", default=["auto", "float32"], help="auto: what each engine chooses")
    parser.add_argument("--input-len", type=int, default=128)
    parser.add_argument("--output-len", type=int, default=64)
    parser.add_argument("--concurrency", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--vllm-python", help="python of a virtual environment that holds vllm-cpu")
    parser.add_argument("--engines", nargs="+", default=["sempre", "transformers", "vllm-cpu"])
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        model = str(as_safetensors(resolve_model(args.model).path, Path(scratch)))
        by_dtype = {}
        for dtype in args.dtypes:
            print(f"dtype {dtype}")
            by_dtype[dtype] = _compare(args, model, dtype)
    print(json.dumps(_document(args, by_dtype)))


if __name__ == "__main__":
    main()
