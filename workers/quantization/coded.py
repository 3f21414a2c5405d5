"""Matrices whose codes kernels read as they are stored, or nearly: packed weights on a GPU.

What they stand for is what widening them gives (`widened`), bit for bit: whether a matrix is packed does not show.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass, replace

import torch

from sempre.kernels.integers import IntegerScheme
from sempre.kernels.packed import CodeForm, Codes, Numbers, can_pack
from sempre.workers.layers.linear_kernel import LinearKernel, LinearWeight
from sempre.workers.quantization.gguf_blocks import CODES, SCALES
from sempre.workers.quantization.method import QuantizationMethod
from sempre.workers.quantization.plain import PLAIN, PLAIN_SUFFIX, finite_weight
from sempre.workers.quantization.widened import CodedFormat, WidenedSource, coded_form
from sempre.workers.tensor_source import FLOAT_NAMES, Parameter, mismatch

ZEROS = ".code_zeros"
# small, and their errors matter
KEPT = ("lm_head", "score")
# beside a larger exponent the kernels' powers of two overflow
_LARGEST_EXPONENT = 128
_SMALLEST_GROUP = 32
# inputs that share a scale where matrices are quantised while loading
ONLINE_GROUP = 128
ONLINE_FORMS = {IntegerScheme.INT8: CodeForm(8, ONLINE_GROUP), IntegerScheme.INT4: CodeForm(4, ONLINE_GROUP)}


@dataclass(frozen=True)
class CodedMatrix:
    """Which codes a matrix has; `scale`: safetensors' name of the dtype of its scales."""

    form: CodeForm
    scale: str

    @property
    def scale_dtype(self) -> torch.dtype:
        """Of e2m1 numbers, the dtype of what they stand for."""
        return FLOAT_NAMES.get(self.scale, torch.bfloat16)


class CodedSource:
    """A checkpoint's tensors, of which some quantised matrices are codes, scales and zeros by output."""

    def __init__(self, source: WidenedSource, form: CodedFormat, coded: Set[str]) -> None:
        """`coded`: modules; the others are widened."""
        self._source = source
        self._form = coded_form(form)
        suffixes = (CODES, SCALES, *((ZEROS,) if self._form.has_zeros else ()))
        self._parts = {module + suffix: module for module in sorted(coded) for suffix in suffixes}
        self._hidden = {module + PLAIN_SUFFIX for module in coded}
        self._last: tuple[str, Codes] | None = None

    def names(self) -> list[str]:
        return [*(name for name in self._source.names() if name not in self._hidden), *self._parts]

    def shape(self, name: str) -> tuple[int, ...]:
        if name not in self._parts:
            return self._source.shape(name)
        rows, width = self._source.shape(self._parts[name] + PLAIN_SUFFIX)
        return rows, width * self._form.bits // 8 if name.endswith(CODES) else width // self._form.group_of(width)

    def dtype_name(self, name: str) -> str:
        if name not in self._parts:
            return self._source.dtype_name(name)
        if name.endswith(SCALES):
            return self._source.scale_name(self._parts[name])
        return "U8" if name.endswith(CODES) else "I16"

    def read(self, name: str) -> torch.Tensor:
        if name not in self._parts:
            return self._source.read(name)
        module = self._parts[name]
        if self._last is None or self._last[0] != module:
            self._last = module, self._source.codes(module)
        codes = self._last[1]
        if name.endswith(CODES):
            return codes.codes
        found = codes.scales if name.endswith(SCALES) else codes.zeros
        assert found is not None
        return found

    def digest(self, name: str, tensor: torch.Tensor) -> bytes:
        """That of the matrix for its codes, and nothing for the rest: together as if it were widened."""
        if name not in self._parts:
            return self._source.digest(name, tensor)
        return self._source.digest(self._parts[name] + PLAIN_SUFFIX, tensor) if name.endswith(CODES) else b""


class StoredCodes:
    """`.codes` uint8 [N, K * bits / 8], `.code_scales` [N, G] and perhaps `.code_zeros` int16 [N, G], as `CodedSource`
    shows them."""

    def __init__(self, matrix: CodedMatrix) -> None:
        self._matrix = matrix

    def tensors(self, module: str, out_features: int, in_features: int) -> dict[str, Parameter]:
        form = self._matrix.form
        groups = (out_features, in_features // form.group_of(in_features))
        found = {
            CODES: Parameter((out_features, in_features * form.bits // 8), ("U8",), elements=8 // form.bits),
            SCALES: Parameter(groups, (self._matrix.scale,), elements=0),
        }
        return {**found, ZEROS: Parameter(groups, ("I16",), elements=0)} if form.has_zeros else found

    def pack(
        self,
        parts: Mapping[str, Mapping[str, torch.Tensor]],
        bias: torch.Tensor | None,
        kernel: LinearKernel,
        as_matrix: Callable[[torch.Tensor], torch.Tensor],
    ) -> LinearWeight:
        matrices = [coded_part(module, part, self._matrix.form) for module, part in parts.items()]
        return pack_or_widen(matrices, bias, kernel, _dtype_of(as_matrix))


def coded_part(module: str, part: Mapping[str, torch.Tensor], form: CodeForm) -> Codes:
    """The codes of one matrix. Raises TensorMismatch for scales that do not make finite values."""
    codes = Codes(part[CODES], part[SCALES], part.get(ZEROS), form)
    _check_finite(module, codes)
    return codes


def _dtype_of(as_matrix: Callable[[torch.Tensor], torch.Tensor]) -> torch.dtype:
    """The dtype for matrices."""
    return as_matrix(torch.empty(0, dtype=torch.float32, device="cpu")).dtype


def _check_finite(module: str, matrix: Codes) -> None:
    if matrix.form.numbers is Numbers.E2M1:
        return  # the kernels' largest exponent is far from overflow
    most = torch.finfo(matrix.scales.dtype).max
    scales = matrix.scales.float().abs()
    # no number times such a scale overflows
    if bool((scales <= most / (2 << matrix.form.bits)).all()):
        return
    wrong = ~matrix.values().isfinite()
    if bool(wrong.any()):
        raise mismatch(module + SCALES, "scales that make finite values", f"{int(wrong.sum())} that are not")


def pack_or_widen(
    matrices: Sequence[Codes], bias: torch.Tensor | None, kernel: LinearKernel, dtype: torch.dtype
) -> LinearWeight:
    """The weight of matrices of one form: packed where kernels take it, else widened; the bits are the same."""
    first, rows = matrices[0], sum(matrix.out_features for matrix in matrices)
    even = all(can_pack(m.form, m.out_features, m.in_features, m.scales.dtype, dtype) for m in matrices)
    if first.form.numbers is Numbers.E2M1 and max(int(m.scales.max()) for m in matrices) > _LARGEST_EXPONENT:
        even = False
    if even and rows:
        return kernel.pack_codes(matrices, bias, dtype)
    return kernel.pack(torch.cat([matrix.values().to(dtype) for matrix in matrices]), bias)


def quantize_groups(weight: torch.Tensor, form: CodeForm, dtype: torch.dtype) -> Codes:
    """weight [N, K] of finite floats: scale = amax / largest code, rounded to `dtype`; code = weight / scale, ties to
    even. Zeros, if the form has them, are its middle."""
    rows, width = weight.shape
    largest = float(form.middle - 1)
    blocks = weight.float().view(rows, -1, form.group_of(width))
    scales = (blocks.abs().amax(-1) / largest).to(dtype)
    divisor = torch.where(scales > 0, scales, torch.ones_like(scales)).float()
    numbers = (blocks / divisor[..., None]).round().clamp(-largest, largest) + form.middle
    whole = numbers.to(torch.uint8).view(rows, width)
    codes = whole if form.bits == 8 else whole[:, ::2] | (whole[:, 1::2] << 4)
    zeros = torch.full_like(scales, form.middle, dtype=torch.int16) if form.has_zeros else None
    return Codes(codes.contiguous(), scales, zeros, form)


class OnlineCodes:
    """`.weight` [N, K] of floats, quantised while loading."""

    def __init__(self, form: CodeForm) -> None:
        self._form = form

    def _fitting(self, in_features: int) -> CodeForm:
        """The form, with smaller groups where those would not be whole."""
        group = self._form.group_of(in_features)
        while in_features % group and group > _SMALLEST_GROUP:
            group //= 2
        return replace(self._form, group=None if self._form.group is None else group)

    def tensors(self, module: str, out_features: int, in_features: int) -> dict[str, Parameter]:
        group = self._fitting(in_features).group_of(in_features)
        if in_features % group:
            raise mismatch(module + PLAIN_SUFFIX, f"a multiple of {group} inputs for groups", str(in_features))
        return PLAIN.tensors(module, out_features, in_features)

    def pack(
        self,
        parts: Mapping[str, Mapping[str, torch.Tensor]],
        bias: torch.Tensor | None,
        kernel: LinearKernel,
        as_matrix: Callable[[torch.Tensor], torch.Tensor],
    ) -> LinearWeight:
        matrices, dtype = [], _dtype_of(as_matrix)
        for module, tensors in parts.items():
            weight = finite_weight(module, tensors)
            matrices.append(quantize_groups(weight, self._fitting(weight.shape[1]), dtype))
        return pack_or_widen(matrices, bias, kernel, dtype)


def common_matrix(matrices: Mapping[str, CodedMatrix], modules: Sequence[str]) -> CodedMatrix | None:
    """What modules that are fused have in common; None where they are not alike, and are widened to be one matmul."""
    found = {matrices.get(module) for module in modules}
    return found.pop() if len(found) == 1 else None


class CodedQuantization:
    """Those matrices that are given are codes, the others plain."""

    def __init__(self, matrices: Mapping[str, CodedMatrix]) -> None:
        self._matrices = matrices

    def method(self, modules: Sequence[str]) -> QuantizationMethod:
        matrix = common_matrix(self._matrices, modules)
        return PLAIN if matrix is None or _is_expert(modules[0]) else StoredCodes(matrix)


class OnlineCodedQuantization:
    """Every matrix is quantised while loading, but those that are kept."""

    def __init__(self, form: CodeForm) -> None:
        self._method = OnlineCodes(form)

    def method(self, modules: Sequence[str]) -> QuantizationMethod:
        kept = any(module.startswith(KEPT) for module in modules)
        return PLAIN if kept or _is_expert(modules[0]) else self._method


def _is_expert(module: str) -> bool:
    """Experts have kernels of their own, for widened weights."""
    return ".experts." in module or module.endswith(".experts")


def coded_matrices(source: WidenedSource, form: CodedFormat, dtype: torch.dtype) -> dict[str, CodedMatrix]:
    """The matrices of a checkpoint that kernels read as codes, for an engine's `dtype`."""
    found, made = {}, coded_form(form)
    for module, (rows, width) in source.matrices().items():
        matrix = CodedMatrix(made, source.scale_name(module))
        if source.is_ordered(module) and can_pack(matrix.form, rows, width, matrix.scale_dtype, dtype):
            found[module] = matrix
    return found
