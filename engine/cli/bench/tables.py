"""Readable tables of results."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from statistics import fmean
from typing import Any

Row = tuple[str, Any] | str
"""A name with its value, or a title."""


def lines(rows: Iterable[Row]) -> str:
    """Return one line per row, with two decimals for a float."""
    return "\n".join(_line(row) for row in rows)


def offline_table(result: Mapping[str, Any]) -> str:
    """Return the table of `bench latency`, `throughput` or `startup`, whose keys say which it is."""
    rows: list[Row] = []
    if "latencies" in result:
        rows += _times("Latency", result["avg_latency"], result["latencies"], result["percentiles"])
    if "requests_per_second" in result:
        rows += [
            ("Successful requests", result["num_requests"]),
            ("Benchmark duration (s)", result["elapsed_time"]),
            ("Total tokens", result["total_num_tokens"]),
            ("Request throughput (req/s)", result["requests_per_second"]),
            ("Total token throughput (tok/s)", result["tokens_per_second"]),
        ]
    for kind, title in (("cold", "Start without compiled kernels"), ("warm", "Start with compiled kernels")):
        if f"avg_{kind}_startup_time" in result:
            times, of_starts = result[f"{kind}_startup_times"], result[f"{kind}_startup_phases"]
            rows += _times(title, result[f"avg_{kind}_startup_time"], times, result[f"{kind}_startup_percentiles"])
            # a phase's parts, as in load.imports, are in the JSON
            phases = [name for name in of_starts[0] if "." not in name]
            rows += [(f"  {name} (s)", fmean(phases_of[name] for phases_of in of_starts)) for name in phases]
    return lines(rows)


def sweep_table(results: Iterable[Mapping[str, Any]]) -> str:
    """Return one line per load: what was asked for, throughput, and medians of latencies in milliseconds."""
    titles = ("Rate", "Limit", "Req/s", "Tok/s", "TTFT", "TPOT", "E2EL")
    keys = ("request_throughput", "output_throughput", "median_ttft_ms", "median_tpot_ms", "median_e2el_ms")
    shown = ["".join(f"{title:>10}" for title in titles)]
    for result in results:
        limit = result["max_concurrency"]
        cells = [f"{result['request_rate']}", "none" if limit is None else f"{limit}"]
        shown.append("".join(f"{cell:>10}" for cell in [*cells, *(f"{result[key]:.2f}" for key in keys)]))
    return "\n".join([" All loads, medians in ms ".center(70, "-"), *shown])


def _times(title: str, mean: float, values: list[float], percentiles: Mapping[str, float]) -> list[Row]:
    shown = [(f"P{percent} (s)", value) for percent, value in percentiles.items()] if len(values) > 1 else []
    return [title, ("Runs", len(values)), ("Mean (s)", mean), *shown]


def _line(row: Row) -> str:
    if isinstance(row, str):
        return f" {row} ".center(52, "-")
    name, value = row
    return f"{name + ':':<40} {value:.2f}" if isinstance(value, float) else f"{name + ':':<40} {value}"
