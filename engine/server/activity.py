"""What the log says while the server is busy: a line about throughput every few seconds, none while it is idle."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass

from sempre.engine.metrics import PREFIX, Counter, Gauge, Metric
from sempre.engine.server.load import engine_metrics
from sempre.engine.server.service import Service

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Activity:
    """Sums over the replicas: counters since the start, and current values."""

    at: float
    """seconds on the monotonic clock"""
    prompt_tokens: float = 0.0
    generation_tokens: float = 0.0
    prefix_cache_queries: float = 0.0
    prefix_cache_hits: float = 0.0
    num_requests_running: float = 0.0
    num_requests_waiting: float = 0.0
    kv_cache_usage_perc: float = 0.0
    """of the fullest cache, 0 to 1"""

    @classmethod
    def of(cls, metrics: Iterable[Metric], at: float) -> Activity:
        values: dict[str, list[float]] = defaultdict(list)
        for metric in metrics:
            if isinstance(metric, Counter | Gauge) and "reason" not in metric.labels:
                values[metric.name.removeprefix(PREFIX)].append(metric.value)
        fullest = max(values.pop("kv_cache_usage_perc", [0.0]))
        wanted = cls.__annotations__
        sums = {name: float(sum(found)) for name, found in values.items() if name in wanted}
        return cls(at, kv_cache_usage_perc=fullest, **sums)

    def line_since(self, earlier: Activity) -> str | None:
        """The line about what happened in between; None if nothing did. Counters of a new engine start at 0."""
        prompt = max(0.0, self.prompt_tokens - earlier.prompt_tokens)
        generated = max(0.0, self.generation_tokens - earlier.generation_tokens)
        busy = self.num_requests_running or self.num_requests_waiting
        if not (prompt or generated or busy):
            return None
        seconds = max(self.at - earlier.at, 1e-9)
        parts = [
            f"{generated / seconds:.1f} output tok/s",
            f"{prompt / seconds:.1f} prompt tok/s",
            f"{self.num_requests_running:.0f} running",
            f"{self.num_requests_waiting:.0f} waiting",
            f"KV cache {self.kv_cache_usage_perc:.1%} in use",
        ]
        queries = self.prefix_cache_queries - earlier.prefix_cache_queries
        if queries > 0:
            hits = max(0.0, self.prefix_cache_hits - earlier.prefix_cache_hits)
            parts.append(f"{hits / queries:.1%} of prompt tokens cached")
        return ", ".join(parts)


async def log_activity(service: Service, interval_s: float) -> None:
    """Log a line every `interval_s` seconds in which the engine worked, until cancelled."""
    earlier = Activity(time.monotonic())
    while True:
        await asyncio.sleep(interval_s)
        metrics = await engine_metrics(service)
        if not metrics:
            continue
        current = Activity.of(metrics, time.monotonic())
        line = current.line_since(earlier)
        earlier = current
        if line is not None:
            logger.info(line)
