"""Integer matmuls whose digests are in a golden file; as a script: prints them as JSON, with the instructions used.

Inputs come from integers alone, and from exact divisions, so that no library's generator decides on them.
"""

from __future__ import annotations

import hashlib
import json
import sys

import numpy as np
import torch

from sempre.kernels.integers import GroupedIntegers, IntegerScheme, IntegerWeight, integer_linear, pack_integers
from sempre.kernels.integers.tiles import MissingInstructions, dot_kind, machine_features

LAYOUTS = {
    "8 bits, groups of 32": (-128, 127, 32, False),
    "8 bits, groups of 16, minima": (-128, 127, 16, True),
    "4 bits, signed": (-8, 7, 32, False),
    "4 bits, minima": (0, 15, 32, True),
    "4 bits, groups of 16": (0, 3, 16, True),
}
ROWS, OUTPUTS, INPUTS = 7, 70, 192


def integers(count: int, least: int, most: int, seed: int) -> np.ndarray:
    """A linear congruential generator modulo 2**31, of which the upper bits are used."""
    found, state = np.empty(count, np.int64), seed
    for i in range(count):
        state = (1103515245 * state + 12345) % 2**31
        found[i] = least + (state >> 8) % (most - least + 1)
    return found


def fractions(shape: tuple[int, ...], scale: int, seed: int) -> torch.Tensor:
    """Positive and negative multiples of 2**-scale."""
    values = integers(int(np.prod(shape)), -(2**20), 2**20, seed)
    return torch.from_numpy((values / 2.0**scale).astype(np.float32)).view(shape)


def matrix(least: int, most: int, group: int, has_minimum: bool, outputs: int = OUTPUTS) -> GroupedIntegers:
    codes = torch.from_numpy(integers(outputs * INPUTS, least, most, 1).astype(np.int8)).view(outputs, INPUTS)
    # the extremes, side by side: sums of two products that 16 bits do not hold
    codes[:2, :32], codes[2:4, :32] = least, most
    groups = (outputs, INPUTS // group)
    return GroupedIntegers(codes, fractions(groups, 27, 2), fractions(groups, 26, 3) if has_minimum else None)


def activations(rows: int = ROWS) -> torch.Tensor:
    x = fractions((rows, INPUTS), 17, 4)
    x[0, :64] = 0
    x[1, :32] = 3.0
    x[2, :32] = -(2.0**-149)
    x[3, 5] = 1e30
    return x


def multiply(case: GroupedIntegers, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    w = IntegerWeight((pack_integers(case),), bias, case.codes.shape[1], IntegerScheme.STORED)
    return integer_linear(x, w, torch.empty(x.shape[0], w.out_features))


def digests() -> dict[str, str]:
    found = {}
    for name, layout in LAYOUTS.items():
        out = multiply(matrix(*layout), activations(), fractions((OUTPUTS,), 20, 5))
        found[name] = hashlib.sha256(out.numpy().tobytes()).hexdigest()
    return found


def main() -> None:
    try:
        json.dump({"kind": dot_kind(machine_features()), "digests": digests()}, sys.stdout)
    except MissingInstructions as error:
        json.dump({"refused": str(error)}, sys.stdout)


if __name__ == "__main__":
    main()
