"""Axis A16: real weights give the recorded digests on every card of an architecture."""

from __future__ import annotations

import json
from pathlib import Path

import golden_digests
import pytest
import torch

pytestmark = pytest.mark.gpu

RECORD = Path(__file__).with_name("smollm2_sm_90.json")


@pytest.fixture(scope="module")
def model() -> Path:
    path = golden_digests.folder()
    if path is None:
        pytest.skip(f"needs {golden_digests.MODEL} in the cache: sempre pull {golden_digests.MODEL}")
    return path


@pytest.fixture(scope="module")
def digests(model: Path) -> tuple[dict[str, str], list[str]]:
    return golden_digests.compute(model)


def test_real_weights_in_small_batches_without_graphs(model: Path, digests: tuple[dict[str, str], list[str]]) -> None:
    small = golden_digests.compute(model, enforce_eager=True, max_num_seqs=13, max_num_batched_tokens=77)[1]
    assert small == digests[1]


def test_the_ordinary_matmul_gives_other_digests(model: Path, digests: tuple[dict[str, str], list[str]]) -> None:
    """The control: these digests can differ."""
    assert golden_digests.compute(model, numerics="control")[1] != digests[1]


def test_the_recorded_digests(digests: tuple[dict[str, str], list[str]]) -> None:
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip(f"recorded for sm_90, found {torch.cuda.get_device_name()}")
    assert RECORD.exists(), f"no digests are recorded; see {golden_digests.__file__}"
    record = json.loads(RECORD.read_text())
    fingerprint, found = digests
    others = {
        name: (value, fingerprint.get(name))
        for name, value in record["fingerprint"].items()
        if name not in golden_digests.FREE and fingerprint.get(name) != value
    }
    if others:
        pytest.skip(f"recorded under another fingerprint (recorded, found): {others}")
    assert found[:64] == record["greedy"]
    assert found[64:] == record["sampled"]
