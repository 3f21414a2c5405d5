"""A start-up that fails says why, with the error's own type, and leaves nothing behind."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest

from sempre.engine.client.engine_process import ProcessOptions
from sempre.engine.client.process import ProcessClient
from sempre.engine.coordinator.process import CoordinatorArguments
from sempre.engine.harness import Cluster
from sempre.ipc.config import EngineConfig
from sempre.ipc.errors import SeedMismatch, StartupError, TensorMismatch
from sempre.ipc.messages import StartupProgress

Start = Callable[..., Cluster]


@pytest.fixture(autouse=True)
def _no_folder_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Private folders go where they can be counted; the path is short enough for sockets."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.delenv("XDG_RUNTIME_DIR", raising=False)


def test_progress_is_reported_by_phase() -> None:
    config = EngineConfig(model="scripted-light", model_path="/", data_parallel_size=2)
    phases: list[StartupProgress] = []
    options = ProcessOptions(worker_module="light_worker")
    with ProcessClient.launch(config, options=options, on_progress=phases.append) as client:
        assert [progress.phase for progress in phases] == ["start", "load", "warm_up"]
        assert all(progress.seconds >= 0 for progress in phases)
        assert [progress.compile_seconds for progress in phases] == [0.0, 0.25, 0.0], "of the slowest worker"
        assert client.ready.world_size == len(client.ready.worker_pids) == 2
        assert {"start", "load", "warm_up"} <= set(client.ready.phase_seconds)


def test_the_smallest_worker_decides_for_all(start_odd: Start) -> None:
    ready = start_odd("less memory", data_parallel_size=2).ready
    assert (ready.num_blocks, ready.max_model_len, ready.max_num_seqs) == (7, 70, 3)


def test_an_error_of_the_project_keeps_its_type(start_odd: Start, tmp_path: Path) -> None:
    with pytest.raises(TensorMismatch, match="tensor w") as error:
        start_odd("tensor is missing")
    assert (error.value.tensor, error.value.expected, error.value.found) == ("w", "[2]", "none")
    assert list(tmp_path.iterdir()) == []


def test_any_other_error_names_rank_and_cause_and_shows_the_traceback(start_odd: Start, tmp_path: Path) -> None:
    with pytest.raises(StartupError, match=r"worker 0 .* died") as error:
        start_odd("load crashes")
    assert error.value.rank == 0
    assert error.value.cause == "KeyError: 'a bug'"
    assert "odd_workers.py" in str(error.value)
    assert list(tmp_path.iterdir()) == []


def test_an_exit_shows_the_worker_s_last_lines(start_odd: Start, tmp_path: Path) -> None:
    with pytest.raises(StartupError, match="the last line of a worker") as error:
        start_odd("load exits", data_parallel_size=2)
    assert error.value.rank == 1
    assert error.value.cause == "exit code 3"
    assert list(tmp_path.iterdir()) == []


def test_a_worker_that_is_never_ready_is_given_up(start_odd: Start, tmp_path: Path) -> None:
    with pytest.raises(StartupError, match="not ready after 2 s") as error:
        start_odd("never loads", startup_timeout_s=2.0)
    assert error.value.rank == 0
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("oddity", "when", "generator"),
    [
        ("draws before load", "before the model is loaded", "python_random"),
        ("draws at warm-up", "after warm-up", "torch_cpu"),
    ],
)
def test_a_worker_that_is_seeded_differently_stops_the_start(
    start_odd: Start, tmp_path: Path, oddity: str, when: str, generator: str
) -> None:
    with pytest.raises(SeedMismatch, match=f"rank 1 .* {when}") as error:
        start_odd(oddity, data_parallel_size=2)
    assert error.value.rank == 1
    assert error.value.found.startswith(f"{generator}=")
    assert error.value.expected != error.value.found
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("oddity", "difference"),
    [
        ("other vocabulary", "vocab_size: expected 1000, found 7"),
        ("other end", r"eos_token_ids: expected .*, found \[7\]"),
        ("other fingerprint", "fingerprint: expected .*, found {'torch': '7'}"),
        ("other block size", "kv_block_bytes: expected [0-9]+, found 7"),
    ],
)
def test_workers_that_are_not_alike_stop_the_start(start_odd: Start, oddity: str, difference: str) -> None:
    with pytest.raises(StartupError, match=f"rank 1 differs from rank 0 in {difference}") as error:
        start_odd(oddity, data_parallel_size=2)
    assert error.value.rank == 1


def test_a_worker_program_that_does_not_exist_is_named() -> None:
    with pytest.raises(StartupError, match="No module named"):
        Cluster("tiny", worker_module="no_such_worker")


def test_a_worker_whose_coordinator_is_gone_does_not_start() -> None:
    """It may end between starting the worker and the worker's first look; nothing would tell the worker afterwards."""
    arguments = ["--connect", "ipc:///nowhere", "--rank", "0", "--parent-pid", "1", "--client-pid", str(os.getpid())]
    program = [sys.executable, "-m", "light_worker", *arguments]
    done = subprocess.run(program, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (1, "the process that started this one is gone\n")


def test_a_coordinator_whose_client_is_gone_does_not_start(tmp_path: Path) -> None:
    config = EngineConfig(model="scripted-light", model_path="/")
    worker = "light_worker"
    arguments = CoordinatorArguments(config=config, directory=str(tmp_path), client_pid=1, worker_module=worker)
    program = [sys.executable, "-m", "sempre.engine.coordinator"]
    done = subprocess.run(program, input=msgspec.json.encode(arguments), capture_output=True, timeout=60)
    assert done.returncode == 1
    assert not tmp_path.exists()


def test_the_coordinator_imports_no_torch_and_no_numpy() -> None:
    program = (
        "import sys, sempre.engine.coordinator.process, sempre.engine.coordinator.core, sempre.engine.client.process\n"
        "print(sorted({'torch', 'numpy', 'numba', 'transformers', 'asyncio.runners'} & set(sys.modules)))"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert result.stdout.strip() in ("[]", "['asyncio.runners']")
