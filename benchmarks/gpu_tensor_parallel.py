"""Tensor parallelism over two GPUs of one host, guarantee on.

Parts, each by itself, so that one that fails does not stop the others:
  sums        microseconds of the sum over ranks, with residual and norm, in CUDA graphs: median of 50 replays of 20; by
              all ranks (`all`) and by each its share (`shares`)
  tests       tests/gpu/parallel
  SHAPE:TP    the rows of gpu_throughput.py for a model shape, on TP GPUs: 1 with the profile `single`, 1t with `tree8`,
              2 with `tree8`

    python benchmarks/gpu_tensor_parallel.py sums tests qwen3-8b:1 qwen3-8b:1t qwen3-8b:2

The last line is one JSON document.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any

import gpu_throughput

ROOT = Path(__file__).parents[1]
SIZE, WIDTH, DEPTH = 2, 4096, 2048
ROW_COUNTS = (1, 8, 64, 256, 512, 1024, 4096)
CALLS, REPLAYS = 20, 50
ROWS = ["latency", "batch-64", "batch-256", "prefill"]


def sums(rank: int, size: int, folder: Path) -> dict[str, dict[str, float]]:
    """What one rank measures; by number of rows and form."""
    import torch
    from gpu_ranks import exchange_of

    from sempre.kernels.exchange.contract import Norm
    from sempre.kernels.exchange.gpu import FLAG_BYTES, sum_rows, sum_shares
    from sempre.kernels.linear import GpuLinearWeight
    from sempre.workers.gpu.exchange import AREA_BYTES

    exchange = exchange_of(folder, rank, size, patience_s=20.0)
    device, peers = torch.device("cuda", rank), exchange.peers
    weight = GpuLinearWeight(torch.zeros(WIDTH, DEPTH, dtype=torch.bfloat16, device=device), None)
    figures: dict[str, dict[str, float]] = {}
    for rows in ROW_COUNTS:
        out, residual = (torch.randn(rows, WIDTH, device=device).to(torch.bfloat16) for _ in range(2))
        norm = Norm(residual, torch.ones(WIDTH, dtype=torch.bfloat16, device=device), 1e-6)
        forms = {
            "all": lambda out=out, norm=norm: sum_rows(peers, FLAG_BYTES, weight, out, norm),
            "shares": lambda out=out, norm=norm: sum_shares(
                peers, FLAG_BYTES, FLAG_BYTES + 2 * AREA_BYTES, weight, out, norm
            ),
            "meeting": exchange.begin,
        }
        figures[str(rows)] = {name: _microseconds(call, device) for name, call in forms.items()}
        exchange.check()
    return figures


def _microseconds(call: Any, device: Any) -> float:
    import torch

    call()
    torch.cuda.synchronize(device)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(CALLS):
            call()
    times = []
    for _ in range(REPLAYS + 5):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize(device)
        times.append(start.elapsed_time(end) * 1000 / CALLS)
    return round(statistics.median(times[5:]), 2)


def measure_sums() -> object:
    from gpu_ranks import in_processes

    with tempfile.TemporaryDirectory() as folder:
        figures = in_processes(SIZE, sums, Path(folder))
    for rank, own in enumerate(figures):
        for rows, forms in own.items():
            print(f"  rank {rank}  {rows:>5s} rows x {WIDTH}: {forms}", flush=True)
    return figures


def run_tests() -> object:
    command = [sys.executable, "-m", "pytest", "-q", "--durations=10", "tests/gpu/parallel"]
    done = subprocess.run(command, cwd=ROOT, check=False)
    return {"exitcode": done.returncode}


def measure_model(shape: str, layout: str, args: argparse.Namespace) -> object:
    """The rows of one engine."""
    from sempre.engine.arguments import engine_config
    from sempre.engine.client import launch

    settings: dict[str, Any] = {
        "model": str(gpu_throughput.SHAPES / shape),
        "device": "cuda",
        "load_format": "dummy",
        "enable_prefix_caching": False,
        "max_model_len": 4608,
        "max_num_seqs": 256,
        "max_num_batched_tokens": 8192,
        "numerics_profile": "single" if layout == "1" else "tree8",
        "tensor_parallel_size": int(layout.rstrip("t")),
    }
    began = time.perf_counter()
    client = launch(engine_config(**settings))
    figures: dict[str, object] = {"ready_s": round(time.perf_counter() - began, 2)}
    print(f"  ready after {figures['ready_s']} s: {client.ready.phase_seconds}", flush=True)
    try:
        for name in args.rows:
            unit, make, figure = gpu_throughput.ROWS[name]
            specs = make()
            gpu_throughput.run(client, gpu_throughput.shortened(specs))
            values = [figure(*gpu_throughput.run(client, specs)) for _ in range(args.repetitions)]
            figures[name] = {"median": round(statistics.median(values), 3), "unit": unit, "all": values}
            print(f"  {name:12s} {statistics.median(values):10.2f} {unit}", flush=True)
    finally:
        client.close()
    return figures


def part(name: str, args: argparse.Namespace) -> object:
    if name == "sums":
        return measure_sums()
    if name == "tests":
        return run_tests()
    shape, _, layout = name.partition(":")
    return measure_model(shape, layout, args)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", default=["sums", "tests", "qwen3-8b:1", "qwen3-8b:1t", "qwen3-8b:2"])
    parser.add_argument("--rows", nargs="+", default=ROWS, choices=[*gpu_throughput.ROWS])
    parser.add_argument("--repetitions", type=int, default=2)
    args = parser.parse_args()
    report: dict[str, object] = {"benchmark": "gpu_tensor_parallel", "command": sys.argv}
    report["commit"] = gpu_throughput.commit()
    for name in args.parts:
        began = time.perf_counter()
        print(f"== {name}", flush=True)
        try:
            report[name] = part(name, args)
        except Exception:
            report[name] = {"failed": traceback.format_exc()}
            traceback.print_exc()
        print(f"== {name}: {time.perf_counter() - began:.1f} s", flush=True)
    print(json.dumps(report))


if __name__ == "__main__":
    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT / "tests" / "support"), os.environ.get("PYTHONPATH", "")])
    sys.path.insert(0, str(ROOT / "tests" / "support"))
    main()
