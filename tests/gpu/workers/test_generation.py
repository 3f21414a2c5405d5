"""A worker on a GPU from start to end: real weights, memory, errors, and what it reports of itself."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch
from gpu_workload import KV_BLOCK_BYTES, SETTINGS, launch_inproc, make_requests, model_folder, prompt

from sempre.engine import LLM, SamplingParams
from sempre.engine.arguments import engine_config
from sempre.engine.client.inproc import InprocClient
from sempre.engine.harness import generate, make_request
from sempre.ipc.errors import ConfigError
from sempre.ipc.messages import CallWorkers, CallWorkersReply
from sempre.workers.gpu.memory import RUNTIME_RESERVE_BYTES

pytestmark = pytest.mark.gpu

SEQUENCE_BYTES = SETTINGS["max_model_len"] // 16 * KV_BLOCK_BYTES  # in the cache
SLACK_BYTES = 64 << 20  # of other tests' engines in this process

# greedy continuations by the CPU's kernels, float32 activations
CPU_TOKENS = {
    "It was a dark and stormy night, and the": [2230, 363, 261, 3532, 91, 1327, 16, 201, 23, 28, 1463, 440],
    "And God said, Let there be": [466, 530, 1435, 289, 570, 14, 422, 746, 369, 2039, 16, 201],
    "To be, or not to be: that is the question": [16, 201, 201, 61, 1210, 490, 1220, 54, 39, 714, 637, 201],
    "Call me Ishmael. Some years ago": [14, 262, 391, 335, 3643, 1851, 86, 4071, 483, 289, 262, 390],
}


def test_trained_weights() -> None:
    """Most greedy tokens agree with the CPU's, whose arithmetic differs."""
    params = SamplingParams(temperature=0.0, max_tokens=12)
    with LLM("tiny", device="cuda", multiprocessing=False, max_model_len=512) as llm:
        outputs = llm.generate([*CPU_TOKENS], params, use_tqdm=False)
    pairs = [
        (a, b)
        for output, tokens in zip(outputs, CPU_TOKENS.values(), strict=True)
        for a, b in zip(output.outputs[0].token_ids, tokens, strict=True)
    ]
    assert sum(a == b for a, b in pairs) >= 0.6 * len(pairs), pairs


def test_shutdown_returns_the_memory() -> None:
    gc.collect()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_reserved()
    client = launch_inproc()
    during = torch.cuda.memory_reserved()
    generate(client, make_requests(4))
    client.close()
    gc.collect()
    assert during > before + 6000 * KV_BLOCK_BYTES
    assert torch.cuda.memory_reserved() <= before + SLACK_BYTES


def memory_with(**settings: Any) -> dict[str, int]:
    """Bytes, as the worker of an engine with these settings counts them."""
    client = launch_inproc(kv_cache_memory_bytes=None, **settings)
    try:
        client.send(CallWorkers(call_id=1, method="memory"))
        reply = client.receive()
    finally:
        client.close()
    assert isinstance(reply, CallWorkersReply)
    memory = reply.results[0]
    assert isinstance(memory, dict)
    return memory


def test_the_cache_is_sized_from_the_share_of_the_memory() -> None:
    """A share too small for half of what `max_num_seqs` could use: on any card it alone decides."""
    useful = 1024 * SEQUENCE_BYTES
    total = torch.cuda.get_device_properties(0).total_memory
    memory = memory_with(gpu_memory_utilization=useful / 2 / total, max_num_seqs=1024)
    share = useful / 2 * memory["gpu_total_bytes"] / total
    # all of it except the reserve for graphs and libraries, and less than a block
    least = share - RUNTIME_RESERVE_BYTES - 4 * KV_BLOCK_BYTES
    assert least - SLACK_BYTES < memory["gpu_reserved_bytes"] < share
    assert memory["kv_cache_bytes"] > 0.8 * share


def test_the_cache_holds_no_more_than_can_be_used() -> None:
    memory = memory_with(gpu_memory_utilization=0.5, max_num_seqs=4)
    assert 0.3 * memory["gpu_total_bytes"] > 5 * SEQUENCE_BYTES
    assert memory["kv_cache_bytes"] == 4 * SEQUENCE_BYTES


def test_too_little_memory_states_the_sums() -> None:
    with pytest.raises(ConfigError) as caught:
        launch_inproc(kv_cache_memory_bytes=100 * KV_BLOCK_BYTES)
    text = str(caught.value)
    for part in ("weights", "activations", "other processes", "max_model_len=1600 would fit"):
        assert part in text


def test_the_fingerprint_names_what_the_bits_depend_on() -> None:
    client = launch_inproc()
    fingerprint = client.ready.fingerprint
    client.close()
    assert fingerprint["device"] == torch.cuda.get_device_name()
    assert fingerprint["numerics"] == "cuda-bf16-1"
    assert fingerprint["graphs"] == "on"
    for part in ("weights", "driver", "cuda", "triton", "torch", "architecture", "kernels"):
        assert fingerprint[part]


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_other_dtypes(dtype: str) -> None:
    """The guarantee holds in them too: a request alone and among others."""
    request = make_request(prompt(5, 70), max_tokens=6, logprobs=2, temperature=1.0)
    others = [make_request(prompt(6 + i, 9 * i + 1), ordinal=i + 1, max_tokens=5) for i in range(8)]
    settings = SETTINGS | {"model": model_folder(), "multiprocessing": False, "dtype": dtype}
    client = InprocClient.launch(engine_config(**settings, enable_prefix_caching=False))
    try:
        alone = generate(client, [request])[0]
        beside = generate(client, [request, *others])[0]
    finally:
        client.close()
    assert alone == beside


def test_a_request_that_fails_fails_alone() -> None:
    """No token is allowed for it; its neighbours go on."""
    from sempre.ipc.errors import RequestError

    bad = make_request([5, 6], request_id="bad", max_tokens=4, allowed_token_ids=[10**6])
    good = make_request(prompt(3, 30), request_id="good", ordinal=1, max_tokens=4)
    client = launch_inproc()
    try:
        with pytest.raises(RequestError):
            generate(client, [bad, good])
        assert len(generate(client, [make_request([7], request_id="next", ordinal=2, max_tokens=4)])[0].token_ids) == 4
    finally:
        client.close()
