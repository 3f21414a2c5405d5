"""Throughput with low-rank adapters, against the same requests without, in one engine on one machine.

Metric: output tokens per second of `--requests` prompts of random tokens, temperature 1, end of sequence ignored: wall
clock of one generate call, and CPU time of the process, which other programs on the machine disturb less (the engine
computes in this process). Both kinds of call take turns, so that drift affects both; ratios are of each pair, and the
median of the repetitions counts. The adapters are random, change all projections of attention and feed-forward, and
take turns over the requests.

    python benchmarks/adapters.py --model smollm2-135m --threads 1
    python benchmarks/adapters.py --model benchmarks/shapes/qwen3-8b --load-format dummy --device cuda

The last line is one JSON document.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors.torch import save_file

from sempre.engine import LLM, LoRARequest, SamplingParams
from sempre.engine.models import resolve_model
from sempre.ipc.adapter_files import CONFIG_FILE, WEIGHTS_FILE


class Run(NamedTuple):
    """Output tokens per second, by both clocks."""

    wall: float
    cpu: float


def modules_of(config: dict[str, Any]) -> dict[str, tuple[int, int]]:
    """[N, K] of the projections of a decoder like Llama's."""
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    heads = config["num_attention_heads"]
    head_dim = config.get("head_dim") or hidden // heads
    queries, keys = heads * head_dim, config.get("num_key_value_heads", heads) * head_dim
    shapes = {
        "self_attn.q_proj": (queries, hidden),
        "self_attn.k_proj": (keys, hidden),
        "self_attn.v_proj": (keys, hidden),
        "self_attn.o_proj": (hidden, queries),
        "mlp.gate_proj": (inner, hidden),
        "mlp.up_proj": (inner, hidden),
        "mlp.down_proj": (hidden, inner),
    }
    layers = range(config["num_hidden_layers"])
    return {f"model.layers.{layer}.{name}": shape for layer in layers for name, shape in shapes.items()}


def write_adapter(folder: Path, modules: dict[str, tuple[int, int]], rank: int, seed: int) -> LoRARequest:
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, (rows, columns) in modules.items():
        tensors[f"base_model.model.{name}.lora_A.weight"] = torch.randn(rank, columns, generator=generator) * 0.01
        tensors[f"base_model.model.{name}.lora_B.weight"] = torch.randn(rows, rank, generator=generator) * 0.01
    folder.mkdir()
    save_file({name: tensor.bfloat16() for name, tensor in tensors.items()}, folder / WEIGHTS_FILE)
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": 2 * rank, "target_modules": "all-linear"}
    (folder / CONFIG_FILE).write_text(json.dumps(config))
    return LoRARequest(folder.name, seed + 1, str(folder))


def timed(llm: LLM, prompts: list[list[int]], args: argparse.Namespace, adapters: list[LoRARequest]) -> Run:
    params = SamplingParams(max_tokens=args.output_len, ignore_eos=True, seed=1, detokenize=False)
    requests = [adapters[place % len(adapters)] for place in range(len(prompts))] if adapters else None
    wall, cpu = time.perf_counter(), time.process_time()
    outputs = llm.generate(
        [{"prompt_token_ids": ids} for ids in prompts], params, use_tqdm=False, lora_request=requests
    )
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    count = sum(len(output.outputs[0].token_ids) for output in outputs)
    assert count == len(prompts) * args.output_len
    return Run(count / wall, count / cpu)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--load-format", default="auto")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--adapters", type=int, default=8)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--input-len", type=int, default=64)
    parser.add_argument("--output-len", type=int, default=32)
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--repetitions", type=int, default=5)
    args = parser.parse_args()

    config = json.loads((Path(resolve_model(args.model).path) / "config.json").read_text())
    generator = np.random.default_rng(1)
    prompts = generator.integers(5, config["vocab_size"], (args.requests, args.input_len)).tolist()
    pairs = []
    with tempfile.TemporaryDirectory() as root:
        modules = modules_of(config)
        adapters = [write_adapter(Path(root) / f"a{n}", modules, args.rank, n) for n in range(args.adapters)]
        llm = LLM(
            args.model,
            load_format=args.load_format,
            device=args.device,
            num_threads=args.threads,
            multiprocessing=False,
            max_model_len=args.input_len + args.output_len,
            enable_prefix_caching=False,
            enable_lora=True,
            max_loras=args.adapters,
            max_lora_rank=args.rank,
        )
        with llm:
            for number in range(args.repetitions + 1):
                pair = timed(llm, prompts, args, []), timed(llm, prompts, args, adapters)
                # the first pair compiles kernels and loads adapters
                if number:
                    pairs.append(pair)
            fingerprint = llm.fingerprint
    for base, adapted in pairs:
        ratio = adapted.cpu / base.cpu
        print(f"base {base.wall:8.1f} tok/s, adapters {adapted.wall:8.1f}, ratio by CPU time {ratio:.3f}")
    result = {
        **vars(args),
        "base_tokens_per_s": statistics.median(base.wall for base, _ in pairs),
        "adapted_tokens_per_s": statistics.median(adapted.wall for _, adapted in pairs),
        "ratio_of_wall_clock": statistics.median(adapted.wall / base.wall for base, adapted in pairs),
        "ratio_of_cpu_time": statistics.median(adapted.cpu / base.cpu for base, adapted in pairs),
        "torch": str(torch.__version__),
        "fingerprint": fingerprint,
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
