"""What the workers can load."""

from __future__ import annotations


def known_models() -> dict[str, list[str] | dict[str, list[str]]]:
    """Return the architectures that generate and those that pool, and beginnings of refused names by the reason."""
    from sempre.workers.models.registry import known_models as known

    return known()._asdict()
