"""What a mixture of experts costs on this GPU, kernel by kernel and tile by tile.

Metric: time of one layer inside a CUDA graph that cycles through layers with distinct weights, so that every weight is
read from memory; router logits are random. The floor is the larger of the chosen experts' weights at 4.0 TB/s (what a
copy reaches on an H200) and of the arithmetic at 700 TFLOP/s. Tiles that differ in bits from the reference are marked.

    python benchmarks/gpu_moe.py [--rows 1,8,64,...] [--sweep]

The last line is one JSON document.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable
from typing import Any

import torch
import triton

from sempre.kernels.linear import GpuLinearWeight, linear
from sempre.kernels.linear.gpu import configure
from sempre.kernels.linear.gpu_table import REFERENCE, Tile
from sempre.kernels.moe import ExpertShape, ExpertWeights, GatedExperts, expert_scratch
from sempre.kernels.moe import gpu as moe
from sempre.kernels.moe.gpu_dispatch import dispatch

SHAPE = ExpertShape(128, 8, 2048, 768)
ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192)
LAYERS = 3
CANDIDATES = tuple(
    Tile(*numbers)
    for numbers in (
        (8, 32, 256, 4, 4), (8, 64, 128, 4, 4), (8, 64, 128, 4, 6), (8, 64, 256, 4, 3), (8, 128, 128, 4, 4),
        (16, 32, 256, 4, 3), (16, 32, 256, 4, 4), (16, 64, 128, 4, 3), (16, 64, 128, 4, 4), (16, 64, 128, 4, 6),
        (16, 64, 256, 4, 3), (16, 128, 64, 4, 4), (16, 128, 128, 4, 4), (32, 64, 128, 4, 4), (32, 64, 128, 4, 6),
        (32, 128, 64, 4, 5), (32, 128, 128, 8, 3), (64, 64, 128, 4, 3), (64, 64, 128, 4, 5), (64, 128, 64, 4, 4),
        (64, 128, 64, 8, 4), (64, 256, 64, 8, 3), (128, 64, 64, 4, 4), (128, 128, 64, 4, 4), (128, 128, 64, 8, 3),
        (128, 128, 64, 8, 4), (128, 256, 64, 8, 3),
    )
)  # fmt: skip


class Layers:
    """Layers with random weights and one scratch."""

    def __init__(self, rows: int) -> None:
        self.rows = rows
        generator = torch.Generator("cuda").manual_seed(rows)
        options: dict[str, Any] = {"device": "cuda", "dtype": torch.bfloat16}
        count, self.k, hidden, inner = SHAPE
        self.experts, self.gates = [], []
        for _ in range(LAYERS):
            weights = [torch.empty(count, n, k, **options).normal_(0, k**-0.5)
                       for n, k in ((2 * inner, hidden), (hidden, inner))]  # fmt: skip
            self.experts.append(GatedExperts(*map(ExpertWeights, weights)))
            self.gates.append(GpuLinearWeight(torch.empty(count, hidden, **options).normal_(0, hidden**-0.5), None))
        self.x = torch.randn(rows, hidden, generator=generator, **options)
        self.logits = torch.randn(LAYERS, rows, count, generator=generator, device="cuda")
        self.computed = torch.empty(rows, count, device="cuda")
        self.out = torch.empty_like(self.x)
        self.scratch = expert_scratch(
            lambda _, shape, dtype: torch.zeros(shape, dtype=dtype, device="cuda"), SHAPE, rows, torch.bfloat16
        )

    def microseconds(self, run: Callable[[int], object]) -> float:
        """The time of one layer, averaged over all of them."""
        walks = max(1, 24 // LAYERS) if self.rows <= 1024 else 1
        for layer in range(LAYERS):
            run(layer)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for _ in range(walks):
                for layer in range(LAYERS):
                    run(layer)
        times = []
        for _ in range(7):
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            graph.replay()
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end) * 1000 / walks / LAYERS)
        return statistics.median(times)

    def whole(self, layer: int) -> None:
        linear(self.x, self.gates[layer], self.computed)
        moe.sparse_mlp(self.x, self.logits[layer], self.experts[layer], self.scratch, self.out, renormalize=True)

    def dispatch(self, layer: int, tile: Tile) -> None:
        dispatch(self.logits[layer], self.scratch, tile.block_t, renormalize=True)

    def gate_up(self, layer: int, tile: Tile) -> torch.Tensor:
        experts = self.experts[layer].gate_up
        return moe.run_experts(self.x, experts, self.scratch, self.scratch.activated, tile, gated=True)

    def down(self, layer: int, tile: Tile) -> torch.Tensor:
        experts = self.experts[layer].down
        return moe.run_experts(self.scratch.activated, experts, self.scratch, self.scratch.parts, tile, gated=False)

    def parts(self, tile: Tile) -> dict[str, float]:
        self.dispatch(0, tile)
        combined = self.scratch.parts.view(self.rows, self.k, -1)
        return {
            "router": self.microseconds(lambda layer: linear(self.x, self.gates[layer], self.computed)),
            "dispatch": self.microseconds(lambda _: self.dispatch(0, tile)),
            "gate_up": self.microseconds(lambda layer: self.gate_up(layer, tile)),
            "down": self.microseconds(lambda layer: self.down(layer, tile)),
            "combine": self.microseconds(lambda _: moe.combine(combined, self.scratch.weights, self.out)),
        }

    def floor(self) -> float:
        self.dispatch(0, REFERENCE)
        used = int(self.scratch.experts.unique().numel())
        elements = 3 * SHAPE.hidden_size * SHAPE.intermediate_size
        return max(used * elements * 2 / 4.0e6, self.rows * self.k * elements * 2 / 700e6)

    def sweep(self) -> dict[str, tuple[float, float]]:
        """µs of gate_up and down for each tile."""
        self.dispatch(0, REFERENCE)
        expected = [self.gate_up(0, REFERENCE).clone(), self.down(0, REFERENCE).clone()]
        average = -(-self.rows * self.k // SHAPE.num_experts)
        found = {}
        for tile in CANDIDATES:
            if not (average // 4 <= tile.block_t <= max(16, 4 * average)):
                continue
            self.dispatch(0, tile)
            try:
                products = [self.gate_up(0, tile), self.down(0, tile)]
            except (RuntimeError, triton.runtime.errors.OutOfResources) as error:
                print(f"{tile}: {type(error).__name__}", flush=True)
                continue
            mark = "" if all(torch.equal(a, b) for a, b in zip(products, expected, strict=True)) else " DIFFERS"
            times = (
                self.microseconds(lambda layer, t=tile: self.gate_up(layer, t)),
                self.microseconds(lambda layer, t=tile: self.down(layer, t)),
            )
            found[f"{tile}{mark}"] = times
        return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", default=",".join(map(str, ROWS)))
    parser.add_argument("--sweep", action="store_true", help="time every candidate tile, too")
    arguments = parser.parse_args()
    configure()
    results = []
    for rows in map(int, arguments.rows.split(",")):
        layers = Layers(rows)
        tile = moe.expert_tile(torch.bfloat16, rows * SHAPE.experts_per_row, layers.experts[0].gate_up)
        whole, parts, floor = layers.microseconds(layers.whole), layers.parts(tile), layers.floor()
        shares = ", ".join(f"{name} {time:.1f}" for name, time in parts.items())
        print(f"T={rows:5} {whole:8.1f} us, floor {floor:8.1f} | {tile} | {shares}", flush=True)
        swept = layers.sweep() if arguments.sweep else {}
        for index, name in enumerate(("gate_up", "down")):
            ranking = sorted(swept.items(), key=lambda item, i=index: item[1][i])[:5]
            if ranking:
                print(f"        {name}: " + ", ".join(f"{t} {times[index]:.1f}" for t, times in ranking), flush=True)
        differing = [name for name in swept if name.endswith("DIFFERS")]
        if differing:
            print(f"        {differing}", flush=True)
        results.append({"T": rows, "us": whole, "floor": floor, "tile": str(tile), "parts": parts, "tiles": swept})
        del layers
        torch.cuda.empty_cache()
    print(json.dumps({"device": torch.cuda.get_device_name(), "shape": SHAPE, "results": results}))


if __name__ == "__main__":
    main()
