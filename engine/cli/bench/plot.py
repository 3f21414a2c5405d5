"""A drawing of load tests: latency and throughput against load, as SVG or as a page that needs nothing else."""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from sempre.engine.cli.parser import UsageError

_WIDTH, _HEIGHT = 460, 300
_LEFT, _RIGHT, _TOP, _BOTTOM = 64, 16, 34, 44
_COLOURS = ("#2563eb", "#d97706", "#059669", "#9333ea", "#dc2626", "#0891b2")
_STYLE = """
svg { font: 12px system-ui, sans-serif; background: #fff; color: #1f2937; max-width: 100%; height: auto }
text { fill: currentColor } .grid { stroke: currentColor; stroke-opacity: .15 } .line { fill: none; stroke-width: 2 }
@media (prefers-color-scheme: dark) { svg, body { background: #111827; color: #e5e7eb } }
"""
# figure, what it is called in the legend
_LATENCIES = (("median_ttft_ms", "TTFT"), ("median_e2el_ms", "end to end"))
_THROUGHPUT = (("output_throughput", "output"),)


class Line(NamedTuple):
    """A named line through points (x, y), ordered by x."""

    name: str
    points: list[tuple[float, float]]


def check_plot_name(name: str | None) -> None:
    """Raise UsageError for a name that says neither SVG nor HTML."""
    if name is not None and Path(name).suffix not in (".svg", ".html"):
        raise UsageError(f"--plot: the name must end with .svg or .html, got {name!r}")


def write_plot(path: Path, runs: Mapping[str, Sequence[Mapping[str, Any]]]) -> None:
    """Draw the runs of each name in `runs`. Raises UsageError if they are no load tests."""
    every = [run for of_name in runs.values() for run in of_name]
    if not all("output_throughput" in run and "median_ttft_ms" in run for run in every):
        raise UsageError("--plot draws results of bench serve, which have a load; these have none")
    axis = _axis(every)
    panels = [
        _panel(f"Median latency against {_AXES[axis]}", "ms", _lines(runs, axis, _LATENCIES)),
        _panel(f"Throughput against {_AXES[axis]}", "tokens/s", _lines(runs, axis, _THROUGHPUT)),
    ]
    moved = "".join(f'<g transform="translate({i * _WIDTH} 0)">{panel}</g>' for i, panel in enumerate(panels))
    size = f'viewBox="0 0 {_WIDTH * len(panels)} {_HEIGHT}" width="{_WIDTH * len(panels)}" height="{_HEIGHT}"'
    svg = f'<svg xmlns="http://www.w3.org/2000/svg" role="img" {size}><style>{_STYLE}</style>{moved}</svg>\n'
    if path.suffix == ".html":
        svg = (
            f'<!doctype html><html lang="en"><meta charset="utf-8"><title>Load test</title><body>{svg}</body></html>\n'
        )
    path.write_text(svg, encoding="utf-8")


_AXES = {
    "request_rate": "request rate (req/s)",
    "max_concurrency": "concurrency limit",
    "max_concurrent_requests": "peak concurrent requests",
}


def _axis(runs: Sequence[Mapping[str, Any]]) -> str:
    """The key in which the runs differ; without one, the load that was reached."""
    for key in ("request_rate", "max_concurrency"):
        values = [run.get(key) for run in runs]
        if all(isinstance(value, (int, float)) for value in values) and len(set(values)) > 1:
            return key
    return "max_concurrent_requests"


def _lines(
    runs: Mapping[str, Sequence[Mapping[str, Any]]], axis: str, figures: Sequence[tuple[str, str]]
) -> list[Line]:
    return [
        Line(
            f"{name} {title}" if len(runs) > 1 else title,
            sorted((float(run[axis]), float(run[key])) for run in of_name if key in run),
        )
        for name, of_name in runs.items()
        for key, title in figures
    ]


def _panel(title: str, unit: str, lines: Sequence[Line]) -> str:
    xs = sorted({x for line in lines for x, _ in line.points})
    top = _nice(max(y for line in lines for _, y in line.points))
    scale = _Scale(xs, top)
    parts = [f'<text x="{_LEFT}" y="16" font-weight="600">{title} ({unit})</text>']
    for step in range(5):
        value = top * step / 4
        y = scale.y(value)
        parts.append(f'<path class="grid" d="M{_LEFT} {y:.1f}H{_WIDTH - _RIGHT}"/>')
        parts.append(f'<text x="{_LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{value:,.6g}</text>')
    for x in xs if len(xs) <= 12 else xs[:: math.ceil(len(xs) / 12)]:
        parts.append(f'<text x="{scale.x(x):.1f}" y="{_HEIGHT - _BOTTOM + 16}" text-anchor="middle">{x:g}</text>')
    for number, line in enumerate(lines):
        parts.append(_drawn(line, scale, number))
    return "".join(parts)


def _drawn(line: Line, scale: _Scale, number: int) -> str:
    colour, name = _COLOURS[number % len(_COLOURS)], html.escape(line.name)
    places = [(scale.x(x), scale.y(y)) for x, y in line.points]
    path = "L".join(f"{x:.1f} {y:.1f}" for x, y in places)
    parts = [f'<path class="line" stroke="{colour}" d="M{path}"/>']
    for (x, y), (at, value) in zip(places, line.points, strict=True):
        parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" fill="{colour}">')
        parts.append(f"<title>{name}: {value:,.2f} at {at:g}</title></circle>")
    y = _HEIGHT - 10
    x = _LEFT + number * (_WIDTH - _LEFT) / 4
    parts.append(f'<text x="{x:.0f}" y="{y}" style="fill:{colour}">● {name}</text>')
    return "".join(parts)


class _Scale:
    """Places values in a panel; loads that span more than a factor of 8 are on a logarithmic axis."""

    def __init__(self, xs: Sequence[float], top: float) -> None:
        self._top = top
        self._is_log = xs[0] > 0 and xs[-1] / xs[0] > 8
        self._low, self._high = self._placed(xs[0]), self._placed(xs[-1])

    def _placed(self, x: float) -> float:
        return math.log2(x) if self._is_log else x

    def x(self, x: float) -> float:
        """Pixels from the left."""
        span = self._high - self._low
        share = (self._placed(x) - self._low) / span if span else 0.5
        return _LEFT + 12 + share * (_WIDTH - _LEFT - _RIGHT - 24)

    def y(self, y: float) -> float:
        """Pixels from the top."""
        return _HEIGHT - _BOTTOM - y / self._top * (_HEIGHT - _TOP - _BOTTOM)


def _nice(value: float) -> float:
    """The next number up of 1, 2, 4, 8 times a power of ten, so that its quarters are short."""
    if not value > 0:
        return 1.0
    power: float = 10.0 ** math.floor(math.log10(value))
    return next(factor * power for factor in (1, 2, 4, 8, 10) if factor * power >= value)
