"""Names of vLLM's Python interface: what has a meaning here works, what has none says what to do instead."""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Iterator
from typing import Any

import pytest

from sempre.engine import LLM, AsyncLLM, ConfigError, EngineArgs, Gauge, RequestError, SamplingParams
from sempre.engine.arguments import parse_arguments
from sempre.engine.frontend.engine_base import _INSTEAD
from sempre.engine.setting_values import read_size

SETTINGS: dict[str, Any] = {"max_model_len": "256", "num_threads": 1, "multiprocessing": False}
PROMPTS = ["It is a truth", "The whale", "She was"]
PARAMS = SamplingParams(max_tokens=6, seed=5, logprobs=1, ignore_eos=True)
USER = {"role": "user", "content": "Who is there?"}


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    with LLM("tiny", served_model_name=["first", "second"], **SETTINGS) as engine:
        yield engine


def bits(outputs: list[Any]) -> list[Any]:
    return [(output.prompt, output.outputs[0]) for output in outputs]


@pytest.mark.parametrize(
    ("module", "name", "own"),
    [
        ("sempre.sampling_params", "SamplingParams", "sempre.engine.sampling_params"),
        ("sempre.sampling_params", "StructuredOutputsParams", "sempre.engine.structured_outputs"),
        ("sempre.sampling_params", "RequestOutputKind", "sempre.engine.sampling_params"),
        ("sempre.outputs", "RequestOutput", "sempre.engine.outputs"),
        ("sempre.outputs", "CompletionOutput", "sempre.engine.outputs"),
        ("sempre.inputs", "TokensPrompt", "sempre.engine.frontend.prompts"),
        ("sempre.logprobs", "Logprob", "sempre.engine.outputs"),
        ("sempre.entrypoints.llm", "LLM", "sempre.engine.llm"),
        ("sempre.engine.arg_utils", "AsyncEngineArgs", "sempre.engine.arg_utils"),
        ("sempre", "EngineArgs", "sempre.engine.arg_utils"),
    ],
)
def test_paths_that_users_import_from(module: str, name: str, own: str) -> None:
    assert getattr(importlib.import_module(module), name) is getattr(importlib.import_module(own), name)


@pytest.mark.parametrize(
    ("text", "size"),
    [
        *[("2048", 2048), ("2k", 2000), ("2K", 2048), ("1.5k", 1500), ("4GiB", 4 << 30), ("4 GiB", 4 << 30)],
        *[("3MB", 3_000_000), ("512MiB", 512 << 20), ("1G", 1 << 30), ("1g", 10**9), ("-1", -1), ("0.5K", 512)],
    ],
)
def test_sizes(text: str, size: int) -> None:
    assert read_size(text) == size
    if size > 0:
        assert parse_arguments("tiny", {"kv_cache_memory_bytes": text}).engine.kv_cache_memory_bytes == size


@pytest.mark.parametrize("text", ["", "many", "4 apples", "1.0001k", "k", "1e9", "4Gi B"])
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(ConfigError, match="max_num_seqs: expected an integer such as"):
        parse_arguments("tiny", {"max_num_seqs": text})


@pytest.mark.parametrize(
    "name", ["heartbeat_timeout_s", "seed", "gpu_memory_utilization", "data_parallel_size", "enforce_eager"]
)
def test_what_is_no_number_of_things_takes_no_size(name: str) -> None:
    with pytest.raises(ConfigError, match=name):
        parse_arguments("tiny", {name: "1k"})


@pytest.mark.parametrize("kind", [LLM, AsyncLLM, EngineArgs])
def test_a_mistyped_keyword_is_named_with_the_one_that_was_meant(kind: Any) -> None:
    name = kind.__name__
    for keywords, hint in (
        ({"modle": "tiny"}, "'modle'. Did you mean 'model'"),
        ({"max_model_ln": 1}, "max_model_len"),
    ):
        with pytest.raises(TypeError, match=f"{name} has no keyword .*{hint}"):
            kind(**keywords)
    with pytest.raises(TypeError, match=f"{name} needs a model"):
        kind()


@pytest.mark.parametrize("kind", [LLM, AsyncLLM])
@pytest.mark.parametrize("name", sorted(_INSTEAD))
def test_a_method_that_is_not_there_says_what_to_do(kind: Any, name: str) -> None:
    engine = object.__new__(kind)
    assert not hasattr(engine, name)
    with pytest.raises(AttributeError, match=rf"{kind.__name__} has no '{name}'\. [A-Z].*\.$"):
        getattr(engine, name)
    with pytest.raises(AttributeError, match=r"'generat'\. Did you mean 'generate'"):
        _ = engine.generat


def test_engine_args_are_the_keywords() -> None:
    args = EngineArgs("tiny", max_model_len="1k", swap_space=4)
    assert (args.max_model_len, args.seed, args.enable_lora) == ("1k", 0, False)
    args.max_num_seqs = 3
    keywords = {name: value for name, value in dataclasses.asdict(args).items() if name != "model"}
    assert parse_arguments(args.model, keywords) == parse_arguments("tiny", {"max_model_len": 1000, "max_num_seqs": 3})
    with pytest.raises(TypeError, match="must be EngineArgs, got dict"):
        LLM.from_engine_args({"model": "tiny"})  # type: ignore[arg-type]


def test_an_engine_of_engine_args(llm: LLM) -> None:
    args = EngineArgs("tiny", **SETTINGS)
    expected = bits(llm.generate(PROMPTS, PARAMS, use_tqdm=False))
    for make in (LLM.from_engine_args, lambda args: LLM(**dataclasses.asdict(args))):
        with make(args) as other:
            assert bits(other.generate(PROMPTS, PARAMS, use_tqdm=False)) == expected
    engine = AsyncLLM.from_engine_args(args)
    assert engine.config == parse_arguments("tiny", SETTINGS).engine
    engine.shutdown()


@pytest.mark.parametrize("multiprocessing", [True, False])
def test_what_is_enqueued_comes_in_its_order(llm: LLM, multiprocessing: bool) -> None:
    expected = bits(llm.generate(PROMPTS, PARAMS, use_tqdm=False))
    with LLM("tiny", **{**SETTINGS, "multiprocessing": multiprocessing}) as engine:
        assert engine.wait_for_completion(use_tqdm=False) == []
        # the first ends last
        first = engine.enqueue(PROMPTS[0], SamplingParams(max_tokens=40, seed=1, ignore_eos=True))
        rest = engine.enqueue(PROMPTS, PARAMS, use_tqdm=False, lora_request=None)
        assert len({*first, *rest}) == 4
        # other calls in between neither take nor change them
        assert bits(engine.generate(PROMPTS, PARAMS, use_tqdm=False)) == expected
        chat = engine.enqueue_chat([USER], PARAMS)
        outputs = engine.wait_for_completion(use_tqdm=False)
        assert [output.request_id for output in outputs] == [*first, *rest, *chat]
        assert bits(outputs[1:4]) == expected
        assert len(outputs[0].outputs[0].token_ids) == 40
        assert bits(outputs[4:]) == bits(engine.chat([USER], PARAMS, use_tqdm=False))
        assert engine.wait_for_completion(use_tqdm=False) == []
        assert engine._frontend.processor.num_unfinished == 0
        with pytest.raises(RequestError, match="lora_request"):
            engine.enqueue(PROMPTS, PARAMS, lora_request="a")


def test_what_users_read_of_the_engine(llm: LLM) -> None:
    engine = llm.llm_engine
    model = engine.model_config
    assert (model.model, model.max_model_len, model.seed, model.dtype) == ("tiny", 256, 0, "bfloat16")
    assert model.get_vocab_size() == llm.get_tokenizer().vocab_size == 4096
    assert model.hf_config.num_hidden_layers == 6
    assert engine.vllm_config.cache_config.block_size == 16
    assert engine.cache_config.num_gpu_blocks * 16 >= 256
    assert engine.scheduler_config.max_num_seqs == 128
    assert engine.parallel_config.world_size == 1
    assert engine.get_tokenizer() is engine.tokenizer is llm.get_tokenizer()
    with pytest.raises(AttributeError, match=r"llm_engine has no 'model_executor' here: .*collective_rpc"):
        _ = engine.model_executor


def test_metrics_have_the_served_name(llm: LLM) -> None:
    names = {metric.labels.get("model_name") for metric in llm.get_metrics() if isinstance(metric, Gauge)}
    assert names == {"first"}
    for wrong in ([], "", 3, [3]):
        with pytest.raises(ConfigError, match="served_model_name must be a name or a list of names"):
            parse_arguments("tiny", {"served_model_name": wrong})
