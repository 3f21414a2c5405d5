"""Pooling: vectors, classes and scores of transformers' models, the same bits for any batch and any chunks."""

from __future__ import annotations

import itertools
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
import transformers
from pooling_checkpoints import FLAGS, NO, YES, write_modules, write_pooling
from safetensors.torch import load_file, save_file

from sempre.ipc.config import PoolerConfig
from sempre.ipc.errors import ConfigError, MessageMalformed, ModelError, UnknownArchitecture
from sempre.ipc.messages import NewRequest, PoolingSpec, SamplingSpec, ScheduledRequest
from sempre.workers.models.pooling import PoolingSettings
from sempre.workers.models.registry import ENCODERS, load_spec
from sempre.workers.pooling import softmax

ONE = SamplingSpec(max_tokens=1)
RAW = PoolingSpec(use_activation=False)
LENGTHS = (41, 1, 20, 150, 33)


def ids(length: int, salt: int = 0) -> list[int]:
    return np.random.default_rng(salt).integers(3, 320, length).tolist()


def values(finished: Any) -> torch.Tensor:
    assert finished.errors == []
    return torch.from_numpy(np.frombuffer(finished.pooled, "<f4").astype(np.float64))


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


@pytest.fixture
def embedder(checkpoints: Any, tmp_path: Path) -> Callable[..., Path]:
    """family and kind → a copy of its checkpoint with sentence-transformers' files; `bare` ones lack `model.`."""
    count = itertools.count()

    def make(family: str, kind: str, *, bare: bool = False, normalizes: bool = True, **config: Any) -> Path:
        folder = tmp_path / f"{family}-{next(count)}"
        shutil.copytree(checkpoints(family).folder, folder)
        change(folder, **config)
        flags = {f"pooling_mode_{flag}": name == kind for name, flag in FLAGS.items()}
        write_pooling(folder, flags, normalizes=normalizes)
        if bare:
            tensors = load_file(folder / "model.safetensors")
            tensors.pop("lm_head.weight", None)
            stripped = {name.removeprefix("model."): tensor for name, tensor in tensors.items()}
            save_file(stripped, folder / "model.safetensors")
        return folder

    return make


def change(folder: Path, **config: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **config}))


def hidden_states(model: Any, token_ids: list[int]) -> torch.Tensor:
    with torch.no_grad():
        return model.model(torch.tensor([token_ids])).last_hidden_state[0].double()


def reference(kind: str, hidden: torch.Tensor) -> torch.Tensor:
    pooled = {"LAST": hidden[-1], "MEAN": hidden.mean(0), "CLS": hidden[0]}[kind]
    return torch.nn.functional.normalize(pooled, dim=0)


@pytest.mark.parametrize("family", ["qwen3", "llama", "gemma3", "qwen3-moe-odd", "qwen3.5", "gemma4", "gpt-oss"])
@pytest.mark.parametrize("kind", FLAGS)
def test_embeddings_are_those_of_transformers(
    kind: str, family: str, embedder: Any, checkpoints: Any, serve: Any, prompt: Any
) -> None:
    serving = serve(embedder(family, kind))
    facts = serving.loaded.pooling
    assert (facts.task, facts.kind, facts.width) == ("embed", kind, 64)
    prompts = [prompt(f"{n}", ids(n, n), ONE, pooling=PoolingSpec()) for n in LENGTHS]
    found = torch.stack([values(finished) for finished in serving.run(*prompts).values()])
    hidden = [hidden_states(checkpoints(family).model, ids(n, n)) for n in LENGTHS]
    assert relative(found, torch.stack([reference(kind, rows) for rows in hidden])) < 1e-5


@pytest.mark.parametrize("kind", FLAGS)
@pytest.mark.parametrize("numerics", ["invariant", "control"])
def test_bits_depend_on_the_prompt_alone(numerics: str, kind: str, embedder: Any, serve: Any, prompt: Any) -> None:
    """The control's do not: the test can fail."""
    serving = serve(embedder("qwen3", kind), numerics=numerics)
    # of CLS, only the first token's row counts
    wanted = ids(41) if kind != "CLS" else ids(1)
    alone = serving.run(prompt("a", wanted, ONE, pooling=PoolingSpec()))["a"].pooled
    others = [prompt(f"{i}", ids(1 + 9 * i, i + 1), ONE, chunks=(1 + 3 * i,), pooling=RAW) for i in range(5)]
    cut = prompt("a", wanted, ONE, chunks=(7, 1, 16), pooling=PoolingSpec())
    among = serving.run(*others[:2], cut, *others[2:])["a"].pooled
    assert (among == alone) == (numerics == "invariant")


@pytest.mark.parametrize("kind", FLAGS)
def test_a_preempted_prompt_begins_again(kind: str, embedder: Any, serve: Any, prompt: Any) -> None:
    serving = serve(embedder("qwen3", kind))
    whole = serving.run(prompt("a", ids(60), ONE, pooling=PoolingSpec()))["a"].pooled
    new = [serving.new_request(prompt("b", ids(60), ONE, pooling=PoolingSpec()))]
    results = []
    for start, end, blocks in ((0, 20, [3, 1]), (20, 41, [5]), (0, 33, [9, 2, 4]), (33, 60, [7])):
        item = ScheduledRequest(
            request_id="b",
            num_computed_tokens=start,
            num_tokens=end - start,
            block_table_start=0 if start == 0 else start // 16 + 1,
            block_ids=blocks,
        )
        results += serving.step([item], new)
        new = []
    assert [result.pooled for result in results] == [None, None, None, whole]


def test_a_prompt_is_pooled_from_its_first_token(embedder: Any, serve: Any, prompt: Any) -> None:
    """A sum cannot begin in the middle, whatever is in the cache; a last token can."""
    item = ScheduledRequest(request_id="a", num_computed_tokens=16, num_tokens=4, block_table_start=0, block_ids=[3, 1])
    new = [NewRequest(request_id="a", token_ids=ids(20), num_prompt_tokens=20, seed=0, params=ONE, pooling=RAW)]
    with pytest.raises(MessageMalformed, match="num_computed_tokens: expected 0"):
        serve(embedder("qwen3", "MEAN")).step([item], new)
    assert serve(embedder("qwen3", "LAST")).step([item], new)[0].pooled is not None


def test_checkpoints_without_a_head_or_the_prefix(embedder: Any, serve: Any, prompt: Any) -> None:
    found = set()
    for bare, config in ((False, {}), (True, {}), (True, {"architectures": ["Qwen3Model"]})):
        serving = serve(embedder("qwen3", "LAST", bare=bare, **config))
        found.add(serving.run(prompt("a", ids(20), ONE, pooling=PoolingSpec()))["a"].pooled)
    assert len(found) == 1


def test_norm_and_dimensions(embedder: Any, serve: Any, prompt: Any) -> None:
    serving = serve(embedder("qwen3", "MEAN", normalizes=False, is_matryoshka=True))
    assert serving.loaded.pooling.is_matryoshka
    assert not serving.loaded.pooling.use_activation
    specs = {"raw": RAW, "cut": PoolingSpec(dimensions=16), "rough": PoolingSpec(dimensions=16, use_activation=False)}
    found = {n: values(serving.run(prompt(n, ids(20), ONE, pooling=spec))[n]) for n, spec in specs.items()}
    assert torch.equal(found["rough"], found["raw"][:16])
    assert relative(found["cut"], found["raw"][:16] / found["raw"][:16].norm()) < 1e-7
    assert abs(float(found["cut"].norm()) - 1) < 1e-7


SEQUENCE_CLASSIFIERS = ["qwen3", "llama", "qwen2", "mistral-window", "gemma2", "gemma3", "mixtral", "smollm3", "glm4"]


@pytest.mark.parametrize("family", SEQUENCE_CLASSIFIERS)
@pytest.mark.parametrize("num_labels", [1, 2, 5])
def test_classes_are_those_of_transformers(
    family: str, num_labels: int, checkpoints: Any, serve: Any, prompt: Any, tmp_path: Path
) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(num_labels)
        config = checkpoints(family).model.config
        config = type(config)(**{**config.to_dict(), "num_labels": num_labels, "pad_token_id": 0})
        model = transformers.AutoModelForSequenceClassification.from_config(config, dtype=torch.float32).eval()
    model.save_pretrained(tmp_path)
    serving = serve(tmp_path)
    assert serving.loaded.pooling.labels == [f"LABEL_{i}" for i in range(num_labels)]
    prompts = [prompt(f"{n}", ids(n, n), ONE, pooling=PoolingSpec()) for n in LENGTHS]
    raw = [prompt(f"raw {n}", ids(n, n), ONE, chunks=(13,), pooling=RAW) for n in LENGTHS]
    found = serving.run(*prompts, *raw)
    with torch.no_grad():
        logits = torch.stack([model(torch.tensor([ids(n, n)])).logits[0].double() for n in LENGTHS])
    probabilities = logits.softmax(-1) if num_labels > 1 else logits.sigmoid()
    assert relative(torch.stack([values(found[f"raw {n}"]) for n in LENGTHS]), logits) < 1e-5
    assert relative(torch.stack([values(found[f"{n}"]) for n in LENGTHS]), probabilities) < 1e-5


@pytest.mark.parametrize("family", ["qwen3", "qwen2", "llama-multi-head-tied"])
def test_scores_are_the_probability_of_yes_against_no(
    family: str, checkpoints: Any, serve: Any, prompt: Any, tmp_path: Path
) -> None:
    folder = tmp_path / "reranker"
    shutil.copytree(checkpoints(family).folder, folder)
    write_modules(folder, ["Transformer", "LogitScore"])
    (folder / "1_LogitScore").mkdir()
    (folder / "1_LogitScore" / "config.json").write_text(json.dumps({"true_token_id": YES, "false_token_id": NO}))
    stated = serve(folder)
    (folder / "modules.json").unlink()
    (folder / "tokenizer.json").write_text(json.dumps({"model": {"vocab": {"no": NO, "yes": YES}}}))
    tokens = {"classifier_from_token": ["no", "yes"], "is_original_qwen3_reranker": True}
    change(
        folder,
        **tokens,
        architectures=[type(checkpoints(family).model).__name__.replace("CausalLM", "SequenceClassification")],
    )
    overridden = serve(folder)
    for serving in (stated, overridden):
        for n, found in serving.run(*(prompt(f"{n}", ids(n, n), ONE, pooling=PoolingSpec()) for n in LENGTHS)).items():
            with torch.no_grad():
                logits = checkpoints(family).model(torch.tensor([ids(int(n), int(n))])).logits[0, -1].double()
            expected = logits[[NO, YES]].softmax(-1)[1:]
            assert relative(values(found), expected) < 1e-5


@pytest.mark.parametrize(
    ("stated", "activation"),
    [
        ({"problem_type": "multi_label_classification"}, torch.sigmoid),
        ({"problem_type": "regression"}, lambda x: x),
        ({"problem_type": "single_label_classification"}, lambda x: x.softmax(-1)),
        ({"sbert_ce_default_activation_function": "torch.nn.modules.linear.Identity"}, lambda x: x),
        ({"sentence_transformers": {"activation_fn": "torch.nn.modules.activation.Sigmoid"}}, torch.sigmoid),
    ],
)
def test_activation_is_what_the_config_states(
    stated: dict[str, Any], activation: Any, checkpoints: Any, serve: Any, prompt: Any, tmp_path: Path
) -> None:
    folder = tmp_path / "classifier"
    shutil.copytree(checkpoints("qwen3").folder, folder)
    tensors = load_file(folder / "model.safetensors")
    tensors["score.weight"] = torch.randn(3, 64, generator=torch.Generator().manual_seed(1)) * 0.2
    save_file(tensors, folder / "model.safetensors")
    labels = {"0": "a", "1": "b", "2": "c"}
    change(folder, architectures=["Qwen3ForSequenceClassification"], id2label=labels, **stated)
    serving = serve(folder)
    assert serving.loaded.pooling.labels == ["a", "b", "c"]
    found = serving.run(prompt("a", ids(20), ONE, pooling=PoolingSpec()), prompt("raw", ids(20), ONE, pooling=RAW))
    assert relative(values(found["a"]), activation(values(found["raw"]))) < 1e-6


def test_softmax_is_correctly_rounded() -> None:
    rows = torch.randn(20, 7, generator=torch.Generator().manual_seed(2), dtype=torch.float64) * 30
    for row in rows:
        assert torch.allclose(torch.tensor(softmax(row.tolist())), row.softmax(0).float(), rtol=1e-6, atol=0)
    assert softmax([-3.0e38, 3.0e38]) == [0.0, 1.0]


def test_nothing_finite_fails_alone(embedder: Any, serve: Any, prompt: Any) -> None:
    folder = embedder("qwen3", "MEAN")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.embed_tokens.weight"][7] = float("nan")
    save_file(tensors, folder / "model.safetensors")
    serving = serve(folder)
    bad, good = [*ids(20), 7], [token for token in ids(20) if token != 7]
    found = serving.run(prompt("bad", bad, ONE, pooling=RAW), prompt("good", good, ONE, pooling=RAW))
    assert "pooling: the final hidden states contain NaN or infinity" in found["bad"].errors[0]
    assert torch.equal(values(found["good"]), values(serving.run(prompt("good", good, ONE, pooling=RAW))["good"]))


@pytest.mark.parametrize(("family", "pooling"), [("embedder", None), ("qwen3", RAW)])
def test_the_other_kind_of_request_is_refused(
    family: str, pooling: PoolingSpec | None, embedder: Any, checkpoints: Any, serve: Any, prompt: Any
) -> None:
    serving = serve(embedder("qwen3", "LAST") if family == "embedder" else checkpoints(family).folder)
    found = serving.run(prompt("a", ids(20), ONE, pooling=pooling))["a"]
    assert "and the request asks for the other" in found.errors[0]


def test_quantized(embedder: Any, serve: Any, prompt: Any) -> None:
    serving = serve(embedder("qwen3", "LAST"), quantization="fp8_weight_only")
    found = values(serving.run(prompt("a", ids(20), ONE, pooling=PoolingSpec()))["a"])
    assert abs(float(found.norm()) - 1) < 1e-6


# What files and settings may say


def refused(folder: Path, settings: PoolingSettings | None = None) -> str:
    with pytest.raises((ModelError, ConfigError)) as caught:
        load_spec(folder, settings)
    return str(caught.value)


@pytest.mark.parametrize(
    ("flags", "text"),
    [
        ({"pooling_mode_max_tokens": True}, "pooling_mode: expected one of pooling_mode_lasttoken"),
        ({"pooling_mode_cls_token": True, "pooling_mode_lasttoken": True}, "1_Pooling/config.json: pooling_mode"),
        ({}, "1_Pooling/config.json: pooling_mode: expected one of"),
        ({"pooling_mode": "max"}, "1_Pooling/config.json: pooling_mode: expected 'lasttoken', 'mean' or 'cls'"),
        ({"pooling_mode": "mean", "word_embedding_dimension": 32}, "word_embedding_dimension: expected hidden_size=64"),
    ],
)
def test_other_poolings_are_refused(flags: dict[str, object], text: str, embedder: Any) -> None:
    folder = embedder("qwen3", "LAST")
    write_pooling(folder, flags)
    assert text in refused(folder)


@pytest.mark.parametrize(
    "modules", [["Transformer", "Pooling", "Dense"], ["Transformer", "WeightedLayerPooling"], ["BoW"]]
)
def test_other_modules_are_refused(modules: list[str], embedder: Any) -> None:
    folder = embedder("qwen3", "LAST")
    write_modules(folder, modules)
    assert f"modules.json: [{len(modules) - 1}]: type: expected Transformer, then Pooling" in refused(folder)


@pytest.mark.parametrize("path", ["", ".", "..", "../1_Pooling", "/etc", 5, None])
def test_a_module_is_in_a_folder_of_the_checkpoint(path: object, embedder: Any) -> None:
    folder = embedder("qwen3", "LAST")
    modules = json.loads((folder / "modules.json").read_text())
    modules[1]["path"] = path
    (folder / "modules.json").write_text(json.dumps(modules))
    assert "modules.json: [1]: path: expected the name of a folder" in refused(folder)


@pytest.mark.parametrize("text", ["{}", "[1]", "[", '[{"type": 5}]'])
def test_broken_modules(text: str, embedder: Any) -> None:
    folder = embedder("qwen3", "LAST")
    (folder / "modules.json").write_text(text)
    assert "modules.json" in refused(folder)


@pytest.mark.parametrize(
    ("name", "content", "text"),
    [
        ("config_sentence_transformers.json", {"prompts": ["a"]}, "prompts: expected an object"),
        (
            "config_sentence_transformers.json",
            {"prompts": {"a": 1}},
            "prompts: expected a text for each of",
        ),
        (
            "config_sentence_transformers.json",
            {"prompts": {"a": ""}, "default_prompt_name": "b"},
            "default_prompt_name: expected a name among prompts: a, found 'b'",
        ),
        (
            "config_sentence_transformers.json",
            {"default_prompt_name": 1},
            "default_prompt_name: expected a name among prompts: there is none, found 1",
        ),
        ("config_sentence_transformers.json", {"similarity_fn_name": "jaccard"}, "similarity_fn_name: expected one of"),
        ("sentence_bert_config.json", {"do_lower_case": True}, "do_lower_case: expected false"),
        ("sentence_bert_config.json", {"max_seq_length": 0}, "max_seq_length: expected an integer of at least 1"),
    ],
)
def test_files_beside_the_modules(name: str, content: dict[str, object], text: str, embedder: Any) -> None:
    folder = embedder("qwen3", "LAST")
    (folder / name).write_text(json.dumps(content))
    assert f"{name}: {text}" in refused(folder)


def test_prompts_that_a_mean_leaves_out(embedder: Any) -> None:
    folder = embedder("qwen3", "MEAN")
    write_pooling(folder, {"pooling_mode_mean_tokens": True, "include_prompt": False})
    stated = folder / "config_sentence_transformers.json"
    stated.write_text(json.dumps({"prompts": {"query": "Q: "}}))
    assert "prompts: expected none beside include_prompt=false" in refused(folder)
    # nothing is left out of these
    stated.write_text(json.dumps({"prompts": {"query": ""}}))
    assert load_spec(folder).pooling is not None
    stated.write_text(json.dumps({"prompts": {"query": "Q: "}}))
    write_pooling(folder, {"pooling_mode_lasttoken": True, "include_prompt": False})
    assert load_spec(folder).pooling is not None


def test_a_pooling_that_is_not_stated_is_refused(checkpoints: Any) -> None:
    folder = checkpoints("qwen3").folder
    assert load_spec(folder).pooling is None
    text = refused(folder, PoolingSettings("pooling"))
    assert "modules.json: expected a Pooling module, found no such file" in text
    assert "pooler_config={'pooling_type': 'LAST'}" in text
    found = load_spec(folder, PoolingSettings("pooling", pooler_config=PoolerConfig(pooling_type="MEAN"))).pooling
    assert found is not None
    assert (found.kind, found.use_activation, found.head) == ("MEAN", True, None)
    text = refused(folder, PoolingSettings("pooling", "classify"))
    assert "config.json: classifier_from_token: expected the tokens that answer no and yes" in text


def test_settings_that_do_not_fit(checkpoints: Any, embedder: Any, tmp_path: Path) -> None:
    folder = checkpoints("qwen3").folder
    assert "convert: it is for models that pool" in refused(folder, PoolingSettings("generate", "embed"))
    own = PoolerConfig(pooling_type="LAST")
    assert "pooler_config: it is for models that pool" in refused(folder, PoolingSettings(pooler_config=own))
    assert load_spec(embedder("qwen3", "LAST"), PoolingSettings("generate")).pooling is None
    shutil.copytree(folder, tmp_path / "classifier")
    change(tmp_path / "classifier", architectures=["Qwen3ForSequenceClassification"])
    assert "runner: expected 'auto' or 'pooling'" in refused(tmp_path / "classifier", PoolingSettings("generate"))
    assert "convert: Qwen3ForSequenceClassification" in refused(
        tmp_path / "classifier", PoolingSettings(convert="embed")
    )


@pytest.mark.parametrize("name", [*ENCODERS, "XLMRoberta"])
def test_encoders_are_refused_by_name(name: str, checkpoints: Any, tmp_path: Path) -> None:
    shutil.copytree(checkpoints("qwen3").folder, tmp_path / "encoder")
    for ending in ("Model", "ForSequenceClassification"):
        change(tmp_path / "encoder", architectures=[name + ending])
        with pytest.raises(UnknownArchitecture, match="an encoder"):
            load_spec(tmp_path / "encoder")


@pytest.mark.parametrize(
    ("config", "text"),
    [
        ({"is_causal": False}, "config.json: is_causal: expected true"),
        ({"use_bidirectional_attention": True}, "config.json: use_bidirectional_attention: expected false"),
        ({"matryoshka_dimensions": [16, 65]}, "config.json: matryoshka_dimensions: expected a list of integers"),
        ({"is_matryoshka": "yes"}, "config.json: is_matryoshka: expected true or false"),
    ],
)
def test_bad_fields(config: dict[str, object], text: str, embedder: Any) -> None:
    assert text in refused(embedder("qwen3", "LAST", **config))


@pytest.mark.parametrize(
    ("config", "text"),
    [
        ({"id2label": {"0": "a", "2": "b"}}, "config.json: id2label: expected a label for each of 0 … 1"),
        ({"num_labels": 0}, "config.json: num_labels"),
        ({"problem_type": "ranking"}, "config.json: problem_type"),
        ({"sbert_ce_default_activation_function": "torch.nn.Tanh"}, "sbert_ce_default_activation_function"),
        ({"classifier_from_token": ["yes"]}, "classifier_from_token: expected two tokens"),
        ({"classifier_from_token": ["no", "yes"]}, "method: expected 'from_2_way_softmax'"),
        ({"classifier_from_token": ["no", "y"], "method": "from_2_way_softmax"}, "tokenizer.json: model: vocab: y"),
    ],
)
def test_bad_fields_of_classifiers(config: dict[str, object], text: str, checkpoints: Any, tmp_path: Path) -> None:
    folder = tmp_path / "classifier"
    shutil.copytree(checkpoints("qwen3").folder, folder)
    (folder / "tokenizer.json").write_text(json.dumps({"model": {"vocab": {"no": NO, "yes": YES}}}))
    change(folder, architectures=["Qwen3ForSequenceClassification"], **config)
    assert text in refused(folder)


def test_facts_cross_a_process(embedder: Any) -> None:
    found = load_spec(embedder("qwen3", "MEAN", matryoshka_dimensions=[16, 32])).pooling
    assert found is not None
    facts = found.facts(64)
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(facts), type=type(facts)) == facts
    assert facts.dimensions == [16, 32]
