"""Checkpoints that ship with the package, usable by name and offline: `tiny` and its draft model `tiny-draft`."""

from pathlib import Path

__all__ = ["EMBEDDED", "embedded_checkpoint"]

EMBEDDED = ("tiny", "tiny-draft")


def embedded_checkpoint(name: str) -> Path | None:
    """The folder of an embedded checkpoint; None when `name` is not one of `EMBEDDED`."""
    return Path(__file__).parent / name if name in EMBEDDED else None
