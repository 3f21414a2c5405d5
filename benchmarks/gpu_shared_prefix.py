"""How fast one GPU decodes requests with a common prefix, its keys read once for all of them or once for each.

Metric: output tokens per second of a batch given at once, 256 tokens each, wall clock; the prefix is cached before. One
engine in this process; both ways take turns in it, after one run of each, and each figure is the median of the
repetitions. "none" is a batch without a common prefix, of shorter prompts so that all have room: nothing can be shared
there, and nothing may be lost. Outputs must be equal, in tokens and log-probabilities.

    python benchmarks/gpu_shared_prefix.py --shape qwen3-8b

The last line is one JSON document.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path

import torch

from sempre.engine.arguments import engine_config
from sempre.engine.client import EngineClient, launch
from sempre.engine.harness import compare_generations, generate, make_request
from sempre.engine.version import __version__
from sempre.ipc.messages import RequestSpec
from sempre.workers.gpu import shared_splits

SHAPES = Path(__file__).parent / "shapes"
PREFIX, UNSHARED, OWN, OUTPUT = 4096, 512, 64, 256
COUNTS = (16, 64, 128, 256)
ONCE, FOR_EACH = shared_splits.LEAST_SAVED, sys.maxsize


def tokens(first: int, count: int) -> list[int]:
    return [1000 + (first * 7919 + at * 104729) % 90000 for at in range(count)]


def requests(count: int, *, shares: bool, prefix: int = PREFIX) -> list[RequestSpec]:
    """One prefix for all, or other tokens in its place for each."""
    return [
        make_request(
            [*tokens(0 if shares else index + 1, prefix), *tokens(500 + index, OWN)],
            ordinal=index,
            seed=index,
            max_tokens=OUTPUT,
            temperature=1.0,
            logprobs=0,
        )
        for index in range(count)
    ]


def measure(client: EngineClient, specs: list[RequestSpec], repetitions: int) -> dict[str, object]:
    """Tokens per second both ways, and whether the outputs are equal."""
    seconds: dict[int, list[float]] = {ONCE: [], FOR_EACH: []}
    outputs = {}
    for repetition in range(repetitions + 1):
        for least in seconds:
            shared_splits.LEAST_SAVED = least
            began = time.perf_counter()
            outputs[least] = generate(client, specs)
            if repetition:
                seconds[least].append(time.perf_counter() - began)
    assert compare_generations(outputs[ONCE], outputs[FOR_EACH]).equal
    once, each = (len(specs) * OUTPUT / statistics.median(seconds[least]) for least in (ONCE, FOR_EACH))
    return {"once": round(once, 1), "for_each": round(each, 1), "speed_up": round(once / each, 3)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="qwen3-8b", choices=sorted(path.name for path in SHAPES.iterdir()))
    parser.add_argument("--counts", type=int, nargs="+", default=COUNTS)
    parser.add_argument("--prefix", type=int, default=PREFIX)
    parser.add_argument("--repetitions", type=int, default=3)
    args = parser.parse_args()
    config = engine_config(
        model=str(SHAPES / args.shape),
        device="cuda",
        load_format="dummy",
        max_model_len=args.prefix + OWN + OUTPUT,
        max_num_seqs=max(args.counts),
        multiprocessing=False,
    )
    client = launch(config)
    figures: dict[str, object] = {}
    try:
        for shares in (True, False):
            for count in args.counts:
                specs = requests(count, shares=shares, prefix=args.prefix if shares else UNSHARED)
                if shares:
                    generate(client, [make_request(specs[0].prompt_token_ids[: args.prefix + 1], max_tokens=1)])
                name = f"{count} requests, {f'{args.prefix} tokens' if shares else 'none'} in common"
                figures[name] = found = measure(client, specs, args.repetitions)
                print(f"{args.shape}: {name}: {found}", flush=True)
    finally:
        client.close()
    print(json.dumps({"device": torch.cuda.get_device_name(), "version": __version__, "figures": figures}))


if __name__ == "__main__":
    main()
