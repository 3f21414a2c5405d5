"""Counters and gauges as users read them, with vLLM's names and the prefix `sempre:`.

The engine itself counts values by size in Observations.
"""

from __future__ import annotations

import dataclasses
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from typing import TypeVar

import msgspec
from msgspec import Struct

PREFIX = "sempre:"
_GAUGES = frozenset(
    {"num_requests_running", "num_requests_waiting", "num_requests_waiting_by_reason", "kv_cache_usage_perc"}
)
# vLLM's buckets
TOKEN_BOUNDS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10_000, 20_000, 50_000, 100_000)
COUNT_BOUNDS = (1, 2, 5, 10, 20)
_SIZES = {
    "request_prompt_tokens": TOKEN_BOUNDS,
    "request_generation_tokens": TOKEN_BOUNDS,
    "request_params_n": COUNT_BOUNDS,
    "request_params_max_tokens": TOKEN_BOUNDS,
}
_HISTOGRAMS = frozenset({"iteration_tokens_total", "request_num_preemptions", *_SIZES})
_LABEL_OF_PARTS = {
    "num_requests_waiting_by_reason": "reason",
    "request_success": "finished_reason",
    "spec_decode_num_accepted_tokens_per_pos": "position",
}

Labels = dict[str, str]
StructType = TypeVar("StructType", bound=type[msgspec.Struct])
ReportedValue = float | list[float] | dict[str, float | list[float]]


def dataclass_view(struct: StructType) -> StructType:
    """Make `dataclasses.asdict`, `fields` and `replace` accept `struct`, which costs less than half of a dataclass
    to create and is not tracked by the garbage collector."""
    fields = [
        (field.name, field.type)
        if field.default is msgspec.NODEFAULT
        else (field.name, field.type, dataclasses.field(default=field.default))
        for field in msgspec.structs.fields(struct)
    ]
    twin = dataclasses.make_dataclass(struct.__name__, fields)
    struct.__dataclass_fields__ = twin.__dataclass_fields__  # type: ignore[attr-defined]
    return struct


@dataclass_view
class Metric(Struct, frozen=True, kw_only=True):
    """A named value. `labels` holds `model_name` and `engine` (the replica) or another distinguishing label."""

    name: str
    labels: Labels


@dataclass_view
class Counter(Metric, frozen=True, kw_only=True):
    """A count since the engine started; it never falls, but a restart of the coordinator resets it."""

    value: int


@dataclass_view
class Gauge(Metric, frozen=True, kw_only=True):
    """A current value."""

    value: float


@dataclass_view
class Histogram(Metric, frozen=True, kw_only=True):
    """`count` observations adding up to `sum`; `buckets` says how many were at most each bound. Resets as Counter."""

    count: int
    sum: float
    buckets: dict[str, int]


def read_metrics(report: Mapping[str, ReportedValue], model_name: str) -> list[Metric]:
    """Return one metric per value or histogram of the coordinator's report, in its order."""
    metrics: list[Metric] = []
    for name, reported in report.items():
        if name in _HISTOGRAMS:
            metrics.append(_histogram(name, reported, {"model_name": model_name}))
            continue
        metrics += [
            _metric(name, value, {"model_name": model_name, **labels}) for value, labels in _labelled(name, reported)
        ]
    return metrics


def _histogram(name: str, reported: ReportedValue, labels: Labels) -> Histogram:
    values = msgspec.convert(reported, dict[str, float])
    buckets = {bound: int(value) for bound, value in values.items() if bound != "sum"}
    return Histogram(name=PREFIX + name, labels=labels, count=buckets["+Inf"], sum=values["sum"], buckets=buckets)


def _labelled(name: str, reported: ReportedValue) -> list[tuple[float, Labels]]:
    if isinstance(reported, dict):
        label = _LABEL_OF_PARTS.get(name, "part")
        parts = [(part, _labelled(name, values)) for part, values in reported.items()]
        return [(value, {**labels, label: part}) for part, values in parts for value, labels in values]
    if isinstance(reported, list):
        return [(value, {"engine": str(replica)}) for replica, value in enumerate(reported)]
    return [(reported, {})]


def _metric(name: str, value: float, labels: Labels) -> Metric:
    if name in _GAUGES:
        return Gauge(name=PREFIX + name, labels=labels, value=value)
    return Counter(name=PREFIX + name, labels=labels, value=int(value))


class Observations:
    """Counts of values between `bounds`; the last bucket has no upper bound."""

    __slots__ = ("_bounds", "_counts", "sum")

    def __init__(self, bounds: Sequence[float]) -> None:
        self._bounds = bounds
        self._counts = [0] * (len(bounds) + 1)
        self.sum = 0.0

    def observe(self, value: float) -> None:
        self._counts[bisect_left(self._bounds, value)] += 1
        self.sum += value

    def buckets(self) -> list[tuple[str, float]]:
        """Return (upper bound, observations up to it) in ascending order, as Prometheus writes them."""
        return cumulative(self._bounds, self._counts)


def cumulative(bounds: Sequence[float], counts: Sequence[float]) -> list[tuple[str, float]]:
    """Return (upper bound, observations up to it) for counts between the bounds."""
    total = 0.0
    buckets = []
    for bound, count in zip((*bounds, None), counts, strict=True):
        total += count
        buckets.append(("+Inf" if bound is None else str(float(bound)), total))
    return buckets


class RequestSizes:
    """Sizes of the requests of one engine, as its user sees them."""

    def __init__(self) -> None:
        self._observed = {name: Observations(bounds) for name, bounds in _SIZES.items()}

    def begun(self, num_prompt_tokens: int, n: int, max_tokens: int) -> None:
        """Count a request."""
        self._observed["request_prompt_tokens"].observe(num_prompt_tokens)
        self._observed["request_params_n"].observe(n)
        self._observed["request_params_max_tokens"].observe(max_tokens)

    def ended(self, num_tokens: int) -> None:
        """Count an output."""
        self._observed["request_generation_tokens"].observe(num_tokens)

    def report(self) -> dict[str, ReportedValue]:
        """Return values for `read_metrics`."""
        return {name: {**dict(each.buckets()), "sum": each.sum} for name, each in self._observed.items()}
