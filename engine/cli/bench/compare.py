"""`sempre bench compare`: the figures of two results beside each other."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from sempre.engine.cli.bench.plot import check_plot_name, write_plot
from sempre.engine.cli.parser import UsageError
from sempre.ipc.log_lines import plain

_SETTINGS = ("model_id", "tokenizer_id", "backend", "num_prompts", "request_rate", "burstiness", "max_concurrency")
_LOAD = ("request_rate", "max_concurrency")
_LESS_IS_BETTER = ("_ms", "latency", "time", "duration", "failed", "percentiles")
_MORE_IS_BETTER = ("throughput", "per_s", "goodput", "completed")


class Change(NamedTuple):
    """One figure of two runs."""

    name: str
    a: float
    b: float

    @property
    def relative(self) -> float | None:
        """(b - a) / a, or None from zero."""
        return (self.b - self.a) / abs(self.a) if self.a else None

    @property
    def word(self) -> str:
        """better or worse, or nothing if equal or a count."""
        if self.a == self.b:
            return ""
        if any(part in self.name for part in _MORE_IS_BETTER):
            return "better" if self.b > self.a else "worse"
        return ("better" if self.b < self.a else "worse") if any(p in self.name for p in _LESS_IS_BETTER) else ""


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of this command."""
    parser.add_argument("results", nargs="*", metavar="FILE", help="two results of sempre bench, or of vllm bench")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--plot", metavar="FILE", help="also draw both against their load; .svg or .html")


def run(namespace: argparse.Namespace) -> int:
    """Print every figure that both have, and what of their settings differs."""
    names: list[str] = namespace.results
    if len(names) != 2:
        raise UsageError(f"expected two results to compare, found {len(names)}. See sempre bench compare --help.")
    check_plot_name(namespace.plot)
    a, b = (load_results(Path(name)) for name in names)
    pairs = _pairs(a, b, names)
    if namespace.plot is not None:
        labels = names if names[0] != names[1] else [f"{names[0]} (A)", f"{names[1]} (B)"]
        write_plot(Path(namespace.plot), dict(zip(labels, (a, b), strict=True)))
    alone = len(a) + len(b) - 2 * len(pairs)
    if alone:
        print(f"sempre: {alone} runs have a load that only one file has, and are left out", file=sys.stderr)
    found = [(_load(one), differing(one, other), changes(one, other)) for one, other in pairs]
    if namespace.json:
        print(json.dumps([_document(*compared) for compared in found]))
        return 0
    print(plain(f"A: {names[0]}\nB: {names[1]}".replace("\n", ", ")))
    for load, settings, figures in found:
        _print(load, settings, figures)
    return 0


def load_results(path: Path) -> list[dict[str, Any]]:
    """Return the results of a file: one JSON document, one per line, or what a benchmark printed.

    Raises UsageError if it has none, OSError if it cannot be read.
    """
    text = path.read_text(encoding="utf-8")
    try:
        documents = [json.loads(text)]
    except ValueError:
        try:
            documents = [json.loads(line) for line in text.splitlines() if line.startswith("{")]
        except ValueError as error:
            raise UsageError(f"{path} is not a result of a benchmark: {error}") from None
    if not documents or not all(isinstance(document, dict) for document in documents):
        raise UsageError(f"{path} holds no result of a benchmark: expected a JSON object")
    return [found for document in documents for found in document.get("runs", [document])]


def changes(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[Change]:
    """Return the figures that both have, in the order of `a`."""
    figures, others = _figures(a), _figures(b)
    return [Change(name, value, others[name]) for name, value in figures.items() if name in others]


def differing(a: Mapping[str, Any], b: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Return the settings that differ."""
    return {name: (a.get(name), b.get(name)) for name in _SETTINGS if a.get(name) != b.get(name)}


def _figures(result: Mapping[str, Any], prefix: str = "") -> dict[str, float]:
    found: dict[str, float] = {}
    for name, value in result.items():
        if isinstance(value, dict):
            found |= _figures(value, f"{prefix}{name}.")
        elif isinstance(value, (int, float)) and not isinstance(value, bool) and name not in _SETTINGS:
            found[f"{prefix}{name}"] = float(value)
    return found


def _load(result: Mapping[str, Any]) -> tuple[Any, ...]:
    return tuple(result.get(name) for name in _LOAD)


def _pairs(
    a: list[dict[str, Any]], b: list[dict[str, Any]], names: list[str]
) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """Pair runs of equal load; two single runs are a pair in any case."""
    if len(a) == len(b) == 1:
        pairs = [(a[0], b[0])]
    else:
        by_load = {_load(result): result for result in b}
        pairs = [(result, by_load[_load(result)]) for result in a if _load(result) in by_load]
    if not pairs or not any(changes(*pair) for pair in pairs):
        raise UsageError(f"{names[0]} and {names[1]} have no figure in common: different benchmarks or loads")
    return pairs


def _print(load: tuple[Any, ...], settings: Mapping[str, tuple[Any, Any]], figures: list[Change]) -> None:
    title = ", ".join(f"{name} {value}" for name, value in zip(_LOAD, load, strict=True) if value is not None)
    print(f"\n{title}" if title else "")
    for name, (a, b) in settings.items():
        print(plain(f"the setting {name} differs: {a} and {b}"))
    print(f"{'':<36} {'A':>14} {'B':>14} {'change':>9}")
    for figure in figures:
        change = "" if figure.relative is None else f"{figure.relative:+.1%}"
        print(f"{plain(figure.name):<36} {figure.a:>14,.2f} {figure.b:>14,.2f} {change:>9} {figure.word}".rstrip())


def _document(load: tuple[Any, ...], settings: Mapping[str, Any], figures: list[Change]) -> dict[str, Any]:
    return {
        "load": dict(zip(_LOAD, load, strict=True)),
        "settings_that_differ": settings,
        "figures": [{**figure._asdict(), "relative": figure.relative, "word": figure.word} for figure in figures],
    }
