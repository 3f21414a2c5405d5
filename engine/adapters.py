"""Low-rank adapters on the user's side: which one a request asks for, and which the workers have accepted.

An adapter is identified by the digest of its files. The name and the number that a user gives it are for the user: the
same files under two names give the same bits, and files that have changed are another adapter.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from sempre.engine.parameter_checks import integer, shown
from sempre.ipc.adapter_files import CONFIG_FILE, WEIGHTS_FILE, adapter_digest
from sempre.ipc.errors import ModelError, RequestError
from sempre.ipc.messages import AdapterSpec

_MOST_ID = 2**63 - 1


@dataclass(frozen=True)
class LoRARequest:
    """The adapter of a request: a name and a number of the user's choice, and the folder that PEFT saved.

    Raises RequestError (a ValueError) that names the field.
    """

    lora_name: str
    lora_int_id: int
    lora_path: str = ""
    base_model_name: str | None = None
    """For information."""
    tensorizer_config_dict: dict[str, Any] | None = None
    """Must be None."""
    load_inplace: bool = False
    """Whether another adapter may have had this number before."""

    def __post_init__(self) -> None:
        for field in ("lora_name", "lora_path"):
            value = getattr(self, field)
            if not isinstance(value, str) or not value:
                raise _refused(field, f"must be a non-empty string, got {shown(value)}.", value)
        if not 1 <= integer("lora_int_id", self.lora_int_id) <= _MOST_ID:
            raise _refused("lora_int_id", f"must be at least 1, got {shown(self.lora_int_id)}.", self.lora_int_id)
        if self.tensorizer_config_dict is not None:
            raise _refused("tensorizer_config_dict", "is not supported; adapters are safetensors.", "a value")

    @property
    def name(self) -> str:
        """The user's name for it."""
        return self.lora_name

    @property
    def adapter_id(self) -> int:
        """The user's number for it."""
        return self.lora_int_id

    @property
    def path(self) -> str:
        """Its folder."""
        return self.lora_path


class Adapter(NamedTuple):
    """An adapter that was asked for, and what identifies it."""

    request: LoRARequest
    spec: AdapterSpec


Requested = LoRARequest | Sequence[LoRARequest | None] | None
"""One adapter for all prompts of a call, or one each; None: the model itself."""


class Adapters:
    """The adapters of one engine. Files are read again only when their sizes or times have changed."""

    def __init__(self, *, are_served: bool) -> None:
        self._are_served = are_served
        self._digests: dict[str, tuple[object, str]] = {}
        self._accepted: dict[str, AdapterSpec] = {}
        self._by_id: dict[int, Adapter] = {}

    def find(self, requested: Requested) -> list[Adapter | None]:
        """Return the adapters that a call asks for: one for all prompts, or one each.

        Raises RequestError for anything else, for a number that another adapter has, where none are served, and for a
        folder without the files.
        """
        return [None if item is None else self._adapter(item) for item in _items(requested)]

    def loaded(self, requested: Requested) -> list[Adapter | None]:
        """The same, of adapters that the workers have accepted; their files are not looked at. Raises RequestError."""
        found: list[Adapter | None] = []
        for item in _items(requested):
            known = None if item is None else self._by_id.get(item.lora_int_id)
            if item is not None and (known is None or known.request != item):
                text = f"{item.lora_name!r} is not loaded: call add_lora first."
                raise _refused("lora_request", text, item.lora_path)
            found.append(known)
        return found

    def unknown(self, adapters: Sequence[Adapter | None]) -> list[Adapter]:
        """Return those that the workers have not accepted yet, each once."""
        found = {adapter.spec.digest: adapter for adapter in adapters if adapter is not None}
        return [adapter for digest, adapter in found.items() if digest not in self._accepted]

    def accept(self, adapters: Sequence[Adapter | None]) -> None:
        """The workers have loaded these."""
        for adapter in adapters:
            if adapter is not None:
                self._accepted[adapter.spec.digest] = adapter.spec
                self._by_id[adapter.request.lora_int_id] = adapter

    def remove(self, lora_id: int) -> AdapterSpec | None:
        """Forget the adapter of a number; return what the workers should forget, if no other number has it."""
        removed = self._by_id.pop(lora_id, None)
        if removed is None:
            return None
        digest = removed.spec.digest
        if any(other.spec.digest == digest for other in self._by_id.values()):
            return None
        del self._accepted[digest]
        return removed.spec

    @property
    def ids(self) -> set[int]:
        """The numbers of the accepted adapters."""
        return set(self._by_id)

    def _adapter(self, request: LoRARequest) -> Adapter:
        if not self._are_served:
            text = f"{request.lora_name!r} needs an engine with enable_lora=True."
            raise _refused("lora_request", text, request.lora_path)
        known = self._by_id.get(request.lora_int_id)
        is_same = known is None or (known.request.lora_name, known.request.lora_path) == (
            request.lora_name,
            request.lora_path,
        )
        if known is not None and not is_same and not request.load_inplace:
            text = (
                f"{request.lora_int_id} is the number of the adapter {known.request.lora_name!r} at "
                f"{known.request.lora_path}; choose another for {request.lora_name!r}, or set load_inplace."
            )
            raise _refused("lora_int_id", text, request.lora_int_id)
        folder = Path(request.lora_path).expanduser().absolute()
        try:
            digest = self._digest(folder)
        except ModelError as error:
            raise _refused("lora_request", f"{request.lora_name!r}: {error}", request.lora_path) from error
        return Adapter(request, AdapterSpec(name=request.lora_name, path=str(folder), digest=digest))

    def _digest(self, folder: Path) -> str:
        state = tuple(_file_state(folder / name) for name in (CONFIG_FILE, WEIGHTS_FILE))
        known = self._digests.get(str(folder))
        if known is None or known[0] != state:
            known = self._digests[str(folder)] = (state, adapter_digest(folder))
        return known[1]


def _items(requested: Requested) -> Sequence[LoRARequest | None]:
    items = [requested] if requested is None or isinstance(requested, LoRARequest) else requested
    if (
        not isinstance(items, Sequence)
        or isinstance(items, str)
        or not all(item is None or isinstance(item, LoRARequest) for item in items)
    ):
        text = f"must be a LoRARequest, or a list with one or None per prompt, got {shown(requested)}."
        raise _refused("lora_request", text, requested)
    return items


def _file_state(path: Path) -> object:
    """Changes when the file does."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_ino, found.st_size, found.st_mtime_ns


def _refused(parameter: str, text: str, value: object) -> RequestError:
    return RequestError(f"{parameter} {text}", parameter=parameter, value=value)
