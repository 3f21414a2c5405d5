"""Typed, checked reading of a GGUF file's metadata."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeVar

from sempre.ipc.errors import ModelError

if TYPE_CHECKING:
    from gguf import GGUFReader

_Value = TypeVar("_Value", str, int, float, bool, list)  # type: ignore[type-arg]

# Descriptions, or facts about the file itself that its reader has already used.
_IGNORED_PREFIXES = ("GGUF.", "general.", "quantize.")


class GGUFMetadata:
    """Metadata fields by name; remembers which were read, so that `refuse_unread` can name the others.

    A field that nobody reads would change the model and be lost in silence, therefore it stops the conversion.
    """

    def __init__(self, reader: GGUFReader) -> None:
        self._fields = reader.fields
        self._read: set[str] = set()

    def get(self, field: str, kind: type[_Value]) -> _Value | None:
        """Return the field's value, None when absent. Raises ModelError when it is not of `kind`."""
        if field not in self._fields:
            return None
        self._read.add(field)
        value = self._fields[field].contents()
        # bool is a subclass of int: True where a count belongs is an error all the same.
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            raise ModelError(
                f"GGUF field {field!r}: expected {kind.__name__}, found {type(value).__name__} {str(value)[:80]!r}."
            )
        return value

    def require(self, field: str, kind: type[_Value]) -> _Value:
        """Return the field's value. Raises ModelError when it is absent or not of `kind`."""
        value = self.get(field, kind)
        if value is None:
            raise ModelError(f"GGUF field {field!r} is missing; expected {kind.__name__}.")
        return value

    def expect(self, field: str, expected: object, *, default: object) -> None:
        """Check that the field, `default` when absent, equals `expected`. Raises ModelError otherwise."""
        self._read.add(field)
        found = self._fields[field].contents() if field in self._fields else default
        if found != expected:
            raise ModelError(f"GGUF field {field!r}: only {expected!r} can be converted, found {found!r}.")

    def refuse_unread(self) -> None:
        """Raise ModelError naming the fields that the conversion did not use."""
        unread = [f for f in self._fields if f not in self._read and not f.startswith(_IGNORED_PREFIXES)]
        if unread:
            raise ModelError(
                f"GGUF fields {', '.join(map(repr, unread))} have no known meaning for a llama-architecture model; "
                "dropping them could change its outputs, so the file is not converted."
            )
