"""`sempre bench latency`: seconds of one batch of requests."""

from __future__ import annotations

from statistics import fmean
from typing import Any

from sempre.engine.arguments import engine_config
from sempre.engine.cli.bench.workload import percentiles, random_requests, seconds_for
from sempre.engine.client import launch


def measure(
    model: str,
    keywords: dict[str, Any],
    *,
    batch_size: int,
    n: int,
    num_iters_warmup: int,
    num_iters: int,
    **lengths: int,
) -> dict[str, Any]:
    """Other prompts in every run, so that no prefix cache helps; `lengths` are input_len and output_len."""
    config = engine_config(model, **keywords)
    client = launch(config)
    try:
        latencies = []
        for run in range(num_iters_warmup + num_iters):
            requests = random_requests(
                batch_size,
                vocab_size=client.ready.vocab_size,
                **lengths,
                n=n,
                seed=config.seed,
                first=run * batch_size * n,
            )
            latencies.append(seconds_for(client, requests))
    finally:
        client.close()
    counted = latencies[num_iters_warmup:]
    return {"avg_latency": fmean(counted), "latencies": counted, "percentiles": percentiles(counted)}
