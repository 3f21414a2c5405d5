"""A GGUF checkpoint: one file, or the shards that it is split into."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from sempre.engine.models.gguf_check import check_gguf
from sempre.engine.models.gguf_metadata import GgufMetadata
from sempre.ipc.errors import ModelError, TensorMismatch
from sempre.ipc.gguf_index import BLOCK_SIZES, StoredTensor
from sempre.ipc.model_files import check_regular

if TYPE_CHECKING:
    from gguf import GGUFReader

_SHARD = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.gguf")
_MOST_SHARDS = 1000


@dataclass(frozen=True)
class GgufFile:
    """What the headers of a checkpoint say."""

    path: Path
    """of the first file"""
    shards: tuple[Path, ...]
    architecture: str
    metadata: GgufMetadata
    tensors: dict[str, StoredTensor]
    """by GGUF's name"""

    def raw(self, name: str) -> bytes:
        """The bytes of a small tensor."""
        stored = self.tensors[name]
        with open(self.shards[stored.file], "rb") as file:
            file.seek(stored.offset)
            return file.read(stored.nbytes)


def shards_of(path: Path) -> tuple[Path, ...]:
    """All files of the checkpoint that `path` belongs to, in order. Raises ModelError for a missing one."""
    named = _SHARD.fullmatch(path.name)
    if named is None:
        check_regular(path)
        return (path,)
    count = int(named[3])
    if not 1 <= count <= _MOST_SHARDS:
        raise ModelError(f"{path}: expected a name that says 1 to {_MOST_SHARDS} shards, found {count}.")
    shards = tuple(path.with_name(f"{named[1]}-{number:05}-of-{count:05}.gguf") for number in range(1, count + 1))
    for shard in shards:
        check_regular(shard)
    return shards


def open_gguf(path: Path) -> GgufFile:
    """Read the headers of a checkpoint.

    Raises ModelError (TensorMismatch for a tensor) naming the file and what does not fit.
    """
    shards = shards_of(path)
    tensors: dict[str, StoredTensor] = {}
    metadata = None
    for number, shard in enumerate(shards):
        reader = _read(shard)
        own = GgufMetadata(reader, shard)
        if len(shards) > 1 or number:
            own.expect("split.no", number, default=None)
            own.expect("split.count", len(shards), default=None)
        else:
            own.expect("split.count", 1, default=1)
        metadata = metadata or own
        for stored in _tensors(reader, shard, number):
            if stored.name in tensors:
                raise mismatch(shard, stored.name, "one tensor of this name", "a second one")
            tensors[stored.name] = stored
    assert metadata is not None
    count = metadata.get("split.tensors.count", int)
    if count not in (None, len(tensors)):
        metadata.fail("split.tensors.count", f"{len(tensors)}, as the shards hold", count)
    architecture = metadata.require("general.architecture", str)
    return GgufFile(shards[0], shards, architecture, metadata, tensors)


def _read(path: Path) -> GGUFReader:
    from gguf import GGUFReader

    check_gguf(path)
    # left to the reader: duplicate names, invalid UTF-8
    try:
        return GGUFReader(path)
    except (ValueError, OSError, IndexError, KeyError) as error:
        raise ModelError(f"{path} cannot be read as GGUF: {error}") from error


def _tensors(reader: GGUFReader, path: Path, number: int) -> list[StoredTensor]:
    found = []
    for tensor in reader.tensors:
        # GGUF lists dimensions fastest first, the reverse of numpy and torch
        shape = tuple(int(size) for size in reversed(tensor.shape))
        kind = tensor.tensor_type.name
        if kind not in BLOCK_SIZES:
            raise mismatch(path, tensor.name, f"a type of {', '.join(BLOCK_SIZES)}", kind)
        found.append(StoredTensor(tensor.name, number, int(tensor.data_offset), kind, shape))
    return found


def mismatch(path: Path, tensor: str, expected: str, found: str) -> TensorMismatch:
    """The error for one tensor, to be raised."""
    message = f"{path}: GGUF tensor {tensor!r}: expected {expected}, found {found}."
    return TensorMismatch(message, tensor=tensor, expected=expected, found=found)
