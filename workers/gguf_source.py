"""Tensors of GGUF files, memory-mapped, by the names and in the order that models read them (`ipc.gguf_index`)."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Sequence, Set
from contextlib import contextmanager
from pathlib import Path

import torch

from sempre.ipc.errors import ModelError, TensorMismatch
from sempre.ipc.gguf_index import BLOCK_SIZES, Form, GgufIndex, IndexEntry, StoredTensor, read_gguf_index
from sempre.ipc.model_files import check_regular
from sempre.workers.quantization.gguf_blocks import (
    CODES,
    MINIMA,
    SCALES,
    UNPACK,
    Blocks,
    dequantize,
    integer_forms,
)
from sempre.workers.tensor_source import FLOAT_NAMES, mismatch


class GgufSource:
    """Block formats are dequantised to float32, or shown as integers with their scales."""

    def __init__(self, index: GgufIndex, files: Sequence[torch.Tensor], integers: Set[str] = frozenset()) -> None:
        """`files` uint8 [bytes]; `integers`: modules whose blocks are shown as integers."""
        self._tensors = index.tensors
        self._files = files
        self._parts: dict[str, str] = {}
        """tensors that are parts of blocks → the matrix"""
        forms = integer_forms(index)
        for module in sorted(integers):
            for suffix in (CODES, SCALES, *((MINIMA,) if forms[module].has_minimum else ())):
                self._parts[module + suffix] = module + ".weight"
        self._forms = {module + ".weight": forms[module] for module in integers}
        self._last: tuple[str, Blocks] | None = None

    def names(self) -> list[str]:
        return [*(name for name in self._tensors if name not in self._forms), *self._parts]

    def shape(self, name: str) -> tuple[int, ...]:
        if name in self._parts:
            rows, width = self.shape(self._parts[name])
            return (rows, width if name.endswith(CODES) else width // self._forms[self._parts[name]].group)
        entry = self._tensors[name]
        shape = entry.sources[0].shape
        match entry.form:
            case Form.EXPERT:
                return shape[1:]
            case Form.TRANSPOSED:
                return (shape[0], *reversed(shape[1:]))
            case Form.TURNS:
                return (shape[0], *reversed((sum(source.shape[1] for source in entry.sources), *shape[2:])))
            case _:
                return shape

    def dtype_name(self, name: str) -> str:
        if name in self._parts:
            return "I8" if name.endswith(CODES) else "F32"
        kinds = {source.type for source in self._tensors[name].sources}
        return kinds.pop() if len(kinds) == 1 and kinds <= FLOAT_NAMES.keys() else "F32"

    def read(self, name: str) -> torch.Tensor:
        if name in self._parts:
            return self._read_part(name)
        entry = self._tensors[name]
        try:
            values = self._values(entry)
        except (IndexError, RuntimeError) as error:
            raise mismatch(name, f"what form {entry.form.value!r} needs", f"{entry.sources}: {error}") from error
        if any(source.type in UNPACK for source in entry.sources) and not bool(values.isfinite().all()):
            stored = ", ".join(f"{source.name} ({source.type})" for source in entry.sources)
            raise mismatch(name, f"finite values in {stored}", f"{int((~values.isfinite()).sum())} that are not")
        return values

    def digest(self, name: str, tensor: torch.Tensor) -> bytes:
        """Over what is stored, which determines the tensor."""
        entry = self._tensors[self._parts.get(name, name)]
        digest = hashlib.sha256(f"{name} {entry.form.value} {entry.number}".encode())
        for source in entry.sources:
            digest.update(f" {source.type} {source.shape}".encode())
            digest.update(self._raw(entry, source).numpy().data)
        return digest.digest()

    def _read_part(self, name: str) -> torch.Tensor:
        """The codes, scales or minima of a matrix's blocks."""
        matrix = self._parts[name]
        if self._last is None or self._last[0] != matrix:
            entry = self._tensors[matrix]
            (source,) = entry.sources
            block = BLOCK_SIZES[source.type]
            raw = self._ordered(entry, source)
            blocks = UNPACK[source.type](raw.reshape(-1, block.num_bytes))
            self._last = matrix, blocks.of_rows(raw.shape[0])
        blocks = self._last[1]
        if name.endswith(CODES):
            return blocks.codes
        values = blocks.scale if name.endswith(SCALES) else blocks.minimum
        assert values is not None
        if not bool(values.isfinite().all()):
            raise mismatch(name, "finite numbers in the file", f"{int((~values.isfinite()).sum())} that are not")
        return values

    def _values(self, entry: IndexEntry) -> torch.Tensor:
        first, *others = (self._floats(entry, source) for source in entry.sources)
        match entry.form:
            case Form.OFFSET:
                return first.float() - 1
            case Form.TRANSPOSED:
                return first.transpose(1, 2)
            case Form.TURNS:
                both = torch.stack([first, *others], dim=2).flatten(1, 2)
                return both.transpose(1, 2) if both.dim() > 2 else both
            case _:
                return first

    def _raw(self, entry: IndexEntry, source: StoredTensor) -> torch.Tensor:
        """The bytes that this entry reads [rows, bytes of a row]."""
        rows = math.prod(source.shape[:-1])
        whole = self._files[source.file][source.offset : source.offset + source.nbytes].view(rows, -1)
        if entry.form is Form.EXPERT:
            return whole.view(source.shape[0], -1)[entry.number].view(source.shape[1], -1)
        return whole

    def _ordered(self, entry: IndexEntry, source: StoredTensor) -> torch.Tensor:
        """The same, in the order of the model."""
        raw = self._raw(entry, source)
        if entry.form is not Form.HEADS:
            return raw
        # rows are made of whole blocks, so that they are put in order while quantised
        per_item = raw.view(source.shape[0], -1)
        return per_item[rows_of_heads(source.shape[0], entry.number)].view(raw.shape)

    def _floats(self, entry: IndexEntry, source: StoredTensor) -> torch.Tensor:
        raw = self._ordered(entry, source)
        shape = source.shape[1:] if entry.form is Form.EXPERT else source.shape
        if source.type in UNPACK:
            return dequantize(source.type, raw).view(shape)
        # a copy: offsets in the file need not be multiples of an element's size
        return raw.clone().view(-1).view(FLOAT_NAMES[source.type]).view(shape)


def rows_of_heads(num_rows: int, num_heads: int) -> torch.Tensor:
    """For each row of a model the row that holds it where the halves of a head take turns:

    stored row 2i + h of a head  =  row i + h * D/2        h in {0, 1}
    """
    rows = torch.arange(num_rows, dtype=torch.int64, device="cpu")
    return rows.view(num_heads, -1, 2).transpose(1, 2).reshape(-1)


@contextmanager
def open_gguf(folder: Path, integers: Set[str] = frozenset()) -> Iterator[GgufSource]:
    """Open the files that the folder's index names; `integers` as of GgufSource. Raises ModelError for a file that has
    changed since."""
    index = read_gguf_index(folder)
    paths = [folder / file.path for file in index.files]
    for path, file in zip(paths, index.files, strict=True):
        size = check_regular(path)
        if size != file.nbytes:
            raise ModelError(f"{path}: expected {file.nbytes} bytes, as when it was opened first, found {size}.")
    files = [
        torch.from_file(str(path), shared=False, size=file.nbytes, dtype=torch.uint8, device="cpu")
        for path, file in zip(paths, index.files, strict=True)
    ]
    try:
        yield GgufSource(index, files, integers)
    except TensorMismatch as error:
        named = f"{', '.join(map(str, paths))}: {error}"
        raise TensorMismatch(named, tensor=error.tensor, expected=error.expected, found=error.found) from error
