"""A step that needs the final hidden states of only some rows gives them the bits they have among all rows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from worker_settings import worker_config

from sempre.kernels.attention import PagedBatch
from sempre.workers.backend import LoadedModel
from sempre.workers.cpu.backend import CpuBackend
from sempre.workers.kv_cache import PagedKvCache
from sempre.workers.layers.module import Scratch, allocate
from sempre.workers.model_loading import load_with_adapters, model_setup
from sempre.workers.steps import OutputRows, StepInput

MAX_LEN, NUM_BLOCKS = 48, 8
# rows of a prompt, of a chunk that ends inside its prompt, of a request that decodes, and of one with draft tokens
COUNTS = (9, 7, 1, 5)
WANTED = (1, 0, 1, 3)


@pytest.fixture(scope="module", params=["llama", "qwen3", "gemma4", "gemma4-odd"])
def model(request: pytest.FixtureRequest, checkpoints: Callable[[str], Any]) -> LoadedModel:
    config = worker_config(
        checkpoints(request.param).folder,
        dtype="float32",
        max_model_len=MAX_LEN,
    )
    backend = CpuBackend()
    backend.begin(config)
    return load_with_adapters(model_setup(config, backend), backend)


def _step() -> StepInput:
    ends = torch.tensor(COUNTS).cumsum(0)
    starts = torch.cat([torch.zeros(1, dtype=torch.int64), ends])
    tables = torch.arange(2 * len(COUNTS), dtype=torch.int32).view(len(COUNTS), 2)
    positions = torch.cat([torch.arange(count) for count in COUNTS])
    owners = torch.repeat_interleave(torch.arange(len(COUNTS)), torch.tensor(COUNTS))
    return StepInput(
        token_ids=torch.arange(int(ends[-1])) * 5 + 11,
        positions=positions,
        slot_mapping=tables[owners, positions // 16].long() * 16 + positions % 16,
        batch=PagedBatch(tables, starts.int(), torch.tensor(COUNTS, dtype=torch.int32), max(COUNTS), 32),
    )


def _outputs(wanted: tuple[int, ...]) -> OutputRows:
    ends = torch.tensor(COUNTS).cumsum(0).tolist()
    rows = [end - back for end, count in zip(ends, wanted, strict=True) for back in range(count, 0, -1)]
    starts = [0, *torch.tensor(wanted).cumsum(0).tolist()]
    return OutputRows(torch.tensor(rows, dtype=torch.int64), torch.tensor(starts, dtype=torch.int32), max(wanted))


def _forward(model: LoadedModel, step: StepInput) -> tuple[torch.Tensor, PagedKvCache]:
    allocate(model.model, Scratch(sum(COUNTS), MAX_LEN, model.weights.activations, torch.device("cpu")))
    cache = PagedKvCache(model.spec.kv_layers, NUM_BLOCKS, 16, model.weights.dtype)
    return model.model.forward(step, cache.layers).clone(), cache


def _same_cache(a: PagedKvCache, b: PagedKvCache) -> bool:
    return all(torch.equal(x.k, y.k) and torch.equal(x.v, y.v) for x, y in zip(a.layers, b.layers, strict=True))


def test_wanted_rows_have_the_bits_they_have_among_all(model: LoadedModel) -> None:
    everything, cache = _forward(model, _step())
    outputs = _outputs(WANTED)
    some, written = _forward(model, replace(_step(), outputs=outputs))
    assert some.shape == (sum(WANTED), model.spec.hidden_size)
    assert torch.equal(some, everything[outputs.rows])
    assert not torch.equal(some, everything[outputs.rows - 1])
    assert _same_cache(cache, written)


def test_a_step_that_wants_no_row_still_writes_the_cache(model: LoadedModel) -> None:
    _, cache = _forward(model, _step())
    nothing, written = _forward(model, replace(_step(), outputs=_outputs((0, 0, 0, 0))))
    assert nothing.shape == (0, model.spec.hidden_size)
    assert _same_cache(cache, written)
