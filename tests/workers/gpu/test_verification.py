"""The GPU runner's steps with draft tokens, where there is no GPU: the CPU computes the forward pass, Triton's
interpreter the sampler, and the results must be those of the CPU's runner without drafts, bit for bit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from no_gpu import without_gpu
from worker_settings import worker_config

from sempre.engine.scheduling import Limits, Scheduler
from sempre.engine.speculation import SpeculationPlan, speculation
from sempre.ipc.config import SpeculativeConfig
from sempre.ipc.messages import (
    RequestSpec,
    SamplingSpec,
    StepCosts,
    StepResult,
)
from sempre.workers.backend import LoadedModel
from sempre.workers.cpu.backend import CpuBackend
from sempre.workers.cpu.runner import CpuModelRunner
from sempre.workers.kv_cache import PagedKvCache
from sempre.workers.layers.module import Scratch, allocate, sharing
from sempre.workers.model_loading import load_with_adapters, model_setup
from sempre.workers.models.base import CausalLM
from sempre.workers.step_validation import StepLimits

MAX_SEQS, MAX_TOKENS, MAX_LEN, MAX_DRAFTS, NUM_BLOCKS = 6, 24, 48, 16, 7
KINDS: list[dict[str, Any]] = [
    {"temperature": 0.0, "logprobs": 2},
    {"temperature": 0.9, "repetition_penalty": 1.3, "frequency_penalty": 0.5, "logprobs": 1},
    {"temperature": 1.2, "bad_words_token_ids": [[7], [9, 11], [3, 5, 8]], "presence_penalty": 0.4},
    {"temperature": 0.7, "min_tokens": 6, "eos_token_ids": [2]},
    {"temperature": 1.0, "prompt_logprobs": 1, "logprobs": 3},
    {"temperature": 1.0, "logit_bias": {5: 3.0}, "logprobs": 30},
]

Output = tuple[list[int], list[tuple[Any, ...]], list[tuple[Any, ...]]]  # tokens, their log-probabilities, the prompt's


@pytest.fixture(scope="module")
def model(checkpoints: Callable[[str], Any]) -> LoadedModel:
    folder: Path = checkpoints("llama").folder
    config = worker_config(folder, dtype="float32", max_model_len=MAX_LEN)
    backend = CpuBackend()
    backend.begin(config)
    return load_with_adapters(model_setup(config, backend), backend)


def _cpu_runner(model: LoadedModel) -> CpuModelRunner:
    return CpuModelRunner(
        _allocated(model),
        PagedKvCache(model.spec.kv_layers, NUM_BLOCKS, 16, model.weights.dtype),
        model.make_grammar_compiler(),
        StepLimits(MAX_LEN, MAX_SEQS, MAX_TOKENS, model.spec.vocab_size),
        rank=0,
    )


def _allocated(model: LoadedModel) -> CausalLM:
    own = sharing(model.model)
    allocate(own, Scratch(MAX_TOKENS, MAX_LEN, model.weights.activations, torch.device("cpu")))
    return own


@pytest.fixture
def gpu_runner(model: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> Any:
    pytest.importorskip("triton", reason="needs the triton package (test requirement on Linux)")
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU: tests/gpu runs the compiled kernels")
    from sempre.kernels.sampling.gpu import Tiles
    from sempre.workers.gpu import runner, staging
    from sempre.workers.sampling.gpu_sampler import GpuSampler

    without_gpu(monkeypatch, staging)
    rows = MAX_SEQS + MAX_DRAFTS
    tiles = Tiles(noise=512, logprobs=512, edits=512, phrases=4, cut=512, cut_piece=512, cut_sample=2, cut_list=16)
    spec = model.spec
    memory = runner.StepMemory(
        _allocated(model),
        GpuSampler(
            device=torch.device("cpu"), vocab_size=spec.vocab_size, max_num_seqs=rows, num_slots=MAX_SEQS, tiles=tiles
        ),
        torch.empty(rows, spec.hidden_size),
        torch.empty(rows, spec.vocab_size),
    )
    limits = StepLimits(MAX_LEN, MAX_SEQS, MAX_TOKENS, spec.vocab_size, MAX_DRAFTS)
    cache = PagedKvCache(spec.kv_layers, NUM_BLOCKS, 16, model.weights.dtype)
    return runner.GpuModelRunner(memory, cache, model.make_grammar_compiler(), limits, rank=0, graphs=False)


def _specs() -> list[RequestSpec]:
    return [
        RequestSpec(
            request_id=f"r{i}",
            prompt_token_ids=[10 + i, *([20, 21, 22 + i] * (1 + 2 * (i % 3)))],
            params=SamplingSpec(max_tokens=12 + i, **kind),
            seed=i,
            ordinal=i,
        )
        for i, kind in enumerate(KINDS)
    ]


def _run(
    runner: Any, specs: list[RequestSpec], plan: SpeculationPlan | None, depth: int
) -> tuple[dict[str, Output], Scheduler]:
    """To the end, with up to `depth` steps submitted before the first of them is collected."""
    limits = Limits(
        num_blocks=NUM_BLOCKS,
        block_size=16,
        max_model_len=MAX_LEN,
        max_num_seqs=MAX_SEQS,
        max_num_batched_tokens=MAX_TOKENS,
        max_draft_tokens=MAX_DRAFTS if plan is not None else 0,
    )
    scheduler = Scheduler(limits, policy="fcfs", enable_prefix_caching=True, speculation=plan)
    for spec in specs:
        scheduler.add(spec)
    outputs: dict[str, Output] = {spec.request_id: ([], [], []) for spec in specs}
    while scheduler.has_unfinished() or runner.steps_in_flight:
        while runner.steps_in_flight < depth and (step := scheduler.schedule()) is not None:
            runner.submit(step)
        step, sampled = runner.collect()
        result = StepResult(rank=0, step_id=step.step_id, sampled=sampled)
        for delta in scheduler.update(step, result):
            assert delta.error is None, delta.error
            tokens, *reported = outputs[delta.request_id]
            tokens += delta.token_ids
            for rows, part in zip(reported, (delta.logprobs, delta.prompt_logprobs), strict=True):
                if part is not None:
                    ids = np.frombuffer(part.token_ids, "<i4").reshape(part.num_rows, -1).tolist()
                    values = np.frombuffer(part.logprobs, "<u4").reshape(part.num_rows, -1).tolist()
                    ranks = np.frombuffer(part.ranks, "<i4").tolist()
                    rows += list(zip(ids, values, ranks, strict=True))
    return outputs, scheduler


class _Guesser:
    """Right two times out of three."""

    def __init__(self, sequences: list[list[int]]) -> None:
        self._sequences = sequences
        self._tokens: list[int] = []

    def extend(self, token_ids: Any) -> None:
        self._tokens += token_ids

    def propose(self, count: int) -> list[int]:
        length = len(self._tokens)
        (whole,) = [s for s in self._sequences if s[:length] == self._tokens] or [[]]
        known = whole[length : length + count]
        return [token if (length + i) % 3 else (token + 1) % 320 for i, token in enumerate(known)]

    def finish(self, num_prompt_tokens: int) -> None:
        pass


@pytest.mark.product
@pytest.mark.parametrize(("depth", "size"), [(1, 1), (2, 4)])
def test_steps_with_drafts_give_the_bits_of_the_cpu_without(
    model: LoadedModel, gpu_runner: Any, monkeypatch: pytest.MonkeyPatch, depth: int, size: int
) -> None:
    specs = _specs()
    expected, _ = _run(_cpu_runner(model), specs, None, 1)
    sequences = [[*spec.prompt_token_ids, *expected[spec.request_id][0]] for spec in specs]
    monkeypatch.setitem(speculation.DRAFTERS, "ngram", lambda config: lambda cache_salt: _Guesser(sequences))
    steps = SimpleNamespace(verified=0)
    sample = gpu_runner._sample

    def count(hidden: Any, sampled: Any, stages: Any) -> Any:
        steps.verified += sampled.drafts is not None
        return sample(hidden, sampled, stages)

    monkeypatch.setattr(gpu_runner, "_sample", count)
    config = SpeculativeConfig(method="ngram", num_speculative_tokens=size, adaptive=False)
    plan = SpeculationPlan(config, steps_ahead=depth > 1, costs=StepCosts(step=1.0, row=0.0, result=0.0))
    found, scheduler = _run(gpu_runner, specs, plan, depth)
    assert found == expected
    stats = scheduler.stats()
    assert 0 < stats.num_accepted_tokens < stats.num_draft_tokens
    assert stats.num_preemptions > 0
    assert steps.verified > 3
    assert stats.num_drafts > steps.verified / 2
