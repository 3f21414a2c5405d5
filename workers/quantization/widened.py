"""Formats whose matrices are widened while loading: a source that shows each as the floats that it stands for.

Whatever reads tensors (ranks' shards, reordered heads, experts) then meets ordinary matrices. A module is quantised
where the checkpoint holds the format's tensors for it, whatever lists of targets say.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch

from sempre.ipc.errors import TensorMismatch
from sempre.kernels.packed import CodeForm, Codes
from sempre.workers.quantization.plain import PLAIN_SUFFIX
from sempre.workers.tensor_source import Parameter, TensorSource, mismatch

Shape = tuple[int, ...]


class WidenedFormat(Protocol):
    """One format; a frozen dataclass of what `quantization_config` says."""

    @property
    def name(self) -> str:
        """for messages"""

    @property
    def main(self) -> str:
        """the suffix of the tensor with the matrix's numbers; `scale` is another that every matrix has"""

    @property
    def scale(self) -> str: ...

    def sizes(self, main: Shape) -> tuple[int, int]:
        """[N, K] of the matrix, by the shape of the tensor `main`."""

    def stored(self, out_features: int, in_features: int) -> dict[str, Parameter]:
        """The tensors, by suffix. Raises ValueError, which says what was expected and found, for a K that does not
        fit."""

    def optional(self) -> dict[str, Parameter]:
        """Tensors that may be there, and say nothing about the weights."""

    def dtype_name(self, scale: str) -> str:
        """Safetensors' name of the dtype of the values, by that of the scales."""

    def widen(self, tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """The values [N, K]. Raises ValueError, which says what was expected and found."""


@runtime_checkable
class CodedFormat(WidenedFormat, Protocol):
    """One whose numbers kernels can read."""

    @property
    def group_index(self) -> str | None:
        """the suffix of the tensor with each input's group, if there is one"""

    def form(self) -> CodeForm | None:
        """What its codes are like; None where kernels cannot read them."""

    def codes(self, tensors: Mapping[str, torch.Tensor]) -> Codes:
        """The matrix as codes. Raises ValueError, which says what was expected and found."""


def form_of(form: WidenedFormat | None) -> CodeForm | None:
    """What the codes of a format are like, if kernels can read them."""
    return form.form() if isinstance(form, CodedFormat) else None


def coded_form(form: CodedFormat) -> CodeForm:
    """The same of one that has codes."""
    found = form.form()
    assert found is not None, form.name
    return found


@dataclass(frozen=True)
class WidenedSpec:
    """The format of those matrices that have its tensors."""

    format: WidenedFormat


class WidenedSource:
    """A checkpoint's tensors, of which quantised matrices are floats. Raises TensorMismatch for incomplete ones."""

    def __init__(self, source: TensorSource, form: WidenedFormat) -> None:
        self._source = source
        self._format = form
        present = set(source.names())
        self._modules = [
            name.removesuffix(form.main)
            for name in source.names()
            if name.endswith(form.main) and name.removesuffix(form.main) + form.scale in present
        ]
        if not self._modules:
            raise mismatch(f"…{form.main}", f"matrices of {form.name}, as config.json says", "none")
        self._shapes: dict[str, Shape] = {}
        self._parts: dict[str, list[str]] = {}
        for module in self._modules:
            self._add(module, present)
        consumed = {module + suffix for module, suffixes in self._parts.items() for suffix in suffixes}
        consumed |= {module + suffix for module in self._modules for suffix in form.optional()}
        self._whole = [name for name in source.names() if name not in consumed]

    def _add(self, module: str, present: set[str]) -> None:
        form, main = self._format, module + self._format.main
        if len(self._source.shape(main)) != 2:
            raise mismatch(main, f"two dimensions ({form.name})", f"shape {list(self._source.shape(main))}")
        sizes = form.sizes(self._source.shape(main))
        try:
            wanted = form.stored(*sizes)
        except ValueError as error:
            raise mismatch(main, f"a matrix of {form.name}", f"{list(sizes)}: {error}") from error
        held = {suffix: parameter for suffix, parameter in form.optional().items() if module + suffix in present}
        for suffix, parameter in {**wanted, **held}.items():
            name = module + suffix
            if name not in present:
                raise mismatch(name, f"a tensor of shape {list(parameter.shape)} ({form.name})", "nothing")
            # one number is stored with or without a dimension
            shapes = [parameter.shape, ()] if parameter.shape == (1,) else [parameter.shape]
            if self._source.shape(name) not in shapes:
                found = f"shape {list(self._source.shape(name))}"
                raise mismatch(name, f"shape {list(parameter.shape)} ({form.name})", found)
            if self._source.dtype_name(name) not in parameter.dtypes:
                found = f"dtype {self._source.dtype_name(name)}"
                raise mismatch(name, f"dtype {', '.join(parameter.dtypes)} ({form.name})", found)
        self._shapes[module + PLAIN_SUFFIX] = sizes
        self._parts[module] = list(wanted)

    def names(self) -> list[str]:
        return [*self._whole, *self._shapes]

    def shape(self, name: str) -> Shape:
        return self._shapes[name] if name in self._shapes else self._source.shape(name)

    def dtype_name(self, name: str) -> str:
        if name not in self._shapes:
            return self._source.dtype_name(name)
        return self._format.dtype_name(self._source.dtype_name(name.removesuffix(PLAIN_SUFFIX) + self._format.scale))

    def read(self, name: str) -> torch.Tensor:
        if name not in self._shapes:
            return self._source.read(name)
        module = name.removesuffix(PLAIN_SUFFIX)
        stored = {suffix: self._source.read(module + suffix) for suffix in self._parts[module]}
        try:
            values = self._format.widen(stored)
        except ValueError as error:
            raise self._wrong_numbers(module, error) from error
        if not bool(values.isfinite().all()):
            found = f"{int((~values.isfinite()).sum())} that are not"
            raise mismatch(module + self._format.scale, "scales that make finite values", found)
        return values

    def matrices(self) -> dict[str, Shape]:
        """[N, K] of each quantised matrix, by module."""
        return {name.removesuffix(PLAIN_SUFFIX): shape for name, shape in self._shapes.items()}

    def scale_name(self, module: str) -> str:
        """Safetensors' name of the dtype of a quantised matrix's scales."""
        return self._source.dtype_name(module + self._format.scale)

    def is_ordered(self, module: str) -> bool:
        """Whether the inputs of each group of a coded matrix follow one another."""
        form = self._format
        assert isinstance(form, CodedFormat)
        if form.group_index is None:
            return True
        width = self._shapes[module + PLAIN_SUFFIX][1]
        group, count = self._source.read(module + form.group_index), width // coded_form(form).group_of(width)
        return group_numbers({"": group}, "", count) is None

    def codes(self, module: str) -> Codes:
        """A matrix of a coded format as codes."""
        assert isinstance(self._format, CodedFormat)
        stored = {suffix: self._source.read(module + suffix) for suffix in self._parts[module]}
        try:
            return self._format.codes(stored)
        except ValueError as error:
            raise self._wrong_numbers(module, error) from error

    def _wrong_numbers(self, module: str, error: ValueError) -> TensorMismatch:
        return mismatch(module + self._format.main, f"numbers of {self._format.name}", str(error))

    def digest(self, name: str, tensor: torch.Tensor) -> bytes:
        """Over what is stored, which determines the tensor."""
        if name not in self._shapes:
            return self._source.digest(name, tensor)
        module = name.removesuffix(PLAIN_SUFFIX)
        digest = hashlib.sha256(repr(self._format).encode())
        for suffix in self._parts[module]:
            digest.update(self._source.digest(module + suffix, self._source.read(module + suffix)))
        return digest.digest()


def unpacked(words: torch.Tensor, bits: int, order: tuple[int, ...] | None = None) -> torch.Tensor:
    """int32 words [..., W] → uint8 [..., W * 32 / bits], the lowest bits first, or by their places."""
    places = range(32 // bits) if order is None else order
    mask = (1 << bits) - 1
    return torch.stack([((words >> (bits * place)) & mask).to(torch.uint8) for place in places], dim=-1).flatten(-2)


def paired(numbers: torch.Tensor) -> torch.Tensor:
    """uint8 [N, K] of 4 bits → [N, K / 2], the first of two in the lower bits."""
    return numbers[:, ::2] | (numbers[:, 1::2] << 4)


def group_numbers(tensors: Mapping[str, torch.Tensor], suffix: str, groups: int) -> torch.Tensor | None:
    """int64 [K]: the group of each input as stored; None where they follow one another. Raises ValueError for a number
    out of range."""
    stored = tensors[suffix].long()
    if int(stored.min()) < 0 or int(stored.max()) >= groups:
        raise ValueError(f"{suffix} from {int(stored.min())} to {int(stored.max())}, of {groups} groups")
    ascending = torch.arange(len(stored), dtype=torch.int64, device=stored.device) // (len(stored) // groups)
    return None if torch.equal(stored, ascending) else stored


def groups_of(in_features: int, group_size: int | None) -> tuple[int, int]:
    """The number of groups of K, and their size; None: all of K. Raises ValueError for one that does not divide."""
    size = in_features if group_size is None else group_size
    if in_features % size:
        raise ValueError(f"its {in_features} inputs are not a multiple of the group size {size}")
    return in_features // size, size
