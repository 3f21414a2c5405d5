"""Qwen3.5, step by step: logits of transformers, and bits that depend neither on cuts and slots nor on neighbours."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hybrid_sequences import HybridModel, Part
from safetensors.torch import load_file, save_file
from worker_settings import worker_config

from sempre.engine.arguments import engine_config
from sempre.engine.client.inproc import InprocClient
from sempre.engine.harness import generate, make_request
from sempre.ipc.errors import ModelError, TensorMismatch
from sempre.ipc.messages import SamplingSpec
from sempre.workers.layers.attention import GatedAttention
from sempre.workers.layers.linear_kernel import CONTROL, INVARIANT
from sempre.workers.loading import live_digest, load_model
from sempre.workers.models.qwen3_5 import Qwen35MoeSpec
from sempre.workers.models.registry import load_spec, parse_spec

NAMES = ["qwen3.5", "qwen3.5-odd", "qwen3.5-moe", "qwen3.5-moe-odd"]
BLOCKS, OTHERS = [7, 3, 20, 1, 9, 30], [[11, 12], [13], [14, 15, 16]]


def ids_of(length: int, salt: int = 0) -> list[int]:
    return np.random.default_rng(salt).integers(3, 320, length).tolist()


def whole(model: HybridModel, ids: list[int]) -> torch.Tensor:
    return model.step(Part(ids, 0, len(ids), BLOCKS))[0]


def cut(model: HybridModel, ids: list[int], cuts: list[int]) -> torch.Tensor:
    """In chunks, among others that come and go; a snapshot at every cut, from which it goes on."""
    rows, before = [], 0
    for index, end in enumerate(cuts):
        count = end - before
        own = Part(ids, before, end, BLOCKS, index if before else -1, [-1] * (count - 1) + [index + 1])
        other = ids_of(23, salt=index + 1)
        neighbours = [
            Part(other, 0, 5 + 3 * n, blocks, -1, [-1] * (4 + 3 * n) + [20 + n]) for n, blocks in enumerate(OTHERS)
        ]
        shift = index % 3
        parts = [*neighbours[:shift], own, *neighbours[shift:]]
        rows.append(model.step(*parts)[shift])
        before = end
    return torch.cat(rows)


@pytest.mark.parametrize("name", NAMES)
def test_logits_are_those_of_transformers(name: str, checkpoints: Any) -> None:
    checkpoint, ids = checkpoints(name), ids_of(91)
    with torch.no_grad():
        expected = checkpoint.model(torch.tensor([ids])).logits[0].double()
    found = whole(HybridModel(checkpoint.folder), ids).double()
    assert float((found - expected).norm() / expected.norm()) < 1e-5


@pytest.mark.parametrize("name", NAMES)
def test_bits_do_not_depend_on_cuts_slots_or_neighbours(name: str, checkpoints: Any) -> None:
    model, ids = HybridModel(checkpoints(name).folder), ids_of(80)
    expected = whole(model, ids)
    assert torch.equal(cut(model, ids, [1, 2, 3, 19, 50, 64, 79, 80]), expected)
    # token by token, in place
    lone = [model.step(Part(ids, at, at + 1, BLOCKS, 5 if at else -1, [5]))[0] for at in range(80)]
    assert torch.equal(torch.cat(lone), expected)


@pytest.mark.parametrize("name", NAMES)
def test_control(name: str, checkpoints: Any) -> None:
    """Ordinary matmuls give a row other bits among others: the test above can fail."""
    model, ids = HybridModel(checkpoints(name).folder, CONTROL), ids_of(80)
    assert not torch.equal(cut(model, ids, [1, 2, 3, 19, 50, 64, 79, 80]), whole(model, ids))


def test_control_another_state_gives_other_bits(checkpoints: Any) -> None:
    model, ids = HybridModel(checkpoints("qwen3.5").folder), ids_of(20)
    expected = whole(model, ids)
    model.step(Part(ids, 0, 10, BLOCKS, -1, [-1] * 8 + [1, 2]))
    assert torch.equal(model.step(Part(ids, 10, 20, BLOCKS, 2))[0], expected[10:])
    assert not torch.equal(model.step(Part(ids, 10, 20, BLOCKS, 1))[0], expected[10:])


def test_rows_that_are_not_accepted_leave_no_trace(checkpoints: Any) -> None:
    """Drafts are verified with a slot for each row; the sequence goes on from that of the accepted one."""
    model, ids = HybridModel(checkpoints("qwen3.5").folder), ids_of(40)
    expected = whole(model, ids)
    model.step(Part(ids, 0, 12, BLOCKS, -1, [-1] * 11 + [1]))
    drafted = [*ids[:15], *ids_of(5, salt=9)]
    verified = model.step(Part(drafted, 12, 18, BLOCKS, 1, [2, 3, 1, 4, 5, 6]))[0]
    assert torch.equal(verified[:3], expected[12:15])
    assert torch.equal(model.step(Part(ids, 15, 40, BLOCKS, 1))[0], expected[15:])


REFUSED: list[tuple[str, object, str]] = [
    ("hidden_act", "gelu", "hidden_act: expected 'silu'"),
    ("layer_types", ["linear_attention"], "layer_types: expected a list of 32 times"),
    ("layer_types", ["sliding_attention"] * 32, "layer_types: expected a list of 32 times"),
    ("layer_types", ["linear_attention"] * 32, "layer_types: expected a list of 32 times 'full_attention', at least"),
    ("full_attention_interval", 33, "full_attention_interval: expected at most num_hidden_layers=32, found 33"),
    ("full_attention_interval", 0, "full_attention_interval: expected an integer of at least 1"),
    ("linear_num_value_heads", 24, "linear_num_value_heads: expected a multiple of linear_num_key_heads=16, found 24"),
    ("linear_key_head_dim", 24, "linear_key_head_dim: expected a multiple of 16"),
    ("linear_value_head_dim", 100, "linear_value_head_dim: expected a multiple of 16"),
    ("attn_output_gate", False, "attn_output_gate: expected true for this architecture"),
    ("mamba_ssm_dtype", "bfloat16", 'mamba_ssm_dtype: expected "float32" for this architecture'),
    ("linear_conv_kernel_dim", 5, "linear_conv_kernel_dim: expected from 2 to 4, found 5"),
    ("linear_conv_kernel_dim", 1, "linear_conv_kernel_dim: expected from 2 to 4, found 1"),
    ("partial_rotary_factor", 1.5, "partial_rotary_factor: expected an even number of the 256"),
    ("rope_parameters", {"rope_type": "default", "factor": 2}, "rope_parameters: factor: expected of the type"),
]


@pytest.mark.parametrize(("field", "value", "expected"), REFUSED)
def test_what_is_not_honoured_is_refused_by_name(field: str, value: object, expected: str) -> None:
    with pytest.raises(ModelError, match=f"config.json: {expected}"):
        parse_spec({"architectures": ["Qwen3_5ForCausalLM"], field: value}, {})


def test_experts_are_always_renormalised() -> None:
    config: dict[str, object] = {"architectures": ["Qwen3_5MoeForCausalLM"]}
    assert parse_spec({**config, "norm_topk_prob": True}, {}) == parse_spec(config, {})
    with pytest.raises(ModelError, match="norm_topk_prob: expected true for this architecture"):
        parse_spec({**config, "norm_topk_prob": False}, {})


def test_every_layer_has_experts() -> None:
    config: dict[str, object] = {"architectures": ["Qwen3_5MoeForCausalLM"]}
    assert parse_spec({**config, "decoder_sparse_step": 1, "mlp_only_layers": []}, {}) == parse_spec(config, {})
    for field, value in (("decoder_sparse_step", 2), ("mlp_only_layers", [0])):
        with pytest.raises(ModelError, match=f"{field}: expected .* for this architecture"):
            parse_spec({**config, field: value}, {})


def copied(checkpoints: Any, name: str, folder: Path) -> dict[str, torch.Tensor]:
    """The tensors of a checkpoint that is copied to `folder`."""
    shutil.copytree(checkpoints(name).folder, folder)
    return load_file(folder / "model.safetensors")


@pytest.mark.parametrize("name", ["qwen3.5-moe-odd", "qwen3.5-moe-multimodal"])
def test_experts_may_be_in_one_tensor(name: str, checkpoints: Any, tmp_path: Path) -> None:
    """As the first checkpoints have them; what is loaded is the same."""
    tensors = copied(checkpoints, name, tmp_path / "stacked")
    spec = load_spec(tmp_path / "stacked")
    assert isinstance(spec, Qwen35MoeSpec)
    expected = load_model(worker_config(checkpoints(name).folder), spec, INVARIANT)
    bases = {key.split(".experts.")[0] for key in tensors if ".experts." in key}
    assert len(bases) == spec.num_layers
    for base in bases:
        own = [
            [tensors.pop(f"{base}.experts.{expert}.{part}.weight") for part in ("gate_proj", "up_proj", "down_proj")]
            for expert in range(spec.num_experts)
        ]
        tensors[f"{base}.experts.gate_up_proj"] = torch.stack([torch.cat(parts[:2]) for parts in own])
        tensors[f"{base}.experts.down_proj"] = torch.stack([parts[2] for parts in own])
    save_file(tensors, tmp_path / "stacked" / "model.safetensors")
    found = load_model(worker_config(tmp_path / "stacked"), spec, INVARIANT)
    assert (found.facts, live_digest(found.model)) == (expected.facts, live_digest(expected.model))
    # one that is missing is named as those that stand by themselves are
    del tensors[f"{min(bases)}.experts.down_proj"]
    save_file(tensors, tmp_path / "stacked" / "model.safetensors")
    with pytest.raises(TensorMismatch, match=r"mlp\.experts\.0\.down_proj\.weight.: expected a tensor of shape"):
        load_model(worker_config(tmp_path / "stacked"), spec, INVARIANT)


def test_layers_that_predict_more_tokens_are_not_read(checkpoints: Any, tmp_path: Path) -> None:
    tensors = copied(checkpoints, "qwen3.5-odd", tmp_path / "more")
    expected = load_model(worker_config(tmp_path / "more"), load_spec(tmp_path / "more"), INVARIANT).facts
    for name, is_refused in (("mtp.fc.weight", False), ("mtq.fc.weight", True)):
        save_file({**tensors, name: torch.zeros(2, 2)}, tmp_path / "more" / "model.safetensors")
        if is_refused:
            with pytest.raises(TensorMismatch, match=r"mtq\.fc\.weight.: expected no such tensor"):
                load_model(worker_config(tmp_path / "more"), load_spec(tmp_path / "more"), INVARIANT)
        else:
            assert (
                load_model(worker_config(tmp_path / "more"), load_spec(tmp_path / "more"), INVARIANT).facts == expected
            )


def test_the_gates_rows_are_those_between_the_queries(checkpoints: Any) -> None:
    """Each is read from the checkpoint's one tensor, and none is in both."""
    model = HybridModel(checkpoints("qwen3.5-odd").folder).model
    attention = dict(model.walk())["model.layers.0.self_attn"]
    assert isinstance(attention, GatedAttention)
    names = [
        attention.qkv_proj._checkpoint_rows("a.b")["a.q_proj"],
        attention.gate_proj._checkpoint_rows("a.b")["a.q_proj"],
    ]
    queries, gates = (rows.view(4, 48) for rows in names)
    for head in range(4):
        assert sorted(queries[head].tolist()) == list(range(head * 96, head * 96 + 48))
        assert gates[head].tolist() == list(range(head * 96 + 48, head * 96 + 96))


def test_fp8(checkpoints: Any, serve: Any, prompt: Any) -> None:
    """The setting quantises all matrices but the small ones that decide how states decay."""
    serving = serve(checkpoints("qwen3.5").folder, quantization="fp8")
    params = SamplingSpec(max_tokens=8, temperature=0.0, logprobs=2)
    alone = serving.run(prompt("a", ids_of(30), params))["a"]
    others = [prompt(f"{n}", ids_of(9 + n, salt=n + 1), params) for n in range(3)]
    beside = serving.run(*others, prompt("a", ids_of(30), params, chunks=(7, 1, 11)))["a"]
    assert alone.errors == []
    assert (beside.token_ids, beside.logprobs) == (alone.token_ids, alone.logprobs)


@pytest.mark.parametrize("name", ["qwen3.5", "qwen3.5-moe-odd", "qwen3-next", "qwen3.5-multimodal"])
def test_greedy_tokens_of_an_engine_are_those_of_transformers(name: str, checkpoints: Any) -> None:
    """With few slots and small steps, and the last request resuming from what the first left in the prefix cache."""
    checkpoint = checkpoints(name)
    prompts = [ids_of(70), ids_of(9, salt=1), ids_of(33, salt=2), ids_of(70)]
    settings = {"max_num_seqs": 3, "max_num_batched_tokens": 32, "max_model_len": 256, "num_threads": 1}
    client = InprocClient.launch(engine_config(model=str(checkpoint.folder), multiprocessing=False, **settings))
    requests = [make_request(ids, max_tokens=64, temperature=0.0, ordinal=n) for n, ids in enumerate(prompts)]
    try:
        runs = [*generate(client, requests[:3]), *generate(client, requests[3:])]
    finally:
        client.close()
    assert runs[3].token_ids == runs[0].token_ids
    for ids, run in zip(prompts, runs, strict=True):
        with torch.no_grad():
            logits = checkpoint.model(torch.tensor([[*ids, *run.token_ids]])).logits[0]
        assert len(run.token_ids) == 64
        assert list(run.token_ids) == logits[len(ids) - 1 : -1].argmax(-1).tolist()
