"""Axes A1, A3, A4, A5, A6, A9, A14 and A15 of families that compute differently: soft caps, windows in every other
layer, a mixture of experts, sinks, states instead of keys and values."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cache
from typing import Any

import msgspec
import pytest
from gpu_workload import KV_BLOCK_BYTES, OUTPUT_TOKENS, launch_inproc, make_requests, model_folder, prompt

from sempre.engine.client.inproc import InprocClient
from sempre.engine.harness import Generation, compare_generations, generate, make_request

pytestmark = pytest.mark.gpu

FAMILIES = (
    "gemma2", "qwen3-moe", "qwen3-moe fp8", "qwen3-moe fp8_weight_only", "mixtral", "qwen2-moe", "glm4",
    "glm4-moe", "smollm3", "granite", "olmo3", "phi3", "gemma3", "gpt-oss",
    "gemma4", "gemma4-keys-are-values", "gemma4-moe", "qwen3.5", "qwen3.5-moe", "qwen3.5 fp8",
)  # fmt: skip


def launch(family: str, **settings: Any) -> InprocClient:
    name, _, quantization = family.partition(" ")
    # a family's heads may be twice as wide
    bytes_ = {"kv_cache_memory_bytes": 12000 * KV_BLOCK_BYTES, "quantization": quantization or None}
    return launch_inproc(model=model_folder(name), **(bytes_ | settings))


@cache
def alone(family: str, numerics: str = "invariant") -> tuple[Generation, ...]:
    """Every request by itself, kernel by kernel."""
    client = launch(family, enforce_eager=True, enable_prefix_caching=False, numerics=numerics)
    try:
        return tuple(generate(client, [request])[0] for request in make_requests())
    finally:
        client.close()


def check(family: str, run: Sequence[Generation]) -> None:
    comparison = compare_generations(alone(family), run)
    assert comparison.equal, comparison.first_difference


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"enforce_eager": True},
        {"max_num_seqs": 3},
        {"max_num_batched_tokens": 33, "max_num_seqs": 24},
        {"max_num_batched_tokens": 257},
        {"max_num_batched_tokens": 1000},
        {"speculative_config": {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_min": 1}},
    ],
    ids=str,
)
def test_batches_chunks_graphs_and_speculation(family: str, settings: dict[str, Any]) -> None:
    client = launch(family, **settings)
    try:
        assert client.ready.fingerprint["kernels"] == "all"
        check(family, generate(client, make_requests()))
    finally:
        client.close()


def test_prefix_cache_and_preemption(family: str) -> None:
    # of models with states, a slot for each request comes out of the same memory
    client = launch(family, kv_cache_memory_bytes=1100 * KV_BLOCK_BYTES, max_num_seqs=64)
    try:
        for n in range(3):
            named = [msgspec.structs.replace(r, request_id=f"{n}-{r.request_id}") for r in make_requests()]
            check(family, generate(client, named))
    finally:
        client.close()


@pytest.fixture(scope="module")
def clients() -> Iterator[dict[str, InprocClient]]:
    made: dict[str, InprocClient] = {}
    yield made
    for client in made.values():
        client.close()


@pytest.mark.parametrize("batch", [2, 5, 8, 17, 33, 64, 100, 200, 256])
def test_every_size_of_batch(family: str, batch: int, clients: dict[str, InprocClient]) -> None:
    if family not in clients:
        for name in list(clients):
            clients.pop(name).close()
        clients[family] = launch(family, enable_prefix_caching=False)
    wanted = make_request(prompt(77, 40), seed=7, ordinal=0, max_tokens=6, logprobs=4, temperature=1.0)
    others = [
        make_request(prompt(100 + i, 1 + 13 * i % 90), seed=i, ordinal=i, max_tokens=5 + i % 3, temperature=1.0)
        for i in range(1, batch)
    ]
    lone = generate(clients[family], [wanted])
    comparison = compare_generations(lone, generate(clients[family], [wanted, *others])[:1])
    assert comparison.equal, comparison.first_difference


def test_scoring(family: str) -> None:
    """Prompt log-probabilities of prompt and output equal those given while generating."""
    index, request = 1, make_requests()[1]
    lone = alone(family)[index]
    client = launch(family, enable_prefix_caching=False)
    try:
        whole = [*request.prompt_token_ids, *lone.token_ids]
        again = make_request(whole, max_tokens=1, prompt_logprobs=0, ordinal=900)
        scored = generate(client, [again])[0].prompt_logprobs[-OUTPUT_TOKENS:]
    finally:
        client.close()
    assert [p.bits[0] for p in scored] == [p.bits[0] for p in lone.logprobs]


@pytest.mark.parametrize(
    "name", ["gemma2", "qwen3-moe", "smollm3", "granite", "olmo3", "phi3", "gemma3", "gpt-oss", "gemma4", "qwen3.5"]
)
def test_control(name: str) -> None:
    """The library's ordinary matmuls give other bits in a batch: these tests can fail."""
    client = launch(name, numerics="control")
    try:
        batch = generate(client, make_requests())
    finally:
        client.close()
    assert not compare_generations(alone(name, "control"), batch).equal


def test_nothing_is_compiled_while_requests_are_served(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import triton

    compiled: list[str] = []
    serving: list[bool] = []

    def after_compiling(*, repr: str, **facts: object) -> None:
        if serving:
            compiled.append(repr)

    monkeypatch.setattr(triton.knobs.runtime, "jit_post_compile_hook", after_compiling)
    # a block size other tests do not use, since this process already has their kernels
    client = launch(family, enable_prefix_caching=False, block_size=32, kv_cache_memory_bytes=1 << 30)
    serving.append(True)
    try:
        generate(client, make_requests())
        for batch in (3, 24, 100, 200):
            generate(
                client,
                [
                    make_request(prompt(i, 1 + 17 * i % 300), seed=i, ordinal=i, max_tokens=4, temperature=1.0)
                    for i in range(batch)
                ],
            )
    finally:
        client.close()
    assert compiled == []
