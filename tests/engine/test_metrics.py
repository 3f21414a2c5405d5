"""The coordinator's report as users read it."""

from __future__ import annotations

from sempre.engine.coordinator.metrics_report import metrics_report
from sempre.engine.metrics import Counter, Gauge, read_metrics
from sempre.engine.scheduling import SchedulerStats


def test_kinds_and_labels() -> None:
    assert read_metrics(
        {
            "num_requests_running": [2.0, 0.0],
            "prompt_tokens": [7.0],
            "request_success": {"stop": 3.0, "length": 0.0},
        },
        "tiny",
    ) == [
        Gauge(name="sempre:num_requests_running", labels={"model_name": "tiny", "engine": "0"}, value=2.0),
        Gauge(name="sempre:num_requests_running", labels={"model_name": "tiny", "engine": "1"}, value=0.0),
        Counter(name="sempre:prompt_tokens", labels={"model_name": "tiny", "engine": "0"}, value=7),
        Counter(name="sempre:request_success", labels={"model_name": "tiny", "finished_reason": "stop"}, value=3),
        Counter(name="sempre:request_success", labels={"model_name": "tiny", "finished_reason": "length"}, value=0),
    ]


def test_everything_reported_can_be_read() -> None:
    report = metrics_report([SchedulerStats(num_running=1), SchedulerStats(kv_cache_usage=0.5)])
    metrics = read_metrics(report, "tiny")
    assert {metric.name for metric in metrics} == {f"sempre:{name}" for name in report}
    gauges = {metric.name for metric in metrics if isinstance(metric, Gauge)}
    assert gauges == {"sempre:num_requests_running", "sempre:num_requests_waiting", "sempre:kv_cache_usage_perc"}
