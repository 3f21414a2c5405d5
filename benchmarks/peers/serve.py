"""What the engines' processes share: read one job per line, generate, answer with tokens and seconds."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", required=True)
    parser.add_argument("--dtype", required=True)
    parser.add_argument("--threads", type=int, required=True)
    return parser.parse_args()


def answer(document: dict) -> None:
    print("@" + json.dumps(document), flush=True)


def serve(generate: Callable[[list[list[int]], int], int], versions: dict[str, str]) -> None:
    """Answer jobs until standard input ends; `generate(prompts, output_len)` returns the number of output tokens."""
    answer({"versions": versions})
    for line in sys.stdin:
        job = json.loads(line)
        began = time.perf_counter()
        output_tokens = generate(job["prompts"], job["output_len"])
        answer({"output_tokens": output_tokens, "seconds": time.perf_counter() - began})
