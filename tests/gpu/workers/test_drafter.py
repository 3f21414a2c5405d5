"""Drafts of a draft model on a GPU, as graphs and kernel by kernel; known sequences, and new ones."""

from __future__ import annotations

import pytest
import torch
from draft_cases import differences
from gpu_workload import model_folder
from worker_settings import worker_config

from sempre.workers.drafters.model import ModelDrafter
from sempre.workers.gpu.backend import GpuBackend
from sempre.workers.model_loading import load_with_adapters, model_setup
from sempre.workers.state_cache import CacheSizes

pytestmark = pytest.mark.gpu

MAX_SEQS = 3


def make_drafter(*, enforce_eager: bool, max_num_batched_tokens: int) -> ModelDrafter:
    """With few places and blocks."""
    config = worker_config(
        model_folder(),
        dtype="bfloat16",
        load_format="dummy",
        max_model_len=512,
        max_num_seqs=MAX_SEQS,
        max_num_batched_tokens=max_num_batched_tokens,
        block_size=16,
        device="cuda",
        enforce_eager=enforce_eager,
    )
    backend = GpuBackend(torch.device("cuda", 0), None)
    backend.begin(config)
    model = load_with_adapters(model_setup(config, backend), backend)
    backend.available_sizes(model)
    runner = backend.make_drafter(backend.make_runner(model, CacheSizes(9)))
    runner.prepare()
    return ModelDrafter(runner, max_num_seqs=MAX_SEQS)


@pytest.mark.parametrize("max_num_batched_tokens", [5, 64])
def test_sequences_that_stay(max_num_batched_tokens: int) -> None:
    stays = make_drafter(enforce_eager=False, max_num_batched_tokens=max_num_batched_tokens)
    other = make_drafter(enforce_eager=True, max_num_batched_tokens=512)
    assert differences(stays, lambda: other, 60) == []
