"""Packed weights on one GPU: which tile is fastest for each matmul of a model, beside weights of 16 bits.

Metric: time of one matmul inside a CUDA graph that cycles through enough copies of the weight to overflow the cache, as
`gpu_linear.py` has it. TB/s counts words, scales and zeros once. Every tile is also compared bitwise with the widened
weight in the reference tile of other linear layers; one that differs is marked, and never counts as the best.

    python benchmarks/gpu_packed.py [--shapes 4096x6144,...] [--rows 1,16,...] [--form int4|int8|mxfp4]

A whole model: `gpu_throughput.py --quantization int4`. The last line is one JSON document.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
from dataclasses import replace
from typing import Any

import torch
import triton
from gpu_linear import CACHE_OVERFLOW, make, microseconds

from sempre.kernels.linear.gpu import configure, run_tile
from sempre.kernels.linear.gpu import linear as dense_linear
from sempre.kernels.linear.gpu_table import REFERENCE
from sempre.kernels.packed import CodeForm, Codes, Numbers, PackedWeight, pack_codes
from sempre.kernels.packed import gpu as packed_gpu
from sempre.kernels.packed.gpu_table import WIDENED, PackedChoice, PackedTile, fits

# (K, N): qkv, o, gate_up, down of an 8B model
SHAPES = ((4096, 6144), (4096, 4096), (4096, 24576), (12288, 4096))
ROWS = (1, 8, 16, 32, 64, 128, 256, 512, 4096)
FORMS = {
    "int4": CodeForm(4, 128, has_zeros=True),
    "int8": CodeForm(8, 128, has_zeros=True),
    "mxfp4": CodeForm(4, 32, numbers=Numbers.E2M1),
}
CANDIDATES = tuple(
    PackedTile(*numbers)
    for numbers in (
        (16, 64, 128, 4, 6), (16, 64, 256, 4, 3), (16, 64, 256, 4, 4), (16, 64, 512, 4, 2), (16, 64, 512, 4, 3),
        (16, 128, 128, 8, 5), (16, 128, 256, 8, 3), (32, 64, 128, 4, 5), (32, 64, 256, 4, 3), (32, 64, 256, 4, 4),
        (32, 64, 512, 4, 2), (32, 128, 128, 8, 4), (32, 128, 256, 8, 3), (64, 64, 128, 4, 4), (64, 64, 256, 4, 3),
        (64, 128, 128, 8, 3), (64, 128, 256, 8, 2), (128, 64, 128, 4, 3), (128, 64, 64, 4, 5), (128, 128, 64, 8, 4),
        (128, 128, 128, 8, 3), (256, 64, 64, 4, 4), (256, 128, 64, 8, 3), (256, 128, 64, 8, 4),
    )
)  # fmt: skip


def random_codes(depth: int, columns: int, form: CodeForm, dtype: torch.dtype) -> Codes:
    generator = torch.Generator("cuda").manual_seed(depth + columns)
    groups = (columns, depth // form.group_of(depth))

    def draw(shape: tuple[int, ...], most: int) -> torch.Tensor:
        return torch.randint(0, most, shape, generator=generator, device="cuda", dtype=torch.uint8)

    codes = draw((columns, depth * form.bits // 8), 256)
    if form.numbers is Numbers.E2M1:
        return Codes(codes, draw(groups, 4) + 116, None, form)
    scales = torch.rand(groups, generator=generator, device="cuda").mul_(depth**-0.5 / 8).to(dtype)
    return Codes(codes, scales, draw(groups, 16).to(torch.int16), form)


def copies_of(w: PackedWeight) -> list[PackedWeight]:
    count = max(1, -(-CACHE_OVERFLOW // w.nbytes))
    return [w, *(replace(w, words=w.words.clone(), pairs=w.pairs.clone()) for _ in range(count - 1))]


def fitting(rows: int, w: PackedWeight) -> list[PackedChoice]:
    """Tiles that waste less than half of their rows, or are the smallest; many rows are only widened."""
    wanted = min(256, max(16, 1 << (rows - 1).bit_length()))
    sizes = {wanted, wanted // 2} if wanted >= 64 else {wanted}
    tiles = [tile for tile in CANDIDATES if tile.block_t in sizes and fits(tile, w)]
    return [*(tiles if rows <= 1024 else []), WIDENED]


def usable(tile: PackedTile, w: PackedWeight) -> bool:
    """Compile and run the tile once; False, with a message, if this GPU cannot hold it."""
    x = torch.randn(1, w.in_features, device="cuda").to(w.dtype)
    try:
        packed_gpu.run_tile(x, w, x.new_empty(1, w.out_features), tile)
    except (RuntimeError, ValueError, triton.runtime.errors.OutOfResources, triton.CompilationError) as error:
        print(f"{tile}: {type(error).__name__}: {str(error)[:120]}", flush=True)
        return False
    return True


def compile_tiles(part: int, parts: int, form: CodeForm, dtype: torch.dtype) -> None:
    """Fill the compiler's cache on disk, one of several processes; for few rows, weights are prefetched."""
    for depth, columns in SHAPES:
        w = pack_codes([random_codes(depth, columns, form, dtype)], None, dtype)
        for tile in CANDIDATES[part::parts]:
            if fits(tile, w) and usable(tile, w) and tile.block_t > 64:
                many = torch.zeros(tile.block_t, depth, device="cuda", dtype=dtype)
                packed_gpu.run_tile(many, w, many.new_empty(len(many), columns), tile)


class Shape:
    """One matrix, packed and in 16 bits, in as many copies as overflow the cache."""

    def __init__(self, depth: int, columns: int, form: CodeForm, dtype: torch.dtype) -> None:
        self.first = pack_codes([random_codes(depth, columns, form, dtype)], None, dtype)
        self.packed = copies_of(self.first)
        dense = make(depth, columns, max(1, -(-CACHE_OVERFLOW // (2 * depth * columns))))
        self.dense = [replace(w, weight=w.weight.to(dtype)) for w in dense]
        self.works = {tile for tile in CANDIDATES if fits(tile, self.first) and usable(tile, self.first)}
        self.widened = packed_gpu.dense_weight(self.first)

    def measure(self, rows: int) -> dict[str, Any]:
        w = self.first
        x = torch.randn(rows, w.in_features, device="cuda").to(w.dtype)
        out = x.new_empty(rows, w.out_features)
        expected = run_tile(x, self.widened, torch.empty_like(out), REFERENCE)
        times: dict[str, float] = {}
        differ: list[str] = []
        for choice in fitting(rows, w):
            if isinstance(choice, PackedTile) and choice not in self.works:
                continue
            found = packed_gpu.run_choice(x, w, torch.full_like(out, float("nan")), choice)
            if not torch.equal(found, expected):
                differ.append(str(choice))
            times[str(choice)] = microseconds(lambda w, c=choice: packed_gpu.run_choice(x, w, out, c), self.packed)
        plain = microseconds(lambda w: dense_linear(x, w, out), self.dense)
        return {"K": w.in_features, "N": w.out_features, "T": rows, "16 bits": plain, "times": times,
                "differ": differ, "bytes": w.nbytes, "floor": w.nbytes / 3e6}  # fmt: skip


def report(result: dict[str, Any]) -> None:
    times = {name: t for name, t in result["times"].items() if name not in result["differ"]}
    ranking = sorted(times.items(), key=lambda item: item[1])[:5]
    best = ranking[0][1] if ranking else float("nan")
    line = f"K={result['K']:6} N={result['N']:6} T={result['T']:5} | 16 bits {result['16 bits']:8.1f} us"
    line += f" | packed {best:8.1f} us, {result['bytes'] / best / 1e6:5.2f} TB/s, {best / result['floor']:5.2f} x floor"
    line += f" | {result['16 bits'] / best:4.2f} x | " + ", ".join(f"{name} {t:.1f}" for name, t in ranking)
    line += f" | widened {result['times'].get('widened', 0):.1f}"
    print(line + (f" | DIFFER {result['differ']}" if result["differ"] else ""), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", default=",".join(f"{k}x{n}" for k, n in SHAPES))
    parser.add_argument("--rows", default=",".join(map(str, ROWS)))
    parser.add_argument("--form", choices=FORMS, default="int4")
    parser.add_argument("--dtype", choices=("bfloat16", "float16"), default="bfloat16")
    parser.add_argument("--processes", type=int, default=12, help="that compile kernels")
    args = parser.parse_args()
    form, dtype = FORMS[args.form], getattr(torch, args.dtype)
    context = multiprocessing.get_context("spawn")
    jobs = [context.Process(target=compile_tiles, args=(i, args.processes, form, dtype)) for i in range(args.processes)]
    for job in jobs:
        job.start()
    for job in jobs:
        job.join()
    configure()
    results = []
    for shape in args.shapes.split(","):
        depth, columns = map(int, shape.split("x"))
        measured = Shape(depth, columns, form, dtype)
        for rows in args.rows.split(","):
            results.append(measured.measure(int(rows)))
            report(results[-1])
        del measured
        torch.cuda.empty_cache()
    facts = {"device": torch.cuda.get_device_name(), "torch": torch.__version__, "triton": triton.__version__}
    print(json.dumps(facts | {"form": args.form, "results": results}))


if __name__ == "__main__":
    main()
