"""`sempre pull`."""

from __future__ import annotations

import argparse


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of this command."""
    parser.add_argument("name", metavar="NAME", help="a model of the catalogue, for example smollm2-135m")


def run(namespace: argparse.Namespace) -> int:
    """Download the model and print its folder."""
    from sempre.engine.checkpoints import embedded_checkpoint
    from sempre.engine.models import pull

    # For a model that ships with the package, print its folder, too.
    print(embedded_checkpoint(namespace.name) or pull(namespace.name))
    return 0
