"""How fast the GPU's attention runs for decode and prefill shapes, under several launch shapes, for decode steps over
long contexts, by the kernel for all cards and the one for splits, and for decode steps whose requests share a prefix,
with its keys read for each and once; all must agree bitwise.

Metric: time of one layer's attention inside a CUDA graph that cycles through several caches, so that keys and values
come from memory. GB/s counts keys and values once; TFLOP/s counts 4 D Hq per visible key and query.

    python benchmarks/gpu_attention.py
    python benchmarks/gpu_attention.py --only-shared
    python benchmarks/gpu_attention.py --only-long

The last line is one JSON document.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import multiprocessing
import statistics
from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch

from sempre.kernels.attention import (
    HeadLayout,
    KvCache,
    PagedBatch,
    ScoreParams,
    gpu,
    gpu_decode,
    gpu_prefill,
    paged_attention,
)
from sempre.kernels.attention.gpu import Launch, allocate_attention_workspace
from sempre.kernels.attention.shared_prefixes import group_requests, most_shared_splits


class Case(NamedTuple):
    """`requests` of `tokens` query rows each, whose contexts end at `context`."""

    heads: int
    kv_heads: int
    requests: int
    tokens: int
    context: int


class SharedCase(NamedTuple):
    """`requests` of one query row each: all share `prefix` keys and have `rest` of their own."""

    heads: int
    kv_heads: int
    requests: int
    prefix: int
    rest: int


class LongCase(NamedTuple):
    """One query row for each of `contexts`."""

    heads: int
    kv_heads: int
    contexts: tuple[int, ...]

    def __str__(self) -> str:
        least, most = min(self.contexts), max(self.contexts)
        return f"{self.heads}/{self.kv_heads} {len(self.contexts)} x {least if least == most else f'{least}..{most}'}"


class Variant(NamedTuple):
    launch: Launch | None
    """None: the kernel for long prompts, which has one shape"""
    split: int
    block: int


DECODE = [
    Case(32, 8, 1, 1, 384),
    Case(32, 8, 1, 1, 4000),
    Case(32, 8, 16, 1, 700),
    Case(32, 8, 64, 1, 700),
    Case(32, 8, 256, 1, 700),
    Case(16, 8, 64, 1, 700),
    Case(16, 8, 256, 1, 700),
]
PREFILL = [
    Case(32, 8, 1, 4096, 4096),
    Case(32, 8, 4, 1024, 4096),
    Case(16, 8, 1, 4096, 4096),
    Case(32, 8, 16, 512, 512),
]
SHARED = [
    SharedCase(heads, 8, requests, prefix, 300)
    for heads in (32, 16)
    for requests, prefix in ((8, 4096), (32, 4096), (64, 4096), (128, 4096), (256, 4096), (128, 1024), (256, 512))
]
# from a few splits for each multiprocessor to many; the last are unequal
LONG = [
    LongCase(heads, 8, contexts)
    for heads in (32, 16)
    for contexts in (
        (4_000,), (32_000,), (16_000,) * 4, (700,) * 16, (16_000,) * 16, (700,) * 64, (2_000,) * 64, (16_000,) * 64,
        (700,) * 256, (4_000,) * 256, tuple(500 * 2 ** (i % 7) for i in range(32)), (60_000, *(1_000,) * 31),
    )
]  # fmt: skip
DECODE_VARIANTS = [
    *(Variant(Launch(16, 4, s), 512, block) for s in (2, 3, 4, 5) for block in (16, 64)),
    *(Variant(Launch(16, 2, s), 512, 64) for s in (3, 4)),
    *(Variant(Launch(16, 4, s), split, 64) for s in (3, 4) for split in (256, 1024)),
]
PREFILL_VARIANTS = [
    Variant(None, 512, 64),
    *(Variant(Launch(128, 8, s), 512, block) for s in (2, 3, 4) for block in (16, 64)),
    *(Variant(Launch(64, 4, s), 512, 64) for s in (2, 3, 4)),
    *(Variant(Launch(128, 8, 3), split, 64) for split in (256, 1024, 8192)),
]
DIM = 128
NEVER = 1 << 30
chosen_shape = gpu.launch_shape
serves_splits = gpu_decode.serves


def apply(variant: Variant) -> None:
    gpu.SPLIT = variant.split
    launch = variant.launch
    gpu.launch_shape = chosen_shape if launch is None else lambda *arguments: launch
    # otherwise they would serve whatever launch is measured
    gpu_decode.serves = lambda *arguments: False
    gpu_prefill.LONG_CONTEXT = 0 if launch is None else NEVER


class Step:
    """Inputs of one case for a block size, with `copies` caches."""

    def __init__(self, case: Case, variant: Variant, copies: int) -> None:
        generator = torch.Generator("cuda").manual_seed(1)
        blocks = -(-case.context // variant.block)
        # the contents of a cache do not depend on the block size
        rows = torch.randn(2, case.requests, blocks * variant.block, case.kv_heads, DIM, generator=generator,
                           device="cuda", dtype=torch.bfloat16)  # fmt: skip
        self.case = case
        self.caches = []
        for _ in range(copies):
            cache = gpu.allocate_kv_cache(case.requests * blocks, case.kv_heads, DIM, variant.block, torch.bfloat16,
                                          torch.device("cuda"))  # fmt: skip
            for target, source in zip((cache.k, cache.v), rows, strict=True):
                target.copy_(source.view(case.requests * blocks, variant.block, case.kv_heads, DIM).transpose(1, 2))
            self.caches.append(cache)
        generator = torch.Generator("cuda").manual_seed(2)
        width = (case.heads + 2 * case.kv_heads) * DIM
        self.qkv = torch.randn(case.requests * case.tokens, width, generator=generator, device="cuda",
                               dtype=torch.bfloat16)  # fmt: skip
        ints = {"device": "cuda", "dtype": torch.int32}
        tables = torch.arange(case.requests * blocks, **ints).view(case.requests, blocks)
        starts = torch.arange(case.requests + 1, **ints) * case.tokens
        lens = torch.full((case.requests,), case.context, **ints)
        self.batch = PagedBatch(tables, starts, lens, case.tokens, 8192 if case.context > 1024 else case.context)
        self.out = torch.full((self.qkv.shape[0], case.heads * DIM), float("nan"), device="cuda", dtype=torch.bfloat16)
        self.workspace = allocate_attention_workspace(case.heads, DIM, 8192, torch.device("cuda"))

    def run(self, cache: KvCache) -> torch.Tensor:
        heads = HeadLayout(self.case.heads, self.case.kv_heads, DIM)
        return gpu.paged_attention(
            self.qkv, cache, self.batch, heads, ScoreParams(DIM**-0.5), self.out, self.workspace
        )  # fmt: skip


class SharedStep:
    """Inputs of one case, with a cache for each of `copies` layers."""

    def __init__(self, case: SharedCase, copies: int) -> None:
        generator = torch.Generator("cuda").manual_seed(1)
        shared, own = case.prefix // 64, -(-case.rest // 64)
        num_blocks = shared + case.requests * own
        self.heads = HeadLayout(case.heads, case.kv_heads, DIM)
        self.caches = []
        for _ in range(copies):
            cache = gpu.allocate_kv_cache(num_blocks, case.kv_heads, DIM, 64, torch.bfloat16, torch.device("cuda"))
            for target in (cache.k, cache.v):
                target.normal_(generator=generator)
            self.caches.append(cache)
        ints = {"device": "cuda", "dtype": torch.int32}
        rest = torch.arange(case.requests * own, **ints).view(case.requests, own) + shared
        tables = torch.cat([torch.arange(shared, **ints).expand(case.requests, shared), rest], dim=1).contiguous()
        ids = np.arange(1, case.prefix // gpu.SPLIT + 1, dtype=np.int32)[None].repeat(case.requests, 0)
        arrays = group_requests(ids, case.requests, least_saved=1)
        assert arrays is not None
        context, splits = case.prefix + case.rest, most_shared_splits(case.requests, -(-8192 // gpu.SPLIT))
        lens = torch.full((case.requests,), context, **ints)
        starts = torch.arange(case.requests + 1, **ints)
        self.alone = PagedBatch(tables, starts, lens, 1, 8192)
        self.together = replace(self.alone, prefixes=arrays.on_device(torch.device("cuda"), splits))
        self.qkv = torch.randn(case.requests, self.heads.qkv_width, generator=generator, device="cuda",
                               dtype=torch.bfloat16)  # fmt: skip
        self.out = torch.empty(case.requests, case.heads * DIM, device="cuda", dtype=torch.bfloat16)
        self.workspace = allocate_attention_workspace(case.heads, DIM, gpu.SHARED_LEN, torch.device("cuda"))

    def time_us(self, batch: PagedBatch) -> tuple[float, str]:
        """One layer's time, and the digest of the first one's output."""

        def run(cache: KvCache) -> torch.Tensor:
            scores = ScoreParams(DIM**-0.5)
            return paged_attention(self.qkv, cache, batch, self.heads, scores, self.out, self.workspace)

        found = digest(run(self.caches[0]))
        return replayed(lambda: [run(cache) for cache in self.caches]) / len(self.caches), found


def measure_shared(case: SharedCase) -> dict[str, object]:
    step = SharedStep(case, 8)
    (alone, expected), (together, found) = step.time_us(step.alone), step.time_us(step.together)
    assert found == expected, f"{case}: {found} with the prefix read once, {expected} without"
    print(f"{tuple(case)} shared prefix: read for each {alone:8.1f} us, once {together:8.1f} us,"
          f" {alone / together:5.2f}x {found}", flush=True)  # fmt: skip
    return {"case": case, "alone_us": alone, "together_us": together, "digest": found}


class LongStep:
    """Inputs of one case, with a cache for each of `copies` layers."""

    def __init__(self, case: LongCase) -> None:
        generator = torch.Generator("cuda").manual_seed(1)
        blocks = [-(-context // 64) for context in case.contexts]
        num_blocks, width = sum(blocks), max(blocks)
        self.heads = HeadLayout(case.heads, case.kv_heads, DIM)
        self.nbytes = 4 * sum(case.contexts) * case.kv_heads * DIM
        self.caches = []
        for _ in range(max(1, min(16, -(-(400 << 20) // self.nbytes)))):
            cache = gpu.allocate_kv_cache(num_blocks, case.kv_heads, DIM, 64, torch.bfloat16, torch.device("cuda"))
            for target in (cache.k, cache.v):
                target.normal_(generator=generator)
            self.caches.append(cache)
        ints = {"device": "cuda", "dtype": torch.int32}
        order = torch.randperm(num_blocks, generator=generator, device="cuda").to(torch.int32)
        tables = torch.zeros(len(blocks), width, **ints)
        for row, part in zip(tables, order.split(blocks), strict=True):
            row[: len(part)] = part
        starts, lens = torch.arange(len(blocks) + 1, **ints), torch.tensor(case.contexts, **ints)
        self.batch = PagedBatch(tables, starts, lens, 1, max(case.contexts))
        self.qkv = torch.randn(len(blocks), self.heads.qkv_width, generator=generator, device="cuda",
                               dtype=torch.bfloat16)  # fmt: skip
        self.out = torch.empty(len(blocks), case.heads * DIM, device="cuda", dtype=torch.bfloat16)
        self.workspace = allocate_attention_workspace(case.heads, DIM, max(40_960, *case.contexts),
                                                      torch.device("cuda"))  # fmt: skip

    def time_us(self, serves: Callable[..., bool]) -> tuple[float, str]:
        """One layer's time, and the digest of the first one's output; `serves` chooses the kernel."""
        gpu_decode.serves, gpu_decode.LONG_CONTEXT = serves, 0

        def run(cache: KvCache) -> torch.Tensor:
            scores = ScoreParams(DIM**-0.5)
            return gpu.paged_attention(self.qkv, cache, self.batch, self.heads, scores, self.out, self.workspace)

        found = digest(run(self.caches[0]))
        return replayed(lambda: [run(cache) for cache in self.caches]) / len(self.caches), found


def measure_long(case: LongCase) -> dict[str, object]:
    step = LongStep(case)
    (before, expected), (now, found) = step.time_us(lambda *arguments: False), step.time_us(serves_splits)
    print(f"{case}: for all cards {before:8.1f} us {step.nbytes / before / 1e6:5.2f} TB/s,"
          f" for splits {now:8.1f} us {step.nbytes / now / 1e6:5.2f} TB/s"
          f" {found} {'equal' if found == expected else f'DIFFERS from {expected}'}", flush=True)  # fmt: skip
    return {"case": str(case), "all_cards_us": before, "splits_us": now, "equal": found == expected}


def compile_variants(pairs: list[tuple[Case, Variant]]) -> None:
    for case, variant in pairs:
        apply(variant)
        step = Step(case, variant, 1)
        step.run(step.caches[0])
        torch.cuda.synchronize()


def measure(case: Case, variant: Variant) -> tuple[float, str]:
    apply(variant)
    cache_bytes = 4 * case.requests * case.context * case.kv_heads * DIM
    step = Step(case, variant, max(1, min(16, -(-(150 << 20) // cache_bytes))) if case.tokens == 1 else 1)
    found = digest(step.run(step.caches[0]))
    calls = max(4, len(step.caches)) if case.tokens == 1 else 2
    return replayed(lambda: [step.run(step.caches[i % len(step.caches)]) for i in range(calls)]) / calls, found


def digest(out: torch.Tensor) -> str:
    return hashlib.sha256(out.view(torch.int16).cpu().numpy().tobytes()).hexdigest()[:8]


def replayed(launch: Callable[[], object]) -> float:
    """Microseconds of what `launch` queues, as a graph."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        launch()
    graph.replay()
    times = []
    for _ in range(3):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1000)
    return statistics.median(times)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--only-shared", action="store_true", help="only decode steps whose requests share a prefix")
    parser.add_argument("--only-long", action="store_true", help="only decode steps over long contexts")
    arguments = parser.parse_args()
    everything = not (arguments.only_shared or arguments.only_long)
    found = {
        "device": torch.cuda.get_device_name(),
        "long": [] if arguments.only_shared else [measure_long(case) for case in LONG],
        "shared": [] if arguments.only_long else [measure_shared(case) for case in SHARED],
        "results": measure_variants() if everything else [],
    }
    print(json.dumps(found))


def measure_variants() -> list[tuple[Case, Variant, float, str]]:
    pairs = [(c, v) for c in DECODE for v in DECODE_VARIANTS] + [(c, v) for c in PREFILL for v in PREFILL_VARIANTS]
    # one case per distinct compilation: groups of 4 and 2, one split or several
    first = [
        (c, v)
        for c, v in pairs
        if c in (DECODE[0], DECODE[1], DECODE[3], DECODE[5], PREFILL[0], PREFILL[2], PREFILL[3])
    ]
    with multiprocessing.get_context("spawn").Pool(14) as pool:
        pool.map(compile_variants, [first[i::14] for i in range(14)], chunksize=1)
    results = []
    for case, variant in pairs:
        time_us, found = measure(case, variant)
        keys = 4 * case.requests * case.context * case.kv_heads * DIM
        visible = sum(range(case.context - case.tokens + 1, case.context + 1)) * case.requests
        teraflops = 4 * DIM * case.heads * visible / time_us / 1e6
        print(f"{tuple(case)} {tuple(variant.launch or ())} split={variant.split} B={variant.block}"
              f" {time_us:8.1f} us {keys / time_us / 1e3:6.0f} GB/s {teraflops:6.1f} TFLOP/s {found}",
              flush=True)  # fmt: skip
        results.append((case, variant, time_us, found))
    return results


if __name__ == "__main__":
    main()
