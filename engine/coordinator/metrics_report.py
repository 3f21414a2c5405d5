"""Counters and gauges of an engine under vLLM's names."""

from __future__ import annotations

from collections.abc import Sequence

from sempre.engine.metrics import Observations
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
_OF_SPECULATION = {
    "spec_decode_num_drafts": "num_drafts",
    "spec_decode_num_draft_tokens": "num_draft_tokens",
    "spec_decode_num_accepted_tokens": "num_accepted_tokens",
}


_HISTOGRAMS = {
    "iteration_tokens_total": "tokens_per_step",
    "request_num_preemptions": "preemptions_per_request",
}

Report = dict[str, float | list[float] | dict[str, float | list[float]]]


def metrics_report(replicas: Sequence[SchedulerStats], *, speculation: int = 0) -> Report:
    """One list per name with a value per replica. `request_success` counts all replicas by finish reason;
    `iteration_tokens_total` counts their steps by number of tokens, and `request_num_preemptions` their requests by
    number of preemptions: cumulative counts per bound, and the sum.

    `speculation` is the maximum number of draft tokens per request and step; accepted ones are counted by position.
    """
    names = _NAMES | _OF_SPECULATION if speculation else _NAMES
    report: Report = {
        name: [float(getattr(stats, attribute)) for stats in replicas] for name, attribute in names.items()
    }
    if speculation:
        counts = [stats.num_accepted_tokens_per_pos for stats in replicas]
        report["spec_decode_num_accepted_tokens_per_pos"] = {
            str(place): float(sum(count[place] for count in counts if place < len(count)))
            for place in range(speculation)
        }
    report["num_requests_waiting_by_reason"] = {
        "capacity": [float(stats.num_waiting - stats.num_deferred) for stats in replicas],
        "deferred": [float(stats.num_deferred) for stats in replicas],
    }
    for name, attribute in _HISTOGRAMS.items():
        report[name] = _total([getattr(stats, attribute) for stats in replicas])
    report["request_success"] = {
        reason: float(sum(stats.finished.get(reason, 0) for stats in replicas)) for reason in replicas[0].finished
    }
    return report


def _total(several: Sequence[Observations]) -> dict[str, float | list[float]]:
    parts = [dict(observed.buckets()) | {"sum": observed.sum} for observed in several]
    return {name: sum(part[name] for part in parts) for name in parts[0]}
