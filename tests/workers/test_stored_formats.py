"""Checkpoints in formats of fewer bits: values of published layouts, bits of the same values in floats, refusals."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from quantized_checkpoints import CASES, Tensors, quantize_checkpoint
from safetensors.torch import load_file, save_file
from worker_settings import worker_config

from sempre.ipc.errors import ConfigError, ModelError, TensorMismatch
from sempre.ipc.messages import SamplingSpec
from sempre.workers.config_fields import ConfigFields
from sempre.workers.layers.linear_kernel import INVARIANT
from sempre.workers.loading import Loaded, load_model
from sempre.workers.models.registry import load_spec
from sempre.workers.quantization.stored import parse_stored
from sempre.workers.quantization.widened import WidenedSource, WidenedSpec
from sempre.workers.tensor_source import open_safetensors

PARAMS = SamplingSpec(max_tokens=8, temperature=0.7, logprobs=3, prompt_logprobs=3)
IDS = [3 + 7919 * i % 317 for i in range(40)]
MOE = ("awq-32", "gptq-act-order", "int4-32", "fp8-blocks", "nvfp4")


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Checkpoints whose widths have groups of 128."""
    common: dict[str, Any] = {
        "vocab_size": 320, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128, "bos_token_id": 1,
        "eos_token_id": 2,
    }  # fmt: skip
    configs = {
        "llama": transformers.LlamaConfig(**common),
        "qwen3-moe": transformers.Qwen3MoeConfig(
            **common, head_dim=32, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=128
        ),
    }
    made: dict[str, Path] = {}

    def make(family: str) -> Path:
        if family not in made:
            torch.manual_seed(2)
            folder = made[family] = tmp_path_factory.mktemp(family)
            model = transformers.AutoModelForCausalLM.from_config(configs[family])
            model.save_pretrained(folder)
        return made[family]

    return make


Edit = Callable[[Tensors], object]


@pytest.fixture
def quantized(sources: Any, tmp_path: Path) -> Callable[..., tuple[Path, Path]]:
    """A checkpoint in a format, and one of its values in floats."""

    def make(name: str, family: str = "llama", edit: Edit = lambda _: None, **changes: object) -> tuple[Path, Path]:
        source, case = sources(family), CASES[name]
        tensors = load_file(source / "model.safetensors")
        stored, wide = quantize_checkpoint(separate(tensors), case)
        edit(stored)
        config = json.loads((source / "config.json").read_text())
        folders = tmp_path / f"{name}-stored", tmp_path / f"{name}-wide"
        sections = {"quantization_config": {**case.config, **changes}}, {}
        for folder, own, section in zip(folders, (stored, wide), sections, strict=True):
            folder.mkdir()
            (folder / "config.json").write_text(json.dumps({**config, **section}))
            save_file({key: tensor.contiguous() for key, tensor in own.items()}, folder / "model.safetensors")
        return folders

    return make


def separate(tensors: Tensors) -> Tensors:
    """Each expert with tensors of its own."""
    found: Tensors = {}
    for name, tensor in tensors.items():
        base, _, kind = name.rpartition(".")
        if not base.endswith(".experts"):
            found[name] = tensor
        for expert in range(tensor.shape[0] if base.endswith(".experts") else 0):
            parts = {"down_proj": tensor[expert]}
            if kind == "gate_up_proj":
                parts = dict(zip(("gate_proj", "up_proj"), tensor[expert].chunk(2), strict=True))
            found |= {f"{base}.{expert}.{part}.weight": rows for part, rows in parts.items()}
    return found


def load(folder: Path, **settings: Any) -> Loaded:
    return load_model(worker_config(folder, **settings), load_spec(folder), INVARIANT)


@pytest.mark.parametrize("name", CASES)
def test_values_are_those_of_the_published_layout(name: str, quantized: Any) -> None:
    stored, wide = quantized(name)
    spec = load_spec(stored).quantization
    assert isinstance(spec, WidenedSpec)
    with open_safetensors(stored) as opened, open_safetensors(wide) as expected:
        source = WidenedSource(opened, spec.format)
        assert set(source.names()) == set(expected.names())
        for tensor in expected.names():
            found = source.read(tensor)
            assert found.dtype == expected.read(tensor).dtype, tensor
            assert torch.equal(found, expected.read(tensor)), tensor
            assert source.dtype_name(tensor) == expected.dtype_name(tensor)
            assert source.shape(tensor) == expected.shape(tensor)


@pytest.mark.parametrize(("name", "family"), [*((name, "llama") for name in CASES), *((n, "qwen3-moe") for n in MOE)])
def test_bits_are_those_of_the_same_values_in_floats(
    name: str, family: str, quantized: Any, serve: Any, prompt: Any
) -> None:
    folders = quantized(name, family)
    runs = [serve(folder, dtype="float32").run(prompt("a", IDS, PARAMS))["a"] for folder in folders]
    assert runs[0].errors == []
    assert runs[0] == runs[1]
    other = serve(quantized_again(folders[1]), dtype="float32").run(prompt("a", IDS, PARAMS))["a"]
    assert other != runs[0]


def quantized_again(wide: Path) -> Path:
    """The control: one number of one matrix is another."""
    path = wide / "model.safetensors"
    tensors = load_file(path)
    tensors["model.layers.1.self_attn.o_proj.weight"][3, 5] += 0.5
    save_file(tensors, path)
    return wide


def test_digests_tell_what_is_stored(quantized: Any) -> None:
    stored, wide = quantized("int4-32")
    assert load(stored).facts.digest == load(stored).facts.digest != load(wide).facts.digest


O_PROJ = "model.layers.1.self_attn.o_proj"


def drop(suffix: str) -> Edit:
    return lambda tensors: tensors.pop(O_PROJ + suffix)


def change(suffix: str, make: Callable[[torch.Tensor], torch.Tensor]) -> Edit:
    return lambda tensors: tensors.update({O_PROJ + suffix: make(tensors[O_PROJ + suffix])})


@pytest.mark.parametrize(
    ("name", "edit", "named"),
    [
        ("awq-32", drop(".qzeros"), r"o_proj\.qzeros': expected a tensor of shape \[4, 16\] \(awq\), found nothing"),
        ("awq-32", drop(".scales"), r"o_proj"),
        ("awq-32", change(".scales", lambda t: t[:2]), r"o_proj\.scales': expected shape \[4, 128\]"),
        ("awq-32", change(".scales", lambda t: t.float()), r"o_proj\.scales': expected dtype F16, BF16"),
        ("awq-32", change(".scales", lambda t: t * float("inf")), r"scales that make finite values"),
        ("gptq", drop(".g_idx"), r"o_proj\.g_idx': expected a tensor"),
        ("gptq", change(".g_idx", lambda t: t + 1), r"numbers of gptq, found \.g_idx from 1 to 4, of 4 groups"),
        ("int4-act-order", change(".weight_g_idx", lambda t: t - 1), r"\.weight_g_idx from -1 to 2"),
        ("int4-32", change(".weight_shape", lambda t: t + 1), r"\.weight_shape \[129, 129\] of a matrix \[128, 128\]"),
        ("int4-32", lambda t: t.update({O_PROJ + ".weight_zero_point": torch.zeros(1)}), r"no such tensor"),
        ("int4-64-zero", drop(".weight_zero_point"), r"weight_zero_point': expected a tensor of shape \[16, 2\]"),
        ("fp8-blocks", change(".weight_scale_inv", lambda t: t[:, :0]), r"weight_scale_inv"),
        ("nvfp4-modelopt", drop(".weight_scale_2"), r"weight_scale_2': expected a tensor of shape \[1\]"),
        ("mxfp4", change(".weight_scale", lambda t: t * 0 + 255), r"scales that make finite values"),
        ("int4-32", change(".weight_packed", lambda t: t[None]), r"two dimensions"),
    ],
)
def test_tensors_that_do_not_fit_are_named(name: str, edit: Edit, named: str, quantized: Any) -> None:
    with pytest.raises(TensorMismatch, match=named):
        load(quantized(name, edit=edit)[0])


def test_a_group_that_does_not_divide_is_named(quantized: Any) -> None:
    stored, _ = quantized("awq-32", group_size=48)
    with pytest.raises(TensorMismatch, match=r"awq, found .*256 inputs are not a multiple of the group size 48"):
        load(stored)


def test_a_checkpoint_without_such_tensors_is_refused(quantized: Any) -> None:
    _, wide = quantized("awq-32")
    config = json.loads((wide / "config.json").read_text())
    (wide / "config.json").write_text(json.dumps({**config, "quantization_config": CASES["awq-32"].config}))
    with pytest.raises(TensorMismatch, match=r"expected matrices of awq, as config.json says, found none"):
        load(wide)


def test_a_quantised_checkpoint_is_not_quantised_again(quantized: Any) -> None:
    stored, _ = quantized("gptq")
    with pytest.raises(ConfigError, match=r"quantised already \(gptq\)"):
        load(stored, quantization="fp8")


def test_dummy_weights_are_floats(quantized: Any) -> None:
    stored, wide = quantized("awq-64")
    facts = [load(folder, load_format="dummy").facts for folder in (stored, wide)]
    assert facts[0] == facts[1]


def edited(name: str, **changes: object) -> dict[str, object]:
    return {**CASES[name].config, **changes}


def edited_weights(name: str, **changes: object) -> dict[str, object]:
    config = json.loads(json.dumps(CASES[name].config))
    config["config_groups"]["group_0"]["weights"] |= changes
    return config


@pytest.mark.parametrize(
    ("config", "field", "found"),
    [
        (edited("awq-32", bits=8), "bits", "8"),
        (edited("awq-32", version="gemv"), "version", "'gemv'"),
        (edited("awq-32", zero_point=False), "zero_point", "False"),
        (edited("awq-32", group_size=0), "group_size", "0"),
        (edited("gptq", bits=3), "bits", "3"),
        (edited("gptq", checkpoint_format="marlin"), "checkpoint_format", "'marlin'"),
        (edited("gptq", dynamic={"x": 1}), "dynamic", "'x'"),
        (edited("fp8-blocks", activation_scheme="static"), "activation_scheme", "'static'"),
        (edited("fp8-static-method", activation_scheme="none"), "activation_scheme", "'none'"),
        (edited_weights("w8a8-int8", num_bits=4), "num_bits", "4"),
        (edited_weights("w8a8-int8", symmetric=False), "symmetric", "False"),
        (edited_weights("fp8-static", strategy="block"), "strategy", "'block'"),
        (edited("fp8-blocks", weight_block_size=[128]), "weight_block_size", "128"),
        (edited("fp8-blocks", scale_fmt="ue8m0"), "scale_fmt", "'ue8m0'"),
        (edited("nvfp4-modelopt", quant_algo="FP8"), "quant_algo", "'FP8'"),
        (edited("nvfp4-modelopt", kv_cache_quant_algo="FP8"), "kv_cache_quant_algo", "'FP8'"),
        (edited("int4-32", kv_cache_scheme={"num_bits": 8}), "kv_cache_scheme", "num_bits"),
        (edited("int4-32", config_groups={}), "config_groups", "[]"),
        (edited_weights("int4-32", num_bits=3), "num_bits", "3"),
        (edited_weights("int4-32", strategy="block"), "strategy", "'block'"),
        (edited_weights("int4-32", actorder="dynamic"), "actorder", "'dynamic'"),
        (edited_weights("nvfp4", group_size=32), "group_size", "32"),
        ({"quant_method": "bitsandbytes"}, "quant_method", "'bitsandbytes'"),
    ],
    ids=str,
)
def test_what_is_not_supported_is_named(config: dict[str, object], field: str, found: str) -> None:
    with pytest.raises(ModelError) as caught:
        parse_stored(ConfigFields({"quantization_config": config}))
    assert f"{field}: expected" in str(caught.value)
    assert found in str(caught.value).partition("found ")[2]
