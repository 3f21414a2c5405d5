"""Typed, checked reading of a GGUF file's metadata."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, NoReturn, TypeVar

from sempre.ipc.errors import ModelError
from sempre.ipc.model_files import shown

if TYPE_CHECKING:
    from gguf import GGUFReader

_Value = TypeVar("_Value", str, int, float, bool, list)  # type: ignore[type-arg]

_Item = TypeVar("_Item", str, int, float)

# Descriptions, or facts about the file that its reader has already used.
_IGNORED_PREFIXES = ("GGUF.", "general.", "quantize.", "split.")


class GgufMetadata:
    """Metadata fields by name; remembers which were read, so that `refuse_unread` can name the others.

    An unread field might change the model and would be lost silently, so it stops the loading.
    """

    def __init__(self, reader: GGUFReader, path: Path) -> None:
        self._fields = reader.fields
        self._path = path
        self._read: set[str] = set()

    def fail(self, field: str, expected: str, found: object) -> NoReturn:
        """Raise ModelError."""
        raise ModelError(f"{self._path}: GGUF field {field!r}: expected {expected}, found {shown(found)}.")

    def __contains__(self, field: str) -> bool:
        return field in self._fields

    def get(self, field: str, kind: type[_Value]) -> _Value | None:
        """Return the field's value, None when absent. Raises ModelError when it is not of `kind`."""
        if field not in self._fields:
            return None
        value = self._contents(field)
        # bool is a subclass of int, but True is not a valid count.
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            self.fail(field, kind.__name__, value)
        return value

    def require(self, field: str, kind: type[_Value]) -> _Value:
        """Return the field's value. Raises ModelError when it is absent or not of `kind`."""
        value = self.get(field, kind)
        if value is None:
            self.fail(field, kind.__name__, None)
        return value

    def count(self, field: str, most: int, *, default: int | None = None) -> int:
        """Return a whole number from 1 to `most`; `default` when absent or 0. Raises ModelError."""
        value = self.require(field, int) if default is None else self.get(field, int) or default
        if not 1 <= value <= most:
            self.fail(field, f"a number from 1 to {most}", value)
        return value

    def items(self, field: str, kind: type[_Item]) -> list[_Item]:
        """Return the field's list, whose items must be of `kind`. Raises ModelError."""
        found: list[_Item] = self.require(field, list)
        for index, item in enumerate(found):
            if type(item) is not kind:
                self.fail(f"{field}: item {index}", kind.__name__, item)
        return found

    def expect(self, field: str, expected: object, *, default: object) -> None:
        """Check that the field, `default` when absent, equals `expected`. Raises ModelError otherwise."""
        found = self._contents(field) if field in self._fields else default
        if found != expected:
            self.fail(field, repr(expected), found)

    def _contents(self, field: str) -> object:
        self._read.add(field)
        try:
            value: object = self._fields[field].contents()
        except (ValueError, IndexError) as error:
            raise ModelError(f"{self._path}: GGUF field {field!r} cannot be read: {error}") from error
        return value

    def refuse_unread(self) -> None:
        """Raise ModelError naming the fields that nobody read."""
        unread = [f for f in self._fields if f not in self._read and not f.startswith(_IGNORED_PREFIXES)]
        if unread:
            raise ModelError(
                f"{self._path}: GGUF fields {', '.join(map(repr, unread))} have no known meaning for this architecture;"
                " leaving them out could change the model's outputs, so the file is refused."
            )
