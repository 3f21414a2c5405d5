"""`sempre rm`: deletes models that were downloaded."""

from __future__ import annotations

import argparse

from sempre.engine.cli.parser import UsageError


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of this command."""
    parser.add_argument("names", nargs="*", metavar="MODEL", help="models of the catalogue or the hub")


def run(namespace: argparse.Namespace) -> int:
    """Delete each model, and say how much room that makes."""
    if not namespace.names:
        raise UsageError("no model given; `sempre list` shows those on this machine")
    from sempre.engine.cli.list import megabytes
    from sempre.engine.models.stored import remove_model, stored_model

    for name in namespace.names:
        stored_model(name)  # all names are right, or nothing is deleted
    for name in namespace.names:
        print(f"{name}: {megabytes(remove_model(name))} removed")
    return 0
