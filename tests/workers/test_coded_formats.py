"""Checkpoints whose matrices stay packed: loading gives kernels the values, and the digest, that widening gives."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from quantized_checkpoints import CASES, quantize_checkpoint
from safetensors.torch import load_file, save_file
from worker_settings import worker_config

from sempre.ipc.errors import TensorMismatch
from sempre.kernels.linear import ControlLinearWeight
from sempre.kernels.packed import Codes
from sempre.workers.layers.linear_kernel import CONTROL
from sempre.workers.loading import Loaded, Placement, load_model
from sempre.workers.models.registry import load_spec
from sempre.workers.quantization.coded import quantize_groups

CPU = torch.device("cpu")
PACKING = Placement(CPU, lambda tensor: tensor, hashing_threads=2, packs=True)
WIDENING = Placement(CPU, lambda tensor: tensor, hashing_threads=2)
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 96,
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
}
SHAPES = {"q": (128, 128), "k": (64, 128), "v": (64, 128), "o": (128, 128)}
MLP = {"gate": (192, 128), "up": (192, 128), "down": (128, 192)}
# by format, with the engine's dtype; the others are widened
PACKED = {
    "awq-32": "float16",
    "awq-64": "bfloat16",
    "gptq": "float16",
    "int4-32": "bfloat16",
    "int4-64-zero": "float16",
    "int8-channel": "bfloat16",
    "mxfp4": "bfloat16",
}


class Recorded:
    """A kernel that keeps the codes it packs, and multiplies by what they stand for."""

    def __init__(self) -> None:
        self.packed: list[Codes] = []
        self.kernel = CONTROL._replace(pack_codes=self._pack)

    def _pack(self, matrices: list[Codes], bias: torch.Tensor | None, dtype: torch.dtype) -> ControlLinearWeight:
        self.packed += matrices
        return ControlLinearWeight(torch.cat([matrix.values().to(dtype) for matrix in matrices]), bias)


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    def make(name: str) -> Path:
        generator = torch.Generator().manual_seed(5)
        layer = "model.layers.0."
        stored, _ = quantize_checkpoint(_floats(generator), CASES[name])
        stored["model.embed_tokens.weight"] = torch.randn(96, 128, generator=generator).half()
        for norm in ("input_layernorm", "post_attention_layernorm"):
            stored[f"{layer}{norm}.weight"] = torch.ones(128)
        stored["model.norm.weight"] = torch.ones(128)
        config = {**CONFIG, "quantization_config": CASES[name].config}
        (tmp_path / "config.json").write_text(json.dumps(config))
        save_file({key: value.contiguous() for key, value in stored.items()}, tmp_path / "model.safetensors")
        return tmp_path

    return make


def _floats(generator: torch.Generator) -> dict[str, torch.Tensor]:
    shapes = {f"self_attn.{part}": shape for part, shape in SHAPES.items()}
    shapes |= {f"mlp.{part}": shape for part, shape in MLP.items()}
    return {f"model.layers.0.{n}_proj.weight": torch.randn(s, generator=generator) for n, s in shapes.items()}


def _load(folder: Path, placement: Placement, **settings: Any) -> tuple[Loaded, list[Codes]]:
    recorded = Recorded()
    loaded = load_model(worker_config(folder, **settings), load_spec(folder), recorded.kernel, placement)
    return loaded, recorded.packed


def _matrices(loaded: Loaded, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    weights = {path: linear.weight for path, linear in loaded.model.linears()}
    assert all(isinstance(weight, ControlLinearWeight) for weight in weights.values())
    return {path: weight.weight.to(dtype) for path, weight in weights.items()}  # type: ignore[attr-defined]


@pytest.mark.parametrize(("name", "dtype"), PACKED.items())
def test_packed_matrices_are_those_that_widening_gives(name: str, dtype: str, write: Any) -> None:
    folder = write(name)
    loaded, packed = _load(folder, PACKING, dtype=dtype)
    widened, none = _load(folder, WIDENING, dtype=dtype)
    assert none == []
    assert len(packed) == len(SHAPES) + len(MLP)
    found, expected = (_matrices(each, getattr(torch, dtype)) for each in (loaded, widened))
    assert found.keys() == expected.keys()
    for path, values in expected.items():
        assert torch.equal(found[path], values), path
    # the checkpoint's digest does not tell how its matrices are kept
    assert loaded.facts.digest == widened.facts.digest


@pytest.mark.parametrize("case", ["gptq-act-order float16", "awq-32 float32", "mxfp4 float16"])
def test_what_kernels_do_not_take_is_widened(case: str, write: Any) -> None:
    name, dtype = case.split()
    folder = write(name)
    loaded, packed = _load(folder, PACKING, dtype=dtype)
    assert packed == []
    widened, _ = _load(folder, WIDENING, dtype=dtype)
    for path, values in _matrices(widened, torch.float32).items():
        assert torch.equal(_matrices(loaded, torch.float32)[path], values), path


def test_a_scale_that_makes_an_infinite_value_is_refused(write: Any) -> None:
    folder = write("awq-32")
    tensors = load_file(folder / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.scales"
    tensors[name][0, 3] = float("inf")
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(TensorMismatch, match=r"up_proj.*finite"):
        _load(folder, PACKING, dtype="float16")


@pytest.mark.parametrize("setting", ["int4", "int8"])
def test_floats_are_quantised_in_groups_while_loading(setting: str, write: Any) -> None:
    folder = write("awq-32")
    tensors = load_file(folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    del config["quantization_config"]
    (folder / "config.json").write_text(json.dumps(config))
    plain = {name: tensor for name, tensor in tensors.items() if not name.endswith(("qweight", "qzeros", "scales"))}
    generator = torch.Generator().manual_seed(6)
    plain |= _floats(generator)
    save_file(plain, folder / "model.safetensors")
    loaded, packed = _load(folder, PACKING, dtype="bfloat16", quantization=setting)
    # 192 inputs are no multiple of 128
    assert {matrix.form.group for matrix in packed} == {64, 128}
    weight = plain["model.layers.0.mlp.down_proj.weight"]
    found = _matrices(loaded, torch.bfloat16)["model.layers.0.mlp.down_proj"]
    assert torch.equal(found, quantize_groups(weight, packed[-1].form, torch.bfloat16).values())
    error = (found.float() - weight).norm() / weight.norm()
    assert error < (0.12 if setting == "int4" else 0.01)
    assert loaded.facts.quantization is not None
    assert loaded.facts.quantization.value == setting
