"""Reading checkpoints: layouts that must give the same bits, and each way a checkpoint can be wrong."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from worker_settings import worker_config

from sempre.ipc.errors import ModelError, TensorMismatch
from sempre.kernels.linear import CpuLinearWeight
from sempre.workers.layers.linear import Linear
from sempre.workers.layers.linear_kernel import INVARIANT
from sempre.workers.loading import Loaded, live_digest, load_model
from sempre.workers.models.registry import load_spec

Q_PROJ = "model.layers.1.self_attn.q_proj.weight"
NORM = "model.layers.0.input_layernorm.weight"


def load(folder: Path, dtype: str = "auto") -> Loaded:
    return load_model(worker_config(folder, dtype=dtype), load_spec(folder), INVARIANT)


@pytest.fixture
def edited(checkpoints: Any, tmp_path: Path) -> Callable[..., Path]:
    """(name, edit tensors, edit config) → a changed copy of a checkpoint."""

    def copy(
        name: str,
        edit: Callable[[dict[str, torch.Tensor]], object] = lambda tensors: None,
        **config_changes: object,
    ) -> Path:
        source = checkpoints(name).folder
        tensors = load_file(source / "model.safetensors")
        edit(tensors)
        save_file(tensors, tmp_path / "model.safetensors")
        config = json.loads((source / "config.json").read_text()) | config_changes
        (tmp_path / "config.json").write_text(json.dumps(config))
        return tmp_path

    return copy


def shard(folder: Path) -> None:
    """Cut the single file into three with an index."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    weight_map = {name: f"model-{index % 3}.safetensors" for index, name in enumerate(tensors)}
    for file_name in set(weight_map.values()):
        save_file({name: tensors[name] for name in tensors if weight_map[name] == file_name}, folder / file_name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def test_shards_give_the_same_weights(checkpoints: Any, edited: Any) -> None:
    single = load(checkpoints("qwen2").folder)
    folder = edited("qwen2")
    shard(folder)
    sharded = load(folder)
    assert sharded.facts.digest == single.facts.digest
    assert live_digest(sharded.model) == live_digest(single.model)


def test_tied_head_stored_again_is_accepted_when_equal(checkpoints: Any, edited: Any) -> None:
    def store_head(tensors: dict[str, torch.Tensor]) -> None:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()

    plain = load(checkpoints("llama-multi-head-tied").folder)
    assert live_digest(load(edited("llama-multi-head-tied", store_head)).model) == live_digest(plain.model)


def test_tied_head_with_other_values_is_refused(edited: Any) -> None:
    def store_head(tensors: dict[str, torch.Tensor]) -> None:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] + 1

    with pytest.raises(TensorMismatch, match="tie_word_embeddings") as caught:
        load(edited("llama-multi-head-tied", store_head))
    assert caught.value.tensor == "lm_head.weight"


def test_missing_untied_head_is_refused(edited: Any) -> None:
    with pytest.raises(TensorMismatch, match="tie_word_embeddings is false") as caught:
        load(edited("llama", lambda tensors: tensors.pop("lm_head.weight")))
    assert (caught.value.tensor, caught.value.found) == ("lm_head.weight", "nothing")


def test_old_frequency_tensors_are_ignored(checkpoints: Any, edited: Any) -> None:
    def store(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)

    assert load(edited("llama", store)).facts.digest == load(checkpoints("llama").folder).facts.digest


@pytest.mark.parametrize(
    ("edit", "tensor", "expected", "found"),
    [
        (lambda t: t.pop(Q_PROJ), Q_PROJ, "shape [64, 64]", "nothing"),
        (lambda t: t.update({Q_PROJ: torch.zeros(64, 48)}), Q_PROJ, "shape [64, 64]", "shape [64, 48]"),
        (lambda t: t.update({NORM: torch.zeros(64, dtype=torch.int64)}), NORM, "dtype F32, BF16, F16", "dtype I64"),
        (lambda t: t.update({NORM: torch.zeros(64, dtype=torch.float64)}), NORM, "dtype F32, BF16, F16", "dtype F64"),
        (
            lambda t: t.update({"model.layers.0.self_attn.q_proj.bias": torch.zeros(64)}),
            "model.layers.0.self_attn.q_proj.bias",
            "no such tensor in this architecture",
            "shape [64]",
        ),
    ],
    ids=["missing", "shape", "integers", "float64", "unexpected"],
)
def test_wrong_tensor_is_named(edit: Any, tensor: str, expected: str, found: str, edited: Any) -> None:
    with pytest.raises(TensorMismatch) as caught:
        load(edited("llama", edit))
    assert caught.value.tensor == tensor
    assert expected in caught.value.expected
    assert caught.value.found == found
    for part in (tensor, expected, found):
        assert part in str(caught.value)


def test_all_that_does_not_fit_is_listed(edited: Any) -> None:
    def break_everything(tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if "layers.2" in name]:
            del tensors[name]
        tensors[Q_PROJ] = torch.zeros(64, 48)
        tensors[NORM] = tensors[NORM].double()
        tensors.update({f"surplus.{number}": torch.zeros(1) for number in range(20)})

    with pytest.raises(TensorMismatch) as caught:
        load(edited("llama", break_everything))
    first, *lines = str(caught.value).splitlines()
    assert first == "31 tensors do not fit this architecture:"
    assert len(lines) == 21
    assert lines[-1] == "… and 11 more"
    for name in (Q_PROJ, NORM, "model.layers.2.mlp.down_proj.weight", "surplus.0"):
        assert any(name in line for line in lines), name
    # its facts are those of the first
    assert repr(caught.value.tensor) in lines[0]


def test_tensor_of_the_index_missing_in_its_shard_is_named(edited: Any) -> None:
    folder = edited("llama")
    shard(folder)
    index = folder / "model.safetensors.index.json"
    weight_map = json.loads(index.read_text())["weight_map"]
    wrong = "model-0.safetensors" if weight_map[Q_PROJ] != "model-0.safetensors" else "model-1.safetensors"
    index.write_text(json.dumps({"weight_map": weight_map | {Q_PROJ: wrong}}))
    with pytest.raises(TensorMismatch, match=wrong) as caught:
        load(folder)
    assert caught.value.tensor == Q_PROJ


@pytest.mark.parametrize("weight_map", [None, {"a": "../elsewhere.safetensors"}, {"a": 3}, {"a": "absent.safetensors"}])
def test_wrong_index_is_refused(weight_map: object, edited: Any) -> None:
    folder = edited("llama")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(ModelError, match="safetensors"):
        load(folder)


def test_pickled_weights_are_refused(edited: Any) -> None:
    folder = edited("llama")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(ModelError, match=r"found pytorch_model\.bin.*pickled ones are refused"):
        load(folder)


def test_damaged_file_is_refused(edited: Any) -> None:
    folder = edited("llama")
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[: len(data) // 2])
    with pytest.raises(ModelError, match=r"model\.safetensors: cannot be opened"):
        load(folder)


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16])
def test_float32_keeps_sixteen_bit_storage(stored: torch.dtype, edited: Any, serve: Any, prompt: Any) -> None:
    """A 16-bit checkpoint run in float32 has the bits of its widened copy, in half the memory."""
    from sempre.ipc.messages import SamplingSpec

    def narrow(tensors: dict[str, torch.Tensor]) -> None:
        tensors.update({name: tensor.to(stored) for name, tensor in tensors.items()})

    def widen(tensors: dict[str, torch.Tensor]) -> None:
        tensors.update({name: tensor.to(stored).float() for name, tensor in tensors.items()})

    request = prompt("a", list(range(3, 60)), SamplingSpec(max_tokens=5, temperature=0.7, logprobs=3))
    folder = edited("llama", narrow)
    assert load(folder).facts.dtype == torch.float32  # config.json says so
    assert load(folder, "float32").facts.matrix_dtype == stored
    narrow_run = serve(folder, dtype="float32").run(request)
    assert narrow_run == serve(edited("llama", widen), dtype="float32").run(request)


def test_sixteen_bit_dtype_rounds_to_nearest_even(checkpoints: Any, edited: Any) -> None:
    def rounded(tensors: dict[str, torch.Tensor]) -> None:
        for name, tensor in tensors.items():
            if "norm" not in name:
                tensors[name] = tensor.to(torch.bfloat16)

    by_loader = load(checkpoints("llama").folder, "bfloat16")
    assert by_loader.facts.dtype == by_loader.facts.matrix_dtype == torch.bfloat16
    assert live_digest(by_loader.model) == live_digest(load(edited("llama", rounded), "bfloat16").model)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32", "auto"])
def test_only_bfloat16_rounds_the_inputs_of_matmuls(edited: Any, dtype: str) -> None:
    def rounded(tensors: dict[str, torch.Tensor]) -> None:
        tensors.update({name: tensor.bfloat16() for name, tensor in tensors.items()})

    loaded = load(edited("llama", rounded), dtype)
    weights = [module.weight for _, module in loaded.model.walk() if isinstance(module, Linear)]
    assert len(weights) > 4
    expected = dtype == "bfloat16" or (dtype == "auto" and loaded.facts.dtype is torch.bfloat16)
    assert {weight.rounds_x for weight in weights if isinstance(weight, CpuLinearWeight)} == {expected}
    if dtype == "float32":
        assert loaded.facts.matrix_dtype is torch.bfloat16, "stored as it was"


@pytest.mark.parametrize(("stated", "expected"), [("float16", torch.float16), (None, torch.float32)])
def test_auto_is_what_the_checkpoint_states(stated: str | None, expected: torch.dtype, edited: Any) -> None:
    assert load(edited("llama", dtype=stated)).facts.dtype == expected
