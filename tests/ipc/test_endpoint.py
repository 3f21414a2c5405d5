"""The private folder of sockets and logs."""

from __future__ import annotations

import random
import stat
from pathlib import Path

import pytest

from sempre.ipc.endpoint import PrivateDirectory


def test_only_the_owner_can_enter() -> None:
    directory = PrivateDirectory.create()
    assert stat.S_IMODE(directory.path.stat().st_mode) == 0o700
    (directory.path / "file").touch()
    directory.remove()
    assert not directory.path.exists()
    directory.remove()


def test_addresses_stay_within_the_limit_of_socket_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    deep = tmp_path / ("x" * 100)
    deep.mkdir()
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(deep))
    directory = PrivateDirectory.create()
    try:
        assert deep not in directory.path.parents
        assert max(len(directory.client_address), len(directory.worker_address)) - len("ipc://") <= 107
    finally:
        directory.remove()


def test_the_runtime_folder_is_preferred(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runtime = Path("/tmp") / tmp_path.name
    runtime.mkdir(exist_ok=True)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(runtime))
    directory = PrivateDirectory.create()
    assert directory.path.parent == runtime
    directory.remove()
    runtime.rmdir()


def test_naming_the_folder_draws_no_global_random_number() -> None:
    before = random.getstate()
    PrivateDirectory.create().remove()
    assert random.getstate() == before
