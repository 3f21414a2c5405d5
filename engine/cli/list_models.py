"""`sempre list-models`."""

from __future__ import annotations

import argparse
import json
import textwrap

from sempre.engine.checkpoints import EMBEDDED

_WIDTH = 100


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of this command."""
    parser.add_argument("--json", action="store_true", help="print a JSON object")


def run(namespace: argparse.Namespace) -> int:
    """Print what the workers' own list of architectures says."""
    from sempre.engine.executor.known_models import known_models
    from sempre.engine.models.pull import CATALOG

    found = {"names": [*EMBEDDED, *CATALOG], **known_models()}
    if namespace.json:
        print(json.dumps(found))
        return 0
    refused = found.pop("refused")
    assert isinstance(refused, dict)
    titles = {
        "names": "models by name (else a hub id, or a folder)",
        "generate": "architectures that generate, and pool if sentence-transformers' files or --runner say so",
        "pool": "architectures that only pool: embeddings, classes, scores",
    }
    for name, values in found.items():
        _print(titles[name], list(values))
    for reason, beginnings in refused.items():
        _print(f"refused, as {reason}", [f"{beginning}…" for beginning in beginnings])
    return 0


def _print(title: str, values: list[str]) -> None:
    print(f"{title}:")
    print(textwrap.fill(", ".join(values), _WIDTH, initial_indent="  ", subsequent_indent="  "))
