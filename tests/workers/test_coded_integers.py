"""Checkpoints of 4- and 8-bit integers in the CPU's integer profile: their own codes, bits among others, refusals."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from quantized_checkpoints import CASES, quantize_checkpoint
from safetensors.torch import load_file, save_file
from worker_settings import worker_config

from sempre.ipc.errors import ConfigError
from sempre.ipc.messages import SamplingSpec
from sempre.kernels.integers import IntegerScheme, IntegerWeight
from sempre.workers.layers.linear_kernel import CONTROL, INVARIANT
from sempre.workers.loading import Loaded, load_model
from sempre.workers.models.registry import load_spec
from sempre.workers.quantization.coded_integers import grouped_integers
from sempre.workers.quantization.widened import CodedFormat, WidenedSource, WidenedSpec
from sempre.workers.tensor_source import open_safetensors

GREEDY = SamplingSpec(max_tokens=8, temperature=0.0, logprobs=-1, prompt_logprobs=-1)
IDS = np.random.default_rng(5).integers(3, 320, 33).tolist()
INTEGERS = (
    "awq-32",
    "awq-64",
    "gptq",
    "gptq-8-v2",
    "int4-32",
    "int4-64-zero",
    "int8-channel",
    "int8-128-zero",
    "w8a8-int8",
)


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(4)
    config = transformers.LlamaConfig(
        vocab_size=320, hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=128, bos_token_id=1, eos_token_id=2, initializer_range=0.1,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("wide")
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture
def stored(wide: Path, tmp_path: Path) -> Callable[[str], Path]:
    def make(name: str) -> Path:
        folder = tmp_path / name
        if not folder.exists():
            folder.mkdir()
            tensors, _ = quantize_checkpoint(load_file(wide / "model.safetensors"), CASES[name])
            config = json.loads((wide / "config.json").read_text())
            config["quantization_config"] = CASES[name].config
            (folder / "config.json").write_text(json.dumps(config))
            save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, folder / "model.safetensors")
        return folder

    return make


def load(folder: Path, kernel: Any = INVARIANT, **settings: Any) -> Loaded:
    return load_model(worker_config(folder, **settings), load_spec(folder), kernel)


@pytest.mark.parametrize("name", INTEGERS)
def test_integers_are_the_codes_of_the_published_layout(name: str, stored: Any) -> None:
    folder = stored(name)
    spec = load_spec(folder).quantization
    assert isinstance(spec, WidenedSpec)
    assert isinstance(spec.format, CodedFormat)
    with open_safetensors(folder) as opened:
        source = WidenedSource(opened, spec.format)
        for module in source.matrices():
            codes = source.codes(module)
            integers = grouped_integers(codes)
            # widening rounds once, to the dtype of scales; integers do not
            values = integers.values()
            assert torch.equal(values.to(codes.scales.dtype), codes.values()), module
            assert (integers.minimum is not None) == codes.form.has_zeros


@pytest.mark.parametrize("name", INTEGERS)
def test_a_row_keeps_its_bits_among_others(name: str, stored: Any, serve: Any, prompt: Any) -> None:
    folder = stored(name)
    others = [prompt(f"{i}", IDS[i : 9 * i + 2], GREEDY, chunks=(1 + 3 * i,)) for i in range(3)]
    settings = {"quantization": "integer", "dtype": "float32"}
    alone = serve(folder, **settings).run(prompt("wanted", IDS, GREEDY))["wanted"]
    cut = prompt("wanted", IDS, GREEDY, chunks=(7, 1, 16))
    among = serve(folder, **settings).run(others[0], cut, *others[1:])["wanted"]
    assert alone.errors == []
    assert bits(among) == bits(alone)
    # the control: in floats the inputs are not quantised
    assert bits(serve(folder, dtype="float32").run(prompt("wanted", IDS, GREEDY))["wanted"]) != bits(alone)


def bits(finished: Any) -> tuple[list[int], bytes]:
    return finished.token_ids, b"".join(part.logprobs for part in [*finished.prompt_logprobs, *finished.logprobs])


def test_matrices_are_integers_and_the_digest_is_that_of_the_checkpoint(stored: Any) -> None:
    folder = stored("awq-32")
    loaded, floats = load(folder, quantization="integer"), load(folder)
    kinds = {path: isinstance(linear.weight, IntegerWeight) for path, linear in loaded.model.linears()}
    assert sum(kinds.values()) == 2 * 4
    assert not kinds["lm_head"]
    assert loaded.facts.quantization is IntegerScheme.STORED
    assert loaded.facts.digest == floats.facts.digest
    assert loaded.facts.nbytes < floats.facts.nbytes / 1.5


def test_the_control_multiplies_the_same_values(stored: Any) -> None:
    folder = stored("int4-64-zero")
    exact, control = load(folder, quantization="integer"), load(folder, CONTROL, quantization="integer")
    x = torch.randn(3, 128, generator=torch.Generator().manual_seed(1))
    for (path, one), (_, other) in zip(exact.model.linears(), control.model.linears(), strict=True):
        if one.in_features == 128 and isinstance(one.weight, IntegerWeight):
            results = [each.kernel.linear(x, each.weight, torch.empty(3, each.out_features)) for each in (one, other)]
            assert (results[0] - results[1]).norm() < 0.02 * results[1].norm(), path


@pytest.mark.parametrize("name", ["gptq-act-order", "nvfp4", "mxfp4"])
def test_a_checkpoint_without_integers_in_order_is_refused(name: str, stored: Any) -> None:
    with pytest.raises(ConfigError, match="quantization"):
        load(stored(name), quantization="integer")


@pytest.mark.parametrize("setting", ["int8", "int4", "fp8"])
def test_a_quantised_checkpoint_is_not_quantised_again(setting: str, stored: Any) -> None:
    with pytest.raises(ConfigError, match="quantised already"):
        load(stored("awq-32"), quantization=setting)
