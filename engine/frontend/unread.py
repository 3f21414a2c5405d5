"""What a conversation brings for its chat template, and the template does not read."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable
from itertools import islice

from sempre.ipc.log_lines import plain

logger = logging.getLogger(__name__)

_MOST_NAMES = 16
"""of one conversation that are looked for"""
_MOST_WARNINGS = 32
_MOST_SHOWN = 60
# answered by the engine itself, where a template asks for today's date
_READ_OTHERWISE = {"date_string": "strftime_now"}


class UnreadVariables:
    """Says once of each variable that it has no effect; names come from strangers, so there is a most of warnings."""

    def __init__(self) -> None:
        self._warned: set[tuple[str, str]] = set()

    def warn(self, template: str, names: Iterable[object]) -> None:
        """Warn of those of `names` that do not occur in the template."""
        for name in map(str, islice(names, _MOST_NAMES)):
            if (template, name) in self._warned or len(self._warned) >= _MOST_WARNINGS or _is_read(template, name):
                continue
            self._warned.add((template, name))
            shown = plain(name[:_MOST_SHOWN])
            if name == "tools":
                logger.warning("the chat template does not read tools: the model is not told of those of requests")
            else:
                logger.warning("the chat template does not read the variable %s, which is without effect", shown)
            if len(self._warned) == _MOST_WARNINGS:
                logger.warning("there are no more warnings of variables that chat templates do not read")


def _is_read(template: str, name: str) -> bool:
    words = [name, *([_READ_OTHERWISE[name]] if name in _READ_OTHERWISE else [])]
    return any(re.search(rf"(?<!\w){re.escape(word)}(?!\w)", template) for word in words)
