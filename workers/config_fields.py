"""Typed reading of a JSON configuration: each error names the file, the field, what was expected and what was found."""

from __future__ import annotations

from typing import NoReturn

from sempre.ipc.errors import ModelError
from sempre.ipc.model_files import shown

_MOST = 2**31 - 1
_MOST_NUMBER = 1e30


class ConfigFields:
    """The fields of one JSON object; a field that is null counts as absent."""

    def __init__(self, raw: dict[str, object], source: str = "config.json") -> None:
        self.raw = raw
        self.source = source

    def fail(self, name: str, expected: str, found: object) -> NoReturn:
        raise ModelError(f"{self.source}: {name}: expected {expected}, found {shown(found)}.")

    def one_of(self, name: str, *allowed: object, note: str = "") -> None:
        """Raise ModelError unless the field, None when absent, is one of these values, and of its type."""
        value = self.raw.get(name)
        if not any(type(value) is type(choice) and value == choice for choice in allowed):
            choices = " or ".join("nothing" if choice is None else repr(choice) for choice in allowed)
            self.fail(name, choices + note, value)

    def natural(self, name: str, default: int | None = None) -> int:
        return self._integer(name, default, minimum=0, most=_MOST)

    def positive(self, name: str, default: int | None = None, most: int = _MOST) -> int:
        return self._integer(name, default, minimum=1, most=most)

    def positive_number(self, name: str, default: float | None = None) -> float:
        value = self._get(name, default)
        # bool is an int in Python, never in a configuration
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= _MOST_NUMBER:
            self.fail(name, "a finite number greater than 0", value)
        return float(value)

    def boolean(self, name: str, default: bool) -> bool:
        value = self._get(name, default)
        if not isinstance(value, bool):
            self.fail(name, "true or false", value)
        return value

    def section(self, name: str) -> ConfigFields:
        """The object under `name`, empty when absent."""
        value = self._get(name, {})
        if not isinstance(value, dict):
            self.fail(name, "an object", value)
        return ConfigFields(value, f"{self.source}: {name}")

    def _integer(self, name: str, default: int | None, minimum: int, most: int) -> int:
        value = self._get(name, default)
        if type(value) is not int or value < minimum:
            self.fail(name, f"an integer of at least {minimum}", value)
        if value > most:
            self.fail(name, f"an integer of at most {most}", value)
        return value

    def _get(self, name: str, default: object) -> object:
        value = self.raw.get(name)
        if value is not None:
            return value
        if default is None:
            self.fail(name, "a value", "nothing")
        return default
