"""What each layer of a decode step costs: every kernel of a decoder's layers in one CUDA graph.

Metric: time of a replay over L layers with distinct weights, divided by L; the floor is the layer's weights at the
memory's copy rate. The breakdown replays the same graph with one operation left out.

    python benchmarks/gpu_layer.py
"""

from __future__ import annotations

import json
import statistics
from typing import NamedTuple

import torch

from sempre.kernels.attention import (
    HeadLayout,
    HeadNorms,
    PagedBatch,
    ScoreParams,
    allocate_kv_cache,
    paged_attention,
)
from sempre.kernels.attention.gpu import allocate_attention_workspace
from sempre.kernels.linear import gated_linear, linear, pack_linear
from sempre.kernels.linear.gpu import configure
from sempre.kernels.norms import add_rms_norm
from sempre.kernels.rope import RopeSpec, cos_sin_table, rope_and_cache_write


class Shape(NamedTuple):
    name: str
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    intermediate: int


SHAPES = (Shape("8B", 12, 4096, 32, 8, 12288), Shape("0.6B", 28, 1024, 16, 8, 3072))
DIM, BLOCK, EPS = 128, 64, 1e-6
OPERATIONS = ("norm", "qkv", "rope", "attention", "o", "gate_up", "down")


class Stack:
    def __init__(self, shape: Shape, requests: int, context: int) -> None:
        torch.manual_seed(0)
        self.shape, self.context = shape, context
        s, dtype = shape, {"device": "cuda", "dtype": torch.bfloat16}
        qkv_size = (s.heads + 2 * s.kv_heads) * DIM
        sizes = [(qkv_size, s.hidden), (s.hidden, s.heads * DIM), (2 * s.intermediate, s.hidden),
                 (s.hidden, s.intermediate)]  # fmt: skip
        self.layers = [
            [pack_linear(torch.empty(n, k, **dtype).normal_(0, k**-0.5)) for n, k in sizes] for _ in range(s.layers)
        ]
        self.norm, self.head_norm = torch.ones(s.hidden, **dtype), torch.ones(DIM, **dtype)
        blocks = -(-context // BLOCK)
        device = torch.device("cuda")
        self.caches = [allocate_kv_cache(requests * blocks, s.kv_heads, DIM, BLOCK, torch.bfloat16, device)
                       for _ in range(s.layers)]  # fmt: skip
        for cache in self.caches:
            cache.k.normal_()
            cache.v.normal_()
        ints = {"device": "cuda", "dtype": torch.int32}
        tables = torch.arange(requests * blocks, **ints).view(requests, blocks)
        lens = torch.full((requests,), context, **ints)
        self.batch = PagedBatch(tables, torch.arange(requests + 1, **ints), lens, 1, context)
        self.positions = torch.full((requests,), context - 1, device="cuda")
        self.slots = (tables[:, -1].long() * BLOCK) + (context - 1) % BLOCK
        self.angles = cos_sin_table(RopeSpec(DIM), context).cuda()
        self.workspace = allocate_attention_workspace(s.heads, DIM, 4096, device)
        self.first = torch.randn(requests, s.hidden, **dtype)
        self.residual, self.hidden, self.branch = (torch.empty(requests, s.hidden, **dtype) for _ in range(3))
        self.qkv = torch.empty(requests, qkv_size, **dtype)
        self.attended = torch.empty(requests, s.heads * DIM, **dtype)
        self.gate_up = torch.empty(requests, 2 * s.intermediate, **dtype)
        self.activated = torch.empty(requests, s.intermediate, **dtype)

    def run(self, without: str = "") -> None:
        s = self.shape
        heads, norms = HeadLayout(s.heads, s.kv_heads, DIM), HeadNorms(self.head_norm, self.head_norm, EPS)
        self.residual.copy_(self.first)
        self.branch.zero_()
        for (qkv, o, gate_up, down), cache in zip(self.layers, self.caches, strict=True):
            if without != "norm":
                add_rms_norm(self.branch, self.residual, self.norm, EPS, self.hidden)
            if without != "qkv":
                linear(self.hidden, qkv, self.qkv)
            if without != "rope":
                rope_and_cache_write(self.qkv, self.positions, self.angles, self.slots, cache, heads, norms)
            if without != "attention":
                paged_attention(self.qkv, cache, self.batch, heads, ScoreParams(DIM**-0.5), self.attended,
                                self.workspace)  # fmt: skip
            if without != "o":
                linear(self.attended, o, self.branch)
            if without != "norm":
                add_rms_norm(self.branch, self.residual, self.norm, EPS, self.hidden)
            if without != "gate_up":
                gated_linear(self.hidden, gate_up, self.gate_up, self.activated)
            if without != "down":
                linear(self.activated, down, self.branch)

    def microseconds(self, without: str = "") -> float:
        """µs per layer."""
        self.run(without)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self.run(without)
        times = []
        for _ in range(6):
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            graph.replay()
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end) * 1000 / self.shape.layers)
        return statistics.median(times)


def main() -> None:
    configure()
    results = []
    for shape in SHAPES:
        for requests, context in ((1, 256), (8, 512), (64, 700)):
            stack = Stack(shape, requests, context)
            time_us = stack.microseconds()
            weight_bytes = sum(w.nbytes for w in stack.layers[0])
            parts = {o: time_us - stack.microseconds(o) for o in OPERATIONS} if requests in (1, 64) else {}
            shares = ", ".join(f"{name} {time:.1f}" for name, time in parts.items())
            print(f"{shape.name} requests={requests} context={context}: {time_us:.1f} us a layer,"
                  f" {weight_bytes / 3.05e6:.1f} us of weights; {shares}", flush=True)  # fmt: skip
            results.append({"shape": shape, "requests": requests, "us": time_us, "parts": parts})
            del stack
            torch.cuda.empty_cache()
    print(json.dumps({"device": torch.cuda.get_device_name(), "results": results}))


if __name__ == "__main__":
    main()
