"""Any field of any family left out, or null: the model is the one that transformers makes of the same file."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import transformers

from sempre.ipc.errors import ModelError
from sempre.workers.models.config import ModelSpec
from sempre.workers.models.registry import FILES, parse_spec

# which model it is, and the parts of a whole, whose fields have their own turn
BESIDE = ("architectures", "model_type", "transformers_version", "text_config", "vision_config", "audio_config")
GENERATING = [architecture for architecture in FILES if architecture.endswith("ForCausalLM")]
# what says the same in a config of transformers and in ours
SAME = {
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "num_hidden_layers": "num_layers",
    "num_attention_heads": "num_heads",
    "num_key_value_heads": "num_kv_heads",
    "rms_norm_eps": "rms_norm_eps",
    "max_position_embeddings": "max_position_embeddings",
    "initializer_range": "initializer_range",
}
WINDOWED = "sliding_attention"


def as_json(config: Any) -> dict[str, Any]:
    return json.loads(config.to_json_string(use_diff=False))


def class_of(architecture: str) -> Any:
    return getattr(transformers, architecture).config_class


def without_each(fields: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """The name of a field, and the same ones but for it."""
    for name in sorted(fields):
        if name not in BESIDE:
            yield name, {key: value for key, value in fields.items() if key != name}


def spec_or_refusal(config: dict[str, Any]) -> ModelSpec | str:
    try:
        return parse_spec(config, {})
    except ModelError as error:
        return str(error)


def of_transformers(config: dict[str, Any]) -> Any:
    """Its config; None where it refuses this one."""
    try:
        return class_of(config["architectures"][0]).from_dict(json.loads(json.dumps(config)))
    except Exception:  # of many kinds
        return None


def facts(config: Any) -> dict[str, Any]:
    """In our words, what transformers' config says of the text part."""
    text = config.get_text_config()
    text.allow_global_per_layer_attribute_access = True
    found = {ours: getattr(text, name) for name, ours in SAME.items()}
    found["tie_word_embeddings"] = config.tie_word_embeddings
    window = getattr(text, "sliding_window", None)
    kinds = getattr(text, "layer_types", None) or [WINDOWED] * text.num_hidden_layers
    found["windows"] = tuple(window if kind == WINDOWED else None for kind in kinds)
    # what its models stumble over says nothing
    return {name: value for name, value in found.items() if value is not None}


def in_full(theirs: Any, architecture: str) -> dict[str, Any]:
    """All fields as transformers has them, without an end of sequence that the vocabulary lacks."""
    full = as_json(theirs) | {"architectures": [architecture]}
    text = full.get("text_config", full)
    ends = text["eos_token_id"]
    known = [end for end in (ends if isinstance(ends, list) else [ends]) if end is not None]
    text["eos_token_id"] = [end for end in known if end < text["vocab_size"]]
    # it does not write that all layers are alike
    if "global_head_dim" not in text and "per_layer_config" not in text and text["model_type"].startswith("gemma4"):
        text["per_layer_config"] = None
    return full


def check(changed: dict[str, Any], silent: dict[str, Any]) -> None:
    """`changed` has null where `silent` has nothing, or is the same."""
    found, theirs = spec_or_refusal(changed), of_transformers(changed)
    if theirs is None:
        # null says nothing, where transformers forbids it
        assert isinstance(found, str) or found == spec_or_refusal(silent), changed
        return
    full = spec_or_refusal(in_full(theirs, changed["architectures"][0]))
    if isinstance(found, str):
        assert isinstance(full, str), changed
        return
    assert found == full, changed
    expected = facts(theirs)
    assert {name: getattr(found, name) for name in expected} == expected, changed


def check_each(config: dict[str, Any], whole: Callable[[dict[str, Any]], dict[str, Any]] = dict) -> None:
    for name, silent in without_each(config):
        check(whole(silent), whole(silent))
        check(whole({**silent, name: None}), whole(silent))


@pytest.mark.parametrize("architecture", GENERATING)
def test_fields_with_the_values_of_the_class(architecture: str) -> None:
    config = as_json(class_of(architecture)()) | {"architectures": [architecture]}
    if architecture == "Glm4MoeForCausalLM":
        config["head_dim"] = 128  # without one, heads of its defaults are 42 wide
    assert not isinstance(spec_or_refusal(config), str)
    check_each(config)


def test_fields_with_other_values(variants: list[str], config_of: Callable[[str], dict[str, Any]]) -> None:
    for variant in variants:
        config = json.loads(json.dumps(config_of(variant)))
        assert not isinstance(spec_or_refusal(config), str), variant
        check_each(config)
        if "text_config" in config:
            check_each(config["text_config"], lambda text, config=config: {**config, "text_config": text})
            with pytest.raises(ModelError, match=r"config\.json: text_config: expected an object"):
                parse_spec({key: value for key, value in config.items() if key != "text_config"}, {})


def test_a_window_of_null_keys_is_refused() -> None:
    """transformers refuses it too, when it makes the mask of the first step."""
    for architecture in ("Gemma2ForCausalLM", "Gemma3ForCausalLM", "Olmo3ForCausalLM", "GptOssForCausalLM"):
        with pytest.raises(ModelError, match=r"sliding_window: expected a number of keys, as layers have a window"):
            parse_spec({"architectures": [architecture], "sliding_window": None}, {})


def test_a_default_end_that_the_vocabulary_lacks_is_none() -> None:
    """A stated one is an error."""
    for architecture, vocab_size, ends in (
        ("Olmo2ForCausalLM", 50000, ()),
        ("GlmForCausalLM", 151330, (151329,)),
        ("LlamaForCausalLM", 320, (2,)),
    ):
        config = {"architectures": [architecture], "vocab_size": vocab_size}
        assert parse_spec(config, {}).eos_token_ids == ends
        with pytest.raises(ModelError, match="eos_token_id: expected token ids in"):
            parse_spec({**config, "eos_token_id": vocab_size}, {})
