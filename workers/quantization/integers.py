"""Matrices of small integers for a CPU's integer matmul (`kernels.integers`): a checkpoint's own blocks, or floats that
are quantised while loading."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch

from sempre.ipc.config import WorkerConfig
from sempre.ipc.errors import ConfigError
from sempre.ipc.gguf_index import GGUF_INDEX_FILE, read_gguf_index
from sempre.kernels.integers import BLOCK, GroupedIntegers, IntegerScheme
from sempre.workers.layers.linear_kernel import LinearKernel, LinearWeight
from sempre.workers.quantization.gguf_blocks import CODES, MINIMA, SCALES, IntegerForm, integer_forms
from sempre.workers.quantization.method import QuantizationMethod
from sempre.workers.quantization.plain import PLAIN, PLAIN_SUFFIX, finite_weight
from sempre.workers.tensor_source import Parameter, mismatch

# beside which the codes of a block are spread evenly; 8 and 4 bits, without the lowest, so that both signs are alike
LARGEST = {IntegerScheme.INT8: 127.0, IntegerScheme.INT4: 7.0}
# small, and their errors matter
KEPT = ("lm_head", "score")


def quantize_blocks(weight: torch.Tensor, scheme: IntegerScheme) -> GroupedIntegers:
    """weight [N, K] in blocks of 32: scale = amax / largest code, and code = weight / scale, ties to even."""
    rows, width = weight.shape
    blocks = weight.float().view(rows, width // BLOCK, BLOCK)
    greatest = blocks.abs().amax(-1)
    scale = greatest / torch.full_like(greatest, LARGEST[scheme])
    divisor = torch.where(scale > 0, scale, torch.ones_like(scale))
    # the smallest scales are rounded themselves
    codes = (blocks / divisor[..., None]).round().clamp(-LARGEST[scheme], LARGEST[scheme])
    return GroupedIntegers(codes.to(torch.int8).view(rows, width), scale)


class OnlineIntegers:
    """`.weight` [N, K] of floats."""

    def __init__(self, scheme: IntegerScheme) -> None:
        self._scheme = scheme

    def tensors(self, module: str, out_features: int, in_features: int) -> dict[str, Parameter]:
        _check_inputs(module, in_features)
        return PLAIN.tensors(module, out_features, in_features)

    def pack(
        self,
        parts: Mapping[str, Mapping[str, torch.Tensor]],
        bias: torch.Tensor | None,
        kernel: LinearKernel,
        as_matrix: Callable[[torch.Tensor], torch.Tensor],
    ) -> LinearWeight:
        matrices = [quantize_blocks(finite_weight(module, part), self._scheme) for module, part in parts.items()]
        return kernel.pack_integers(matrices, bias, self._scheme)


class StoredIntegers:
    """`.codes` int8 [N, K], `.code_scales` and perhaps `.code_minima` float32 [N, G], as `GgufSource` shows blocks."""

    def __init__(self, forms: Mapping[str, IntegerForm]) -> None:
        self._forms = forms

    def tensors(self, module: str, out_features: int, in_features: int) -> dict[str, Parameter]:
        _check_inputs(module, in_features)
        form = self._forms[module]
        groups = (out_features, in_features // form.group)
        found = {CODES: Parameter((out_features, in_features), ("I8",)), SCALES: Parameter(groups, ("F32",))}
        return {**found, MINIMA: Parameter(groups, ("F32",))} if form.has_minimum else found

    def pack(
        self,
        parts: Mapping[str, Mapping[str, torch.Tensor]],
        bias: torch.Tensor | None,
        kernel: LinearKernel,
        as_matrix: Callable[[torch.Tensor], torch.Tensor],
    ) -> LinearWeight:
        matrices = [GroupedIntegers(part[CODES], part[SCALES], part.get(MINIMA)) for part in parts.values()]
        return kernel.pack_integers(matrices, bias, IntegerScheme.STORED)


def _check_inputs(module: str, in_features: int) -> None:
    if in_features % BLOCK:
        raise mismatch(module + PLAIN_SUFFIX, f"a multiple of {BLOCK} inputs for integers", str(in_features))


class IntegerQuantization:
    """Matrices of integers, where they can be; the others plain."""

    def __init__(self, scheme: IntegerScheme, forms: Mapping[str, IntegerForm]) -> None:
        """`forms`: of a checkpoint's own blocks, by module."""
        self._forms = forms
        self._online = None if scheme is IntegerScheme.STORED else OnlineIntegers(scheme)
        self._stored = StoredIntegers(forms)

    def method(self, modules: Sequence[str]) -> QuantizationMethod:
        if self._online is not None:
            return PLAIN if any(module.startswith(KEPT) for module in modules) else self._online
        return self._stored if all(module in self._forms for module in modules) else PLAIN


def check_integers(scheme: IntegerScheme, config: WorkerConfig, device: torch.device) -> None:
    """Raise ConfigError for a machine or settings that lack what integers need."""
    setting = f"quantization={scheme.value!r}"
    given = {"device": (device.type, "cpu")}
    if scheme is IntegerScheme.STORED and config.load_format == "dummy":
        given["load_format"] = (config.load_format, "auto")
    for name, (found, expected) in given.items():
        if found != expected:
            raise ConfigError(
                f"{setting}: expected {name} {expected!r}, found {found!r}.",
                parameter="quantization",
                value=scheme.value,
            )
    # imported here: a GPU worker shares this module but does not need it
    from sempre.kernels.integers.tiles import MissingInstructions, dot_kind, machine_features

    try:
        dot_kind(machine_features())
    except MissingInstructions as error:
        raise ConfigError(f"{setting}: {error}.", parameter="quantization", value=scheme.value) from error


def integer_quantization(scheme: IntegerScheme, config: WorkerConfig) -> IntegerQuantization:
    """The formats of a checkpoint that passed `check_integers`. Raises ConfigError for one without blocks."""
    setting = f"quantization={scheme.value!r}"
    if scheme is not IntegerScheme.STORED:
        return IntegerQuantization(scheme, {})
    folder = Path(config.model_path)
    forms = integer_forms(read_gguf_index(folder)) if (folder / GGUF_INDEX_FILE).exists() else {}
    if not forms:
        raise ConfigError(
            f"{setting}: expected a GGUF file with matrices in blocks, or a checkpoint of integers, found"
            f" {config.model_path}. 'int8' and 'int4' quantise other checkpoints.",
            parameter="quantization",
            value=scheme.value,
        )
    return IntegerQuantization(scheme, forms)
