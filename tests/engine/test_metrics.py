"""The coordinator's report as users read it."""

from __future__ import annotations

import msgspec
import pytest

from sempre.engine.coordinator.metrics_report import metrics_report
from sempre.engine.metrics import Counter, Gauge, Histogram, read_metrics
from sempre.engine.scheduling import SchedulerStats


def test_kinds_and_labels() -> None:
    assert read_metrics(
        {
            "num_requests_running": [2.0, 0.0],
            "prompt_tokens": [7.0],
            "iteration_tokens_total": {"1.0": 2.0, "+Inf": 3.0, "sum": 12.0},
            "request_success": {"stop": 3.0, "length": 0.0},
        },
        "tiny",
    ) == [
        Gauge(name="sempre:num_requests_running", labels={"model_name": "tiny", "engine": "0"}, value=2.0),
        Gauge(name="sempre:num_requests_running", labels={"model_name": "tiny", "engine": "1"}, value=0.0),
        Counter(name="sempre:prompt_tokens", labels={"model_name": "tiny", "engine": "0"}, value=7),
        Histogram(
            name="sempre:iteration_tokens_total",
            labels={"model_name": "tiny"},
            count=3,
            sum=12.0,
            buckets={"1.0": 2, "+Inf": 3},
        ),
        Counter(name="sempre:request_success", labels={"model_name": "tiny", "finished_reason": "stop"}, value=3),
        Counter(name="sempre:request_success", labels={"model_name": "tiny", "finished_reason": "length"}, value=0),
    ]


def test_everything_reported_can_be_read() -> None:
    report = metrics_report([SchedulerStats(num_running=1), SchedulerStats(kv_cache_usage=0.5)], speculation=2)
    metrics = read_metrics(report, "tiny")
    assert {metric.name for metric in metrics} == {f"sempre:{name}" for name in report}
    gauges = {metric.name for metric in metrics if isinstance(metric, Gauge)}
    assert gauges == {
        "sempre:num_requests_running",
        "sempre:num_requests_waiting",
        "sempre:num_requests_waiting_by_reason",
        "sempre:kv_cache_usage_perc",
    }
    histograms = {metric.name for metric in metrics if isinstance(metric, Histogram)}
    assert histograms == {"sempre:iteration_tokens_total", "sempre:request_num_preemptions"}
    assert not any("part" in metric.labels for metric in metrics), "a dimension without a name"


def test_steps_of_all_replicas_are_counted_by_their_tokens() -> None:
    replicas = [SchedulerStats(), SchedulerStats()]
    for stats, sizes in zip(replicas, [(1, 8), (9, 20_000)], strict=True):
        for size in sizes:
            stats.tokens_per_step.observe(size)
    found = next(m for m in read_metrics(metrics_report(replicas), "tiny") if isinstance(m, Histogram))
    assert (found.count, found.sum) == (4, 20_018)
    assert [found.buckets[bound] for bound in ("1.0", "8.0", "16.0", "16384.0", "+Inf")] == [1, 2, 3, 3, 4]


def test_waiting_requests_are_told_by_replica_and_by_reason() -> None:
    report = metrics_report([SchedulerStats(num_waiting=3, num_deferred=1), SchedulerStats(num_waiting=2)])
    found = {
        (m.labels["engine"], m.labels["reason"]): m.value
        for m in read_metrics(report, "tiny")
        if isinstance(m, Gauge) and m.name == "sempre:num_requests_waiting_by_reason"
    }
    assert found == {("0", "capacity"): 2, ("0", "deferred"): 1, ("1", "capacity"): 2, ("1", "deferred"): 0}


def test_a_histogram_that_is_reported_as_something_else_is_no_counter() -> None:
    with pytest.raises(msgspec.ValidationError):
        read_metrics({"request_num_preemptions": [1.0]}, "tiny")
