"""What the server itself observes of a request."""

from __future__ import annotations

import time

from sempre.engine.metrics import Counter, Gauge, Metric
from sempre.engine.metrics import Histogram as EngineHistogram
from sempre.engine.outputs import CompletionOutput, RequestOutput
from sempre.engine.server.ledger import Ledger
from sempre.engine.server.metrics import Histogram, ServerMetrics


def output(index: int, num_tokens: int) -> RequestOutput:
    completion = CompletionOutput(index, "", [5] * num_tokens, None, None)
    return RequestOutput("r", "p", [1], None, [completion], finished=False)


def num_observed(histogram: Histogram) -> float:
    return histogram.buckets()[-1][1]


def test_gaps_are_those_between_one_arrival_and_the_next() -> None:
    metrics = ServerMetrics("m", Ledger())
    record = metrics.begin([])
    began = time.monotonic()
    for _ in range(4):
        record.take([output(0, 2), output(1, 0)])
        time.sleep(0.03)
    assert 0.09 <= metrics.inter_token.sum <= time.monotonic() - began, "they add up to the time from first to last"
    record.take([output(1, 1)])
    assert num_observed(metrics.first_token) == 2
    assert num_observed(metrics.inter_token) == 3
    record.end()
    record.end()
    assert num_observed(metrics.end_to_end) == 1
    assert (num_observed(metrics.output_tokens), metrics.output_tokens.sum) == (2, 9)
    # a sequence of one token has no time per further token
    assert num_observed(metrics.per_token) == 1
    assert 0.09 / 7 <= metrics.per_token.sum <= (time.monotonic() - began) / 7


def test_buckets_hold_all_observations_up_to_their_bound() -> None:
    histogram = Histogram(Ledger(), "h", "help", (1, 2))
    for value in (0.5, 1, 1.5, 2, 7):
        histogram.observe(value)
    assert histogram.buckets() == [("1.0", 2.0), ("2.0", 4.0), ("+Inf", 5.0)]
    assert histogram.sum == 12.0


def test_every_kind_is_shown_under_the_served_name_and_the_prefix() -> None:
    labels = {"model_name": "/models/folder", "engine": "0"}
    engine: list[Metric] = [
        Gauge(name="sempre:g", labels={**labels, "reason": "capacity"}, value=2),
        Gauge(name="sempre:g", labels={**labels, "reason": "deferred"}, value=3),
        Counter(name="sempre:c", labels=labels, value=4),
        EngineHistogram(name="sempre:h", labels=labels, count=2, sum=7, buckets={"1.0": 1, "+Inf": 2}),
    ]
    caches = [{"engine": replica, "block_size": 16} for replica in range(2)]
    lines = (
        ServerMetrics("served", Ledger())
        .exposition(engine, caches, num_rejected=5, prefix="vllm")
        .decode()
        .splitlines()
    )
    assert set(lines) >= {
        'vllm:g{engine="0",model_name="served",reason="capacity"} 2.0',
        'vllm:g{engine="0",model_name="served",reason="deferred"} 3.0',
        'vllm:c_total{engine="0",model_name="served"} 4.0',
        'vllm:h_bucket{engine="0",le="1.0",model_name="served"} 1.0',
        'vllm:h_count{engine="0",model_name="served"} 2.0',
        'vllm:h_sum{engine="0",model_name="served"} 7.0',
        "# TYPE vllm:g gauge",
        "# TYPE vllm:c_total counter",
        "# TYPE vllm:h histogram",
        'vllm:cache_config_info{block_size="16",engine="0"} 1.0',
        'vllm:cache_config_info{block_size="16",engine="1"} 1.0',
        'vllm:admission_rejections_total{model_name="served"} 5.0',
    }
    assert not any("folder" in line for line in lines)
