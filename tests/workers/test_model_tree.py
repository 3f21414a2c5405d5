"""The tree of every family: its paths are the checkpoint's names, and a part of it can be taken for another runner."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from family_names import NAMES
from worker_settings import worker_config

from sempre.workers.layers.linear import Linear
from sempre.workers.layers.linear_kernel import INVARIANT
from sempre.workers.layers.module import Build, RowBuffer, Scratch, allocate, parameters, sharing
from sempre.workers.layers.separate_experts import SeparateExperts
from sempre.workers.loading import load_model, tensors_of
from sempre.workers.models.registry import FILES, build_model, load_spec
from sempre.workers.quantization.plain import NotQuantized
from sempre.workers.tensor_source import open_safetensors


@pytest.mark.parametrize("name", NAMES)
def test_the_tree_names_the_tensors_of_the_checkpoint(name: str, checkpoints: Any) -> None:
    folder = checkpoints(name).folder
    model = build_model(Build(INVARIANT, NotQuantized()), load_spec(folder))
    with open_safetensors(folder) as file:
        source = SeparateExperts(file) if model.may_stack_experts else file
        saved = {key: source.shape(key) for key in source.names()}
    if model.part is not None:
        own = {model.part.own_name(k): v for k, v in saved.items() if not k.startswith(model.part.others)}
        assert len(own) < len(saved)
        saved = own
    named = {key: parameter.shape for key, parameter in parameters(model).items()}
    assert {key: shape for key, shape in saved.items() if key not in model.copies} == named


def test_every_architecture_is_tried(checkpoints: Any) -> None:
    assert {load_spec(checkpoints(name).folder).architecture for name in NAMES} == set(FILES)


def test_rows_of_a_buffer_are_its_first_ones_whatever_was_asked_for_before() -> None:
    rows = torch.arange(12.0).view(4, 3)
    buffer = RowBuffer(rows)
    for count in (4, 2, 2, 3, 0, 4, 1):
        assert torch.equal(buffer.first(count), rows[:count])
        assert buffer.first(count).data_ptr() == rows[:count].data_ptr()


def test_a_tree_that_shares_has_its_own_buffers(checkpoints: Any) -> None:
    folder = checkpoints("qwen3-moe").folder
    model, _ = load_model(worker_config(folder), load_spec(folder), INVARIANT)
    allocate(model, Scratch(32, 64, torch.float32, torch.device("cpu")))
    twin = sharing(model)
    allocate(twin, Scratch(8, 64, torch.float32, torch.device("cpu")))
    pairs = list(zip(model.walk(), twin.walk(), strict=True))
    assert all(path == other for (path, _), (other, _) in pairs)
    assert not any(module is other for (_, module), (_, other) in pairs)
    ours, theirs = (
        [module for _, module in tree.walk() if isinstance(module, Linear) and hasattr(module, "_out")]
        for tree in (model, twin)
    )
    assert len(ours) == len(theirs) > 10
    for a, b in zip(ours, theirs, strict=True):
        assert a.weight is b.weight
        assert a._out.first(8).data_ptr() != b._out.first(8).data_ptr()
    assert [t.data_ptr() for t in tensors_of(model)] == [t.data_ptr() for t in tensors_of(twin)]
