"""PEFT folders of random adapters for a checkpoint's own modules, written as PEFT writes them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from sempre.ipc.adapter_files import CONFIG_FILE, WEIGHTS_FILE, adapter_digest
from sempre.ipc.messages import AdapterSpec

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
ALL = (*ATTENTION, "gate_proj", "up_proj", "down_proj")
TINY_LAYERS = 6
# [N, K] of the modules of `tiny`
TINY_SHAPES = {
    "q_proj": (384, 384),
    "k_proj": (128, 384),
    "v_proj": (128, 384),
    "o_proj": (384, 384),
    "gate_proj": (896, 384),
    "up_proj": (896, 384),
    "down_proj": (384, 896),
}
PREFIX = "base_model.model."


def tiny_modules(names: Sequence[str] = ALL) -> dict[str, tuple[int, int]]:
    """Modules of `tiny` by name, with [N, K]."""
    return {
        f"model.layers.{layer}.{'self_attn' if name in ATTENTION else 'mlp'}.{name}": TINY_SHAPES[name]
        for layer in range(TINY_LAYERS)
        for name in names
    }


def save_adapter(
    folder: Path,
    modules: Mapping[str, tuple[int, int]],
    *,
    rank: int = 8,
    seed: int = 0,
    size: float = 0.05,
    dtype: torch.dtype = torch.float32,
    changes: Mapping[str, Any] | None = None,
) -> Path:
    """An adapter of these modules, [N, K] each, whose A and B are random; `changes` go into its config."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, (rows, columns) in modules.items():
        tensors[f"{PREFIX}{name}.lora_A.weight"] = torch.randn(rank, columns, generator=generator) * size
        tensors[f"{PREFIX}{name}.lora_B.weight"] = torch.randn(rows, rank, generator=generator) * size
    folder.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.to(dtype) for name, tensor in tensors.items()}, folder / WEIGHTS_FILE)
    config = {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": 2 * rank,
        "target_modules": sorted({name.rpartition(".")[2] for name in modules}),
        "base_model_name_or_path": "tiny",
        "bias": "none",
        "modules_to_save": None,
        "lora_dropout": 0.1,
        "task_type": "CAUSAL_LM",
    }
    (folder / CONFIG_FILE).write_text(json.dumps(config | dict(changes or {})))
    return folder


def adapter_spec(folder: Path, name: str | None = None) -> AdapterSpec:
    """As an engine sends it."""
    return AdapterSpec(name=name or folder.name, path=str(folder), digest=adapter_digest(folder))
