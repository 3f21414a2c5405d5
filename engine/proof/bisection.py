"""Where two engines first differ for one prompt: the token, then the layer and operation, with the bits of both."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

from sempre.engine.fingerprint import fingerprint_differences
from sempre.engine.frontend.prompts import PromptType
from sempre.engine.llm import LLM
from sempre.engine.proof.differences import Difference, difference
from sempre.engine.proof.kept_output import kept_completion
from sempre.engine.sampling_params import SamplingParams
from sempre.ipc.errors import ConfigError

_DIGEST_BYTES = 8
_FORMATS = {"float32": ("f", "I"), "float16": ("e", "H"), "int32": ("i", "I")}


class TracedOperation(NamedTuple):
    """A result of one module, as a worker reports it."""

    path: str
    operation: str
    dtype: str
    digests: bytes
    """8 bytes per row"""


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


@dataclass(frozen=True)
class Bisection:
    """What two engines differ in."""

    token: Difference | None
    """the first difference of the outputs"""
    operation: OperationDifference | None
    num_operations: int
    """results that were compared, up to the first that differs"""
    changed_parts: tuple[str, ...]
    """of the fingerprint, in words"""

    @property
    def is_equal(self) -> bool:
        """Whether neither outputs nor results of modules differ."""
        return self.token is None and self.operation is None

    def to_dict(self) -> dict[str, Any]:
        """Return everything as plain values."""
        operation = None
        if self.operation is not None:
            operation = {**asdict(self.operation), "sentence": self.operation.sentence()}
        return {
            "verdict": "equal" if self.is_equal else "different",
            "token": None if self.token is None else self.token.to_dict(),
            "operation": operation,
            "operations_compared": self.num_operations,
            "fingerprint_changes": list(self.changed_parts),
        }


def bisect(a: LLM, b: LLM, prompt: PromptType, params: SamplingParams) -> Bisection:
    """Generate with both engines, then compare the results of every module for prompt and output of the first.

    Raises ConfigError if the models are not the same tree, RequestError for a refused prompt.
    """
    outputs = [llm.generate(prompt, params, use_tqdm=False)[0] for llm in (a, b)]
    one, other = (kept_completion(output, output.outputs[0]) for output in outputs)
    token = difference(one, other, a.get_tokenizer().decode)
    # rows after the first difference belong to other tokens
    end = len(one.token_ids) if token is None or token.position is None else token.position
    sequence = [*outputs[0].prompt_token_ids, *one.token_ids[:end]]
    traces = [traced(llm, sequence) for llm in (a, b)]
    place = first_operation(*traces)
    changed = tuple(fingerprint_differences(a.fingerprint_parts, b.fingerprint_parts))
    if place is None:
        return Bisection(token, None, len(traces[0]), changed)
    index, rows = place
    values = [_values(llm, sequence, index, rows[0]) for llm in (a, b)]
    found = _operation(traces[0][index], rows, *values)
    return Bisection(token, found, index + 1, changed)


def traced(llm: LLM, token_ids: Sequence[int]) -> list[TracedOperation]:
    """Return the results of all modules for a sequence, by digest."""
    [result, *_] = llm.collective_rpc("trace_modules", args=[list(token_ids)])
    assert isinstance(result, list)
    return [TracedOperation(*entry) for entry in result]


def first_operation(a: Sequence[TracedOperation], b: Sequence[TracedOperation]) -> tuple[int, list[int]] | None:
    """Return the index of the first result that differs, and its rows; None if all are equal.

    Raises ConfigError for models of different trees.
    """
    for index, (one, other) in enumerate(zip(a, b, strict=False)):
        if one[:3] != other[:3]:
            raise ConfigError(
                f"the models compute different things: {one.path} ({one.operation}, {one.dtype}) against {other.path} "
                f"({other.operation}, {other.dtype}). Give two settings or checkpoints of one architecture and dtype."
            )
        if one.digests != other.digests:
            rows = range(len(one.digests) // _DIGEST_BYTES)
            return index, [row for row in rows if _digest(one, row) != _digest(other, row)]
    if len(a) != len(b):
        raise ConfigError(f"the models have {len(a)} and {len(b)} results; give two of one architecture.")
    return None


def _digest(operation: TracedOperation, row: int) -> bytes:
    return operation.digests[row * _DIGEST_BYTES : (row + 1) * _DIGEST_BYTES]


def _values(llm: LLM, token_ids: Sequence[int], index: int, row: int) -> bytes:
    [result, *_] = llm.collective_rpc("traced_row", args=[list(token_ids), index, row])
    assert isinstance(result, bytes)
    return result


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
