"""Checkpoints in formats of fewer bits, and what the published layouts make of them, written number by number.

A writer draws random stored numbers for a matrix [N, K]; the values are computed apart from any packing.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

Tensors = dict[str, torch.Tensor]


class Written(NamedTuple):
    """The tensors of one matrix, by suffix, and its values [N, K]."""

    stored: Tensors
    values: torch.Tensor


class Case(NamedTuple):
    """A format: its `quantization_config`, and what writes a matrix of this shape."""

    config: dict[str, Any]
    write: Callable[[int, int, torch.Generator], Written]


def words_of(columns: list[list[int]], bits: int, places: list[int] | None = None) -> torch.Tensor:
    """int32 [rows, columns * bits / 32]: the numbers of each row, put into words one by one."""
    per_word = 32 // bits
    places = places or list(range(per_word))
    rows = []
    for row in columns:
        words = []
        for start in range(0, len(row), per_word):
            word = 0
            for number, place in zip(row[start : start + per_word], places, strict=False):
                word |= number << (bits * place)
            words.append(word - (1 << 32) if word >= 1 << 31 else word)
        rows.append(words)
    return torch.tensor(rows, dtype=torch.int32)


def integers(shape: tuple[int, ...], most: int, generator: torch.Generator) -> torch.Tensor:
    return torch.randint(0, most + 1, shape, generator=generator)


def scales_of(shape: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator) -> torch.Tensor:
    return (torch.rand(shape, generator=generator) * 0.02 + 0.001).to(dtype)


def product(numbers: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """numbers * scales as the scales' dtype multiplies them."""
    return numbers.to(scales.dtype) * scales


def write_awq(n: int, k: int, group: int, generator: torch.Generator) -> Written:
    numbers, zeros = integers((k, n), 15, generator), integers((k // group, n), 15, generator)
    scales = scales_of((k // group, n), torch.float16, generator)
    places = [0, 4, 1, 5, 2, 6, 3, 7]
    stored = {
        ".qweight": words_of(numbers.tolist(), 4, places),
        ".qzeros": words_of(zeros.tolist(), 4, places),
        ".scales": scales,
    }
    group_of = [i // group for i in range(k)]
    return Written(stored, product(numbers - zeros[group_of], scales[group_of]).t().contiguous())


def write_gptq(
    n: int, k: int, generator: torch.Generator, *, bits: int, group: int, order: str, version: int
) -> Written:
    most = (1 << bits) - 1
    numbers, zeros = integers((k, n), most, generator), integers((k // group, n), most - 1, generator) + 1
    scales = scales_of((k // group, n), torch.float16, generator)
    group_of = torch.arange(k) // group
    if order == "by activation":
        group_of = group_of[torch.randperm(k, generator=generator)]
    stored = {
        ".qweight": words_of(numbers.t().tolist(), bits).t().contiguous(),
        ".qzeros": words_of((zeros - int(version == 1)).tolist(), bits),
        ".scales": scales,
        ".g_idx": group_of.to(torch.int32),
    }
    return Written(stored, product(numbers - zeros[group_of], scales[group_of]).t().contiguous())


def write_packed(
    n: int, k: int, generator: torch.Generator, *, bits: int, group: int | None, zero: bool, order: bool
) -> Written:
    half, most = 1 << (bits - 1), (1 << bits) - 1
    size = group or k
    numbers = integers((n, k), most, generator) - half
    scales = scales_of((n, k // size), torch.bfloat16, generator)
    zeros = integers((n, k // size), most, generator) - half if zero else torch.zeros((n, k // size), dtype=torch.int64)
    group_of = torch.arange(k) // size
    stored = {
        ".weight_packed": words_of((numbers + half).tolist(), bits),
        ".weight_scale": scales,
        ".weight_shape": torch.tensor([n, k]),
    }
    if order:
        group_of = group_of[torch.randperm(k, generator=generator)]
        stored[".weight_g_idx"] = group_of.to(torch.int32)
    if zero:
        stored[".weight_zero_point"] = words_of((zeros + half).t().tolist(), bits).t().contiguous()
    return Written(stored, product(numbers - zeros[:, group_of], scales[:, group_of]))


def write_fp8_blocks(n: int, k: int, generator: torch.Generator) -> Written:
    weight = (torch.randn((n, k), generator=generator) * 40).to(torch.float8_e4m3fn)
    scales = torch.rand((-(-n // 128), -(-k // 128)), generator=generator) * 1e-3 + 1e-5
    values = torch.empty((n, k), dtype=torch.bfloat16)
    for row in range(0, n, 128):
        for column in range(0, k, 128):
            block = weight[row : row + 128, column : column + 128].float() * scales[row // 128, column // 128]
            values[row : row + 128, column : column + 128] = block.to(torch.bfloat16)
    return Written({".weight": weight, ".weight_scale_inv": scales}, values)


E2M1 = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]


def fours(n: int, k: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Random e2m1 numbers as bytes [N, K / 2] and as floats [N, K]."""
    codes = integers((n, k), 15, generator)
    values = torch.tensor([*E2M1, *(-value for value in E2M1)])[codes]
    return (codes[:, ::2] + 16 * codes[:, 1::2]).to(torch.uint8), values


def write_nvfp4(n: int, k: int, generator: torch.Generator, *, exporter: str) -> Written:
    packed, values = fours(n, k, generator)
    scales = (torch.rand((n, k // 16), generator=generator) * 200 + 1).to(torch.float8_e4m3fn)
    whole = torch.tensor(7.3e-5)
    wide = scales.float().repeat_interleave(16, 1)
    if exporter == "modelopt":
        stored = {".weight": packed, ".weight_scale": scales, ".weight_scale_2": whole}
        return Written({**stored, ".input_scale": torch.tensor(0.5)}, (values * (wide * whole)).to(torch.bfloat16))
    reciprocal = torch.tensor([1.0 / 7.3e-5])
    stored = {".weight_packed": packed, ".weight_scale": scales, ".weight_global_scale": reciprocal}
    return Written(
        {**stored, ".input_global_scale": torch.tensor([3.0])}, (values * (wide / reciprocal)).to(torch.bfloat16)
    )


def write_mxfp4(n: int, k: int, generator: torch.Generator) -> Written:
    packed, values = fours(n, k, generator)
    exponents = integers((n, k // 32), 8, generator) + 116
    powers = torch.pow(2.0, (exponents - 127).double()).repeat_interleave(32, 1)
    return Written(
        {".weight_packed": packed, ".weight_scale": exponents.to(torch.uint8)},
        (values.double() * powers).to(torch.bfloat16),
    )


def write_scaled(n: int, k: int, generator: torch.Generator, *, dtype: torch.dtype, channel: bool) -> Written:
    shape = (n, 1) if channel else (1,)
    scale = torch.rand(shape, generator=generator) * 1e-3 + 1e-4
    if dtype is torch.int8:
        weight, scale = (integers((n, k), 254, generator) - 127).to(dtype), scale.to(torch.bfloat16)
    else:
        weight = (torch.randn((n, k), generator=generator) * 40).to(dtype)
    values = (weight.double() * scale.double()).float().to(torch.bfloat16)
    stored = {".weight": weight, ".weight_scale": scale}
    return Written(stored if channel else {**stored, ".input_scale": torch.tensor(0.25)}, values)


def compressed(form: str, **weights: Any) -> dict[str, Any]:
    group = {"targets": ["Linear"], "weights": {"dynamic": False, **weights}, "input_activations": None}
    return {
        "quant_method": "compressed-tensors",
        "format": form,
        "ignore": ["lm_head"],
        "config_groups": {"group_0": group},
    }


def with_inputs(config: dict[str, Any], **fields: Any) -> dict[str, Any]:
    """With inputs of 8 bits too."""
    inputs = {"num_bits": 8, "symmetric": True, "dynamic": True, "strategy": "token", **fields}
    if not inputs["dynamic"]:
        inputs["strategy"] = "tensor"
    config["config_groups"]["group_0"]["input_activations"] = inputs
    return config


def gptq(*, bits: int = 4, group: int = 32, order: str = "plain", version: int = 1) -> Case:
    config = {"quant_method": "gptq", "bits": bits, "group_size": group, "desc_act": order != "plain", "sym": False,
              "checkpoint_format": "gptq" if version == 1 else "gptq_v2"}  # fmt: skip
    return Case(config, lambda n, k, g: write_gptq(n, k, g, bits=bits, group=group, order=order, version=version))


def packed(*, bits: int = 4, group: int | None = 32, zero: bool = False, order: bool = False) -> Case:
    config = compressed(
        "pack-quantized", type="int", num_bits=bits, symmetric=not zero, strategy="group" if group else "channel",
        group_size=group, actorder="group" if order else None,
    )  # fmt: skip
    return Case(config, lambda n, k, g: write_packed(n, k, g, bits=bits, group=group, zero=zero, order=order))


def awq(group: int) -> Case:
    config = {"quant_method": "awq", "bits": 4, "group_size": group, "zero_point": True, "version": "gemm"}
    return Case(config, lambda n, k, g: write_awq(n, k, group, g))


CASES = {
    "awq-32": awq(32),
    "awq-64": awq(64),
    "gptq": gptq(),
    "gptq-act-order": gptq(order="by activation"),
    "gptq-8-v2": gptq(bits=8, group=64, version=2),
    "int4-32": packed(),
    "int4-64-zero": packed(group=64, zero=True),
    "int4-act-order": packed(zero=True, order=True),
    "int8-channel": packed(bits=8, group=None),
    "int8-128-zero": packed(bits=8, group=128, zero=True),
    "fp8-blocks": Case(
        {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [128, 128]},
        write_fp8_blocks,
    ),
    "w8a8-int8": Case(
        with_inputs(
            compressed("int-quantized", type="int", num_bits=8, symmetric=True, strategy="channel"), type="int"
        ),
        lambda n, k, g: write_scaled(n, k, g, dtype=torch.int8, channel=True),
    ),
    "fp8-static": Case(
        with_inputs(
            compressed("float-quantized", type="float", num_bits=8, strategy="tensor"), type="float", dynamic=False
        ),
        lambda n, k, g: write_scaled(n, k, g, dtype=torch.float8_e4m3fn, channel=False),
    ),
    "fp8-static-method": Case(
        {"quant_method": "fp8", "activation_scheme": "static"},
        lambda n, k, g: write_scaled(n, k, g, dtype=torch.float8_e4m3fn, channel=False),
    ),
    "nvfp4-modelopt": Case(
        {"quant_method": "modelopt", "quant_algo": "NVFP4"},
        lambda n, k, g: write_nvfp4(n, k, g, exporter="modelopt"),
    ),
    "nvfp4": Case(
        compressed(
            "nvfp4-pack-quantized", type="float", num_bits=4, symmetric=True, strategy="tensor_group", group_size=16
        ),
        lambda n, k, g: write_nvfp4(n, k, g, exporter="compressed-tensors"),
    ),
    "mxfp4": Case(
        compressed("mxfp4-pack-quantized", type="float", num_bits=4, symmetric=True, strategy="group", group_size=32),
        write_mxfp4,
    ),
}


def quantize_checkpoint(tensors: Tensors, case: Case, seed: int = 0) -> tuple[Tensors, Tensors]:
    """Every `_proj` matrix replaced by random numbers of the format; the same with its values. Both as checkpoints."""
    generator = torch.Generator().manual_seed(seed)
    stored, wide = {}, {}
    for name, tensor in tensors.items():
        if name.endswith("_proj.weight"):
            written = case.write(tensor.shape[0], tensor.shape[1], generator)
            stored |= {name.removesuffix(".weight") + suffix: part for suffix, part in written.stored.items()}
            wide[name] = written.values
        else:
            stored[name] = wide[name] = tensor
    return stored, wide
