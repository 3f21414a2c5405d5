"""The matmul of a CPU, with one thread: bfloat16 weights with inputs rounded to bfloat16, and with float32 inputs.

Metric: 10^9 floating-point operations per second of the thread's processor time, the best of several rounds that take
turns; and for one row the weight's bytes per second, since that is what bounds it. The shapes are SmolLM2-135M's.

    python benchmarks/cpu_linear.py

The last line is one JSON document.
"""

from __future__ import annotations

import argparse
import json
import platform
import time

import torch

from sempre.engine.version import __version__
from sempre.kernels.linear import linear, pack_bfloat16_linear, pack_linear
from sempre.kernels.linear.cpu_pairs import TILES
from sempre.kernels.threads import set_num_threads

SHAPES = {"qkv": (576, 960), "o": (576, 576), "gate_up": (576, 3072), "down": (1536, 576), "head": (576, 49152)}
ROWS = (1, 4, 8, 32, 240)
ROUNDS = 5
OPERATIONS_PER_ROUND = 1e9


def _seconds(x: torch.Tensor, weight: object, out: torch.Tensor, times: int) -> float:
    began = time.thread_time()
    for _ in range(times):
        linear(x, weight, out)
    return (time.thread_time() - began) / times


def _measure(depth: int, columns: int, rows: int) -> dict[str, float]:
    """GFLOP/s by kind of inputs."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(columns, depth, generator=generator).bfloat16()
    x, out = torch.randn(rows, depth, generator=generator), torch.empty(rows, columns)
    operations = 2 * rows * depth * columns
    times = max(2, int(OPERATIONS_PER_ROUND / operations))
    packed = {"bfloat16": pack_bfloat16_linear(weight), "float32": pack_linear(weight)}
    best: dict[str, float] = {}
    for _ in range(ROUNDS):
        for kind, weights in packed.items():
            linear(x, weights, out)
            best[kind] = min(best.get(kind, float("inf")), _seconds(x, weights, out, times))
    return {kind: operations / seconds * 1e-9 for kind, seconds in best.items()}


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    set_num_threads(1)
    rows_of = []
    print(f"{'':8} {'K':>5} {'N':>6} {'rows':>5} {'bfloat16':>9} {'float32':>8} GFLOP/s")
    for name, (depth, columns) in SHAPES.items():
        for rows in ROWS:
            found = _measure(depth, columns, rows)
            # a weight element takes two bytes and, for one row, two operations
            bytes_per_s = f"{found['bfloat16']:8.0f} GB/s" if rows == 1 else ""
            speeds = f"{found['bfloat16']:9.0f} {found['float32']:8.0f}"
            print(f"{name:8} {depth:5} {columns:6} {rows:5} {speeds} {bytes_per_s}")
            rows_of.append({"linear": name, "in": depth, "out": columns, "rows": rows, "gflop_per_s": found})
    document = {"benchmark": "cpu_linear", "tiles": TILES.name, "results": rows_of, "version": __version__}
    print(json.dumps(document | {"machine": platform.machine(), "torch": str(torch.__version__)}))


if __name__ == "__main__":
    main()
