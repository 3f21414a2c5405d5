"""One real server process for all tests of its clients."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from server_process import ServerProcess

FLAGS = ("--max-model-len", "512", "--max-num-seqs", "64", "--num-threads", "1", "--device", "cpu")


@pytest.fixture(scope="session")
def server_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with ServerProcess(tmp_path_factory.mktemp("online") / "log", *FLAGS) as process:
        yield process.url
