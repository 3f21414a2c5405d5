"""A checkpoint's file leaves the memory as it is read, and only the file."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from sempre.workers.host_memory import MappedFiles
from sempre.workers.tensor_source import DroppedSafetensors, SafetensorsSource, open_safetensors

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="memory of files is dropped on Linux only")
MEGABYTES = 64


def _file_megabytes() -> int:
    """Of mapped files, in this process's memory."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssFile"))
    return int(line.split()[1]) // 1024


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    rows = torch.arange(MEGABYTES * 2**18, dtype=torch.float32).view(8, -1)
    save_file({f"t{i}": row.clone() for i, row in enumerate(rows)}, tmp_path / "model.safetensors")
    return tmp_path


def _grown(folder: Path, kind: type[SafetensorsSource]) -> tuple[int, list[bytes]]:
    """How much more of files is in memory once all tensors were hashed; the hashes."""
    with open_safetensors(folder, kind) as source:
        before = _file_megabytes()
        digests = []
        for i in range(8):
            tensor = source.read(f"t{i}")
            digests.append(source.digest(f"t{i}", tensor))
            assert tensor[-1].item() == (i + 1) * MEGABYTES * 2**15 - 1, "it stays valid"
        return _file_megabytes() - before, digests


def test_hashed_tensors_leave_the_memory_and_stay_valid(folder: Path) -> None:
    dropped, digests = _grown(folder, DroppedSafetensors)
    kept, expected = _grown(folder, SafetensorsSource)
    assert digests == expected
    assert dropped < MEGABYTES // 8
    assert kept > MEGABYTES // 2, "the control"


def test_what_was_read_before_the_last_leaves_the_memory_too(folder: Path) -> None:
    with open_safetensors(folder, DroppedSafetensors) as source:
        before = _file_megabytes()
        sums = [source.read(f"t{i}").double().mean().item() for i in range(8)]
        assert _file_megabytes() - before <= 40
    assert sums == [(i + 0.5) * MEGABYTES * 2**15 - 0.5 for i in range(8)]


def test_memory_of_anything_else_is_left_alone(folder: Path) -> None:
    own = torch.arange(2**20, dtype=torch.float32)
    with open_safetensors(folder) as source:
        source.read("t0")
        MappedFiles().drop(own)
    assert torch.equal(own, torch.arange(2**20, dtype=torch.float32))
