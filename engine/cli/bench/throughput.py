"""`sempre bench throughput`: requests and tokens per second when all requests are given at once."""

from __future__ import annotations

from typing import Any

from sempre.engine.arguments import engine_config
from sempre.engine.cli.bench.workload import random_requests, seconds_for
from sempre.engine.client import launch


def measure(
    model: str, keywords: dict[str, Any], *, input_len: int, output_len: int, n: int, num_prompts: int
) -> dict[str, Any]:
    """Tokens are those of prompts and outputs together."""
    config = engine_config(model, **keywords)
    client = launch(config)
    try:
        requests = random_requests(
            num_prompts,
            vocab_size=client.ready.vocab_size,
            input_len=input_len,
            output_len=output_len,
            n=n,
            seed=config.seed,
        )
        elapsed = seconds_for(client, requests)
    finally:
        client.close()
    total = num_prompts * (input_len + n * output_len)
    return {
        "elapsed_time": elapsed,
        "num_requests": num_prompts,
        "total_num_tokens": total,
        "requests_per_second": num_prompts / elapsed,
        "tokens_per_second": total / elapsed,
    }
