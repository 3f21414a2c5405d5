"""A server's metrics of a run whose every token is known."""

from __future__ import annotations

import re
from pathlib import Path

from server_process import ServerProcess
from workload import KV_BLOCK_BYTES

NUM_BLOCKS = 12
MODEL = 'model_name="my-model"'
ENGINE = 'engine="0"'


def read(server: ServerProcess) -> dict[str, float]:
    lines = [line for line in server.http.get("/metrics").text.splitlines() if not line.startswith("#")]
    return {line.rpartition(" ")[0].removeprefix("sempre:"): float(line.rpartition(" ")[2]) for line in lines}


def test_a_run_with_preemptions_is_counted_to_the_token_under_the_served_name(tmp_path: Path) -> None:
    flags = ["--max-model-len", "96", "--max-num-seqs", "8", "--num-threads", "1", "--served-model-name", "my-model"]
    flags += ["--kv-cache-memory-bytes", str(NUM_BLOCKS * KV_BLOCK_BYTES)]
    prompts = [[token, *range(20, 29)] for token in range(5, 11)]
    with ServerProcess(tmp_path / "log", *flags) as server:
        answer = server.complete(model="my-model", prompt=prompts, max_tokens=50, seed=1, ignore_eos=True)
        assert answer.status_code == 200, answer.text
        refused = server.complete(model="tiny", prompt=prompts)
        assert refused.status_code == 404
        server.wait_until_idle()
        found = read(server)

    assert found[f"prompt_tokens_total{{{ENGINE},{MODEL}}}"] == 6 * 10
    assert found[f"generation_tokens_total{{{ENGINE},{MODEL}}}"] == 6 * 50
    assert found[f"iteration_tokens_total_sum{{{MODEL}}}"] == 6 * 10 + 6 * 50
    assert found[f"iteration_tokens_total_count{{{MODEL}}}"] == found[f"iterations_total{{{ENGINE},{MODEL}}}"]
    # six sequences of 60 tokens need 24 blocks
    preemptions = found[f"num_preemptions_total{{{ENGINE},{MODEL}}}"]
    assert preemptions > 0
    assert found[f"request_num_preemptions_sum{{{MODEL}}}"] == preemptions
    assert found[f"request_num_preemptions_count{{{MODEL}}}"] == 6
    for reason in ("capacity", "deferred"):
        assert found[f'num_requests_waiting_by_reason{{{ENGINE},{MODEL},reason="{reason}"}}'] == 0

    models = {name for line in found for name in re.findall(r'model_name="([^"]*)"', line)}
    assert models == {"my-model"}, "neither a folder nor the name in the catalogue"
    [info] = [dict(re.findall(r'(\w+)="([^"]*)"', line)) for line in found if line.startswith("cache_config_info{")]
    assert info == {
        "engine": "0",
        "block_size": "16",
        "cache_dtype": "auto",
        "enable_prefix_caching": "True",
        "gpu_memory_utilization": "0.92",
        "kv_cache_memory_bytes": str(NUM_BLOCKS * KV_BLOCK_BYTES),
        "kv_cache_size_tokens": str(NUM_BLOCKS * 16),
        "num_gpu_blocks": str(NUM_BLOCKS),
        "num_gpu_blocks_override": "None",
    }
