"""gpt-oss: experts in MXFP4 have the bits of the same values in floats, and what does not fit is named."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers.integrations.mxfp4 import convert_moe_packed_tensors
from worker_settings import worker_config

from sempre.ipc.errors import ConfigError, ModelError, TensorMismatch
from sempre.ipc.messages import SamplingSpec
from sempre.kernels.packed.codes import MAGNITUDES
from sempre.workers.layers.linear_kernel import INVARIANT
from sempre.workers.layers.module import Build, parameters
from sempre.workers.loading import Loaded, load_model
from sempre.workers.models.registry import build_model, load_spec, parse_spec
from sempre.workers.quantization.mxfp4 import Mxfp4Quantization, widen
from sempre.workers.quantization.plain import NotQuantized

QUANTIZED = {
    "quant_method": "mxfp4",
    "modules_to_not_convert": [
        "model.layers.*.self_attn",
        "model.layers.*.mlp.router",
        "model.embed_tokens",
        "lm_head",
    ],
}
GATE_UP = "model.layers.1.mlp.experts.gate_up_proj"
PARAMS = SamplingSpec(max_tokens=8, temperature=0.0, logprobs=-1, prompt_logprobs=-1)


def load(folder: Path, **settings: Any) -> Loaded:
    return load_model(worker_config(folder, **settings), load_spec(folder), INVARIANT)


def write(folder: Path, config: dict[str, Any], tensors: dict[str, torch.Tensor]) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")
    return folder


@pytest.fixture
def packed(checkpoints: Any, tmp_path: Path) -> Callable[..., tuple[Path, Path]]:
    """edit of the tensors → a checkpoint in MXFP4, and one that holds in bfloat16 what transformers makes of it."""

    def make(edit: Callable[[dict[str, torch.Tensor]], object] = lambda _: None) -> tuple[Path, Path]:
        source = checkpoints("gpt-oss").folder
        config = json.loads((source / "config.json").read_text())
        config["intermediate_size"] = 96
        generator = torch.Generator().manual_seed(3)
        tensors = {name: t for name, t in load_file(source / "model.safetensors").items() if ".experts." not in name}
        wide = dict(tensors)
        for layer in range(config["num_hidden_layers"]):
            for name, outputs, inputs in (("gate_up_proj", 192, 64), ("down_proj", 64, 96)):
                path = f"model.layers.{layer}.mlp.experts.{name}"
                blocks = torch.randint(0, 256, (8, outputs, inputs // 32, 16), generator=generator).to(torch.uint8)
                scales = torch.randint(122, 127, (8, outputs, inputs // 32), generator=generator).to(torch.uint8)
                bias = torch.randn(8, outputs, generator=generator).bfloat16()
                tensors |= {path + "_blocks": blocks, path + "_scales": scales, path + "_bias": bias}
                wide |= {path: convert_moe_packed_tensors(blocks, scales), path + "_bias": bias}
        edit(tensors)
        return (
            write(tmp_path / "packed", {**config, "quantization_config": QUANTIZED}, tensors),
            write(tmp_path / "wide", config, wide),
        )

    return make


def test_every_code_and_scale_is_exact() -> None:
    codes = torch.arange(256).to(torch.uint8)
    for scale in range(253):
        wide = widen(codes.view(1, 16, 16), torch.full((1, 16), scale).to(torch.uint8))
        assert wide.dtype == torch.bfloat16
        expected = [
            math.copysign(math.ldexp(MAGNITUDES[code & 7], scale - 127), -1 if code & 8 else 1)
            for byte in range(256)
            for code in (byte & 15, byte >> 4)
        ]
        found = wide[0].double().tolist()
        assert found == expected
        assert [math.copysign(1, value) for value in found] == [math.copysign(1, value) for value in expected]


def test_bits_are_those_of_the_same_values_in_floats(packed: Any, serve: Any, prompt: Any) -> None:
    narrow, wide = packed()
    ids = [3 + 7919 * i % 317 for i in range(50)]
    runs = [serve(folder).run(prompt("a", ids, PARAMS))["a"] for folder in (narrow, wide)]
    assert runs[0].errors == []
    assert runs[0] == runs[1]
    facts = [load(folder, dtype="float32").facts for folder in (narrow, wide)]
    assert facts[0].nbytes == facts[1].nbytes
    assert facts[0].digest != facts[1].digest


def test_as_much_memory_is_expected_as_floats_take(packed: Any) -> None:
    narrow, wide = packed()
    assert load_spec(narrow) != load_spec(wide)
    counts = []
    for folder in (narrow, wide):
        spec = load_spec(folder)
        formats = Mxfp4Quantization(spec.quantization) if spec.quantization is not None else NotQuantized()
        read = parameters(build_model(Build(INVARIANT, formats), spec)).values()
        counts.append(sum(math.prod(parameter.shape) * parameter.elements for parameter in read))
    assert counts[0] == counts[1]


def test_dummy_weights_are_floats(packed: Any) -> None:
    narrow, wide = packed()
    facts = [load(folder, load_format="dummy").facts for folder in (narrow, wide)]
    assert facts[0] == facts[1]


def test_the_setting_quantization_is_for_floats(packed: Any, serve: Any, prompt: Any) -> None:
    narrow, wide = packed()
    with pytest.raises(ConfigError, match=r"a checkpoint that is quantised already \(mxfp4\)"):
        load(narrow, quantization="fp8_weight_only")
    params = msgspec.structs.replace(PARAMS, max_tokens=3)
    ids = [3 + 7919 * i % 317 for i in range(30)]
    serving = serve(wide, quantization="fp8_weight_only")
    alone = serving.run(prompt("a", ids, params))["a"]
    beside = serving.run(prompt("b", ids[::-1], params), prompt("a", ids, params, chunks=(7, 9)))["a"]
    assert alone.token_ids == beside.token_ids
    assert alone.logprobs == beside.logprobs


def _large_scale(tensors: dict[str, torch.Tensor]) -> None:
    tensors[GATE_UP + "_scales"][3, 5, 1] = 253


@pytest.mark.parametrize(
    ("edit", "tensor", "expected", "found"),
    [
        (lambda t: t.pop(GATE_UP + "_scales"), GATE_UP + "_scales", "shape [8, 192, 2]", "nothing"),
        (lambda t: t.pop(GATE_UP + "_bias"), GATE_UP + "_bias", "shape [8, 192]", "nothing"),
        (lambda t: t.update({GATE_UP: torch.ones(8, 64, 192)}), GATE_UP, "no such tensor", "shape [8, 64, 192]"),
        (
            lambda t: t.update({GATE_UP + "_blocks": torch.ones(8, 192, 2, 16)}),
            GATE_UP + "_blocks",
            "dtype U8",
            "dtype F32",
        ),
        (
            lambda t: t.update({GATE_UP + "_blocks": torch.ones(8, 192, 32, dtype=torch.uint8)}),
            GATE_UP + "_blocks",
            "shape [8, 192, 2, 16]",
            "shape [8, 192, 32]",
        ),
        (_large_scale, GATE_UP + "_scales", "scales of at most 252 (2 ** 125)", "253"),
        (
            lambda t: t.pop("model.layers.0.self_attn.sinks"),
            "model.layers.0.self_attn.sinks",
            "a tensor of shape [4]",
            "nothing",
        ),
    ],
    ids=["no scales", "no biases", "floats too", "blocks of floats", "other blocks", "large scale", "no sinks"],
)
def test_a_wrong_tensor_is_named(edit: Any, tensor: str, expected: str, found: str, packed: Any) -> None:
    with pytest.raises(TensorMismatch) as caught:
        load(packed(edit)[0])
    assert caught.value.tensor == tensor
    assert expected in caught.value.expected
    assert caught.value.found == found


def test_widths_that_are_no_whole_blocks_are_refused() -> None:
    config = {"architectures": ["GptOssForCausalLM"], "quantization_config": QUANTIZED}
    for name in ("hidden_size", "intermediate_size"):
        with pytest.raises(ModelError, match=f"{name}: expected a multiple of 32 for experts in MXFP4, found 2896"):
            parse_spec({**config, name: 2896}, {})


def test_other_families_are_not_taken_for_mxfp4(config_of: Any) -> None:
    with pytest.raises(ModelError, match="quantization_config: quant_method: expected 'compressed-tensors'"):
        parse_spec({**config_of("mixtral"), "quantization_config": QUANTIZED}, {})
