"""/metrics: the engine's counters and the server's own, with vLLM's names and our prefix.

There is an observation for every streamed token, so they are kept in plain arrays, one for each API process, and
summed and converted to prometheus-client's families when read.
"""

from __future__ import annotations

import time
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from msgspec.structs import replace
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.metrics_core import Metric as Family
from prometheus_client.registry import Collector

from sempre.engine.frontend.request_builder import PreparedRequest
from sempre.engine.metrics import COUNT_BOUNDS, PREFIX, TOKEN_BOUNDS, Counter, Gauge, Metric, cumulative
from sempre.engine.metrics import Histogram as EngineHistogram
from sempre.engine.outputs import RequestMetrics, RequestOutput
from sempre.engine.server.clients import Client
from sempre.engine.server.ledger import Ledger

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

_FIRST_TOKEN_S = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80, 160)
_TOKEN_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5, 10, 20, 40)
_REQUEST_S = (0.01, 0.05, 0.1, 0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960)

_KINDS: dict[type[Metric], type[CounterMetricFamily | GaugeMetricFamily | HistogramMetricFamily]] = {
    Counter: CounterMetricFamily,
    Gauge: GaugeMetricFamily,
    EngineHistogram: HistogramMetricFamily,
}


class Histogram:
    """Counts of values between `bounds`, and their sum, over all API processes."""

    __slots__ = ("_bounds", "_cells", "_own", "help_text", "name")

    def __init__(self, ledger: Ledger, name: str, help_text: str, bounds: Sequence[float]) -> None:
        self.name = name
        self.help_text = help_text
        self._bounds = bounds
        # the last bucket has no upper bound, and the sum follows it
        self._cells = ledger.counter(len(bounds) + 2)
        self._own = self._cells.own

    def observe(self, value: float) -> None:
        self._own[bisect_left(self._bounds, value)] += 1
        self._own[-1] += value

    def buckets(self) -> list[tuple[str, float]]:
        """Return (upper bound, observations up to it) in ascending order, as Prometheus writes them."""
        return cumulative(self._bounds, self._cells.totals()[:-1])

    @property
    def sum(self) -> float:
        return self._cells.totals()[-1]


class ServerMetrics:
    """Latencies and sizes of requests as clients see them."""

    def __init__(self, model_name: str, ledger: Ledger) -> None:
        self._model_name = model_name
        make = partial(Histogram, ledger)
        self.first_token = make("time_to_first_token_seconds", "From arrival to first token.", _FIRST_TOKEN_S)
        self.inter_token = make("inter_token_latency_seconds", "Between tokens of a sequence.", _TOKEN_S)
        self.per_token = make("request_time_per_output_token_seconds", "Mean time per token after the first.", _TOKEN_S)
        self.end_to_end = make("e2e_request_latency_seconds", "From arrival to the last token.", _REQUEST_S)
        self.queue = make("request_queue_time_seconds", "From arrival to the first step.", _REQUEST_S)
        self.prefill = make("request_prefill_time_seconds", "From the first step to the first token.", _REQUEST_S)
        self.decode = make("request_decode_time_seconds", "From the first token to the last one.", _REQUEST_S)
        self.inference = make("request_inference_time_seconds", "From the first step to the last token.", _REQUEST_S)
        self.prompt_tokens = make("request_prompt_tokens", "Tokens of a prompt.", TOKEN_BOUNDS)
        self.output_tokens = make("request_generation_tokens", "Tokens of an output.", TOKEN_BOUNDS)
        self.params_n = make("request_params_n", "`n` of a request.", COUNT_BOUNDS)
        self.params_max_tokens = make("request_params_max_tokens", "`max_tokens` of a request.", TOKEN_BOUNDS)
        self._histograms = [value for value in vars(self).values() if isinstance(value, Histogram)]

    def begin(self, requests: Sequence[PreparedRequest]) -> RequestRecord:
        """Count the requests of one call."""
        for request in requests:
            self.prompt_tokens.observe(len(request.prompt_token_ids))
            self.params_n.observe(request.params.n)
            self.params_max_tokens.observe(request.sequences[0].params.max_tokens)
        return RequestRecord(self)

    def exposition(
        self,
        engine: Iterable[Metric],
        caches: Sequence[Mapping[str, object]],
        *,
        clients: Sequence[Client] = (),
        num_rejected: int,
        prefix: str,
    ) -> bytes:
        """Return everything in Prometheus's text format. `caches`: the layout of each replica's KV cache, once known.
        `clients`: those of API keys.

        The engine names its model by folder or hub id; here it has the name that clients use.
        """
        info = GaugeMetricFamily(
            PREFIX + "cache_config_info", "Layout of the KV cache; always 1.", labels=list(caches[0]) if caches else []
        )
        for cache in caches:
            info.add_metric([str(value) for value in cache.values()], 1)
        own = {PREFIX + histogram.name for histogram in self._histograms}
        renamed = [
            replace(metric, labels={**metric.labels, "model_name": self._model_name})
            for metric in engine
            if metric.name not in own  # counted here for each HTTP request, also where a search makes many of it
        ]
        registry = CollectorRegistry()
        own_families = [*self._families(num_rejected), *self._of_clients(clients), info]
        registry.register(_Families([*own_families, *_engine_families(renamed)], prefix + ":"))
        return generate_latest(registry)

    def _families(self, num_rejected: int) -> Iterator[Family]:
        labels = {"model_name": self._model_name}
        for histogram in self._histograms:
            family = HistogramMetricFamily(PREFIX + histogram.name, histogram.help_text, labels=list(labels))
            family.add_metric(list(labels.values()), histogram.buckets(), histogram.sum)
            yield family
        rejected = CounterMetricFamily(
            PREFIX + "admission_rejections", "Requests rejected with 503.", labels=list(labels)
        )
        rejected.add_metric(list(labels.values()), num_rejected)
        yield rejected

    def _of_clients(self, clients: Sequence[Client]) -> Iterator[Family]:
        """What each API key has used, by its name."""
        if not clients:
            return
        labels = ["model_name", "api_key"]
        tokens = CounterMetricFamily(PREFIX + "api_key_tokens", "Tokens of prompts and outputs.", labels=labels)
        refused = CounterMetricFamily(PREFIX + "api_key_refusals", "Requests refused with 429.", labels=labels)
        sequences = GaugeMetricFamily(PREFIX + "api_key_sequences", "Sequences waiting or running.", labels=labels)
        for client in clients:
            own = [self._model_name, client.name or ""]
            tokens.add_metric(own, client.num_tokens)
            refused.add_metric(own, client.num_refused)
            sequences.add_metric(own, client.num_sequences)
        yield from (tokens, refused, sequences)


@dataclass(slots=True)
class _Arrivals:
    """Arrival times of a sequence's first and last token, and the number of tokens."""

    first: float
    last: float
    count: int


class RequestRecord:
    """Times of one HTTP request."""

    def __init__(self, metrics: ServerMetrics) -> None:
        self._metrics = metrics
        self._began = time.monotonic()
        self._sequences: dict[tuple[str, int], _Arrivals] = {}
        self._requests: dict[str, RequestMetrics] = {}
        self._ended = False

    def take(self, outputs: Iterable[RequestOutput]) -> int:
        """Record the arrival of tokens; return their number."""
        num_tokens = 0
        for output in outputs:
            for choice in output.outputs:
                num_tokens += self.arrived(output.request_id, choice.index, len(choice.token_ids), output.metrics)
        return num_tokens

    def arrived(self, request_id: str, index: int, num_new: int, times: RequestMetrics | None) -> int:
        """Record the arrival of a sequence's next `num_new` tokens; return their number."""
        if not num_new:
            return 0
        now = time.monotonic()
        key = (request_id, index)
        seen = self._sequences.get(key)
        if seen is None:
            self._sequences[key] = _Arrivals(now, now, num_new)
            if times is not None:
                self._requests[request_id] = times
            self._metrics.first_token.observe(now - self._began)
        else:
            self._metrics.inter_token.observe(now - seen.last)
            seen.last = now
            seen.count += num_new
        return num_new

    def end(self) -> None:
        """Record the end of the request; a second call does nothing."""
        if self._ended:
            return
        self._ended = True
        self._metrics.end_to_end.observe(time.monotonic() - self._began)
        for request_id, times in self._requests.items():
            if times.time_in_queue is not None:
                self._observe_parts(request_id, times.time_in_queue)
        for seen in self._sequences.values():
            self._metrics.output_tokens.observe(seen.count)
            if seen.count > 1 and seen.last > seen.first:
                self._metrics.per_token.observe((seen.last - seen.first) / (seen.count - 1))

    def _observe_parts(self, request_id: str, time_in_queue: float) -> None:
        sequences = [seen for (owner, _), seen in self._sequences.items() if owner == request_id]
        first, last = min(seen.first for seen in sequences), max(seen.last for seen in sequences)
        started = self._began + time_in_queue
        self._metrics.queue.observe(time_in_queue)
        self._metrics.prefill.observe(first - started)
        self._metrics.decode.observe(last - first)
        self._metrics.inference.observe(last - started)


class _Families(Collector):
    def __init__(self, families: list[Family], prefix: str) -> None:
        self._families = families
        self._prefix = prefix

    def collect(self) -> Iterator[Family]:
        for family in self._families:
            renamed = family
            if self._prefix != PREFIX:
                renamed.name = self._prefix + family.name.removeprefix(PREFIX)
                renamed.samples = [
                    sample._replace(name=self._prefix + sample.name.removeprefix(PREFIX)) for sample in family.samples
                ]
            yield renamed


def _engine_families(metrics: Iterable[Metric]) -> Iterator[Family]:
    by_name: dict[str, list[Metric]] = {}
    for metric in metrics:
        by_name.setdefault(metric.name, []).append(metric)
    for name, values in by_name.items():
        yield _engine_family(name, f"{name.removeprefix(PREFIX).replace('_', ' ')}, of the engine.", values)


def _engine_family(name: str, help_text: str, metrics: list[Metric]) -> Family:
    family = _KINDS[type(metrics[0])](name, help_text, labels=list(metrics[0].labels))
    for metric in metrics:
        family.add_metric(list(metric.labels.values()), *_figures(metric))
    return family


def _figures(metric: Metric) -> tuple[Any, ...]:
    if isinstance(metric, EngineHistogram):
        return [(bound, float(count)) for bound, count in metric.buckets.items()], metric.sum
    assert isinstance(metric, Counter | Gauge)
    return (metric.value,)
