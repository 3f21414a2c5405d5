"""`kv_cache_dtype=fp8`: bits do not depend on the batch, on chunks, on drafts, or on a warm prefix cache. One axis at a
time in test_fp8."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from workload import FP8_KV_BLOCK_BYTES, KV_BLOCK_BYTES, launch_inproc, make_requests

from sempre.engine import LLM
from sempre.engine.harness import Generation, compare_generations, generate
from sempre.ipc.config import EngineConfig, check_device_settings
from sempre.ipc.errors import ConfigError

CROWDED: dict[str, Any] = {
    "kv_cache_dtype": "fp8",
    "max_num_seqs": 5,
    "max_num_batched_tokens": 33,
    "speculative_config": {"method": "ngram", "num_speculative_tokens": 3},
}


def twice(**settings: Any) -> list[Generation]:
    """Some requests together, then again with a warm prefix cache."""
    client = launch_inproc(**settings)
    try:
        requests = make_requests()[1:9]
        again = [msgspec.structs.replace(request, request_id=f"again-{request.request_id}") for request in requests]
        cold, warm = generate(client, requests), generate(client, again)
    finally:
        client.close()
    assert sum(each.num_cached_tokens for each in warm) > 0
    return [*cold, *warm]


@pytest.mark.parametrize("numerics", ["invariant", pytest.param("control", marks=pytest.mark.product)])
def test_batches_chunks_drafts_and_prefixes(numerics: str) -> None:
    client = launch_inproc(enable_prefix_caching=False, kv_cache_dtype="fp8", numerics=numerics)
    try:
        alone = [generate(client, [request])[0] for request in make_requests()[1:9]]
        block_bytes = client.ready.kv_block_bytes
    finally:
        client.close()
    assert block_bytes == FP8_KV_BLOCK_BYTES < 0.54 * KV_BLOCK_BYTES
    comparison = compare_generations(alone * 2, twice(numerics=numerics, **CROWDED))
    if numerics == "invariant":
        assert comparison.equal, comparison.first_difference
    else:
        assert not comparison.equal, "the control gave equal bits: this test could not notice a difference"


@pytest.mark.product
def test_the_fingerprint_names_it() -> None:
    settings: dict[str, Any] = {"max_model_len": 128, "num_threads": 1, "multiprocessing": False}
    with LLM("tiny", **settings) as llm:
        plain = llm.fingerprint_parts
    with LLM("tiny", **settings, kv_cache_dtype="fp8_e4m3") as llm:
        assert llm.fingerprint_parts == {**plain, "kv_cache": "fp8-1"}
        assert llm.llm_engine.cache_config.cache_dtype == "fp8"


def test_a_gpu_refuses_it() -> None:
    config = EngineConfig(model="m", model_path="m", kv_cache_dtype="fp8")
    check_device_settings(config, "cpu")
    with pytest.raises(ConfigError, match=r"kv_cache_dtype: expected 'auto' on a GPU, found 'fp8'") as caught:
        check_device_settings(config, "cuda")
    assert caught.value.parameter == "kv_cache_dtype"
