"""Drafts of a draft model whose layers keep states: those of one to which the sequences are new, whatever became of the
drafts before."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import pytest
from draft_cases import differences
from hybrid_checkpoint import write_hybrid_checkpoint
from worker_settings import worker_config

from sempre.ipc.errors import ConfigError
from sempre.workers.cpu import drafter
from sempre.workers.cpu.backend import CpuBackend, LoadedModel
from sempre.workers.drafters.model import ModelDrafter
from sempre.workers.model_loading import load_with_adapters, model_setup
from sempre.workers.state_cache import CacheSizes, StateNeeds

MAX_SEQS, NUM_BLOCKS = 3, 9


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    """With weights so large that the next token depends on all tokens."""
    folder = write_hybrid_checkpoint(tmp_path_factory.mktemp("draft"))
    _enlarge(folder)
    config = worker_config(
        folder,
        role="draft",
        load_format="dummy",
        dtype="float32",
        max_model_len=64,
        max_num_seqs=MAX_SEQS,
        max_num_batched_tokens=12,
    )
    backend = CpuBackend()
    backend.begin(config)
    return load_with_adapters(model_setup(config, backend), backend)


def _enlarge(folder: Path) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"initializer_range": 0.2}))


def _drafter(model: LoadedModel) -> ModelDrafter:
    backend = CpuBackend()
    runner = backend.make_runner(model, CacheSizes(NUM_BLOCKS, model.states.num_own))
    return ModelDrafter(backend.make_drafter(runner), max_num_seqs=MAX_SEQS)


def test_sequences_that_stay(model: LoadedModel) -> None:
    assert differences(_drafter(model), partial(_drafter, model), 12) == []


def test_states_after_wrong_drafts_are_noticed(model: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """The control: with one slot for both states, drafts differ."""
    monkeypatch.setattr(drafter._Progress, "_slot_after", lambda self, num_tokens: self.slots.known)
    assert differences(_drafter(model), partial(_drafter, model), 12)


def test_two_slots_for_each_sequence_and_no_others(model: LoadedModel) -> None:
    needs = model.states
    assert (needs.num_own, needs.own_bytes) == (2 * MAX_SEQS, 2 * MAX_SEQS * needs.slot_bytes)
    assert needs.num_slots(1 << 40, "memory") == 2 * MAX_SEQS
    assert StateNeeds(0, MAX_SEQS, uses_spare=True, is_draft=True).num_own == 0
    with pytest.raises(ConfigError, match=r"max_num_seqs: 3 requests keep two states of \d+ bytes each"):
        needs.num_slots(needs.own_bytes - 1, "memory")
