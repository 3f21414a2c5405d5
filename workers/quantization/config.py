"""How a model's matrices are quantised: what `quantization_config` of a config.json says, or the engine's setting."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from sempre.ipc.errors import ConfigError
from sempre.kernels.fp8 import Fp8Scheme
from sempre.kernels.integers import IntegerScheme
from sempre.workers.config_fields import ConfigFields
from sempre.workers.quantization.widened import WidenedFormat, WidenedSpec, form_of

SUPPORTED = "compressed-tensors fp8: weights per channel or tensor, activations per token and dynamic, or not at all"
FORMATS = ("float-quantized", "naive-quantized")


@dataclass(frozen=True)
class QuantizationSpec:
    """Which matrices are fp8, and with which scales."""

    scheme: Fp8Scheme
    weight_scales: Literal["channel", "tensor"]
    targets: tuple[str, ...]
    ignore: tuple[str, ...]
    """in the form of targets: module names, `re:` and a pattern that matches from a name's start, or `Linear` for
    all"""
    stored: bool
    """whether the checkpoint holds fp8 values and scales; otherwise they are computed while loading"""

    def covers(self, module: str) -> bool:
        """Whether `module`, which is a matrix (a tensor's name without `.weight`), is fp8."""
        return any(_matches(e, module) for e in self.targets) and not any(_matches(e, module) for e in self.ignore)


@dataclass(frozen=True)
class Mxfp4Spec:
    """Matrices in blocks of 4-bit numbers (`quantization.mxfp4`), whose names end with one of `targets`."""

    targets: tuple[str, ...]


@dataclass(frozen=True)
class IntegerSpec:
    """Matrices of integers, with inputs in int8 (`quantization.integers`); `format`: of a checkpoint's own codes."""

    scheme: IntegerScheme
    format: WidenedFormat | None = None


StoredQuantization = QuantizationSpec | Mxfp4Spec | WidenedSpec


def _matches(entry: str, module: str) -> bool:
    if entry.startswith("re:"):
        return re.match(entry.removeprefix("re:"), module) is not None
    return entry in ("Linear", module)


def resolve_quantization(
    stated: StoredQuantization | None, setting: str | None, load_format: str
) -> StoredQuantization | IntegerSpec | None:
    """The checkpoint's own quantisation, or the engine's `setting` for one without; raises ConfigError for both.

    Dummy weights are never stored quantised.
    """
    if setting is None:
        if isinstance(stated, Mxfp4Spec | WidenedSpec):
            return stated if load_format != "dummy" else None
        if stated is not None and load_format == "dummy":
            return QuantizationSpec(stated.scheme, "channel", stated.targets, stated.ignore, stored=False)
        return stated
    if setting == IntegerScheme.STORED.value and isinstance(stated, WidenedSpec) and form_of(stated.format) is not None:
        return IntegerSpec(IntegerScheme.STORED, stated.format)
    if stated is not None:
        name = _name_of(stated)
        raise ConfigError(
            f"quantization: expected None for a checkpoint that is quantised already ({name}),"
            f" found {setting!r}. Leave it out.",
            parameter="quantization",
            value=setting,
        )
    if setting in (scheme.value for scheme in IntegerScheme):
        return IntegerSpec(IntegerScheme(setting))
    return QuantizationSpec(Fp8Scheme(setting), "channel", ("Linear",), ("lm_head", "score"), stored=False)


def _name_of(stated: StoredQuantization) -> str:
    match stated:
        case Mxfp4Spec():
            return "mxfp4"
        case WidenedSpec():
            return stated.format.name
        case _:
            return stated.scheme.value


def parse_quantization(config: ConfigFields) -> QuantizationSpec | None:
    """The section `quantization_config` of fp8; None where there is none. Raises ModelError naming the field."""
    if config.raw.get("quantization_config") is None:
        return None
    fields = config.section("quantization_config")
    _require(fields, "quant_method", "compressed-tensors")
    _require(fields, "format", *FORMATS)
    _require(fields, "quantization_status", None, "compressed", "frozen")
    for name in ("kv_cache_scheme", "transform_config", "sparsity_config"):
        _require(fields, name, None, {})
    groups = fields.section("config_groups")
    if len(groups.raw) != 1:
        fields.fail("config_groups", f"one group ({SUPPORTED})", sorted(groups.raw))
    group = groups.section(next(iter(groups.raw)))
    _require(group, "format", None, *FORMATS)
    _require(group, "output_activations", None)
    weights = group.section("weights")
    _check_fp8(weights)
    _require(weights, "strategy", "channel", "tensor")
    _require(weights, "dynamic", None, False)
    scheme = Fp8Scheme.WEIGHTS
    if group.raw.get("input_activations") is not None:
        activations = group.section("input_activations")
        _check_fp8(activations)
        # a per-tensor activation scale would depend on the other requests of the batch
        _require(activations, "dynamic", True)
        _require(activations, "strategy", "token")
        scheme = Fp8Scheme.WEIGHTS_AND_ACTIVATIONS
    return QuantizationSpec(
        scheme,
        "channel" if weights.raw["strategy"] == "channel" else "tensor",
        _entries(group, "targets"),
        _entries(fields, "ignore"),
        stored=True,
    )


def _check_fp8(fields: ConfigFields) -> None:
    _require(fields, "type", "float")
    _require(fields, "num_bits", 8)
    _require(fields, "symmetric", None, True)
    for name in ("group_size", "block_structure", "actorder"):
        _require(fields, name, None)


def _require(fields: ConfigFields, name: str, *allowed: object) -> None:
    fields.one_of(name, *allowed, note=f" (supported: {SUPPORTED})")


def _entries(fields: ConfigFields, name: str) -> tuple[str, ...]:
    value = fields.raw.get(name) or []
    if not isinstance(value, list) or not all(isinstance(entry, str) for entry in value):
        fields.fail(name, "a list of module names or `re:` patterns", value)
    for entry in value:
        try:
            re.compile(entry.removeprefix("re:") if entry.startswith("re:") else "")
        except re.error as error:
            fields.fail(name, f"regular expressions after `re:` ({error})", entry)
    return tuple(value)
