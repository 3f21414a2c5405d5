"""Counters and gauges of an engine under the names that users of vLLM know."""

from __future__ import annotations

from collections.abc import Sequence

from sempre.engine.scheduling import SchedulerStats

_NAMES = {
    "num_requests_running": "num_running",
    "num_requests_waiting": "num_waiting",
    "kv_cache_usage_perc": "kv_cache_usage",
    "prefix_cache_queries": "prefix_cache_queries",
    "prefix_cache_hits": "prefix_cache_hits",
    "num_preemptions": "num_preemptions",
    "worker_restarts": "num_worker_restarts",
    "prompt_tokens": "prompt_tokens",
    "prompt_tokens_cached": "cached_prompt_tokens",
    "generation_tokens": "generation_tokens",
    "iterations": "num_steps",
}


def metrics_report(replicas: Sequence[SchedulerStats]) -> dict[str, float | list[float] | dict[str, float]]:
    """One list per name with a value per replica; `request_success` counts all replicas by finish reason."""
    report: dict[str, float | list[float] | dict[str, float]] = {
        name: [float(getattr(stats, attribute)) for stats in replicas] for name, attribute in _NAMES.items()
    }
    report["request_success"] = {
        reason: float(sum(stats.finished.get(reason, 0) for stats in replicas)) for reason in replicas[0].finished
    }
    return report
