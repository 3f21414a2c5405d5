"""The results of every module of an engine for one sequence, and the first in which two engines differ.

The engines may have other layouts: a rank that has a part of a layer has a part of its results, which are left out, as
are those of modules that only one of the layouts has. What all ranks of a stage have whole (sums, norms, the residual
stream, logits) is compared.
"""

from __future__ import annotations

import struct
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from sempre.ipc.errors import ConfigError

_DIGEST_BYTES = 8
_FORMATS = {"float32": ("f", "I"), "float16": ("e", "H"), "int32": ("i", "I")}

CallWorkers = Callable[[str, list[Any]], Sequence[Any]]
"""Call a method of every worker with these arguments; the results in rank order."""


class TracedOperation(NamedTuple):
    """A result of one module, as a worker reports it."""

    path: str
    operation: str
    dtype: str
    width: int
    """elements per row"""
    digests: bytes
    """8 bytes per row"""
    rank: int = 0
    """the worker that reports it"""
    place: int = 0
    """among that worker's results"""

    @property
    def name(self) -> str:
        """Module, class and method."""
        return f"{self.path} ({self.operation}, {self.dtype})"


@dataclass(frozen=True)
class OperationDifference:
    """The first result that differs, in the order of computing."""

    path: str
    operation: str
    row: int
    """of the sequence, from 0: the first that differs"""
    num_rows: int
    """rows that differ"""
    element: int
    num_elements: int
    """elements of the row that differ"""
    width: int
    a: float
    b: float
    a_bits: str
    b_bits: str
    ulps: int

    def sentence(self) -> str:
        """Return it in one sentence."""
        values = f"{self.a!r} ({self.a_bits}) against {self.b!r} ({self.b_bits}), {self.ulps} ulp apart"
        share = f"{self.num_elements} of {self.width} elements of the row and {self.num_rows} rows differ"
        return f"{self.path} ({self.operation}), row {self.row}: element {self.element} is {values}; {share}"


class OperationComparison(NamedTuple):
    """What a comparison of all results found."""

    difference: OperationDifference | None
    num_operations: int
    """results that were compared, up to the first that differs"""


@dataclass(frozen=True)
class Tracer:
    """An engine whose workers tell the results of their modules."""

    call: CallWorkers
    tensor_parallel_size: int = 1
    pipeline_parallel_size: int = 1

    @property
    def layout(self) -> tuple[int, int]:
        """Two engines of the same layout have the same results."""
        return self.tensor_parallel_size, self.pipeline_parallel_size

    def trace(self, token_ids: Sequence[int]) -> list[TracedOperation]:
        """Return the results for a sequence, of the first rank of each stage, in the order of computing."""
        results = self.call("trace_modules", [list(token_ids)])
        first_ranks = range(0, self.tensor_parallel_size * self.pipeline_parallel_size, self.tensor_parallel_size)
        return [
            TracedOperation(path, operation, dtype, width, digests, rank, place)
            for rank in first_ranks
            for place, (path, operation, dtype, width, digests) in enumerate(results[rank])
        ]

    def row(self, operation: TracedOperation, token_ids: Sequence[int], row: int) -> bytes:
        """Return the values of one row of one of these results."""
        results = self.call("traced_row", [list(token_ids), operation.rank, operation.place, row])
        found = results[operation.rank]
        assert isinstance(found, bytes)
        return found


def compare_operations(a: Tracer, b: Tracer, token_ids: Sequence[int]) -> OperationComparison:
    """Compare the results of all modules that both engines have. Raises ConfigError for models of different trees."""
    traces = [engine.trace(token_ids) for engine in (a, b)]
    pairs = same_results(*traces) if a.layout == b.layout else shared_results(*traces)
    place = first_different(pairs)
    if place is None:
        return OperationComparison(None, len(pairs))
    index, rows = place
    one, other = pairs[index]
    values = a.row(one, token_ids, rows[0]), b.row(other, token_ids, rows[0])
    return OperationComparison(_operation(one, rows, *values), index + 1)


def same_results(
    a: Sequence[TracedOperation], b: Sequence[TracedOperation]
) -> list[tuple[TracedOperation, TracedOperation]]:
    """Return the pairs of two traces of one layout. Raises ConfigError for models of different trees."""
    for one, other in zip(a, b, strict=False):
        if one[:4] != other[:4]:
            raise ConfigError(
                f"the models compute different things: {one.name} against {other.name}. Give two settings or"
                " checkpoints of one architecture and dtype."
            )
    if len(a) != len(b):
        raise ConfigError(f"the models have {len(a)} and {len(b)} results; give two of one architecture.")
    return list(zip(a, b, strict=True))


def shared_results(
    a: Sequence[TracedOperation], b: Sequence[TracedOperation]
) -> list[tuple[TracedOperation, TracedOperation]]:
    """Return the pairs of results that both layouts have whole. Raises ConfigError for models of different trees."""
    others = dict(_numbered(b))
    found = [(one, others[key]) for key, one in _numbered(a) if key in others]
    pairs = [(one, other) for one, other in found if one.width == other.width]
    last = a[-1] if a else None
    if last is None or not pairs or pairs[-1][0] != last:
        raise ConfigError("the models have no logits in common. Give two settings of one model.")
    for one, other in pairs:
        if one.dtype != other.dtype:
            raise ConfigError(
                f"the models compute different things: {one.name} against {other.name}. Give one dtype to both."
            )
    return pairs


def _numbered(trace: Sequence[TracedOperation]) -> list[tuple[tuple[str, str, int], TracedOperation]]:
    """Each result with a key: the module and method, and which of their results it is."""
    seen: Counter[tuple[str, str]] = Counter()
    numbered = []
    for found in trace:
        place = found.path, found.operation
        seen[place] += 1
        numbered.append(((*place, seen[place]), found))
    return numbered


def first_different(pairs: Sequence[tuple[TracedOperation, TracedOperation]]) -> tuple[int, list[int]] | None:
    """Return the index of the first pair that differs, and its rows; None if all are equal."""
    for index, (one, other) in enumerate(pairs):
        if one.digests != other.digests:
            rows = range(len(one.digests) // _DIGEST_BYTES)
            return index, [row for row in rows if _digest(one, row) != _digest(other, row)]
    return None


def _digest(operation: TracedOperation, row: int) -> bytes:
    return operation.digests[row * _DIGEST_BYTES : (row + 1) * _DIGEST_BYTES]


def _operation(traced: TracedOperation, rows: list[int], a: bytes, b: bytes) -> OperationDifference:
    size = 4 if traced.dtype in ("float32", "int32") else 2
    words = [[int.from_bytes(data[i : i + size], "little") for i in range(0, len(data), size)] for data in (a, b)]
    different = [i for i, (one, other) in enumerate(zip(*words, strict=True)) if one != other]
    element = different[0]
    bits = [words[0][element], words[1][element]]
    first, second = (_number(each, traced.dtype) for each in bits)
    return OperationDifference(
        path=traced.path,
        operation=traced.operation,
        row=rows[0],
        num_rows=len(rows),
        element=element,
        num_elements=len(different),
        width=len(words[0]),
        a=first,
        b=second,
        a_bits=f"0x{bits[0]:0{2 * size}x}",
        b_bits=f"0x{bits[1]:0{2 * size}x}",
        ulps=abs(_ordered(bits[0], size) - _ordered(bits[1], size)),
    )


def _number(bits: int, dtype: str) -> float:
    if dtype == "bfloat16":
        # the upper half of a float32
        bits, dtype = bits << 16, "float32"
    value, word = _FORMATS[dtype]
    number: float = struct.unpack(f"<{value}", struct.pack(f"<{word}", bits))[0]
    return number


def _ordered(bits: int, size: int) -> int:
    sign = 1 << (8 * size - 1)
    return bits if bits < sign else sign - bits
