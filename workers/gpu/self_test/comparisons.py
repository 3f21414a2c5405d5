"""What a self-test found, judged at the end: one wait for the device instead of one per comparison."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch

from sempre.ipc.errors import InvarianceError

_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class Comparison(NamedTuple):
    """The same rows, computed in two ways."""

    operation: str
    """with its sizes"""
    what: str
    """how the second way differs from the first"""
    different: torch.Tensor
    """elements, a number on the device"""
    total: int


def compare(operation: str, what: str, expected: torch.Tensor, found: torch.Tensor) -> Comparison:
    """Bit by bit; a NaN is never equal."""
    bits = _BITS[expected.dtype.itemsize]
    different = expected.contiguous().view(bits) != found.contiguous().view(bits)
    if found.dtype.is_floating_point:
        different |= found.isnan()
    return Comparison(operation, what, different.sum(), expected.numel())


def require_equal(comparisons: Iterable[Comparison]) -> dict[str, int]:
    """Comparisons passed, by the first word of the operation. Raises InvarianceError for the first that failed."""
    compared = list(comparisons)
    counts = torch.stack([comparison.different for comparison in compared]).tolist() if compared else []
    passed: dict[str, int] = {}
    for (operation, what, _, total), different in zip(compared, counts, strict=True):
        if different:
            raise InvarianceError(
                f"self-test: {operation}: {what}: expected the same bits, found {different} of {total} elements"
                " different. The guarantee does not hold on this GPU with these library versions; please report the"
                " operation and `sempre collect-env`.",
                operation=operation,
            )
        name = operation.split(" ", 1)[0]
        passed[name] = passed.get(name, 0) + 1
    return passed
