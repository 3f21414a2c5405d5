"""Adapters in a worker: the model that has them merged, bits among other adapters, and files that cannot be used."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from adapters import PREFIX, adapter_spec, save_adapter
from safetensors.torch import load_file, save_file

from sempre.ipc.adapter_files import CONFIG_FILE, WEIGHTS_FILE
from sempre.ipc.errors import ModelError
from sempre.ipc.messages import AdapterSpec, CallMethod, ExecuteStep, NewRequest, SamplingSpec

GREEDY = SamplingSpec(max_tokens=6, temperature=0.0, logprobs=-1, prompt_logprobs=-1)
# fused and separate projections, biases, heads in another order, gates beside queries, states, shared experts,
# embeddings of layers, tensors below a prefix
FAMILIES = ["llama", "qwen2", "qwen3-biases", "glm", "phi3", "gemma2", "gemma4", "qwen3.5", "qwen2-moe", "olmo2"]
MORE = ["mistral3-multimodal", "qwen3.5-multimodal", "gemma3-odd", "smollm3", "granite", "gemma4-moe", "qwen3-next"]
SETTINGS = {"enable_lora": True, "max_loras": 2, "max_lora_rank": 32}
NOT_ADAPTED = ("lm_head", ".router", ".experts", "in_proj_b", "in_proj_a", "shared_expert_gate", "vis", "projector")


def prompt_ids(length: int, salt: int = 0) -> list[int]:
    return np.random.default_rng(salt).integers(3, 320, length).tolist()


def bits(finished: Any) -> tuple[list[int], bytes]:
    assert finished.errors == []
    return finished.token_ids, b"".join(part.logprobs for part in [*finished.prompt_logprobs, *finished.logprobs])


def linear_modules(model: torch.nn.Module) -> dict[str, tuple[int, int]]:
    """The linear modules that may be adapted, with [N, K]."""
    return {
        name: tuple(module.weight.shape)
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear)
        and not any(word in name for word in NOT_ADAPTED)
        and not name.endswith("mlp.gate")
    }


@contextmanager
def merged(model: torch.nn.Module, folder: Path, scale: float) -> Iterator[None]:
    """The model with W + scale B A, computed in float64."""
    tensors, before = load_file(folder / WEIGHTS_FILE), {}
    with torch.no_grad():
        for name, module in model.named_modules():
            a = tensors.get(f"{PREFIX}{name}.lora_A.weight")
            if a is not None:
                before[name] = module.weight.clone()
                b = tensors[f"{PREFIX}{name}.lora_B.weight"]
                module.weight.copy_(before[name].double() + scale * (b.double() @ a.double()))
        assert len(before) * 2 == len(tensors)
        yield
        for name, module in model.named_modules():
            if name in before:
                module.weight.copy_(before[name])


def expected_logprobs(model: Any, token_ids: list[int]) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.tensor([token_ids])).logits[0, :-1].double().log_softmax(-1)


@pytest.mark.parametrize("family", [*FAMILIES, *(pytest.param(f, marks=pytest.mark.product) for f in MORE)])
def test_a_row_is_that_of_the_merged_model_whatever_the_others_have(
    family: str, checkpoints: Any, serve: Any, dense: Callable[..., torch.Tensor], prompt: Any, tmp_path: Path
) -> None:
    checkpoint = checkpoints(family)
    modules = linear_modules(checkpoint.model)
    assert len(modules) >= 4
    folders = [save_adapter(tmp_path / f"{seed}", modules, rank=8 + seed, seed=seed, size=0.15) for seed in range(2)]
    first, second = map(adapter_spec, folders)
    serving = serve(checkpoint.folder, **SETTINGS)
    wanted = prompt("wanted", prompt_ids(41), GREEDY, adapter=first)
    alone = serving.run(wanted)["wanted"]
    others = [
        prompt(f"{i}", prompt_ids(1 + 9 * i, i + 1), GREEDY, chunks=(1 + 3 * i,), adapter=(second, None, first)[i % 3])
        for i in range(5)
    ]
    cut = prompt("wanted", wanted.token_ids, GREEDY, chunks=(7, 1, 16), adapter=first)
    together = serving.run(*others[:2], cut, *others[2:])
    assert bits(together["wanted"]) == bits(alone)
    with merged(checkpoint.model, folders[0], 2.0):
        expected = expected_logprobs(checkpoint.model, wanted.token_ids + alone.token_ids)
    found = torch.cat([dense(alone.prompt_logprobs, 320), dense(alone.logprobs, 320)]).double()
    assert float((found - expected).norm() / expected.norm()) < 2e-5
    # a control: the model itself is another one
    plain = expected_logprobs(checkpoint.model, wanted.token_ids + alone.token_ids)
    assert float((found - plain).norm() / plain.norm()) > 1e-3
    # a row without an adapter is that of a worker without adapters
    without = serve(checkpoint.folder).run(prompt("1", others[1].token_ids, GREEDY))["1"]
    assert bits(together["1"]) == bits(without)


def test_ordinary_matmuls_are_noticed(checkpoints: Any, serve: Any, prompt: Any, tmp_path: Path) -> None:
    checkpoint = checkpoints("llama")
    spec = adapter_spec(save_adapter(tmp_path / "a", linear_modules(checkpoint.model), rank=8))
    serving = serve(checkpoint.folder, numerics="control", **SETTINGS)
    wanted = prompt("wanted", prompt_ids(41), GREEDY, adapter=spec)
    others = [prompt(f"{i}", prompt_ids(1 + 9 * i, i + 1), GREEDY) for i in range(3)]
    assert bits(serving.run(*others, wanted)["wanted"]) != bits(serving.run(wanted)["wanted"])


SCALES: list[tuple[dict[str, Any], float]] = [
    ({"lora_alpha": 3}, 3 / 8),
    ({"lora_alpha": 4, "use_rslora": True}, 4 / 8**0.5),
    ({"alpha_pattern": {"q_proj": 16, r".*layers\.[12]\..*": 16, ".*": 16}}, 2.0),
    ({"target_modules": r".*\.(self_attn|mlp)\.[a-z]+_proj"}, 2.0),
    ({"target_modules": "all-linear", "init_lora_weights": "gaussian"}, 2.0),
]


@pytest.mark.parametrize(("changes", "scale"), SCALES, ids=str)
def test_the_config_decides_the_scale(
    changes: Mapping[str, Any],
    scale: float,
    checkpoints: Any,
    serve: Any,
    dense: Callable[..., torch.Tensor],
    prompt: Any,
    tmp_path: Path,
) -> None:
    checkpoint = checkpoints("llama")
    folder = save_adapter(tmp_path / "a", linear_modules(checkpoint.model), size=0.15, changes=changes)
    ids = prompt_ids(30)
    params = msgspec.structs.replace(GREEDY, max_tokens=1)
    serving = serve(checkpoint.folder, **SETTINGS)
    found = serving.run(prompt("a", ids, params, adapter=adapter_spec(folder)))["a"]
    with merged(checkpoint.model, folder, scale):
        expected = expected_logprobs(checkpoint.model, ids)
    assert float((dense(found.prompt_logprobs, 320).double() - expected).norm() / expected.norm()) < 2e-5


def test_ranks_may_differ_from_module_to_module(
    checkpoints: Any, serve: Any, dense: Callable[..., torch.Tensor], prompt: Any, tmp_path: Path
) -> None:
    """Only some layers and projections are changed, and one of them with a higher rank."""
    checkpoint = checkpoints("llama")
    modules = {name: shape for name, shape in linear_modules(checkpoint.model).items() if "v_proj" in name}
    modules = {name: shape for name, shape in modules.items() if ".1." not in name}
    folder = save_adapter(tmp_path / "a", modules, rank=4, size=0.2, changes={"layers_to_transform": [0, 2]})
    high = save_adapter(tmp_path / "high", modules, rank=20, seed=1, size=0.2)
    tensors, more = load_file(folder / WEIGHTS_FILE), load_file(high / WEIGHTS_FILE)
    last = {name: tensor for name, tensor in more.items() if ".2." in name}
    save_file(tensors | last, folder / WEIGHTS_FILE)
    config = json.loads((folder / CONFIG_FILE).read_text())
    patterns = {"rank_pattern": {r"layers\.2\.self_attn\.v_proj": 20}, "alpha_pattern": {r".*\.2\..*": 40}}
    (folder / CONFIG_FILE).write_text(json.dumps(config | patterns))
    serving = serve(checkpoint.folder, **SETTINGS)
    ids, params = prompt_ids(30), msgspec.structs.replace(GREEDY, max_tokens=1)
    found = serving.run(prompt("a", ids, params, adapter=adapter_spec(folder)))["a"]
    with merged(checkpoint.model, folder, 2.0):
        expected = expected_logprobs(checkpoint.model, ids)
    assert float((dense(found.prompt_logprobs, 320).double() - expected).norm() / expected.norm()) < 2e-5


# Peft itself


@pytest.mark.parametrize("use_rslora", [False, True])
@pytest.mark.parametrize("family", ["llama", "qwen3-biases", "gemma2"])
def test_peft_saves_what_is_read(
    family: str,
    use_rslora: bool,
    checkpoints: Any,
    serve: Any,
    dense: Callable[..., torch.Tensor],
    prompt: Any,
    tmp_path: Path,
) -> None:
    """Its own folder, against its own model, unmerged and merged."""
    peft = pytest.importorskip("peft", reason="needs the peft package, which is no requirement of the tests")
    checkpoint = checkpoints(family)
    model = type(checkpoint.model).from_pretrained(checkpoint.folder, dtype=torch.float32, attn_implementation="eager")
    config = peft.LoraConfig(
        r=6, lora_alpha=9, target_modules="all-linear", use_rslora=use_rslora, init_lora_weights=False
    )
    adapted = peft.get_peft_model(model, config).eval()
    adapted.save_pretrained(tmp_path / "a")
    ids, params = prompt_ids(30), msgspec.structs.replace(GREEDY, max_tokens=1)
    serving = serve(checkpoint.folder, **SETTINGS)
    finished = serving.run(prompt("a", ids, params, adapter=adapter_spec(tmp_path / "a")))["a"]
    assert finished.errors == []
    found = dense(finished.prompt_logprobs, 320).double()
    unmerged = expected_logprobs(adapted, ids)
    assert float((found - unmerged).norm() / unmerged.norm()) < 2e-5
    whole = expected_logprobs(adapted.merge_and_unload(), ids)
    assert float((found - whole).norm() / whole.norm()) < 2e-5


# Loading, slots, and what is refused


def call(serving: Any, method: str, *args: object) -> Any:
    reply = serving.worker.call(CallMethod(call_id=1, method=method, args=list(args)))
    return reply.result if reply.error is None else reply.error


def load(serving: Any, spec: AdapterSpec) -> Any:
    return call(serving, "load_adapter", spec.name, spec.path, spec.digest)


def test_the_least_recently_used_is_forgotten(checkpoints: Any, serve: Any, prompt: Any, tmp_path: Path) -> None:
    checkpoint = checkpoints("llama")
    modules = linear_modules(checkpoint.model)
    specs = [adapter_spec(save_adapter(tmp_path / f"{seed}", modules, rank=4, seed=seed)) for seed in range(4)]
    serving = serve(checkpoint.folder, **{**SETTINGS, "max_loras": 1, "max_cpu_loras": 2})
    fresh = [bits(serving.run(prompt("a", prompt_ids(9), GREEDY, adapter=spec))["a"]) for spec in specs]
    assert len({found[1] for found in fresh}) == 4
    assert call(serving, "adapter_digests") == [spec.digest for spec in specs[2:]]
    assert load(serving, specs[2]) is None
    assert load(serving, specs[0]) is None
    assert call(serving, "adapter_digests") == [specs[2].digest, specs[0].digest]
    again = [bits(serving.run(prompt("a", prompt_ids(9), GREEDY, adapter=spec))["a"]) for spec in specs]
    assert again == fresh
    assert call(serving, "forget_adapter", specs[3].digest) is True
    assert call(serving, "forget_adapter", specs[3].digest) is False
    assert bits(serving.run(prompt("a", prompt_ids(9), GREEDY, adapter=specs[3]))["a"]) == fresh[3]


def test_the_same_files_under_two_names_are_loaded_once(checkpoints: Any, serve: Any, tmp_path: Path) -> None:
    checkpoint = checkpoints("llama")
    modules = linear_modules(checkpoint.model)
    one, other = (adapter_spec(save_adapter(tmp_path / name, modules, rank=4)) for name in ("one", "other"))
    serving = serve(checkpoint.folder, **SETTINGS)
    assert [load(serving, one), load(serving, other)] == [None, None]
    assert call(serving, "adapter_digests") == [one.digest]


def test_a_request_whose_adapter_has_gone_fails_alone(
    checkpoints: Any, serve: Any, prompt: Any, tmp_path: Path
) -> None:
    checkpoint = checkpoints("llama")
    modules = linear_modules(checkpoint.model)
    gone, changed = (
        adapter_spec(save_adapter(tmp_path / name, modules, rank=4, seed=i)) for i, name in enumerate("ab")
    )
    (tmp_path / "a" / WEIGHTS_FILE).unlink()
    save_adapter(tmp_path / "b", modules, rank=4, seed=5)
    serving = serve(checkpoint.folder, **SETTINGS)
    ids = prompt_ids(9)
    alone = serving.run(prompt("plain", ids, GREEDY))["plain"]
    found = serving.run(
        prompt("gone", ids, GREEDY, adapter=gone),
        prompt("plain", ids, GREEDY),
        prompt("changed", ids, GREEDY, adapter=changed),
    )
    assert bits(found["plain"]) == bits(alone)
    assert [len(found[name].errors) for name in ("gone", "changed")] == [1, 1]
    assert "adapter 'a'" in found["gone"].errors[0]
    assert WEIGHTS_FILE in found["gone"].errors[0]
    assert "they have changed" in found["changed"].errors[0]


def test_a_worker_without_adapters_refuses_the_request(
    checkpoints: Any, serve: Any, prompt: Any, tmp_path: Path
) -> None:
    checkpoint = checkpoints("llama")
    spec = adapter_spec(save_adapter(tmp_path / "a", linear_modules(checkpoint.model)))
    serving = serve(checkpoint.folder)
    found = serving.run(prompt("a", prompt_ids(9), GREEDY, adapter=spec), prompt("b", prompt_ids(9), GREEDY))
    assert "expected none" in found["a"].errors[0]
    assert bits(found["b"])
    assert "enable_lora" in load(serving, spec).message


def test_more_adapters_than_slots_are_the_schedulers_fault(
    checkpoints: Any, serve: Any, prompt: Any, tmp_path: Path
) -> None:
    checkpoint = checkpoints("llama")
    modules = linear_modules(checkpoint.model)
    specs = [adapter_spec(save_adapter(tmp_path / f"{seed}", modules, rank=4, seed=seed)) for seed in range(3)]
    serving = serve(checkpoint.folder, **SETTINGS)
    with pytest.raises(Exception, match="max_loras=2 adapters, found 3"):
        serving.run(*(prompt(spec.name, prompt_ids(9), GREEDY, adapter=spec) for spec in specs))


Change = Callable[[Path], None]


def config_with(**changes: Any) -> Change:
    def change(folder: Path) -> None:
        config = json.loads((folder / CONFIG_FILE).read_text())
        (folder / CONFIG_FILE).write_text(json.dumps(config | changes))

    return change


def tensors_with(edit: Callable[[dict[str, torch.Tensor]], object]) -> Change:
    def change(folder: Path) -> None:
        tensors = load_file(folder / WEIGHTS_FILE)
        edit(tensors)
        save_file(tensors, folder / WEIGHTS_FILE)

    return change


def cut(folder: Path) -> None:
    path = folder / WEIGHTS_FILE
    path.write_bytes(path.read_bytes()[:-100])


def pickled(folder: Path) -> None:
    (folder / WEIGHTS_FILE).rename(folder / "adapter_model.bin")


A0 = f"{PREFIX}model.layers.0.self_attn.q_proj.lora_A.weight"
B0 = f"{PREFIX}model.layers.0.self_attn.q_proj.lora_B.weight"
REFUSED: dict[str, tuple[Change, str]] = {
    "rank": (config_with(r=33), "config.json: r: expected at most max_lora_rank=32, found 33"),
    "rank pattern": (config_with(rank_pattern={"q_proj": 64}), "rank_pattern.q_proj: expected at most"),
    "another rank": (config_with(r=7), r"lora_A.weight': expected shape \[7, 112\], found shape \[8, 112\]"),
    "dora": (config_with(use_dora=True), "use_dora: expected nothing, since DoRA is not supported"),
    "saved modules": (config_with(modules_to_save=["lm_head"]), "modules_to_save: expected nothing"),
    "bias": (config_with(bias="lora_only"), "bias: expected 'none'"),
    "method": (config_with(peft_type="IA3"), "peft_type: expected 'LORA', found 'IA3'"),
    "pissa": (config_with(init_lora_weights="pissa"), "init_lora_weights: expected one that leaves"),
    "unknown": (config_with(use_new_thing=True), "use_new_thing: expected nothing"),
    "parameters": (config_with(target_parameters=["experts.down_proj"]), "target_parameters: expected nothing"),
    "targets": (config_with(target_modules=["c_attn"]), "target_modules: expected modules of this model"),
    "no targets": (config_with(target_modules=None), "target_modules: expected names"),
    "pattern": (config_with(target_modules="("), "target_modules: expected a regular expression"),
    "alpha": (config_with(lora_alpha="big"), "lora_alpha: expected a number, found 'big'"),
    "rank's kind": (config_with(r=0), "r: expected a positive integer, found 0"),
    "no json": (lambda folder: (folder / CONFIG_FILE).write_text("{"), "not valid JSON") ,
    "no config": (lambda folder: (folder / CONFIG_FILE).unlink(), f"{CONFIG_FILE}: file not found"),
    "no weights": (lambda folder: (folder / WEIGHTS_FILE).unlink(), f"{WEIGHTS_FILE}: file not found"),
    "pickled": (pickled, "found adapter_model.bin; pickled weights are refused"),
    "truncated": (cut, f"{WEIGHTS_FILE}: cannot be opened as safetensors"),
    "no A": (tensors_with(lambda t: t.pop(A0)), f"'{A0}': expected a tensor, by target_modules"),
    "no B": (tensors_with(lambda t: t.pop(B0)), f"'{B0}': expected a tensor, by target_modules"),
    "neither": (tensors_with(lambda t: [t.pop(A0), t.pop(B0)]), f"'{A0}': expected a tensor, by target_modules"),
    "shape": (
        tensors_with(lambda t: t.update({B0: torch.zeros(63, 8)})),
        r"lora_B.weight': expected shape \[64, 8\], found shape \[63, 8\]",
    ),
    "dtype": (tensors_with(lambda t: t.update({A0: torch.zeros(8, 64, dtype=torch.int64)})), "found dtype I64"),
    "nan": (tensors_with(lambda t: t[A0].fill_(float("nan"))), "expected finite numbers"),
    "another model": (
        tensors_with(lambda t: t.update({A0.replace("layers.0", "layers.9"): t[A0].clone()})),
        "found module 'model.layers.9.self_attn.q_proj'",
    ),
    "head": (
        tensors_with(lambda t: t.update({f"{PREFIX}lm_head.lora_A.weight": torch.zeros(8, 64)})),
        "nor the vocabulary's head",
    ),
    "whole module": (tensors_with(lambda t: t.update({f"{PREFIX}lm_head.weight": torch.zeros(2)})), "modules_to_save"),
    "embedding": (
        tensors_with(lambda t: t.update({f"{PREFIX}model.embed_tokens.lora_embedding_A": torch.zeros(2)})),
        "adapters of embeddings are not supported",
    ),
    "magnitude": (
        tensors_with(lambda t: t.update({A0.replace("lora_A.weight", "lora_magnitude_vector"): torch.zeros(2)})),
        "DoRA is not supported",
    ),
}  # fmt: skip


def test_files_that_cannot_be_used(checkpoints: Any, serve: Any, prompt: Any, tmp_path: Path) -> None:
    """Each names the adapter, the file, the field or tensor, what is expected and what is found; nothing is loaded."""
    checkpoint = checkpoints("llama")
    modules = linear_modules(checkpoint.model)
    serving = serve(checkpoint.folder, **SETTINGS)
    for name, (change, text) in REFUSED.items():
        folder = save_adapter(tmp_path / name, modules)
        digest = adapter_spec(folder).digest
        change(folder)
        with suppress(ModelError):  # the worker names what is missing
            digest = adapter_spec(folder).digest
        error = load(serving, AdapterSpec(name=name, path=str(folder), digest=digest))
        assert error is not None, name
        assert error.type == "RequestError", name
        assert f"adapter {name!r}: {folder}" in error.message
        assert re.search(text, error.message), error.message
    missing = load(serving, AdapterSpec(name="x", path=str(tmp_path / "nowhere"), digest="00"))
    assert "expected the folder of an adapter, found nothing" in missing.message
    assert call(serving, "adapter_digests") == []
    assert bits(serving.run(prompt("a", prompt_ids(9), GREEDY))["a"])


def test_experts_are_refused_by_name(checkpoints: Any, serve: Any, tmp_path: Path) -> None:
    checkpoint = checkpoints("qwen2-moe")
    modules = {"model.layers.0.mlp.experts.0.down_proj": (64, 16)}
    error = load(serve(checkpoint.folder, **SETTINGS), adapter_spec(save_adapter(tmp_path / "a", modules)))
    assert "neither experts, routers" in error.message


def test_a_step_may_be_submitted_without_any_adapter(checkpoints: Any, serve: Any) -> None:
    serving = serve(checkpoints("llama").folder, **SETTINGS)
    new = NewRequest(request_id="a", token_ids=[5], num_prompt_tokens=1, seed=0, params=GREEDY)
    serving.worker.submit(ExecuteStep(step_id=1, new_requests=[new]))
    assert serving.worker.collect().sampled == []
