"""LoadModel and StartServing: what they answer, what they refuse, and the public methods."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from worker_settings import worker_config

from sempre.ipc.config import SpeculativeConfig
from sempre.ipc.errors import ConfigError
from sempre.ipc.messages import CallMethod, LoadModel, StartServing
from sempre.workers.seeding import rng_digests
from sempre.workers.worker import Worker


def load(folder: Path, **settings: Any) -> Any:
    worker = Worker()
    try:
        return worker.load_model(LoadModel(config=worker_config(folder, **settings)))
    finally:
        worker.shutdown()


def test_answers(checkpoints: Any, serve: Any) -> None:
    serving = serve(checkpoints("llama").folder, max_num_seqs=3, max_model_len=100)
    loaded = serving.loaded
    assert loaded.vocab_size == 320
    assert loaded.max_model_len == 100
    assert loaded.eos_token_ids == [2]
    # 3 layers, keys and values, 2 heads of 16, 16 tokens, 4 bytes
    assert loaded.kv_block_bytes == 3 * 2 * 2 * 16 * 16 * 4
    assert loaded.available_kv_blocks == 3 * 7
    assert {"load_weights", "self_test", "compile_kernels"} <= set(loaded.phase_seconds)
    assert {"allocate", "warm_up", "compile_kernels"} <= set(serving.ready.phase_seconds)
    assert set(loaded.fingerprint) == {
        "weights",
        "config",
        "dtype",
        "storage",
        "quantization",
        "numerics",
        "numerics_profile",
        "threads",
        "architecture",
        "torch",
        "numba",
        "llvmlite",
        "numpy",
        "python",
        "llguidance",
    }
    assert loaded.fingerprint["numerics"] == "cpu-fma-3"


def test_generation_config_decides_the_end_of_sequence(checkpoints: Any, tmp_path: Path) -> None:
    source = checkpoints("llama").folder
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((source / name).read_bytes())
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [7, 2, 7]}')
    assert load(tmp_path).eos_token_ids == [7, 2]


def test_generators_are_seeded_twice_as_a_plain_process_would(checkpoints: Any, serve: Any) -> None:
    serving = serve(checkpoints("llama").folder, seed=2**40 + 5)
    random.seed(2**40 + 5)
    np.random.seed([5, 2**8])
    torch.manual_seed(2**40 + 5)
    assert serving.loaded.digests_before_load == serving.ready.digests_after_warm_up == rng_digests()


def test_what_is_drawn_between_the_two_seedings_leaves_no_trace(checkpoints: Any) -> None:
    worker = Worker()
    config = worker_config(checkpoints("llama").folder, seed=9)
    loaded = worker.load_model(LoadModel(config=config))
    random.random(), np.random.rand(), torch.rand(1)
    drawn = rng_digests()
    ready = worker.start_serving(StartServing(num_blocks=loaded.available_kv_blocks))
    assert ready.digests_after_warm_up == rng_digests() == loaded.digests_before_load != drawn
    worker.shutdown()


def test_execution_draws_nothing_from_the_global_generators(checkpoints: Any, serve: Any, prompt: Any) -> None:
    from sempre.ipc.messages import SamplingSpec

    serving = serve(checkpoints("qwen2").folder)
    before = serving.worker.call(CallMethod(call_id=1, method="rng_digests")).result
    serving.run(prompt("a", [4, 5, 6], SamplingSpec(max_tokens=5, temperature=1.0, top_p=0.9)))
    assert serving.worker.call(CallMethod(call_id=2, method="rng_digests")).result == before


def test_public_methods_answer_in_msgpack_values(checkpoints: Any, serve: Any) -> None:
    worker = serve(checkpoints("llama").folder).worker
    for method, args in (
        ("fingerprint", []),
        ("kv_cache_digest", [[0]]),
        ("memory", []),
        ("num_threads", []),
        ("parameter_digest", []),
        ("ping", []),
        ("rng_digests", []),
        ("self_test", []),
    ):
        reply = worker.call(CallMethod(call_id=1, method=method, args=args))
        assert reply.error is None, method
        assert msgspec.msgpack.decode(msgspec.msgpack.encode(reply.result)) == reply.result


@pytest.mark.parametrize(
    ("settings", "parameter"),
    [
        ({"max_model_len": 257}, "max_model_len"),
        ({"block_size": 32}, "block_size"),
        ({"kv_cache_memory_bytes": 15 * 12288, "max_model_len": 256}, "kv_cache_memory_bytes"),
        ({"kv_cache_memory_bytes": 12287}, "kv_cache_memory_bytes"),
        ({"kv_cache_memory_bytes": 10**15}, "kv_cache_memory_bytes"),
    ],
)
def test_settings_that_cannot_be_honoured_are_refused(
    settings: dict[str, Any], parameter: str, checkpoints: Any
) -> None:
    with pytest.raises(ConfigError, match=parameter) as caught:
        load(checkpoints("llama").folder, **settings)
    assert caught.value.parameter == parameter


def test_more_threads_than_cores_are_refused(checkpoints: Any) -> None:
    config = worker_config(checkpoints("llama").folder, num_threads=4096)
    with pytest.raises(ConfigError, match="num_threads"):
        Worker().load_model(LoadModel(config=config))


def test_too_little_cache_memory_states_the_sums(checkpoints: Any) -> None:
    with pytest.raises(ConfigError, match=r"needs 16 blocks of 12288 bytes = 196608 bytes; .* = 184320 bytes holds 15"):
        load(checkpoints("llama").folder, kv_cache_memory_bytes=15 * 12288, max_model_len=256)
    assert load(checkpoints("llama").folder, kv_cache_memory_bytes=16 * 12288).available_kv_blocks == 16


def test_a_length_that_is_left_open_fits_the_cache(
    checkpoints: Any, serve: Any, caplog: pytest.LogCaptureFixture
) -> None:
    folder = checkpoints("llama").folder
    assert load(folder, kv_cache_memory_bytes=16 * 12288).max_model_len == 256
    assert not caplog.records
    serving = serve(folder, kv_cache_memory_bytes=5 * 12288)
    assert (serving.loaded.max_model_len, serving.loaded.available_kv_blocks) == (80, 5)
    assert "max_model_len is 80 tokens, what the KV cache holds; the model could take 256" in caplog.text


def test_the_number_of_sequences_that_is_left_open(checkpoints: Any) -> None:
    loaded = load(checkpoints("llama").folder, max_num_batched_tokens=None)
    assert loaded.max_num_seqs == 128
    assert loaded.max_num_batched_tokens == 128 + loaded.max_prompt_tokens
    assert load(checkpoints("llama").folder, max_num_seqs=200).max_num_seqs == 200


def test_the_share_of_a_draft_model_is_told(checkpoints: Any) -> None:
    folder = checkpoints("llama").folder
    drafts = SpeculativeConfig(method="draft_model", model="m", model_path=str(folder))
    settings: dict[str, Any] = {"speculative_config": drafts, "max_model_len": 256}
    text = r"needs 16 blocks of 24576 bytes \(50% of that for the draft model\) = 393216 bytes; .* holds 15"
    with pytest.raises(ConfigError, match=text):
        load(folder, kv_cache_memory_bytes=15 * 24576, **settings)
    assert load(folder, kv_cache_memory_bytes=16 * 24576, **settings).available_kv_blocks == 16


def test_the_block_sizes_of_a_device_are_told(checkpoints: Any) -> None:
    text = "block_size: a CPU has blocks of 16 tokens only, found 32. Leave it out, which gives 16."
    with pytest.raises(ConfigError) as caught:
        load(checkpoints("llama").folder, block_size=32)
    assert str(caught.value) == text


@pytest.mark.parametrize(("dtype", "element_bytes"), [("float32", 4), ("bfloat16", 2), ("float16", 2)])
def test_the_cache_is_stored_in_the_dtype_that_was_reckoned_with(
    dtype: str, element_bytes: int, checkpoints: Any, serve: Any
) -> None:
    serving = serve(checkpoints("llama").folder, dtype=dtype, max_num_seqs=3, max_model_len=100)
    assert serving.loaded.kv_block_bytes == 3 * 2 * 2 * 16 * 16 * element_bytes
    memory = serving.worker.call(CallMethod(call_id=1, method="memory")).result
    assert memory["kv_cache_bytes"] == serving.loaded.kv_block_bytes * serving.loaded.available_kv_blocks


def test_dummy_weights_are_a_function_of_the_seed(checkpoints: Any, tmp_path: Path) -> None:
    config = json.loads((checkpoints("qwen3").folder / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config))
    first = load(tmp_path, load_format="dummy", seed=1).fingerprint
    assert load(tmp_path, load_format="dummy", seed=1).fingerprint == first
    assert load(tmp_path, load_format="dummy", seed=2).fingerprint["weights"] != first["weights"]


def test_dummy_weights_generate(checkpoints: Any, serve: Any, prompt: Any, tmp_path: Path) -> None:
    from sempre.ipc.messages import SamplingSpec

    (tmp_path / "config.json").write_text((checkpoints("llama-biases").folder / "config.json").read_text())
    serving = serve(tmp_path, load_format="dummy", dtype="bfloat16")
    done = serving.run(prompt("a", [3, 4, 5], SamplingSpec(max_tokens=4)))["a"]
    assert len(done.token_ids) == 4


def test_thread_count_is_restored_at_shutdown(checkpoints: Any) -> None:
    before = torch.get_num_threads()
    load(checkpoints("llama").folder)
    assert torch.get_num_threads() == before
