"""`sempre pull`."""

from __future__ import annotations

import argparse


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of this command."""
    parser.add_argument("name", metavar="NAME", help="a name (smollm2-135m), or a hub id org/name")
    parser.add_argument("--revision", metavar="TEXT", help="branch, tag or commit of a hub id")


def run(namespace: argparse.Namespace) -> int:
    """Download the model and print its folder."""
    from sempre.engine.models.resolve import resolve_model

    # For a model that ships with the package, print its folder, too.
    print(resolve_model(namespace.name, revision=namespace.revision).path)
    return 0
