"""Text that may be the beginning of a tag."""

from __future__ import annotations


def split_before_tag(text: str, tag: str) -> tuple[str, str]:
    """(certain, undecided): `text`, which does not hold `tag`, cut where more text could make it one."""
    for size in range(min(len(tag) - 1, len(text)), 0, -1):
        if text.endswith(tag[:size]):
            return text[:-size], text[-size:]
    return text, ""
