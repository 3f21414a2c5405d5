"""How deep a JSON text is nested and how much it holds, told from its bytes before anything is made of it."""

from __future__ import annotations

import numpy as np

from sempre.engine.server.errors import APIError, BadRequest

MAX_DEPTH = 100
MAX_CONTAINERS = 50_000
"""Most objects and lists: each is an allocation, and what reads them afterwards takes its time over each."""
MAX_VALUES = 300_000
"""Most entries and members, unless a single prompt of the model's may have more token ids."""
MAX_MEMBERS = 50_000

_CHUNK = 1 << 16
_QUOTE, _COMMA, _COLON = b'",:'


def check_structure(data: bytes, max_values: int = MAX_VALUES) -> None:
    """Raise BadRequest for JSON that is nested too deeply, APIError (413) for JSON that holds too much.

    Linear, some milliseconds per megabyte; counts of a text that is no JSON mean nothing, and its parser will say so.
    """
    # no text holds more than it has brackets, commas and colons, so most need no closer look
    if data.count(b"[") + data.count(b"{") <= MAX_DEPTH and data.count(b",") < MAX_MEMBERS // 2:
        return
    if b"\\" in data:
        data = data.replace(rb"\\", b"__").replace(rb"\"", b"__")
    in_string, depth = 0, 0
    containers = values = members = 0
    for start in range(0, len(data), _CHUNK):
        chunk = np.frombuffer(data, np.uint8, min(_CHUNK, len(data) - start), start)
        outside = ((np.cumsum(chunk == _QUOTE, dtype=np.uint8) + in_string) & 1) == 0
        in_string = int(not outside[-1])
        # "[" and "{" are 0x5B and 0x7B, "]" and "}" are 0x5D and 0x7D
        bracket = chunk & 0xDF
        opens = (bracket == 0x5B) & outside
        levels = depth + np.cumsum(opens.astype(np.int8) - ((bracket == 0x5D) & outside), dtype=np.int32)
        if int(levels.max()) > MAX_DEPTH:
            raise BadRequest(f"The body is nested more than {MAX_DEPTH} levels deep.")
        depth = int(levels[-1])
        containers += int(np.count_nonzero(opens))
        values += int(np.count_nonzero((chunk == _COMMA) & outside))
        members += int(np.count_nonzero((chunk == _COLON) & outside))
        for count, most, what in (
            (containers, MAX_CONTAINERS, "objects and lists"),
            (values, max_values, "entries"),
            (members, MAX_MEMBERS, "members of objects"),
        ):
            if count > most:
                raise APIError(413, f"The body may hold at most {most} {what}.")
