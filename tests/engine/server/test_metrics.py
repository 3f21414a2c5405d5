"""What the server itself observes of a request."""

from __future__ import annotations

import time

from sempre.engine.outputs import CompletionOutput, RequestOutput
from sempre.engine.server.metrics import Histogram, ServerMetrics


def output(index: int, num_tokens: int) -> RequestOutput:
    completion = CompletionOutput(index, "", [5] * num_tokens, None, None)
    return RequestOutput("r", "p", [1], None, [completion], finished=False)


def num_observed(histogram: Histogram) -> float:
    return histogram.buckets()[-1][1]


def test_gaps_are_those_between_one_arrival_and_the_next() -> None:
    metrics = ServerMetrics("m")
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
    histogram = Histogram("h", "help", (1, 2))
    for value in (0.5, 1, 1.5, 2, 7):
        histogram.observe(value)
    assert histogram.buckets() == [("1.0", 2.0), ("2.0", 4.0), ("+Inf", 5.0)]
    assert histogram.sum == 12.0
