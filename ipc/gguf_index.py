"""Which bytes of which GGUF file each tensor of a checkpoint is: a file that the engine writes and workers read.

A GGUF file has its own names of tensors, and stores some in another order than checkpoints of transformers.
"""

from __future__ import annotations

import math
from enum import Enum
from pathlib import Path

import msgspec

from sempre.ipc.errors import ModelError
from sempre.ipc.model_files import read_bytes

GGUF_INDEX_FILE = "model.gguf.index.json"


class BlockSize(msgspec.Struct, frozen=True):
    """Rows of a type are made of blocks of this many elements and bytes."""

    elements: int
    num_bytes: int


BLOCK_SIZES = {
    "F32": BlockSize(1, 4),
    "F16": BlockSize(1, 2),
    "BF16": BlockSize(1, 2),
    "Q4_0": BlockSize(32, 18),
    "Q4_1": BlockSize(32, 20),
    "Q5_0": BlockSize(32, 22),
    "Q5_1": BlockSize(32, 24),
    "Q8_0": BlockSize(32, 34),
    "Q2_K": BlockSize(256, 84),
    "Q3_K": BlockSize(256, 110),
    "Q4_K": BlockSize(256, 144),
    "Q5_K": BlockSize(256, 176),
    "Q6_K": BlockSize(256, 210),
    "IQ4_NL": BlockSize(32, 18),
    "IQ4_XS": BlockSize(256, 136),
    "MXFP4": BlockSize(32, 17),
}
"""The supported types, by GGUF's names."""


class Form(Enum):
    """What makes a tensor of transformers from what is stored."""

    PLAIN = "plain"
    HEADS = "heads"
    """rows of each head take turns between its halves; `number` heads"""
    OFFSET = "offset"
    """one is added to each value"""
    EXPERT = "expert"
    """one of a stack [E, …]: the `number`-th"""
    TURNS = "turns"
    """two stacks [E, N, K] or [E, N], whose rows shall take turns; K comes first"""
    TRANSPOSED = "transposed"
    """a stack [E, N, K] of which K shall come first"""


class StoredTensor(msgspec.Struct, frozen=True):
    """A tensor in a file."""

    name: str
    """GGUF's"""
    file: int
    """index in `GgufIndex.files`"""
    offset: int
    """of its first byte in the file"""
    type: str
    """a key of `BLOCK_SIZES`"""
    shape: tuple[int, ...]
    """rows last"""

    @property
    def nbytes(self) -> int:
        """Raises KeyError for an unknown type."""
        block = BLOCK_SIZES[self.type]
        return math.prod(self.shape) // block.elements * block.num_bytes


class IndexEntry(msgspec.Struct, frozen=True):
    """One tensor of transformers."""

    sources: tuple[StoredTensor, ...]
    form: Form = Form.PLAIN
    number: int = 0


class GgufFile(msgspec.Struct, frozen=True):
    """A file as it was when the index was written."""

    path: str
    """relative to the index, or absolute"""
    nbytes: int


class GgufIndex(msgspec.Struct, frozen=True):
    """The tensors of a checkpoint, by transformers' names."""

    files: tuple[GgufFile, ...]
    tensors: dict[str, IndexEntry]


def read_gguf_index(folder: Path) -> GgufIndex:
    """Read the index of a folder. Raises ModelError naming the entry that does not fit."""
    path = folder / GGUF_INDEX_FILE
    try:
        index = msgspec.json.decode(read_bytes(path), type=GgufIndex)
    except msgspec.DecodeError as error:
        raise ModelError(f"{path}: expected the index of a GGUF checkpoint: {error}") from error
    for name, entry in index.tensors.items():
        for stored in entry.sources:
            known = stored.type in BLOCK_SIZES and 0 <= stored.file < len(index.files) and stored.shape
            if not known or min(stored.shape) < 1 or stored.shape[-1] % BLOCK_SIZES[stored.type].elements:
                raise ModelError(f"{path}: {name}: expected whole blocks of a known type and file, found {stored}.")
            end, size = stored.offset + stored.nbytes, index.files[stored.file].nbytes
            if stored.offset < 0 or end > size:
                raise ModelError(f"{path}: {name}: expected its end within {size} bytes, found {end}.")
    return index


def write_gguf_index(folder: Path, index: GgufIndex) -> None:
    """Write the index of a folder."""
    (folder / GGUF_INDEX_FILE).write_bytes(msgspec.json.encode(index))
