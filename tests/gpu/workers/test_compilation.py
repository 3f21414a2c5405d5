"""Everything requests need is compiled in advance, and the self-test names what it excludes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from gpu_workload import SETTINGS, launch_inproc, make_requests, model_folder, prompt

from sempre.engine.arguments import engine_config
from sempre.engine.client import launch
from sempre.engine.harness import generate, make_request

pytestmark = pytest.mark.gpu


def test_a_later_start_collects_no_kernels(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    outputs, written = [], []
    for _ in range(2):
        client = launch(engine_config(**SETTINGS, model=model_folder()))
        try:
            outputs.append(generate(client, make_requests()))
        finally:
            client.close()
        # a worker that collects writes the index
        written.append([(record, record.stat().st_mtime_ns) for record in tmp_path.glob("*/variants")])
    assert len(written[0]) == 1
    assert written[0] == written[1]
    assert outputs[0] == outputs[1]


def test_nothing_is_compiled_while_requests_are_served(monkeypatch: pytest.MonkeyPatch) -> None:
    import triton

    compiled: list[str] = []
    serving: list[bool] = []

    def after_compiling(*, repr: str, **facts: object) -> None:
        if serving:
            compiled.append(repr)

    monkeypatch.setattr(triton.knobs.runtime, "jit_post_compile_hook", after_compiling)
    # a block size other tests do not use, since this process already has their kernels
    client = launch_inproc(enable_prefix_caching=False, block_size=32, kv_cache_memory_bytes=1 << 30)
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


def test_prompt_logprobs_of_a_long_prompt_stay_within_the_budget() -> None:
    """Logits of the whole prompt would take 4,000 x 8,192 x 4 bytes; slices of 64 rows are in memory already."""
    client = launch_inproc(enable_prefix_caching=False)
    request = make_request(prompt(13, 4000), max_tokens=1, prompt_logprobs=3)
    try:
        generate(client, [request])
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        scored = generate(client, [make_request(prompt(14, 4000), ordinal=1, max_tokens=1, prompt_logprobs=3)])[0]
        peak = torch.cuda.max_memory_allocated()
    finally:
        client.close()
    # 3,999 positions, and one without a distribution where the engine reports it
    assert len(scored.prompt_logprobs) in (3999, 4000)
    assert peak - before < (32 << 20), f"{(peak - before) >> 20} MiB more while scoring"
