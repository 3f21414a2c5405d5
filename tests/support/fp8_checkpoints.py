"""Checkpoints in the compressed-tensors layout for fp8, written with safetensors."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from sempre.engine.models import resolve_model


def quantization_config(scheme: str, scales: str, ignore: Sequence[str] = ("lm_head",)) -> dict[str, Any]:
    """The section of a config.json; `scheme` fp8 or fp8_weight_only, `scales` channel or tensor."""
    common = {"num_bits": 8, "type": "float", "symmetric": True, "group_size": None, "block_structure": None}
    activations = {**common, "dynamic": True, "strategy": "token", "observer": None}
    weights = {**common, "dynamic": False, "strategy": scales, "observer": "minmax"}
    return {
        "quant_method": "compressed-tensors",
        "format": "float-quantized",
        "quantization_status": "compressed",
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
        "ignore": list(ignore),
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": weights,
                "input_activations": activations if scheme == "fp8" else None,
                "output_activations": None,
            }
        },
    }


def quantize_tensors(tensors: dict[str, torch.Tensor], scales: str, *, head: bool = False) -> dict[str, torch.Tensor]:
    """Every `_proj` matrix and those of Mixtral's experts, and `lm_head` if wanted, in fp8 with a scale beside it."""
    quantized: dict[str, torch.Tensor] = {}
    for name, tensor in tensors.items():
        if name.endswith(("_proj.weight", ".w1.weight", ".w2.weight", ".w3.weight")) or (
            head and name == "lm_head.weight"
        ):
            wide = tensor.float()
            amax = wide.abs().amax(1, keepdim=True) if scales == "channel" else wide.abs().max().reshape(1)
            scale = amax / 448.0
            quantized[name] = (wide / scale).to(torch.float8_e4m3fn)
            quantized[name + "_scale"] = scale
        else:
            quantized[name] = tensor
    return quantized


def write_tiny(folder: Path, scheme: str, scales: str) -> Path:
    """The model `tiny` as such a checkpoint."""
    source = resolve_model("tiny").path
    for name in ("generation_config.json", "tokenizer.json", "tokenizer_config.json"):
        shutil.copy(source / name, folder / name)
    config = json.loads((source / "config.json").read_text())
    config["quantization_config"] = quantization_config(scheme, scales)
    (folder / "config.json").write_text(json.dumps(config))
    save_file(quantize_tensors(load_file(source / "model.safetensors"), scales), folder / "model.safetensors")
    return folder
