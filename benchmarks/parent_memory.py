"""Growth of the user process's resident memory over many requests.

Metric: resident bytes of the process that holds `LLM` after `--requests` finished requests, minus those after a
warm-up of a tenth of them.

    python benchmarks/parent_memory.py
"""

from __future__ import annotations

import argparse
import gc
import json

import psutil

from sempre.engine import LLM, SamplingParams
from sempre.engine.version import __version__


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--batch", type=int, default=250)
    args = parser.parse_args()
    process = psutil.Process()
    params = SamplingParams(max_tokens=4, logprobs=2)
    with LLM(args.model, max_num_seqs=128) as llm:
        done = 0

        def run(count: int) -> None:
            nonlocal done
            for _ in range(count // args.batch):
                llm.generate([f"request {done + i}" for i in range(args.batch)], params, use_tqdm=False)
                done += args.batch
            gc.collect()

        run(max(args.batch, args.requests // 10))
        before = process.memory_info().rss
        run(args.requests)
        grown = process.memory_info().rss - before
    report = {
        "benchmark": "parent_memory",
        "model": args.model,
        "requests": args.requests,
        "resident_mb": round(before / 2**20, 1),
        "grown_mb": round(grown / 2**20, 2),
        "version": __version__,
    }
    print(f"resident {report['resident_mb']} MB, grown by {report['grown_mb']} MB over {args.requests} requests")
    print(json.dumps(report))


if __name__ == "__main__":
    main()
