"""Checks every count, length and offset in a GGUF header against the bytes of the file.

The library that reads it trusts them: it loops to a count of 2**60, recurses into nested arrays, and multiplies shapes
in 64 bits.
"""

from __future__ import annotations

import math
import mmap
import struct
from pathlib import Path
from typing import NamedTuple, NoReturn

from sempre.ipc.errors import ModelError
from sempre.ipc.gguf_index import BLOCK_SIZES, BlockSize
from sempre.ipc.model_files import check_regular

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_STRING, _ARRAY = 8, 9
_SCALAR_BYTES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
_MOST_FIELDS = 4096
_MOST_TENSORS = 65_536
# in all arrays; a vocabulary of a million tokens has about three million
_MOST_ITEMS = 2**24
_MOST_DIMENSIONS = 4
# the numbers of the types in `BLOCK_SIZES`
_TYPES = {
    "F32": 0, "F16": 1, "Q4_0": 2, "Q4_1": 3, "Q5_0": 6, "Q5_1": 7, "Q8_0": 8, "Q2_K": 10, "Q3_K": 11, "Q4_K": 12,
    "Q5_K": 13, "Q6_K": 14, "IQ4_NL": 20, "IQ4_XS": 23, "BF16": 30, "MXFP4": 39,
}  # fmt: skip
_SIZES = {number: BLOCK_SIZES[name] for name, number in _TYPES.items()}
# of other types, which are refused later, by name: they store at least one bit per element
_LEAST = BlockSize(8, 1)
_MOST_NAME_BYTES = 4096


def check_gguf(path: Path) -> None:
    """Raise ModelError naming the inconsistent part."""
    size = check_regular(path)
    if size < len(_MAGIC) + 20:
        raise ModelError(f"{path} cannot be read as GGUF: it has {size} bytes.")
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        _Check(path, data, size).run()


class _Extent(NamedTuple):
    """The bytes of a tensor; the offset is from the end of the header."""

    num_bytes: int
    offset: int


class _Check:
    """One pass over the header."""

    def __init__(self, path: Path, data: mmap.mmap, size: int) -> None:
        self._path = path
        self._data = data
        self._size = size
        self._at = 0
        self._items = 0
        self._where = "the header"

    def run(self) -> None:
        if self._data[:4] != _MAGIC:
            self._fail("expected the four letters GGUF", repr(self._data[:4]))
        self._at = 4
        version = self._number("<I")
        if version not in _VERSIONS:
            self._fail(f"expected version {' or '.join(map(str, _VERSIONS))}, little-endian", str(version))
        num_tensors = self._count("tensors", _MOST_TENSORS)
        num_fields = self._count("fields", _MOST_FIELDS)
        for number in range(num_fields):
            self._where = f"field {number}"
            self._string(_MOST_NAME_BYTES)
            self._value(self._number("<I"))
        tensors = [self._tensor(number) for number in range(num_tensors)]
        for number, tensor in enumerate(tensors):
            self._where = f"tensor {number}"
            if self._at + tensor.offset + tensor.num_bytes > self._size:
                found = f"{tensor.num_bytes} bytes at {tensor.offset} after a header of {self._at}"
                self._fail(f"expected its end within {self._size} bytes", found)

    def _tensor(self, number: int) -> _Extent:
        self._where = f"tensor {number}"
        self._string(_MOST_NAME_BYTES)
        num_dimensions = self._number("<I")
        if not 1 <= num_dimensions <= _MOST_DIMENSIONS:
            self._fail(f"expected 1 to {_MOST_DIMENSIONS} dimensions", str(num_dimensions))
        sizes = [self._number("<Q") for _ in range(num_dimensions)]
        if min(sizes) == 0:
            self._fail("expected dimensions of at least 1", str(sizes))
        block = _SIZES.get(self._number("<I"), _LEAST)
        if block is not _LEAST and sizes[0] % block.elements:
            self._fail(f"expected rows of whole blocks of {block.elements}", str(sizes))
        return _Extent(math.prod(sizes) // block.elements * block.num_bytes, self._number("<Q"))

    def _value(self, kind: int) -> None:
        if kind == _STRING:
            self._string(self._size)
        elif kind == _ARRAY:
            self._array()
        elif kind in _SCALAR_BYTES:
            self._skip(_SCALAR_BYTES[kind])
        else:
            self._fail("expected a known type", str(kind))

    def _array(self) -> None:
        kind, length = self._number("<I"), self._number("<Q")
        self._items += length
        if self._items > _MOST_ITEMS:
            self._fail(f"expected at most {_MOST_ITEMS} items in all arrays", str(self._items))
        if kind == _STRING:
            for _ in range(length):
                self._string(self._size)
        elif kind in _SCALAR_BYTES:
            self._skip(length * _SCALAR_BYTES[kind])
        else:
            self._fail("expected an array of numbers or strings", f"one of type {kind}")

    def _count(self, what: str, most: int) -> int:
        found = self._number("<Q")
        if found > most:
            self._fail(f"expected at most {most} {what}", str(found))
        return found

    def _string(self, most: int) -> None:
        length = self._number("<Q")
        if length > most:
            self._fail(f"expected a text of at most {most} bytes", f"one of {length}")
        self._skip(length)

    def _number(self, form: str) -> int:
        start = self._at
        self._skip(struct.calcsize(form))
        (value,) = struct.unpack_from(form, self._data, start)
        return int(value)

    def _skip(self, num_bytes: int) -> None:
        if self._at + num_bytes > self._size:
            self._fail(f"expected {num_bytes} bytes at {self._at}", f"the end of the file at {self._size}")
        self._at += num_bytes

    def _fail(self, expected: str, found: str) -> NoReturn:
        raise ModelError(f"{self._path} cannot be read as GGUF: {self._where}: {expected}, found {found}.")
