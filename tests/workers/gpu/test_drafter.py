"""Drafts of a draft model whose sequences stay with their runner, against those of one to which they are new.

The GPU's drafter runs where there is no GPU: the CPU computes the forward pass, Triton's interpreter the rest.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from draft_cases import differences, draft_from_scratch, make_requests
from no_gpu import without_gpu
from safetensors.torch import load_file, save_file
from worker_settings import worker_config

from sempre.ipc.messages import DraftRequest
from sempre.kernels.attention import KvCache
from sempre.workers.cpu.backend import CpuBackend, LoadedModel
from sempre.workers.drafters.base import DraftModelRunner
from sempre.workers.drafters.model import ModelDrafter, _Sequence
from sempre.workers.kv_cache import PagedKvCache
from sempre.workers.layers.module import Scratch, allocate, sharing
from sempre.workers.model_loading import load_with_adapters, model_setup
from sempre.workers.models.base import CausalLM
from sempre.workers.sampling import SamplingState
from sempre.workers.state_cache import CacheSizes
from sempre.workers.step_validation import StepLimits
from sempre.workers.steps import StepInput

MAX_SEQS, MAX_TOKENS, MAX_LEN, NUM_BLOCKS = 3, 12, 64, 9


@pytest.fixture(scope="module")
def model(checkpoints: Callable[[str], Any], tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    """Large weights, so that the next token depends on all tokens and not only on the last one."""
    folder: Path = tmp_path_factory.mktemp("draft")
    shutil.copytree(checkpoints("llama").folder, folder, dirs_exist_ok=True)
    (file,) = folder.glob("*.safetensors")
    tensors = {name: tensor * (10 if "proj" in name else 1) for name, tensor in load_file(file).items()}
    save_file(tensors, file, {"format": "pt"})
    config = worker_config(
        folder,
        dtype="float32",
        max_model_len=MAX_LEN,
        max_num_seqs=MAX_SEQS,
        max_num_batched_tokens=MAX_TOKENS,
    )
    backend = CpuBackend()
    backend.begin(config)
    return load_with_adapters(model_setup(config, backend), backend)


def _padded(model: CausalLM) -> CausalLM:
    """The CPU's, with padding like a GPU's: it is written to an unused block, and reads some other key, as the CPU's
    kernels refuse rows without keys."""
    model = sharing(model)
    forward = model.forward

    def padded(step: StepInput, caches: Sequence[KvCache]) -> torch.Tensor:
        nowhere = NUM_BLOCKS * 16
        slot_mapping = torch.where(step.slot_mapping < 0, nowhere, step.slot_mapping)
        context_lens = step.batch.context_lens.maximum(step.batch.query_starts.diff())
        batch = replace(step.batch, context_lens=context_lens)
        return forward(replace(step, slot_mapping=slot_mapping, batch=batch), caches)

    model.forward = padded  # type: ignore[method-assign]
    allocate(model, Scratch(MAX_TOKENS, MAX_LEN, torch.float32, torch.device("cpu")))
    return model


def _on_cpu(model: LoadedModel, num_blocks: int = NUM_BLOCKS) -> ModelDrafter:
    backend = CpuBackend()
    return ModelDrafter(backend.make_drafter(backend.make_runner(model, CacheSizes(num_blocks))), max_num_seqs=MAX_SEQS)


@pytest.fixture
def gpu_drafter(model: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> DraftModelRunner:
    pytest.importorskip("triton", reason="needs the triton package (test requirement on Linux)")
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU: tests/gpu runs the compiled kernels")
    from sempre.kernels.sampling.gpu import Tiles
    from sempre.workers.gpu import drafter, staging
    from sempre.workers.gpu.runner import StepMemory
    from sempre.workers.sampling.gpu_sampler import GpuSampler

    without_gpu(monkeypatch, staging, drafter)
    spec = model.spec
    tiles = Tiles(noise=512, logprobs=512, edits=512, phrases=4, cut=512, cut_piece=512, cut_sample=2, cut_list=16)
    device = torch.device("cpu")
    memory = StepMemory(
        _padded(model.model),
        GpuSampler(device=device, vocab_size=spec.vocab_size, max_num_seqs=MAX_SEQS, num_slots=MAX_SEQS, tiles=tiles),
        torch.empty(MAX_SEQS, spec.hidden_size),
        torch.empty(MAX_SEQS, spec.vocab_size),
    )
    limits = StepLimits(MAX_LEN, MAX_SEQS, MAX_TOKENS, spec.vocab_size)
    cache = PagedKvCache(spec.kv_layers, NUM_BLOCKS + 1, 16, model.weights.dtype)
    cache.num_blocks = NUM_BLOCKS
    return drafter.GpuDraftModelRunner(memory, cache, limits, graphs=False)


def test_sequences_that_stay_on_a_cpu(model: LoadedModel) -> None:
    assert differences(_on_cpu(model), partial(_on_cpu, model), 40) == []


@pytest.mark.product
def test_sequences_that_stay_on_a_gpu(model: LoadedModel, gpu_drafter: DraftModelRunner) -> None:
    gpu_drafter.prepare()
    assert differences(ModelDrafter(gpu_drafter, max_num_seqs=MAX_SEQS), partial(_on_cpu, model), 12) == []


def test_what_a_proposal_on_a_gpu_leaves_behind(model: LoadedModel, gpu_drafter: Any) -> None:
    """Counts and history are those of the known tokens and the drafts, whatever was drafted before."""
    from sempre.kernels.sampling import gpu_table
    from sempre.workers.sampling.per_request_tensors import PerRequestTensors

    drafter = ModelDrafter(gpu_drafter, max_num_seqs=MAX_SEQS)
    new = make_requests()[2]
    drafter.add(new)
    tokens, more = list(new.token_ids), []
    for num_right in (4, 1, 0):
        drafts = drafter.propose([DraftRequest(request_id=new.request_id, token_ids=more, num_drafts=4)])[0]
        assert drafts == draft_from_scratch(_on_cpu(model), new, tokens, 4)
        slot = gpu_drafter._states[new.request_id].slot
        found = gpu_drafter._sampler._tensors[slot].tensors
        state = SamplingState(new.params, new.seed, tokens + drafts, new.num_prompt_tokens)
        expected = PerRequestTensors.of(state, model.spec.vocab_size, torch.device("cpu")).tensors
        assert torch.equal(found[gpu_table.COUNTS], expected[gpu_table.COUNTS])
        length = len(tokens + drafts)
        assert torch.equal(found[gpu_table.HISTORY][:length], expected[gpu_table.HISTORY][:length])
        more = [*drafts[:num_right], 77]
        tokens += more


def test_keys_and_values_of_wrong_drafts_are_noticed(model: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """The control: without the rollback, drafts differ."""
    forget = _Sequence.forget_wrong_drafts

    def keep(sequence: _Sequence) -> int:
        num_computed = min(sequence.num_computed, len(sequence.token_ids) - 1)
        num_right = forget(sequence)
        sequence.num_computed = num_computed
        return num_right

    monkeypatch.setattr(_Sequence, "forget_wrong_drafts", keep)
    assert differences(_on_cpu(model), partial(_on_cpu, model), 40)
