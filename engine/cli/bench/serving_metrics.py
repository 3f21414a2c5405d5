"""Metrics of a load test, with vLLM's definitions and names.

TTFT   time to first token: from sending a request to its first event with output
ITL    inter-token latency: between two such events of one request
TPOT   time per output token after the first: (latency - TTFT) / (output tokens - 1), one value per request
E2EL   end-to-end latency: from sending a request to its last such event
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from sempre.engine.cli.bench.load import Outcome
from sempre.engine.cli.bench.tables import Row, lines

TITLES = {
    "ttft": "Time to First Token",
    "tpot": "Time per Output Token (excl. 1st token)",
    "itl": "Inter-token Latency",
    "e2el": "End-to-end Latency",
}
# only with --save-detailed
DETAILS = ("input_lens", "output_lens", "start_times", "ttfts", "itls", "generated_texts", "errors")


def summarize(
    outcomes: Sequence[Outcome], seconds: float, percentiles: Sequence[float], goodput: Mapping[str, float]
) -> dict[str, Any]:
    """Return the result document; latencies in milliseconds, lists in seconds and in sending order."""
    good = [outcome for outcome in outcomes if outcome.success]
    num_input = sum(outcome.prompt_tokens for outcome in good)
    num_output = sum(outcome.output_tokens for outcome in good)
    tokens_per_s, concurrent = _peak_rate(good, seconds), _peak_concurrency(good)
    result: dict[str, Any] = {
        "duration": seconds,
        "completed": len(good),
        "failed": len(outcomes) - len(good),
        "total_input_tokens": num_input,
        "total_output_tokens": num_output,
        "request_throughput": len(good) / seconds,
        "request_goodput": _num_within(good, goodput) / seconds if goodput else None,
        "output_throughput": num_output / seconds,
        "total_token_throughput": (num_input + num_output) / seconds,
        "max_output_tokens_per_s": tokens_per_s,
        "max_concurrent_requests": concurrent,
    }
    for name, values in _latencies(good).items():
        result |= _statistics(name, values, percentiles)
    result |= {
        "input_lens": [outcome.prompt_tokens for outcome in outcomes],
        "output_lens": [outcome.output_tokens for outcome in outcomes],
        "start_times": [outcome.start_time for outcome in outcomes],
        "ttfts": [outcome.ttft for outcome in outcomes],
        "itls": [outcome.itl for outcome in outcomes],
        "generated_texts": ["".join(outcome.text) for outcome in outcomes],
        "errors": [outcome.error for outcome in outcomes],
    }
    return result


def table(result: Mapping[str, Any], shown: Sequence[str]) -> str:
    """Return a readable table: counts, throughput, and the metrics in `shown`."""
    rows: list[Row] = [
        ("Successful requests", result["completed"]),
        ("Failed requests", result["failed"]),
        ("Benchmark duration (s)", result["duration"]),
        ("Total input tokens", result["total_input_tokens"]),
        ("Total generated tokens", result["total_output_tokens"]),
        ("Request throughput (req/s)", result["request_throughput"]),
    ]
    if result["request_goodput"] is not None:
        rows.append(("Request goodput (req/s)", result["request_goodput"]))
    rows += [
        ("Output token throughput (tok/s)", result["output_throughput"]),
        ("Peak output token throughput (tok/s)", result["max_output_tokens_per_s"]),
        ("Peak concurrent requests", result["max_concurrent_requests"]),
        ("Total token throughput (tok/s)", result["total_token_throughput"]),
    ]
    for name in shown:
        rows.append(TITLES[name])
        suffix = f"_{name}_ms"
        for key, value in result.items():
            if key.endswith(suffix):
                rows.append((f"{key.removesuffix(suffix).capitalize()} {name.upper()} (ms)", value))
    return lines(rows)


def _latencies(good: Sequence[Outcome]) -> dict[str, list[float]]:
    return {
        "ttft": [outcome.ttft for outcome in good],
        "tpot": [_tpot(outcome) for outcome in good if outcome.output_tokens > 1],
        "itl": [gap for outcome in good for gap in outcome.itl],
        "e2el": [outcome.latency for outcome in good],
    }


def _tpot(outcome: Outcome) -> float:
    return (outcome.latency - outcome.ttft) / (outcome.output_tokens - 1) if outcome.output_tokens > 1 else 0.0


def _statistics(name: str, values: list[float], percentiles: Sequence[float]) -> dict[str, float]:
    in_ms = np.asarray(values or [0.0]) * 1000.0
    found = {"mean": in_ms.mean(), "median": np.median(in_ms), "std": in_ms.std()}
    for percent in percentiles:
        found[f"p{percent:g}"] = np.percentile(in_ms, percent)
    return {f"{key}_{name}_ms": float(value) for key, value in found.items()}


def _num_within(good: Sequence[Outcome], goodput: Mapping[str, float]) -> int:
    """Number of requests within every limit of `goodput`, in milliseconds."""
    count = 0
    for outcome in good:
        of_request = {"ttft": outcome.ttft, "tpot": _tpot(outcome), "e2el": outcome.latency}
        count += all(of_request[name] * 1000.0 <= limit for name, limit in goodput.items())
    return count


def _peak_rate(good: Sequence[Outcome], seconds: float) -> float:
    """Maximum output tokens per second in any of the run's equal parts of at most a second.

    Never below the mean. Assumes that a request's tokens are spread evenly over its events.
    """
    if not good or not seconds > 0:
        return 0.0
    first = min(outcome.start_time for outcome in good)
    num_parts = max(1, math.ceil(seconds))
    tokens = np.zeros(num_parts)
    for outcome in good:
        times = outcome.start_time - first + outcome.ttft + np.concatenate(([0.0], np.cumsum(outcome.itl)))
        parts = np.clip((times * num_parts / seconds).astype(np.int64), 0, num_parts - 1)
        np.add.at(tokens, parts, outcome.output_tokens / len(times))
    return float(max(tokens.max() * num_parts, sum(outcome.output_tokens for outcome in good)) / seconds)


def _peak_concurrency(good: Sequence[Outcome]) -> int:
    """Maximum concurrent requests; one that ends when another is sent does not overlap it."""
    changes = [(outcome.start_time, 1) for outcome in good]
    changes += [(outcome.start_time + outcome.latency, -1) for outcome in good]
    running = most = 0
    for _, change in sorted(changes):
        running += change
        most = max(most, running)
    return most
