"""Keywords of the engine: types, ranges, unknown names, the environment."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import pytest

from sempre.engine.arguments import (
    MULTIPROCESSING_VARIABLE,
    SAME_VALUES,
    SHORT_SPECULATION,
    EngineKeywords,
    FrontendConfig,
    engine_config,
    field_types,
    parse_arguments,
)
from sempre.engine.setting_values import checked, description, options
from sempre.ipc.config import EngineConfig
from sempre.ipc.errors import ConfigError


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.delenv(MULTIPROCESSING_VARIABLE, raising=False)
    (tmp_path / "config.json").write_text("{}")
    return str(tmp_path)


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"dtype": "int8"}, "dtype must be 'auto' or 'float32' or 'bfloat16' or 'float16', got 'int8'."),
    (
        {"max_num_seqs": "eight"},
        "max_num_seqs: expected an integer such as 2048, 2k (2000), 2K (2048) or 4GiB, got 'eight'.",
    ),
    ({"max_num_seqs": True}, "max_num_seqs must be an int or None, got True."),
    ({"max_num_seqs": 0}, "max_num_seqs must be at least 1, got 0."),
    ({"max_model_len": 1.5}, "max_model_len must be an int or None, got 1.5."),
    ({"max_model_len": 0}, "max_model_len must be at least 1, got 0."),
    ({"max_num_batched_tokens": 0}, "max_num_batched_tokens must be at least 1, got 0."),
    ({"kv_cache_memory_bytes": 0}, "kv_cache_memory_bytes must be at least 1, got 0."),
    ({"data_parallel_size": 0}, "data_parallel_size must be at least 1, got 0."),
    ({"num_threads": -1}, "num_threads must be at least 0, got -1."),
    ({"max_logprobs": -2}, "max_logprobs must be at least -1, got -2."),
    ({"max_message_bytes": 5}, "max_message_bytes must be at least 65536, got 5."),
    ({"block_size": 0}, "block_size must be at least 1, got 0."),
    ({"tensor_parallel_size": 3}, "tensor_parallel_size must be 1, 2, 4 or 8, got 3."),
    (
        {"tensor_parallel_size": 2, "multiprocessing": False},
        "tensor_parallel_size=2 needs multiprocessing=True: one process holds one worker.",
    ),
    (
        {"tensor_parallel_size": 2, "numerics_profile": "single"},
        "numerics_profile='single' needs tensor_parallel_size=1, found 2: only the sums of tree8 can be shared.",
    ),
    (
        {"tensor_parallel_size": 2, "numerics": "control"},
        "numerics='control' needs numerics_profile='single' and tensor_parallel_size=1: its sums have no set order.",
    ),
    ({"numerics_profile": "tree4"}, "numerics_profile must be 'single' or 'tree8' or None, got 'tree4'."),
    ({"device": "tpu"}, "device must be 'auto' or 'cpu' or 'cuda', got 'tpu'."),
    ({"enable_prefix_caching": 1}, "enable_prefix_caching must be True or False, got 1."),
    ({"scheduling_policy": "lifo"}, "scheduling_policy must be 'fcfs' or 'priority', got 'lifo'."),
    ({"numerics": "fast"}, "numerics must be 'invariant' or 'control', got 'fast'."),
    ({"load_format": "pt"}, "load_format must be 'auto' or 'safetensors' or 'dummy', got 'pt'."),
    ({"heartbeat_interval_s": 0}, "heartbeat_interval_s must be greater than 0, got 0."),
    ({"startup_timeout_s": float("inf")}, "startup_timeout_s must be at most 1000000000.0, got inf."),
    (
        {"heartbeat_interval_s": 31.0},
        "heartbeat_timeout_s=30.0 must be greater than heartbeat_interval_s=31.0.",
    ),
    (
        {"data_parallel_size": 2, "multiprocessing": False},
        "data_parallel_size=2 needs multiprocessing=True: one process holds one worker.",
    ),
    (
        {"device": "cpu", "block_size": 32},
        "block_size: a CPU has blocks of 16 tokens only, found 32. Leave it out, which gives 16.",
    ),
    ({"tokenizer": 5}, "tokenizer must be a string or None, got 5."),
    ({"generation_config": "model"}, "generation_config must be 'auto' or 'vllm', got 'model'."),
    (
        {"gpu_memory_utilization": 1.5},
        "gpu_memory_utilization must be at most 1, got 1.5.",
    ),
    (
        {"quantization": "awq"},
        "quantization must be 'fp8' or 'fp8_weight_only' or 'int8' or 'int4' or 'integer' or None, got 'awq'.",
    ),
    ({"stream_interval": 0}, "stream_interval must be at least 1, got 0."),
    ({"hf_overrides": 5}, "hf_overrides must be a mapping or None, got 5."),
    ({"pipeline_parallel_size": 0}, "pipeline_parallel_size must be at least 1, got 0."),
    (
        {"pipeline_parallel_size": 2, "multiprocessing": False},
        "pipeline_parallel_size=2 needs multiprocessing=True: one process holds one worker.",
    ),
    (
        {"hf_token": "hf_abc"},
        "hf_token is not supported by this engine. Set the environment variable HF_TOKEN.",
    ),
    (
        {"logprobs_mode": "probs"},
        "logprobs_mode must be 'raw_logprobs' or 'processed_logprobs' or 'raw_logits' or 'processed_logits', "
        "got 'probs'.",
    ),
    (
        {"kv_events_config": {"enable_kv_cache_events": True}, "enable_prefix_caching": False},
        "kv_events_config: there are no events without a prefix cache. Leave out enable_kv_cache_events, or set"
        " enable_prefix_caching=True.",
    ),
    (
        {"kv_events_config": {"endpoint": "tcp://*:65535"}, "data_parallel_size": 2},
        "kv_events_config['endpoint'] must be ipc://PATH, or tcp://HOST:PORT with a port of 1 to 65534, got"
        " 'tcp://*:65535'.",
    ),
    (
        {"kv_events_config": {"replay_endpoint": "inproc://replay"}},
        "kv_events_config['replay_endpoint'] must be ipc://PATH, or tcp://HOST:PORT with a port of 1 to 65535, got"
        " 'inproc://replay'.",
    ),
    (
        {"kv_events_config": {"replay_endpoint": "tcp://*:5558"}, "data_parallel_size": 2},
        "kv_events_config: tcp://*:5558 would be used twice. Each of the 2 replicas has an endpoint and a"
        " replay_endpoint, on the ports that follow; leave room between the two.",
    ),
    (
        {"kv_events_config": {"enable": True}},
        "kv_events_config must be a mapping of its fields or None (Object contains unknown field `enable`), got"
        " {'enable': True}.",
    ),
    (
        {"kv_events_config": {"hwm": "many"}},
        "kv_events_config must be a mapping of its fields or None (Expected `int`, got `str` - at `$.hwm`), got"
        " {'hwm': 'many'}.",
    ),
    ({"max_model_len": 2**63}, f"max_model_len must be at most {2**63 - 1}, got {2**63}."),
    ({"pipeline_parallel_size": True}, "pipeline_parallel_size must be an int, got True."),
]


@pytest.mark.parametrize(("keywords", "message"), REFUSED, ids=[str(keywords) for keywords, _ in REFUSED])
def test_refused(folder: str, keywords: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_arguments(folder, keywords)
    assert str(caught.value) == message
    assert caught.value.parameter is not None


def test_a_secret_is_not_in_the_error(folder: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_arguments(folder, {"hf_token": "hf_abc"})
    assert "hf_abc" not in str(caught.value) + repr(vars(caught.value))


def test_more_threads_than_cores_are_refused(folder: str) -> None:
    with pytest.raises(ConfigError, match=r"num_threads: expected at most the \d+ usable cores, found 4096"):
        parse_arguments(folder, {"num_threads": 4096, "device": "cpu"})
    assert parse_arguments(folder, {"num_threads": 4096, "device": "cuda"}).engine.num_threads == 4096


@pytest.mark.parametrize("seed", [None, True, 1.0, -1, 2**64, "0"])
def test_refused_seeds(folder: str, seed: object) -> None:
    with pytest.raises(ConfigError, match="seed") as caught:
        parse_arguments(folder, {"seed": seed})
    assert caught.value.parameter == "seed"


def test_unknown_keyword_names_the_near_one(folder: str) -> None:
    with pytest.raises(TypeError, match=r"unknown keyword 'max_num_seq'. Did you mean 'max_num_seqs'\?"):
        parse_arguments(folder, {"max_num_seq": 8})


def test_unknown_keyword_without_a_near_one(folder: str) -> None:
    with pytest.raises(TypeError) as caught:
        parse_arguments(folder, {"xyzzy": 8})
    assert str(caught.value) == "unknown keyword 'xyzzy'."


def test_keywords_that_change_nothing_are_accepted(folder: str) -> None:
    keywords = {"async_scheduling": None, "trust_remote_code": False, "pipeline_parallel_size": 1, "quantization": None}
    assert parse_arguments(folder, keywords) == parse_arguments(folder, {})


def test_config_and_frontend_settings(folder: str) -> None:
    config, frontend = parse_arguments(folder, {"seed": 7, "max_num_seqs": 4, "chat_template": "{{ x }}"})
    assert config == EngineConfig(model=folder, model_path=str(Path(folder).resolve()), seed=7, max_num_seqs=4)
    assert frontend == FrontendConfig(chat_template="{{ x }}")


def test_a_small_token_budget_is_no_error(folder: str) -> None:
    assert parse_arguments(folder, {"max_num_batched_tokens": 64}).engine.max_num_batched_tokens == 64


def test_engine_config(folder: str) -> None:
    assert engine_config(folder, data_parallel_size=2).data_parallel_size == 2
    with pytest.raises(TypeError, match="unknown keyword 'chat_template'"):
        engine_config(folder, chat_template="x")


@pytest.mark.parametrize(("value", "expected"), [("0", False), ("1", True)])
def test_multiprocessing_from_the_environment(
    folder: str, monkeypatch: pytest.MonkeyPatch, value: str, expected: bool
) -> None:
    monkeypatch.setenv(MULTIPROCESSING_VARIABLE, value)
    assert parse_arguments(folder, {}).engine.multiprocessing is expected
    assert parse_arguments(folder, {"multiprocessing": True}).engine.multiprocessing is True


def test_multiprocessing_from_the_environment_refused(folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(MULTIPROCESSING_VARIABLE, "no")
    with pytest.raises(ConfigError) as caught:
        parse_arguments(folder, {})
    assert str(caught.value) == "SEMPRE_MULTIPROCESSING must be 0 or 1, got 'no'."


def test_the_keywords_that_type_checkers_see_are_the_settings() -> None:
    settings = field_types(EngineConfig) | field_types(FrontendConfig)
    settings |= {"served_model_name": str | list[str] | None, **SHORT_SPECULATION}
    stated = get_type_hints(EngineKeywords)
    assert list(stated) == list(settings)
    for name, hint in settings.items():
        expected = {
            *choices(hint),
            *(key for key in SAME_VALUES.get(name, ()) if type(key) not in choices(stated[name])),
        }
        if int in options(hint) and takes_text(name, hint):
            expected.add(str)
        if name in ("speculative_config", "pooler_config", "kv_events_config"):
            expected.add(Mapping[str, Any])
        assert choices(stated[name]) == expected, name


def choices(hint: Any) -> set[Any]:
    """The types, and the values of which one must be given."""
    return {one for kind in options(hint) for one in (get_args(kind) if get_origin(kind) is Literal else [kind])}


def takes_text(name: str, hint: Any) -> bool:
    """Whether an integer may be given as one."""
    try:
        return type(checked(name, "70k", hint)) is int
    except ConfigError:
        return False


def test_every_setting_is_described() -> None:
    for config in (EngineConfig, FrontendConfig):
        for name, hint in field_types(config).items():
            assert description(hint), name
