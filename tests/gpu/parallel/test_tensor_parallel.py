"""A10 on GPUs: two ranks give the bits of one GPU under the same profile, in tokens and in every log-probability."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
from gpu_workload import SETTINGS, make_requests, model_folder

from sempre.engine.arguments import engine_config
from sempre.engine.client import launch
from sempre.engine.harness import Generation, compare_generations, generate
from sempre.ipc.config import SpeculativeConfig
from sempre.ipc.errors import ConfigError

pytestmark = pytest.mark.gpu


def run(family: str | None = None, **settings: Any) -> tuple[Generation, ...]:
    """24 requests at once, in worker processes."""
    client = launch(
        engine_config(**(SETTINGS | {"model": model_folder(family), "numerics_profile": "tree8"} | settings))
    )
    try:
        return tuple(generate(client, make_requests()))
    finally:
        client.close()


@cache
def on_one_gpu(family: str | None = None) -> tuple[Generation, ...]:
    """Kernel by kernel."""
    return run(family, enforce_eager=True)


def check(found: tuple[Generation, ...], family: str | None = None) -> None:
    comparison = compare_generations(on_one_gpu(family), found)
    assert comparison.equal, comparison.first_difference


@pytest.mark.parametrize("enforce_eager", [True, False], ids=["kernel by kernel", "graphs"])
def test_two_ranks_are_one_gpu(enforce_eager: bool) -> None:
    check(run(tensor_parallel_size=2, enforce_eager=enforce_eager))


def test_small_batches_and_chunks() -> None:
    check(run(tensor_parallel_size=2, max_num_seqs=7, max_num_batched_tokens=257))


@pytest.mark.parametrize("family", ["gemma2", "phi3"])
def test_other_families(family: str) -> None:
    check(run(family, tensor_parallel_size=2), family)


@pytest.mark.parametrize("quantization", ["fp8", "fp8_weight_only"])
def test_quantised(quantization: str) -> None:
    comparison = compare_generations(
        run(quantization=quantization), run(quantization=quantization, tensor_parallel_size=2)
    )
    assert comparison.equal, comparison.first_difference


def test_drafts() -> None:
    drafts = SpeculativeConfig(method="ngram", num_speculative_tokens=4, adaptive=False)
    check(run(tensor_parallel_size=2, speculative_config=drafts))


def test_control_the_profile_of_one_chain_has_other_bits() -> None:
    assert not compare_generations(on_one_gpu(), run(numerics_profile="single")).equal


def test_models_with_experts_are_refused() -> None:
    with pytest.raises(ConfigError, match="expected 1 on GPUs for a model with experts, found 2"):
        run("qwen3-moe", tensor_parallel_size=2)
