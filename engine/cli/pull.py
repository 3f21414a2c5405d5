"""`sempre pull`."""

from __future__ import annotations

import argparse


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of this command."""
    parser.add_argument("name", metavar="NAME", help="a model of the catalogue, for example smollm2-135m")


def run(namespace: argparse.Namespace) -> int:
    """Fetch the model and print its folder."""
    from sempre.engine.models import pull

    print(pull(namespace.name))
    return 0
