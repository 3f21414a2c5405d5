"""How long the GPU's sampler takes per step at a vocabulary of 151,936, inside a CUDA graph.

Metric: time of one captured step, logits to token ids, the median of 5 rounds of 50 replays. "flat" logits are those of
a random model (standard normal), "peaked" ones have a few tokens far above the rest, like a trained model's.

    python benchmarks/gpu_sampling.py

The last line is one JSON document.
"""

from __future__ import annotations

import json
import statistics
from typing import Any

import torch

from sempre.ipc.messages import SamplingSpec
from sempre.workers.sampling import SamplingState
from sempre.workers.sampling.gpu_sampler import GpuSampler

VOCABULARY = 151_936
CASES: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0.0},
    "T=1": {},
    "T=0.7": {"temperature": 0.7},
    "top_k=50": {"top_k": 50},
    "top_p=0.9": {"top_p": 0.9},
    "top_k=50 top_p=0.9 T=0.7": {"top_k": 50, "top_p": 0.9, "temperature": 0.7},
    "min_p=0.05": {"min_p": 0.05},
    "T=1 logprobs=0": {"logprobs": 0},
    "T=1 logprobs=5": {"logprobs": 5},
    "T=1 logprobs=20": {"logprobs": 20},
    "T=1 repetition=1.1": {"repetition_penalty": 1.1},
}


def make_logits(kind: str, rows: int) -> torch.Tensor:
    torch.manual_seed(0)
    x = torch.randn(rows, VOCABULARY, device="cuda")
    if kind == "peaked":
        x = 2 * x + 12 * (torch.rand(rows, VOCABULARY, device="cuda") < 1e-4)
    return x


def measure(rows: int, parameters: dict[str, Any], logits: torch.Tensor) -> float:
    """Milliseconds per step."""
    sampler = GpuSampler(device=torch.device("cuda"), vocab_size=VOCABULARY, max_num_seqs=rows, num_slots=rows)
    for slot in range(rows):
        sampler.admit(slot, SamplingState(SamplingSpec(max_tokens=8, **parameters), slot, list(range(100)), 100))
    positions = torch.full((rows,), 100, dtype=torch.int32, device="cuda")
    stages = sampler.prepare(range(rows))
    sampler.sample(logits, positions, stages)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        sampler.sample(logits, positions, stages)
    times = []
    for _ in range(5):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        for _ in range(50):
            graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 50)
    return statistics.median(times)


def main() -> None:
    figures: dict[str, float] = {}
    for kind in ("flat", "peaked"):
        for rows in (1, 16, 64, 256):
            logits = make_logits(kind, rows)
            for name, parameters in CASES.items():
                figures[f"{kind} {rows} {name}"] = measure(rows, parameters, logits)
                print(f"{kind:7} {rows:4} rows  {name:26} {figures[f'{kind} {rows} {name}']:.4f} ms", flush=True)
    print(
        json.dumps(
            {"device": torch.cuda.get_device_name(), "torch": torch.__version__, "milliseconds": figures},
            sort_keys=True,
        )
    )


if __name__ == "__main__":
    main()
