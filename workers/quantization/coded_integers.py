"""Coded matrices as integers for a CPU's integer matmul (`kernels.integers`): neither codes nor scales are rounded.

A zero becomes a minimum: (code - zero) * scale = (code - middle) * scale - (zero - middle) * scale, where each product
is exact in float32.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch

from sempre.ipc.errors import ConfigError
from sempre.kernels.integers import BLOCK, GroupedIntegers, IntegerScheme
from sempre.kernels.packed import Codes, Numbers
from sempre.workers.layers.linear_kernel import LinearKernel, LinearWeight
from sempre.workers.quantization.coded import CodedMatrix, StoredCodes, coded_part, common_matrix
from sempre.workers.quantization.method import QuantizationMethod
from sempre.workers.quantization.plain import PLAIN
from sempre.workers.quantization.widened import CodedFormat, WidenedSource
from sempre.workers.tensor_source import Parameter


class CodedIntegers:
    """`.codes`, `.code_scales` and perhaps `.code_zeros`, as `CodedSource` shows them."""

    def __init__(self, matrix: CodedMatrix) -> None:
        self._matrix = matrix
        self._stored = StoredCodes(matrix)

    def tensors(self, module: str, out_features: int, in_features: int) -> dict[str, Parameter]:
        return self._stored.tensors(module, out_features, in_features)

    def pack(
        self,
        parts: Mapping[str, Mapping[str, torch.Tensor]],
        bias: torch.Tensor | None,
        kernel: LinearKernel,
        as_matrix: Callable[[torch.Tensor], torch.Tensor],
    ) -> LinearWeight:
        matrices = [grouped_integers(coded_part(module, part, self._matrix.form)) for module, part in parts.items()]
        return kernel.pack_integers(matrices, bias, IntegerScheme.STORED)


def grouped_integers(codes: Codes) -> GroupedIntegers:
    """In groups of 32, whatever those of the codes are."""
    middle = codes.form.middle
    times = codes.form.group_of(codes.in_features) // BLOCK
    scale = codes.scales.float()
    minimum = None if codes.zeros is None else (codes.zeros.float() - middle) * scale
    return GroupedIntegers(
        (codes.numbers().to(torch.int16) - middle).to(torch.int8),
        scale.repeat_interleave(times, 1),
        None if minimum is None else minimum.repeat_interleave(times, 1),
    )


class CodedIntegerQuantization:
    """Those matrices that are given are integers, the others plain."""

    def __init__(self, matrices: Mapping[str, CodedMatrix]) -> None:
        self._matrices = matrices

    def method(self, modules: Sequence[str]) -> QuantizationMethod:
        matrix = common_matrix(self._matrices, modules)
        return PLAIN if matrix is None else CodedIntegers(matrix)


def coded_integer_quantization(source: WidenedSource, form: CodedFormat) -> CodedIntegerQuantization:
    """The matrices of a checkpoint that are integers in whole blocks. Raises ConfigError where none is."""
    found, made = {}, form.form()
    assert made is not None
    for module, (_, width) in source.matrices().items():
        whole = width % BLOCK == 0 and made.group_of(width) % BLOCK == 0
        if made.numbers is Numbers.INTEGERS and whole and source.is_ordered(module):
            found[module] = CodedMatrix(made, source.scale_name(module))
    if not found:
        raise ConfigError(
            f"quantization: expected matrices of integers in groups of a multiple of {BLOCK} inputs that follow one"
            f" another for 'integer', found none in this checkpoint ({form.name}). Leave it out.",
            parameter="quantization",
            value=IntegerScheme.STORED.value,
        )
    return CodedIntegerQuantization(found)
