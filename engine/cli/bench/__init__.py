"""`sempre bench latency | throughput | startup`: flags and result keys as in vLLM."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from sempre.engine.cli.arguments import add_engine_flags, add_required_model_flag, engine_keywords
from sempre.engine.cli.bench.tables import offline_table
from sempre.engine.cli.parser import UsageError


class Flag(NamedTuple):
    """An integer flag and its default for each benchmark that has it."""

    defaults: dict[str, int]
    help: str


KINDS = ("latency", "throughput", "startup")
FLAGS = {
    "input_len": Flag({"latency": 32, "throughput": 1024}, "tokens of each prompt"),
    "output_len": Flag({"latency": 128, "throughput": 128}, "tokens generated for each prompt"),
    "batch_size": Flag({"latency": 8}, "prompts at once"),
    "n": Flag({"latency": 1, "throughput": 1}, "samples of each prompt"),
    "num_prompts": Flag({"throughput": 1000}, "total prompts"),
    "num_iters_warmup": Flag({"latency": 10, "startup": 1}, "warm-up runs that do not count"),
    "num_iters": Flag({"latency": 30}, "runs that count"),
    "num_iters_cold": Flag({"startup": 3}, "starts with an empty kernel cache"),
    "num_iters_warm": Flag({"startup": 3}, "starts with a filled kernel cache"),
}


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of this command."""
    parser.add_argument("kind", choices=KINDS, help="what to measure")
    add_workload_flags(parser)


def add_workload_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of every kind."""
    add_required_model_flag(parser)
    group = parser.add_argument_group("workload", "Prompts are random token ids; nothing is detokenized.")
    for name, flag in FLAGS.items():
        defaults = ", ".join(f"{kind} {value}" for kind, value in flag.defaults.items())
        group.add_argument(
            "--" + name.replace("_", "-"), type=int, metavar="N", help=f"{flag.help} (default: {defaults})"
        )
    group.add_argument("--output-json", metavar="FILE", help="also write the result to this file")
    add_engine_flags(parser)


def run(namespace: argparse.Namespace) -> int:
    """Measure, and print a table, and the result as JSON in the last line."""
    workload = _workload(namespace)
    # imports the engine, which help does not need
    from sempre.engine.cli.bench import offline

    measures: dict[str, Callable[..., dict[str, Any]]] = {
        "latency": offline.latency,
        "throughput": offline.throughput,
        "startup": offline.startup,
    }
    result = measures[namespace.kind](namespace.model, engine_keywords(namespace), **workload)
    print(offline_table(result))
    document = json.dumps(result)
    if namespace.output_json is not None:
        Path(namespace.output_json).write_text(document + "\n", encoding="utf-8")
    print(document)
    return 0


def _workload(namespace: argparse.Namespace) -> dict[str, int]:
    """The flags of this benchmark. Raises UsageError for a flag of another one, or a value below 1."""
    workload: dict[str, int] = {}
    for name, flag in FLAGS.items():
        value = getattr(namespace, name)
        written = "--" + name.replace("_", "-")
        if namespace.kind not in flag.defaults:
            if value is not None:
                raise UsageError(f"{written} belongs to {' and '.join(flag.defaults)}, not to {namespace.kind}.")
            continue
        workload[name] = flag.defaults[namespace.kind] if value is None else value
        least = 0 if name.startswith("num_iters_") else 1
        if workload[name] < least:
            raise UsageError(f"{written} must be at least {least}, got {workload[name]}.")
    return workload
