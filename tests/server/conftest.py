"""One server for the tests of its interface; tests of its end start their own."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from server_process import ServerProcess

FLAGS = ("--max-model-len", "256", "--max-num-seqs", "8", "--num-threads", "1", "--seed", "3")


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    folder: Path = tmp_path_factory.mktemp("server")
    with ServerProcess(folder / "log", *FLAGS, "--log-format", "json") as process:
        yield process
