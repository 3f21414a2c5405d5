"""Arguments of vLLM with nothing behind them here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from sempre.ipc.errors import RequestError


def refuse_values(**arguments: object) -> None:
    """Raise RequestError naming the first argument that asks for something: None and what is empty asks for nothing."""
    for name, value in arguments.items():
        asked = value
        if isinstance(value, Sequence) and not isinstance(value, str):
            asked = any(item is not None for item in value)
        if asked is None or asked is False or (isinstance(asked, Mapping) and not asked):
            continue
        raise RequestError(f"{name} is not supported by this engine. Leave it out.", parameter=name, value=value)
