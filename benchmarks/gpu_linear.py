"""Which kernel is fastest for each matmul of a model on this GPU, at each number of rows; prints the lines of a table
for `kernels/linear/gpu_table.py`.

Metric: time of one matmul inside a CUDA graph that cycles through enough copies of the weight to overflow the cache, so
every weight is read from memory, as in a decode step. GB/s counts the weight once; TFLOP/s counts 2 T N K. Every
candidate is also compared bitwise with the reference tile; one that differs is marked and never recommended.

    python benchmarks/gpu_linear.py [--shapes 4096x6144,...] [--rows 1,16,...] [--scheme fp8|fp8_weight_only]

With `--scheme` the weights are fp8, and "default" is still the ordinary matmul with bfloat16 weights of that shape; fp8
includes the time that quantising the rows takes, also shown alone.

The last line is one JSON document.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import statistics
from collections.abc import Callable
from typing import Any

import torch
import triton

from sempre.kernels.activation import silu_and_mul
from sempre.kernels.fp8 import Fp8Scheme, quantize_channels
from sempre.kernels.linear import GpuLinearWeight
from sempre.kernels.linear.gpu import configure, operands, run_choice, run_fused_tile
from sempre.kernels.linear.gpu_table import FP8_REFERENCE, LIBRARY, REFERENCE, Choice, Tile, Warps

# (K, N): qkv, o, gate_up, down, lm_head of an 8B and a 0.6B model
SHAPES = ((4096, 6144), (4096, 4096), (4096, 24576), (12288, 4096), (4096, 151936),
          (1024, 4096), (2048, 1024), (1024, 6144), (3072, 1024), (1024, 151936))  # fmt: skip
FUSED = ((4096, 24576), (1024, 6144))
ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 1024, 4096)

CANDIDATES = tuple(
    Tile(*numbers)
    for numbers in (
        (8, 16, 256, 1, 6), (8, 32, 256, 4, 4), (8, 64, 128, 4, 6),
        (16, 16, 256, 1, 6), (16, 16, 512, 1, 3), (16, 32, 256, 4, 4), (16, 32, 128, 4, 6), (16, 64, 128, 4, 6),
        (32, 16, 256, 1, 4), (32, 32, 256, 2, 4), (32, 64, 128, 4, 6),
        (64, 16, 256, 2, 3), (64, 32, 256, 4, 3), (64, 32, 128, 4, 4), (64, 64, 128, 4, 5),
        (128, 32, 128, 4, 4), (128, 64, 64, 4, 6), (128, 64, 128, 4, 4), (128, 128, 64, 8, 4),
    )
)  # fmt: skip
# block_n features of each half here
FUSED_CANDIDATES = tuple(
    Tile(*numbers)
    for numbers in (
        (8, 16, 256, 2, 4), (8, 32, 128, 4, 6), (8, 64, 128, 4, 4), (16, 16, 256, 2, 4), (16, 32, 128, 4, 6),
        (16, 64, 128, 4, 4), (16, 64, 64, 4, 6), (32, 32, 128, 4, 5), (32, 64, 64, 4, 6), (64, 32, 128, 4, 4),
        (64, 64, 64, 4, 5), (128, 64, 64, 4, 4), (128, 64, 64, 8, 4),
    )
)  # fmt: skip
# on the fp8 tensor cores: at least 64 features, 4 or 8 warps, block_k a multiple of 128
FP8_CANDIDATES = tuple(
    Tile(*numbers)
    for numbers in (
        (8, 64, 128, 4, 6), (8, 64, 256, 4, 5), (8, 64, 512, 4, 3), (8, 128, 256, 4, 4), (16, 64, 128, 4, 6),
        (16, 64, 256, 4, 5), (16, 64, 512, 4, 3), (16, 128, 128, 4, 6), (32, 64, 128, 4, 6), (32, 64, 256, 4, 4),
        (32, 128, 128, 4, 5), (64, 64, 128, 4, 5), (64, 64, 256, 4, 3), (64, 128, 128, 4, 4), (128, 64, 128, 4, 4),
        (128, 128, 128, 4, 4), (128, 128, 128, 8, 4), (256, 64, 128, 4, 3), (256, 128, 128, 8, 3),
    )
)  # fmt: skip
FP8_WARPS = (Warps(256, 128, 4), Warps(128, 128, 5))
MOST_ROWS_OF_TILES = 64
CACHE_OVERFLOW = 200 << 20


def fitting(candidates: tuple[Tile, ...], rows: int) -> list[Tile]:
    """Tiles that waste less than half of their rows, or are the smallest."""
    wanted = min(128, max(16, 1 << (rows - 1).bit_length()))
    return [t for t in candidates if t.block_t == wanted or (t.block_t == 8 and rows <= 8) or
            (wanted >= 64 and t.block_t == wanted // 2)]  # fmt: skip


def make(depth: int, columns: int, copies: int) -> list[GpuLinearWeight]:
    generator = torch.Generator("cuda").manual_seed(depth + columns)
    return [
        GpuLinearWeight(
            torch.randn(columns, depth, generator=generator, device="cuda", dtype=torch.bfloat16).mul_(depth**-0.5),
            None,
        )
        for _ in range(copies)
    ]


def microseconds(run: Callable[[GpuLinearWeight], object], weights: list[GpuLinearWeight]) -> float:
    run(weights[0])
    graph = torch.cuda.CUDAGraph()
    calls = max(8, len(weights))
    with torch.cuda.graph(graph):
        for i in range(calls):
            run(weights[i % len(weights)])
    graph.replay()
    times = []
    for _ in range(3):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1000 / calls)
    return statistics.median(times)


def usable(tile: Tile, run: Callable[..., object], columns: int) -> bool:
    """Compile and run the tile once; False, with a message, if this GPU cannot hold it."""
    w = GpuLinearWeight(torch.randn(2048, 1024, device="cuda", dtype=torch.bfloat16), None)
    x = torch.randn(4, 1024, device="cuda", dtype=torch.bfloat16)
    try:
        run(x, w, torch.empty(4, columns, device="cuda", dtype=torch.bfloat16), tile)
    except (RuntimeError, ValueError, triton.runtime.errors.OutOfResources, triton.CompilationError) as error:
        print(f"{tile}: {type(error).__name__}: {str(error)[:120]}", flush=True)
        return False
    return True


def compile_tiles(part: int, parts: int) -> None:
    """Fill the compiler's cache on disk, one of several processes."""
    for tile in CANDIDATES[part::parts]:
        usable(tile, run_choice, 2048)
    for tile in FUSED_CANDIDATES[part::parts]:
        usable(tile, run_fused_tile, 1024)


def measure(
    depth: int, columns: int, rows: int, weights: list[GpuLinearWeight], tiles: list[Tile], fused_tiles: list[Tile]
) -> dict[str, Any]:
    x = torch.randn(rows, depth, device="cuda", dtype=torch.bfloat16)
    out = torch.empty(rows, columns, device="cuda", dtype=torch.bfloat16)
    expected = run_choice(x, weights[0], torch.empty_like(out), REFERENCE)
    torch.backends.cuda.preferred_blas_library("default")
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = True
    control = microseconds(lambda w: torch.mm(x, w.weight.t(), out=out), weights)
    configure()
    times: dict[str, float] = {}
    differ: list[str] = []
    for choice in (LIBRARY, *tiles):
        found = run_choice(x, weights[0], torch.full_like(out, float("nan")), choice)
        if not torch.equal(found, expected):
            differ.append(str(choice))
        times[str(choice)] = microseconds(lambda w, c=choice: run_choice(x, w, out, c), weights)
    fused: dict[str, float] = {}
    if (depth, columns) in FUSED:
        half = torch.empty(rows, columns // 2, device="cuda", dtype=torch.bfloat16)
        best = min(times.items(), key=lambda item: item[1])[0]
        by_name = {str(choice): choice for choice in (LIBRARY, *tiles)}
        fused["two steps"] = microseconds(lambda w: silu_and_mul(run_choice(x, w, out, by_name[best]), half), weights)
        for tile in fused_tiles:
            fused[str(tile)] = microseconds(lambda w, c=tile: run_fused_tile(x, w, half, c), weights)
    return {"K": depth, "N": columns, "T": rows, "default": control, "times": times, "fused": fused, "differ": differ,
            "weight_bytes": 2}  # fmt: skip


def measure_fp8(depth: int, columns: int, rows: int, scheme: Fp8Scheme, choices: list[Choice]) -> dict[str, Any]:
    x = torch.randn(rows, depth, device="cuda", dtype=torch.bfloat16)
    out = torch.empty(rows, columns, device="cuda", dtype=torch.bfloat16)
    plain = make(depth, columns, max(1, -(-CACHE_OVERFLOW // (2 * depth * columns))))
    control = microseconds(lambda w: torch.mm(x, w.weight.t(), out=out), plain)
    weights = []
    for w in make(depth, columns, max(1, -(-CACHE_OVERFLOW // (depth * columns)))):
        quantized = quantize_channels(w.weight)
        weights.append(GpuLinearWeight(quantized.values, None, scale=quantized.scale, scheme=scheme))

    def run(w: GpuLinearWeight, choice: Choice) -> torch.Tensor:
        values, scales = operands(x, w)
        return run_choice(values, w, out, choice, scales)

    expected = run(weights[0], FP8_REFERENCE).clone()
    times: dict[str, float] = {}
    differ: list[str] = []
    for choice in choices:
        try:
            found = run(weights[0], choice)
        except (RuntimeError, ValueError, triton.runtime.errors.OutOfResources, triton.CompilationError) as error:
            print(f"{choice}: {type(error).__name__}: {str(error)[:120]}", flush=True)
            continue
        if not torch.equal(found, expected):
            differ.append(str(choice))
        times[str(choice)] = microseconds(lambda w, c=choice: run(w, c), weights)
    result = {"K": depth, "N": columns, "T": rows, "default": control, "times": times, "fused": {}, "differ": differ,
              "weight_bytes": 1}  # fmt: skip
    if scheme is Fp8Scheme.WEIGHTS_AND_ACTIVATIONS:
        result["rows alone"] = microseconds(lambda w: operands(x, w), weights)
    return result


def report(result: dict[str, Any]) -> None:
    depth, columns, rows = result["K"], result["N"], result["T"]
    times = {name: t for name, t in result["times"].items() if name not in result["differ"]}
    ranking = sorted(times.items(), key=lambda item: item[1])[:4]
    best = ranking[0][1]
    line = f"K={depth:6} N={columns:6} T={rows:5} default {result['default']:8.1f} us"
    line += f" | library {times.get('cublaslt', 0):8.1f}"
    line += f" | {result['weight_bytes'] * depth * columns / best / 1e3:6.0f} GB/s"
    line += f" {2 * rows * depth * columns / best / 1e6:6.1f} TFLOP/s | "
    line += ", ".join(f"{name} {t:.1f}" for name, t in ranking)
    if "rows alone" in result:
        line += f" | rows alone {result['rows alone']:.1f}"
    if result["fused"]:
        line += " | fused " + ", ".join(
            f"{n} {t:.1f}" for n, t in sorted(result["fused"].items(), key=lambda i: i[1])[:3]
        )
    if result["differ"]:
        line += f" | DIFFER {result['differ']}"
    print(line, flush=True)


def measure_scheme(scheme: Fp8Scheme, shapes: list[tuple[int, ...]], row_counts: list[int]) -> None:
    configure()
    both = scheme is Fp8Scheme.WEIGHTS_AND_ACTIVATIONS
    results = []
    for depth, columns in shapes:
        if columns > 100_000:
            continue  # the output matrix of a model stays in 16 bit
        for rows in row_counts:
            candidates: list[Choice] = [*fitting(FP8_CANDIDATES if both else CANDIDATES, rows)]
            candidates.extend(FP8_WARPS if both and rows > MOST_ROWS_OF_TILES else ())
            results.append(measure_fp8(depth, columns, rows, scheme, candidates))
            report(results[-1])
            torch.cuda.empty_cache()
    found = {"device": torch.cuda.get_device_name(), "torch": torch.__version__, "scheme": scheme.value}
    print(json.dumps(found | {"results": results}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", default=",".join(f"{k}x{n}" for k, n in SHAPES))
    parser.add_argument("--rows", default=",".join(map(str, ROWS)))
    parser.add_argument("--processes", type=int, default=12, help="for compilation")
    parser.add_argument("--scheme", choices=[scheme.value for scheme in Fp8Scheme], help="fp8 weights")
    arguments = parser.parse_args()
    shapes = [tuple(map(int, shape.split("x"))) for shape in arguments.shapes.split(",")]
    row_counts = [int(rows) for rows in arguments.rows.split(",")]
    if arguments.scheme is not None:
        measure_scheme(Fp8Scheme(arguments.scheme), shapes, row_counts)
        return
    parts = arguments.processes
    with multiprocessing.get_context("spawn").Pool(parts) as pool:
        pool.starmap(compile_tiles, [(part, parts) for part in range(parts)], chunksize=1)
    configure()
    tiles = tuple(tile for tile in CANDIDATES if usable(tile, run_choice, 2048))
    fused_tiles = tuple(tile for tile in FUSED_CANDIDATES if usable(tile, run_fused_tile, 1024))
    results = []
    for depth, columns in shapes:
        weights = make(depth, columns, max(1, -(-CACHE_OVERFLOW // (2 * depth * columns))))
        for rows in row_counts:
            if columns > 100_000 and rows > 256:
                continue
            results.append(measure(depth, columns, rows, weights, fitting(tiles, rows), fitting(fused_tiles, rows)))
            report(results[-1])
        del weights
        torch.cuda.empty_cache()
    print(json.dumps({"device": torch.cuda.get_device_name(), "torch": torch.__version__, "results": results}))


if __name__ == "__main__":
    main()
