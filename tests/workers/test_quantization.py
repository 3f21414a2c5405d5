"""fp8 models: what a configuration may say, how a checkpoint is read, accuracy, and that a row's bits stay its own."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from fp8_checkpoints import quantization_config, quantize_tensors
from safetensors.torch import load_file, save_file
from worker_settings import worker_config

from sempre.ipc.errors import ConfigError, InvarianceError, ModelError, TensorMismatch
from sempre.ipc.messages import SamplingSpec
from sempre.kernels.fp8 import Fp8Scheme, quantize_rows
from sempre.workers.config_fields import ConfigFields
from sempre.workers.layers.linear_kernel import CONTROL, INVARIANT, LinearKernel
from sempre.workers.loading import Loaded, live_digest, load_model
from sempre.workers.models.base import CausalLM
from sempre.workers.models.registry import load_spec
from sempre.workers.quantization.config import QuantizationSpec, parse_quantization
from sempre.workers.self_test import check_linears, require_equal

Q_PROJ = "model.layers.1.self_attn.q_proj.weight"
FAMILIES = ["llama-biases", "qwen3", "qwen2"]
SCHEMES = [scheme.value for scheme in Fp8Scheme]


@pytest.fixture
def quantized(checkpoints: Any, tmp_path: Path) -> Callable[..., Path]:
    """(family, scheme, scales, edits) → a compressed-tensors checkpoint."""

    def make(
        family: str,
        scheme: str = "fp8",
        scales: str = "channel",
        edit: Callable[[dict[str, torch.Tensor]], object] = lambda tensors: None,
        ignore: tuple[str, ...] = ("lm_head",),
        **changes: object,
    ) -> Path:
        source = checkpoints(family).folder
        tensors = quantize_tensors(load_file(source / "model.safetensors"), scales)
        edit(tensors)
        folder = tmp_path / f"{family}-{scheme}-{scales}"
        folder.mkdir(exist_ok=True)
        save_file(tensors, folder / "model.safetensors")
        config = json.loads((source / "config.json").read_text())
        config["quantization_config"] = quantization_config(scheme, scales, ignore) | changes
        (folder / "config.json").write_text(json.dumps(config))
        return folder

    return make


def load(folder: Path, product: LinearKernel = INVARIANT, quantization: str | None = None) -> Loaded:
    return load_model(worker_config(folder, quantization=quantization), load_spec(folder), product)


def parse(**changes: object) -> QuantizationSpec | None:
    return parse_quantization(ConfigFields({"quantization_config": quantization_config("fp8", "channel") | changes}))


def group(**changes: object) -> dict[str, object]:
    """The only group of the configuration, with changes to its weights or input_activations."""
    base = quantization_config("fp8", "channel")["config_groups"]["group_0"]
    for name, fields in changes.items():
        base[name] = {**(base[name] or {}), **fields} if isinstance(fields, dict) else fields
    return {"config_groups": {"group_0": base}}


def test_what_is_read() -> None:
    spec = parse()
    assert spec is not None
    assert (spec.scheme, spec.weight_scales) == (Fp8Scheme.WEIGHTS_AND_ACTIVATIONS, "channel")
    assert spec.covers("model.layers.3.mlp.up_proj")
    assert not spec.covers("lm_head")
    weight_only = parse(**group(input_activations=None, weights={"strategy": "tensor"}), format="naive-quantized")
    assert weight_only is not None
    assert (weight_only.scheme, weight_only.weight_scales) == (Fp8Scheme.WEIGHTS, "tensor")
    some = parse(ignore=["re:.*mlp.*", "model.layers.0.self_attn.o_proj"])
    assert some is not None
    assert [some.covers(f"model.layers.{i}.self_attn.o_proj") for i in (0, 1)] == [False, True]
    assert not some.covers("model.layers.1.mlp.up_proj")
    assert some.covers("lm_head")


@pytest.mark.parametrize(
    ("changes", "field", "found"),
    [
        ({"quant_method": "gptq"}, "quant_method", "'gptq'"),
        ({"format": "pack-quantized"}, "format", "'pack-quantized'"),
        ({"quantization_status": "calibration"}, "quantization_status", "'calibration'"),
        ({"kv_cache_scheme": {"num_bits": 8}}, "kv_cache_scheme", "num_bits"),
        ({"sparsity_config": {"format": "sparse-24-bitmask"}}, "sparsity_config", "sparse-24"),
        ({"config_groups": {"a": {}, "b": {}}}, "config_groups", "'a', 'b'"),
        (group(weights={"type": "int"}), "type", "'int'"),
        (group(weights={"num_bits": 4}), "num_bits", "4"),
        (group(weights={"strategy": "group"}), "strategy", "'group'"),
        (group(weights={"strategy": "block"}), "strategy", "'block'"),
        (group(weights={"group_size": 128}), "group_size", "128"),
        (group(weights={"symmetric": False}), "symmetric", "False"),
        (group(weights={"block_structure": [128, 128]}), "block_structure", "128"),
        (group(input_activations={"dynamic": False}), "dynamic", "False"),
        (group(input_activations={"dynamic": "local"}), "dynamic", "'local'"),
        (group(input_activations={"strategy": "tensor"}), "strategy", "'tensor'"),
        (group(output_activations={"num_bits": 8}), "output_activations", "num_bits"),
        ({"ignore": "lm_head"}, "ignore", "'lm_head'"),
        ({"ignore": ["re:("]}, "ignore", "'re:('"),
    ],
    ids=str,
)
def test_what_is_not_supported_is_named(changes: dict[str, object], field: str, found: str) -> None:
    with pytest.raises(ModelError) as caught:
        parse(**changes)
    assert f"{field}: expected" in str(caught.value)
    assert found in str(caught.value).partition("found ")[2]


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("family", [*FAMILIES, "qwen3-moe", "mixtral", "glm4", "glm4-moe"])
def test_a_checkpoint_is_what_loading_makes(
    family: str, scheme: str, checkpoints: Any, quantized: Any, serve: Any, prompt: Any
) -> None:
    """Quantised by the exporter's rule or while loading: the same weights in memory, and the same results."""
    folder = checkpoints(family).folder
    stored, made = load(quantized(family, scheme)), load(folder, quantization=scheme)
    assert stored.facts.quantization == made.facts.quantization == Fp8Scheme(scheme)
    assert live_digest(stored.model) == live_digest(made.model)
    assert stored.facts.digest != made.facts.digest == load(folder).facts.digest
    request = prompt("a", list(range(3, 60)), SamplingSpec(max_tokens=5, temperature=0.7, logprobs=3))
    from_checkpoint = serve(quantized(family, scheme)).run(request)
    assert from_checkpoint == serve(folder, quantization=scheme).run(request)
    assert from_checkpoint != serve(folder).run(request)


def test_the_matrices_take_a_quarter_of_float32(checkpoints: Any) -> None:
    plain, small = (load(checkpoints("llama").folder, quantization=q).model for q in (None, "fp8"))

    def down_bytes(model: CausalLM) -> int:
        return next(linear.weight.nbytes for path, linear in model.linears() if path.endswith("down_proj"))

    assert down_bytes(plain) == 64 * 112 * 4
    assert down_bytes(small) == 64 * 112 + 64 * 4
    assert small.lm_head.weight.nbytes == plain.lm_head.weight.nbytes


def test_a_head_that_is_not_ignored_is_fp8(quantized: Any) -> None:
    def head(tensors: dict[str, torch.Tensor]) -> None:
        tensors.update(quantize_tensors({"lm_head.weight": tensors.pop("lm_head.weight")}, "channel", head=True))

    assert (
        load(quantized("llama", edit=head, ignore=())).model.lm_head.weight.scheme is Fp8Scheme.WEIGHTS_AND_ACTIVATIONS
    )


def _float64_logprobs(folder: Path, model: Any, scheme: str | None, token_ids: list[int]) -> torch.Tensor:
    """The transformers model in float64 with the checkpoint's dequantised weights, its linear layers' inputs
    quantised by the documented rule if the scheme says so."""
    from copy import deepcopy

    wide = deepcopy(model).double()
    if scheme is not None:
        tensors = load_file(folder / "model.safetensors")
        for name, module in wide.named_modules():
            if f"{name}.weight_scale" in tensors:
                scale = tensors[f"{name}.weight_scale"].double()
                module.weight.data = tensors[f"{name}.weight"].double() * scale
                if scheme == "fp8":
                    module.register_forward_pre_hook(_quantize_input)
    with torch.no_grad():
        return torch.log_softmax(wide(torch.tensor([token_ids])).logits[0], -1)


def _quantize_input(module: object, args: tuple[torch.Tensor, ...]) -> torch.Tensor:
    (x,) = args
    values, scale = quantize_rows(x[0].float().contiguous())
    return (values.double() * scale.double()[:, None])[None]


@pytest.mark.parametrize("scales", ["channel", "tensor"])
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("family", FAMILIES)
def test_accuracy_against_dequantized_float64(
    family: str, scheme: str, scales: str, checkpoints: Any, quantized: Any, serve: Any, prompt: Any, dense: Any
) -> None:
    """Near the float64 model that has the same fp8 weights, and far nearer than that is to the unquantised one.

    An activation between two fp8 values may round the other way in float64, so W8A8 is compared in the median.
    """
    folder = quantized(family, scheme, scales)
    tokens = list(range(3, 80))
    request = prompt("a", tokens, SamplingSpec(max_tokens=1, temperature=0.0, prompt_logprobs=-1))
    outcome = serve(folder).run(request)["a"]
    assert not outcome.errors
    found = dense(outcome.prompt_logprobs, 320)
    model = checkpoints(family).model
    expected = _float64_logprobs(folder, model, scheme, tokens)[:-1]
    unquantized = _float64_logprobs(folder, model, None, tokens)[:-1]
    error, effect = (found - expected).abs().median(), (unquantized - expected).abs().median()
    if scheme == "fp8_weight_only":
        assert (found - expected).abs().max() < 1e-3
        assert error < 1e-5
    assert error < 0.1 * effect, (error, effect)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_self_test(scheme: str, checkpoints: Any) -> None:
    folder = checkpoints("llama").folder

    def test(product: LinearKernel) -> dict[str, int]:
        loaded = load(folder, product, scheme)
        return require_equal(check_linears(loaded.model, loaded.facts.matrix_dtype, 256))

    assert test(INVARIANT)["linear"] > 50
    with pytest.raises(InvarianceError, match=rf"linear qkv_proj \[N=128, K=64, {scheme}\]"):
        test(CONTROL)


def test_the_fingerprint_names_the_scheme(checkpoints: Any, serve: Any) -> None:
    folder = checkpoints("llama").folder
    parts = [serve(folder, quantization=q).loaded.fingerprint["quantization"] for q in (None, *SCHEMES)]
    assert parts == ["none", "fp8_weight_only-1", "fp8-1"]


@pytest.mark.parametrize("scheme", SCHEMES)
def test_dummy_weights(scheme: str, checkpoints: Any, quantized: Any, serve: Any, prompt: Any) -> None:
    """Also for the config.json of a quantised checkpoint."""
    request = prompt("a", [5, 6, 7], SamplingSpec(max_tokens=4, temperature=1.0, logprobs=2))
    made = serve(checkpoints("llama").folder, quantization=scheme, load_format="dummy").run(request)
    assert made == serve(quantized("llama", scheme), load_format="dummy").run(request)


def test_a_setting_for_a_quantized_checkpoint_is_refused(quantized: Any) -> None:
    with pytest.raises(ConfigError, match=r"quantised already \(fp8\), found 'fp8_weight_only'") as caught:
        load(quantized("llama"), quantization="fp8_weight_only")
    assert caught.value.parameter == "quantization"


def _nan(tensors: dict[str, torch.Tensor]) -> None:
    tensors[Q_PROJ].view(torch.uint8)[3, 5] = 0xFF


def _infinite(tensors: dict[str, torch.Tensor]) -> None:
    tensors[Q_PROJ + "_scale"][2] = float("inf")


@pytest.mark.parametrize(
    ("edit", "tensor", "expected", "found"),
    [
        (lambda t: t.pop(Q_PROJ + "_scale"), Q_PROJ + "_scale", "shape [64, 1]", "nothing"),
        (lambda t: t.update({Q_PROJ + "_scale": torch.ones(1)}), Q_PROJ + "_scale", "shape [64, 1]", "shape [1]"),
        (lambda t: t.update({Q_PROJ: torch.ones(64, 64)}), Q_PROJ, "dtype F8_E4M3", "dtype F32"),
        (
            lambda t: t.update({"model.layers.0.mlp.up_proj.input_scale": torch.ones(1)}),
            "model.layers.0.mlp.up_proj.input_scale",
            "no such tensor",
            "shape [1]",
        ),
        (
            lambda t: t.update({"lm_head.weight": t["lm_head.weight"].to(torch.float8_e4m3fn)}),
            "lm_head.weight",
            "dtype F32, BF16, F16",
            "dtype F8_E4M3",
        ),
        (_nan, Q_PROJ, "finite values", "1 that are not"),
        (_infinite, Q_PROJ + "_scale", "finite values", "1 that are not"),
    ],
    ids=["no scale", "scale of the tensor", "not fp8", "static activations", "fp8 head", "NaN", "infinite scale"],
)
def test_wrong_tensor_is_named(edit: Any, tensor: str, expected: str, found: str, quantized: Any) -> None:
    with pytest.raises(TensorMismatch) as caught:
        load(quantized("llama", edit=edit))
    assert caught.value.tensor == tensor
    assert expected in caught.value.expected
    assert caught.value.found == found


def test_fp8_tensors_without_a_configuration_are_refused(quantized: Any) -> None:
    folder = quantized("llama")
    config = json.loads((folder / "config.json").read_text())
    del config["quantization_config"]
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(TensorMismatch):
        load(folder)


def test_one_matmul_is_quantized_as_a_whole(quantized: Any) -> None:
    def widen(tensors: dict[str, torch.Tensor]) -> None:
        tensors[Q_PROJ] = tensors[Q_PROJ].float() * tensors.pop(Q_PROJ + "_scale")

    with pytest.raises(TensorMismatch, match="with which it is one matmul") as caught:
        load(quantized("llama", edit=widen, ignore=("lm_head", Q_PROJ.removesuffix(".weight"))))
    assert caught.value.tensor == Q_PROJ
