"""Which format a checkpoint's `quantization_config` describes."""

from __future__ import annotations

from collections.abc import Callable

from sempre.workers.config_fields import ConfigFields
from sempre.workers.quantization.awq import parse_awq
from sempre.workers.quantization.config import FORMATS, StoredQuantization, parse_quantization
from sempre.workers.quantization.fp8_blocks import parse_fp8_blocks
from sempre.workers.quantization.gptq import parse_gptq
from sempre.workers.quantization.mxfp4 import parse_mxfp4_packed
from sempre.workers.quantization.nvfp4 import parse_compressed, parse_modelopt
from sempre.workers.quantization.pack_quantized import parse_pack_quantized
from sempre.workers.quantization.scaled import parse_fp8_of_tensors, parse_int_quantized, parse_static_fp8
from sempre.workers.quantization.widened import WidenedFormat, WidenedSpec


def _parse_fp8(fields: ConfigFields) -> WidenedFormat:
    has_blocks = fields.raw.get("weight_block_size") is not None
    return parse_fp8_blocks(fields) if has_blocks else parse_fp8_of_tensors(fields)


METHODS: dict[str, Callable[[ConfigFields], WidenedFormat]] = {
    "awq": parse_awq,
    "gptq": parse_gptq,
    "fp8": _parse_fp8,
    "modelopt": parse_modelopt,
}
"""By `quant_method`; beside these, compressed-tensors."""
STATIC_FP8 = "float-quantized, static"
"""the name here of those of `FORMATS` whose inputs have scales"""
COMPRESSED: dict[str, Callable[[ConfigFields], WidenedFormat]] = {
    "pack-quantized": parse_pack_quantized,
    "int-quantized": parse_int_quantized,
    STATIC_FP8: parse_static_fp8,
    "nvfp4-pack-quantized": parse_compressed,
    "mxfp4-pack-quantized": parse_mxfp4_packed,
}
"""Formats of compressed-tensors; each parses the only group of `config_groups`."""


def _has_static_inputs(fields: ConfigFields) -> bool:
    """Whether all groups have scales of inputs."""
    groups = fields.section("config_groups")
    inputs = [groups.section(name).section("input_activations").raw for name in groups.raw]
    return bool(inputs) and all(each.get("dynamic") is False for each in inputs)


def parse_stored(config: ConfigFields) -> StoredQuantization | None:
    """The section `quantization_config`; None where there is none. Raises ModelError naming the field."""
    if config.raw.get("quantization_config") is None:
        return None
    fields = config.section("quantization_config")
    method = fields.raw.get("quant_method")
    if isinstance(method, str) and method in METHODS:
        return WidenedSpec(METHODS[method](fields))
    named = fields.raw.get("format")
    if named in FORMATS and method == "compressed-tensors" and _has_static_inputs(fields):
        named = STATIC_FP8
    if method != "compressed-tensors" or not isinstance(named, str) or named not in COMPRESSED:
        return parse_quantization(config)
    for name in ("kv_cache_scheme", "transform_config", "sparsity_config"):
        fields.one_of(name, None, {})
    groups = fields.section("config_groups")
    if len(groups.raw) != 1:
        fields.fail("config_groups", "one group", sorted(groups.raw))
    group = groups.section(next(iter(groups.raw)))
    group.one_of("format", None, named, *(FORMATS if named == STATIC_FP8 else ()))
    group.one_of("output_activations", None)
    return WidenedSpec(COMPRESSED[named](group))
