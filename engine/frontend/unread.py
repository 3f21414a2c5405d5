"""Warns about variables of a conversation that its chat template does not read."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable
from itertools import islice

from sempre.ipc.log_lines import plain

logger = logging.getLogger(__name__)

_MOST_NAMES = 16
"""maximum variables checked per conversation"""
_MOST_WARNINGS = 32
_MOST_SHOWN = 60
# used by the engine itself if a template asks for today's date
_READ_OTHERWISE = {"date_string": "strftime_now"}


class UnreadVariables:
    """Warns once per variable without effect; the number of warnings is limited, since clients choose the names."""

    def __init__(self) -> None:
        self._warned: set[tuple[str, str]] = set()

    def warn(self, template: str, names: Iterable[object]) -> None:
        """Warn about the `names` that do not occur in the template."""
        for name in map(str, islice(names, _MOST_NAMES)):
            if (template, name) in self._warned or len(self._warned) >= _MOST_WARNINGS or _is_read(template, name):
                continue
            self._warned.add((template, name))
            shown = plain(name[:_MOST_SHOWN])
            if name == "tools":
                logger.warning("the chat template does not read tools: the model does not see the tools of requests")
            else:
                logger.warning("the chat template does not read the variable %s; it has no effect", shown)
            if len(self._warned) == _MOST_WARNINGS:
                logger.warning("no more warnings about variables that chat templates do not read")


def _is_read(template: str, name: str) -> bool:
    words = [name, *([_READ_OTHERWISE[name]] if name in _READ_OTHERWISE else [])]
    return any(re.search(rf"(?<!\w){re.escape(word)}(?!\w)", template) for word in words)
